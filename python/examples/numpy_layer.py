"""One MoE layer over four ranks, each a thread of this process, with numpy on the CPU.

    python python/examples/numpy_layer.py

Makes a small synthetic checkpoint, runs the layer in both modes and checks that they agree.
"""

import tempfile
import threading

import numpy as np

import sluice

RANKS, TOKENS, LAYER = 4, 16, 3


def run_rank(rank, transport, checkpoint, results):
    backend = sluice.Backend("cpu", local_rank=rank, num_local_ranks=RANKS)
    engine = sluice.Engine(
        checkpoint, transport, backend, layer=LAYER, max_tokens_per_rank=TOKENS
    )
    # What a model would have: tokens and the router's choice for them.
    x, topk_idx, topk_weights = sluice.make_workload(
        checkpoint.geometry, TOKENS, first_token=rank * TOKENS
    )
    routing = sluice.Routing(topk_idx, topk_weights)
    engine.record_stats()
    y = np.empty_like(x)
    sluice.moe_forward(engine, x, routing, mode="low-latency", out=y)
    same = np.array_equal(y, sluice.moe_forward(engine, x, routing, mode="normal"))
    results[rank] = (same, sluice.stats(engine))


def main():
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = sluice.make_checkpoint(f"{folder}/model", sluice.ModelGeometry.preset("tiny"))
        print(checkpoint.geometry)
        transports = sluice.Transport.inproc(RANKS)
        results = [None] * RANKS
        threads = [
            threading.Thread(target=run_rank, args=(r, transports[r], checkpoint, results))
            for r in range(RANKS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for rank, result in enumerate(results):
        if result is None:
            raise SystemExit(f"rank {rank} failed")
        same, stats = result
        print(f"rank {rank}: rows per expert {stats['rows_per_expert']}, "
              f"{stats['times']['total_us']:.0f} us, both modes {'agree' if same else 'DIFFER'}")
    raise SystemExit(0 if all(same for same, _ in results) else 1)


if __name__ == "__main__":
    main()
