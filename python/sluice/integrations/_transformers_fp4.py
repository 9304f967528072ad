"""MXFP4 experts that transformers holds itself (DeepSeek-V4's, in FP8Experts), for experts_implementation="sluice"."""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .. import __version__
from .._error import Error
from ..compat._w4a8_scales import e8m0_bytes
from ..compat.w4a8 import W4A8Experts
from ._transformers_activation import activation_of
from ._transformers_kept import kept
from ._transformers_layers import Inference

_logger = logging.get_logger(__name__)


def _refuse(module: nn.Module, what: str) -> None:
    raise Error("unsupported", f"{type(module).__name__}: {what}")


class _Layer:
    """One layer's experts: what Inference calls."""

    def __init__(self, experts: W4A8Experts) -> None:
        self._experts = experts

    def run(self, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            raise Error("invalid_argument", f"hidden states: expected torch.bfloat16, got {x.dtype}; load the model "
                                            "with dtype=torch.bfloat16")
        return self._experts.grouped(x, None, idx, weights)


def _scales(module: nn.Module, name: str) -> torch.Tensor:
    codes = e8m0_bytes(getattr(module, name))
    if codes is None:
        _refuse(module, f"{name} has other values than powers of two; MXFP4 has scales of e8m0")
    return codes


def _repacked(module: nn.Module) -> _Layer:
    """Made at the first call, and again when the weights have changed."""
    names = "gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv"
    if not module.has_gate:
        _refuse(module, "experts without a gate matrix")
    tensors = [getattr(module, name).detach() for name in names]
    return kept.layer_of(module, tensors, lambda: _repack(module, names, tensors))


def _repack(module: nn.Module, names: tuple, tensors: list[torch.Tensor]) -> _Layer:
    if module.has_bias:
        _refuse(module, "experts with biases")
    if tensors[0].dtype != torch.int8:
        _refuse(module, f"experts of {tensors[0].dtype}: MXFP4 (expert_dtype 'fp4', int8) is Sluice's")
    activation = activation_of(module)
    if activation is None:
        _refuse(module, "an activation that is none of Sluice's")
    experts = W4A8Experts(tensors[0].view(torch.uint8), _scales(module, names[1]), tensors[2].view(torch.uint8),
                          _scales(module, names[3]), activation=activation, weight_layout="mxfp4")
    _logger.warning_once(
        f"Sluice {__version__} computes {type(module).__name__}: MXFP4 experts as W4A8 (activations e4m3), "
        f"{activation}, recipe direct-bf16. transformers' own copy of the weights stays in memory.")
    return _Layer(experts)


def fp4_experts_forward(self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                        top_k_weights: torch.Tensor) -> torch.Tensor:
    """experts_implementation="sluice" of FP8Experts: [T, H], [T, K], [T, K] -> [T, H]. Ids >= num_experts are skipped.

    Raises Error: unsupported, naming the class and what its experts have that Sluice's have not."""
    return Inference.apply(_repacked(self), hidden_states, top_k_index, top_k_weights)
