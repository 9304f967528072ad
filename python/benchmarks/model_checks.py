"""What transformers_model.py checks before it measures: the experts against float32 and against themselves, and which
operation of a decode step is the first to give other bits when the same is decoded again."""

import sys
from pathlib import Path

import torch
from model_weights import MATRICES, dequantized, experts_of

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from transformers_graph import Decoder  # noqa: E402

BOUND = 0.055  # Relative L2 of the experts' sums: what rounding to e4m3 twice costs, with room.
STEPS = 8      # That are compared.
REPEATS = 20   # Calls of one operation with the same input.


def call_of(config, num_tokens, device, seed=1):
    """x [T, H] as a norm gives it, ids and weights [T, K] as a router with evenly used experts gives them."""
    draw = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(num_tokens, config.hidden_size, device=device, generator=draw).bfloat16()
    scores = torch.rand(num_tokens, config.n_routed_experts, device=device, generator=draw)
    weights, idx = scores.topk(config.num_experts_per_tok)
    return x, idx, weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor


# --- The experts alone ----------------------------------------------------------------------------


def float_sums(config, layer, x, idx, weights):
    """What the layer's experts give in float32, on the values that the INT4 weights stand for."""
    y = torch.zeros(x.shape, device=x.device)
    for expert in idx.unique().tolist():
        gate, up, down = (dequantized(config, layer, expert, which, x.device).float() for which in MATRICES)
        token, k = (idx == expert).nonzero(as_tuple=True)
        rows = x[token].float()
        out = (torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
        y.index_add_(0, token, out * weights[token, k, None])
    return y


@torch.no_grad()
def check_layers(model, options, errors, name):
    """Relative L2 of each layer's sums from float32; exits where it is above BOUND."""
    for module_name, module in experts_of(model).items():
        layer = int(module_name.split(".")[2])
        call = call_of(model.config, options.checked, model.device, seed=layer)
        y, wanted = module(*call).float(), float_sums(model.config, layer, *call)
        errors.setdefault(name, {})[layer] = error = ((y - wanted).norm() / wanted.norm()).item()
        if not 0 < error < BOUND:
            sys.exit(f"{name}, layer {layer}: relative L2 {error:.4f} from float32, bound {BOUND}")


@torch.no_grad()
def check_rows(model, options):
    """A row has the same bits whatever call it is part of, or this exits."""
    module = next(iter(experts_of(model).values()))
    x, idx, weights = call_of(model.config, options.prefill, model.device)
    whole = module(x, idx, weights)
    for length in (1, 2, 16, 64, 65, 256, 1000):
        rows = slice(0, min(length, options.prefill))
        if not torch.equal(module(x[rows], idx[rows], weights[rows]), whole[rows]):
            sys.exit(f"rows of a call of {length} tokens differ from those of {options.prefill}")


# --- Every operation of a decode step -------------------------------------------------------------


def tensors_in(values):
    """The tensors among nested tuples, lists and dicts, in order."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [t for value in values for t in tensors_in(value)] if isinstance(values, (tuple, list)) else []


class Recorder:
    """While it lives, keeps what every module without children is given and gives, and scaled_dot_product_attention:
    calls is a list of (name, given, gave, again), in the order in which they ran. again() runs it once more.

    In a graph the copies that are kept are made by the graph, and replaying it renews them."""

    def __init__(self, model):
        self.calls, self._hooks = [], []
        for name, module in model.named_modules():
            if not list(module.children()):
                self._hooks.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        self._attention = torch.nn.functional.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = self._attend

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()
        torch.nn.functional.scaled_dot_product_attention = self._attention

    def _keep(self, name, run, args, kwargs, gave):
        args, kwargs = ([t.clone() if isinstance(t, torch.Tensor) else t for t in args],
                        {k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in kwargs.items()})
        self.calls.append((name, tensors_in([args, kwargs]), [t.clone() for t in tensors_in(gave)],
                           lambda: tensors_in(run(*args, **kwargs))))

    def _hook(self, name):
        return lambda module, args, kwargs, gave: self._keep(name, module.forward, args, kwargs, gave)

    def _attend(self, *args, **kwargs):
        gave = self._attention(*args, **kwargs)
        self._keep("scaled_dot_product_attention", self._attention, args, kwargs, gave)
        return gave


@torch.no_grad()
def decode_recorded(model, options, use_graph):
    """The tokens [STEPS][B, 1] of decoding, and of each step [(name, given, gave)]."""
    ids = torch.arange(2 * options.context, device=model.device).reshape(2, -1) % model.config.vocab_size
    decoder, tokens, steps = Decoder(model, ids, options.context + 2 * STEPS), [], []
    with Recorder(model) as recorder:
        (decoder.capture if use_graph else decoder.next)()
        if use_graph:  # A step ran before the one that was captured.
            del recorder.calls[: len(recorder.calls) // 2]
        for _ in range(STEPS):
            if not use_graph:
                recorder.calls.clear()
            decoder.next()
            tokens.append(decoder.token.clone())
            steps.append([(name, [t.clone() for t in given], [t.clone() for t in gave])
                          for name, given, gave, _ in recorder.calls])
    return tokens, steps


def difference(first, second):
    """Where two runs of decode_recorded() part first: (step, name, "is given" or "gives"), or None."""
    for step, calls in enumerate(zip(first[1], second[1])):
        assert [call[0] for call in calls[0]] == [call[0] for call in calls[1]]
        for (name, *one), (_, *other) in zip(*calls):
            for what, a, b in zip(("is given", "gives"), one, other):
                if not all(map(torch.equal, a, b)):
                    return step, name, what
    return None


def check_decoding(model, options, kinds):
    """Decodes by steps, and again in each of `kinds`, "steps" or "graph": {kind and number: what differs first, in
    words, or None}. Exits where it is experts that give other bits for the same input."""
    found, first = {}, decode_recorded(model, options, use_graph=False)
    for number, kind in enumerate(kinds):
        again = decode_recorded(model, options, use_graph=kind == "graph")
        where = difference(first, again)
        same = all(map(torch.equal, first[0], again[0]))
        if where is None:
            found[f"{kind}, run {number}"] = None if same else "every operation gives the same, but not the tokens"
            continue
        step, name, what = where
        if what == "gives" and name in experts_of(model):
            sys.exit(f"{kind}, step {step}: {name} give other bits for the same input")
        found[f"{kind}, run {number}"] = (f"step {step}: {name} {what} other bits"
                                          + (" for the same input" if what == "gives" else "")
                                          + f"; the tokens are {'the same' if same else 'others'}")
    return found


@torch.no_grad()
def unsteady_calls(model, options):
    """Calls each operation of one decode step REPEATS times with the input that it had: {name: (how many calls gave
    other bits, of how many)}, without those that never did. Exits where it is experts."""
    ids = torch.arange(2 * options.context, device=model.device).reshape(2, -1) % model.config.vocab_size
    decoder, unsteady = Decoder(model, ids, options.context + 2 * STEPS), {}
    with Recorder(model) as recorder:
        decoder.next()
    for name, _, gave, again in recorder.calls:
        others = sum(not all(map(torch.equal, gave, again())) for _ in range(REPEATS))
        before = unsteady.get(name, (0, 0))  # Attention has one name in all layers.
        unsteady[name] = before[0] + others, before[1] + REPEATS
        if others and name in experts_of(model):
            sys.exit(f"{name}: {others} of {REPEATS} calls give other bits for the same input")
    return {name: counts for name, counts in unsteady.items() if counts[0]}
