"""W4A8 experts as a layer calls them between a dispatch and a combine of its own.

    experts = W4A8Experts(w13, w13_scale, w2, w2_scale)         # once for each layer
    y = experts.masked(recv_x, recv_scale, recv_count)
    y = experts.grouped(recv_x, None, recv_topk_idx, recv_topk_weights)

The same as functions, which repack at the first call with some weights:

    y = w4a8_moe_masked(recv_x, recv_scale, recv_count, w13, w13_scale, w2, w2_scale)
    y = w4a8_moe_grouped(recv_x, None, recv_topk_idx, recv_topk_weights, w13, w13_scale, w2, w2_scale)

E experts, hidden H, intermediate I, group G (128 or 32), gate rows before up rows:
    w13 [E, 2 I, H / 2] int8     w13_scale [E, 2 I, H / G] float32 or bfloat16
    w2  [E, H, I / 2]   int8     w2_scale  [E, H, I / G]
as checkpoints publish them (W4AFP8): int4 in two's complement, two to a byte with even k low. Or MXFP4, which scales
of uint8 tell: w13, w2 of uint8 are then e2m1, and scales [.., K / 32] of uint8 (or float8_e8m0fnu) powers of two,
2^(code - 127). A backend that cannot compute it refuses it by name. W4A8Experts takes other orders too. Arrays lie on
the device of the backend and are read there, in any strides whose last dimension of int8 codes is densest; plain ones
may also lie in host memory.
    a1_scale, a2_scale: static scales of the inputs of the two GEMMs, or None: one number, or one for
    each expert, of which the largest counts.
    activation: "swiglu", "swiglu:limit=10" (DeepSeek-V4), "swiglu-oai:alpha=1.702,limit=7" (gpt-oss),
    "situ:beta=4,linear_beta=25" (Kimi-K3): what the model has; nothing here can tell it from w13.

A later call of a function with the same w13 and w2 (or a view of all of their memory, as .data is) gives the
same scales, static scales and activation, and the same backend or none: what differs is refused by name.
An object is its own cache; make one for each set of scales or for each backend.

The input and the scales that are there decide the recipe, unless it is named: bf16 rows direct-bf16
or bf16-static, e4m3 rows with scales direct or requant-static, with one scale per row direct-token, e4m3
rows without scales static.
"""

from typing import Any

from ._w4a8_cache import experts_for as _experts_for
from ._w4a8_cache import forget
from ._w4a8_experts import W4A8Experts
from ._w4a8_memory import WeightMemory, weight_memory

__all__ = ["W4A8Experts", "WeightMemory", "forget", "w4a8_moe_grouped", "w4a8_moe_masked", "weight_memory"]


def w4a8_moe_masked(
    x: Any, x_scale: Any, masked_m: Any, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any, *,
    a1_scale: Any = None, a2_scale: Any = None, recipe: str | None = None, expected_m: int = 0,
    out: Any = None, activation: str = "swiglu", backend: Any = None,
) -> Any:
    """Every expert on its rows after a low-latency dispatch: bf16 of x's shape.

    x: [E, max_m, H] e4m3 or bf16. x_scale: [E, max_m, H / 128] float32 in any strides, [E, max_m, 1] for one
    scale per row, or None.
    masked_m: [E] int32; rows past it are neither read nor written. The router's weights are left to
    combine. out: the result's memory. Capturable once a batch of the size has run.

    Raises Error: invalid_argument naming the argument, unsupported naming the recipe.
    """
    experts = _experts_for(x, w13, w13_scale, w2, w2_scale, a1_scale, a2_scale, activation, backend)
    return experts.masked(x, x_scale, masked_m, recipe=recipe, expected_m=expected_m, out=out)


def w4a8_moe_grouped(
    x: Any, x_scale: Any, topk_idx: Any, topk_weights: Any, w13: Any, w13_scale: Any, w2: Any,
    w2_scale: Any, *, a1_scale: Any = None, a2_scale: Any = None, recipe: str | None = None,
    out: Any = None, activation: str = "swiglu", backend: Any = None,
) -> Any:
    """Every expert on its rows after a normal dispatch, summed for each row: bf16 [rows, H].

    x: [rows, H] bf16 or e4m3. x_scale: [rows, H / 128] or [rows, 1] float32, or None. topk_idx: [rows, num_topk] int64
    or int32, numbers of this rank's experts; any other number, -1 or E say, is an expert elsewhere and
    skipped. topk_weights: float32 or bfloat16, applied here in float32, in order of entries. out: the
    result's memory. No rows give bf16 [0, H]. Asynchronous on a GPU; capturable once a call of the size has
    run.

    Raises Error: invalid_argument naming the argument, unsupported naming the recipe.
    """
    experts = _experts_for(x, w13, w13_scale, w2, w2_scale, a1_scale, a2_scale, activation, backend)
    return experts.grouped(x, x_scale, topk_idx, topk_weights, recipe=recipe, out=out)
