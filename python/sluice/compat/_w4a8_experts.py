"""The experts of one layer: weights repacked once, calls in the memory that the layers of a device share."""

from typing import Any

from .. import _core
from .._error import Error
from ._arrays import as_float32, check, row_major, space_of
from ._w4a8_memory import WEIGHT_LAYOUTS, apart_from
from ._w4a8_padding import own_widths, padded
from ._w4a8_rooms import backend_for, lock_of, room_for


def _static_scale(name: str, scale: Any) -> float | None:
    """The largest of one or several; waits for the device."""
    if scale is None or isinstance(scale, int | float):
        return scale
    if not hasattr(scale, "reshape"):
        raise Error("invalid_argument", f"{name}: expected a number or an array of them, got {type(scale).__name__}")
    flat = scale.reshape(-1)
    if len(flat) == 0:
        raise Error("invalid_argument", f"{name}: expected at least one number, got none")
    return float(flat.max())


def _scales_of_row(x_scale: Any) -> int:
    """Of x: 0 without x_scale; what tells calls with different recipes apart."""
    if x_scale is None:
        return 0
    shape = getattr(x_scale, "shape", ())
    return int(shape[-1]) if len(shape) > 0 else -1


def _is_on_device_of(space: Any, backend: Any) -> bool:
    """Whether arrays of `space` lie where the backend computes."""
    device = str(space.device) if space.on_device else "cpu"
    return (f"{device}:0" if device == "cuda" else device) == backend.device


def _bytes_of_e8m0(scale: Any) -> Any:
    """As uint8, which everybody exchanges, where a framework has a type for e8m0."""
    if not str(getattr(scale, "dtype", "")).endswith("float8_e8m0fnu"):
        return scale
    import torch

    return scale.view(torch.uint8 if isinstance(scale, torch.Tensor) else "uint8")


def _is_uint8(array: Any) -> bool:
    return str(getattr(array, "dtype", "")) in ("uint8", "torch.uint8")


class W4A8Experts:
    """Experts of one layer on one device, repacked once. Shapes as the module says.

    backend: the Backend that computes them; None: one for all experts on the device of w13.
    max_rows: rows of the largest call, to take the memory between the stages at once: num_experts *
    max_m for masked(), rows * num_topk for grouped(). Without it that memory grows with the calls, to
    twice what it was at least. All experts of one backend and size share it, and growing it touches no
    weight.
    weight_layout: "int4" as the module says; "uint4b8", int32 [E, N, K / 8] of weights + 8, k rising from
    the lowest four bits (compressed-tensors); "uint4b8-transposed", int32 [E, K / 8, N] of the same words;
    "mxfp4", uint8 [E, N, K / 2] of e2m1 with scales uint8 [E, N, K / 32] of e8m0, which is also what int8 or uint8
    codes beside scales of uint8 or float8_e8m0fnu are taken for.
    scale_layout: "plain" [E, N, K / G]; "interleaved" [E, K / G / a, N * a], as SGLang holds them after its own
    processing (a is 4, or 1 where K / G is no multiple of 4) and, with a = 1, vLLM; "by-shape": whichever of
    the two has the shape, plain if both have.
    H and I are multiples of 128. Of layouts "int4" in groups of 32 and "mxfp4", both plain, they may be multiples of 32:
    copies of the weights are then padded with zeros to the next ones. grouped() takes bfloat16 rows of H and gives such;
    masked(), and grouped() with rows of e4m3, have the padded width, which is `hidden`.
    memory: [bytes] uint8 on the backend's device for the repacked weights, kept alive by this object; None:
    it takes its own. It may be that of w13 and w2 themselves, as weight_memory() lays them out: they are
    then used up.

    Weights on the backend's device are read there, expert by expert: no copy of them is made and nothing
    crosses to the host. None of the four arrays is kept. The constructor waits for torch's current stream.
    Calls may come from several threads and on several streams: they take turns.

    Raises Error: invalid_argument naming the array, or the expert and the scale that is not finite;
    unsupported naming the activation; out_of_memory. After a scale that is not finite, weights in `memory`
    are lost.
    """

    def __init__(self, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any, *, a1_scale: Any = None,
                 a2_scale: Any = None, activation: str = "swiglu", backend: Any = None,
                 max_rows: int = 1, weight_layout: str = "int4", scale_layout: str = "by-shape",
                 memory: Any = None) -> None:
        space = space_of(w13, "w13")
        w13_scale, w2_scale = _bytes_of_e8m0(w13_scale), _bytes_of_e8m0(w2_scale)
        if weight_layout == "int4" and _is_uint8(w13_scale):
            weight_layout = "mxfp4"
        if weight_layout == "int4" and str(w13.dtype).endswith("int32"):
            raise Error("invalid_argument", "w13: int32 words of eight weights need weight_layout: "
                        f"{' or '.join(WEIGHT_LAYOUTS[1:3])}")
        s1, s2 = _static_scale("a1_scale", a1_scale), _static_scale("a2_scale", a2_scale)
        if (s1 is None) != (s2 is None):
            raise Error("invalid_argument", "a1_scale and a2_scale: give both or neither")
        self.activation = activation
        self._scales = {} if s1 is None else {"s1": s1, "s2": s2}
        self.backend = backend_for(w13) if backend is None else backend
        self._max_rows = max_rows
        self._masked: dict[tuple, Any] = {}  # By what decides the recipe.
        self._grouped: dict[tuple, Any] = {}
        self._known_masked: list[Any] = []  # Those of them whose recipe was not named.
        self._known_grouped: list[Any] = []
        for name, array in (("w13_scale", w13_scale), ("w2", w2), ("w2_scale", w2_scale)):
            if space_of(array, name).place != space.place:
                raise Error("invalid_argument", f"{name}: expected {space.place}, got {space_of(array, name).place}")
        w13_scale, w2_scale = apart_from(memory, w13_scale, w2_scale)
        arrays = [space.for_import(array) for array in (w13, w13_scale, w2, w2_scale)]
        del w13_scale, w2_scale
        self._lock = lock_of(self.backend)
        self._widths = own_widths(arrays, weight_layout, scale_layout, memory)
        if self._widths is not None:
            arrays = padded(space, arrays, weight_layout)
        experts = self._repack(space, arrays, memory, weight_layout, scale_layout)
        geometry = experts.geometry
        self.num_experts, self.hidden, self.intermediate = len(experts), geometry.hidden, geometry.intermediate
        self.token_width = geometry.token_width
        """Of bfloat16 rows: hidden, or the model's own width where that is no multiple of 128."""
        self.weight_bytes = experts.weight_bytes
        """Bytes of the repacked weights."""
        self._experts = experts
        self._room = room_for(self.backend, self.hidden, self.intermediate)

    def _repack(self, space: Any, arrays: list, memory: Any, weight_layout: str, scale_layout: str) -> Any:
        if not _is_on_device_of(space, self.backend):
            arrays = [space.on_host(a) for a in arrays]
            if self.backend.device != "cpu":
                return self._from_host(space, arrays, memory, weight_layout)
        with self._lock:
            return _core.repack_stacked(
                *arrays, self.backend, activation=self.activation, weight_layout=weight_layout,
                scale_layout=scale_layout, memory=memory, max_rows=1, widths=self._widths)

    def _from_host(self, space: Any, arrays: list, memory: Any, weight_layout: str) -> Any:
        """Through the device's staging memory, which takes rows as they are published."""
        w13, w13_scale, w2, w2_scale = arrays
        if self._widths is not None:
            raise Error("invalid_argument", f"w13: hidden {self._widths[0]}, intermediate {self._widths[1]} are padded "
                        f"where the weights lie: expected memory on {self.backend.device}, got memory of the host")
        if weight_layout not in ("int4", "mxfp4") or memory is not None or len(w13.shape) != 3:
            raise Error("invalid_argument", f"w13: expected memory on {self.backend.device}, where alone "
                        "weight_layout and memory can be given, got memory of the host")
        middle, hidden, columns = int(w13.shape[1]) // 2, 2 * int(w13.shape[2]), int(w13_scale.shape[-1])

        def pair(codes: Any, scale: Any, first: int, last: int) -> tuple[Any, Any]:
            return space.row_major(codes[:, first:last]), space.row_major(scale[:, first:last])

        weights = _core.ExpertWeights.from_arrays(
            pair(w13, w13_scale, 0, middle), pair(w13, w13_scale, middle, 2 * middle),
            pair(w2, w2_scale, 0, hidden), group_size=hidden // columns if columns else 0,
            activation=self.activation, weight_format=weight_layout)
        with self._lock:
            return _core.repack(weights, self.backend, max_rows=1)

    def _recipe(self, name: str | None, mode: str, is_e4m3: bool, num_scales: int) -> Any:
        """By its name or, without one, by what arrived and whether there are static scales."""
        if name is not None:
            return _core.Recipe(name, mode, **self._scales)
        cast = "static" if self._scales or (is_e4m3 and num_scales == 0) else "group"
        if not is_e4m3:
            wire, gemm1 = "bf16", cast
        elif num_scales == 1 and self.hidden > 128:  # With 128 channels the two are the same.
            if self._scales:
                raise Error("unsupported", "x_scale: one scale for each row, but the layer has static scales, to "
                            f"which only rows with {self.hidden // 128} scales can be brought")
            wire, gemm1 = "e4m3 + f32 scale per token", "none"
        elif num_scales > 0:
            wire, gemm1 = "e4m3 + f32 scale per 128", "none" if cast == "group" else cast
        else:
            wire, gemm1 = "e4m3, static s1", "none"
        return _core.Recipe.from_fields(wire=wire, gemm1=gemm1, gemm2=cast, mode=mode, **self._scales)

    def masked(self, x: Any, x_scale: Any, num_rows: Any, *, recipe: str | None = None,
               expected_m: int = 0, out: Any = None) -> Any:
        """See w4a8_moe_masked()."""
        # A call like one before: what C++ checks is enough. What it refuses is looked at below, where
        # arguments are named as they are here, and larger calls are dealt with.
        if recipe is None and (y := _core.repeat_batch(self._known_masked, x, num_rows, x_scale, expected_m, out)
                               ) is not None:
            return y
        layer = self._masked.get((recipe, getattr(x, "dtype", None), _scales_of_row(x_scale)))
        if layer is not None and type(x) is type(num_rows):
            if type(x_scale) is type(x):
                x_scale = row_major(x_scale)
            try:
                with self._lock:
                    return layer.forward_batch(x, num_rows, x_scale, expected_m, out)
            except Error as error:
                if error.code != "invalid_argument":
                    raise
        space = space_of(x)
        check(space, "x", x, ("bf16", "e4m3"), [self.num_experts, "max_m", self.hidden])
        check(space, "masked_m", num_rows, ("i32",), [self.num_experts])
        x_scale = self._checked_scale(space, x, x_scale)
        with self._lock:
            layer = self._layer(self._masked, "low-latency", recipe, space, x, x_scale)
            self._make_room(space, layer.reserve_batch, layer.max_batch_rows, int(x.shape[0] * x.shape[1]))
            return layer.forward_batch(x, num_rows, x_scale, expected_m, out)

    def grouped(self, x: Any, x_scale: Any, topk_idx: Any, topk_weights: Any, *,
                recipe: str | None = None, out: Any = None) -> Any:
        """See w4a8_moe_grouped()."""
        if recipe is None and (y := _core.repeat_topk(self._known_grouped, x, topk_idx, topk_weights, x_scale, out)
                               ) is not None:
            return y
        layer = self._grouped.get((recipe, getattr(x, "dtype", None), _scales_of_row(x_scale)))
        if layer is not None and type(x) is type(topk_idx) is type(topk_weights):
            try:
                with self._lock:
                    return layer.forward_topk(x, topk_idx, as_float32(topk_weights), x_scale, out)
            except Error as error:
                if error.code != "invalid_argument":
                    raise
        space = space_of(x)
        has_own_width = space.has_type(x, "bf16") and len(x.shape) == 2 and x.shape[1] == self.token_width
        check(space, "x", x, ("bf16", "e4m3"), ["rows", self.token_width if has_own_width else self.hidden])
        check(space, "topk_idx", topk_idx, ("i64", "i32"), [x.shape[0], "num_topk"])
        check(space, "topk_weights", topk_weights, ("f32", "bf16"), [int(n) for n in topk_idx.shape])
        x_scale = self._checked_scale(space, x, x_scale)
        topk_idx, weights = space.row_major(topk_idx), space.row_major(as_float32(topk_weights))
        with self._lock:
            layer = self._layer(self._grouped, "normal", recipe, space, x, x_scale)
            num_entries = int(topk_idx.shape[0]) * int(topk_idx.shape[1])
            self._make_room(space, self._room.group.reserve, self._room.group.max_entries, num_entries)
            return layer.forward_topk(space.row_major(x), topk_idx, weights, x_scale, out)

    def _checked_scale(self, space: Any, x: Any, x_scale: Any) -> Any:
        if x_scale is None:
            return None
        rows, groups = [int(n) for n in x.shape[:-1]], self.hidden // 128
        is_per_token = [int(n) for n in x_scale.shape] == [*rows, 1]
        check(space, "x_scale", x_scale, ("f32",), [*rows, 1 if is_per_token else groups])
        return space.row_major(x_scale)

    def _layer(self, layers: dict[tuple, Any], mode: str, name: str | None, space: Any, x: Any,
               x_scale: Any) -> Any:
        """The local call with one recipe; all of them share the repacked weights."""
        key = name, x.dtype, _scales_of_row(x_scale)
        layer = layers.get(key)
        if layer is None:
            recipe = self._recipe(name, mode, space.is_e4m3(x), _scales_of_row(x_scale))
            layer = layers[key] = self._room.group.add_layer(self._experts, recipe=recipe)
            if name is None:
                (self._known_masked if mode == "low-latency" else self._known_grouped).append(layer)
        return layer

    def _make_room(self, space: Any, reserve: Any, there_are: int, num_rows: int) -> None:
        """Memory between the stages for num_rows rows; for max_rows at once, if there is none yet."""
        if num_rows <= there_are:
            return
        if space.is_capturing():
            raise Error("invalid_argument", f"x has {num_rows} rows, room is for {there_are}: a graph cannot "
                        "capture an allocation, so make a call of this size before the capture")
        reserve(max(num_rows, self._max_rows, 2 * there_are))
