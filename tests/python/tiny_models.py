"""Tiny models with random weights, made by transformers itself and converted by the command line."""

import importlib.util
import os
import subprocess

import numpy as np
import pytest

import sluice

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
try:
    from sluice.integrations import transformers as integration
except sluice.Error as refused:
    pytest.skip(str(refused), allow_module_level=True)

torch.backends.cuda.enable_cudnn_sdp(False)  # Its attention gives other last bits from call to call.

COMMON = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
          "num_attention_heads": 4, "num_experts_per_tok": 4, "max_position_embeddings": 256,
          "bos_token_id": 0, "eos_token_id": None, "dtype": "bfloat16",
          "initializer_range": 0.06}  # So that experts add a share of the residual that shows.
MODELS = {
    "deepseek_v3": {"num_hidden_layers": 3, "num_key_value_heads": 4, "n_routed_experts": 16, "n_group": 4,
                    "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 64, "kv_lora_rank": 64,
                    "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32},
    "qwen3_moe": {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 16},
}
OTHERS = {  # Load and run as those do.
    "glm4_moe": {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64, "n_routed_experts": 16,
                 "first_k_dense_replace": 1},
    "glm_moe_dsa": {**MODELS["deepseek_v3"], "index_head_dim": 64, "index_n_heads": 2, "index_topk": 64},
    "qwen3_next": {**MODELS["qwen3_moe"], "shared_expert_intermediate_size": 128,
                   "layer_types": ["full_attention"] * 2},
}
FORMATS = {"w4afp8": ["w4afp8"], "ct-128": ["compressed-tensors", "--group-size", "128"],
           "ct-32": ["compressed-tensors", "--group-size", "32"]}
needs_ct = pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None,
                              reason="compressed-tensors is not installed")
EACH_FORM = pytest.mark.parametrize(
    "form", [form if form == "w4afp8" else pytest.param(form, marks=needs_ct) for form in FORMATS])
EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"))])
PROMPT = torch.arange(2 * 9).reshape(2, 9) * 7 % 256


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def make_models(folder, command_line, models=MODELS, formats=FORMATS):
    """model, format -> folder; "bf16" is what transformers saved."""
    paths = {}
    for name, sizes in models.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **COMMON, **sizes)
        paths[name, "bf16"] = folder / name
        transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / name)
        for form, options in formats.items():
            paths[name, form] = folder / f"{name}-{form}"
            subprocess.run([command_line, "convert", "--from", folder / name, "--to", paths[name, form],
                            "--scale", "amax7", "--format", *options], check=True, capture_output=True)
    return paths


def experts_of(model):
    return {name: module for name, module in model.named_modules()
            if isinstance(module, integration.SluiceExperts)}


def moe_layers(name):
    return list(range(MODELS[name].get("first_k_dense_replace", 0), MODELS[name]["num_hidden_layers"]))


def call_of(geometry, num_tokens, seed=1, device="cpu"):
    """x, ids and weights of a call, as transformers' routers give them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, geometry.hidden, generator=draw).bfloat16()
    idx = torch.rand(num_tokens, geometry.num_experts, generator=draw).argsort(1)[:, : geometry.num_topk]
    weights = torch.rand(idx.shape, generator=draw)
    return x.to(device), idx.to(device), weights.to(device)


def dequantized(codes, scales):
    low, high = (codes & 0xF).astype(np.int8), (codes >> 4).astype(np.int8)
    q = np.stack([low, high], -1).reshape(codes.shape[0], -1)
    q = np.where(q > 7, q - 16, q).astype(np.float32)
    if scales.dtype == np.uint16:
        scales = (scales.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(q * np.repeat(scales, q.shape[1] // scales.shape[1], 1))


def environment_of(device):
    """The CPU for its ranks, where there is a GPU too; a GPU that ranks share, so that they can wait for each other."""
    there = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER", "SLUICE_TIMEOUT_MS": "60000"}
    return {**os.environ, **there}
