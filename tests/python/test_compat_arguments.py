"""sluice.compat: wrong type, shape, device, strides and lifetime of every array are refused by name.

In strides of any kind are taken: arrays that are copied on the way (weights, scales, what is beside
the rows of the normal mode). The rest is C-contiguous.
"""

import numpy as np
import pytest
from conftest import LAYER
from spaces import Torch

import sluice
from sluice.compat import w4a8
from sluice.compat.deep_ep import Buffer

TOKENS, CAPACITY = 6, 8


class Case:
    """A layer's arrays, of numpy or torch, and every call with some of them replaced."""

    def __init__(self, space, checkpoint, backend):
        geometry = checkpoint.geometry
        x, idx, weights = sluice.make_workload(geometry, TOKENS)
        self.experts, self.hidden = geometry.num_experts, geometry.hidden
        self.space, self.backend = space, backend
        self.x, self.idx, self.weights = space.bf16(x), space.array(idx.astype(np.int64)), space.array(weights)
        self.buffer = Buffer(sluice.Transport.inproc(1)[0], backend=backend)
        self.rows = space.bf16(np.zeros((self.experts, CAPACITY, self.hidden), np.uint16))
        self.counts = space.array(np.full(self.experts, 2, np.int32))
        loaded = checkpoint.load_experts(LAYER, 0, self.experts)
        gate, up, down = (
            [np.stack(a) for a in zip(*(loaded.matrix(e, name) for e in range(self.experts)))]
            for name in ("gate", "up", "down")
        )
        self.packed = [space.array(a) for a in (
            np.concatenate([gate[0], up[0]], 1), np.concatenate([gate[1], up[1]], 1), *down)]
        to_rank, _, to_expert, in_rank, _ = self.buffer.get_dispatch_layout(self.idx, self.experts)
        self.layout = {"is_token_in_rank": in_rank, "num_tokens_per_expert": to_expert}

    def low_latency_dispatch(self, x=None, topk_idx=None, **options):
        return self.buffer.low_latency_dispatch(
            self.x if x is None else x, self.idx if topk_idx is None else topk_idx, CAPACITY, self.experts,
            **options)

    def low_latency_combine(self, x=None, topk_weights=None, handle=None, **options):
        handle = self.low_latency_dispatch()[2] if handle is None else handle
        return self.buffer.low_latency_combine(
            self.rows if x is None else x, self.idx, self.weights if topk_weights is None else topk_weights,
            handle, **options)

    def dispatch(self, x=None, **options):
        both = {"topk_idx": self.idx, "topk_weights": self.weights, **self.layout, **options}
        return self.buffer.dispatch(self.x if x is None else x, **both)

    def combine(self, x=None, handle=None, **options):
        rows, _, _, _, mine, _ = self.dispatch()
        return self.buffer.combine(rows if x is None else x, mine if handle is None else handle, **options)

    def masked(self, x=None, x_scale=None, masked_m=None, packed=None, **options):
        return w4a8.w4a8_moe_masked(
            self.rows if x is None else x, x_scale, self.counts if masked_m is None else masked_m,
            *(packed or self.packed), backend=self.backend, **options)

    def grouped(self, x=None, x_scale=None, topk_idx=None, topk_weights=None, **options):
        return w4a8.w4a8_moe_grouped(
            self.x if x is None else x, x_scale, self.idx if topk_idx is None else topk_idx,
            self.weights if topk_weights is None else topk_weights, *self.packed, backend=self.backend,
            **options)


@pytest.fixture()
def case(space, checkpoint, backend):
    return Case(space, checkpoint, backend)


def refused(text, call, *args, **kwargs):
    with pytest.raises(sluice.Error, match=text) as caught:
        call(*args, **kwargs)
    assert caught.value.code == "invalid_argument"


def wide(case, array):
    """The same values, every other element of a wider array."""
    plain = case.space.bits(array) if isinstance(case.space, Torch) and array.element_size() == 2 else array
    plain = np.asarray(plain)
    result = np.zeros((*plain.shape[:-1], 2 * plain.shape[-1]), plain.dtype)
    result[..., ::2] = plain
    both = case.space.bf16(result) if plain.dtype == np.uint16 else case.space.array(result)
    return both[..., ::2]


def test_types(case):
    a = case.space.array
    f32 = a(np.zeros((TOKENS, case.hidden), np.float32))
    refused("x: expected dtype bfloat16.*, got float32", case.low_latency_dispatch, f32)
    refused("topk_idx: expected dtype int64 or int32, got float32", case.low_latency_dispatch, None, case.weights)
    for dtype, name in ((np.int64, "int64"), (np.float32, "float32")):
        refused(f"cumulative_local_expert_recv_stats: expected dtype int32, got {name}", case.low_latency_dispatch,
                cumulative_local_expert_recv_stats=a(np.zeros(case.experts, dtype)))
    refused("x: expected dtype bfloat16.*, got float32", case.low_latency_combine,
            a(np.zeros(tuple(case.rows.shape), np.float32)))
    f64 = a(np.zeros((TOKENS, 2), np.float64))
    refused("topk_weights: expected dtype float32, got float64", case.low_latency_combine, None, f64)
    refused("out: expected dtype bfloat16.*, got float32", case.low_latency_combine, out=f32)
    refused("x: expected dtype bfloat16.*, got float32", case.dispatch, f32)
    refused("topk_idx: expected dtype int64 or int32, got float32", case.dispatch, topk_idx=case.weights)
    refused("topk_weights: expected dtype float32, got float64", case.dispatch, topk_weights=f64)
    refused("is_token_in_rank: expected dtype bool, got int32", case.dispatch,
            is_token_in_rank=a(np.ones((TOKENS, 1), np.int32)))
    refused("topk_idx: expected dtype int64 or int32, got float32", case.buffer.get_dispatch_layout, case.weights,
            case.experts)
    refused("x: expected dtype bfloat16.*, got float32", case.combine, f32)
    refused("topk_weights: expected dtype float32, got float64", case.combine, topk_weights=f64)
    refused("mask_status: expected dtype int32, got float32", case.buffer.low_latency_query_mask_buffer,
            a(np.zeros(1, np.float32)))
    refused("x: expected dtype bfloat16.* or .*e4m3.*, got float32", case.grouped, f32)
    refused("topk_idx: expected dtype int64 or int32, got float32", case.grouped, topk_idx=case.weights)
    refused("topk_weights: expected dtype float32 or bfloat16.*, got float64", case.grouped, topk_weights=f64)
    refused("masked_m: expected dtype int32, got int64", case.masked, masked_m=a(np.zeros(case.experts, np.int64)))
    refused("x_scale: expected dtype float32, got float64", case.masked,
            x_scale=a(np.zeros((case.experts, CAPACITY, 2), np.float64)))
    refused("out: expected dtype bfloat16.*, got float32", case.masked,
            out=a(np.zeros(tuple(case.rows.shape), np.float32)))
    w13, s13, w2, s2 = case.packed
    refused(r"w13: expected int8 .num_experts, N, K / 2., got float32", case.masked,
            packed=(a(np.zeros(tuple(w13.shape), np.float32)), s13, w2, s2))


def test_shapes(case):
    x, idx, weights = case.x, case.idx, case.weights
    refused(r"x: expected shape \[num_tokens, hidden\], got \[256\]", case.low_latency_dispatch, x[0])
    refused(r"topk_idx: expected shape \[6, num_topk\], got \[3, 2\]", case.low_latency_dispatch, x, idx[:3])
    refused(r"cumulative_local_expert_recv_stats: expected shape \[8\], got \[7\]", case.low_latency_dispatch,
            cumulative_local_expert_recv_stats=case.counts[1:])
    refused(r"x: expected shape \[8, 8, 256\], got \[7, 8, 256\]", case.low_latency_combine, case.rows[1:])
    refused(r"topk_weights: expected shape \[6, 2\], got \[5, 2\]", case.low_latency_combine, None, weights[1:])
    refused(r"out: expected shape \[6, 256\], got \[3, 256\]", case.low_latency_combine, out=x[:3])
    refused(r"x: expected shape \[num_tokens, hidden\], got \[256\]", case.dispatch, x[0])
    refused(r"topk_idx: expected shape \[6, num_topk\], got \[3, 2\]", case.dispatch, topk_idx=idx[:3])
    refused(r"topk_weights: expected shape \[6, 2\], got \[3, 2\]", case.dispatch, topk_weights=weights[:3])
    refused("topk_weights without topk_idx", case.dispatch, topk_idx=None)
    refused(r"x: expected shape \[6, 256\], got \[5, 256\]", case.combine, x[1:])
    refused(r"topk_idx: expected shape \[num_tokens, num_topk\], got \[6\]", case.buffer.get_dispatch_layout,
            idx[:, 0], case.experts)
    refused(r"x: expected shape \[rows, 256\], got \[6, 128\]", case.grouped, x[:, :128])
    refused(r"topk_weights: expected shape \[6, 2\], got \[6, 1\]", case.grouped, topk_weights=weights[:, :1])
    refused(r"x_scale: expected shape \[6, 2\], got \[6, 3\]", case.grouped,
            x_scale=case.space.array(np.zeros((6, 3), np.float32)))
    refused(r"masked_m: expected shape \[8\], got \[7\]", case.masked, masked_m=case.counts[1:])
    refused(r"x_scale: expected shape \[8, 8, 2\], got \[8, 8, 3\]", case.masked,
            x_scale=case.space.array(np.zeros((8, 8, 3), np.float32)))


def test_numbers_of_experts(case):
    wrong = case.idx + 100
    refused(r"topk_idx\[0, 0\] = 10. is not in \[-1, 8\)", case.low_latency_dispatch, None, wrong)
    refused(r"topk_idx: expected numbers in \[-1, 8\), got 10. .. 107", case.dispatch, topk_idx=wrong)
    assert not np.any(case.space.bits(case.grouped(topk_idx=wrong)))  # Experts elsewhere.
    refused(r"topk_idx: expected numbers in \[-1, 8\)", case.buffer.get_dispatch_layout, wrong, case.experts)


def test_strides(case):
    """Refused where the rows themselves are used, with the strides that came."""
    refused(r"x: expected C-contiguous memory.* strides \[512, 2\]", case.low_latency_dispatch, wide(case, case.x))
    refused("topk_idx: expected C-contiguous", case.low_latency_dispatch, None, wide(case, case.idx))
    refused("expert_y: expected C-contiguous", case.low_latency_combine, wide(case, case.rows))
    refused("out: expected C-contiguous", case.low_latency_combine, out=wide(case, case.x))
    refused("x: expected C-contiguous", case.dispatch, wide(case, case.x))
    refused("x: expected C-contiguous", case.masked, wide(case, case.rows))
    refused("out: expected C-contiguous", case.masked, out=wide(case, case.rows))
    # And taken where arrays are copied anyway.
    wanted, _, _ = case.low_latency_combine()
    y, _, _ = case.low_latency_combine(None, wide(case, case.weights))
    assert np.array_equal(case.space.bits(y), case.space.bits(wanted))
    for name in ("x", "topk_idx", "topk_weights"):
        array = {"x": case.x, "topk_idx": case.idx, "topk_weights": case.weights}[name]
        y = case.grouped(**{name: wide(case, array)})
        assert np.array_equal(case.space.bits(y), case.space.bits(case.grouped()))


def test_devices_and_kinds(case):
    """Arrays of another library, another device, or none."""
    refused("x: expected an array of numpy or a tensor of torch, got list", case.low_latency_dispatch, [[1.0]])
    refused("handle: expected what low_latency_dispatch.* gave, got str", case.low_latency_combine, handle="x")
    refused("handle: expected what dispatch.* gave, got str", case.combine, handle="x")
    refused("w13: expected an array", case.masked, packed=([1], *case.packed[1:]))
    if not isinstance(case.space, Torch):
        return
    plain = [a.numpy() for a in (case.idx, case.weights, case.counts)]
    refused("x: expected torch's memory on cpu, got numpy's", case.buffer.dispatch, case.space.bits(case.x),
            handle=case.dispatch()[4])
    away = case.x.to("meta")
    refused("topk_idx: expected torch's memory on cpu, got numpy's", case.low_latency_dispatch, None, plain[0])
    refused("topk_weights: expected torch's memory on cpu, got numpy's", case.low_latency_combine, None, plain[1])
    refused("masked_m: expected torch's memory on cpu, got numpy's", case.masked, masked_m=plain[2])
    for call in (case.low_latency_dispatch, case.low_latency_combine, case.dispatch, case.combine, case.masked,
                 case.grouped):
        refused("x: expected a dense tensor on the CPU or a CUDA device, got .* on meta", call, away)
    refused("x: expected a dense tensor .* got torch.sparse_coo", case.dispatch, case.x.to_sparse())
    refused("topk_idx: expected a dense tensor .* on meta", case.dispatch, topk_idx=case.idx.to("meta"))
    refused("w13: expected a dense tensor .* on meta", case.masked,
            packed=(case.packed[0].to("meta"), *case.packed[1:]))


def test_lifetimes(case):
    """Handles of buffers that are gone, of other buffers, of the other mode, or from before a reset."""
    low_latency, (rows, *_, normal, _) = case.low_latency_dispatch()[2], case.dispatch()
    refused("handle: expected what low_latency_dispatch.* got NormalHandle", case.low_latency_combine, handle=normal)
    refused("handle: expected what dispatch.* got LowLatencyHandle", case.combine, handle=low_latency)
    other = Buffer(sluice.Transport.inproc(1)[0], backend=case.backend)
    refused("handle: is of another buffer", other.low_latency_combine, case.rows, case.idx, case.weights, low_latency)
    refused("handle: is of another buffer", other.combine, rows, normal)
    refused("handle: is of another buffer", other.dispatch, case.x, handle=normal)
    refused("topk_idx with a handle", case.buffer.dispatch, case.x, handle=normal, topk_idx=case.idx)
    refused("handle: is of another buffer", other.get_next_low_latency_combine_buffer, low_latency)
    case.buffer.low_latency_clean_mask_buffer()
    refused("older than low_latency_clean_mask_buffer", case.low_latency_combine, handle=low_latency)
    refused("older than low_latency_clean_mask_buffer", case.buffer.combine, rows, normal)
    case.buffer.destroy()
    for call in (case.low_latency_dispatch, case.dispatch):
        refused("this buffer has been destroyed", call)
    refused("this buffer has been destroyed", case.buffer.combine, rows, normal)
