"""Time in which W4A8Experts takes weights that are on the GPU, in the orders that engines have: repack_time.py

R1's 32 local experts, into memory that is there, and into the memory in which the weights themselves lie, as the
plug-ins do. GB/s are the published weights and scales, 2-byte ones, over the time. Outputs of every order are compared
bit by bit before any time is taken.
"""

import time

import torch

from sluice.compat.w4a8 import W4A8Experts, weight_memory

EXPERTS, HIDDEN, INTERMEDIATE, GROUP = 32, 7168, 2048, 128


def published(has_smallest):
    """int8 codes and bfloat16 scales, with -8 among the codes or without."""
    def codes(n, k):
        low, high = (torch.randint(0, 16 if has_smallest else 15, (EXPERTS, n, k // 2), device="cuda",
                                   dtype=torch.int16) for _ in range(2))
        if not has_smallest:
            low, high = low + (low >= 8), high + (high >= 8)
        return (low | high << 4).to(torch.uint8).view(torch.int8)

    def scales(n, k):
        return ((torch.rand(EXPERTS, n, k // GROUP, device="cuda") + 0.5) / (4.3 * k**0.5)).bfloat16()

    return [part(n, k) for n, k in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)) for part in (codes, scales)]


def interleaved(scale):
    """As SGLang holds scales after its own processing."""
    experts, n, groups = scale.shape
    a = 4 if groups % 4 == 0 else 1
    return scale.reshape(experts, n, groups // a, a).transpose(1, 2).reshape(experts, groups // a, n * a).contiguous()


def offset_words(codes):
    """As compressed-tensors' int32 words of eight weights + 8."""
    return (codes.view(torch.uint8) ^ 0x88).view(torch.int32)


def orders(weights):
    w13, s13, w2, s2 = weights
    yield "published", weights, {}
    yield "SGLang's interleaved scales", (w13, interleaved(s13), w2, interleaved(s2)), {"scale_layout": "interleaved"}
    words = [offset_words(w) for w in (w13, w2)]
    yield "int32 words", (words[0], s13, words[1], s2), {"weight_layout": "uint4b8"}
    turned = [w.transpose(1, 2).contiguous() for w in words]
    yield "int32 words, transposed", (turned[0], s13, turned[1], s2), {"weight_layout": "uint4b8-transposed"}


def best_of(times, prepare, call):
    """Seconds; the device waits for both."""
    best = float("inf")
    for _ in range(times):
        prepare()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def in_place(weights):
    """As a plug-in has them: a function that loads them, and one that makes the experts."""
    place = weight_memory(EXPERTS, HIDDEN, INTERMEDIATE)

    def load():
        for parameter, array in zip(place[1:], weights):
            parameter.copy_(array)

    return load, lambda: W4A8Experts(*place[1:], scale_layout="plain", memory=place.memory)


def ways(weights, memory):
    """Name, what is done before, and a function that makes the experts."""
    for name, arrays, options in orders(weights):
        yield name, lambda: None, lambda: W4A8Experts(*arrays, memory=memory, **options)  # noqa: B023
    yield "in the memory of the weights", *in_place(weights)


def main():
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    memory = weight_memory(EXPERTS, HIDDEN, INTERMEDIATE).memory
    x = torch.randn(16, HIDDEN, device="cuda").bfloat16()
    ids, weights_of = torch.randint(0, EXPERTS, (16, 8), device="cuda"), torch.rand(16, 8, device="cuda")
    for has_smallest in (False, True):
        weights = published(has_smallest)
        size = sum(w.numel() * w.element_size() for w in weights)
        wanted = W4A8Experts(*weights).grouped(x, None, ids, weights_of)
        for name, load, make in ways(weights, memory):
            load()
            assert torch.equal(make().grouped(x, None, ids, weights_of), wanted), name
            best = best_of(9, load, make)
            print(f"{name}, {'with' if has_smallest else 'no'} -8: {1e3 * best:.2f} ms, {size / best / 1e9:.0f} GB/s",
                  flush=True)


if __name__ == "__main__":
    main()
