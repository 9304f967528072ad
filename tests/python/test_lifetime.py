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


def test_a_backend_synchronizes(backend):
    backend.synchronize()
    backend.synchronize(stream=None)
    backend.synchronize(0)


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
    transports, backend = sluice.Transport.inproc(2), sluice.Backend(num_threads=1)

    def make(rank, backend):
        return sluice.Engine(checkpoint, transports[rank], backend, layer=LAYER, max_tokens_per_rank=1,
                             timeout_ms=20000)

    engines, called = [], threading.Event()

    def wait():
        called.set()
        engines.append(make(0, backend))

    thread = threading.Thread(target=wait)
    thread.start()
    called.wait()
    time.sleep(0.2)  # Until it is inside.
    assert not engines
    # Meanwhile neither of the two serves anybody else.
    with pytest.raises(sluice.Error, match="backend: in use by another thread"):
        backend.measure_read_bandwidth()
    engines.append(make(1, sluice.Backend(num_threads=1)))
    thread.join()
    assert len(engines) == 2
    assert backend.measure_read_bandwidth() > 0


def waits_without_the_lock(call, peer):
    """Returns what `call` returns. It waits for what `peer` does in another thread, and that thread has
    run for a while before. With the interpreter's lock held the thread would not run, and `call` would
    end with its timeout."""
    ticks, failures = [0], []

    def other():
        for _ in range(20):
            time.sleep(0.002)
            ticks[0] += 1
        try:
            peer()
        except Exception as failure:  # noqa: BLE001 - raised below
            failures.append(failure)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        result = call()
        assert ticks[0] == 20, "the call did not wait"
    finally:
        thread.join()
    assert not failures, failures
    return result


def test_every_call_that_waits_releases_the_lock(checkpoint, geometry):
    x, idx, weights = sluice.make_workload(geometry, 2)
    routing, sizes = sluice.Routing(idx, weights), {"num_experts": geometry.num_experts,
                                                    "num_topk": geometry.num_topk, "hidden": geometry.hidden}

    def exchanges():
        transports = sluice.Transport.inproc(2)
        return on_every_rank(2, lambda rank: sluice.Exchange(
            transports[rank], sluice.Backend(num_threads=1), max_tokens_per_rank=2, timeout_ms=20000, wire="bf16",
            **sizes))

    def waits(call, ranks):
        return waits_without_the_lock(lambda: call(ranks[0]), lambda: call(ranks[1]))

    waits(lambda transport: transport.all_gather(b"x", timeout_ms=20000), sluice.Transport.inproc(2))
    waits(lambda exchange: sluice.dispatch(exchange, x, routing), exchanges())
    waits(lambda exchange: exchange.dispatch_send(x, routing), exchanges())
    ranks = exchanges()
    there = on_every_rank(2, lambda rank: sluice.dispatch(ranks[rank], x, routing))
    rows = np.ascontiguousarray(there[0].batch.x)
    waits(lambda dispatched: sluice.combine(dispatched, rows), there)
    ranks = exchanges()
    there = on_every_rank(2, lambda rank: sluice.dispatch(ranks[rank], x, routing))
    there[0].combine_send(rows)
    waits_without_the_lock(there[0].combine_receive, lambda: there[1].combine_send(rows))
    there[1].combine_receive()
    transports = sluice.Transport.inproc(2)
    engines = on_every_rank(2, lambda rank: sluice.Engine(
        checkpoint, transports[rank], sluice.Backend(num_threads=1), layer=LAYER, max_tokens_per_rank=2,
        timeout_ms=20000))
    for mode in MODES:
        waits(lambda engine: sluice.moe_forward(engine, x, routing, mode=mode), engines)
    waits(lambda rank: sluice.Transport.ipc("lock", secret="of this test alone", rank=rank, num_ranks=2, timeout_ms=20000), (0, 1))


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
