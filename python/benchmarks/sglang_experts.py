"""SGLang's own W4AFP8 method object with Sluice's experts: memory while it loads, graphs, and time of a layer.

    sglang_experts.py [none | deepep] [cpu]     # build/engines/sglang has SGLang's files (scripts/setup.sh)

R1's 32 local experts of one rank, random weights, four layers; with cpu toy sizes and no times. `none` is
--moe-a2a-backend none, where each rank has all tokens and an eighth of their entries, `deepep` the experts of low
latency. Every graph's output is compared with the calls that it was captured from, and with `none` with the same tokens
in the largest batch, bit by bit; the first layer with float32 of its weights. Then its time in a graph of all layers
is set beside that of Sluice's expert stage alone on as many rows.
"""

import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "python"))

import sglang_engine  # noqa: E402
from sglang_engine import Rank, load_engine, stubs, topk_output  # noqa: E402

MODE = sys.argv[1] if len(sys.argv) > 1 else "none"
DEVICE = "cpu" if "cpu" in sys.argv else "cuda"
NUM_LAYERS, TOPK = 4, 8
HIDDEN, INTERMEDIATE, EXPERTS = (7168, 2048, 32) if DEVICE == "cuda" else (256, 128, 12)
SIZES = {"none": (1, 2, 4, 8, 16, 64, 256, 4096), "deepep": (1, 2, 4, 8, 16, 32, 64, 128)}[MODE]
if DEVICE == "cpu":
    SIZES = (1, 4, 16)
CONFIG = {"model_type": "deepseek_v3", "n_routed_experts": EXPERTS, "num_experts_per_tok": TOPK, "hidden_size": HIDDEN,
          "moe_intermediate_size": INTERMEDIATE, "routed_scaling_factor": 2.5,
          "quantization_config": {"quant_method": "w4afp8"}}


class Memory:
    """The most of the device that is in use between two points, and the host memory of this process, in MiB."""

    def __enter__(self):
        self.before, self.peak, self.is_over, self.host = self.used(), 0.0, False, self.of_host()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.is_over = True
        self.thread.join()
        self.after, self.host = self.used(), self.of_host() - self.host

    def watch(self):
        while not self.is_over:
            self.peak = max(self.peak, self.used())

    @staticmethod
    def used():
        if DEVICE == "cpu":
            return 0.0
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20

    @staticmethod
    def of_host():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 2**10


def fill(layer, draw):
    """Codes with -8 among them as a checkpoint may have; scales whose products are of the size of a model's."""
    for name, parameter in layer.named_parameters():
        for expert in parameter.data if parameter.dim() > 1 else ():
            if parameter.dtype == torch.int8:
                expert.copy_(torch.randint(-128, 128, expert.shape, generator=draw, device=DEVICE, dtype=torch.int8))
            elif "weight_scale" in name:
                scale = torch.rand(expert.shape, generator=draw, device=DEVICE) + 0.5
                expert.copy_(scale / (4.3 * (HIDDEN if name.startswith("w13") else INTERMEDIATE) ** 0.5))


def weights_of(layer, expert):
    """float32 of gate and up, and of down."""
    def of(name):
        codes = getattr(layer, f"{name}_weight")[expert].int()
        values = torch.stack([(codes << 28) >> 28, (codes << 24) >> 28], -1).flatten(-2).float()
        return values * getattr(layer, f"{name}_weight_scale_inv")[expert].float().repeat_interleave(128, -1)
    return of("w13"), of("w2")


def expected(x, ids, weights, matrices):
    y = torch.zeros(x.shape, device=x.device)
    for t, k in (ids >= 0).nonzero().tolist():
        gate_up, down = (w.to(x.device) for w in matrices[int(ids[t, k])])
        gate, up = (gate_up @ x[t].float()).chunk(2)
        y[t] += weights[t, k] * (down @ (torch.nn.functional.silu(gate) * up))
    return y


def batch(tokens, draw):
    """`none`: every rank has all tokens, and one of eight entries is of its experts. The first token has two."""
    x = torch.randn(tokens, HIDDEN, generator=draw, device=DEVICE).bfloat16()
    num = EXPERTS * (8 if MODE == "none" else 1)
    ids = torch.rand(tokens, num, generator=draw, device=DEVICE).argsort(1)[:, :TOPK].int()
    if MODE == "none":
        ids = torch.where(ids < EXPERTS, ids, -1)
        ids[0] = torch.tensor([3, 1] + [-1] * (TOPK - 2), device=DEVICE)
    return x, ids, torch.rand(tokens, TOPK, generator=draw, device=DEVICE)


def graph_of(call):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def us_of(graph, calls):
    """Of one of the `calls` in a graph: the median of 20 replays."""
    times = []
    for _ in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return statistics.median(times[3:])


def make_layers(rank, folder, draw):
    layers, first = [], None
    for number in range(NUM_LAYERS):
        with Memory() as made:
            layer = rank.layer(folder, load=False)
            fill(layer, draw)
        if first is None:
            first = [[w.cpu() for w in weights_of(layer, e)] for e in range(EXPERTS)]  # Leaves no holes on the GPU.
        size = sum(p.numel() * p.element_size() for p in layer.parameters()) / 2**20
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        time_of = time.perf_counter()
        with Memory() as repacked:
            layer.quant_method.process_weights_after_loading(layer)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            time_of = time.perf_counter() - time_of
        print(f"layer {number}: {size:.0f} MiB; memory of the device {made.before:.0f} MiB before, {repacked.before:.0f} "
              f"with weights, {repacked.peak - repacked.before:+.0f} at most while repacked "
              f"({size / EXPERTS:.1f} an expert), {repacked.after - repacked.before:+.0f} after; host "
              f"{made.host:+.0f} and {repacked.host:+.0f}; {1e3 * time_of:.2f} ms", flush=True)
        layers.append(layer)
    return layers, first


class Dispatched:
    """As SGLang's dispatcher leaves rows for its low-latency experts."""

    def __init__(self, x, ids):
        counts = torch.bincount(ids[ids >= 0], minlength=EXPERTS).int()
        rows = torch.zeros(EXPERTS, 128, HIDDEN, device=DEVICE)
        for expert in range(EXPERTS):
            chosen = x[(ids == expert).any(1)].float()
            rows[expert, : len(chosen)] = chosen
        scale = rows.unflatten(-1, (-1, 128)).abs().amax(-1).clamp(min=1e-4) / 448
        self.hidden_states = (rows / scale.repeat_interleave(128, -1)).to(torch.float8_e4m3fn)
        self.hidden_states_scale, self.masked_m, self.expected_m = scale, counts, 1


def stage_alone(layers, rows):
    """Sluice's expert stage on rows that are there, in every layer."""
    experts = [layer.quant_method._experts._experts for layer in layers]
    out = torch.empty(rows.hidden_states.shape, dtype=torch.bfloat16, device=DEVICE)
    return lambda: [one.masked(rows.hidden_states, rows.hidden_states_scale, rows.masked_m, out=out) for one in experts]


def call_of(layers, given, rows):
    if MODE == "none":
        return lambda: [layer(given[0], topk_output(*given)) for layer in layers]
    return lambda: [layer.quant_method.apply_deepep_ll(layer, rows) for layer in layers]


def check(y, largest, given, rows, matrices, tokens):
    """The first layer's output: the same bits as in the largest batch, and close to float32."""
    if MODE == "none":
        assert torch.equal(y, largest[:tokens]), "other bits than in the largest batch"
        few = [t[: min(tokens, 4)] for t in given]
        wanted, got = 2.5 * expected(*few, matrices), y[: len(few[0])].float()
    else:
        expert = int(rows.masked_m.argmax())
        read = rows.hidden_states[expert, :1].float() * rows.hidden_states_scale[expert, :1].repeat_interleave(128, -1)
        gate_up, down = (w.to(y.device) for w in matrices[expert])
        gate, up = (read @ gate_up.T).chunk(2, -1)
        wanted, got = (torch.nn.functional.silu(gate) * up) @ down.T, y[expert, :1].float()
    off = float((got - wanted).norm() / wanted.norm())
    assert off < 0.05, f"relative L2 {off} from float32"
    return off


def main():
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    load_engine()
    stubs.seal()
    rank = Rank(0, 1, f"{folder}/store", DEVICE, ep_size=1, moe_a2a_backend=MODE, deepep_mode="low_latency")
    draw = torch.Generator(DEVICE).manual_seed(1)
    layers, matrices = make_layers(rank, folder, draw)
    print(*[line for line in sglang_engine.Log.lines if line.startswith("Sluice")][-1:], flush=True)
    given = batch(max(SIZES), draw)
    largest = call_of(layers, given, None)()[0].clone() if MODE == "none" else None
    for tokens in SIZES:
        part = [t[:tokens].contiguous() for t in given]
        rows = Dispatched(part[0], part[1]) if tokens <= 256 else None
        call = call_of(layers, part, rows)
        once = [y.clone() for y in call()]
        off = check(once[0], largest, part, rows, matrices, tokens)
        line = f"{MODE}, {tokens} tokens, {int((part[1] >= 0).sum())} rows: relative L2 {off:.3f}"
        if DEVICE == "cuda":
            graph, results = graph_of(call)
            for y in results:
                y.zero_()
            graph.replay()
            for y, wanted in zip(results, once):
                used = wanted if rows is None or MODE == "none" else None
                same = torch.equal(y, wanted) if used is not None else all(
                    torch.equal(y[e, :n], wanted[e, :n]) for e, n in enumerate(rows.masked_m.tolist()))
                assert same, "a graph gives other bits"
            line += f"; a layer {us_of(graph, NUM_LAYERS):.1f} us"
            if rows is not None and MODE == "none":
                line += f", the stage alone {us_of(graph_of(stage_alone(layers, rows))[0], NUM_LAYERS):.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
