"""A MoE layer of vLLM's own code from a checkpoint's file to its output, over Sluice: rank_of_vllm.py FOLDER [CASE...]

One process imports vLLM and makes the checkpoints in FOLDER, then forks the ranks of every case. Prints "ok CASE" for
each that passed. What of vLLM is replaced is in vllm_on_cpu.py.
"""

import os
import sys
import time
import traceback
import types
from pathlib import Path

import engine_reference
import mxfp4_files
import torch
import vllm_on_cpu
from engine_stubs import seam, version_of
from vllm_layer import (
    EXPERTS, LAYER, MXFP4, PREFIX, TOKENS, inputs, load, make_checkpoints, make_layer, mxfp4_layer, quant_config,
    routing_of, scheme, vllm_config,
)
from vllm_on_cpu import DEVICE

import sluice

SEAMS = [
    "vllm.plugins.load_general_plugins", "vllm.model_executor.layers.quantization.register_quantization_config",
    "vllm.model_executor.layers.quantization.base_config.QuantizationConfig.override_quantization_method",
    "vllm.model_executor.layers.quantization.base_config.QuantizationConfig.get_cache_scale_mapper",
    "vllm.model_executor.layers.quantization.base_config.QuantizationConfig.maybe_update_config",
    "vllm.model_executor.layers.quantization.fp8.Fp8Config",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors.CompressedTensorsConfig."
    "_add_fused_moe_to_target_scheme_map",
    "vllm.model_executor.layers.fused_moe.RoutedExperts.weight_loader",
    "vllm.model_executor.layers.fused_moe.RoutedExperts._map_global_expert_id_to_local_expert_id",
    "vllm.model_executor.layers.fused_moe.RoutedExperts._expert_routing_tables",
    "vllm.model_executor.layers.fused_moe.all2all_utils.maybe_make_prepare_finalize",
    "vllm.model_executor.layers.fused_moe.modular_kernel.FusedMoEKernel",
    "vllm.model_executor.layers.fused_moe.modular_kernel.FusedMoEExpertsModular.workspace_shapes",
    "vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ll.DeepEPLLPrepareAndFinalize",
    "vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ht.DeepEPHTPrepareAndFinalize",
    "vllm.transformers_utils.config.get_safetensors_params_metadata",
]

DIRECT = {"options": {"recipe": "direct"}}  # Otherwise W4AFP8 has the static scales that the checkpoint has.

# name -> ranks, format, what vLLM is started with
CASES = {
    "w4afp8": (1, "w4afp8", DIRECT),
    "w4afp8-static": (1, "w4afp8", {}),
    "packed-32": (1, "packed-32", {}),
    "packed-128": (1, "packed-128", {}),
    "tensor-parallel": (2, "packed-128", {"tp": 2}),
    "expert-map": (2, "w4afp8", {"tp": 2, "ep": True, **DIRECT}),
    "all-gather": (2, "w4afp8", {"dp": 2, "ep": True, "all2all": "allgather_reducescatter", **DIRECT}),
    "low-latency-2": (2, "packed-32", {"dp": 2, "ep": True, "all2all": "deepep_low_latency"}),
    "low-latency-2-static": (2, "w4afp8", {"dp": 2, "ep": True, "all2all": "deepep_low_latency"}),
    "low-latency-4": (4, "w4afp8", {"dp": 4, "ep": True, "all2all": "deepep_low_latency", **DIRECT}),
    "high-throughput-4": (4, "w4afp8", {"dp": 4, "ep": True, "all2all": "deepep_high_throughput", **DIRECT}),
    "deepseek-v4": (1, "deepseek_v4", {}),
    "deepseek-v4-low-latency": (2, "deepseek_v4", {"dp": 2, "ep": True, "all2all": "deepep_low_latency"}),
    "kimi-k3": (2, "kimi_k3", {"tp": 2, "ep": True}),
    "kimi-k3-high-throughput": (2, "kimi_k3", {"dp": 2, "ep": True, "all2all": "deepep_high_throughput"}),
    "mxfp4-packed": (1, "kimi_k3-ct", {}),
    "mxfp4-padded": (2, "kimi_k3-narrow", {"tp": 2}),
    "refused": (1, "w4afp8", {}),
    "moved": (1, "w4afp8", {}),
}


# --- One rank -------------------------------------------------------------------------------------


def watch_exchange(calls):
    """Notes whether e4m3 is what DeepEP's buffer is given, or makes."""
    from sluice.compat.deep_ep import Buffer

    low_latency, normal = Buffer.low_latency_dispatch, Buffer.dispatch

    def low_latency_dispatch(self, *args, **kwargs):
        calls.append(("low latency", kwargs["use_fp8"]))
        return low_latency(self, *args, **kwargs)

    def dispatch(self, x, *args, **kwargs):
        calls.append(("normal", isinstance(x, tuple) and x[0].dtype == torch.float8_e4m3fn))
        return normal(self, x, *args, **kwargs)

    Buffer.low_latency_dispatch, Buffer.dispatch = low_latency_dispatch, dispatch


def watch_memory():
    """Whether weights are repacked in the memory into which vLLM loaded them."""
    from sluice.integrations import _vllm_methods

    kind, placed = _vllm_methods.W4A8Experts, []

    def made(*tensors, memory=None, **options):
        placed.append(memory is not None)
        if memory is not None:
            first, last = memory.data_ptr(), memory.data_ptr() + memory.numel()
            assert all(first <= t.data_ptr() < last for t in tensors)
        return kind(*tensors, memory=memory, **options)

    _vllm_methods.W4A8Experts = made
    return placed


def run_layer(folder, rank, ranks, kind, options):
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker.workspace import init_workspace_manager

    config, calls = vllm_config(rank, **options), []
    tp, dp = options.get("tp", 1), options.get("dp", 1)
    shared = rank // tp  # Ranks of one data-parallel rank have the same tokens.
    x, tokens = inputs(shared)
    on_gpu = DEVICE != "cpu"
    if on_gpu:
        torch.cuda.set_device(0)
    if kind in MXFP4:
        x = x[:, : MXFP4[kind][1]].contiguous()
    there, routed = x.to(DEVICE), tuple(t.to(DEVICE) for t in tokens)
    with set_current_vllm_config(config):
        init_distributed_environment(ranks, rank, f"file://{folder}/store", 0 if on_gpu else rank, "gloo")
        ensure_model_parallel_initialized(tp, 1)
        init_workspace_manager(torch.device(DEVICE))
        watch_exchange(calls)
        placed = watch_memory()
        with torch.device(DEVICE):
            made = quant_config(kind, folder)
            layer = mxfp4_layer(made, kind, folder, routing_of(routed)) if kind in MXFP4 else make_layer(
                made, routing_of(routed))
        experts = load(layer, folder / kind)
        sizes, logits = torch.tensor(TOKENS[:dp], dtype=torch.int32), torch.zeros(len(x), EXPERTS, device=DEVICE)

        def call():
            across = sizes if dp > 1 else None
            with set_forward_context(None, config, num_tokens=len(x), num_tokens_across_dp=across):
                return experts(there, logits)

        for _ in range(2):  # The second call has the memory of the first.
            y = call()
        # Elsewhere something comes to the host: gloo's sums of ranks, the counts of deepep_high_throughput.
        if on_gpu and (ranks == 1 or options.get("all2all") == "deepep_low_latency"):
            y = in_graph(call)
        if options is DIRECT:  # torch.compile: a graph without a break, in which the layer is an operator of vLLM's.
            assert experts._forward_entry == torch.ops.vllm.moe_forward, experts._forward_entry
            compiled = torch.compile(lambda rows: 2 * experts(rows, logits), backend="aot_eager", fullgraph=True)
            with set_forward_context(None, config, num_tokens=len(x)):
                assert torch.equal(compiled(there), 2 * y)
    check_exchange(options.get("all2all") if dp > 1 else None, calls)
    # packed-32 has float32 scales where vLLM expects the model's bfloat16: those are repacked elsewhere.
    assert placed == [kind != "packed-32"], placed
    source = folder / ("bf16" if kind == "packed-128" else "w4afp8")
    reference = mxfp4_files.Layer(folder / kind) if kind in MXFP4 else engine_reference.Layer(
        sluice.Checkpoint(str(source)), LAYER)
    wires = {"allgather_reducescatter": "vllm", "deepep_high_throughput": "vllm", "deepep_low_latency": True}
    all2all = options.get("all2all")
    is_static = kind == "w4afp8" and "options" not in options
    # Each expert's row is rounded to bf16, and each rank's sum unless combine has all rows.
    differ = reference.check(
        y, x, *tokens, roundings=1 if ranks == 1 or all2all == "deepep_low_latency" else 2,
        fp8_wire=wires[all2all] if dp > 1 else False, slices=1 if options.get("ep") else tp,
        scales=sluice.Checkpoint(str(folder / "w4afp8")).static_scales(LAYER) if is_static else None)
    assert differ > 0.5, f"only {differ:.0%} of the elements would tell other experts apart"


def in_graph(call):
    """The output of a captured call, replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    torch.distributed.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    y.zero_()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return y


def check_exchange(all2all, calls):
    """FP8 dispatch really happens."""
    if all2all == "allgather_reducescatter":
        gathered = vllm_on_cpu.Communicator.gathered
        assert gathered[0] == torch.float8_e4m3fn and gathered[-1] == torch.float32, gathered
    wanted = {"deepep_low_latency": "low latency", "deepep_high_throughput": "normal"}.get(all2all)
    assert set(calls) == ({(wanted, True)} if wanted else set()) and len(calls) != 1, calls


# --- Refusals -------------------------------------------------------------------------------------


def mxfp4_refusals(folder, route):
    """Of layers and files of DeepSeek-V4 and Kimi-K3: what a message has, and what gives it."""

    def made(kind, **changes):
        return mxfp4_layer(quant_config(kind, folder), kind, folder, route, **changes)

    def fp8_experts():
        config = quant_config("deepseek_v4", folder)
        config._resolved_expert_dtype = "fp8"  # As vLLM has it from config.json of DeepSeek-V4-Flash-Base.
        mxfp4_layer(config, "deepseek_v4", folder, route)

    return {
        "ffn.experts: experts with biases": lambda: made("deepseek_v4", has_bias=True),
        "intermediate size of a rank 272 is no multiple of 32": lambda: made("kimi_k3", intermediate_size=272),
        "experts of expert_dtype 'fp8'": fp8_experts,
        "weights of w2 (7) were loaded": lambda: load(made("deepseek_v4"), folder / "deepseek_v4", drop="5.w2.weight"),
        "expected uint8 or int8 (DeepSeek-V4 MXFP4)": lambda: load(made("deepseek_v4"), folder / "deepseek_v4-floats"),
        "other values than powers of two": lambda: load(made("deepseek_v4"), folder / "deepseek_v4-scales"),
    }


def refused(folder, rank, ranks, kind, options):
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.layers.quantization import get_quantization_config

    packed, route = folder / "packed-32", routing_of(inputs(0)[1])

    def made(kind="packed-32", config=None, **layer):
        return make_layer(config or quant_config(kind, folder), route, **layer)

    def with_scheme(**changes):
        return lambda: made(config=quant_config("packed-32", folder, **changes))

    def actorder():  # compressed-tensors itself has it no longer.
        config = quant_config("packed-32", folder)
        weights = config.target_scheme_map["Linear"]["weights"]
        fields = {name: getattr(weights, name) for name in type(weights).model_fields} | {"actorder": "group"}
        config._check_scheme(PREFIX, {"format": "pack-quantized", "weights": types.SimpleNamespace(**fields)})

    def asks(method, model):
        return lambda: get_quantization_config("sluice").override_quantization_method(
            {"quant_method": method}, "sluice", hf_config=types.SimpleNamespace(model_type=model))

    float_inputs = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}
    int8_inputs = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
    wrong = {
        f"{PREFIX}: activation gelu": lambda: made(activation="gelu"),
        f"{PREFIX}: experts with biases": lambda: made(has_bias=True),
        f"{PREFIX}: intermediate size of a rank 192 is no": lambda: made(intermediate_size=192),
        "groups of 64; 32 and 128": with_scheme(weights={"group_size": 64}),
        "weights.num_bits is 8": with_scheme(weights={"num_bits": 8}),
        "weights.symmetric is False": with_scheme(weights={"symmetric": False}),
        "format is 'nvfp4-pack-quantized', expected 'pack-quantized'": with_scheme(
            format="nvfp4-pack-quantized", weights={"type": "float"}),
        "weights.num_bits is 8 in mxfp4-pack-quantized": with_scheme(
            format="mxfp4-pack-quantized", weights={"type": "float", "num_bits": 8}),
        "experts: input_activations int of 8 bits": with_scheme(
            format="mxfp4-pack-quantized", weights={"type": "float"}, input_activations=int8_inputs),
        "'gpt_oss': MXFP4 experts with biases": asks("mxfp4", "gpt_oss"),
        "quant_method is 'gpt_oss_mxfp4'": asks("gpt_oss_mxfp4", None),
        "quant_method is 'quark'": asks("quark", "deepseek_v4"),
        **mxfp4_refusals(folder, route),
        "weights.actorder 'group'": actorder,
        "bits; only none or dynamic FP8": with_scheme(input_activations=int8_inputs),
        "input_activations float of 8 bits": with_scheme(input_activations=float_inputs),
        "weights of w2 (7), scales of w2 (7)": lambda: load(made(), packed, drop=("5.down_proj.weight_packed",
                                                                                 "5.down_proj.weight_scale")),
        "expected torch.int32 (compressed-tensors INT4)": lambda: load(made(), folder / "floats"),
        "no INT4 experts of this name": lambda: made("w4afp8", prefix="model.layers.7.mlp.experts"),
        "only that of DeepSeek-V4 has 4-bit experts": asks("fp8", "deepseek_v3"),
        "quant_method is 'fp8'": lambda: get_quantization_config("w4afp8").override_quantization_method(
            {"quant_method": "fp8"}, "w4afp8", hf_config=None),
    }
    mixed = {"quant_method": "", "quantization": {"quant_algo": "MIXED_PRECISION"}}  # As vLLM hands it on.
    asked = {user: get_quantization_config("w4afp8").override_quantization_method(mixed, user, hf_config=None)
             for user in ("w4afp8", "sluice", None)}
    assert asked == {"w4afp8": "w4afp8", "sluice": None, None: None}, asked
    with set_current_vllm_config(vllm_config(0)):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    for text, call in wrong.items():
        with set_current_vllm_config(vllm_config(0)):  # Layers have their names in it, each once.
            expect_error(text, call)
    for kind in ("packed-32", "w4afp8"):
        config = vllm_config(0)
        config.parallel_config.enable_eplb = True
        with set_current_vllm_config(config):
            expect_error(f"{PREFIX}: --enable-eplb moves experts between ranks", lambda: made(kind))  # noqa: B023
    with set_current_vllm_config(vllm_config(0)):
        # What the checkpoint itself leaves alone stays vLLM's.
        ignoring = scheme(32) | {"ignore": ["re:.*experts.*"]}
        config = get_quantization_config("sluice").from_config(ignoring)
        left = made(config=config).model.layers[LAYER].mlp.experts.routed_experts.quant_method
        assert type(left).__name__ == "UnquantizedFusedMoEMethod", left
    for recipe, drop, text in [("static", "input_scale", "each expert needs some above 0"),
                               ("auto", "0.w2.input_scale", "each expert needs some above 0"),
                               ("auto", "input_scale", None), ("auto", None, None)]:
        with set_current_vllm_config(vllm_config(0, options={"recipe": recipe})):
            load_w4afp8 = lambda d=drop: load(made("w4afp8"), folder / "w4afp8", drop=d)  # noqa: E731
            if text:
                expect_error(text, load_w4afp8)
            else:
                scales = load_w4afp8().routed_experts.quant_method.moe_kernel.fused_experts.experts._scales
                assert bool(scales) == (drop is None), scales
    for kind in ("packed-32", "kimi_k3", "deepseek_v4"):
        with set_current_vllm_config(vllm_config(0, options={"recipe": "static"})):
            make = (lambda k=kind: mxfp4_layer(quant_config(k, folder), k, folder, route)) if kind in MXFP4 else made
            expect_error("no static scales of inputs", make)
    with set_current_vllm_config(vllm_config(0, options={"recipes": "static"})):
        expect_error("known is recipe", lambda: made("w4afp8"))


def expect_error(text, call):
    try:
        call()
    except sluice.Error as error:
        assert text in str(error), f"expected {text!r}, got {error}"
        return
    raise AssertionError(f"nothing was refused, expected {text!r}")


def moved(folder, rank, ranks, kind, options):
    """A vLLM without one of the names: register() does not raise, the methods do, and name it."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    import vllm.plugins
    from vllm.model_executor.layers.quantization import get_quantization_config

    del mk.FusedMoEExpertsModular
    for name in [name for name in sys.modules if name.startswith("sluice.integrations._vllm")]:
        del sys.modules[name]
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()
    for method, user in ("w4afp8", None), ("sluice", "sluice"):
        config = get_quantization_config(method)
        expect_error("FusedMoEExpertsModular", lambda c=config: c.from_config({}))
        expect_error("FusedMoEExpertsModular",
                     lambda c=config, u=user, m=method: c.override_quantization_method({"quant_method": m}, u))


# --- All ranks ------------------------------------------------------------------------------------


def fork_ranks(name, folder):
    ranks, kind, options = CASES[name]
    store = folder / "store"
    store.unlink(missing_ok=True)
    body = {"refused": refused, "moved": moved}.get(name, run_layer)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                body(folder, rank, ranks, kind, options)
                code = 0
            except BaseException:
                traceback.print_exc()
                print(f"failed {name} rank {rank}", flush=True)
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return all([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children])


def main(folder, names):
    started = time.monotonic()
    torch.set_num_threads(1)
    stubs = vllm_on_cpu.use()
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # First of all, as vLLM does: deep_ep must be there before it is looked for.
    for name in SEAMS:
        seam(name)
    import vllm.model_executor.model_loader.utils
    import vllm.v1.worker.workspace  # noqa: F401
    from vllm.model_executor.layers.quantization import get_quantization_config

    get_quantization_config("w4afp8")  # Imports every method, once for all ranks.
    if DEVICE == "cpu":
        seam("vllm.model_executor.layers.fused_moe.modular_kernel").PIN_MEMORY = False
    # The channel by which an engine's driver tells its workers what to do: zmq, and no part of a layer.
    seam("vllm.distributed.device_communicators.shm_broadcast.MessageQueue").create_from_process_group = \
        staticmethod(lambda *_, **__: None)

    stubs.seal()
    make_checkpoints(folder)
    print(f"vLLM {version_of('vllm')} imported in {time.monotonic() - started:.1f} s", flush=True)
    for name in names or CASES:
        before = time.monotonic()
        passed = fork_ranks(name, folder)
        print(f"{'ok' if passed else 'FAILED'} {name} {time.monotonic() - before:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
