"""Models of transformers that several threads use at once, as a server's requests do: calls take turns."""

import threading

import numpy as np
import pytest
from tiny_models import COMMON, EACH_DEVICE, MODELS, PROMPT, experts_of, integration, load, torch, transformers

import sluice

THREADS = 4


def together(*bodies):
    """Each body on a thread of its own, all begun at once: their results in order."""
    results, begin = [None] * len(bodies), threading.Barrier(len(bodies))

    def run(i):
        begin.wait()
        try:
            results[i] = bodies[i]()
        except BaseException as failure:
            results[i] = failure

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures = [r for r in results if isinstance(r, BaseException)]
    if failures:
        raise failures[0]
    return results


def model_of(seed, device, name="qwen3_moe"):
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name, **COMMON, **MODELS[name])
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval().to(device)
    model.set_experts_implementation("sluice")
    return model


def logits_of(model, prompt):
    with torch.no_grad():
        return model(prompt.to(model.device)).logits.cpu()


def prompts():
    """Of growing lengths: the longest needs more room than there is at first."""
    return [PROMPT.repeat(1 + 15 * i, 1)[:, : 3 + i] for i in range(THREADS)] + [PROMPT.repeat(24, 1)]


@EACH_DEVICE
def test_a_model_in_bfloat16(device, monkeypatch):
    """Quantized once for each layer, by whichever thread came first; two models share the memory between the stages."""
    models, many = [model_of(seed, device) for seed in (0, 1)], prompts()
    expected = [[logits_of(model, prompt) for prompt in many] for model in models]
    assert not torch.equal(expected[0][0], expected[1][0])
    for model in models:
        integration.forget(model)
    monkeypatch.setattr(integration, "_buffers", type(integration._buffers)())  # No room yet.
    made, from_arrays = [], sluice.ExpertWeights.from_arrays
    counting = type("Counting", (), {"from_arrays": staticmethod(lambda *a, **k: made.append(1) or from_arrays(*a, **k))})
    monkeypatch.setattr(sluice._core, "ExpertWeights", counting)

    def requests(number):
        model, order = models[number % 2], np.roll(np.arange(len(many)), number)
        return all(torch.equal(logits_of(model, many[i]), expected[number % 2][i]) for i in [*order, *order])

    assert together(*[lambda n=n: requests(n) for n in range(THREADS)]) == [True] * THREADS
    assert len(made) == sum(MODELS["qwen3_moe"]["num_hidden_layers"] for _ in models)
    group, = (g for g in integration._buffers._groups.values())
    assert group.max_entries >= many[-1].numel() * COMMON["num_experts_per_tok"] > 1024


@EACH_DEVICE
def test_a_checkpoint(models, device):
    model = load(models["qwen3_moe", "w4afp8"], device_map=device)
    assert experts_of(model)
    many = prompts()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = [model.generate(prompt.to(device), **options) for prompt in many]
    same = lambda i: all(  # noqa: E731
        torch.equal(model.generate(many[k].to(device), **options), expected[k]) for k in (i, 0, -1))
    assert together(*[lambda i=i: same(i) for i in range(THREADS)]) == [True] * THREADS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_beside_the_capture_of_a_graph(models):
    """A thread captures a layer's calls while another one makes calls of its own."""
    model = load(models["qwen3_moe", "w4afp8"], device_map="cuda")
    layer = next(iter(experts_of(model).values()))
    x = torch.randn(8, COMMON["hidden_size"], device="cuda").bfloat16()
    idx = torch.arange(32, device="cuda").view(8, 4) % layer.num_experts
    weights = torch.rand(8, 4, device="cuda")
    with torch.no_grad():
        expected = layer.run(x, idx, weights)

    def capture():
        ok = True
        for _ in range(8):
            graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                graph.capture_begin(capture_error_mode="thread_local")
                y = layer.run(x, idx, weights)
                graph.capture_end()
                graph.replay()
                torch.cuda.current_stream().synchronize()
            ok = ok and torch.equal(y, expected)
        return ok

    def call():
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            return all(torch.equal(layer.run(x, idx, weights), expected) for _ in range(200))

    assert together(capture, call) == [True, True]
