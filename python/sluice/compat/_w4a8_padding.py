"""Weights of widths that are no multiples of 128, with zeros up to those."""

from typing import Any

from .._error import Error

_STEP = 128
_E8M0_ONE = 127


def _more(width: int) -> int:
    return -width % _STEP


def own_widths(arrays: list, weight_layout: str, scale_layout: str, memory: Any) -> tuple[int, int] | None:
    """(hidden, intermediate) of w13 [E, 2 I, H / 2] if one of them is to be padded; None where none is, or where the
    tensors are not as they should be, which their reader says.

    Raises Error: invalid_argument where memory is given, or another order than plain scales."""
    w13, s13, w2 = arrays[0], arrays[1], arrays[2]
    if weight_layout not in ("int4", "mxfp4") or any(len(a.shape) != 3 for a in (w13, s13, w2)):
        return None
    rows, hidden, inner = int(w13.shape[1]), 2 * int(w13.shape[2]), 2 * int(w2.shape[2])
    if rows != 2 * inner or int(w2.shape[1]) != hidden or 0 in (hidden, inner):
        return None
    if not (_more(hidden) or _more(inner)) or hidden % 32 or inner % 32:
        return None
    if int(s13.shape[2]) * 32 != hidden or int(s13.shape[1]) != rows:
        return None  # Groups of 128 are not cut, and scales of another order are named by who reads them.
    if memory is not None or scale_layout == "interleaved":
        raise Error("invalid_argument", f"w13: hidden {hidden}, intermediate {inner} are padded to multiples of {_STEP} "
                                        "in copies of the weights, which neither memory= nor interleaved scales go with")
    return hidden, inner


def _padded(space: Any, array: Any, rows: int, columns: int, fill: Any) -> Any:
    """[E, n, k] -> [E, n + rows, k + columns], in new memory."""
    experts, n, k = (int(size) for size in array.shape)
    out = space.filled_like(array, (experts, n + rows, k + columns), fill)
    out[:, :n, :k] = array
    return out


def padded(space: Any, arrays: list, weight_layout: str) -> list:
    """w13 (of each half), its scales, w2 and its scales. A group of zeros has the scale 1."""
    w13, s13, w2, s2 = arrays
    hidden, inner = 2 * int(w13.shape[2]), 2 * int(w2.shape[2])
    more_hidden, more_inner = _more(hidden), _more(inner)
    one = _E8M0_ONE if weight_layout == "mxfp4" else 1

    def halves(array: Any, columns: int, fill: Any) -> Any:
        parts = [_padded(space, array[:, half : half + inner], more_inner, columns, fill) for half in (0, inner)]
        return space.side_by_side(parts)

    return [halves(w13, more_hidden // 2, 0), halves(s13, more_hidden // 32, one),
            _padded(space, w2, more_hidden, more_inner // 2, 0), _padded(space, s2, more_hidden, more_inner // 32, one)]
