"""One rank of a layer between DeepEP's calls, in a process of its own: rank size folder device [serving].

What a token gets depends on the token alone: the same bits whatever tokens are beside it, on its rank and on the
others, and however many. That holds within a mode. Between the modes it does not where there are several ranks: normal
mode rounds the sum of each rank to bf16 on its way home, low latency adds up the experts' rows in float32.
`serving`: sizes of a model that is served, on a GPU.
"""

import sys

import torch
import torch.distributed as distributed

import sluice
from sluice.compat.deep_ep import Buffer
from sluice.compat.w4a8 import W4A8Experts

EXPERTS, TOPK, GROUP, CAPACITY = 32, 8, 128, 128
SCALES = {"dynamic": {}, "static": {"a1_scale": 0.02, "a2_scale": 0.002}}


class Layer:
    def __init__(self, buffer, device, hidden, intermediate, scales):
        self.buffer, self.hidden = buffer, hidden
        local = EXPERTS // buffer.group_size
        mine = slice(buffer.rank * local, (buffer.rank + 1) * local)
        draw = torch.Generator().manual_seed(1)

        def matrix(n, k):
            codes = torch.randint(-128, 128, (EXPERTS, n, k // 2), generator=draw, dtype=torch.int8)
            scale = (torch.rand(EXPERTS, n, k // GROUP, generator=draw) + 0.5) / (4.3 * k**0.5)
            return codes[mine].to(device), scale[mine].bfloat16().to(device)

        self.experts = W4A8Experts(*matrix(2 * intermediate, hidden), *matrix(hidden, intermediate), **scales)

    def low_latency(self, x, idx, weights, use_fp8):
        rows, count, handle, _, hook = self.buffer.low_latency_dispatch(
            x, idx, CAPACITY, EXPERTS, use_fp8=use_fp8, return_recv_hook=True)
        hook()
        rows, scale = rows if use_fp8 else (rows, None)
        y = self.experts.masked(rows, scale, count)
        return self.buffer.low_latency_combine(y, idx, weights, handle)[0]

    def normal(self, x, idx, weights, use_fp8):
        to_rank, _, to_expert, in_rank, _ = self.buffer.get_dispatch_layout(idx, EXPERTS)
        sent = sluice.quantize(self.experts.backend, x) if use_fp8 else x
        rows, local, weight, _, handle, _ = self.buffer.dispatch(
            sent, num_tokens_per_rank=to_rank, is_token_in_rank=in_rank, num_tokens_per_expert=to_expert, topk_idx=idx,
            topk_weights=weights)
        rows, scale = rows if use_fp8 else (rows, None)
        return self.buffer.combine(self.experts.grouped(rows, scale, local, weight), handle)[0]


def other_elements(a, b):
    return int((a.view(torch.int16) != b.view(torch.int16)).sum())


def main(rank, size, folder, device, kind="small"):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.cuda.set_stream(torch.cuda.Stream())
    hidden, intermediate = (2048, 768) if kind == "serving" else (256, 128)
    buffer = Buffer(distributed.group.WORLD, 0, 1 << 20, low_latency_mode=True)
    most = {"low_latency": CAPACITY, "normal": 2048 if kind == "serving" else CAPACITY}
    draw = torch.Generator().manual_seed(2)
    # The same stream of tokens for every rank: that of another rank begins elsewhere.
    num = most["normal"] * size
    first = rank * most["normal"]
    x = torch.randn(num, hidden, generator=draw).bfloat16()[first:].to(device)
    idx = torch.rand(num, EXPERTS, generator=draw).argsort(1)[first:, :TOPK].contiguous().to(device)
    weights = torch.rand(num, TOPK, generator=draw)[first:].to(device)
    for name, scales in SCALES.items():
        layer, seen = Layer(buffer, device, hidden, intermediate, scales), {}
        for mode in most:
            for use_fp8 in (False, True):
                if mode == "normal" and use_fp8 and name == "static" and kind == "small":
                    continue  # The same path as in low latency.
                run = lambda n: getattr(layer, mode)(x[:n], idx[:n], weights[:n], use_fp8).clone()  # noqa: E731, B023
                whole = run(most[mode])
                assert whole.abs().amax() > 0 and torch.isfinite(whole).all()
                # Alone, beside few and many, and beside a rank that has more, fewer or none.
                for counts in ((1, 0), (1, 1), (2, 16), (16, 2), (33, 64), (64, 128), (128, 1), (7, most[mode])):
                    n = min(counts[rank % 2], most[mode])
                    off = other_elements(run(n), whole[:n])
                    assert off == 0, f"{name}, {mode}, fp8 {use_fp8}, {counts} tokens: {off} elements differ"
                seen[mode, use_fp8] = whole[:CAPACITY]
        for use_fp8 in (False, True):
            if ("normal", use_fp8) not in seen:
                continue
            a, b = seen["low_latency", use_fp8], seen["normal", use_fp8]
            off = other_elements(a, b)
            # Each rank's sum is rounded to 8 bits of mantissa, and so is the sum of all.
            assert ((a.float() - b.float()).norm() / a.float().norm()) < 4e-3 and (size > 1 or off == 0)
            print(f"rank {rank}: {name}, fp8 {use_fp8}: same bits in every batch; low latency and normal differ in "
                  f"{off} of {a.numel()} elements", flush=True)
    buffer.destroy()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
