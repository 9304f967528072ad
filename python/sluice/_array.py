"""What the package takes as an array."""

from typing import Any, Protocol


class Array(Protocol):
    """Anything with DLPack: arrays of numpy (ml_dtypes included), tensors of torch, and so on.

    C-contiguous; never copied. bf16 is bfloat16 or its bits in uint16, e4m3 is uint8 or
    float8_e4m3fn.
    """

    def __dlpack__(self, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> tuple: ...
