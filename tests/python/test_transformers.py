"""sluice.integrations.transformers: tiny models with random weights, made by transformers itself, converted
by the command line, loaded and run. test_transformers_generate.py has what they generate."""

import copy
import gc
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import on_every_rank
from tiny_models import (
    EACH_DEVICE,
    EACH_FORM,
    FORMATS,
    MODELS,
    OTHERS,
    PROMPT,
    call_of,
    dequantized,
    experts_of,
    integration,
    load,
    make_models,
    moe_layers,
    needs_ct,
    torch,
    transformers,
)

import sluice
from sluice.integrations._transformers_activation import activation_of

import safetensors.torch as safetensors_torch  # isort: skip  After tiny_models, which skips where there is no torch.

ROOT = Path(__file__).parents[2]


def bits(tensor):
    return tensor.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


@EACH_DEVICE
@EACH_FORM
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_loads_and_generates(models, name, form, device):
    model, info = load(models[name, form], output_loading_info=True, device_map=device)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert list(experts_of(model)) == [f"model.layers.{n}.mlp.experts" for n in moe_layers(name)]
    assert not any("gate_up_proj" in n for n, _ in model.named_parameters())
    same = {n: p for n, p in load(models[name, "bf16"], device_map=device).named_parameters()
            if ".mlp.experts." not in n}
    assert {n for n, _ in model.named_parameters()} == set(same)
    assert all(torch.equal(p, same[n]) for n, p in model.named_parameters())
    options = {"max_new_tokens": 32, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    first, second = (model.generate(PROMPT.to(device), **options) for _ in range(2))
    assert first.sequences.shape == (2, PROMPT.shape[1] + 32) and torch.equal(first.sequences, second.sequences)
    assert all(torch.isfinite(step).all() for step in first.logits)


@EACH_DEVICE
@EACH_FORM
def test_experts_give_the_bits_of_the_engine_over_any_ranks(models, form, device):
    """On a GPU over one; over more in test_transformers_generate.py."""
    path = models["deepseek_v3", form]
    checkpoint, layer = sluice.Checkpoint(path), moe_layers("deepseek_v3")[0]
    geometry = checkpoint.geometry
    experts = load(path, device_map=device).get_submodule(f"model.layers.{layer}.mlp.experts")
    x, idx, weights = call_of(geometry, 24, device=device)
    with torch.no_grad():
        y = experts(x, idx, weights)
    for ranks in (1, 2, 4) if device == "cpu" else (1,):
        transports = sluice.Transport.inproc(ranks)

        def run(rank):
            backend = sluice.Backend("cpu", num_threads=1) if device == "cpu" else sluice.Backend(device)
            engine = sluice.Engine(checkpoint, transports[rank], backend, layer=layer, max_tokens_per_rank=24)
            mine = slice(rank * 24 // ranks, (rank + 1) * 24 // ranks)
            routing = sluice.Routing(idx[mine].contiguous(), weights[mine].contiguous())
            return sluice.moe_forward(engine, x[mine].contiguous(), routing, mode="normal")

        assert np.array_equal(bits(torch.cat(on_every_rank(ranks, run))), bits(y)), ranks
    # A token's row is the same bits alone, in any batch, and beside entries that are another rank's.
    with torch.no_grad():
        for rows in (slice(0, 1), slice(5, 6), slice(3, 20)):
            assert torch.equal(experts(x[rows], idx[rows], weights[rows]), y[rows])
        elsewhere = torch.cat([idx, torch.full_like(idx[:, :1], geometry.num_experts)], 1)
        assert torch.equal(experts(x, elsewhere, torch.cat([weights, torch.ones_like(weights[:, :1])], 1)), y)


@EACH_DEVICE
@EACH_FORM
def test_layers_are_near_the_float_model_with_the_same_weights(models, form, device):
    """Against transformers' own eager experts in float32 on dequantized weights: what e4m3 costs, twice."""
    path = models["deepseek_v3", form]
    model, checkpoint = load(path, device_map=device), sluice.Checkpoint(path)
    geometry = checkpoint.geometry
    eager = load(models["deepseek_v3", "bf16"], dtype=torch.float32, experts_implementation="eager")
    for layer in moe_layers("deepseek_v3"):
        weights = checkpoint.load_experts(layer, 0, geometry.num_experts)
        reference = eager.get_submodule(f"model.layers.{layer}.mlp.experts")
        for e in range(geometry.num_experts):
            parts = [dequantized(*weights.matrix(e, which)) for which in ("gate", "up", "down")]
            reference.gate_up_proj.data[e], reference.down_proj.data[e] = torch.cat(parts[:2]), parts[2]
        x, idx, w = call_of(geometry, 64, seed=layer)
        with torch.no_grad():
            y = model.get_submodule(f"model.layers.{layer}.mlp.experts")(*(t.to(device) for t in (x, idx, w)))
            expected = reference(x.float(), idx, w)
        error = ((y.cpu().float() - expected).norm() / expected.norm()).item()
        assert 0.01 < error < 0.055, (layer, error)


@EACH_DEVICE
@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_model_gives_what_its_converted_checkpoint_gives(models, name, device):
    quantized, model = (load(models[name, form], device_map=device) for form in ("w4afp8", "bf16"))
    model.set_experts_implementation("sluice")
    prompt = PROMPT.to(device)
    with torch.no_grad():
        wanted, got = quantized(prompt).logits, model(prompt).logits
        assert torch.equal(wanted, got) and torch.equal(model(prompt).logits, got)
        # Of transformers' own experts another result, and the same again after switching back.
        model.set_experts_implementation("eager")
        assert not torch.equal(model(prompt).logits, got)
        model.set_experts_implementation("sluice")
        assert torch.equal(model(prompt).logits, got)
        # Weights that change are quantized again.
        model.get_submodule(f"model.layers.{moe_layers(name)[0]}.mlp.experts").down_proj.mul_(-2)
        assert not torch.equal(model(prompt).logits, got)


@EACH_DEVICE
def test_weights_that_change_without_a_new_version_are_quantized_again(models, device):
    """On a GPU a write through .data is not seen until forget(): a call would wait for it."""
    model = load(models["qwen3_moe", "bf16"], experts_implementation="sluice", device_map=device)
    experts = model.get_submodule(f"model.layers.{moe_layers('qwen3_moe')[0]}.mlp.experts")
    x, idx, weights = call_of(sluice.Checkpoint(models["qwen3_moe", "w4afp8"]).geometry, 16, seed=3, device=device)

    def replace_twice():
        for _ in range(2):  # The second may get the memory that the first one leaves.
            experts.down_proj.data = experts.down_proj.data * 2

    changes = {"mul_": lambda: experts.down_proj.data.mul_(1.5),
               "copy_": lambda: experts.gate_up_proj.data.copy_(experts.gate_up_proj.data.flip(0)),
               "one expert": lambda: experts.gate_up_proj.data[int(idx[0, 0])].mul_(-1),
               "data": replace_twice,
               "load_state_dict": lambda: experts.load_state_dict({k: v * 3 for k, v in experts.state_dict().items()})}
    with torch.no_grad():
        seen = [experts(x, idx, weights)]
        for name, change in changes.items():
            change()
            if device == "cuda" and name in ("mul_", "copy_", "one expert"):
                assert torch.equal(experts(x, idx, weights), seen[-1]), name
                sluice.integrations.transformers.forget(model)
            seen.append(experts(x, idx, weights))
            assert not torch.equal(seen[-1], seen[-2]), name
            # A copy has weights of its own, and no layer yet; so has what a file gives.
            file = io.BytesIO()
            torch.save(experts, file)
            file.seek(0)
            for other in copy.deepcopy(experts), torch.load(file, weights_only=False):
                assert torch.equal(other(x, idx, weights), seen[-1]), name
        # A single number of many: nobody sees it, until told.
        experts.down_proj.data[int(idx[0, 0]), 1, 1] = 100.0
        sluice.integrations.transformers.forget(model)
        assert not torch.equal(experts(x, idx, weights), seen[-1])
        assert torch.equal(experts(x, idx, weights), copy.deepcopy(experts)(x, idx, weights))


@EACH_DEVICE
def test_copies_of_int4_experts_share_them(models, device):
    model = load(models["qwen3_moe", "w4afp8"], device_map=device)
    made, prompt = copy.deepcopy(model), PROMPT.to(device)
    with torch.no_grad():
        expected = model(prompt).logits
        with pytest.raises(sluice.Error, match="SluiceExperts: its experts live in this process alone"):
            torch.save(model, io.BytesIO())
        del model
        gc.collect()
        assert torch.equal(made(prompt).logits, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(tmp_path, command_line, name):
    """Of GLM and Qwen: a converted checkpoint gives what its bf16 model gives with the same INT4 experts."""
    paths = make_models(tmp_path, command_line, {name: OTHERS[name]}, {"w4afp8": FORMATS["w4afp8"]})
    model, info = load(paths[name, "w4afp8"], output_loading_info=True)
    assert experts_of(model) and not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        wanted = load(paths[name, "bf16"], experts_implementation="sluice")(PROMPT).logits
        assert torch.equal(model(PROMPT).logits, wanted)


@needs_ct
def test_compressed_tensors_may_still_be_dequantized_by_transformers(models):
    config = transformers.CompressedTensorsConfig(dequantize=True)
    model = load(models["qwen3_moe", "ct-128"], quantization_config=config)
    assert not experts_of(model) and any("gate_up_proj" in n for n, _ in model.named_parameters())
    ours = load(models["qwen3_moe", "ct-128"])
    assert len(experts_of(ours)) == len(moe_layers("qwen3_moe"))


REFUSED = {
    "biases": {"has_bias": True},
    "transposed": {"is_transposed": True},
    "without a gate": {"has_gate": False, "gate_up_proj": None},
    "alternate": {"is_concatenated": False},
    "a norm after each": {"has_post_expert_norm": True},
    "GELU": {"act_fn": transformers.activations.ACT2FN["gelu"]},
    "hidden size 192": {"gate_up_proj": torch.nn.Parameter(torch.zeros(16, 256, 192).bfloat16())},
    "intermediate size 64": {"gate_up_proj": torch.nn.Parameter(torch.zeros(16, 128, 256).bfloat16())},
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_experts_are_refused_by_name(models, what):
    model = load(models["qwen3_moe", "bf16"], experts_implementation="sluice")
    experts = model.get_submodule("model.layers.1.mlp.experts")
    for name, value in REFUSED[what].items():
        setattr(experts, name, value)
    with pytest.raises(sluice.Error, match=f"Qwen3MoeExperts: .*{what}") as caught, torch.no_grad():
        model(PROMPT)
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", ("gate_up_proj", "down_proj"))
def test_weights_that_are_no_numbers_are_refused(models, name, value):
    model = load(models["qwen3_moe", "bf16"], experts_implementation="sluice")
    with torch.no_grad():
        getattr(model.get_submodule("model.layers.1.mlp.experts"), name)[2, 5, 7] = value
        with pytest.raises(sluice.Error, match=f"Qwen3MoeExperts: {name} of expert 2 has NaN or infinity") as caught:
            model(PROMPT)
    assert caught.value.code == "unsupported"


def test_a_model_loaded_in_inference_mode(models):
    wanted = load(models["qwen3_moe", "bf16"], experts_implementation="sluice")
    with torch.inference_mode():
        model = load(models["qwen3_moe", "bf16"], experts_implementation="sluice")
        assert torch.equal(model(PROMPT).logits, wanted(PROMPT).logits)


def test_an_older_transformers_is_refused():
    program = "import sys, types; sys.modules['transformers'] = older = types.ModuleType('transformers'); " \
              "older.__version__ = '5.23.9'; import sluice.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Error: transformers 5.23.9: sluice.integrations.transformers needs 5.24.0 or newer" in done.stderr


def test_an_activation_of_a_models_own_is_refused():
    config = transformers.GptOssConfig(
        num_hidden_layers=1, hidden_size=256, intermediate_size=128, num_local_experts=4, vocab_size=64,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, num_experts_per_tok=2)
    model = transformers.GptOssForCausalLM(config).bfloat16()
    model.set_experts_implementation("sluice")
    with pytest.raises(sluice.Error, match="GptOssExperts: experts with biases"), torch.no_grad():
        model(PROMPT % 64)
    experts = model.model.layers[0].mlp.experts
    experts.has_bias = experts.is_transposed = False
    experts.is_concatenated = True
    with pytest.raises(sluice.Error, match=r"GptOssExperts: an activation \(.*\) that is none of"), torch.no_grad():
        model(PROMPT % 64)


GATES = {"deepseek_v4": "swiglu:limit=0.5", "minimax_m3_vl": "swiglu-oai:alpha=1.702,limit=0.5"}


@pytest.mark.parametrize("model_type", GATES)
def test_activations_with_parameters(model_type):
    """Experts as transformers has them, in a layer of their own; the limit is one that many values pass."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    (kind,) = (value for name, value in vars(module).items() if re.fullmatch("(DeepseekV4|MiniMaxM3VL)Experts", name))
    config = types.SimpleNamespace(
        num_local_experts=8, hidden_size=256, intermediate_size=128, moe_intermediate_size=128, hidden_act="silu",
        swiglu_limit=0.5, swiglu_alpha=1.702, _experts_implementation="eager")
    torch.manual_seed(0)
    experts = kind(config)
    for parameter in experts.parameters():  # INT4 already: quantizing changes nothing.
        parameter.data = torch.randint(-7, 8, parameter.shape) / 64
        parameter.data[..., ::128] = 7 / 64
    assert activation_of(experts) == GATES[model_type]
    weights_of = experts.state_dict()
    x, idx, weights = call_of(types.SimpleNamespace(hidden=256, num_experts=8, num_topk=2), 64)
    with torch.no_grad():
        eager = experts(x.float(), idx, weights)
        for name in "limit", "swiglu_limit":
            if hasattr(experts, name):
                setattr(experts, name, 1e3)
        without = ((experts(x.float(), idx, weights) - eager).norm() / eager.norm()).item()
        experts = kind(config).bfloat16()
        experts.load_state_dict(weights_of)
        config._experts_implementation = "sluice"
        error = ((experts(x, idx, weights).float() - eager).norm() / eager.norm()).item()
    assert 0.01 < error < 0.06 < 0.1 < without


def test_an_activation_that_the_checkpoint_does_not_have_is_refused(models, tmp_path):
    """DeepSeek-V3's experts in transformers ignore a limit, which config.json gives them."""
    path = tmp_path / "model"
    shutil.copytree(models["deepseek_v3", "w4afp8"], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "swiglu_limit": 10.0}))
    with pytest.raises(sluice.Error, match="activation is swiglu in the model and swiglu:limit=10 in"):
        load(path)


def test_what_a_loaded_model_refuses(models, tmp_path):
    model = load(models["qwen3_moe", "w4afp8"])
    with pytest.raises(sluice.Error, match="no backward pass"):
        model(PROMPT).logits.float().sum().backward()
    with pytest.raises(ValueError, match="not serializable|can't be saved|cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    wide = load(models["qwen3_moe", "w4afp8"], dtype=torch.float32)
    with pytest.raises(sluice.Error, match="expected torch.bfloat16, got torch.float32"), torch.no_grad():
        wide(PROMPT)
    alone = integration.SluiceExperts(4, 256, 128)
    with pytest.raises(sluice.Error, match="without weights"):
        alone(torch.zeros(1, 256).bfloat16(), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    with pytest.raises(sluice.Error, match="only checkpoints that are quantized already"):
        load(models["qwen3_moe", "bf16"], quantization_config=integration.W4AFP8Config())


def test_a_config_saved_from_a_loaded_model_is_of_the_same_checkpoint(models, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(models["qwen3_moe", "w4afp8"], path)
    load(path).config.save_pretrained(path)
    saved = json.loads((path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "w4afp8" and "expert_dtype" not in saved
    assert sluice.Checkpoint(path).format == "w4afp8"
    assert experts_of(load(path))


def test_fp8_matrices_beside_the_experts_are_what_transformers_makes_of_them(models, tmp_path):
    """As W4AFP8 is published: attention and shared experts in FP8 with a scale for each block of 128 x 128. On a
    CPU transformers turns those into bfloat16."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    path = tmp_path / "model"
    shutil.copytree(models["qwen3_moe", "w4afp8"], path)
    (shard,) = path.glob("*.safetensors")
    tensors, dequantized_weights = safetensors_torch.load_file(shard), {}
    for name in [n for n in tensors if re.search(r"self_attn\.[qkvo]_proj\.weight$", n)]:
        blocks = tensors[name].float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))  # [n / 128, 128, k / 128, 128]
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name], tensors[name + "_scale_inv"] = codes.flatten(2, 3).flatten(0, 1), scale
        dequantized_weights[name] = (codes.float() * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1).bfloat16()
    safetensors_torch.save_file(tensors, shard, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}))
    model, info = load(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and experts_of(model)
    assert len(dequantized_weights) == 4 * MODELS["qwen3_moe"]["num_hidden_layers"]
    if not torch.cuda.is_available():
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[n], w) for n, w in dequantized_weights.items())
        assert torch.isfinite(model.generate(PROMPT, max_new_tokens=4, do_sample=False)).all()


def test_the_page(models, tmp_path, monkeypatch):
    """Every block of docs/transformers.md in order, in a folder with the models that it names."""
    monkeypatch.chdir(tmp_path)
    os.symlink(models["deepseek_v3", "bf16"], "model")
    os.symlink(models["deepseek_v3", "w4afp8"], "model-int4")
    text, namespace = (ROOT / "docs" / "transformers.md").read_text(), {}
    blocks = re.findall(r"^```python( cuda)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for needs, block in blocks:
        if not needs or torch.cuda.is_available():
            exec(compile(block, "docs/transformers.md", "exec"), namespace)
    assert len(blocks) >= 2


def test_a_split_that_there_is_not_is_refused(models):
    config = transformers.AutoConfig.from_pretrained(models["qwen3_moe", "w4afp8"])
    model = transformers.AutoModelForCausalLM.from_config(config)
    files = [str(models["qwen3_moe", "w4afp8"] / "model-00001-of-00001.safetensors")]
    quantizer = integration.W4AFP8Quantizer(integration.W4AFP8Config())
    for sizes, what in ({"tp_size": 2}, "tp_size=2 without ep_size"), ({"tp_size": 3, "ep_size": 3}, "ep_size=3"):
        model.config.distributed_config = types.SimpleNamespace(**sizes)
        with pytest.raises(sluice.Error, match=f"distributed_config: {what}"):
            quantizer._experts_of(model, files)


def test_a_larger_call_makes_room(models):
    experts = next(iter(experts_of(load(models["qwen3_moe", "w4afp8"])).values()))
    geometry = types.SimpleNamespace(hidden=256, num_experts=16, num_topk=4)
    x, idx, weights = call_of(geometry, 700)
    with torch.no_grad():
        y = experts(x, idx, weights)
        assert torch.equal(experts(x[:3], idx[:3], weights[:3]), y[:3])
        assert experts(x[:0], idx[:0], weights[:0]).shape == (0, 256)
