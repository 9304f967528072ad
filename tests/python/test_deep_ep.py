"""sluice.compat.deep_ep over ranks as threads: every element of every result, for numpy and torch."""

import threading
import time

import numpy as np
import pytest
from conftest import on_every_rank
from deep_ep_workload import (
    CAPACITY, COUNTS, EXPERTS, HIDDEN, LOCAL, RANKS, buffers, expected_rows, expected_sum, run_experts, tokens,
)

import sluice
from sluice.compat.deep_ep import EventOverlap


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("hook", [False, True], ids=["", "hook"])
def test_bf16_and_combine(space, counts, hook):
    made = buffers()

    def body(rank):
        x, idx, weights = tokens(rank, counts[rank])
        for _ in range(3):
            recv, count, handle, event, received = made[rank].low_latency_dispatch(
                space.bf16(x), space.array(idx), CAPACITY, EXPERTS, use_fp8=False, return_recv_hook=hook
            )
            assert isinstance(event, EventOverlap) and (received is None) == (not hook)
            if hook:
                received()
            rows = space.bits(recv)
            assert rows.shape == (LOCAL, RANKS * CAPACITY, HIDDEN)
            for e, wanted in enumerate(expected_rows(rank, counts)):
                assert space.plain(count)[e] == len(wanted)
                assert np.array_equal(rows[e, : len(wanted)], wanted)
            y = space.bf16(run_experts(rows, rank))
            out = space.bf16(np.full(x.shape, 7, np.uint16))
            combined, _, landed = made[rank].low_latency_combine(
                y, space.array(idx), space.array(weights), handle, return_recv_hook=hook, out=out
            )
            if hook:
                landed()
            assert combined is out
            assert np.array_equal(space.bits(combined), expected_sum(x, idx, weights))

    on_every_rank(RANKS, body)


@pytest.mark.parametrize("pow2", [False, True], ids=["", "pow2"])
@pytest.mark.parametrize("ue8m0", [False, True], ids=["", "ue8m0"])
def test_fp8(space, pow2, ue8m0):
    if ue8m0 and not pow2:
        with pytest.raises(sluice.Error, match="use_ue8m0"):
            buffers(1)[0].low_latency_dispatch(
                space.bf16(np.zeros((1, HIDDEN), np.uint16)), space.array(np.zeros((1, 1), np.int64)),
                CAPACITY, EXPERTS, use_ue8m0=True)
        return
    counts, made = COUNTS["ragged"], buffers()

    def body(rank):
        x, idx, _ = tokens(rank, counts[rank])
        stats = space.array(np.zeros(LOCAL, np.int32))
        (codes, scale), count, _, _, _ = made[rank].low_latency_dispatch(
            space.bf16(x), space.array(idx), CAPACITY, EXPERTS, stats, round_scale=pow2, use_ue8m0=ue8m0
        )
        assert np.array_equal(space.plain(stats), space.plain(count))
        assert tuple(codes.shape) == (LOCAL, RANKS * CAPACITY, HIDDEN)
        columns = HIDDEN // (512 if ue8m0 else 128)
        assert tuple(scale.shape) == (LOCAL, RANKS * CAPACITY, columns)
        # Rows densest: what a GEMM loads scales with.
        plain = space.plain(scale)
        assert columns == 1 or plain.strides[1] == plain.itemsize
        for e, wanted in enumerate(expected_rows(rank, counts)):
            q, s = sluice.quantize(sluice.Backend(num_threads=1), wanted, pow2=pow2)
            if ue8m0:
                s = (s.view(np.int32) >> 23).astype(np.uint8).view(np.int32)
            assert np.array_equal(space.bits(codes)[e, : len(wanted)], q)
            assert np.array_equal(plain[e, : len(wanted)], s)

    on_every_rank(RANKS, body)


def test_zero_copy_second_combine_and_many_in_flight(space):
    made, counts = buffers(), COUNTS["ragged"]

    def body(rank):
        buffer, (x, idx, weights) = made[rank], tokens(rank, counts[rank])
        arguments = space.bf16(x), space.array(idx), CAPACITY, EXPERTS
        flights = [buffer.low_latency_dispatch(*arguments, use_fp8=False) for _ in range(4)]
        rows = run_experts(space.bits(flights[0][0]), rank)
        # The first two have had to make room; combining twice routes again, too.
        for recv, _, handle, _, _ in (*flights, flights[0], flights[3]):
            target = buffer.get_next_low_latency_combine_buffer(handle)
            assert tuple(target.shape) == tuple(recv.shape)
            space.bits(target)[...] = rows
            y, _, _ = buffer.low_latency_combine(
                None, arguments[1], space.array(weights), handle, zero_copy=True
            )
            assert np.array_equal(space.bits(y), expected_sum(x, idx, weights))
        assert len(handle) == 5 and list(handle)[2:] == [CAPACITY, HIDDEN, EXPERTS]
        late = [buffer.low_latency_dispatch(*arguments, return_recv_hook=True) for _ in range(3)]
        with pytest.raises(sluice.Error, match="later dispatches have taken the place"):
            late[0][4]()
        late[1][4](), late[2][4](), late[2][4]()
        rows = space.bf16(np.zeros(tuple(late[2][0][0].shape), np.uint16))
        _, _, landed = buffer.low_latency_combine(
            rows, arguments[1], space.array(weights), late[2][2], return_recv_hook=True)
        landed(), landed()
        sent = [buffer.low_latency_dispatch(*arguments) for _ in range(1)]
        _, _, landed = buffer.low_latency_combine(
            rows, arguments[1], space.array(weights), sent[0][2], return_recv_hook=True)
        sent += [buffer.low_latency_dispatch(*arguments) for _ in range(2)]
        with pytest.raises(sluice.Error, match="later dispatches have taken the place"):
            landed()

    on_every_rank(RANKS, body)


@pytest.mark.parametrize("hidden, topk, experts", [(128, 1, 4), (384, 32, 64), (3584, 8, 16)])
def test_sizes(space, hidden, topk, experts):
    """Any hidden multiple of 128, up to 32 top-k entries, one rank or several, capacities that are tiny."""
    for num_ranks, capacity in ((1, 1), (2, 3)):
        made, counts = buffers(num_ranks), [capacity] * num_ranks
        shape = {"hidden": hidden, "topk": topk, "experts": experts}

        def body(rank, made=made, counts=counts, capacity=capacity, num_local=experts // num_ranks):
            x, idx, weights = tokens(rank, counts[rank], **shape)
            recv, count, handle, _, _ = made[rank].low_latency_dispatch(
                space.bf16(x), space.array(idx), capacity, experts, use_fp8=False)
            for e, wanted in enumerate(expected_rows(rank, counts, **shape)):
                assert np.array_equal(space.bits(recv)[e, : space.plain(count)[e]], wanted)
            rows = space.bf16(run_experts(space.bits(recv), rank, 0.5, num_local=num_local))
            y, _, _ = made[rank].low_latency_combine(rows, space.array(idx), space.array(weights), handle)
            assert np.array_equal(space.bits(y), expected_sum(x, idx, weights, 0.5))

        on_every_rank(num_ranks, body)


def test_more_than_1024_tokens(space):
    buffer, num = buffers(1)[0], 1500
    x, idx, weights = tokens(0, num, hidden=128)
    recv, count, handle, _, _ = buffer.low_latency_dispatch(
        space.bf16(x), space.array(idx), num, EXPERTS, use_fp8=False)
    assert space.plain(count).sum() == (idx >= 0).sum()
    y, _, _ = buffer.low_latency_combine(
        space.bf16(run_experts(space.bits(recv), 0, 1.0, num_local=EXPERTS)), space.array(idx),
        space.array(weights), handle)
    assert np.array_equal(space.bits(y), expected_sum(x, idx, weights, 1.0))


@pytest.mark.parametrize("hook", [False, True], ids=["", "hook"])
def test_entries_left_out_of_the_sum(space, hook):
    """-1 where an expert was dispatched, as DeepEP's combine leaves it out; any other number is refused."""
    made, counts = buffers(), COUNTS["ragged"]

    def body(rank):
        buffer, (x, idx, weights) = made[rank], tokens(rank, counts[rank])
        left = idx.copy()
        left[::2, 0] = -1
        expected = expected_sum(x, idx, np.where(left < 0, np.float32(0), weights))
        all_of_it = expected_sum(x, idx, weights)
        assert len(x) == 0 or not np.array_equal(expected, all_of_it)
        for shown in (left.astype(np.int64), left.astype(np.int32)):
            recv, _, handle, _, received = buffer.low_latency_dispatch(
                space.bf16(x), space.array(idx), CAPACITY, EXPERTS, use_fp8=False, return_recv_hook=hook)
            if hook:
                with pytest.raises(sluice.Error, match="handle: the hook of its dispatch was not called"):
                    buffer.low_latency_combine(recv, space.array(idx), space.array(weights), handle)
                received()
            y = space.bf16(run_experts(space.bits(recv), rank))
            if (rows := np.flatnonzero(idx[:, 1] >= 0)).size:
                token, other = rows[0], idx.copy()
                other[token, 1] = (idx[token, 1] + 1) % EXPERTS
                text = rf"topk_idx: \[{token}, 1\] is {other[token, 1]}, dispatched was {idx[token, 1]}: expected"
                with pytest.raises(sluice.Error, match=text):
                    buffer.low_latency_combine(y, space.array(other), space.array(weights), handle)
            nan = np.where(left < 0, np.float32("nan"), weights)  # A weight that nobody reads.
            combined, _, _ = buffer.low_latency_combine(y, space.array(shown), space.array(nan), handle)
            assert np.array_equal(space.bits(combined), expected)
            again, _, _ = buffer.low_latency_combine(y, space.array(idx), space.array(weights), handle)
            assert np.array_equal(space.bits(again), all_of_it)

    on_every_rank(RANKS, body)


@pytest.mark.parametrize("hook", [False, True], ids=["", "hook"])
def test_waits_are_counted_for_each_rank(space, hook):
    """A rank that comes late is the one that the others' numbers show; they add up over calls."""
    made, late, pause = buffers(), 2, 0.15

    def body(rank):
        x, idx, weights = tokens(rank, 3)
        x, idx, weights = space.bf16(x), space.array(idx), space.array(weights)
        buffer, shown = made[rank], []
        waits = [space.array(np.zeros(RANKS, np.int64)) for _ in range(2)]
        buffer.low_latency_dispatch(x, idx, CAPACITY, EXPERTS, use_fp8=False)  # Makes the exchange.
        for _ in range(2):
            if rank == late:
                time.sleep(pause)
            recv, _, handle, _, received = buffer.low_latency_dispatch(
                x, idx, CAPACITY, EXPERTS, dispatch_wait_recv_cost_stats=waits[0], use_fp8=False,
                return_recv_hook=hook)
            if hook:
                received()
            if rank == late:
                time.sleep(pause)
            _, _, landed = buffer.low_latency_combine(
                recv, idx, weights, handle, return_recv_hook=hook, combine_wait_recv_cost_stats=waits[1])
            if hook:
                landed()
            shown.append(np.stack([space.plain(w) for w in waits]).copy())
        return shown

    for rank, (first, both) in enumerate(on_every_rank(RANKS, body)):
        assert (both >= first).all() and (first >= 0).all()
        if rank != late:
            assert (both[:, late] > 2 * 0.8e9 * pause).all(), (rank, both)
            assert (both.sum(1) - both[:, late] < 0.5e9 * pause).all(), (rank, both)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_handle_tells_where_rows_came_from(space, counts):
    made = buffers()

    def body(rank):
        x, idx, weights = tokens(rank, counts[rank])
        given = space.array(idx)
        _, count, handle, _, _ = made[rank].low_latency_dispatch(space.bf16(x), given, CAPACITY, EXPERTS)
        source_token, ranges, capacity, hidden, experts = handle
        assert (capacity, hidden, experts) == (CAPACITY, HIDDEN, EXPERTS)
        assert handle[0] is source_token and handle[-4] is ranges  # Exchanged once.
        source_token, ranges = space.plain(source_token), space.plain(ranges)
        assert source_token.dtype == np.int32 and source_token.shape == (LOCAL, RANKS * CAPACITY)
        assert ranges.dtype == np.int64 and ranges.shape == (LOCAL, RANKS)
        for e in range(LOCAL):
            begin = 0
            for source in range(RANKS):
                _, theirs, _ = tokens(source, counts[source])
                chosen = np.argwhere(theirs == rank * LOCAL + e)[:, 0]
                assert ranges[e, source] == begin << 32 | len(chosen)
                assert np.array_equal(source_token[e, begin : begin + len(chosen)], chosen)
                begin += len(chosen)
            assert begin == space.plain(count)[e] and (source_token[e, begin:] == -1).all()

    on_every_rank(RANKS, body)


def test_a_missing_rank_is_named_and_the_buffer_starts_anew(space, monkeypatch):
    made = buffers()
    first, second = threading.Barrier(RANKS), threading.Barrier(RANKS)

    def body(rank):
        buffer = made[rank]
        x, idx, weights = tokens(rank, 2)
        x, idx, weights = space.bf16(x), space.array(idx), space.array(weights)
        status = space.array(np.full(RANKS, 7, np.int32))

        def layer():
            (rows, scales), _, handle, _, hook = buffer.low_latency_dispatch(
                x, idx, CAPACITY, EXPERTS, return_recv_hook=True)
            hook()
            rows = space.bf16(np.zeros(tuple(rows.shape), np.uint16))
            buffer.low_latency_combine(rows, idx, weights, handle)

        layer()
        buffer.low_latency_query_mask_buffer(status)
        assert not space.plain(status).any()
        if rank != 2:
            for code in ("peer_timeout", "transport"):  # And the second time at once.
                with pytest.raises(sluice.Error, match=r"missing rank\(s\) 2") as caught:
                    layer()
                assert caught.value.code == code and caught.value.ranks == (2,)
                assert ("this buffer ended earlier" in str(caught.value)) == (code == "transport")
            buffer.low_latency_query_mask_buffer(status)
            assert space.plain(status).tolist() == [0, 0, 1, 0]
        first.wait()
        buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_query_mask_buffer(status)
        assert not space.plain(status).any()
        second.wait()
        layer()

    monkeypatch.setenv("SLUICE_TIMEOUT_MS", "500")
    on_every_rank(RANKS, body)
