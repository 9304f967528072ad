"""W4A8 experts as a layer calls them between a dispatch and a combine of its own.

    y = w4a8_moe_masked(recv_x, recv_scale, recv_count, w13, w13_scale, w2, w2_scale)
    y = w4a8_moe_grouped(recv_x, None, recv_topk_idx, recv_topk_weights, w13, w13_scale, w2, w2_scale)

Weights are as checkpoints publish them (W4AFP8): int4 in two's complement, two to a byte with even k
low, gate rows before up rows, scales for groups of 128 (or 32) along k; they may lie on the GPU or on
the host. They are repacked once, at the first call with them. A later call with the same w13 and w2
gives the same scales, static scales and activation, and the same backend or none: what differs is
refused by name.
An object of W4A8Experts is its own cache; make one for each set of scales or for each backend.

E experts, hidden H, intermediate I, group G:
    w13 [E, 2 I, H / 2] int8     w13_scale [E, 2 I, H / G] float32 or bfloat16
    w2  [E, H, I / 2]   int8     w2_scale  [E, H, I / G]
    a1_scale, a2_scale: static scales of the inputs of the two GEMMs, or None: one number, or one for
    each expert, of which the largest counts.
    activation: "swiglu", "swiglu:limit=10" (DeepSeek-V4), "swiglu-oai:alpha=1.702,limit=7" (gpt-oss),
    "situ:beta=4,linear_beta=25" (Kimi-K3): what the model has; nothing here can tell it from w13.

The input and the scales that are there decide the recipe, unless it is named: bf16 rows direct-bf16
or bf16-static, e4m3 rows with scales direct or requant-static, e4m3 rows without scales static.
"""

import threading
import weakref
from typing import Any

from .. import _core
from .._error import Error
from ._arrays import check, space_of

__all__ = ["W4A8Experts", "forget", "w4a8_moe_grouped", "w4a8_moe_masked"]


def _check_shape(name: str, array: Any, shape: list) -> None:
    if list(array.shape) != shape:
        raise Error("invalid_argument", f"{name}: expected shape {shape}, got {list(array.shape)}")


def _static_scale(name: str, scale: Any) -> float | None:
    """The largest of one or several; waits for the device."""
    if scale is None or isinstance(scale, int | float):
        return scale
    flat = scale.reshape(-1)
    if len(flat) == 0:
        raise Error("invalid_argument", f"{name}: expected at least one number, got none")
    return float(flat.max())


class W4A8Experts:
    """Experts of one layer on one device, repacked once. Arguments as the module says.

    backend: the Backend that they were repacked for.
    max_rows: rows of the largest call, to take the memory between the stages at once: num_experts *
    max_m for masked(), rows * num_topk for grouped(). Without it that memory grows with the calls, to
    twice what it was at least. For grouped() all experts of one backend and size share it.
    """

    def __init__(self, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any, *, a1_scale: Any = None,
                 a2_scale: Any = None, activation: str = "swiglu", backend: Any,
                 max_rows: int = 1) -> None:
        space_of(w13, "w13")
        if len(w13.shape) != 3 or w13.shape[1] % 2 != 0:
            raise Error("invalid_argument", "w13: expected shape [num_experts, 2 * intermediate, "
                        f"hidden / 2], got {list(w13.shape)}")
        num, double, half_hidden = (int(d) for d in w13.shape)
        self.num_experts, self.hidden, self.intermediate = num, 2 * half_hidden, double // 2
        _check_shape("w2", w2, [num, self.hidden, self.intermediate // 2])
        s1, s2 = _static_scale("a1_scale", a1_scale), _static_scale("a2_scale", a2_scale)
        if (s1 is None) != (s2 is None):
            raise Error("invalid_argument", "a1_scale and a2_scale: give both or neither")
        self.activation = activation
        self._scales = {} if s1 is None else {"s1": s1, "s2": s2}
        self.backend, self._max_rows = backend, max_rows
        self._experts = _core.repack(self._import(w13, w13_scale, w2, w2_scale), backend, max_rows=1)
        self._group: Any = None
        self._layers: dict[tuple, Any] = {}  # By what decides the recipe.

    def _import(self, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any) -> Any:
        space = space_of(w13)
        columns = int(w13_scale.shape[-1])
        group = self.hidden // columns if columns else 0
        _check_shape("w13_scale", w13_scale, [self.num_experts, 2 * self.intermediate, columns])

        def rows(array: Any, first: int, last: int) -> Any:
            return space.row_major(space.on_host(array)[:, first:last])

        def pair(codes: Any, scale: Any, first: int, last: int) -> tuple[Any, Any]:
            return rows(codes, first, last), rows(scale, first, last)

        middle = self.intermediate
        return _core.ExpertWeights.from_arrays(
            pair(w13, w13_scale, 0, middle), pair(w13, w13_scale, middle, 2 * middle),
            pair(w2, w2_scale, 0, self.hidden), group_size=group, activation=self.activation,
            **self._scales,
        )

    def _recipe(self, name: str | None, mode: str, is_e4m3: bool, has_scale: bool) -> Any:
        """By its name or, without one, by what arrived and whether there are static scales."""
        if name is not None:
            return _core.Recipe(name, mode, **self._scales)
        cast = "static" if self._scales or (is_e4m3 and not has_scale) else "group"
        if not is_e4m3:
            wire, gemm1 = "bf16", cast
        elif has_scale:
            wire, gemm1 = "e4m3 + f32 scale per 128", "none" if cast == "group" else cast
        else:
            wire, gemm1 = "e4m3, static s1", "none"
        return _core.Recipe.from_fields(wire=wire, gemm1=gemm1, gemm2=cast, mode=mode, **self._scales)

    def masked(self, x: Any, x_scale: Any, num_rows: Any, *, recipe: str | None = None,
               expected_m: int = 0, out: Any = None) -> Any:
        """See w4a8_moe_masked()."""
        space = space_of(x)
        check(space, "x", x, ("bf16", "e4m3"), [self.num_experts, "max_m", self.hidden])
        check(space, "masked_m", num_rows, ("i32",), [self.num_experts])
        if x_scale is not None:
            check(space, "x_scale", x_scale, ("f32",), [*x.shape[:2], self.hidden // 128])
        _make_room(space, self._experts.reserve, self._experts.max_rows,
                   int(x.shape[0] * x.shape[1]), self._max_rows)
        scale = None if x_scale is None else space.row_major(x_scale)
        resolved = self._recipe(recipe, "low-latency", space.is_e4m3(x), scale is not None)
        batch = _core.ExpertBatch(x, num_rows, x_scale=scale, expected_m=expected_m)
        return _core.experts_masked(self._experts, batch, resolved, out=out)

    def grouped(self, x: Any, x_scale: Any, topk_idx: Any, topk_weights: Any, *,
                recipe: str | None = None, out: Any = None) -> Any:
        """See w4a8_moe_grouped()."""
        # A call like one before: what C++ checks is enough. What it refuses is looked at below, where
        # arguments are named as they are here, and strides and larger calls are dealt with.
        key = recipe, getattr(x, "dtype", None), x_scale is None
        layer = self._layers.get(key)
        if layer is not None and type(x) is type(topk_idx) is type(topk_weights):
            try:
                return layer.forward(x, _core.Routing(topk_idx, topk_weights), x_scale=x_scale, out=out)
            except Error as error:
                if error.code != "invalid_argument":
                    raise
        space = space_of(x)
        check(space, "x", x, ("bf16", "e4m3"), ["rows", self.hidden])
        check(space, "topk_idx", topk_idx, ("i64", "i32"), [x.shape[0], "num_topk"])
        check(space, "topk_weights", topk_weights, ("f32",), [int(n) for n in topk_idx.shape])
        if x_scale is not None:
            check(space, "x_scale", x_scale, ("f32",), [int(x.shape[0]), self.hidden // 128])
            x_scale = space.row_major(x_scale)
        layer = self._layer(key, space.is_e4m3(x))
        num_entries = int(topk_idx.shape[0]) * int(topk_idx.shape[1])
        _make_room(space, self._group.reserve, self._group.max_entries, num_entries, self._max_rows)
        routing = _core.Routing(space.row_major(topk_idx), space.row_major(topk_weights))
        return layer.forward(space.row_major(x), routing, x_scale=x_scale, out=out)

    def _layer(self, key: tuple, is_e4m3: bool) -> Any:
        """The local call with one recipe; all of them share the repacked weights."""
        layer = self._layers.get(key)
        if layer is None:
            if self._group is None:
                self._group = _group_for(self.backend, self.hidden, self.intermediate)
            name, _, has_no_scale = key
            recipe = self._recipe(name, "normal", is_e4m3, not has_no_scale)
            layer = self._layers[key] = self._group.add_layer(self._experts, recipe=recipe)
        return layer


def _make_room(space: Any, reserve: Any, there_are: int, num_rows: int, wanted: int) -> None:
    """Memory between the stages for num_rows rows; for `wanted` at once, if there is none yet."""
    if num_rows <= there_are:
        return
    if space.is_capturing():
        raise Error("invalid_argument", f"x has {num_rows} rows, room is for {there_are}: a graph cannot "
                    "capture an allocation, so make a call of this size before the capture")
    reserve(max(num_rows, wanted, 2 * there_are))


_groups: "weakref.WeakValueDictionary[tuple[int, int, int], Any]" = weakref.WeakValueDictionary()
_groups_lock = threading.Lock()


def _group_for(backend: Any, hidden: int, intermediate: int) -> Any:
    """One for all experts of a backend and size, which run one after the other."""
    key = id(backend), hidden, intermediate  # The group keeps the backend, and so its id, alive.
    with _groups_lock:
        group = _groups.get(key)
        if group is None:
            group = _groups[key] = _core.LocalGroup(
                backend, hidden=hidden, intermediate=intermediate, max_entries=1)
        return group


class _Array:
    """What tells an array from another: itself, or the memory that it is a view of."""

    def __init__(self, array: Any) -> None:
        self._there = weakref.ref(array)
        self._memory = _memory_of(array)

    def is_same(self, array: Any) -> bool:
        there = self._there()
        return there is array or (there is not None and _memory_of(array) == self._memory)


def _memory_of(array: Any) -> tuple:
    pointer = array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data
    return pointer, tuple(array.shape), str(array.dtype)


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


_cache: dict[tuple[int, int], _FirstCall] = {}
_cache_lock = threading.Lock()
_of_thread = threading.local()


def _backend_for(x: Any) -> Any:
    """One for each device and thread: a backend serves one thread at a time."""
    device = getattr(x, "device", "cpu")
    index = getattr(device, "index", None)
    name = f"cuda:{index or 0}" if getattr(device, "type", "cpu") == "cuda" else "cpu"
    backends = _of_thread.__dict__.setdefault("backends", {})
    if name not in backends:
        backends[name] = _core.Backend(name)
    return backends[name]


def _experts_for(x: Any, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any, a1_scale: Any,
                 a2_scale: Any, activation: str, backend: Any) -> W4A8Experts:
    """What the first call with w13 and w2 repacked, until either is gone."""
    key = (id(w13), id(w2))
    arguments = {"w13_scale": w13_scale, "w2_scale": w2_scale, "a1_scale": a1_scale,
                 "a2_scale": a2_scale, "activation": activation}
    with _cache_lock:
        first = _cache.get(key)
    if first is not None:
        first.check(arguments, backend)
        return first.experts
    experts = W4A8Experts(w13, w13_scale, w2, w2_scale, a1_scale=a1_scale, a2_scale=a2_scale,
                          activation=activation,
                          backend=_backend_for(x) if backend is None else backend)
    with _cache_lock:
        _cache[key] = _FirstCall(experts, arguments)
    for array in (w13, w2):
        weakref.finalize(array, _cache.pop, key, None).atexit = False
    return experts


def forget(w13: Any, w2: Any) -> None:
    """Drops what was repacked of these: call it after changing weights or scales in place."""
    with _cache_lock:
        _cache.pop((id(w13), id(w2)), None)


def w4a8_moe_masked(
    x: Any, x_scale: Any, masked_m: Any, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any, *,
    a1_scale: Any = None, a2_scale: Any = None, recipe: str | None = None, expected_m: int = 0,
    out: Any = None, activation: str = "swiglu", backend: Any = None,
) -> Any:
    """Every expert on its rows after a low-latency dispatch: bf16 of x's shape.

    x: [E, max_m, H] e4m3 or bf16. x_scale: [E, max_m, H / 128] float32 in any strides, or None.
    masked_m: [E] int32; rows past it are neither read nor written. The router's weights are left to
    combine. out: the result's memory. Capturable once a batch of the size has run.

    Raises Error: invalid_argument naming the argument, unsupported naming the recipe.
    """
    experts = _experts_for(x, w13, w13_scale, w2, w2_scale, a1_scale, a2_scale, activation,
                           backend)
    return experts.masked(x, x_scale, masked_m, recipe=recipe, expected_m=expected_m, out=out)


def w4a8_moe_grouped(
    x: Any, x_scale: Any, topk_idx: Any, topk_weights: Any, w13: Any, w13_scale: Any, w2: Any,
    w2_scale: Any, *, a1_scale: Any = None, a2_scale: Any = None, recipe: str | None = None,
    out: Any = None, activation: str = "swiglu", backend: Any = None,
) -> Any:
    """Every expert on its rows after a normal dispatch, summed for each row: bf16 [rows, H].

    x: [rows, H] bf16 or e4m3. x_scale: [rows, H / 128] float32, or None. topk_idx: [rows, num_topk],
    numbers of this rank's experts; any other number, -1 or E say, is an expert elsewhere and skipped.
    topk_weights: float32, applied here, in order of entries. out: the result's memory. No rows give
    bf16 [0, H]. Asynchronous on a GPU; capturable once a call of the size has run.

    Raises Error: invalid_argument naming the argument, unsupported naming the recipe.
    """
    experts = _experts_for(x, w13, w13_scale, w2, w2_scale, a1_scale, a2_scale, activation,
                           backend)
    return experts.grouped(x, x_scale, topk_idx, topk_weights, recipe=recipe, out=out)
