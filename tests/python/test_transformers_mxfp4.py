"""MXFP4 experts of transformers' own classes, through experts_implementation="sluice"."""

import json

import pytest
from tiny_models import COMMON, needs_ct, torch, transformers

import sluice

import mxfp4_files  # isort: skip
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear  # isort: skip
from transformers.quantizers.auto import AutoHfQuantizer  # isort: skip
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config  # isort: skip

SIZES = {**COMMON, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 64, "num_experts": mxfp4_files.EXPERTS,
         "num_experts_per_tok": 2, "moe_intermediate_size": 128}


def experts_of(folder=None, **options):
    """A model's FP8Experts as transformers' quantizer makes them of MXFP4 experts, with the weights of a file."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("qwen3_moe", **SIZES, swiglu_limit=options.pop("limit", None)))
    quantization = FineGrainedFP8Config(**{"expert_dtype": "fp4", "weight_block_size": (128, 128)} | options)
    replace_with_fp8_linear(model, quantization_config=quantization)
    model.set_experts_implementation("sluice")
    experts = model.model.layers[0].mlp.experts.to_empty(device="cpu")
    assert isinstance(experts, FP8Experts)
    if folder is not None:
        from safetensors.torch import load_file

        tensors = load_file(folder / "model.safetensors")
        of = lambda matrix, end: torch.stack([  # noqa: E731
            tensors[mxfp4_files.name_of("deepseek_v4", e, matrix) + end] for e in range(mxfp4_files.EXPERTS)])
        for name, parts in ("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",)):
            for suffix, end in ("", ".weight"), ("_scale_inv", ".scale"):
                target = getattr(experts, name + suffix)
                value = torch.cat([of(part, end).float() if target.dtype == torch.float32 else of(part, end)
                                   for part in parts], 1)
                assert value.shape == target.shape and value.dtype == target.dtype
                target.data = value
    return experts


def call(tokens=12):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, SIZES["hidden_size"], generator=draw).bfloat16()
    ids = torch.rand(tokens, mxfp4_files.EXPERTS, generator=draw).argsort(1)[:, :2]
    ids[1, 1] = mxfp4_files.EXPERTS  # Of another rank.
    return x, ids, torch.rand(ids.shape, generator=draw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mxfp4") / "deepseek_v4"
    mxfp4_files.write(path, "deepseek_v4", SIZES["hidden_size"], SIZES["moe_intermediate_size"])
    return path


@pytest.mark.parametrize("scales", ["ue8m0", "float"])
def test_every_element_against_float64(folder, scales):
    experts = experts_of(folder, limit=mxfp4_files.MODELS["deepseek_v4"][-1]["limit"], scale_fmt=scales)
    x, ids, weights = call()
    with torch.no_grad():
        y = experts(x, ids, weights)
    reference = mxfp4_files.Layer(folder)
    ids = torch.where(ids < mxfp4_files.EXPERTS, ids, -1)
    assert reference.check(y, x, ids, weights, roundings=1) > 0.9
    with torch.no_grad():
        assert torch.equal(experts(x[3:4], ids[3:4], weights[3:4]), y[3:4])
        experts.down_proj.zero_()  # New weights are seen.
        assert not experts(x, ids, weights).any()


def test_what_sluice_has_not_is_refused_by_name(folder):
    x, ids, weights = call()

    def refused(text, experts, code="unsupported", x=x):
        with pytest.raises(sluice.Error, match=text) as caught, torch.no_grad():
            experts(x, ids, weights)
        assert caught.value.code == code

    refused("experts of torch.float8_e4m3fn: MXFP4", experts_of(expert_dtype="fp8"))
    refused("hidden states: expected torch.bfloat16", experts_of(folder), "invalid_argument", x.float())
    experts = experts_of(folder, scale_fmt="float")
    experts.gate_up_proj_scale_inv.data.mul_(1.5)
    refused("gate_up_proj_scale_inv has other values than powers of two", experts)
    experts = experts_of(folder)
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[0]
    refused("an activation that is none of Sluice's", experts)
    rows = x.clone().requires_grad_()
    with pytest.raises(sluice.Error, match="no backward pass"):
        experts_of(folder)(rows, ids, weights).sum().backward()


def test_gpt_oss_is_refused_by_name():
    """Its MXFP4 experts have a class of their own, without a choice of implementations: asking for Sluice's is refused
    when they would be made. Of bfloat16 ones biases are named."""
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 64,
             "num_key_value_heads": 2, "num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model("gpt_oss", **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    model.set_experts_implementation("sluice")
    with pytest.raises(sluice.Error, match="GptOssExperts: experts with biases"), torch.no_grad():
        model(torch.arange(4)[None])
    quantizer = AutoHfQuantizer.from_config(Mxfp4Config(), pre_quantized=True)
    with pytest.raises(sluice.Error, match="GptOssForCausalLM: experts_implementation='sluice' .* biases"):
        quantizer.preprocess_model(model)
    model.set_experts_implementation("eager")
    quantizer.quantization_config.dequantize = True  # What transformers does where there is no GPU.
    quantizer.preprocess_model(model)
    assert type(model.model.layers[0].mlp.experts).__name__ == "GptOssExperts"


def saved_in_compressed_tensors(folder, hidden, intermediate):
    """A tiny Qwen3-MoE as transformers saves it, with experts in mxfp4-pack-quantized. The weights of `folder`'s file."""
    from safetensors.torch import load_file, save_file

    mxfp4_files.write(folder / "experts", "kimi_k3", hidden, intermediate)
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": hidden, "moe_intermediate_size": intermediate,
             "num_hidden_layers": mxfp4_files.LAYER + 1, "mlp_only_layers": list(range(mxfp4_files.LAYER))}
    config = transformers.AutoConfig.for_model("qwen3_moe", **sizes)
    model = folder / "model"
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(model)
    kept = {n: t for n, t in load_file(model / "model.safetensors").items() if ".experts." not in n}
    stems = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name, tensor in load_file(folder / "experts" / "model.safetensors").items():
        prefix, expert, matrix, part = name.rsplit(".", 3)
        del prefix
        kept[f"model.layers.{mxfp4_files.LAYER}.mlp.experts.{expert}.{stems[matrix]}.{part}"] = tensor
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    settings = json.loads((model / "config.json").read_text())
    settings["quantization_config"] = mxfp4_files.QUANTIZATION["kimi_k3"] | {"ignore": ["re:.*self_attn.*", "lm_head"]}
    (model / "config.json").write_text(json.dumps(settings))
    return model


@needs_ct
@pytest.mark.parametrize("hidden, intermediate", [(256, 128), (160, 96)])
def test_a_compressed_tensors_checkpoint_loads(tmp_path, hidden, intermediate):
    """From its files to the experts' output; widths of 160 and 96 are padded inside."""
    path = saved_in_compressed_tensors(tmp_path, hidden, intermediate)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    experts = model.model.layers[mxfp4_files.LAYER].mlp.experts
    assert type(experts).__name__ == "SluiceExperts"
    x, ids, weights = call()
    x = x[:, :hidden].contiguous()
    with torch.no_grad():
        y = experts(x, ids, weights)
        assert model(torch.arange(6)[None]).logits.isfinite().all()
    reference = mxfp4_files.Layer(tmp_path / "experts")
    reference.activation = "swiglu", {}  # Qwen3's; the file is one of Kimi-K3's weights alone.
    ids = torch.where(ids < mxfp4_files.EXPERTS, ids, -1)
    assert reference.check(y, x, ids, weights, roundings=1) > 0.5
