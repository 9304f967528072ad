"""What a call costs the host above the C++ call inside it, at one token on the CPU.

test_overhead_cuda.py has the same on a GPU. python/examples/torch_compare.py prints it.
"""

import statistics
import time

import numpy as np
from conftest import one_rank_engine

import sluice

MOST_US = 15


def test_moe_forward(space, checkpoint, geometry, backend):
    """Routing and result made anew in each call, and with what the caller keeps."""
    engine = one_rank_engine(checkpoint, backend, 1)
    x, idx, weights = sluice.make_workload(geometry, 1)
    x, idx, weights = space.bf16(x), space.array(idx), space.array(weights)
    out = space.bf16(np.zeros(tuple(x.shape), np.uint16))
    routing = sluice.Routing(idx, weights)
    engine.record_stats()

    def anew():
        sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode="low-latency")

    def kept():
        sluice.moe_forward(engine, x, routing, mode="low-latency", out=out)

    def cost(call):
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e6 - sluice.stats(engine)["times"]["total_us"]

    for call in (anew, kept):
        for _ in range(100):
            cost(call)
        # Of several medians the least: others share this machine.
        median = min(statistics.median(cost(call) for _ in range(200)) for _ in range(5))
        print(f"\nhost time above the C++ call, {call.__name__}: {median:.1f} us")
        assert median < MOST_US
