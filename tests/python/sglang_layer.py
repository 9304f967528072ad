"""SGLang's own classes around Sluice's experts, from a checkpoint's file to the combined output.

    sglang_layer.py FOLDER DEVICE RANKS...

FOLDER has checkpoints (see test_sglang.py). DEVICE is cpu, or cuda, of which all ranks share the first. SGLang loads
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
    LAYER, PREFIX, TOKENS, Log, Rank, config_of, load_engine, load_weights, stubs, topk_output, workload,
)

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
    """A dispatcher that leaves numbers over all ranks, as those of older releases do for some runners, is refused."""
    import sluice

    layer = rank.layer(path, load=False)
    load_weights(layer, path, "deepseek_v4")
    layer.dispatcher.skip_local_expert_mapping = True
    try:
        layer.quant_method.process_weights_after_loading(layer)
    except sluice.Error as error:
        assert "keeps experts' numbers over all ranks" in str(error), error
    else:
        raise AssertionError("numbers over all ranks were taken for a rank's own")


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


def check_physical_experts(rank, path):
    """--init-expert-location and --ep-num-redundant-experts: SGLang loads each expert where its map says, and routes by
    that map. Sluice sees physical experts alone; each replica gives the bits of the expert."""
    from unittest import mock

    logical_of = [5, 0, 3, 7, 1, 2, 4, 6, 3, 0, 3, 5]  # Of 12 physical experts.
    physical = {e: [p for p, logical in enumerate(logical_of) if logical == e] for e in range(8)}
    location = mock.Mock(num_logical_experts=8, logical_to_all_physical=lambda layer, e, *_: physical[e])
    plain = rank.layer(path)
    seam = "sglang.srt.layers.moe.fused_moe_triton.layer.get_global_expert_location_metadata"
    with mock.patch(seam, return_value=location):
        placed = rank.layer(path, num_experts=12)
    x, ids, weights = workload(1, 0, 8, plain.top_k, plain.hidden_size, rank.device)
    replicas = ids.clone()
    for t, row in enumerate(ids.tolist()):
        for k, e in enumerate(row):
            if e >= 0:
                replicas[t, k] = physical[e][t % len(physical[e])]
    y, expected = placed(x, topk_output(x, replicas, weights)), plain(x, topk_output(x, ids, weights))
    assert {logical_of[p] for p in replicas.flatten().tolist() if p >= 0} == set(ids.flatten().tolist()) - {-1}
    assert len(set(replicas.flatten().tolist())) > 9 and torch.equal(y, expected), "a replica gave other bits"


def with_mxfp4_refusals(rank, folder, refused):
    """DeepSeek-V4 and Kimi-K3 as they are not, gpt-oss, and what the setting is for."""
    from sglang.srt.layers.moe import utils
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4MoEMethod
    from sglang.srt.runtime_context import get_flags

    v4, k3 = folder / "deepseek_v4", folder / "kimi_k3"
    for path in (v4, k3):
        for what, changes in {
            "MXFP4 experts with biases (with_bias=True)": {"with_bias": True},
            "intermediate size, cut by 1, 272": {"intermediate_size": 272},
            "hidden size, 192 is no multiple of 128": {"hidden_size": 192},
            "--disable-shared-experts-fusion": {"num_fused_shared_experts": 1, "num_experts": 9},
        }.items():
            refused(what, path, switch="SLUICE_MXFP4=0", **changes)
        refused("SLUICE_RECIPE=static, and MXFP4", path, recipe="static", switch="SLUICE_MXFP4=0")
        with get_flags().moe.override(runner_backend=utils.MoeRunnerBackend.MARLIN):
            refused("--moe-runner-backend marlin", path, switch="SLUICE_MXFP4=0")
    refused("activation 'situ' with beta None", k3, switch="SLUICE_MXFP4=0", gemm1_alpha=None)
    # As gpt-oss' model has it (models/gpt_oss.py).
    refused("with_bias=True", k3, switch="SLUICE_MXFP4=0", activation="silu", gemm1_alpha=1.702, gemm1_clamp_limit=7.0,
            with_bias=True)
    config = config_of("deepseek_v4", mxfp4_files.QUANTIZATION["deepseek_v4"])
    config.dequant_fp4_to_fp8 = True
    refused("SGLANG_DSV4_FP4_DEQUANT=1", v4, switch="SLUICE_MXFP4=0", quant_config=config)
    for name, what in (("floats", "is torch.float8_e4m3fn"), ("scales", "is torch.float32 that is no power of two"),
                       ("missing", "is not a finite number"), ("codes", "w2 of expert 6 has scales and no weights")):
        refused(what, folder / f"deepseek_v4-{name}", switch="scale" if name == "missing" else "SLUICE_MXFP4=0")
    os.environ["SLUICE_MXFP4"] = "0"
    config = config_of("kimi_k3", mxfp4_files.QUANTIZATION["kimi_k3"])
    layer = rank.layer(k3, load=False)
    assert type(layer.quant_method) is Mxfp4MoEMethod and "SGLang serves it" in "".join(Log.lines[-3:]), Log.lines[-3:]
    os.environ["SLUICE_MXFP4"] = "1"
    with_other_names(rank, folder)


def with_other_names(rank, folder):
    """Scales of float32, which stand for the same powers of two, and compressed-tensors of another model."""
    x, ids, weights = workload(1, 0, 8, 3, 256, rank.device)
    run = lambda layer: layer(x, topk_output(x, ids, weights))  # noqa: E731
    expected = run(rank.layer(folder / "deepseek_v4"))
    assert torch.equal(run(rank.layer(folder / "deepseek_v4-f32")), expected)
    config = config_of("qwen3_moe", mxfp4_files.QUANTIZATION["kimi_k3"])
    assert type(config).__name__ == "CompressedTensorsConfig"
    assert torch.equal(run(rank.layer(folder / "kimi_k3", quant_config=config)), run(rank.layer(folder / "kimi_k3")))


def with_refusals(rank, folder):
    """What a layer refuses while it is made, by the field; and afterwards."""
    from sglang.srt.layers.moe import utils
    from sglang.srt.runtime_context import get_context, get_flags

    import sluice
    from sluice.integrations import sglang as plugin

    w4afp8, ct = folder / "w4afp8", folder / "ct-32"
    os.environ["SLUICE_RECIPE"] = "auto"

    def refused(what, path, recipe="auto", switch="SLUICE_SGLANG=0", **changes):
        os.environ["SLUICE_RECIPE"] = recipe
        try:
            rank.layer(path, **changes)
        except sluice.Error as error:
            assert what in str(error) and switch in str(error), error
            assert PREFIX in str(error) or switch == "scale", error
        else:
            raise AssertionError(f"not refused: {what}")
        os.environ["SLUICE_RECIPE"] = "auto"

    for what, changes in {
        "activation 'gelu'": {"activation": "gelu"}, "activation 'situ'": {"activation": "situ"},
        "is_gated=False": {"is_gated": False}, "gemm1_alpha=1.7": {"gemm1_alpha": 1.7},
        "gemm1_clamp_limit=7": {"gemm1_clamp_limit": 7.0}, "with_bias=True": {"with_bias": True},
        "apply_router_weight_on_input=True": {"apply_router_weight_on_input": True},
        "no_combine=True": {"no_combine": True},
        "--disable-shared-experts-fusion": {"num_fused_shared_experts": 1, "num_experts": 9},
        "torch.float16": {"params_dtype": torch.float16}, "hidden size, 192": {"hidden_size": 192},
        "intermediate size, cut by 1, 192": {"intermediate_size": 192},
    }.items():
        for path in (w4afp8, ct):
            refused(what, path, **changes)
        yield f"refused: {what}"
    for field, value, what in (("group_size", 64, "groups of 64"), ("symmetric", False, "symmetric=False"),
                               ("strategy", "channel", "strategy=channel")):
        other = folder / f"ct-{field}"
        other.mkdir()
        config = json.loads((ct / "config.json").read_text())
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] = None
        group["weights"] |= {field: value} | ({"group_size": None} if value == "channel" else {})
        (other / "config.json").write_text(json.dumps(config))
        refused(what, other)
        yield f"refused: INT4 with {field} {value}"
    with_mxfp4_refusals(rank, folder, refused)
    yield "refused: MXFP4 that Sluice has no experts for, and SLUICE_MXFP4=0 leaves it to SGLang"
    refused("SLUICE_RECIPE=static", ct, recipe="static")
    refused("some input scales are calibrated", folder / "w4afp8-some")
    yield "refused: a recipe that the checkpoint has not"
    for name, value, what in (("a2a_backend", utils.MoeA2ABackend.MOONCAKE, "--moe-a2a-backend mooncake"),
                              ("runner_backend", utils.MoeRunnerBackend.MARLIN, "--moe-runner-backend marlin")):
        for path in (w4afp8, ct):
            with get_flags().moe.override(**{name: value}):
                refused(what, path)
        yield f"refused: {what}"
    get_context().override("test", enable_eplb=True)
    for path in (w4afp8, ct):
        refused("--enable-eplb", path)
    get_context().override("test", enable_eplb=False)
    yield "refused: --enable-eplb"

    for path in (w4afp8, ct):
        layer = rank.layer(path)
        assert all(p.numel() == 0 for n, p in layer.named_parameters()), "SGLang's weights are still there"
        layer.quant_method.process_weights_after_loading(layer)  # Again: nothing is left to do.
        try:
            load_weights(layer, path)
        except sluice.Error as error:
            assert "new weights for" in str(error), error
        else:
            raise AssertionError("new weights were taken")
    yield "refused: new weights; the old ones' memory is free"

    for path in (w4afp8, ct):
        check_physical_experts(rank, path)
    yield "experts that lie where SGLang's map of the launch says"

    limited = rank.layer(w4afp8, swiglu_limit=0.25)
    assert "swiglu:limit=0.25" in Log.lines[-1], Log.lines[-1]
    x, ids, weights = workload(1, 0, 8, 3, 256, rank.device)
    y, plain = (module(x, topk_output(x, ids, weights)) for module in (limited, rank.layer(w4afp8)))
    assert not torch.equal(y, plain)
    yield "a limit of SwiGLU is taken from the model"

    import argparse

    from sglang.srt import plugins
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    assert f"Sluice {sluice.__version__}" in parser.format_help()
    yield "--help names Sluice"

    def ends(what):
        plugins._plugins_loaded = False
        try:
            plugins.load_plugins()
        except SystemExit as end:
            assert what in str(end) and "SLUICE_SGLANG=0" in str(end), end
        else:
            raise AssertionError(f"the process goes on: {what}")

    seams = plugin.SEAMS
    for n, seam in enumerate(seams):
        plugin.SEAMS = (*seams[:n], f"{seam}_moved", *seams[n + 1 :])
        ends(f"has no {seam}_moved")
    plugin.SEAMS = seams
    os.environ["SLUICE_RECIPE"] = "best"
    ends("SLUICE_RECIPE: expected auto or static or direct, got 'best'")
    yield "a seam that is gone, or a setting that is none, ends the process"


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
    with open(out, "w") as file:
        try:
            here = Rank(rank, size, f"{out[:-2]}.store", device, **switches(size))
            for name in run(here, folder):
                print(f"{name}\t", file=file, flush=True)
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
    load_engine()
    stubs.seal()
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
    (folder / "results.json").write_text(json.dumps({"results": results, "logs": logs, "log": Log.lines}))


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        main_of_rank(*sys.argv[2:])
    main()
