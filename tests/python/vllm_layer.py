"""A layer of vLLM as a model makes it, and the checkpoints that its weights come from, for rank_of_vllm.py."""

import json
import os
import types

import mxfp4_files
import numpy as np
import torch
from vllm_on_cpu import DEVICE

import sluice

HIDDEN, MIDDLE, EXPERTS, TOPK, LAYER = 2048, 256, 8, 2, 3
PREFIX = f"model.layers.{LAYER}.mlp.experts"
TOKENS = (5, 3, 7, 1)  # Of each rank.
# Folder -> model, hidden, intermediate. Of "narrow" both are padded, and each half of the intermediate size is.
MXFP4 = {"deepseek_v4": ("deepseek_v4", HIDDEN, MIDDLE), "kimi_k3": ("kimi_k3", HIDDEN, MIDDLE),
         "kimi_k3-ct": ("kimi_k3", HIDDEN, MIDDLE), "kimi_k3-narrow": ("kimi_k3", 2016, 192)}


# --- Checkpoints ----------------------------------------------------------------------------------


def write_packed(checkpoint, folder, group):
    """The same experts in compressed-tensors' format: offset codes, eight to an int32, even k low."""
    from safetensors.torch import save_file

    weights, tensors = checkpoint.load_experts(LAYER, 0, EXPERTS), {}
    for expert in range(EXPERTS):
        for name in "gate", "up", "down":
            codes, scales = weights.matrix(expert, name)
            stem = f"{PREFIX}.{expert}.{name}_proj"
            packed = torch.from_numpy((np.ascontiguousarray(codes).view(np.uint8) ^ 0x88).view(np.int32).copy())
            tensors[f"{stem}.weight_packed"] = packed
            scales = torch.from_numpy(scales.copy())
            if scales.dtype.itemsize == 2:  # bfloat16, as its bits.
                scales = scales.view(torch.bfloat16)
            tensors[f"{stem}.weight_scale"] = scales.repeat_interleave(128 // group, dim=1)
            tensors[f"{stem}.weight_shape"] = torch.tensor([packed.shape[0], 8 * packed.shape[1]])
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")


def make_checkpoints(folder):
    """One layer in each format that a case loads, and one whose codes are floats, which is refused."""
    from safetensors.torch import load_file, save_file

    geometry = sluice.ModelGeometry(num_experts=EXPERTS, num_topk=TOPK, hidden=HIDDEN, intermediate=MIDDLE)
    checkpoint = sluice.make_checkpoint(folder / "w4afp8", geometry, first_layer=LAYER)
    write_packed(checkpoint, folder / "packed-32", 32)
    rounded = sluice.make_checkpoint(folder / "bf16", geometry, first_layer=LAYER, scale_dtype="bf16")
    write_packed(rounded, folder / "packed-128", 128)
    tensors = load_file(folder / "packed-32" / "model.safetensors")
    (folder / "floats").mkdir()
    save_file({n: t.float() if n.endswith("packed") else t for n, t in tensors.items()},
              folder / "floats" / "model.safetensors")
    for name, sizes in MXFP4.items():
        mxfp4_files.write(folder / name, *sizes)
    mxfp4_files.write(folder / "deepseek_v4-floats", *MXFP4["deepseek_v4"], change=lambda tensors: {
        n: t if n.endswith("scale") else t.float().to(torch.float8_e4m3fn) for n, t in tensors.items()})
    mxfp4_files.write(folder / "deepseek_v4-scales", *MXFP4["deepseek_v4"], change=lambda tensors: {
        n: 1.5 * t.float() if n.endswith("scale") else t for n, t in tensors.items()})


def scheme(group, **changes):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group,
               "dynamic": False, "actorder": None} | changes.pop("weights", {})
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "format": "pack-quantized", "input_activations": None,
                                          "output_activations": None, "weights": weights} | changes}}


def mxfp4_config(kind, folder):
    """The same of MXFP4. vLLM's configurations of the models rename quant_method before anybody reads it, but not of
    "-ct", which stands for other models."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    model = json.loads((folder / kind / "config.json").read_text())
    settings = model["quantization_config"]
    renamed = {"deepseek_v4": "deepseek_v4_fp8", "kimi_k3": "mxfp4"}[model["model_type"]]
    if not kind.endswith("-ct"):
        settings["quant_method"] = renamed
    kind = get_quantization_config("sluice")
    assert kind.override_quantization_method(
        settings, "sluice", hf_config=types.SimpleNamespace(model_type=model["model_type"])) == "sluice"
    config = kind.from_config(settings)
    assert config.get_name() == "sluice" and config.get_min_capability() == 90
    assert torch.bfloat16 in config.get_supported_act_dtypes()
    return config


def mxfp4_layer(config, kind, folder, route, **changes):
    """As the models make theirs."""
    model = json.loads((folder / kind / "config.json").read_text())
    own, arguments = model["model_type"], {"hidden_size": model["hidden_size"],
                                           "intermediate_size": model["moe_intermediate_size"]}
    if own == "deepseek_v4":
        arguments |= {"ckpt_names": ("w1", "w2", "w3"), "swiglu_limit": model["numbers"]["limit"]}
    else:
        arguments |= {"activation": "situ", "activation_situ_beta": model["numbers"]["beta"],
                      "activation_situ_linear_beta": model["numbers"]["linear_beta"]}
    block = {"deepseek_v4": "ffn", "kimi_k3": "block_sparse_moe"}[own]
    return make_layer(config, route, block=block, **arguments | changes)


def quant_config(kind, folder, **changes):
    """As vLLM makes it: the registry's class, from the checkpoint's quantization_config, then its files."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    if kind in MXFP4:
        return mxfp4_config(kind, folder)
    settings = {"quant_method": "w4afp8"} if kind == "w4afp8" else scheme(int(kind.split("-")[1]), **changes)
    user = None if kind == "w4afp8" else "sluice"
    name = "w4afp8" if kind == "w4afp8" else "sluice"
    config = get_quantization_config(name)
    assert config.override_quantization_method(settings, user, hf_config=None) == name
    made = config.from_config(settings)
    assert torch.bfloat16 in made.get_supported_act_dtypes() and made.get_min_capability() == 90
    made.maybe_update_config(str(folder / kind))
    return made


# --- The layer ------------------------------------------------------------------------------------



def vllm_config(rank, tp=1, dp=1, ep=False, all2all="allgather_reducescatter", options=None):
    from vllm.config import ParallelConfig, SchedulerConfig, VllmConfig

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(tp * dp))
    parallel = ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp, data_parallel_rank=rank // tp,
                              enable_expert_parallel=ep, all2all_backend=all2all,
                              distributed_executor_backend="external_launcher")
    scheduler = SchedulerConfig.default_factory(max_num_batched_tokens=16, max_model_len=16, max_num_seqs=16)
    return VllmConfig(parallel_config=parallel, scheduler_config=scheduler,
                      additional_config={"sluice": options} if options else {})


def routing_of(tokens):
    """As vLLM's custom_routing_function: the layer's router is not what is tested."""
    ids, weights = tokens

    def route(hidden_states, gating_output, topk, renormalize):
        return weights.clone(), ids.to(torch.int32)

    return route


def make_layer(config, route, block="mlp", **changes):
    """The layer as a model makes it, in modules of a model's names."""
    from vllm.model_executor.layers.fused_moe import layer

    factory = getattr(layer, "FusedMoEFactory", None) or layer.FusedMoE
    arguments = dict(num_experts=EXPERTS, top_k=TOPK, hidden_size=HIDDEN, intermediate_size=MIDDLE,
                     params_dtype=torch.bfloat16, quant_config=config, prefix=PREFIX.replace("mlp", block),
                     custom_routing_function=route)
    root = torch.nn.Module()
    root.quant_config, root.model = config, torch.nn.Module()
    root.model.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(LAYER + 1))
    root.model.layers[LAYER].add_module(block, torch.nn.Module())
    root.model.layers[LAYER].get_submodule(block).experts = factory(**arguments | changes)
    return root


def renamed(name, parameters):
    """As the models' own do: _make_deepseek_v4_weights_mapper() of deepseek_v4, load_weights() of kimi_k3."""
    if name.startswith("language_model."):
        name = name.removeprefix("language_model.")
        for number, stem in ("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"):
            name = name.replace(f".{number}.", f".{stem}.")
    if name.startswith("layers."):
        name = "model." + name.replace(".scale", ".weight_scale")
    if name.endswith(".weight_packed") and not any(p.endswith("w13_weight_packed") for p in parameters):
        name = name.replace(".weight_packed", ".weight")
    return name


def load(root, folder, drop=None):
    """From the checkpoint's files through vLLM's weight loader; then as vLLM does when all is loaded."""
    from safetensors import safe_open
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.models.utils import AutoWeightsLoader

    parameters = [name for name, _ in root.named_parameters()]

    def tensors():
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if drop is None or not name.endswith(drop):
                        yield renamed(name, parameters), file.get_tensor(name)

    AutoWeightsLoader(root).load_weights(tensors())
    model = types.SimpleNamespace(word_embeddings_untied_by_checkpoint=False, quantization=None, dtype=torch.bfloat16)
    process_weights_after_loading(root, model, torch.device(DEVICE))
    block, = root.model.layers[LAYER].children()
    return block.experts


def inputs(rank):
    generator = torch.Generator().manual_seed(rank)
    tokens = TOKENS[rank]
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOPK] for _ in range(tokens)])
    return x, (ids, torch.rand(tokens, TOPK, generator=generator))
