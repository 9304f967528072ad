"""How a layer compares with the same layer in eager torch, and what the call costs the host.

    python python/examples/torch_compare.py --preset r1-slice --tokens 1 16 128
    python python/examples/torch_compare.py --device cpu --preset tiny --tokens 8

Eager torch runs each expert that has rows with weights widened to bf16 beforehand, which takes four
times the memory; inputs are not quantized there, so its result is compared, not equal. `host` is the
time of moe_forward() in Python less the time of the C++ call inside it, at the median.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch

import sluice

LAYER = 3


def widen(weights, device):
    """[(gate_up, down)] of every expert as bf16."""

    def matrix(e, name):
        codes, scales = (torch.from_numpy(np.array(a)).to(device) for a in weights.matrix(e, name))
        low, high = (codes.to(torch.int8) << 4) >> 4, codes.view(torch.int8) >> 4
        values = torch.stack([low, high], -1).flatten(1).float()
        return (values * scales.float().repeat_interleave(weights.geometry.group_size, 1)).bfloat16()

    return [
        (torch.cat([matrix(e, "gate"), matrix(e, "up")]), matrix(e, "down"))
        for e in range(len(weights))
    ]


def eager(experts, x, topk_idx, topk_weights):
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e, (gate_up, down) in enumerate(experts):
        token, slot = (topk_idx == e).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        gate, up = (x[token] @ gate_up.t()).chunk(2, -1)
        rows = (torch.nn.functional.silu(gate.float()) * up.float()).bfloat16() @ down.t()
        y.index_add_(0, token, rows.float() * topk_weights[token, slot, None])
    return y.bfloat16()


def median_us(body, device, repeats):
    def once():
        begin = time.perf_counter()
        body()
        if device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e6

    for _ in range(3):
        once()
    return statistics.median(once() for _ in range(repeats))


def host_us(engine, arguments, repeats):
    """Time in Python around the C++ call."""
    engine.record_stats()
    costs = []
    for _ in range(repeats):
        begin = time.perf_counter()
        sluice.moe_forward(engine, *arguments[:2], mode="low-latency", out=arguments[2])
        wall = (time.perf_counter() - begin) * 1e6
        costs.append(wall - sluice.stats(engine)["times"]["total_us"])
    engine.record_stats(False)
    return statistics.median(costs)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--preset", default="r1-slice")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    device = options.device
    geometry = sluice.ModelGeometry.preset(options.preset)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = sluice.make_checkpoint(f"{folder}/model", geometry)
        engine = sluice.Engine(
            checkpoint, sluice.Transport.inproc(1)[0], sluice.Backend(device), layer=LAYER,
            max_tokens_per_rank=max(options.tokens), normal=None,
        )
        experts = widen(checkpoint.load_experts(LAYER, 0, geometry.num_experts), device)
    print(f"{geometry}\n{'tokens':>8} {'eager us':>10} {'sluice us':>10} {'ratio':>6} {'host us':>8} "
          f"{'difference':>11}")
    for num_tokens in options.tokens:
        x, idx, weights = sluice.make_workload(geometry, num_tokens)
        x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
        idx, weights = torch.from_numpy(idx).to(device), torch.from_numpy(weights).to(device)
        routing, y = sluice.Routing(idx, weights), torch.empty_like(x)
        wanted = eager(experts, x, idx.long(), weights).float()
        old = median_us(lambda a=(x, idx.long(), weights): eager(experts, *a), device, options.repeats)
        new = median_us(
            lambda a=(x, routing), out=y: sluice.moe_forward(engine, *a, mode="low-latency", out=out),
            device, options.repeats,
        )
        difference = ((y.float() - wanted).norm() / wanted.norm()).item()
        host = host_us(engine, (x, routing, y), 10 * options.repeats)
        print(f"{num_tokens:>8} {old:>10.1f} {new:>10.1f} {old / new:>6.2f} {host:>8.2f} "
              f"{difference:>11.4f}")
        if not difference < 0.1:
            raise SystemExit("the results differ by more than quantizing explains")


if __name__ == "__main__":
    main()
