"""A model of DeepSeek-R1's geometry, of few layers and random weights, with its experts in Sluice and in transformers.

python python/benchmarks/transformers_model.py [--json FILE] [--folder DIR] [--commit NAME]

Makes a W4AFP8 checkpoint on the GPU, with 2 dense and 4 MoE layers (33 GB in --folder), and loads it with
from_pretrained(). It is checked first; then decoding, prefill and one layer's experts are timed. In the same model
transformers' own experts then take the place of Sluice's: bf16, which are exactly the values that the INT4 weights
stand for, and FP8 if transformers has its kernels. Attention and everything else is transformers' throughout.

What is checked: rows of the experts have the same bits in every length of a call, are within 5.5 % (relative L2) of
float32 on the same weights, and give the same bits in a CUDA graph as in single steps wherever they are given the same.
Whether the rest of the model does so too is reported: two decodings by steps are compared as well.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from model_weights import MATRICES, dequantized, experts_of, put_bf16_experts, put_fp8_experts, write_checkpoint
from transformers import AutoModelForCausalLM, DeepseekV3Config

import sluice
from sluice.integrations.transformers import SluiceExperts

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from transformers_graph import Decoder  # noqa: E402

GEOMETRIES = {
    "r1": {"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
           "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "q_lora_rank": 1536,
           "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
    "tiny": {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
             "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 16, "q_lora_rank": 64,
             "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32},
}
BOUND = 0.055  # Relative L2 of the experts' sums: what rounding to e4m3 twice costs, with room.


# --- Measuring ------------------------------------------------------------------------------------


class Clock:
    """Times on the device, where it is a GPU; else of the host."""

    def __init__(self, device):
        self.is_gpu = device.type == "cuda"

    def wait(self):
        if self.is_gpu:
            torch.cuda.synchronize()

    def us(self, call, repeats, calls=1):
        """Median microseconds of one of `calls` that call() makes."""
        call()
        self.wait()
        times = []
        for _ in range(repeats):
            if self.is_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e3)
            else:
                begin = time.perf_counter()
                call()
                times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times) / calls

    def in_graph(self, call):
        """call() as a CUDA graph, after one call on the stream of the capture."""
        if not self.is_gpu:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def held_gb(self):
        """GPU memory that is taken, by anybody."""
        if not self.is_gpu:
            return None
        self.wait()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e9

    def release(self):
        if self.is_gpu:
            self.wait()
            torch.cuda.empty_cache()


def call_of(config, num_tokens, device, seed=1):
    """x [T, H] as a norm gives it, ids and weights [T, K] as a router with evenly used experts gives them."""
    draw = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(num_tokens, config.hidden_size, device=device, generator=draw).bfloat16()
    scores = torch.rand(num_tokens, config.n_routed_experts, device=device, generator=draw)
    weights, idx = scores.topk(config.num_experts_per_tok)
    return x, idx, weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor


@torch.no_grad()
def decode(model, batch, options, clock, use_graph):
    """Tokens per second of decoding: each step launched by itself, or as a graph."""
    ids = torch.arange(batch * options.context, device=model.device).reshape(batch, -1) * 7 % model.config.vocab_size
    steps = options.steps
    decoder = Decoder(model, ids, options.context + 2 * steps + 8)
    if use_graph:
        decoder.capture()
    return batch / clock.us(decoder.next, 2 * steps) * 1e6


@torch.no_grad()
def prefill_ms(model, options, clock):
    ids = torch.arange(options.prefill, device=model.device)[None] * 7 % model.config.vocab_size
    return clock.us(lambda: model(ids, use_cache=False, logits_to_keep=1), 5) / 1e3


@torch.no_grad()
def layer_us(model, num_tokens, options, clock):
    """Of one layer's experts, all layers in turn in one graph."""
    modules = list(experts_of(model).values())
    call = call_of(model.config, num_tokens, model.device)
    return clock.us(clock.in_graph(lambda: [module(*call) for module in modules]), options.steps, len(modules))


def attempt_in(failed, clock):
    """attempt(what, run): run(), or None where it fails, which the report says."""
    def attempt(what, run):
        try:
            return run()
        except Exception as error:  # noqa: BLE001  Of any kind: the report names it, and the rest is measured.
            failed[what] = f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0][:100]}"
            clock.release()
            return None

    return attempt


def measure(model, name, options, clock, batches, prefill=True):
    """A row of the table: what the model reaches with the experts that it has."""
    row = {"experts": name, "loaded_gb": clock.held_gb(), "decode_tokens_per_s": {}, "layer_us": {}, "failed": {},
           "prefill_ms": None, "peak_gb": None}
    attempt = attempt_in(row["failed"], clock)
    attempt("a call", lambda: layer_us(model, 1, options, clock))
    if row["failed"]:  # Then nothing else would run.
        return row
    for batch in batches:
        rates = row["decode_tokens_per_s"][batch] = {"steps": None, "graph": None}
        for how in ("steps", "graph") if clock.is_gpu else ("steps",):
            rates[how] = attempt(f"decode, batch {batch}, {how}",
                                 lambda: decode(model, batch, options, clock, how == "graph"))  # noqa: B023  At once.
    for tokens in [*batches, options.prefill] if prefill else batches:
        row["layer_us"][tokens] = attempt(f"layer, {tokens} tokens",
                                          lambda tokens=tokens: layer_us(model, tokens, options, clock))
    row["prefill_ms"] = attempt("prefill", lambda: prefill_ms(model, options, clock)) if prefill else None
    row["peak_gb"] = clock.held_gb()
    print(json.dumps(row), flush=True)
    return row


def stage_us(folder, layer, config, options, clock, device):
    """The two GEMMs alone, on rows that lie there quantized and sorted, as the same calls bring them."""
    backend = sluice.Backend("cpu" if device.type == "cpu" else "cuda:0")
    weights = sluice.Checkpoint(folder).load_experts(layer, 0, config.n_routed_experts)
    most = options.prefill * config.num_experts_per_tok
    experts, recipe = sluice.repack(weights, backend, max_rows=most), sluice.Recipe("direct", "normal")
    times = {}
    for tokens in [*options.batches, options.prefill]:
        x, idx, _ = call_of(config, tokens, device)
        rows = x[idx.flatten().argsort(stable=True) // config.num_experts_per_tok]
        num_rows = torch.bincount(idx.flatten(), minlength=config.n_routed_experts).int()
        codes, scale = sluice.quantize(backend, rows)
        mean = max(1, len(rows) // config.n_routed_experts)
        row_begin = num_rows.long().cumsum(0) - num_rows
        batch = sluice.ExpertBatch(codes, num_rows, x_scale=scale, row_begin=row_begin, expected_m=mean)
        out = torch.empty_like(rows)
        graph = clock.in_graph(lambda: sluice.experts_grouped(experts, batch, recipe, out=out))
        times[tokens] = clock.us(graph, options.steps)
    return times


# --- Checking -------------------------------------------------------------------------------------


def float_sums(config, layer, x, idx, weights):
    """What the layer's experts give in float32, on the values that the INT4 weights stand for."""
    y = torch.zeros(x.shape, device=x.device)
    for expert in idx.unique().tolist():
        gate, up, down = (dequantized(config, layer, expert, which, x.device).float() for which in MATRICES)
        token, k = (idx == expert).nonzero(as_tuple=True)
        rows = x[token].float()
        out = (torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
        y.index_add_(0, token, out * weights[token, k, None])
    return y


@torch.no_grad()
def check_layers(model, options, errors, name):
    """Relative L2 of each layer's sums from float32; raises where it is above BOUND."""
    for module_name, module in experts_of(model).items():
        layer = int(module_name.split(".")[2])
        call = call_of(model.config, options.checked, model.device, seed=layer)
        y, wanted = module(*call).float(), float_sums(model.config, layer, *call)
        errors.setdefault(name, {})[layer] = error = ((y - wanted).norm() / wanted.norm()).item()
        if not 0 < error < BOUND:
            sys.exit(f"{name}, layer {layer}: relative L2 {error:.4f} from float32, bound {BOUND}")


@torch.no_grad()
def check_rows(model, options):
    """A row has the same bits whatever call it is part of."""
    module = next(iter(experts_of(model).values()))
    x, idx, weights = call_of(model.config, options.prefill, model.device)
    whole = module(x, idx, weights)
    for length in (1, 2, 16, 64, 65, 256, 1000):
        rows = slice(0, min(length, options.prefill))
        if not torch.equal(module(x[rows], idx[rows], weights[rows]), whole[rows]):
            sys.exit(f"rows of a call of {length} tokens differ from those of {options.prefill}")


@torch.no_grad()
def decode_recorded(model, options, use_graph):
    """Of 8 steps: the tokens [8][B, 1], and for each step and layer what the experts were given and gave. In a graph
    the copies that are kept of those are made by the graph."""
    ids = torch.arange(2 * options.context, device=model.device).reshape(2, -1) % model.config.vocab_size
    modules = list(experts_of(model).values())
    decoder, calls, tokens, steps = Decoder(model, ids, options.context + 16), [], [], []
    hooks = [module.register_forward_hook(
        lambda _, given, gave: calls.append([tensor.clone() for tensor in (*given, gave)])) for module in modules]
    (decoder.capture if use_graph else decoder.next)()
    for _ in range(8):
        decoder.next()
        tokens.append(decoder.token.clone())
        steps.append([[tensor.clone() for tensor in call] for call in calls[-len(modules):]])
    for hook in hooks:
        hook.remove()
    return tokens, steps


def difference(first, second):
    """Where two runs of decode_recorded() part first: (step, layer, "given" or "gave"), or None."""
    for step, layers in enumerate(zip(first[1], second[1])):
        for layer, (one, other) in enumerate(zip(*layers)):
            if not all(map(torch.equal, one[:-1], other[:-1])):
                return step, layer, "given"
            if not torch.equal(one[-1], other[-1]):
                return step, layer, "gave"
    return None


def check_decoding(model, options, use_graph):
    """Decoding twice, the second time in a graph if it may: the experts give the same bits for the same input, or this
    exits. Returns what else differs, in words, or None: attention, the router and the cache are not Sluice's."""
    runs = [decode_recorded(model, options, use_graph=False), decode_recorded(model, options, use_graph=use_graph)]
    where = difference(*runs)
    if where is None:
        same = all(map(torch.equal, *(run[0] for run in runs)))
        return None if same else "the experts have the same bits, but other tokens come after them"
    step, layer, what = where
    if what == "gave":
        sys.exit(f"step {step}, MoE layer {layer}: experts give other bits for the same input")
    return f"step {step}, MoE layer {layer}: what comes to the experts has other bits"


def measure_fp8(model, report, options, clock):
    put_fp8_experts(model)
    clock.release()
    model.set_experts_implementation("grouped_mm")
    report["models"].append(measure(model, "transformers FP8, grouped_mm", options, clock, options.batches))
    if not report["models"][-1]["failed"]:
        check_layers(model, options, report["relative_l2"], "FP8, grouped_mm")


# --- The report -----------------------------------------------------------------------------------


def cell(value, digits=0):
    return "-" if value is None else f"{value:.{digits}f}"


def print_table(report, options):
    batches = options.batches
    print(f"{report['device']}, {report['date']}, commit {report['commit']}, torch {report['torch']}, "
          f"transformers {report['transformers']}")
    print(f"{options.dense} dense + {options.moe} MoE layers of {options.geometry}, {options.context} tokens before")
    head = [f"batch {b}" for b in batches]
    print(f"{'decode, tokens/s: graph (steps)':36}" + "".join(f"{h:>18}" for h in head)
          + f"{f'prefill {options.prefill}, ms':>20}{'loaded GB':>11}{'peak GB':>9}")
    for row in report["models"]:
        rates = [row["decode_tokens_per_s"].get(b) or {"graph": None, "steps": None} for b in batches]
        print(f"{row['experts']:36}" + "".join(f"{cell(r['graph'])} ({cell(r['steps'])})".rjust(18) for r in rates)
              + f"{cell(row['prefill_ms'], 1):>20}{cell(row['loaded_gb'], 1):>11}{cell(row['peak_gb'], 1):>9}")
    tokens = [*batches, options.prefill]
    print(f"{'experts of one layer, us':36}" + "".join(f"{f'{t} tokens':>18}" for t in tokens))
    for row in [*report["models"], {"experts": "the stage of Sluice alone", "layer_us": report["stage_us"]}]:
        print(f"{row['experts']:36}" + "".join(f"{cell(row['layer_us'].get(t), 1):>18}" for t in tokens))
    for row in [*report["models"], {"experts": "all", "failed": report["failed"]}]:
        for what, why in row["failed"].items():
            print(f"not run: {row['experts']}, {what}: {why}")
    for name, errors in report["relative_l2"].items():
        print(f"checked: {name}: relative L2 from float32 by layer: {', '.join(f'{e:.4f}' for e in errors.values())}")


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="r1")
    parser.add_argument("--dense", type=int, default=2)
    parser.add_argument("--moe", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--checked", type=int, default=32, help="tokens that are compared with float32")
    parser.add_argument("--folder", help="where the checkpoint is written and removed again")
    parser.add_argument("--json")
    parser.add_argument("--commit", default="unknown")
    return parser.parse_args()


def run(options, folder):
    device = torch.device("cuda:0" if options.device == "cuda" else options.device)
    clock, begin = Clock(device), time.perf_counter()
    report = {"date": time.strftime("%Y-%m-%d"), "commit": options.commit, "torch": torch.__version__,
              "device": torch.cuda.get_device_name() if clock.is_gpu else "cpu", "models": [], "relative_l2": {},
              "transformers": transformers.__version__, "options": vars(options), "failed": {}}
    config = DeepseekV3Config(num_hidden_layers=options.dense + options.moe, first_k_dense_replace=options.dense,
                              eos_token_id=None, dtype="bfloat16", **GEOMETRIES[options.geometry])

    attempt = attempt_in(report["failed"], clock)

    def said(what):
        clock.wait()
        print(f"{time.perf_counter() - begin:6.1f} s  {what}", flush=True)

    said(f"checkpoint of {write_checkpoint(folder, config, device) / 1e9:.2f} GB written")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=str(device))
    assert all(isinstance(module, SluiceExperts) for module in experts_of(model).values())
    said(f"loaded, {len(experts_of(model))} layers in Sluice")
    clock.release()
    check_layers(model, options, report["relative_l2"], "Sluice, INT4")
    check_rows(model, options)
    for how in ("steps", "graph") if clock.is_gpu else ("steps",):
        differs = check_decoding(model, options, use_graph=how == "graph")
        if differs:
            report["failed"][f"decoding by steps and again, {how}"] = differs
    clock.release()
    said("checked")
    report["models"].append(measure(model, "Sluice, INT4", options, clock, options.batches))
    report["stage_us"] = attempt("the stage of Sluice alone", lambda: stage_us(
        folder, options.dense, config, options, clock, device)) or {}
    print(json.dumps({"stage_us": report["stage_us"]}), flush=True)
    said("measured")
    put_bf16_experts(model)
    model.set_experts_implementation("grouped_mm")
    check_layers(model, options, report["relative_l2"], "bf16, grouped_mm")
    clock.release()
    said("bf16 experts in their place, checked")
    report["models"].append(measure(model, "transformers bf16, grouped_mm", options, clock, options.batches))
    model.set_experts_implementation("batched_mm")  # What generate() changes to for decoding on a GPU.
    small = [batch for batch in options.batches if batch <= 16]  # It copies the weights of every row.
    report["models"].append(measure(model, "transformers bf16, batched_mm", options, clock, small, prefill=False))
    clock.release()
    said("measured")
    attempt("transformers FP8, made", lambda: measure_fp8(model, report, options, clock))
    said("done")
    return report


def main():
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report = run(options, folder)
    print_table(report, options)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
