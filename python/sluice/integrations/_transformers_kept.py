"""Layers of Sluice that are made of a module's own weights: kept beside the module, for as long as those stay."""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_SAMPLE_BYTES = 1024  # Of each tensor on a CPU, at every call: some 10 us.


@functools.cache
def _places(num_bytes: int) -> torch.Tensor:
    # One at random in each part: even steps would fall on the low bytes alone.
    count = min(_SAMPLE_BYTES, num_bytes)
    draw = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return ((torch.arange(count) + draw) * (num_bytes / count)).long().clamp_(max=num_bytes - 1)


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """Bytes from all over a tensor on a CPU. Of one on a GPU a call would have to wait for them: nothing."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    raw = torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size(), (span * tensor.element_size(),))
    return raw[_places(len(raw))]


class Kept:
    """By module. A copy of the module, or a saved one, has no layer, and makes its own at its first call."""

    def __init__(self) -> None:
        self._layers: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()  # Held while a layer is made, so that two threads do not both do it.

    def layer_of(self, module: nn.Module, tensors: list[torch.Tensor], make: Callable[[], Any]) -> Any:
        """The layer that was made of these weights, else what `make` gives now."""
        layer = self._find(module, tensors)
        if layer is None:
            with self._lock:
                layer = self._find(module, tensors)
                if layer is None:
                    layer = make()
                    self._keep(module, tensors, layer)
        return layer

    def _find(self, module: nn.Module, tensors: list[torch.Tensor]) -> Any:
        """None: there is no layer, or the weights have changed."""
        kept = self._layers.get(module)
        if kept is None or kept[0] != self._state(tensors):
            return None
        now = [_sample(t) for t in tensors]
        same = all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(kept[1], now, strict=True))
        return kept[3] if same else None

    def _keep(self, module: nn.Module, tensors: list[torch.Tensor], layer: Any) -> None:
        # Tensors that are held keep their memory: no other weights get the same address meanwhile.
        held = [t.detach() for t in tensors]
        self._layers[module] = self._state(tensors), [_sample(t) for t in tensors], held, layer

    def forget(self, module: nn.Module) -> None:
        """Also of every module in it."""
        for one in module.modules():
            self._layers.pop(one, None)

    @staticmethod
    def _state(tensors: list[torch.Tensor]) -> list[tuple]:
        # Parameters made in inference mode have no version.
        return [(t.data_ptr(), None if t.is_inference() else t._version, t.device) for t in tensors]


kept = Kept()
