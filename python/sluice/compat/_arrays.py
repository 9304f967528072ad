"""The little that these modules do to arrays themselves, for numpy and for torch alike.

``space_of(array)`` picks one of two classes with the same functions. Element types go by the names
bf16, e4m3, f32, i32, i64, u8 and bool; numpy holds bf16 and e4m3 as their bits.
"""

import sys
from typing import Any

import numpy

from .._error import Error

_NUMPY_TYPES = {
    "bf16": "uint16", "e4m3": "uint8", "f32": "float32", "i32": "int32", "i64": "int64",
    "u8": "uint8", "bool": "bool",
}
_TORCH_TYPES = {
    "bf16": "bfloat16", "e4m3": "float8_e4m3fn", "f32": "float32", "i32": "int32", "i64": "int64",
    "u8": "uint8", "bool": "bool",
}


def _e4m3_as_bf16() -> Any:
    """bf16 bits of each e4m3 code: 1 sign, 4 exponent and 3 fraction bits, no infinities."""
    code = numpy.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    normal = numpy.ldexp(1 + fraction / 8, exponent - 7)
    value = numpy.where(exponent == 0, numpy.ldexp(fraction / 8, -6), normal)
    bits = value.astype(numpy.float32).view(numpy.uint32) >> 16
    bits[code & 0x7F == 0x7F] = 0x7FC0
    return (bits | (code & 0x80) << 8).astype(numpy.uint16)


class NumpySpace:
    """Arrays of numpy."""

    on_device = False
    place = "numpy's memory"

    def empty(self, shape: tuple, dtype: str) -> Any:
        return numpy.empty(shape, _NUMPY_TYPES[dtype])

    def zeros(self, shape: tuple, dtype: str) -> Any:
        return numpy.zeros(shape, _NUMPY_TYPES[dtype])

    def arange(self, num: int) -> Any:
        return numpy.arange(num, dtype=numpy.int32)

    def view(self, array: Any, dtype: str) -> Any:
        return array.view(_NUMPY_TYPES[dtype])

    def to(self, array: Any, dtype: str) -> Any:
        return array.astype(_NUMPY_TYPES[dtype])

    def bits(self, array: Any) -> Any:
        """bf16 as its bits: what to hand to a copy, whoever made the array."""
        return array if array.dtype == numpy.uint16 else array.view(numpy.uint16)

    def is_e4m3(self, array: Any) -> bool:
        return self.has_type(array, "e4m3")

    def has_type(self, array: Any, dtype: str) -> bool:
        named = {"bf16": "bfloat16", "e4m3": "float8_e4m3fn"}.get(dtype)
        return array.dtype == numpy.dtype(_NUMPY_TYPES[dtype]) or array.dtype.name == named

    def name_of(self, dtype: str) -> str:
        return {"bf16": "bfloat16 (or its bits as uint16)", "e4m3": "e4m3 (as uint8)"}.get(
            dtype, _NUMPY_TYPES[dtype])

    def dtype_of(self, array: Any) -> str:
        return array.dtype.name if array.dtype.isnative else f"{array.dtype.name} in foreign byte order"

    def of_list(self, values: list, dtype: str) -> Any:
        return numpy.array(values, _NUMPY_TYPES[dtype])

    def bf16_of_e4m3(self, codes: Any) -> Any:
        """Every e4m3 is a bf16."""
        return _E4M3_AS_BF16[codes.view(numpy.uint8)]

    def synchronize(self) -> None:
        """Waits for the current stream."""

    def is_capturing(self) -> bool:
        """Whether the current stream is in the capture of a graph."""
        return False

    def copy(self, target: Any, source: Any) -> None:
        target[...] = source

    def zero_where(self, array: Any, condition: Any) -> None:
        array[condition] = 0

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return numpy.where(condition, a, b)

    def count(self, values: Any, num: int) -> Any:
        """How often each of 0 .. num - 1 occurs; other values do not count."""
        counted = values[(values >= 0) & (values < num)]
        return numpy.bincount(counted.ravel(), minlength=num).astype(numpy.int32)

    def float_of(self, array: Any) -> Any:
        """float32 of bf16."""
        return (self.bits(array).astype(numpy.uint32) << 16).view(numpy.float32)

    def bf16_of(self, values: Any) -> Any:
        """bf16 of float32, ties to even."""
        u = values.view(numpy.uint32)
        rounded = (u + numpy.uint32(0x7FFF) + ((u >> 16) & 1)) >> 16
        quiet = (u >> 16) | 0x40
        return numpy.where(numpy.isnan(values), quiet, rounded).astype(numpy.uint16)

    def row_major(self, array: Any) -> Any:
        return numpy.ascontiguousarray(array)

    def for_import(self, array: Any) -> Any:
        """In any strides, for a binding: bf16 of ml_dtypes has no protocol, its bits have."""
        return array.view(numpy.uint16) if array.dtype.name == "bfloat16" else array

    def on_host(self, array: Any) -> Any:
        return array

    def of_host(self, array: Any) -> Any:
        """From numpy."""
        return array

    def empty_columns_first(self, shape: tuple, dtype: str) -> Any:
        """Of three dimensions, the middle one densest in memory."""
        return self.empty((shape[0], shape[2], shape[1]), dtype).transpose(0, 2, 1)

    def exponents(self, scale: Any) -> Any:
        """Biased exponents of powers of two, four to an int32 along the last dimension."""
        return ((scale.view(numpy.int32) >> 23) & 0xFF).astype(numpy.uint8).view(numpy.int32)

    def event(self) -> Any:
        return None

    def filled_like(self, array: Any, shape: tuple, value: Any) -> Any:
        """Of the array's type. 1 as bf16's bits where those are what it has."""
        bits = 0x3F80 if value == 1 and array.dtype == numpy.uint16 else value
        return numpy.full(shape, bits, array.dtype)

    def side_by_side(self, arrays: list) -> Any:
        """Along the second dimension."""
        return numpy.concatenate(arrays, 1)


_E4M3_AS_BF16 = _e4m3_as_bf16()


class TorchSpace:
    """Tensors of torch on one device."""

    def __init__(self, torch: Any, device: Any) -> None:
        self.torch, self.device = torch, device
        self.on_device = device.type == "cuda"
        self.place = f"torch's memory on {device}"

    def _type(self, dtype: str) -> Any:
        return getattr(self.torch, _TORCH_TYPES[dtype])

    def empty(self, shape: tuple, dtype: str) -> Any:
        return self.torch.empty(shape, dtype=self._type(dtype), device=self.device)

    def zeros(self, shape: tuple, dtype: str) -> Any:
        return self.torch.zeros(shape, dtype=self._type(dtype), device=self.device)

    def arange(self, num: int) -> Any:
        return self.torch.arange(num, dtype=self.torch.int32, device=self.device)

    def view(self, array: Any, dtype: str) -> Any:
        return array.view(self._type(dtype))

    def to(self, array: Any, dtype: str) -> Any:
        return array.to(self._type(dtype))

    def bits(self, array: Any) -> Any:
        return array

    def is_e4m3(self, array: Any) -> bool:
        return self.has_type(array, "e4m3")

    def has_type(self, array: Any, dtype: str) -> bool:
        return array.dtype == self._type(dtype) or (dtype == "e4m3" and array.dtype == self.torch.uint8)

    def name_of(self, dtype: str) -> str:
        return _TORCH_TYPES[dtype]

    def dtype_of(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def of_list(self, values: list, dtype: str) -> Any:
        return self.torch.tensor(values, dtype=self._type(dtype), device=self.device)

    def bf16_of_e4m3(self, codes: Any) -> Any:
        return codes.view(self.torch.float8_e4m3fn).to(self.torch.bfloat16)

    def synchronize(self) -> None:
        if self.on_device:
            self.torch.cuda.current_stream(self.device).synchronize()

    def is_capturing(self) -> bool:
        return self.on_device and self.torch.cuda.is_current_stream_capturing()

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def zero_where(self, array: Any, condition: Any) -> None:
        array.masked_fill_(condition, 0)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return self.torch.where(condition, a, b)

    def count(self, values: Any, num: int) -> Any:
        flat = values.reshape(-1).long()
        counts = self.torch.zeros(num + 1, dtype=self.torch.int32, device=self.device)
        ones = self.torch.ones_like(flat, dtype=self.torch.int32)
        counted = (flat >= 0) & (flat < num)
        return counts.scatter_add_(0, flat.where(counted, num), ones)[:num]

    def float_of(self, array: Any) -> Any:
        return array.float()

    def bf16_of(self, values: Any) -> Any:
        return values.bfloat16()

    def row_major(self, array: Any) -> Any:
        return array.contiguous()

    def for_import(self, array: Any) -> Any:
        return array.detach()

    def on_host(self, array: Any) -> Any:
        return array.detach().cpu()

    def of_host(self, array: Any) -> Any:
        return self.torch.from_numpy(array).to(self.device)

    def empty_columns_first(self, shape: tuple, dtype: str) -> Any:
        return self.empty((shape[0], shape[2], shape[1]), dtype).transpose(1, 2)

    def exponents(self, scale: Any) -> Any:
        exponent = (scale.view(self.torch.int32) >> 23) & 0xFF
        return exponent.to(self.torch.uint8).view(self.torch.int32)

    def event(self) -> Any:
        """Recorded now on the current stream; None on the CPU."""
        if not self.on_device:
            return None
        event = self.torch.cuda.Event()
        event.record(self.torch.cuda.current_stream(self.device))
        return event

    def filled_like(self, array: Any, shape: tuple, value: Any) -> Any:
        return self.torch.full(shape, value, dtype=array.dtype, device=self.device)

    def side_by_side(self, arrays: list) -> Any:
        return self.torch.cat(arrays, 1)


def space_of(array: Any, name: str = "x") -> "NumpySpace | TorchSpace":
    """Of the array called `name`: numpy's, or torch's on its device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type not in ("cpu", "cuda") or array.layout != torch.strided:
            raise Error("invalid_argument", f"{name}: expected a dense tensor on the CPU or a CUDA device, "
                        f"got {array.layout} on {array.device}")
        return TorchSpace(torch, array.device)
    if not isinstance(array, numpy.ndarray):
        raise Error("invalid_argument", f"{name}: expected an array of numpy or a tensor of torch, "
                    f"got {type(array).__name__}")
    return NumpySpace()


def row_major(array: Any) -> Any:
    """The array, or a copy of it whose last dimension is densest."""
    if isinstance(array, numpy.ndarray):
        return numpy.ascontiguousarray(array)
    return array if array.is_contiguous() else array.contiguous()


def as_float32(array: Any) -> Any:
    """float32 of bfloat16 (numpy: or of its bits as uint16); any other array as it is."""
    if getattr(array.dtype, "itemsize", 4) == 4:
        return array
    if isinstance(array, numpy.ndarray):
        is_bf16 = array.dtype == numpy.uint16 or array.dtype.name == "bfloat16"
        return (array.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32) if is_bf16 else array
    return array.float() if array.dtype is sys.modules["torch"].bfloat16 else array


def check(space: Any, name: str, array: Any, dtypes: tuple[str, ...], shape: list) -> None:
    """An argument beside the one that `space` is of: of the same kind, on the same device. In `shape`
    words stand for any number."""
    place = space_of(array, name).place
    if place != space.place:
        raise Error("invalid_argument", f"{name}: expected {space.place}, got {place}")
    if not any(space.has_type(array, dtype) for dtype in dtypes):
        raise Error("invalid_argument", f"{name}: expected dtype {' or '.join(map(space.name_of, dtypes))}, "
                    f"got {space.dtype_of(array)}")
    seen = list(array.shape)
    if len(seen) != len(shape) or any(s != w for s, w in zip(seen, shape) if not isinstance(w, str)):
        raise Error("invalid_argument",
                    f"{name}: expected shape [{', '.join(map(str, shape))}], got {seen}")


def check_numbers(space: Any, name: str, numbers: Any, num: int) -> None:
    """Of experts, -1 for none. Looked at only where the host can without waiting."""
    if not space.on_device and len(numbers) and not -1 <= numbers.min() <= numbers.max() < num:
        raise Error("invalid_argument", f"{name}: expected numbers in [-1, {num}), got "
                    f"{int(numbers.min())} .. {int(numbers.max())}")


def empty_of(dtype: Any) -> Any:
    """An array of no elements: torch's on its current GPU, or numpy's, as the type is."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return torch.empty(0, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    return numpy.empty(0, dtype)
