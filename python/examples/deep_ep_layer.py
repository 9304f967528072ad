"""A layer made of DeepEP's calls and W4A8 experts, as an inference engine would write it.

    python python/examples/deep_ep_layer.py          # four ranks as threads, numpy

The same lines serve tensors of torch; then `Buffer` takes a ProcessGroup instead of a transport.
"""

import tempfile
import threading

import numpy as np

import sluice
from sluice.compat.deep_ep import Buffer
from sluice.compat.w4a8 import w4a8_moe_masked

RANKS, TOKENS, LAYER = 4, 8, 3


def local_weights(checkpoint, rank):
    """w13, w13_scale, w2, w2_scale of this rank's experts."""
    num_local = checkpoint.geometry.num_experts // RANKS
    weights = checkpoint.load_experts(LAYER, rank * num_local, num_local)

    def stack(name):
        pairs = [weights.matrix(e, name) for e in range(num_local)]
        return np.stack([codes for codes, _ in pairs]), np.stack([scales for _, scales in pairs])

    gate, up, down = stack("gate"), stack("up"), stack("down")
    return np.concatenate([gate[0], up[0]], 1), np.concatenate([gate[1], up[1]], 1), *down


def run_rank(rank, transport, checkpoint, results):
    geometry = checkpoint.geometry
    buffer = Buffer(transport, low_latency_mode=True)
    weights = local_weights(checkpoint, rank)
    backend = sluice.Backend("cpu", local_rank=rank, num_local_ranks=RANKS)
    x, topk_idx, topk_weights = sluice.make_workload(geometry, TOKENS, first_token=rank * TOKENS)
    topk_idx = topk_idx.astype(np.int64)

    (rows, scales), count, handle, _, hook = buffer.low_latency_dispatch(
        x, topk_idx, TOKENS, geometry.num_experts, use_fp8=True, return_recv_hook=True
    )
    hook()  # Whatever is done before this overlaps the transfer.
    expert_y = w4a8_moe_masked(rows, scales, count, *weights, backend=backend)
    y, _, _ = buffer.low_latency_combine(expert_y, topk_idx, topk_weights, handle)
    results[rank] = (y, count)


def main():
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = sluice.make_checkpoint(f"{folder}/model", sluice.ModelGeometry.preset("tiny"))
        results = [None] * RANKS
        threads = [
            threading.Thread(target=run_rank, args=(r, transport, checkpoint, results))
            for r, transport in enumerate(sluice.Transport.inproc(RANKS))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if None in results:
            raise SystemExit("a rank failed")
        # One engine of one rank over all tokens must give the same bytes.
        engine = sluice.Engine(
            checkpoint, sluice.Transport.inproc(1)[0], sluice.Backend("cpu"), layer=LAYER,
            max_tokens_per_rank=RANKS * TOKENS,
        )
        x, topk_idx, topk_weights = sluice.make_workload(checkpoint.geometry, RANKS * TOKENS)
        whole = sluice.moe_forward(
            engine, x, sluice.Routing(topk_idx, topk_weights), mode="low-latency"
        )
    same = np.array_equal(np.concatenate([y for y, _ in results]), whole)
    print(f"rows per expert {[int(n) for _, count in results for n in count]}, "
          f"{'the same bytes as the engine' if same else 'DIFFERENT from the engine'}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
