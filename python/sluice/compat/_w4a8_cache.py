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


def _address_of(owner: Any) -> int:
    """Of its memory, which may be another one later: a storage of torch can be freed and filled while it lives."""
    return owner.ctypes.data if isinstance(owner, numpy.ndarray) else owner.data_ptr()


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

    def __init__(self, experts: W4A8Experts, weights: tuple, arguments: dict[str, Any]) -> None:
        self.experts = experts
        owners = [_owner_of(array) for array in weights]
        self.memory = [(weakref.ref(owner), _address_of(owner)) for owner in owners]
        self._arguments = {name: _Array(value) if hasattr(value, "shape") else value
                           for name, value in arguments.items()}
        self.finalizers: list[weakref.finalize] = []

    def has_memory(self) -> bool:
        """Whether the weights' memory is still theirs. If not, others may have come to its address."""
        for remembered, address in self.memory:
            owner = remembered()
            if owner is None or _address_of(owner) != address:
                return False
        return True

    def check(self, arguments: dict[str, Any], backend: Any) -> None:
        """Refuses, by name, what differs: the experts were made with the first."""
        differs = [name for name, first in self._arguments.items()
                   if not _is_same(first, arguments[name])]
        if backend is not None and backend is not self.experts.backend:
            differs.append("backend")
        if differs:
            raise Error("invalid_argument", f"{', '.join(differs)}: not what the first call with this "
                        "w13 and w2 gave; make W4A8Experts for each, or forget(w13, w2) first")


class _SameObjects:
    """A call's arguments as objects, and where they lay: the same ones need no other check.

    An object is remembered weakly. What its tensor is may change in place, so that is compared too."""

    def __init__(self, first: _FirstCall, arguments: tuple) -> None:
        self._first = weakref.ref(first)  # Gone when its weights are, or after forget().
        self._arguments = [(weakref.ref(a), a.data_ptr(), a.dtype, a.shape, a.stride()) if hasattr(a, "data_ptr")
                           else (None, a, None, None, None) for a in arguments]

    def experts(self, arguments: tuple) -> W4A8Experts | None:
        first = self._first()
        if first is None:
            return None
        for owner, address in first.memory:  # As has_memory(): these are storages of torch.
            storage = owner()
            if storage is None or storage.data_ptr() != address:
                return None
        for (remembered, place, dtype, shape, stride), given in zip(self._arguments, arguments):
            if remembered is None:
                if given is not place:
                    return None
            elif (remembered() is not given or given.data_ptr() != place or given.dtype != dtype
                  or given.shape != shape or given.stride() != stride):
                return None
        return first.experts


cache: dict[tuple, _FirstCall] = {}
_recent: dict[int, _SameObjects] = {}  # By id(w13), whose object takes it away when it goes.
_lock = threading.RLock()  # Held while weights are repacked, so that two threads do not both do it.


def _key_of(w13: Any, w2: Any) -> tuple:
    return _place_of(w13), _place_of(w2)


def experts_for(x: Any, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any, a1_scale: Any,
                a2_scale: Any, activation: str, backend: Any) -> W4A8Experts:
    """What the first call with w13 and w2 repacked, until the memory of either is gone."""
    objects = (w13, w13_scale, w2, w2_scale, a1_scale, a2_scale, activation, backend)
    recent = _recent.get(id(w13))
    if recent is not None and (experts := recent.experts(objects)) is not None:
        return experts
    arguments = {"w13_scale": w13_scale, "w2_scale": w2_scale, "a1_scale": a1_scale,
                 "a2_scale": a2_scale, "activation": activation}
    if not hasattr(w13, "shape") or not hasattr(w2, "shape"):  # The constructor names it.
        return W4A8Experts(w13, w13_scale, w2, w2_scale, backend=backend)
    key = _key_of(w13, w2)
    with _lock:
        first = cache.get(key)
        if first is not None and first.has_memory():
            first.check(arguments, backend)
            _remember(first, objects)
            return first.experts
        for place in list(cache):  # Weights that are freed may end while this goes on.
            made = cache.get(place)
            if made is not None and not made.has_memory():
                _drop(place)
        experts = W4A8Experts(w13, w13_scale, w2, w2_scale, a1_scale=a1_scale, a2_scale=a2_scale,
                              activation=activation, backend=backend)
        first = cache[key] = _FirstCall(experts, (w13, w2), arguments)
        for array in (w13, w2):
            end = weakref.finalize(_owner_of(array), _drop, key, weakref.ref(first))
            end.atexit = False
            first.finalizers.append(end)
    return experts


def _drop(key: tuple, only: Any = None) -> None:
    """What was made of the weights at a place; with `only`, if that is what lies there."""
    if only is None or cache.get(key) is only():
        dropped = cache.pop(key, None)
        for end in dropped.finalizers if dropped is not None else ():
            end.detach()


def _remember(first: _FirstCall, objects: tuple) -> None:
    """Tensors of torch alone: the others' addresses take as long to find as all else."""
    w13 = objects[0]
    if hasattr(w13, "data_ptr"):
        if id(w13) not in _recent:
            weakref.finalize(w13, _recent.pop, id(w13), None).atexit = False
        _recent[id(w13)] = _SameObjects(first, objects)


def forget(w13: Any, w2: Any) -> None:
    """Drops what was repacked of these: call it after changing weights or scales in place."""
    with _lock:
        _drop(_key_of(w13, w2))
