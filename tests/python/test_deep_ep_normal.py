"""The normal mode of sluice.compat.deep_ep over ranks as threads, for numpy and torch."""

import numpy as np
import pytest
from conftest import on_every_rank
from deep_ep_workload import (
    COUNTS, EXPERTS, HIDDEN, LOCAL, RANKS, TOPK, buffers, expected_normal, tokens,
)
from spaces import Numpy, Torch, as_bf16, as_float

import sluice
from sluice.compat.deep_ep import Config


@pytest.mark.parametrize("counts", [*COUNTS.values(), [300, 2, 0, 40]], ids=[*COUNTS, "growing"])
@pytest.mark.parametrize("alignment", [1, 128])
def test_normal(space, counts, alignment):
    made = buffers()

    def body(rank):
        buffer = made[rank]
        for config in (None, Config(num_max_nvl_chunked_recv_tokens=4)):
            x, idx, weights = tokens(rank, counts[rank])
            to_rank, rdma, to_expert, in_rank, _ = buffer.get_dispatch_layout(space.array(idx), EXPERTS)
            wanted = np.stack([((idx >= 0) & (idx // LOCAL == r)).any(1) for r in range(RANKS)], 1)
            assert np.array_equal(space.plain(in_rank), wanted) and rdma is None
            assert np.array_equal(space.plain(to_rank), wanted.sum(0))
            assert np.array_equal(space.plain(to_expert), np.bincount(idx[idx >= 0], minlength=EXPERTS))
            recv, got_idx, got_weights, per_expert, handle, _ = buffer.dispatch(
                space.bf16(x), num_tokens_per_rank=to_rank, is_token_in_rank=in_rank,
                num_tokens_per_expert=to_expert, topk_idx=space.array(idx),
                topk_weights=space.array(weights), expert_alignment=alignment, config=config)
            rows, numbers, w = expected_normal(rank, counts)
            assert np.array_equal(space.bits(recv), rows)
            assert np.array_equal(space.plain(got_idx), numbers)
            assert np.array_equal(space.plain(got_weights), w)
            exact = [int((numbers == e).sum()) for e in range(LOCAL)]
            assert per_expert == [-(-n // alignment) * alignment for n in exact]
            for _ in range(2):  # The second one routes again.
                y, none, _ = buffer.combine(recv, handle)
                copies = np.float32(wanted.sum(1))[:, None]
                assert none is None and np.array_equal(space.bits(y), as_bf16(as_float(x) * copies + 0))
            doubled = as_bf16(as_float(x) * np.float32(2))
            again = buffer.dispatch(space.bf16(doubled), handle=handle)
            assert again[1:5] == (None,) * 4
            assert np.array_equal(space.bits(again[0]), as_bf16(as_float(rows) * np.float32(2)))

    on_every_rank(RANKS, body)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("spare", [0, 40])
def test_num_worst_tokens(space, counts, spare):
    """As many rows as the caller says, and those that came can be told from the others."""
    made, worst = buffers(), max(1, sum(counts)) + spare

    def body(rank):
        x, idx, weights = tokens(rank, counts[rank])
        _, _, to_expert, in_rank, _ = made[rank].get_dispatch_layout(space.array(idx), EXPERTS)
        recv, got_idx, got_weights, per_expert, handle, _ = made[rank].dispatch(
            space.bf16(x), is_token_in_rank=in_rank, num_tokens_per_expert=to_expert,
            topk_idx=space.array(idx), topk_weights=space.array(weights), num_worst_tokens=worst)
        rows, numbers, w = expected_normal(rank, counts)
        came = len(rows)
        assert tuple(recv.shape) == (worst, HIDDEN) and per_expert == []
        assert np.array_equal(space.bits(recv)[:came], rows)
        assert np.array_equal(space.plain(got_idx)[:came], numbers)
        assert np.array_equal(space.plain(got_weights)[:came], w)
        assert (space.plain(got_idx)[came:] == -1).all() and not space.plain(got_weights)[came:].any()
        y, sums, _ = made[rank].combine(recv, handle, topk_weights=got_weights)
        copies = np.float32(space.plain(in_rank).sum(1))[:, None]
        assert np.array_equal(space.bits(y), as_bf16(as_float(x) * copies + 0))
        assert np.array_equal(space.plain(sums), np.where(idx >= 0, weights, 0))

    on_every_rank(RANKS, body)


def test_weights_come_home(space):
    """Every bit of float32, and the sums where several ranks give a weight."""
    made, counts = buffers(), COUNTS["ragged"]

    def body(rank):
        x, idx, _ = tokens(rank, counts[rank])
        weights = np.random.default_rng(rank).standard_normal(idx.shape).astype(np.float32)
        weights *= np.float32(2.0) ** (np.arange(TOPK) * 20 - 20)
        _, _, to_expert, in_rank, _ = made[rank].get_dispatch_layout(space.array(idx), EXPERTS)
        recv, _, got, _, handle, _ = made[rank].dispatch(
            space.bf16(x), is_token_in_rank=in_rank, num_tokens_per_expert=to_expert,
            topk_idx=space.array(idx), topk_weights=space.array(weights))
        _, sums, _ = made[rank].combine(recv, handle, topk_weights=got)
        assert np.array_equal(space.plain(sums), np.where(idx >= 0, weights, 0))
        ones = space.array(np.ones(tuple(got.shape), np.float32))
        _, sums, _ = made[rank].combine(recv, handle, topk_weights=ones)
        assert np.array_equal(space.plain(sums), np.repeat(space.plain(in_rank).sum(1)[:, None], TOPK, 1))
        with pytest.raises(sluice.Error, match="topk_weights: expected shape"):
            made[rank].combine(recv, handle, topk_weights=space.array(np.ones((1, 9), np.float32)))

    on_every_rank(RANKS, body)


def test_normal_fp8(space):
    made, counts = buffers(), COUNTS["ragged"]

    def body(rank):
        buffer, backend = made[rank], sluice.Backend(num_threads=1)
        x, idx, weights = tokens(rank, counts[rank])
        codes, scale = sluice.quantize(backend, space.bf16(x))
        _, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(space.array(idx), EXPERTS)
        (got, got_scale), _, _, _, handle, _ = buffer.dispatch(
            (codes, scale), is_token_in_rank=in_rank, num_tokens_per_expert=to_expert,
            topk_idx=space.array(idx), topk_weights=space.array(weights))
        rows, _, _ = expected_normal(rank, counts)
        wanted, wanted_scale = sluice.quantize(backend, rows)
        assert got.dtype == codes.dtype and np.array_equal(space.bits(got), wanted)
        assert np.array_equal(space.plain(got_scale), wanted_scale)
        y, _, _ = buffer.combine(space.bf16(rows), handle)
        copies = space.plain(in_rank).sum(1).astype(np.float32)[:, None]
        assert np.array_equal(space.bits(y), as_bf16(as_float(x) * copies + 0))

    on_every_rank(RANKS, body)


def test_every_e4m3_crosses_as_it_is(space):
    """All 256 codes in groups of every magnitude, under scales of any bits, in any strides; as floats
    or packed powers of two; then other values over the same routes. NaN comes as NaN, without sign."""
    made, hidden = buffers(), 1024
    rng = np.random.default_rng(5)
    every = rng.permutation(np.tile(np.arange(256, dtype=np.uint8), 4))
    small = np.where(np.arange(hidden) % 2 == 0, 1, 0x82).astype(np.uint8)  # Smallest subnormals alone.
    counts = COUNTS["ragged"]

    def values(rank, kind):
        codes = np.stack([np.roll(every, 37 * t) if t % 3 else small >> (t % 2) for t in range(counts[rank])]
                         or [every])[: counts[rank]]
        bits = np.random.default_rng(rank).integers(0, 2**32, (counts[rank], hidden // 128), np.uint32)
        return codes, (bits.view(np.float32) if kind == "float" else bits.view(np.int32)[:, :2].copy())

    def given(rank, kind):
        codes, scale = values(rank, kind)
        codes = space.array(codes)
        if isinstance(space, Torch):
            codes = codes.view(space.torch.float8_e4m3fn)
        columns = np.asfortranarray(scale)  # Tokens densest, as scales are made for a GEMM.
        return codes, columns if isinstance(space, Numpy) else space.array(columns.T.copy()).t()

    def body(rank):
        buffer = made[rank]
        _, idx, weights = tokens(rank, counts[rank])
        _, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(space.array(idx), EXPERTS)
        came = [np.flatnonzero(((i >= 0) & (i // LOCAL == rank)).any(1))
                for i in (tokens(r, n)[1] for r, n in enumerate(counts))]
        wanted = {kind: [np.concatenate([values(r, kind)[part][t] for r, t in enumerate(came)])
                         for part in (0, 1)] for kind in ("float", "packed")}
        for codes, _ in wanted.values():
            codes[codes == 0xFF] = 0x7F
        for kind in ("float", "packed"):
            for routing in ({}, {"topk_idx": space.array(idx), "topk_weights": space.array(weights)}):
                (codes, scale), numbers, _, _, handle, _ = buffer.dispatch(
                    given(rank, kind), is_token_in_rank=in_rank, num_tokens_per_expert=to_expert, **routing)
                assert (numbers is None) == (not routing)
                for got, want in zip((codes, scale), wanted[kind]):
                    assert np.array_equal(space.bytes(got), want.view(np.uint8))
            (codes, scale), *_ = buffer.dispatch(given(rank, "float"), handle=handle)
            assert np.array_equal(space.bytes(codes), wanted["float"][0])
            assert np.array_equal(space.bytes(scale), wanted["float"][1].view(np.uint8))

    on_every_rank(RANKS, body)


def test_e4m3_halves_the_bytes():
    """Of DeepSeek-R1's width: payload, scales and what is attached, against bf16's."""
    buffer = buffers(1)[0]
    x, idx, weights = tokens(0, 6, hidden=7168)
    _, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    sent = []
    for rows in (x, sluice.quantize(sluice.Backend(num_threads=1), x)):
        buffer.low_latency_clean_mask_buffer()  # Exchanges anew, with counters from 0.
        buffer.dispatch(rows, is_token_in_rank=in_rank, num_tokens_per_expert=to_expert, topk_idx=idx,
                        topk_weights=weights)
        counted = [queue.exchange.counters() for queue in buffer._normal._queues.values()]
        sent.append(sum(c["dispatch_bytes"][0] for c in counted))
    assert sent[1] < 0.56 * sent[0], sent


def test_bias(space):
    """One or two, added in float32 to what combine gives without."""
    made, counts = buffers(), COUNTS["ragged"]

    def body(rank):
        x, idx, weights = tokens(rank, counts[rank])
        bias = [tokens(rank + 10 * i, counts[rank])[0] for i in (1, 2)]
        _, _, to_expert, in_rank, _ = made[rank].get_dispatch_layout(space.array(idx), EXPERTS)
        recv, _, _, _, handle, _ = made[rank].dispatch(
            space.bf16(x), is_token_in_rank=in_rank, num_tokens_per_expert=to_expert)
        plain = as_bf16(as_float(x) * space.plain(in_rank).sum(1).astype(np.float32)[:, None] + 0)
        for given, total in (
            (space.bf16(bias[0]), as_float(bias[0])),
            ((space.bf16(bias[0]),), as_float(bias[0])),
            (tuple(map(space.bf16, bias)), as_float(bias[0]) + as_float(bias[1])),
        ):
            y, _, _ = made[rank].combine(recv, handle, bias=given)
            assert np.array_equal(space.bits(y), as_bf16(as_float(plain) + total))

    on_every_rank(RANKS, body)


def test_refusals(space):
    buffer = buffers(1)[0]
    x, idx, _ = tokens(0, 4)
    _, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(space.array(idx), EXPERTS)
    codes, scale = sluice.quantize(sluice.Backend(num_threads=1), x)

    def refused(text, *rows):
        with pytest.raises(sluice.Error, match=text) as caught:
            buffer.dispatch(rows if len(rows) > 1 else rows[0], is_token_in_rank=in_rank,
                            num_tokens_per_expert=to_expert)
        assert caught.value.code == "invalid_argument"

    refused("x: expected dtype bfloat16.* got uint8", space.array(codes))
    refused("x: expected dtype .*e4m3.* got (bfloat16|uint16)", space.bf16(x), space.array(scale))
    refused(r"x\[1\]: expected shape \[4, hidden / 128 or less\], got \[3, 4\]", space.array(codes),
            space.array(scale[:3]))
    refused(r"x\[1\]: 5 scales for a token of 512, expected 1 .. 4", space.array(codes),
            space.array(np.zeros((4, 5), np.float32)))
    refused(r"x\[1\]: expected dtype float32 or int32, got float64", space.array(codes),
            space.array(scale.astype(np.float64)))
    refused(r"is_token_in_rank: expected shape \[3, 1\]", space.bf16(x[:3]))


def test_ranks_that_differ_are_told(space):
    made = buffers(2)

    def body(rank):
        x, idx, _ = tokens(rank, 4)
        _, _, to_expert, in_rank, _ = made[rank].get_dispatch_layout(space.array(idx), EXPERTS)
        rows = space.bf16(x)
        if rank == 1:
            codes, scale = sluice.quantize(sluice.Backend(num_threads=1), x)
            rows = space.array(codes), space.array(scale)
        with pytest.raises(sluice.Error, match=r"ranks differ in scales of a token \(0: bf16\): \[0, 4\]"):
            made[rank].dispatch(rows, is_token_in_rank=in_rank, num_tokens_per_expert=to_expert)

    on_every_rank(2, body)
