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
from model_checks import call_of, check_decoding, check_layers, check_rows, unsteady_calls
from model_weights import experts_of, put_bf16_experts, put_fp8_experts, write_checkpoint
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


@torch.no_grad()
def decode(model, batch, options, clock, use_graph):
    """Tokens per second of decoding: each step launched by itself, or as a graph."""
    ids = torch.arange(batch * options.context, device=model.device).reshape(batch, -1) * 7 % model.config.vocab_size
    steps = options.steps
    # batched_mm copies the weights of every row. So transformers' generate() has it for decoding alone.
    is_batched = model.get_experts_implementation()[""] == "batched_mm"
    if is_batched:
        model.set_experts_implementation("grouped_mm")
    decoder = Decoder(model, ids, options.context + 2 * steps + 8)
    if is_batched:
        model.set_experts_implementation("batched_mm")
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
        # As often in one graph as the layers of layer_us(): a GPU's clock falls under load.
        graph = clock.in_graph(
            lambda: [sluice.experts_grouped(experts, batch, recipe, out=out) for _ in range(options.moe)])  # noqa: B023
        times[tokens] = clock.us(graph, options.steps, options.moe)
    return times


# --- The report -----------------------------------------------------------------------------------


def check_attention(model, report, options, clock):
    """Decodes by steps and again, in a graph too, and repeats each operation: with the attention that torch chooses,
    and on a GPU without cuDNN's, whose kernel for a cache of fixed size gives other last bits from call to call."""
    kinds = ["steps", "steps", "graph", "graph"] if clock.is_gpu else ["steps"]
    for attention in ("as torch chooses", "without cuDNN") if clock.is_gpu else ("as torch chooses",):
        torch.backends.cuda.enable_cudnn_sdp(attention == "as torch chooses")
        found = {"unsteady": unsteady_calls(model, options), "runs": check_decoding(model, options, kinds)}
        report["decoded_again"][attention] = found
        print(json.dumps({attention: found}), flush=True)
    torch.backends.cuda.enable_cudnn_sdp(True)


def measure_fp8(model, report, options, clock):
    put_fp8_experts(model)
    clock.release()
    model.set_experts_implementation("grouped_mm")
    report["models"].append(measure(model, "transformers FP8, grouped_mm", options, clock, options.batches))
    if not report["models"][-1]["failed"]:
        check_layers(model, options, report["relative_l2"], "FP8, grouped_mm")


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
    for attention, found in report["decoded_again"].items():
        for how, differs in found["runs"].items():
            print(f"attention {attention}, steps and again {how}: {differs or 'every operation gives the same bits'}")
        for name, others in found["unsteady"].items():
            print(f"attention {attention}, {name}: {others[0]} of {others[1]} calls repeated give other bits")
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
              "transformers": transformers.__version__, "options": vars(options), "failed": {}, "decoded_again": {}}
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
    check_attention(model, report, options, clock)
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
    model.set_experts_implementation("batched_mm")
    small = [batch for batch in options.batches if batch <= 16]
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
