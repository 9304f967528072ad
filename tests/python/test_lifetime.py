"""Who keeps what alive, who may call when, and that nothing grows."""

import gc
import os
import threading
import time

import numpy as np
import pytest
from conftest import LAYER, MODES, on_every_rank, one_rank_engine

import sluice


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_exchange(geometry, **options):
    return sluice.Exchange(
        sluice.Transport.inproc(1)[0],
        sluice.Backend(num_threads=1),
        num_experts=geometry.num_experts,
        num_topk=geometry.num_topk,
        hidden=geometry.hidden,
        max_tokens_per_rank=8,
        **options,
    )


def test_an_engine_keeps_transport_and_backend(checkpoint, geometry):
    engine = one_rank_engine(checkpoint, sluice.Backend(num_threads=1))
    gc.collect()
    x, idx, weights = sluice.make_workload(geometry, 4)
    routing = sluice.Routing(idx.copy(), weights.copy())
    gc.collect()
    assert np.any(sluice.moe_forward(engine, x, routing, mode="low-latency"))


def test_a_dispatched_keeps_exchange_and_routing(geometry):
    x, idx, weights = sluice.make_workload(geometry, 4)
    dispatched = sluice.dispatch(make_exchange(geometry, wire="bf16"), x, sluice.Routing(idx, weights))
    rows = np.ascontiguousarray(dispatched.batch.x)
    del idx, weights
    gc.collect()
    np.empty(1 << 16)  # Something to lie where they lay.
    assert np.any(sluice.combine(dispatched, rows))


def test_arrays_of_a_batch_outlive_everything(geometry):
    x, idx, weights = sluice.make_workload(geometry, 4)
    dispatched = sluice.dispatch(make_exchange(geometry), x, sluice.Routing(idx, weights))
    batch = dispatched.batch
    x_before, rows_before = batch.x.copy(), batch.num_rows.copy()
    x_view, num_rows = batch.x, batch.num_rows
    assert not x_view.flags.writeable
    del dispatched, batch
    gc.collect()
    assert np.array_equal(x_view, x_before) and np.array_equal(num_rows, rows_before)


def test_a_dropped_dispatched_returns_its_slot(geometry):
    exchange = make_exchange(geometry, num_in_flight=1)
    x, idx, weights = sluice.make_workload(geometry, 4)
    routing = sluice.Routing(idx, weights)
    for _ in range(5):
        dispatched = sluice.dispatch(exchange, x, routing)
        assert sum(dispatched.batch.num_rows) == idx.size
        del dispatched
    kept = sluice.dispatch(exchange, x, routing)
    with pytest.raises(sluice.Error, match="flight"):
        sluice.dispatch(exchange, x, routing)
    del kept


def test_matrices_outlive_their_weights(checkpoint):
    codes, scales = checkpoint.load_experts(LAYER, 0, 1).matrix(0, "gate")
    gc.collect()
    assert codes.shape == (128, 128) and np.all(scales > 0)


def test_weights_keep_their_arrays(checkpoint, backend):
    original = checkpoint.load_experts(LAYER, 0, 2)
    stacked = [
        tuple(np.stack([original.matrix(e, name)[i] for e in range(2)]) for i in (0, 1))
        for name in ("gate", "up", "down")
    ]
    weights = sluice.ExpertWeights.from_arrays(*stacked)
    del stacked
    gc.collect()
    x = np.full((2, 4, 256), 0x3F80, np.uint16)
    batch = sluice.ExpertBatch(x, np.array([4, 3], np.int32))
    recipe = sluice.Recipe("direct-bf16")
    results = [
        sluice.experts_masked(sluice.repack(w, backend, max_rows=8), batch, recipe, out=np.zeros_like(x))
        for w in (original, weights)
    ]
    assert np.array_equal(*results) and np.any(results[0])
    assert not np.any(results[0][1, 3])


def test_other_threads_run_while_a_call_waits(checkpoint):
    """A rank that waits for a peer holds no lock of the interpreter."""
    transport, backend = sluice.Transport.inproc(2)[0], sluice.Backend(num_threads=1)
    failures = []

    def wait():
        try:
            sluice.Engine(checkpoint, transport, backend, layer=LAYER, max_tokens_per_rank=1, timeout_ms=1000)
        except sluice.Error as error:
            failures.append(error.code)

    thread = threading.Thread(target=wait)
    start = time.monotonic()
    thread.start()
    time.sleep(0.05)
    assert time.monotonic() - start < 0.5
    # Meanwhile neither of the two serves anybody else.
    with pytest.raises(sluice.Error, match="backend: in use by another thread"):
        backend.measure_read_bandwidth()
    thread.join()
    assert failures == ["peer_timeout"]
    assert backend.measure_read_bandwidth() > 0


def waits_without_the_lock(call, *arguments, **options):
    """A call that waits for a rank in vain; meanwhile another thread runs on and on."""
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.wait(0.002):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        with pytest.raises(sluice.Error) as caught:
            call(*arguments, **options)
    finally:
        stop.set()
        thread.join()
    assert caught.value.code == "peer_timeout" and ticks[0] > 20, (caught.value, ticks)


def test_every_call_that_waits_releases_the_lock(checkpoint, geometry):
    x, idx, weights = sluice.make_workload(geometry, 2)
    routing, sizes = sluice.Routing(idx, weights), {"num_experts": geometry.num_experts,
                                                    "num_topk": geometry.num_topk, "hidden": geometry.hidden}

    def made(kind):
        """Of rank 0 of two; the other one is there while it is made."""
        transports = sluice.Transport.inproc(2)
        if kind == "exchange":
            make = lambda t: sluice.Exchange(  # noqa: E731
                t, sluice.Backend(num_threads=1), max_tokens_per_rank=2, timeout_ms=500, wire="bf16", **sizes)
        else:
            make = lambda t: sluice.Engine(  # noqa: E731
                checkpoint, t, sluice.Backend(num_threads=1), layer=LAYER, max_tokens_per_rank=2, timeout_ms=500)
        return on_every_rank(2, lambda rank: make(transports[rank]))

    transport = sluice.Transport.inproc(2)[0]
    waits_without_the_lock(transport.all_gather, b"x", timeout_ms=500)
    waits_without_the_lock(sluice.dispatch, made("exchange")[0], x, routing)
    waits_without_the_lock(made("exchange")[0].dispatch_send, x, routing)
    exchanges = made("exchange")
    there = on_every_rank(2, lambda rank: sluice.dispatch(exchanges[rank], x, routing))
    rows = np.ascontiguousarray(there[0].batch.x)
    waits_without_the_lock(sluice.combine, there[0], rows)
    exchanges = made("exchange")
    there = on_every_rank(2, lambda rank: sluice.dispatch(exchanges[rank], x, routing))
    there[0].combine_send(rows)
    waits_without_the_lock(there[0].combine_receive)
    for mode in MODES:
        waits_without_the_lock(sluice.moe_forward, made("engine")[0], x, routing, mode=mode)
    waits_without_the_lock(sluice.Transport.ipc, "lock", secret="s", rank=0, num_ranks=2, timeout_ms=500)


def growth(body, calls):
    """Bytes that `calls` calls add after a warm-up of as many."""
    for _ in range(calls):
        body()
    gc.collect()
    before = resident_bytes()
    for _ in range(calls):
        body()
    gc.collect()
    return resident_bytes() - before


def test_ten_thousand_calls_do_not_grow(checkpoint, backend, geometry):
    x, idx, weights = sluice.make_workload(geometry, 1)
    engine = one_rank_engine(checkpoint, backend)
    exchange = make_exchange(geometry)
    rows = np.zeros((geometry.num_experts, exchange.max_m, geometry.hidden), np.uint16)

    def body():
        routing = sluice.Routing(idx, weights)
        sluice.moe_forward(engine, x, routing, mode="low-latency")
        dispatched = sluice.dispatch(exchange, x, routing)
        assert dispatched.batch.x_scale is not None
        sluice.combine(dispatched, rows)
        sluice.quantize(backend, x)
        try:
            sluice.moe_forward(engine, rows, routing, mode="low-latency")
        except sluice.Error:
            pass

    grown = growth(body, 5000)
    print(f"\n10,000 calls: {grown} bytes more at the end than in the middle")
    assert grown < 1 << 20


def test_compatible_calls_do_not_grow(checkpoint, backend, geometry):
    """DeepEP's calls and W4A8 experts; handles that nobody combines among them."""
    from sluice.compat.deep_ep import Buffer
    from sluice.compat.w4a8 import W4A8Experts

    weights = checkpoint.load_experts(LAYER, 0, geometry.num_experts)
    gate, up, down = (
        [np.stack(a) for a in zip(*(weights.matrix(e, name) for e in range(len(weights))))]
        for name in ("gate", "up", "down")
    )
    packed = np.concatenate([gate[0], up[0]], 1), np.concatenate([gate[1], up[1]], 1), *down
    experts = W4A8Experts(*packed, backend=backend)
    buffer = Buffer(sluice.Transport.inproc(1)[0], backend=backend)
    x, idx, w = sluice.make_workload(geometry, 2)

    def body():
        for _ in range(2):
            (codes, scale), count, handle, _, hook = buffer.low_latency_dispatch(
                x, idx, 4, geometry.num_experts, return_recv_hook=True)
            hook()
        rows = experts.masked(codes, scale, count)
        buffer.low_latency_combine(rows, idx, w, handle)
        _, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(idx, geometry.num_experts)
        rows, local, weight, _, handle, _ = buffer.dispatch(
            x, is_token_in_rank=in_rank, num_tokens_per_expert=to_expert, topk_idx=idx, topk_weights=w)
        buffer.combine(experts.grouped(rows, None, local, weight), handle)

    assert growth(body, 5000) < 1 << 20


def test_making_and_dropping_does_not_grow(checkpoint, geometry):
    def body():
        engine = one_rank_engine(checkpoint, sluice.Backend(num_threads=1))
        x, idx, weights = sluice.make_workload(geometry, 1)
        sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode="normal")

    assert growth(body, 50) < 4 << 20
