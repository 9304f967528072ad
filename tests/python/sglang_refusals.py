"""What Sluice's experts in SGLang refuse, by the field, and what they take from SGLang's model: a case of
sglang_layer.py for one rank.
"""

import json
import os

import mxfp4_files
import torch
from sglang_engine import PREFIX, Log, config_of, load_weights, topk_output, workload


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
