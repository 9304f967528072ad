"""What the functions of w4a8 repacked, until the weights are gone."""

import threading
import weakref
from typing import Any

import numpy

from .._error import Error
from ._w4a8_experts import W4A8Experts


def _owner_of(array: Any) -> Any:
    """What lives as long as the memory: torch's storage, or the array of numpy that others are views of."""
    if isinstance(array, numpy.ndarray):
        while isinstance(array.base, numpy.ndarray):
            array = array.base
        if not hasattr(array.base, "untyped_storage"):
            return array
        array = array.base  # Tensor.numpy() makes a new array each time.
    return array.untyped_storage()


def _place_of(array: Any) -> tuple:
    """Tells arrays apart that live at the same time; views of the same elements are the same."""
    if isinstance(array, numpy.ndarray):
        return array.ctypes.data, array.shape, array.strides, array.dtype.str
    return array.data_ptr(), tuple(array.shape), array.stride(), str(array.dtype)


class _Array:
    """An argument that was an array, and its memory while that lives."""

    def __init__(self, array: Any) -> None:
        self._owner, self._place = weakref.ref(_owner_of(array)), _place_of(array)

    def is_same(self, array: Any) -> bool:
        return self._owner() is _owner_of(array) and _place_of(array) == self._place


def _is_same(first: Any, now: Any) -> bool:
    is_array = hasattr(now, "shape")
    if isinstance(first, _Array) or is_array:
        return isinstance(first, _Array) and is_array and first.is_same(now)
    return first == now


class _FirstCall:
    """The experts of some weights, and the arguments that they were made with."""

    def __init__(self, experts: W4A8Experts, arguments: dict[str, Any]) -> None:
        self.experts = experts
        self._arguments = {name: _Array(value) if hasattr(value, "shape") else value
                           for name, value in arguments.items()}

    def check(self, arguments: dict[str, Any], backend: Any) -> None:
        """Refuses, by name, what differs: the experts were made with the first."""
        differs = [name for name, first in self._arguments.items()
                   if not _is_same(first, arguments[name])]
        if backend is not None and backend is not self.experts.backend:
            differs.append("backend")
        if differs:
            raise Error("invalid_argument", f"{', '.join(differs)}: not what the first call with this "
                        "w13 and w2 gave; make W4A8Experts for each, or forget(w13, w2) first")


cache: dict[tuple, _FirstCall] = {}
_lock = threading.RLock()  # Held while weights are repacked, so that two threads do not both do it.


def _key_of(w13: Any, w2: Any) -> tuple:
    return _place_of(w13), _place_of(w2)


def experts_for(x: Any, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any, a1_scale: Any,
                a2_scale: Any, activation: str, backend: Any) -> W4A8Experts:
    """What the first call with w13 and w2 repacked, until the memory of either is gone."""
    arguments = {"w13_scale": w13_scale, "w2_scale": w2_scale, "a1_scale": a1_scale,
                 "a2_scale": a2_scale, "activation": activation}
    if not hasattr(w13, "shape") or not hasattr(w2, "shape"):  # The constructor names it.
        return W4A8Experts(w13, w13_scale, w2, w2_scale, backend=backend)
    key = _key_of(w13, w2)
    with _lock:
        first = cache.get(key)
        if first is not None:
            first.check(arguments, backend)
            return first.experts
        experts = W4A8Experts(w13, w13_scale, w2, w2_scale, a1_scale=a1_scale, a2_scale=a2_scale,
                              activation=activation, backend=backend)
        cache[key] = _FirstCall(experts, arguments)
        for array in (w13, w2):
            weakref.finalize(_owner_of(array), cache.pop, key, None).atexit = False
    return experts


def forget(w13: Any, w2: Any) -> None:
    """Drops what was repacked of these: call it after changing weights or scales in place."""
    with _lock:
        cache.pop(_key_of(w13, w2), None)
