"""Which of Sluice's activation functions a module of transformers' experts applies."""

from collections.abc import Callable
from typing import Any

import torch

# h of gate and up, by kind; the definitions are those of sluice/activation.h.
_KINDS: dict[str, Callable[..., torch.Tensor]] = {
    "swiglu": lambda g, u: g * torch.sigmoid(g) * u,
    "swiglu:limit": lambda g, u, limit: _KINDS["swiglu"](g.clamp(max=limit), u.clamp(-limit, limit)),
    "swiglu-oai": lambda g, u, alpha, limit: (
        g.clamp(max=limit) * torch.sigmoid(alpha * g.clamp(max=limit)) * (u.clamp(-limit, limit) + 1)),
    "situ": lambda g, u, beta, linear_beta: (
        beta * torch.tanh(g / beta) * torch.sigmoid(g) * linear_beta * torch.tanh(u / linear_beta)),
}


def _parsed(text: str) -> tuple[str, dict[str, float]]:
    kind, _, rest = text.partition(":")
    parameters = {name: float(value) for name, _, value in (part.partition("=") for part in rest.split(",") if part)}
    return "swiglu:limit" if kind == "swiglu" and parameters else kind, parameters


def same_activation(a: str, b: str) -> bool:
    """Whether two texts name one function; parameters are float32."""
    (kind_a, of_a), (kind_b, of_b) = _parsed(a), _parsed(b)
    return kind_a == kind_b and of_a.keys() == of_b.keys() and all(
        torch.tensor(of_a[name]) == torch.tensor(of_b[name]) for name in of_a)


def _attribute(module: Any, *names: str) -> float | None:
    return next((float(value) for name in names if (value := getattr(module, name, None)) is not None), None)


def _candidates(module: Any) -> list[str]:
    limit, alpha = _attribute(module, "limit", "swiglu_limit"), _attribute(module, "alpha", "swiglu_alpha")
    beta, linear_beta = _attribute(module, "gate_softcap"), _attribute(module, "up_softcap")
    texts = ["swiglu"]
    if limit is not None:
        texts.append(f"swiglu:limit={limit}")
        if alpha is not None:
            texts.append(f"swiglu-oai:alpha={alpha},limit={limit}")
    if beta is not None and linear_beta is not None:
        texts.append(f"situ:beta={beta},linear_beta={linear_beta}")
    return texts


@torch.no_grad()
def activation_of(module: Any) -> str | None:
    """As ExpertWeights.from_arrays() takes it, or None. Names and parameters only suggest a function: what the module's
    _apply_gate() makes of numbers on a grid, beyond every limit, decides."""
    axis = torch.linspace(-2, 2, 33, device="cpu", dtype=torch.float32) ** 3 * 8  # -64 .. 64, densest at 0.
    gate, up = torch.meshgrid(axis, axis, indexing="ij")
    try:
        h = module._apply_gate(torch.cat([gate, up], -1))
    except Exception:  # noqa: BLE001  Whatever it needs, these two halves are not it.
        return None
    for text in _candidates(module):
        kind, parameters = _parsed(text)
        if h.shape == gate.shape and torch.allclose(h, _KINDS[kind](gate, up, **parameters), rtol=1e-4, atol=1e-5):
            return text
    return None
