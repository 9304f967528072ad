"""Memory in which an engine's weights lie until they are repacked, and the repacked ones afterwards."""

from typing import Any, NamedTuple

from .. import _core
from .._error import Error

WEIGHT_LAYOUTS = ("int4", "uint4b8", "uint4b8-transposed", "mxfp4")


class WeightMemory(NamedTuple):
    """The memory of one layer's experts and the engine's parameters in it: see weight_memory()."""

    memory: Any
    w13: Any
    w13_scale: Any
    w2: Any
    w2_scale: Any


def weight_memory(num_experts: int, hidden: int, intermediate: int, *, group_size: int = 128,
                  scale_dtype: Any = None, weight_layout: str = "int4", transposed_scales: bool = False,
                  device: Any = "cuda") -> WeightMemory:
    """Tensors of torch for a layer's weights that take no memory beside the repacked ones.

        place = weight_memory(E, H, I, device="cuda")      # as the engine creates its parameters
        ...                                                # the engine loads into place.w13, .w2 and scales
        experts = W4A8Experts(*place[1:], memory=place.memory)

    memory: [bytes] uint8, what W4A8Experts takes as memory=. The others are views of it, of the shapes that
    weight_layout has, uninitialized; w13_scale and w2_scale of scale_dtype, torch.bfloat16 unless given, or
    torch.float32; of weight_layout "mxfp4" torch.uint8, in groups of 32. transposed_scales: [E, K / G, N] instead of
    [E, N, K / G]. After W4A8Experts has been made the views hold repacked bytes: the engine drops them. While it is
    made, it takes more: the scales of all experts, and at most the larger half of one.

    Raises Error: invalid_argument naming the field. torch's own error where memory runs out.
    """
    import torch

    device = torch.device(device)
    is_mxfp4 = weight_layout == "mxfp4"
    known = (torch.uint8,) if is_mxfp4 else (torch.bfloat16, torch.float32)
    scale_dtype = known[0] if scale_dtype is None else scale_dtype
    if scale_dtype not in known:
        raise Error("invalid_argument",
                    f"scale_dtype: expected {' or '.join(str(dtype) for dtype in known)}, got {scale_dtype}")
    if is_mxfp4 and transposed_scales:
        raise Error("invalid_argument", "transposed_scales: scales of mxfp4 are [E, N, K / 32]")
    if weight_layout not in WEIGHT_LAYOUTS:
        raise Error("invalid_argument",
                    f"weight_layout: '{weight_layout}' is none of {', '.join(WEIGHT_LAYOUTS)}")
    gate_up, down, alignment = _core.packed_sizes(
        num_experts=num_experts, hidden=hidden, intermediate=intermediate, group_size=group_size,
        scales_are_bf16=scale_dtype == torch.bfloat16, device=device.type,
        weight_format="mxfp4" if is_mxfp4 else "int4")
    space = torch.empty(num_experts * (gate_up + down) + alignment, dtype=torch.uint8, device=device)
    memory = space[-space.data_ptr() % alignment :][: num_experts * (gate_up + down)]

    def views(part: Any, n: int, k: int) -> tuple[Any, Any]:
        # Codes at the end of the part: packing an expert then never reaches those of the next. Scales, which
        # lie in front, are copied before.
        num_codes, element = num_experts * n * k // 2, scale_dtype.itemsize
        codes, scales = part[len(part) - num_codes :], part[: num_experts * n * (k // group_size) * element]
        scales = scales.view(scale_dtype)
        scales = scales.view(num_experts, k // group_size, n) if transposed_scales \
            else scales.view(num_experts, n, k // group_size)
        if weight_layout in ("int4", "mxfp4"):
            return codes.view(torch.uint8 if is_mxfp4 else torch.int8).view(num_experts, n, k // 2), scales
        words = codes.view(torch.int32)
        return (words.view(num_experts, n, k // 8) if weight_layout == "uint4b8"
                else words.view(num_experts, k // 8, n)), scales

    w13, w13_scale = views(memory[: num_experts * gate_up], 2 * intermediate, hidden)
    w2, w2_scale = views(memory[num_experts * gate_up :], hidden, intermediate)
    return WeightMemory(memory, w13, w13_scale, w2, w2_scale)


def apart_from(memory: Any, *arrays: Any) -> list:
    """The arrays; those that lie in `memory` as copies, in one piece of memory: torch takes 20 MiB for a small one."""
    if str(getattr(memory, "dtype", "")) != "torch.uint8":
        return list(arrays)
    first, last = memory.data_ptr(), memory.data_ptr() + memory.numel() * memory.element_size()
    sizes = [a.numel() * a.element_size() if hasattr(a, "untyped_storage") and first <= a.data_ptr() < last else 0
             for a in arrays]
    places = [-(-size // 256) * 256 for size in sizes]
    room = memory.new_empty(sum(places)).split(places)
    return [array if size == 0 else place[:size].view(array.dtype).view(array.shape).copy_(array)
            for array, size, place in zip(arrays, sizes, room)]
