"""What only a GPU shows: streams, graphs, memory of its own. Processes: test_torch_processes.py."""

import json
import subprocess

import numpy as np
import pytest
from conftest import LAYER, one_rank_engine
from spaces import Torch
from test_layer import outputs_digest

import sluice
from sluice.compat import w4a8
from sluice.compat.deep_ep import Buffer

torch = pytest.importorskip("torch", reason="torch is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
TOKENS = 8


@pytest.fixture(scope="module")
def space():
    return Torch("cuda")


def workload(geometry, space, first=0, tokens=TOKENS):
    x, idx, weights = sluice.make_workload(geometry, tokens, first_token=first)
    return space.bf16(x), space.array(idx.astype(np.int64)), space.array(weights)


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("mode", ["low-latency", "normal"])
def test_the_current_stream_is_honoured(gpu, space, checkpoint, geometry, mode):
    """Inputs that are written late on a side stream; on any other stream the call would be first."""
    engine = one_rank_engine(checkpoint, gpu, TOKENS)
    x, idx, weights = workload(geometry, space)
    expected = sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode=mode)
    torch.cuda.synchronize()
    late = torch.zeros_like(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        y = sluice.moe_forward(engine, late, sluice.Routing(idx, weights), mode=mode)
    assert not side.query(), "the call waited for the device"
    side.synchronize()
    engine.check()
    assert same(y, expected)


@pytest.mark.parametrize("mode", ["low-latency", "normal"])
def test_graph_of_a_layer(gpu, space, checkpoint, geometry, mode):
    engine = one_rank_engine(checkpoint, gpu, TOKENS)
    x, idx, weights = workload(geometry, space)
    routing, y = sluice.Routing(idx, weights), torch.empty_like(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sluice.moe_forward(engine, x, routing, mode=mode, out=y)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        sluice.moe_forward(engine, x, routing, mode=mode, out=y)
    for first in (0, 100, 200):
        for target, source in zip((x, idx, weights), workload(geometry, space, first)):
            target.copy_(source)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        other = one_rank_engine(checkpoint, gpu, TOKENS)
        assert same(y, sluice.moe_forward(other, x, routing, mode=mode))
    engine.check()


def published(checkpoint, geometry, space):
    weights = checkpoint.load_experts(LAYER, 0, geometry.num_experts)

    def stack(name):
        pairs = [weights.matrix(e, name) for e in range(len(weights))]
        return np.stack([c for c, _ in pairs]).view(np.int8), np.stack([s for _, s in pairs])

    gate, up, down = stack("gate"), stack("up"), stack("down")
    arrays = np.concatenate([gate[0], up[0]], 1), np.concatenate([gate[1], up[1]], 1), *down
    return tuple(space.array(a) for a in arrays)


RECIPES = {  # recipe -> (e4m3 rows, their scales, static scales)
    "direct": (True, True, False), "direct-bf16": (False, False, False),
    "bf16-static": (False, False, True), "requant-static": (True, True, True),
    "static": (True, False, True),
}  # fmt: skip
BOTH = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("recipe", RECIPES)
def test_w4a8_masked(checkpoint, geometry, device, recipe):
    """The bytes of experts_masked() on the same device, valid row by valid row."""
    is_e4m3, has_scale, is_static = RECIPES[recipe]
    space, backend = Torch(device), sluice.Backend(device)
    s1, s2 = checkpoint.static_scales(LAYER)
    num_rows = np.array([0, 1, 8, 3, 2, 0, 5, 7], np.int32)
    x = torch.randn(8, 8, geometry.hidden, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    codes, scale = sluice.quantize(backend, x, static_scale=None if has_scale or not is_e4m3 else s1)
    rows = codes if is_e4m3 else x
    batch = sluice.ExpertBatch(rows, space.array(num_rows), x_scale=scale if has_scale else None)
    experts = sluice.repack(checkpoint.load_experts(LAYER, 0, 8), backend, max_rows=64)
    expected = sluice.experts_masked(experts, batch, sluice.Recipe(recipe, s1=s1, s2=s2))
    columns = scale.transpose(1, 2).contiguous().transpose(1, 2) if has_scale else None
    y = w4a8.w4a8_moe_masked(
        rows, columns, batch.num_rows, *published(checkpoint, geometry, space), backend=backend,
        **({"a1_scale": s1, "a2_scale": s2} if is_static else {}))
    for e, n in enumerate(num_rows):
        assert same(y[e, :n], expected[e, :n])


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("recipe", ["direct", "direct-bf16", "bf16-static"])
def test_w4a8_grouped(checkpoint, geometry, device, recipe):
    """The bytes of the engine's normal mode on the same device."""
    is_e4m3, _, is_static = RECIPES[recipe]
    space, backend = Torch(device), sluice.Backend(device)
    x, idx, weights = workload(geometry, space)
    idx[0, 1], idx[3] = -1, -1
    engine = one_rank_engine(checkpoint, backend, TOKENS, normal=recipe, low_latency=None)
    expected = sluice.moe_forward(engine, x, sluice.Routing(idx, weights))
    rows, scale = sluice.quantize(backend, x) if is_e4m3 else (x, None)
    s1, s2 = checkpoint.static_scales(LAYER)
    y = w4a8.w4a8_moe_grouped(
        rows, scale, idx, weights, *published(checkpoint, geometry, space), backend=backend,
        **({"a1_scale": s1, "a2_scale": s2} if is_static else {}))
    engine.check()
    assert same(y, expected)


@pytest.mark.parametrize("entry", ["LocalExperts", "W4A8Experts"])
def test_local_call_on_streams_and_in_graphs(gpu, space, checkpoint, geometry, entry):
    """Torch's current stream, without waiting for it; graphs of several sizes, also after growth."""
    experts = checkpoint.load_experts(LAYER, 0, geometry.num_experts)
    if entry == "LocalExperts":
        local = sluice.LocalExperts(experts, gpu, max_entries=64 * geometry.num_topk, recipe="direct-bf16")
        call = lambda x, idx, w, out: local.forward(x, sluice.Routing(idx, w), out=out)  # noqa: E731
    else:
        local = w4a8.W4A8Experts(*published(checkpoint, geometry, space), backend=gpu)
        call = lambda x, idx, w, out: local.grouped(x, None, idx, w, out=out)  # noqa: E731
    engine = one_rank_engine(checkpoint, gpu, 64, normal="direct-bf16", low_latency=None)

    def tensors(tokens, first=0):
        x, idx, w = sluice.make_workload(geometry, tokens, first_token=first)
        return space.bf16(x), space.array(idx.astype(np.int64)), space.array(w)

    def expected(x, idx, w):
        return sluice.moe_forward(engine, x, sluice.Routing(idx, w))

    stream, graphs = torch.cuda.Stream(), []
    for tokens in (1, 5, 16, 64):
        held, out = tensors(tokens), torch.empty(tokens, geometry.hidden, dtype=torch.bfloat16, device="cuda")
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            assert call(*held, out) is out
            assert not stream.query()
        stream.synchronize()
        assert same(out, expected(*held))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call(*held, out)
        graphs.append((graph, held, out))
    for first in (100, 200):
        for graph, held, out in graphs:
            for target, source in zip(held, tensors(len(out), first)):
                target.copy_(source)
            torch.cuda.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            assert same(out, expected(*held))


def through_the_names(buffer, tensors, weights, backend, num_experts, hook=False):
    x, idx, w = tensors
    (codes, scale), count, handle, _, received = buffer.low_latency_dispatch(
        x, idx, TOKENS, num_experts, return_recv_hook=hook)
    if hook:
        received()
    rows = w4a8.w4a8_moe_masked(codes, scale, count, *weights, backend=backend)
    y, _, landed = buffer.low_latency_combine(rows, idx, w, handle, return_recv_hook=hook)
    if hook:
        landed()
    return y


@pytest.mark.parametrize("hook", [False, True], ids=["", "hook"])
def test_graph_through_deep_ep_and_w4a8(gpu, space, checkpoint, geometry, hook):
    weights = published(checkpoint, geometry, space)
    buffer = Buffer(sluice.Transport.inproc(1)[0], backend=gpu)
    tensors = workload(geometry, space)
    arguments = tensors, weights, gpu, geometry.num_experts, hook
    engine = one_rank_engine(checkpoint, gpu, TOKENS)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), pytest.raises(sluice.Error, match="before the capture"):
        fresh = Buffer(sluice.Transport.inproc(1)[0], backend=gpu)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            fresh.low_latency_dispatch(*tensors[:2], TOKENS, geometry.num_experts)
    with torch.cuda.stream(stream):
        through_the_names(buffer, *arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = through_the_names(buffer, *arguments)
    for first in (0, 100):
        for target, source in zip(tensors, workload(geometry, space, first)):
            target.copy_(source)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        routing = sluice.Routing(*tensors[1:])
        assert same(y, sluice.moe_forward(engine, tensors[0], routing, mode="low-latency"))


def test_two_handles_in_flight(gpu, space, checkpoint, geometry):
    weights = published(checkpoint, geometry, space)
    buffer = Buffer(sluice.Transport.inproc(1)[0], backend=gpu)
    batches = [workload(geometry, space, first) for first in (0, 100)]
    expected = [through_the_names(buffer, b, weights, gpu, geometry.num_experts) for b in batches]
    for order in ((0, 1), (1, 0)):
        sent = [buffer.low_latency_dispatch(b[0], b[1], TOKENS, geometry.num_experts) for b in batches]
        for i in order:
            (codes, scale), count, handle, _, _ = sent[i]
            target = buffer.get_next_low_latency_combine_buffer(handle)
            rows = w4a8.w4a8_moe_masked(codes, scale, count, *weights, backend=gpu, out=target)
            y, _, _ = buffer.low_latency_combine(rows, *batches[i][1:], handle, zero_copy=True)
            assert same(y, expected[i])


def test_entries_left_out_of_the_sum(gpu, space, geometry):
    """-1 in another tensor than the one that was dispatched; the host does not wait to look at other numbers."""
    buffer, torch = Buffer(sluice.Transport.inproc(1)[0], backend=gpu), space.torch
    x, idx, weights = workload(geometry, space)
    left = idx.clone()
    left[::2, 0] = -1
    sums = []
    for shown, w in ((left, torch.where(left < 0, float("nan"), weights)), (idx, torch.where(left < 0, 0, weights)),
                     (idx.clone(), weights), (idx, weights)):
        recv, _, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, TOKENS, geometry.num_experts, use_fp8=False, return_recv_hook=True)
        with pytest.raises(sluice.Error, match="handle: the hook of its dispatch was not called"):
            buffer.low_latency_combine(recv, idx, weights, handle)
        hook()
        sums.append(buffer.low_latency_combine(recv, shown, w, handle)[0].clone())
    assert same(*sums[:2]) and same(*sums[2:]) and not same(*sums[1:3])


def test_device_memory_does_not_grow(gpu, space, checkpoint, geometry):
    engine = one_rank_engine(checkpoint, gpu, TOKENS)
    x, idx, weights = workload(geometry, space)

    def calls(num):
        for _ in range(num):
            sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode="low-latency")
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]

    allocated, free = calls(1000)
    later, free_later = calls(10_000)
    assert later <= allocated and free - free_later < 1 << 20


def test_device_memory_does_not_grow_through_the_names(gpu, space, checkpoint, geometry):
    """DeepEP's calls and W4A8 experts in both modes, e4m3 in both, a handle that nobody combines."""
    weights = published(checkpoint, geometry, space)
    buffer = Buffer(sluice.Transport.inproc(1)[0], backend=gpu)
    x, idx, w = tensors = workload(geometry, space)
    both = sluice.quantize(gpu, x)
    _, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(idx, geometry.num_experts)

    def body():
        through_the_names(buffer, tensors, weights, gpu, geometry.num_experts)
        buffer.low_latency_dispatch(x, idx, TOKENS, geometry.num_experts)
        (rows, scale), local, weight, _, handle, _ = buffer.dispatch(
            both, is_token_in_rank=in_rank, num_tokens_per_expert=to_expert, topk_idx=idx, topk_weights=w)
        y = w4a8.w4a8_moe_grouped(rows, scale, local, weight, *weights, backend=gpu)
        buffer.combine(y, handle, bias=x)

    def calls(num):
        for _ in range(num):
            body()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]

    allocated, free = calls(200)
    later, free_later = calls(2000)  # Of five calls each.
    assert later <= allocated and free - free_later < 1 << 20


def test_every_e4m3_crosses_in_normal_mode(gpu, space, geometry):
    """All 256 codes under scales of any bits; NaN comes as NaN."""
    buffer, codes = Buffer(sluice.Transport.inproc(1)[0], backend=gpu), torch.arange(256, dtype=torch.uint8)
    codes = torch.stack([codes.roll(37 * t) for t in range(TOKENS)] + [torch.full((256,), 0x81, dtype=torch.uint8)])
    scale = torch.randint(-(2**31), 2**31 - 1, (TOKENS + 1, 2), dtype=torch.int32).view(torch.float32)
    idx = torch.zeros(TOKENS + 1, 1, dtype=torch.int64, device="cuda")
    _, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(idx, geometry.num_experts)
    (got, got_scale), *_ = buffer.dispatch(
        (codes.cuda().view(torch.float8_e4m3fn), scale.t().contiguous().cuda().t()),
        is_token_in_rank=in_rank, num_tokens_per_expert=to_expert)
    wanted = torch.where(codes == 0xFF, 0x7F, codes.int()).to(torch.uint8)
    assert torch.equal(got.view(torch.uint8).cpu(), wanted)
    assert torch.equal(got_scale.view(torch.int32).cpu(), scale.view(torch.int32))


def test_waits_are_counted(gpu, space, geometry):
    buffer = Buffer(sluice.Transport.inproc(1)[0], backend=gpu)
    x, idx, w = workload(geometry, space)
    dispatch = lambda **k: buffer.low_latency_dispatch(  # noqa: E731
        x, idx, TOKENS, geometry.num_experts, use_fp8=False, **k)
    waits = torch.zeros(1, dtype=torch.int64, device="cuda")
    for _ in range(3):
        before = waits.clone()
        recv, _, handle, _, _ = dispatch(dispatch_wait_recv_cost_stats=waits)
        buffer.low_latency_combine(recv, idx, w, handle, combine_wait_recv_cost_stats=waits)
        assert int(waits) >= int(before) >= 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with pytest.raises(sluice.Error, match="which a graph cannot capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            dispatch(dispatch_wait_recv_cost_stats=waits)


def test_arrays_elsewhere_are_refused(gpu, space, checkpoint, geometry):
    buffer = Buffer(sluice.Transport.inproc(1)[0], backend=gpu)
    x, idx, w = workload(geometry, space)
    weights = published(checkpoint, geometry, space)
    recv, count, handle, _, _ = buffer.low_latency_dispatch(
        x, idx, TOKENS, geometry.num_experts, use_fp8=False)

    def refused(name, call, *args):
        with pytest.raises(sluice.Error, match=f"{name}: expected torch's memory on cuda:0, got .* cpu") as caught:
            call(*args)
        assert caught.value.code == "invalid_argument"

    refused("topk_idx", buffer.low_latency_dispatch, x, idx.cpu(), TOKENS, geometry.num_experts)
    refused("x", buffer.low_latency_combine, recv.cpu(), idx, w, handle)
    refused("topk_weights", buffer.low_latency_combine, recv, idx, w.cpu(), handle)
    refused("masked_m", w4a8.w4a8_moe_masked, recv, None, count.cpu(), *weights)
    refused("topk_weights", w4a8.w4a8_moe_grouped, x, None, idx, w.cpu(), *weights)
    y, _, _ = buffer.low_latency_combine(recv, idx, w, handle)
    torch.cuda.synchronize()
    assert y.isfinite().all()


@pytest.mark.parametrize("recipe, mode", [
    ("direct", "low-latency"), ("requant-static", "low-latency"), ("direct", "normal"), ("bf16-static", "normal")])
def test_same_bytes_as_the_command_line(gpu, space, checkpoint, geometry, command_line, tmp_path, recipe, mode):
    """`sluice run` on the same GPU, for the same seed."""
    engine = one_rank_engine(checkpoint, gpu, TOKENS, **{mode.replace("-", "_"): recipe})
    x, idx, weights = workload(geometry, space)
    y = sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode=mode)
    torch.cuda.synchronize()
    report = tmp_path / "run.json"
    subprocess.run(
        [command_line, "--json", report, "run", "--checkpoint", checkpoint.path, "--ranks", "1", "--backend", "cuda",
         "--tokens", str(TOKENS), "--mode", mode, "--recipe", recipe, "--repeat", "1", "--verify", "4"],
        check=True, capture_output=True,
    )
    assert json.loads(report.read_text())["outputs_digest"] == outputs_digest([space.bits(y)])
