"""What tiny models of transformers generate through Sluice: the same tokens over any number of processes, with a CUDA
graph and without; a token's row of the experts is the same in prefill and decoding; layers are near a float32 model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_ranks
from tiny_models import (
    EACH_DEVICE,
    EACH_FORM,
    MODELS,
    PROMPT,
    call_of,
    dequantized,
    environment_of,
    experts_of,
    load,
    moe_layers,
    needs_ct,
    torch,
    transformers,
)

import sluice

sys.path.append(str(Path(__file__).parents[2] / "python" / "examples"))
from transformers_graph import greedy  # noqa: E402

NUM_TOKENS = 32
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


# --- Tokens ---------------------------------------------------------------------------------------


SPREAD = [("deepseek_v3", "w4afp8", 2, ["auto"]), ("deepseek_v3", "w4afp8", 4, ["auto"]),
          ("qwen3_moe", "ct-32", 2, ["auto", "all_reduce"]), ("qwen3_moe", "ct-32", 4, ["sluice"])]


@EACH_DEVICE
@pytest.mark.parametrize("name, form, ranks, ways", SPREAD)
def test_experts_spread_over_processes(models, tmp_path, name, form, ranks, ways, device):
    """Through Sluice's exchange the tokens are those of one process. An all-reduce of bfloat16 promises less."""
    if form != "w4afp8":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    torch.save(PROMPT, tmp_path / "prompt.pt")
    run_ranks(Path(__file__).with_name("rank_of_transformers.py"), ranks, tmp_path, models[name, form], device, *ways,
              environment=lambda rank: environment_of(device), timeout=280 if device == "cpu" else 90)
    model = load(models[name, form], device_map=device)
    wanted = model.generate(PROMPT.to(device), max_new_tokens=NUM_TOKENS, do_sample=False).cpu()
    whole = sum(experts.weight_bytes for experts in experts_of(model).values())
    assert wanted.shape == (2, PROMPT.shape[1] + NUM_TOKENS)
    for rank in range(ranks):
        for way in ways:
            tokens, held = torch.load(tmp_path / f"tokens.{way}.{rank}.pt")
            assert held * ranks == whole > 0
            same = PROMPT.shape[1] + (1 if way == "all_reduce" else NUM_TOKENS)
            assert torch.equal(tokens[:, :same], wanted[:, :same]), (way, rank)


@EACH_MODEL
def test_the_decode_step_in_a_cuda_graph(models, name):
    """Two sizes of batch, each captured after the other has run: they share buffers, and one makes room for more."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    model = load(models[name, "w4afp8"], device_map="cuda")
    prompts = [PROMPT.cuda(), (torch.arange(24 * 70) * 5 % 256).reshape(24, 70).cuda()]
    wanted = [greedy(model, prompt, NUM_TOKENS)[0] for prompt in prompts]
    for prompt, tokens in [*zip(prompts, wanted), (prompts[0], wanted[0])]:
        assert torch.equal(greedy(model, prompt, NUM_TOKENS, use_graph=True)[0], tokens)


def test_a_cuda_graph_over_two_gpus(models, tmp_path):
    """Each rank's graph holds its half of the exchange. The tokens are those of one process and of single steps."""
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees fewer than two CUDA devices")
    torch.save(PROMPT, tmp_path / "prompt.pt")
    run_ranks(Path(__file__).with_name("rank_of_transformers.py"), 2, tmp_path, models["deepseek_v3", "w4afp8"], "cuda",
              "graph", environment=lambda rank: environment_of("cuda"), timeout=90)
    wanted = greedy(load(models["deepseek_v3", "w4afp8"], device_map="cuda"), PROMPT.cuda(), NUM_TOKENS)[0].cpu()
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"tokens.graph.{rank}.pt")[0], wanted), rank


@EACH_DEVICE
@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_a_cache_of_fixed_size(models, name, device):
    """What a graph replays, here step by step. generate() has another cache, whose attention may round otherwise:
    one token of it is compared."""
    model, prompt = load(models[name, "w4afp8"], device_map=device), PROMPT.to(device)
    tokens, _ = greedy(model, prompt, 8)
    assert tokens.shape == (2, 8) and torch.equal(greedy(model, prompt, 8)[0], tokens)
    assert torch.equal(model.generate(prompt, max_new_tokens=1, do_sample=False)[:, -1:], tokens[:, :1])


@EACH_DEVICE
def test_torch_compile_sees_one_graph(models, device):
    """The experts are an operator to it. "eager" runs what was traced as it is, and "cudagraphs" in CUDA graphs:
    neither changes how anything else is computed."""
    torch._dynamo.reset()
    model, prompt = load(models["qwen3_moe", "w4afp8"], device_map=device), PROMPT.to(device)
    if device == "cpu":
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert torch.equal(compiled(prompt).logits, model(prompt).logits)
        return
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "cache_implementation": "static"}
    compiled = transformers.CompileConfig(backend="cudagraphs", mode="default", fullgraph=True)
    tokens = model.generate(prompt, compile_config=compiled, **options)
    assert hasattr(model, "_compiled_call")  # generate() compiled it, and did not fall back.
    assert torch.equal(tokens, model.generate(prompt, disable_compile=True, **options))


# --- Rows of the experts --------------------------------------------------------------------------


@EACH_DEVICE
@EACH_FORM
def test_a_tokens_row_is_the_same_in_prefill_and_in_decoding(models, form, device):
    checkpoint = sluice.Checkpoint(models["deepseek_v3", form])
    model = load(models["deepseek_v3", form], device_map=device)
    for experts in experts_of(model).values():
        x, idx, weights = call_of(checkpoint.geometry, 700, device=device)
        with torch.no_grad():
            whole = experts(x, idx, weights)
            for length in (1, 2, 3, 8, 16, 17, 63, 64, 65, 129, 300, 699):  # Prefills, and batches of decoding.
                assert torch.equal(experts(x[:length], idx[:length], weights[:length]), whole[:length]), length
            for token in (0, 1, 350, 699):  # Alone.
                row = slice(token, token + 1)
                assert torch.equal(experts(x[row], idx[row], weights[row]), whole[row]), token
            order = torch.randperm(700, generator=torch.Generator().manual_seed(1)).to(device)  # Among others.
            for rows in order.split(64):
                assert torch.equal(experts(x[rows], idx[rows], weights[rows]), whole[rows])


# --- Layer by layer -------------------------------------------------------------------------------


def float_model(models, name, checkpoint):
    """transformers' own in float32, with the weights that the checkpoint's INT4 stand for."""
    model = load(models[name, "bf16"], dtype=torch.float32, experts_implementation="eager")
    for layer in moe_layers(name):
        weights = checkpoint.load_experts(layer, 0, checkpoint.geometry.num_experts)
        experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for e in range(len(weights)):
            gate, up, down = (dequantized(*weights.matrix(e, which)) for which in ("gate", "up", "down"))
            experts.gate_up_proj.data[e], experts.down_proj.data[e] = torch.cat([gate, up]), down
    return model


def record(layers, of_experts):
    """Hooks that keep what comes into each layer and out of it, and how its tokens were routed."""
    kept = [{} for _ in layers]
    for layer, what in zip(layers, kept):
        layer.register_forward_pre_hook(
            lambda module, args, what=what: what.update(before=args[0].detach().float().cpu()))
        layer.register_forward_hook(
            lambda module, args, out, what=what: what.update(after=out.detach().float().cpu()))
    for n, experts in of_experts.items():
        experts.register_forward_pre_hook(
            lambda module, args, what=kept[n]: what.update(routing=[a.detach().cpu() for a in args[1:]]))
    return kept


@EACH_DEVICE
@pytest.mark.parametrize("name, form", [("deepseek_v3", "w4afp8"), ("qwen3_moe", "w4afp8"),
                                        pytest.param("deepseek_v3", "ct-32", marks=needs_ct)])
def test_hidden_states_are_near_the_float_model_layer_by_layer(models, name, form, device):
    """Each layer gets what the float32 model's got, rounded to bfloat16, and its routing: what it adds to the residual
    differs by at most 5.5 % (relative L2), which is what rounding to e4m3 twice costs."""
    checkpoint = sluice.Checkpoint(models[name, form])
    reference, model = float_model(models, name, checkpoint), load(models[name, form], device_map=device)
    experts = {n: reference.get_submodule(f"model.layers.{n}.mlp.experts") for n in moe_layers(name)}
    wanted = record(reference.model.layers, experts)
    ids = (torch.arange(3 * 40) * 11 % 256).reshape(3, 40)
    with torch.no_grad():
        reference(ids)
        for layer, what in zip(model.model.layers, wanted):
            layer.register_forward_pre_hook(
                lambda module, args, what=what: (what["before"].to(device, torch.bfloat16), *args[1:]))
        for n in experts:
            model.get_submodule(f"model.layers.{n}.mlp.experts").register_forward_pre_hook(
                lambda module, args, what=wanted[n]: (args[0], *(a.to(device) for a in what["routing"])))
        got = record(model.model.layers, {})
        model(ids.to(device))
    errors = [((g["after"] - w["after"]).norm() / (w["after"] - w["before"]).norm()).item()
              for g, w in zip(got, wanted)]
    dense = [error for n, error in enumerate(errors) if n not in experts]
    sparse = [errors[n] for n in experts]
    assert all(0 < error < 0.02 for error in dense) and all(0.005 < error < 0.055 for error in sparse), errors


# --- The benchmark --------------------------------------------------------------------------------


def test_the_benchmark_runs_and_checks(tmp_path):
    """With a model of toy size, on the CPU. It ends with an error where a result is wrong."""
    script = Path(__file__).parents[2] / "python" / "benchmarks" / "transformers_model.py"
    options = ["--device", "cpu", "--geometry", "tiny", "--dense", "1", "--moe", "1", "--batches", "1", "2",
               "--prefill", "16", "--context", "4", "--steps", "1", "--json", tmp_path / "report.json"]
    done = subprocess.run([sys.executable, script, *map(str, options)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    rates = {row["experts"]: row["decode_tokens_per_s"] for row in report["models"]}
    assert rates["Sluice, INT4"]["2"]["steps"] > 0 and rates["transformers bf16, grouped_mm"]["2"]["steps"] > 0
    assert set(report["stage_us"]) == {"1", "2", "16"}
    assert 0 < report["relative_l2"]["bf16, grouped_mm"]["1"] < 0.01 < report["relative_l2"]["Sluice, INT4"]["1"]
