"""SGLang in this process, without what it depends on: its plug-ins loaded by its own loader, a rank of a server with
given switches, a layer from a checkpoint's files. Nothing of SGLang is replaced but what is named here.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
import tempfile
import types
from pathlib import Path

import torch

import engine_stubs

# Imported by SGLang's modules, needed by none of the code that runs here.
MISSING = ["IPython", "PIL", "aiohttp", "dill", "einops", "gguf", "openai", "orjson", "partial_json_parser", "pybase64",
           "requests", "sgl_kernel", "starlette", "torchvision", "tvm_ffi", "zmq"]
# Of SGLang: models' configurations, the tokenizer's side of transformers, the scheduler's batches, the HTTP server.
REPLACED = ["sglang.srt.configs.hybrid_arch", "sglang.srt.configs.model_config", "sglang.srt.entrypoints",
            "sglang.srt.managers.schedule_batch", "sglang.srt.utils.hf_transformers"]
BARE = ["sglang.srt.configs"]  # One of the configurations in it is needed.
stubs = engine_stubs.use("sglang", missing=MISSING, replaced=REPLACED, bare=BARE)

os.environ["SGLANG_NCCL_SO_PATH"] = "/none"  # Ranks may share a GPU, which NCCL refuses: groups are gloo's.
os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "false"  # It needs ZeroMQ.

LAYER, TOKENS, PREFIX = 3, 12, "model.layers.3.mlp.experts"


def entry_point():
    """Of the installed distribution, or of the tree: a dist-info with what pyproject.toml declares."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.distribution("sluice").entry_points.select(group="sglang.srt.plugins"):
            return
    text = (engine_stubs.ROOT / "pyproject.toml").read_text()
    declared = text.partition('[project.entry-points."sglang.srt.plugins"]\n')[2].partition("\n\n")[0]
    folder = Path(tempfile.mkdtemp()) / "sluice-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sluice\nVersion: 0\n")
    (folder / "entry_points.txt").write_text("[sglang.srt.plugins]\n" + declared.replace('"', ""))
    sys.path.insert(0, str(folder.parent))


class Log(logging.Handler):
    lines: list[str] = []

    def emit(self, record):
        Log.lines.append(record.getMessage())


logging.getLogger().addHandler(Log())
logging.getLogger().setLevel(logging.INFO)
logging.getLogger("sglang").setLevel(logging.INFO)


# --- Once, before the ranks are forked -------------------------------------------------------------


def group_quant_fp8(x, group_size, **_):
    """As SGLang's kernel of the name: e4m3 with a float32 scale for each group."""
    groups = x.float().unflatten(-1, (-1, group_size))
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    codes = (groups * (torch.full_like(amax, 448) / amax)).to(torch.float8_e4m3fn)
    return codes.flatten(-2), (amax * torch.tensor(1 / 448)).squeeze(-1)


def load_engine():
    """SGLang's modules and, by its own loader, its plug-ins: the only one is Sluice's."""
    entry_point()
    from sglang.srt.plugins import load_plugins

    import sglang.srt.layers.moe.token_dispatcher.deepep  # noqa: F401  As in a scheduler: before plug-ins.
    import sglang.srt.layers.sampler  # noqa: F401
    import sglang.srt.server_args  # noqa: F401

    load_plugins()
    from sglang.srt.layers.quantization import w4afp8

    from sluice.integrations import _sglang_experts

    assert w4afp8.W4AFp8MoEMethod is _sglang_experts.SluiceW4AFp8MoEMethod, Log.lines
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.token_dispatcher import deepep, standard

    if importlib.util.find_spec("deep_gemm") is None:  # SGLang refuses DeepEP without it.
        deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
    deepep.sglang_per_token_group_quant_fp8 = group_quant_fp8  # Of normal mode in fp8: a compiled kernel.
    if not torch.cuda.is_available():  # SGLang asks the GPU for its SMs and puts a table of experts on it.
        torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=132)
        standard.get_device = lambda: "cpu"


# --- In each rank ---------------------------------------------------------------------------------


class Rank:
    """One process of an engine that was launched with the given switches."""

    def __init__(self, rank, size, store, device, **switches):
        from sglang.srt import distributed
        from sglang.srt.layers.moe.utils import initialize_moe_config
        from sglang.srt.runtime_context import SpawnRanks, get_context, publish

        self.rank, self.size, self.device = rank, size, device
        arguments = get_context().override_server_args(
            device=device, tp_size=size, chunked_prefill_size=64, **switches).install()
        gpu = rank % torch.cuda.device_count() if device == "cuda" else 0
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=gpu))
        if device == "cuda":
            torch.cuda.set_device(gpu)
            distributed.set_custom_all_reduce(False)  # For ranks with a GPU each and NCCL between them.
        distributed.init_distributed_environment(
            world_size=size, rank=rank, local_rank=gpu, distributed_init_method=f"file://{store}", backend="gloo")
        distributed.initialize_model_parallel(backend="gloo")
        initialize_moe_config()

    def layer(self, folder, load=True, **changes):
        """From the checkpoint's config.json and files, as SGLang's models make and fill theirs."""
        from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
        from sglang.srt.layers.moe.utils import get_moe_a2a_backend

        sizes = json.loads((folder / "config.json").read_text())
        quantization = sizes["quantization_config"]
        if sizes["model_type"] in MXFP4:
            changes = {"swiglu_limit": sizes["numbers"].get("limit"), **of_kimi_k3(sizes), **changes}
        config = config_of(sizes["model_type"], quantization)
        with torch.device(self.device):
            layer = get_moe_impl_class(config)(**{
                "num_experts": sizes["n_routed_experts"], "top_k": sizes["num_experts_per_tok"],
                "hidden_size": sizes["hidden_size"], "intermediate_size": sizes["moe_intermediate_size"],
                "layer_id": LAYER, "params_dtype": torch.bfloat16, "quant_config": config, "prefix": PREFIX,
                "routed_scaling_factor": sizes["routed_scaling_factor"],
                "reduce_results": get_moe_a2a_backend().is_none(), **changes})
        if not load:
            return layer
        load_weights(layer, folder, sizes["model_type"])
        layer.quant_method.process_weights_after_loading(layer)
        return layer


MXFP4 = ("deepseek_v4", "kimi_k3")


def config_of(model, quantization):
    """SGLang's configuration of the experts, as its model loader and its models make it."""
    from sglang.srt.layers.quantization import get_quantization_config
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config

    if model == "kimi_k3" and "mxfp4" in quantization["format"]:  # As models/kimi_k3.py, KimiK3MoE.
        return Mxfp4Config(is_checkpoint_mxfp4_serialized=True)
    config = get_quantization_config(quantization["quant_method"]).from_config(quantization)
    if model == "deepseek_v4":  # As model_loader/loader.py; the model's configuration finds it in the files.
        config.is_fp4_experts, config.dequant_fp4_to_fp8 = True, False
    return config


def of_kimi_k3(sizes):
    """As models/kimi_k3.py gives them to its experts."""
    if sizes["activation"] != "situ":
        return {}
    numbers = sizes["numbers"]
    return {"activation": "situ", "gemm1_alpha": numbers["beta"], "gemm1_clamp_limit": numbers["linear_beta"],
            "gate_up_interleaved": False}


def renamed(name, model):
    """As the models' load_weights() rename their checkpoints' tensors; experts are below PREFIX here."""
    if model == "deepseek_v4":
        name = "model." + name.replace(".ffn.", ".mlp.").replace(".scale", ".weight_scale_inv")
    if model == "kimi_k3":
        name = name.removeprefix("language_model.").replace(".block_sparse_moe.", ".mlp.")
        name = name.replace("weight_packed", "weight")
    if model in MXFP4:
        for number, stem in ("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"):
            name = name.replace(f".{number}.", f".{stem}.")
    return name


def load_weights(layer, folder, model=None):
    """The loop of SGLang's models over its iterator, its mappings and its layer's loader."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.model_loader.weight_utils import safetensors_weights_iterator

    mapping = FusedMoE.make_expert_params_mapping("gate_proj", "down_proj", "up_proj", layer.num_experts)
    mapping += FusedMoE.make_expert_input_scale_params_mapping(layer.num_experts)
    params, loaded = dict(layer.named_parameters()), 0
    for name, tensor in safetensors_weights_iterator(sorted(str(f) for f in folder.glob("*.safetensors"))):
        name = renamed(name, model)
        for ours, theirs, expert, shard in mapping:
            if theirs in name:
                param = params[name.replace(f"{PREFIX}.", "experts.").replace(theirs, ours).removeprefix("experts.")]
                param.weight_loader(param, tensor, name, shard_id=shard, expert_id=expert)
                loaded += 1
    assert loaded > 0


def workload(size, rank, num_experts, top_k, hidden, device, tokens=TOKENS):
    """Tokens of one rank: as many as it has of TOKENS, none for the last of several; some entries are -1."""
    draw = torch.Generator().manual_seed(100 * size + rank)
    x = torch.randn(tokens, hidden, generator=draw).bfloat16()
    ids = torch.rand(tokens, num_experts, generator=draw).argsort(1)[:, :top_k].int()
    weights = torch.rand(ids.shape, generator=draw)
    if tokens > 2:
        ids[1, 1], ids[2] = -1, -1
    return x.to(device), ids.to(device), weights.to(device)


def topk_output(x, ids, weights):
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    return StandardTopKOutput(weights, ids, torch.zeros(len(x), 8, device=x.device))
