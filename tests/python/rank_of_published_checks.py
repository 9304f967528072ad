"""One rank of DeepEP's published checks: rank size folder device mode shape.

test_low_latency.py and test_intranode.py of DeepEP, over the same calls and combinations of switches,
with its sizes (shape `published`) or small ones. Where those compare scores over whole tensors, every
element is compared here: received rows with the bytes that the definition of the format gives for
their source, sums with a float32 sum in order of top-k entries or ranks, calls that are repeated bit for bit.
"""

import itertools
import sys
from types import SimpleNamespace

import torch
import torch.distributed as distributed

import sluice
from sluice.compat.deep_ep import Buffer

SHAPES = {
    ("low-latency", "published"): SimpleNamespace(tokens=128, hidden=7168, topk=8, experts=288),
    ("low-latency", "small"): SimpleNamespace(tokens=16, hidden=512, topk=8, experts=24),
    ("normal", "published"): SimpleNamespace(tokens=4096, hidden=7168, topk=8, experts=256),
    ("normal", "small"): SimpleNamespace(tokens=72, hidden=512, topk=8, experts=24),
}
REPEATS = 20


def rows_of(rank, num_tokens, hidden, device):
    """[num_tokens, hidden] bf16 that tell rank, token and column apart: integers of 8 bits, exact."""
    token = torch.arange(num_tokens, device=device, dtype=torch.int64)[:, None]
    column = torch.arange(hidden, device=device, dtype=torch.int64)[None]
    mixed = (token + 1) * 7919 + column * column * 31 + column * 17 + rank * 104729
    return (mixed % 255 - 127).bfloat16()


def routing_of(rank, num_tokens, shape):
    """Expert numbers and weights as DeepEP's tests draw them, ten entries empty."""
    draw = torch.Generator().manual_seed(1000 + rank)
    scores = torch.randn(num_tokens, shape.experts, generator=draw).abs() + 1
    idx = torch.topk(scores, shape.topk, dim=-1, sorted=False)[1]
    weights = torch.randn(num_tokens, shape.topk, generator=draw).abs()
    for _ in range(10 if num_tokens else 0):
        row, slot = (int(torch.randint(n, (1,), generator=draw)) for n in (num_tokens, shape.topk))
        idx[row, slot] = -1
    return idx, weights


def same(a, b):
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def quantized(rows, pow2):
    """Codes and scales by the definition: on the CPU, whatever device is under test."""
    pair = sluice.quantize(sluice.Backend(num_threads=2), rows.cpu(), pow2=pow2)
    return [t.to(rows.device) for t in pair]


def floats(codes, scale):
    return (codes.float() * scale.repeat_interleave(128, 1)).bfloat16()


class World:
    """What every rank can work out about all of them."""

    def __init__(self, rank, counts, shape, device):
        self.rank, self.size, self.counts, self.shape, self.device = rank, len(counts), counts, shape, device
        self.x = [rows_of(r, n, shape.hidden, device) for r, n in enumerate(counts)]
        both = [routing_of(r, n, shape) for r, n in enumerate(counts)]
        self.host_idx = [idx for idx, _ in both]
        self.idx = [idx.to(device) for idx in self.host_idx]
        self.weights = [weights.to(device) for _, weights in both]
        self.num_local = shape.experts // self.size


# --- test_low_latency.py --------------------------------------------------------------------------


class Places:
    """Where the rows of every local expert must lie, and of which token of which source they are.

    Worked out on the host once, so that the device compares whole tensors: processes that share a GPU
    wait for each other's time slices at every question.
    """

    def __init__(self, world, max_m):
        first_token = torch.tensor([0, *world.counts]).cumsum(0)
        self.counts = torch.zeros(world.num_local, dtype=torch.int32)
        self.ranges = torch.zeros(world.num_local, world.size, dtype=torch.int64)
        self.source_token = torch.full((world.num_local, max_m), -1, dtype=torch.int32)
        positions, tokens_of_all, numbers = [], [], []
        for e in range(world.num_local):
            number, begin = world.rank * world.num_local + e, 0
            for source, idx in enumerate(world.host_idx):
                tokens = (idx == number).nonzero()[:, 0]
                end = begin + len(tokens)
                self.ranges[e, source] = begin << 32 | len(tokens)
                self.source_token[e, begin:end] = tokens
                positions.append(torch.arange(begin, end) + e * max_m)
                tokens_of_all.append(tokens + first_token[source])
                numbers.append(torch.full((len(tokens), 1), number + 1))
                begin = end
            self.counts[e] = begin
        self.position, self.token = (torch.cat(t).to(world.device) for t in (positions, tokens_of_all))
        self.number = torch.cat(numbers).to(world.device)

    def rows(self, array):
        """Of [num_local, max_m, width]: those that have come."""
        return flat_bits(array)[self.position]


def flat_bits(array):
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[array.element_size()]
    return array.view(bits).reshape(-1, array.shape[-1])


def check_received(places, got, count, stats, handle, references, is_ue8m0):
    """Counts, places and every element of the rows of every local expert."""
    assert torch.equal(count.cpu(), places.counts) and torch.equal(stats.cpu(), places.counts)
    assert torch.equal(handle[0].cpu(), places.source_token) and torch.equal(handle[1].cpu(), places.ranges)
    for part, rows in enumerate(got):
        wanted = torch.cat([both[part] for both in references])
        if part == 1 and is_ue8m0:
            wanted = (wanted.view(torch.int32) >> 23).to(torch.uint8).contiguous().view(torch.int32)
        assert torch.equal(places.rows(rows), flat_bits(wanted)[places.token])


def low_latency(buffer, world):
    shape, rank, device = world.shape, world.rank, world.device
    x, idx, weights = world.x[rank], world.idx[rank], world.weights[rank]
    most = max(world.counts)
    places = Places(world, world.size * most)
    switches = [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
    for hook, (use_fp8, round_scale, ue8m0) in itertools.product((False, True), switches):
        references = [quantized(rows, round_scale) if use_fp8 else [rows] for rows in world.x]
        plain = [floats(*both) if use_fp8 else both[0] for both in references]
        # The experts: each multiplies by a number of its own.
        y = torch.zeros(world.num_local, world.size * most, shape.hidden, dtype=torch.bfloat16, device=device)
        rows = torch.cat(plain)[places.token].float()
        y.view(-1, shape.hidden)[places.position] = (rows * places.number).bfloat16()
        total = torch.zeros(x.shape, dtype=torch.float32, device=device)
        for k in range(shape.topk):
            row = (plain[rank].float() * (idx[:, k, None] + 1)).bfloat16().float()
            total += torch.where(idx[:, k] >= 0, weights[:, k], 0)[:, None] * row

        def dispatch(stats):
            recv, count, handle, event, received = buffer.low_latency_dispatch(
                x, idx, most, shape.experts, use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=ue8m0,
                cumulative_local_expert_recv_stats=stats, async_finish=not hook, return_recv_hook=hook)
            received() if hook else event.event is None or event.current_stream_wait()
            return recv if use_fp8 else (recv,), count, handle

        def combine(handle, **options):
            y_out, event, landed = buffer.low_latency_combine(
                y, idx, weights, handle, async_finish=not hook, return_recv_hook=hook,
                out=torch.empty_like(x), **options)
            landed() if hook else event.event is None or event.current_stream_wait()
            return y_out

        stats = torch.zeros(world.num_local, dtype=torch.int32, device=device)
        got, count, handle = dispatch(stats)
        check_received(places, got, count, stats, handle, references, ue8m0)
        for zero_copy, logfmt in itertools.product((False, True), (False, True)):
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle)[:] = y
            assert same(combine(handle, zero_copy=zero_copy, use_logfmt=logfmt), total.bfloat16())
        # Pressure: the same bits again and again, and statistics that add up.
        for repeat in range(REPEATS):
            got, again, handle = dispatch(stats)
            assert same(combine(handle), total.bfloat16()) and torch.equal(again, count)
        assert torch.equal(stats, count * (REPEATS + 1))


# --- test_intranode.py ----------------------------------------------------------------------------


def normal(buffer, world):
    shape, rank, device, size = world.shape, world.rank, world.device, world.size
    x, idx, weights = world.x[rank], world.idx[rank], world.weights[rank]
    ranks = torch.arange(size, device=device)
    in_ranks = [((i // world.num_local)[:, :, None] == ranks).logical_and((i >= 0)[:, :, None]).any(1)
                for i in world.idx]
    to_rank, none, to_expert, in_rank, _ = buffer.get_dispatch_layout(idx, shape.experts)
    assert none is None and torch.equal(in_rank, in_ranks[rank])
    assert torch.equal(to_rank.long(), in_rank.sum(0))
    numbers = torch.arange(shape.experts, device=device)
    assert torch.equal(to_expert.long(), (idx.reshape(-1, 1) == numbers).sum(0))

    mine = [i[:, rank] for i in in_ranks]
    theirs = torch.cat([i[m] for i, m in zip(world.idx, mine)])
    is_here = (theirs >= 0) & (theirs // world.num_local == rank)
    wanted_idx = torch.where(is_here, theirs % world.num_local, -1)
    wanted_weights = torch.where(is_here, torch.cat([w[m] for w, m in zip(world.weights, mine)]), 0)
    per_expert = [int((wanted_idx == e).sum()) for e in range(world.num_local)]
    layout = {"num_tokens_per_rank": to_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": to_expert}
    routing = {"topk_idx": idx, "topk_weights": weights}
    all_references = [[rows] for rows in world.x], [quantized(rows, False) for rows in world.x]
    for use_fp8, is_async, with_topk in itertools.product((False, True), repeat=3):
        references = all_references[use_fp8]
        sent = tuple(references[rank]) if use_fp8 else x
        wanted = [torch.cat([r[part][m] for r, m in zip(references, mine)]) for part in range(1 + use_fp8)]
        options = {"async_finish": is_async, "config": Buffer.get_dispatch_config(size)}
        if is_async:
            options["previous_event"] = buffer.capture()

        def check(got, event):
            if event.event is not None:
                event.current_stream_wait()
            for rows, reference in zip(got if use_fp8 else (got,), wanted):
                assert same(rows[: len(reference)], reference)

        got, got_idx, got_weights, counts, handle, event = buffer.dispatch(
            sent, **layout, **(routing if with_topk else {}), **options)
        check(got, event)
        if with_topk:
            assert torch.equal(got_idx, wanted_idx) and torch.equal(got_weights, wanted_weights)
            assert counts == per_expert
            padded = sum(world.counts) + 7
            more, more_idx, more_weights, none, _, event = buffer.dispatch(
                sent, **layout, **routing, **options, num_worst_tokens=padded)
            check(more, event)
            assert none == [] and len(more[0] if use_fp8 else more) == padded
            assert torch.equal(more_idx[: len(theirs)], wanted_idx) and (more_idx[len(theirs):] == -1).all()
            assert torch.equal(more_weights[: len(theirs)], wanted_weights)
        cached = buffer.dispatch(sent, handle=handle, **options)
        check(cached[0], cached[5])
        rows = floats(*wanted) if use_fp8 else wanted[0]
        own = floats(*references[rank]) if use_fp8 else x
        bias = tuple(rows_of(rank + 50 * i, len(x), shape.hidden, device) for i in (1, 2))
        y, sums, event = buffer.combine(
            rows, handle, bias=bias, async_finish=is_async, topk_weights=got_weights if with_topk else None)
        if event.event is not None:
            event.current_stream_wait()
        summed = torch.zeros(x.shape, dtype=torch.float32, device=device)
        for r in range(size):
            summed += torch.where(in_rank[:, r, None], own.float(), 0)
        summed = summed.bfloat16().float() + (bias[0].float() + bias[1].float())
        assert same(y, summed.bfloat16())
        if with_topk:
            assert same(sums, torch.where(idx >= 0, weights, 0))


def main(rank, size, folder, device, mode, shape):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.cuda.set_stream(torch.cuda.Stream())
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        torch.set_num_threads(1)
    shape = SHAPES[mode, shape]
    even, uneven = [shape.tokens] * size, [(shape.tokens * (r + 1) // size) if r != 1 else 0 for r in range(size)]
    buffer = Buffer(distributed.group.WORLD, int(2e9), int(2e9), low_latency_mode=True,
                    num_qps_per_rank=shape.experts // size, explicitly_destroy=True)
    for counts in (even, uneven):
        (low_latency if mode == "low-latency" else normal)(
            buffer, World(rank, counts, shape, torch.device(device)))
    buffer.destroy()
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
