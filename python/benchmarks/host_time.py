"""Host time of W4A8Experts' calls at decode sizes on a GPU: host_time.py

Each line is the least of several rounds: microseconds of the calling thread for one call, while the device
keeps up. "again" is a call whose tensors have the memory of an earlier call; "anew" one that has other memory
each time, out of more buffers than calls are remembered; "any size" one that has another number of tokens as well.
"""

import time

import torch

import sluice
from sluice.compat.w4a8 import W4A8Experts, w4a8_moe_grouped

DEVICE = "cuda"


def host_us(call, calls=100, rounds=15):
    for i in range(calls):
        call(i)
    least = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(calls):
            call(i)
        least = min(least, (time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return least * 1e6


def make_experts(num, hidden, intermediate):
    def codes(n, k):
        return torch.randint(-128, 128, (num, n, k // 2), dtype=torch.int8, device=DEVICE)

    def scales(n, k):
        return torch.rand(num, n, k // 128, device=DEVICE) * 0.004 + 0.002

    weights = (codes(2 * intermediate, hidden), scales(2 * intermediate, hidden),
               codes(hidden, intermediate), scales(hidden, intermediate))
    return W4A8Experts(*weights), weights


def main():
    num, hidden, topk, tokens = 8, 2048, 4, 4
    experts, weights = make_experts(num, hidden, 512)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {sluice.__version__}: us of the host for a call")

    def batch(tokens):
        x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
        idx = torch.randint(0, num, (tokens, topk), device=DEVICE)
        return x, None, idx, torch.rand(tokens, topk, device=DEVICE), torch.empty_like(x)

    many = [batch(tokens) for _ in range(50)]
    sizes = [batch(1 + i % 40) for i in range(50)]
    x, none, idx, w, out = many[0]
    layer = next(iter(experts._grouped.values()), None)
    rows = torch.randn(num, 16, hidden, device=DEVICE).bfloat16()
    codes, scale = rows.to(torch.float8_e4m3fn), torch.ones(num, 16, hidden // 128, device=DEVICE)
    count = torch.full((num,), 2, dtype=torch.int32, device=DEVICE)
    expert_y = torch.empty_like(rows)
    batches = [(codes.clone(), scale.clone(), count) for _ in range(50)]
    lines = {
        "nothing: the loop itself": lambda i: None,
        "grouped, again, out=": lambda i: experts.grouped(x, None, idx, w, out=out),
        "grouped, again": lambda i: experts.grouped(x, None, idx, w),
        "grouped, anew, out=": lambda i: experts.grouped(*many[i % 50][:4], out=many[i % 50][4]),
        "grouped, anew": lambda i: experts.grouped(*many[i % 50][:4]),
        "grouped, any size, out=": lambda i: experts.grouped(*sizes[i % 50][:4], out=sizes[i % 50][4]),
        "masked bf16, again, out=": lambda i: experts.masked(rows, None, count, out=expert_y),
        "masked bf16, again": lambda i: experts.masked(rows, None, count),
        "masked e4m3, again, out=": lambda i: experts.masked(codes, scale, count, out=expert_y),
        "masked e4m3, anew, out=": lambda i: experts.masked(*batches[i % 50], out=expert_y),
        "the function, again, out=": lambda i: w4a8_moe_grouped(x, None, idx, w, *weights, out=out),
    }
    for name, call in lines.items():
        print(f"  {name:28} {host_us(call):6.2f}", flush=True)
    layer = next(iter(experts._grouped.values()))
    print(f"  {'core.forward_topk, again':28} {host_us(lambda i: layer.forward_topk(x, idx, w, None, out)):6.2f}")
    calls = [(x, idx, w, None, out) for x, _, idx, w, out in many]
    print(f"  {'core.forward_topk, anew':28} {host_us(lambda i: layer.forward_topk(*calls[i % 50])):6.2f}")
    print(f"  calls recognised: {layer.num_repeated_calls}")
    print(f"  {'torch.empty_like(x)':28} {host_us(lambda i: torch.empty_like(x)):6.2f}")
    print(f"  {'torch.add(x, x, out=)':28} {host_us(lambda i: torch.add(x, x, out=out)):6.2f}")


if __name__ == "__main__":
    main()
