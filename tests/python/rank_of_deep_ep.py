"""One rank of a Buffer in a process of its own, met through torch.distributed: rank size folder device [late].

The last rank comes `late` seconds later than the others to its first call.

DeepEP's published checks, element by element: what every rank must get is written down from the
workloads of all, not compared by a global score.
"""

import sys
import time

import numpy as np
import torch
import torch.distributed as distributed
from deep_ep_workload import CAPACITY, EXPERTS, expected_rows, expected_sum, run_experts, tokens
from spaces import Torch

import sluice
from sluice.compat.deep_ep import Buffer


def low_latency(buffer, space, rank, counts, use_fp8, hook):
    x, idx, weights = tokens(rank, counts[rank])
    num_local = EXPERTS // len(counts)
    recv, count, handle, _, received = buffer.low_latency_dispatch(
        space.bf16(x), space.array(idx), CAPACITY, EXPERTS, use_fp8=use_fp8,
        return_recv_hook=hook, async_finish=not hook)
    if hook:
        received()
    wanted = expected_rows(rank, counts)
    received_counts = space.plain(count)
    codes = space.bits(recv[0] if use_fp8 else recv)
    for e, rows in enumerate(wanted):
        assert received_counts[e] == len(rows), (e, received_counts, len(rows))
        expected = rows
        if use_fp8:
            expected, scale = sluice.quantize(sluice.Backend(num_threads=1), rows)
            assert np.array_equal(space.plain(recv[1])[e, : len(rows)], scale)
        assert np.array_equal(codes[e, : len(rows)], expected)
    y = np.zeros((num_local, len(counts) * CAPACITY, x.shape[1]), np.uint16)
    for e, rows in enumerate(wanted):
        y[e, : len(rows)] = rows
    y = space.bf16(run_experts(y, rank, num_local=num_local))
    combined, _, landed = buffer.low_latency_combine(
        y, space.array(idx), space.array(weights), handle, return_recv_hook=hook)
    if hook:
        landed()
    assert np.array_equal(space.bits(combined), expected_sum(x, idx, weights))


def normal(buffer, space, rank, counts):
    x, idx, weights = tokens(rank, counts[rank])
    num_local = EXPERTS // len(counts)
    to_rank, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(space.array(idx), EXPERTS)
    recv, got_idx, got_weights, per_expert, handle, _ = buffer.dispatch(
        space.bf16(x), None, to_rank, None, in_rank, to_expert, space.array(idx), space.array(weights))
    rows, numbers = [], []
    for source, num_tokens in enumerate(counts):
        theirs, choice, _ = tokens(source, num_tokens)
        for token in range(num_tokens):
            mine = (choice[token] >= 0) & (choice[token] // num_local == rank)
            if mine.any():
                rows.append(theirs[token])
                numbers.append(np.where(mine, choice[token] % num_local, -1))
    assert np.array_equal(space.bits(recv), np.array(rows, np.uint16).reshape(-1, x.shape[1]))
    numbers = np.array(numbers, np.int64).reshape(-1, idx.shape[1])
    assert np.array_equal(space.plain(got_idx), numbers)
    assert per_expert == [int((numbers == e).sum()) for e in range(num_local)]
    assert ((space.plain(got_weights) != 0) <= (numbers >= 0)).all()
    combined, _, _ = buffer.combine(recv, handle)
    copies = space.plain(in_rank).sum(1).astype(np.float32)[:, None]
    as_float = (x.astype(np.uint32) << 16).view(np.float32) * copies + 0
    assert np.array_equal(
        space.bits(combined), (torch.from_numpy(as_float).bfloat16().view(torch.int16).numpy()).view(np.uint16))


def main(rank, size, folder, device, late=0.0):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.cuda.set_stream(torch.cuda.Stream())
    space = Torch(device)
    buffer = Buffer(distributed.group.WORLD, 0, 1 << 20, low_latency_mode=True, num_qps_per_rank=2)
    assert (buffer.rank, buffer.group_size) == (rank, size)
    time.sleep(late if rank == size - 1 else 0)
    for counts in ([CAPACITY] * size, [(3 * r + 5) % (CAPACITY + 1) for r in range(size)], [0] * size):
        for use_fp8 in (False, True):
            for hook in (False, True):
                low_latency(buffer, space, rank, counts, use_fp8, hook)
        normal(buffer, space, rank, counts)
    buffer.destroy()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], *map(float, sys.argv[5:]))
