"""What a call costs the host on a GPU: queued without waiting, and above the C++ call inside it."""

import statistics
import time

import numpy as np
import pytest
from conftest import LAYER, one_rank_engine
from spaces import Torch

import sluice

torch = pytest.importorskip("torch", reason="torch is not installed")
from test_torch_cuda import TOKENS, workload  # noqa: E402 Imports torch.


@pytest.fixture(scope="module")
def space():
    return Torch("cuda")


def test_local_call_costs_the_host_little(gpu, space, checkpoint, geometry):
    """Above nothing: the whole call, queued without waiting."""
    local = sluice.LocalExperts(checkpoint.load_experts(LAYER, 0, geometry.num_experts), gpu,
                                max_entries=geometry.num_topk)
    x, idx, w = workload(geometry, space)
    x, idx, w = x[:1].contiguous(), idx[:1].contiguous(), w[:1].contiguous()
    out, routing = torch.empty_like(x), sluice.Routing(idx, w)

    def cost():
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            local.forward(x, routing, out=out)
        return (time.perf_counter() - begin) / 20 * 1e6

    cost()
    median = min(statistics.median(cost() for _ in range(20)) for _ in range(3))
    print(f"\nhost time of a local call: {median:.1f} us")
    assert median < 30  # The aim is 15; others may share the host.


def test_a_call_on_other_memory_costs_the_host_little(gpu, space, checkpoint, geometry):
    """Nothing of what was prepared for a call is lost because the next one has other memory."""
    local = sluice.LocalExperts(checkpoint.load_experts(LAYER, 0, geometry.num_experts), gpu,
                                max_entries=4 * geometry.num_topk)
    x, idx, w = workload(geometry, space, tokens=43)
    calls = [[a[i:i + 4].clone() for a in (x, idx, w)] for i in range(40)]
    expected = [space.bits(local.forward(x, sluice.Routing(idx, w))) for x, idx, w in calls]
    assert not np.array_equal(expected[0], expected[-1])
    outs = [torch.empty_like(x) for x, _, _ in calls]

    def cost():
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for (x, idx, w), out in zip(calls, outs):
            local.forward_topk(x, idx, w, out=out)
        return (time.perf_counter() - begin) / len(calls) * 1e6

    cost()
    median = min(statistics.median(cost() for _ in range(20)) for _ in range(3))
    assert all(np.array_equal(space.bits(out), bits) for out, bits in zip(outs, expected))
    print(f"\nhost time of a local call on other memory: {median:.1f} us")
    assert median < 15


def test_what_the_call_costs_the_host(gpu, space, checkpoint, geometry):
    """moe_forward() at one token, less the C++ call inside it: at most 15 us at the median."""
    engine = one_rank_engine(checkpoint, gpu, TOKENS)
    x, idx, weights = workload(geometry, space, tokens=1)
    engine.record_stats()

    def cost(**options):
        begin = time.perf_counter()
        sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode="low-latency", **options)
        return (time.perf_counter() - begin) * 1e6 - sluice.stats(engine)["times"]["total_us"]

    for options in ({}, {"out": torch.empty_like(x)}):
        median = statistics.median(cost(**options) for _ in range(500))
        print(f"\nhost time above the C++ call: {median:.1f} us {'with out=' if options else ''}")
        assert median < 15
