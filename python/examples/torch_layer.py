"""One MoE layer with torch, one process for each rank.

    torchrun --nproc-per-node 4 python/examples/torch_layer.py            # a GPU for each, or shared
    torchrun --nproc-per-node 2 python/examples/torch_layer.py --device cpu

On GPUs the call is captured in a CUDA graph and replayed; the replay must give the same bytes.
"""

import argparse
import contextlib
import os
import shutil
import tempfile

import numpy as np
import torch
import torch.distributed as distributed

import sluice

TOKENS, LAYER = 16, 3


def make_engine(checkpoint, device, local_rank, num_local_ranks):
    transport = sluice.Transport.from_group(distributed.group.WORLD)
    backend = sluice.Backend(device, local_rank=local_rank, num_local_ranks=num_local_ranks)
    return sluice.Engine(checkpoint, transport, backend, layer=LAYER, max_tokens_per_rank=TOKENS)


def tensors(geometry, rank, device):
    x, idx, weights = sluice.make_workload(geometry, TOKENS, first_token=rank * TOKENS)
    x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return [t.to(device) for t in (x, torch.from_numpy(idx), torch.from_numpy(weights))]


def replay(engine, x, routing):
    """The layer as a CUDA graph: on a side stream, once before the capture."""
    y = torch.empty_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sluice.moe_forward(engine, x, routing, mode="low-latency", out=y)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        sluice.moe_forward(engine, x, routing, mode="low-latency", out=y)
    for _ in range(3):
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
    engine.check()
    return y


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    on_gpu = parser.parse_args().device == "cuda"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device, sharers, place = "cpu", size, rank
    if on_gpu:
        gpus = torch.cuda.device_count()
        device = f"cuda:{rank % gpus}"
        torch.cuda.set_device(device)
        sharers, place = -(-size // gpus), rank // gpus
    distributed.init_process_group("gloo")  # Only to agree on a meeting place.

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    distributed.broadcast_object_list(folder, src=0)
    if rank == 0:
        sluice.make_checkpoint(f"{folder[0]}/model", sluice.ModelGeometry.preset("tiny"))
    distributed.barrier()
    checkpoint = sluice.Checkpoint(f"{folder[0]}/model")
    engine = make_engine(checkpoint, device, place, sharers)
    x, idx, weights = tensors(checkpoint.geometry, rank, device)
    routing = sluice.Routing(idx, weights)
    # Ranks that share a GPU need streams of their own.
    stream = torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext()
    with stream:
        y = sluice.moe_forward(engine, x, routing, mode="low-latency")
        if on_gpu:
            torch.cuda.current_stream().synchronize()
    same = not on_gpu or torch.equal(replay(engine, x, routing).view(torch.int16), y.view(torch.int16))
    lines = [None] * size
    distributed.all_gather_object(
        lines, f"rank {rank} of {size} on {device}: |y| = {y.float().norm():.4f}"
        + (f", replayed: {'the same bytes' if same else 'DIFFERENT'}" if on_gpu else ""))
    if rank == 0:
        print("\n".join(lines))
        shutil.rmtree(folder[0])
    distributed.destroy_process_group()
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
