"""Sluice's calls as operators of torch, so that torch.compile traces through them.

    import sluice.torch_ops
    layer = sluice.torch_ops.MoeLayer(engine, mode="low-latency")     # an nn.Module
    y = torch.compile(layer)(x, topk_idx, topk_weights)

Importing this registers torch.ops.sluice.moe_forward, experts_masked, quantize and requantize, each
with a fake implementation that knows the shapes. Operators take numbers for the objects that torch
does not know; a module holds its object for as long as it lives. moe_forward is collective: it is
marked as having side effects, so that no compiler drops it. There is no backward: whoever asks for a
gradient through one of them gets an Error.

An eager call that nothing of torch watches does without torch's dispatcher, whose trips through Python
take longer than the rest of it.
"""

import copy
import itertools
import re
import weakref
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad

from . import _core
from ._error import Error

__all__ = ["ExpertsLayer", "MoeLayer"]

_objects: dict[int, Any] = {}
_numbers = itertools.count(1)
_tensors_of: dict[str, int] = {}  # The first arguments of each operator, and its function.
_run_of: dict[str, Any] = {}

try:
    from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._functorch import maybe_current_level
    from torch.autograd import _profiler_enabled
except ImportError:  # Another torch: its dispatcher is asked always.

    def _len_torch_dispatch_stack() -> int:
        return 1


def _is_for_dispatcher(tensor: Any) -> bool:
    """What C++ refuses, and torch's dispatcher resolves or has another function for."""
    return tensor is not None and (
        tensor.layout is not torch.strided or tensor.device.type not in ("cpu", "cuda") or tensor.is_neg())


def run_alone(run: Any, tensors: tuple, args: tuple) -> Any:
    """run(*args), of which these are the tensors, if torch's dispatcher would do that alone; else NotImplemented."""
    has_gradients = is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is Tensor:
            if has_gradients and tensor.requires_grad:
                return NotImplemented
        elif tensor is not None:
            return NotImplemented
    # A mode, a profiler, a transform as vmap or a tracer sees what goes through the dispatcher.
    if (_len_torch_dispatch_stack() or _len_torch_function_stack() or _profiler_enabled()
            or maybe_current_level() is not None or _get_tracing_state() is not None
            or forward_ad._current_level >= 0):
        return NotImplemented
    try:
        return run(*args)
    except Error as error:
        if error.code != "invalid_argument" or not any(map(_is_for_dispatcher, tensors)):
            raise
    return NotImplemented


def _has_tangent(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None


def _beside(autograd: Any, name: str) -> Any:
    """Autograd's kernel of an operator dispatches again, from Python to Python: where nothing lies between, the
    operator's function is called. Tangents of forward mode, which that kernel leaves out, are refused."""
    run, num = _run_of[name], _tensors_of[name]

    def kernel(keyset: Any, *args: Any) -> Any:
        y = run_alone(run, args[:num], args)
        if y is not NotImplemented:
            return y
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args[:num])):
            raise Error("unsupported", f"torch.ops.sluice.{name} has no forward-mode derivative: call it without "
                                       "tangents, or take a layer of torch's where they are needed")
        return autograd(keyset, *args)

    return kernel


class _Library(torch.library.Library):
    def impl(self, op_name: Any, fn: Any, dispatch_key: Any = "", **options: Any) -> None:
        if dispatch_key == "Autograd":
            fn = _beside(fn, op_name)
        super().impl(op_name, fn, dispatch_key, **options)


_library = _Library("sluice", "DEF")


def register(owner: Any, *objects: Any) -> int:
    """A number for the objects, valid while the owner lives."""
    number = next(_numbers)
    _objects[number] = objects
    weakref.finalize(owner, _objects.pop, number, None)
    return number


def registered(number: int) -> tuple:
    """The objects of a number. Raises Error: invalid_argument."""
    if number not in _objects:
        raise Error("invalid_argument", f"number {number}: the module that held it is gone, or was of another process")
    return _objects[number]


class Registered(torch.nn.Module):
    """A module of objects that torch does not know. Copies share them; no file holds them."""

    number = 0  # Of the objects, for torch.ops; 0: there are none.
    _shared: tuple[str, ...] = ()  # Attributes that are such objects.

    def _hold(self, *objects: Any) -> None:
        self.number = register(self, *objects)

    def __deepcopy__(self, memo: dict) -> Any:
        made = memo[id(self)] = type(self).__new__(type(self))
        for name, value in self.__dict__.items():
            made.__dict__[name] = value if name in self._shared else copy.deepcopy(value, memo)
        if self.number:
            made._hold(*registered(self.number))
        return made

    def __copy__(self) -> Any:
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise Error("unsupported", f"{type(self).__name__}: its experts live in this process alone and are not pickled; "
                                   "save what it was made of")


def _refusal_of(name: str) -> Any:
    """A backward. Without any, autograd takes the output for a constant and goes on."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise Error("unsupported", f"torch.ops.sluice.{name} has no backward pass: call it under torch.no_grad(), "
                                   "or take a layer of torch's where gradients are needed")

    return refuse


def define(schema: str, run: Any, fake: Any, has_side_effect: bool = False, backward: Any = None) -> None:
    """Registers torch.ops.sluice.NAME; without `backward`, a gradient through it is refused."""
    name = schema.split("(", 1)[0]
    _run_of[name], _tensors_of[name] = run, len(re.findall(r"Tensor\??[ ]\w", schema))
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sluice::{name}", fake, lib=_library)
    torch.library.register_autograd(f"sluice::{name}", backward or _refusal_of(name), lib=_library)
    if has_side_effect:
        torch.fx.node.has_side_effect(getattr(torch.ops.sluice, name).default)


def _moe_forward(x: Any, topk_idx: Any, topk_weights: Any, layer: int, mode: str) -> Any:
    (engine,) = registered(layer)
    return _core.moe_forward(engine, x, _core.Routing(topk_idx, topk_weights), mode=mode)


def _experts_masked(x: Any, x_scale: Any, num_rows: Any, layer: int, expected_m: int) -> Any:
    experts, recipe = registered(layer)
    batch = _core.ExpertBatch(x, num_rows, x_scale=x_scale, expected_m=expected_m)
    return _core.experts_masked(experts, batch, recipe)


def _backend_of(x: Any, layer: int) -> Any:
    (backend,) = registered(layer)
    return backend


def _quantize(x: Any, backend: int, pow2: bool) -> tuple[Any, Any]:
    return _core.quantize(_backend_of(x, backend), x, pow2=pow2)


def _requantize(codes: Any, scale: Any, static_scale: float, backend: int) -> Any:
    return _core.requantize(_backend_of(codes, backend), codes, scale, static_scale)


def _groups(x: Any) -> list:
    return [*x.shape[:-1], x.shape[-1] // 128]


define(
    "moe_forward(Tensor x, Tensor topk_idx, Tensor topk_weights, int layer, str mode) -> Tensor",
    _moe_forward,
    lambda x, topk_idx, topk_weights, layer, mode: torch.empty_like(x),
    has_side_effect=True,
)
define(
    "experts_masked(Tensor x, Tensor? x_scale, Tensor num_rows, int layer, int expected_m) -> Tensor",
    _experts_masked,
    lambda x, x_scale, num_rows, layer, expected_m: x.new_empty(x.shape, dtype=torch.bfloat16),
)
define(
    "quantize(Tensor x, int backend, bool pow2) -> (Tensor, Tensor)",
    _quantize,
    lambda x, backend, pow2: (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty(_groups(x), dtype=torch.float32),
    ),
)
define(
    "requantize(Tensor codes, Tensor scale, float static_scale, int backend) -> Tensor",
    _requantize,
    lambda codes, scale, static_scale, backend: torch.empty_like(codes),
)


class MoeLayer(Registered):
    """moe_forward() of an Engine as a module: (x, topk_idx, topk_weights) -> y. Collective."""

    def __init__(self, engine: Any, mode: str = "low-latency") -> None:
        super().__init__()
        engine.recipe(mode)  # Refuses a mode that the engine does not have.
        self.mode = mode
        self._hold(engine)

    def forward(self, x: Any, topk_idx: Any, topk_weights: Any) -> Any:
        args = x, topk_idx, topk_weights, self.number, self.mode
        if not torch.compiler.is_compiling():
            y = run_alone(_moe_forward, args[:3], args)
            if y is not NotImplemented:
                return y
        return torch.ops.sluice.moe_forward(*args)


class ExpertsLayer(Registered):
    """experts_masked() as a module: (x, x_scale or None, num_rows) -> rows."""

    def __init__(self, experts: Any, recipe: Any) -> None:
        super().__init__()
        self._hold(experts, recipe)

    def forward(self, x: Any, x_scale: Any, num_rows: Any, expected_m: int = 0) -> Any:
        args = x, x_scale, num_rows, self.number, expected_m
        if not torch.compiler.is_compiling():
            rows = run_alone(_experts_masked, args[:3], args)
            if rows is not NotImplemented:
                return rows
        return torch.ops.sluice.experts_masked(*args)


def backend_number(backend: Any, owner: Any) -> int:
    """What torch.ops.sluice.quantize and requantize take for a Backend, while `owner` lives."""
    return register(owner, backend)
