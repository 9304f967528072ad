"""SGLang's own classes around Sluice's experts, from a checkpoint's file to the combined output.

    sglang_layer.py FOLDER DEVICE RANKS...

FOLDER has checkpoints (see test_sglang.py). DEVICE is cpu, or cuda, whose GPUs the ranks take in turn. SGLang loads
its plug-ins by its own loader, and runs each case in ranks of its own, which talk over gloo. Writes
FOLDER/results.json: for each check its name, and None or what went wrong.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import mxfp4_files
import torch
from engine_reference import SHARE, Layer
from sglang_engine import (
    LAYER, TOKENS, Log, Rank, load_engine, load_weights, stubs, topk_output, workload,
)
from sglang_refusals import with_refusals

CHECKPOINTS = {  # Folder -> what SLUICE_RECIPE is, and whether the scales in it are used.
    "w4afp8": [("auto", True), ("direct", False)], "w4afp8-ones": [("auto", False)], "ct-32": [("auto", False)],
    "ct-32-w4a16": [("auto", False)],
}


def cases(folder):
    import sluice

    for name, recipes in CHECKPOINTS.items():
        checkpoint = sluice.Checkpoint(folder / name)
        scales = None
        if name == "w4afp8":  # SGLang keeps them in bfloat16.
            scales = [float(torch.tensor(s).bfloat16()) for s in checkpoint.static_scales(LAYER)]
        for recipe, is_static in recipes:
            yield f"{name}, {recipe}", folder / name, recipe, scales if is_static else None, Layer(checkpoint, LAYER)
    for model in mxfp4_files.MODELS:
        yield f"{model}, auto", folder / model, "auto", None, mxfp4_files.Layer(folder / model)


def check_numbers_of_experts(rank, path):
    """A dispatcher that would leave numbers over all ranks, as those of older releases do for some runners, is told to
    give the rank's own."""
    layer = rank.layer(path, load=False)
    load_weights(layer, path, "deepseek_v4")
    layer.dispatcher.skip_local_expert_mapping = True
    layer.quant_method.process_weights_after_loading(layer)
    assert not layer.dispatcher.skip_local_expert_mapping


def with_all_reduce(rank, folder):
    """--moe-a2a-backend none: the same tokens everywhere, experts spread or cut."""
    from sglang.srt.layers.moe import utils
    from sglang.srt.runtime_context import get_flags

    for name, path, recipe, scales, reference in cases(folder):
        os.environ["SLUICE_RECIPE"] = recipe
        # SGLang itself chooses this runner for DeepSeek-V4 on Hopper.
        runner = utils.MoeRunnerBackend.FLASHINFER_MXFP4 if path.name == "deepseek_v4" else utils.MoeRunnerBackend.AUTO
        with get_flags().moe.override(runner_backend=runner):
            layer = rank.layer(path)
            if runner == utils.MoeRunnerBackend.FLASHINFER_MXFP4 and layer.moe_ep_size > 1:
                check_numbers_of_experts(rank, path)
        factor = layer.moe_runner_config.routed_scaling_factor
        for tokens in (TOKENS, 1, 0, 100):
            x, ids, weights = workload(rank.size, 0, 8, layer.top_k, layer.hidden_size, rank.device, tokens)
            y = layer(x, topk_output(x, ids, weights))
            share = reference.check(y, x, ids, weights * factor, scales=scales, slices=layer.moe_tp_size,
                                    roundings=rank.size + 1)
            assert share > SHARE[rank.device], f"the bound tells only {share} of the elements from other experts'"
        yield name


def with_deepep(rank, folder):
    """--moe-a2a-backend deepep: tokens of its own on each rank."""
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch
    from sglang.srt.layers.moe.utils import DeepEPMode, get_deepep_mode
    from sglang.srt.runtime_context import get_exec

    modes = {DeepEPMode.NORMAL: [True], DeepEPMode.LOW_LATENCY: [False], DeepEPMode.AUTO: [True, False, True]}
    counts = [TOKENS, 5, 1, 0] if rank.size > 1 else [TOKENS]
    for name, path, recipe, scales, reference in cases(folder):
        os.environ["SLUICE_RECIPE"] = recipe
        layer = rank.layer(path)
        for is_prefill in modes[get_deepep_mode()]:
            set_is_extend_in_batch(is_prefill)
            for turn in range(2):
                tokens = counts[(rank.rank + turn) % len(counts)]
                x, ids, weights = workload(rank.size, rank.rank, 8, layer.top_k, layer.hidden_size, rank.device, tokens)
                y = layer(x, topk_output(x, ids, weights))
                dtype = get_exec().moe.deepep_dispatcher_output_dtype
                fp8_wire = dtype == "fp8" or (dtype == "auto" and not is_prefill)
                share = reference.check(y, x, ids, weights, scales=scales, fp8_wire=fp8_wire,
                                        roundings=1 + is_prefill)
                assert share > SHARE[rank.device], f"the bound tells only {share} of the elements from other experts'"
        yield name


def with_two_batches(rank, folder):
    """--enable-two-batch-overlap: the steps of two halves in turns, each through its own inner dispatcher."""
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch

    for name, path, recipe, scales, reference in cases(folder):
        os.environ["SLUICE_RECIPE"] = recipe
        layer = rank.layer(path)
        for is_prefill in (False, True):
            set_is_extend_in_batch(is_prefill)
            halves = [workload(rank.size, 10 * half + rank.rank, 8, layer.top_k, layer.hidden_size, rank.device, 7)
                      for half in (0, 1)]

            def step(function, half, **arguments):
                return getattr(layer.dispatcher, function)(tbo_subbatch_index=half, **arguments)

            rows, y = [None, None], [None, None]
            for half, (x, ids, weights) in enumerate(halves):
                step("dispatch_a", half, hidden_states=x, topk_output=topk_output(x, ids, weights))
            for half in (0, 1):
                rows[half] = layer.run_moe_core(step("dispatch_b", half))
                step("combine_a", half, combine_input=rows[half])
            for half in (0, 1):
                y[half] = step("combine_b", half)
            for half, (x, ids, weights) in enumerate(halves):
                reference.check(y[half], x, ids, weights, scales=scales, fp8_wire=not is_prefill,
                                roundings=1 + is_prefill)
        yield name


def with_graphs(rank, folder):
    """Calls captured once and replayed on other inputs, each size with a graph of its own (CUDA)."""
    for name, path, recipe, scales, reference in cases(folder):
        os.environ["SLUICE_RECIPE"] = recipe
        layer, graphs = rank.layer(path), {}
        is_exchange = "deepep" in type(layer.dispatcher).__name__.lower()
        for tokens in (12, 4, 1):
            given = workload(rank.size, rank.rank, 8, layer.top_k, layer.hidden_size, rank.device, tokens)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    layer(given[0], topk_output(*given))
            torch.cuda.current_stream().wait_stream(stream)
            graphs[tokens] = torch.cuda.CUDAGraph(), given
            with torch.cuda.graph(graphs[tokens][0]):
                y = layer(given[0], topk_output(*given))
            graphs[tokens] += (y,)
        for turn, tokens in enumerate((4, 12, 1, 12, 4)):
            graph, given, y = graphs[tokens]
            x, ids, weights = workload(rank.size, 50 + 10 * turn + rank.rank, 8, layer.top_k, layer.hidden_size, "cpu",
                                       tokens)
            for there, new in zip(given, (x, ids, weights)):
                there.copy_(new)
            graph.replay()
            factor = 1.0 if is_exchange else layer.moe_runner_config.routed_scaling_factor
            reference.check(y, x, ids, weights * factor, scales=scales, fp8_wire=is_exchange, roundings=2)
        yield name


LAYOUTS = {  # What runs -> the switches of the server, for a number of ranks.
    "all-reduce, experts spread": (with_all_reduce, lambda n: {"ep_size": n, "moe_a2a_backend": "none"}),
    "all-reduce, experts cut": (with_all_reduce, lambda n: {"ep_size": 1, "moe_a2a_backend": "none"}),
    **{f"deepep, {mode}": (with_deepep, lambda n, mode=mode: {
        "ep_size": n, "moe_a2a_backend": "deepep", "deepep_mode": mode}) for mode in ("normal", "low_latency", "auto")},
    "deepep, bf16 on the wire": (with_deepep, lambda n: {
        "ep_size": n, "moe_a2a_backend": "deepep", "deepep_mode": "auto", "deepep_dispatcher_output_dtype": "bf16"}),
    "deepep, fp8 on the wire": (with_deepep, lambda n: {
        "ep_size": n, "moe_a2a_backend": "deepep", "deepep_mode": "normal", "deepep_dispatcher_output_dtype": "fp8"}),
    "deepep, two batches": (with_two_batches, lambda n: {
        "ep_size": n, "moe_a2a_backend": "deepep", "deepep_mode": "auto", "enable_two_batch_overlap": True}),
    "graphs": (with_graphs, lambda n: {"ep_size": n, "moe_a2a_backend": "none" if n == 1 else "deepep",
                                       "deepep_mode": "low_latency"}),
    "refusals": (with_refusals, lambda n: {"ep_size": n, "moe_a2a_backend": "none"}),
}
OF_RANKS = {  # What is worth its seconds: "auto" has both modes in it.
    1: ["all-reduce, experts spread", "deepep, auto", "refusals", "graphs"],
    2: [name for name in LAYOUTS if name != "refusals"],
    4: ["all-reduce, experts spread", "all-reduce, experts cut", "deepep, auto"],
}


def run_rank(rank, size, folder, device, layout, out):
    """In a process of its own. Lines of `out`: a check's name, a tab, and nothing or what went wrong."""
    run, switches = LAYOUTS[layout]
    started = time.monotonic()

    def say(what):  # For who waits, and finds what takes long.
        print(f"{size} ranks, {layout}, rank {rank}: {what}, {time.monotonic() - started:.1f} s", file=sys.stderr,
              flush=True)

    with open(out, "w") as file:
        try:
            here = Rank(rank, size, f"{out[:-2]}.store", device, **switches(size))
            say("ready")
            for name in run(here, folder):
                print(f"{name}\t", file=file, flush=True)
                say(name)
        except BaseException:
            print(f"after these\t{traceback.format_exc()!r}", file=file, flush=True)
    lines = [line for line in Log.lines if line.startswith("Sluice")]
    Path(f"{out}.log").write_text("\n".join(lines))
    os._exit(0)


def forked(*arguments):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        run_rank(*arguments)
    return child


def spawned(rank, size, folder, device, layout, out):
    """A process that has used CUDA cannot be forked: each rank imports SGLang itself, all of them at once, and
    then they take turns (main_of_rank)."""
    arguments = map(str, (rank, size, folder, device, layout, out))
    return subprocess.Popen([sys.executable, __file__, "rank", *arguments]).pid


def main_of_rank(rank, size, folder, device, layout, out):
    torch.set_num_threads(1)  # All ranks of all cases are there at once.
    load_engine()
    stubs.seal()
    print(f"{size} ranks, {layout}, rank {rank}: imported, {time.process_time():.1f} s of a processor", file=sys.stderr,
          flush=True)
    with open(Path(folder) / "turn", "w") as turn:
        if rank == "0":
            fcntl.flock(turn, fcntl.LOCK_EX)  # The others of a case wait for this one.
        run_rank(int(rank), int(size), Path(folder), device, layout, out)


def results_of(children, size, layout, out):
    """Waits for the ranks of a case: check -> None or what went wrong; and what the first one logged."""
    deadline = time.monotonic() + 240
    while children and time.monotonic() < deadline:
        there = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        if len(there) < len(children):  # Others end soon after, or wait for one that failed.
            deadline = time.monotonic() + 15
        children = there
        time.sleep(0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    results = {}
    for rank in range(size):
        file = Path(f"{out}.{rank}")
        lines = file.read_text().splitlines() if file.exists() else []
        if not lines or children:
            lines.append(f"the end of rank {rank}\tnot reached")
        for line in lines:
            name, _, what = line.partition("\t")
            key = f"{size} ranks, {layout}: {name}"
            results[key] = results.get(key) or (f"rank {rank}: {what}" if what else None)
    log = Path(f"{out}.0.log")
    return results, log.read_text().splitlines() if log.exists() else []


def main():
    folder, device, ranks = Path(sys.argv[1]), sys.argv[2], [int(n) for n in sys.argv[3:]]
    cases_of = {(size, layout): f"{tempfile.mkdtemp()}/rank" for size in ranks for layout in OF_RANKS[size]
                if device == "cuda" or layout != "graphs"}
    if device != "cuda":
        torch.set_num_threads(1)
        load_engine()
        stubs.seal()
    start = spawned if device == "cuda" else forked
    waiting, results, logs = {}, {}, {}
    for (size, layout), out in cases_of.items():
        waiting[size, layout] = [start(rank, size, folder, device, layout, f"{out}.{rank}") for rank in range(size)]
        if device == "cuda":
            continue
        done, logs[f"{size} ranks, {layout}"] = results_of(waiting.pop((size, layout)), size, layout, out)
        results |= done
    for (size, layout), children in waiting.items():
        done, logs[f"{size} ranks, {layout}"] = results_of(children, size, layout, cases_of[size, layout])
        results |= done
        print(f"{size} ranks, {layout}: {sum(map(bool, done.values()))} of {len(done)} failed", file=sys.stderr,
              flush=True)
    (folder / "results.json").write_text(json.dumps({"results": results, "logs": logs, "log": Log.lines}))


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        main_of_rank(*sys.argv[2:])
    main()
