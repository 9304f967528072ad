"""Operators of torch: schemas and fakes that torch's own checks accept, and torch.compile."""

import contextlib
import copy
import gc
import io
import pickle
import sys

import numpy as np
import pytest
from conftest import LAYER, one_rank_engine

import sluice

torch = pytest.importorskip("torch", reason="torch is not installed")
torch_ops = pytest.importorskip("sluice.torch_ops")
forward_ad = torch.autograd.forward_ad
FakeTensorMode = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode
TorchDispatchMode = pytest.importorskip("torch.utils._python_dispatch").TorchDispatchMode
TorchFunctionMode = torch.overrides.TorchFunctionMode
make_fx = pytest.importorskip("torch.fx.experimental.proxy_tensor").make_fx

TOKENS = 6


@pytest.fixture()
def made(checkpoint, geometry, device):
    """Backend, engine and tensors."""
    backend = sluice.Backend(device, **({"num_threads": 1} if device == "cpu" else {}))
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    tensors = [t.to(device) for t in (x, torch.from_numpy(idx), torch.from_numpy(weights))]
    return backend, one_rank_engine(checkpoint, backend), tensors


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("mode", ["low-latency", "normal"])
def test_compiled_layer(made, mode):
    _, engine, tensors = made
    expected = sluice.moe_forward(engine, tensors[0], sluice.Routing(*tensors[1:]), mode=mode)
    layer = torch_ops.MoeLayer(engine, mode)
    assert same(layer(*tensors), expected)
    compiled = torch.compile(layer, fullgraph=True)
    for _ in range(2):
        assert same(compiled(*tensors), expected)

    def block(x, idx, weights):
        layer(x, idx, weights)  # Nobody reads this one; it is collective and must run.
        return layer(x * 1.0, idx, weights) + x

    ran = []
    original = torch_ops._core.moe_forward
    torch_ops._core.moe_forward = lambda *a, **k: ran.append(1) or original(*a, **k)
    try:
        y = torch.compile(block, fullgraph=True)(*tensors)
    finally:
        torch_ops._core.moe_forward = original
    assert len(ran) == 2 and same(y, expected + tensors[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("mode", ["low-latency", "normal"])
def test_compiled_layer_in_a_graph(checkpoint, geometry, mode):
    """Compiled with what stands around it, captured, and replayed over other tokens."""
    engine = one_rank_engine(checkpoint, sluice.Backend("cuda"), TOKENS)

    def inputs(first):
        x, idx, weights = sluice.make_workload(geometry, TOKENS, first_token=first)
        x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return [t.cuda() for t in (x, torch.from_numpy(idx), torch.from_numpy(weights))]

    layer = torch_ops.MoeLayer(engine, mode)
    block = torch.compile(lambda x, idx, weights: layer(x * 0.5, idx, weights) + x, fullgraph=True)
    tensors, stream, graph = inputs(0), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block(*tensors)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        y = block(*tensors)
    for first in (0, 100):
        others = inputs(first)
        for target, source in zip(tensors, others):
            target.copy_(source)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        wanted = sluice.moe_forward(engine, others[0] * 0.5, sluice.Routing(*others[1:]), mode=mode) + others[0]
        assert same(y, wanted)
    engine.check()


def test_experts_layer(checkpoint, geometry, made):
    backend, _, (x, _, _) = made
    experts = sluice.repack(checkpoint.load_experts(LAYER, 0, 2), backend, max_rows=2 * TOKENS)
    recipe = sluice.Recipe("direct")
    codes, scale = sluice.quantize(backend, torch.stack([x, x]))
    num_rows = torch.tensor([TOKENS, 2], dtype=torch.int32, device=x.device)
    batch = sluice.ExpertBatch(codes, num_rows, x_scale=scale)
    expected = sluice.experts_masked(experts, batch, recipe)
    layer = torch.compile(torch_ops.ExpertsLayer(experts, recipe), fullgraph=True)
    y = layer(codes, scale, num_rows)
    assert y.dtype == torch.bfloat16 and same(y[0], expected[0]) and same(y[1, :2], expected[1, :2])


def test_formats(made):
    backend, _, (x, _, _) = made
    owner = torch.nn.Module()
    number = torch_ops.backend_number(backend, owner)
    codes, scale = torch.ops.sluice.quantize(x, number, False)
    moved = torch.ops.sluice.requantize(codes, scale, 0.05, number)
    assert same(moved, sluice.requantize(backend, codes, scale, 0.05))
    compiled = torch.compile(lambda t: torch.ops.sluice.quantize(t, number, True), fullgraph=True)
    for one, other in zip(compiled(x), sluice.quantize(backend, x, pow2=True)):
        assert same(one, other)


def test_opcheck(made):
    backend, engine, (x, idx, weights) = made
    layer = torch_ops.MoeLayer(engine, "normal")
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.sluice.moe_forward.default, (x, idx, weights, layer.number, "normal"), test_utils=checks)
    number = torch_ops.backend_number(backend, layer)
    torch.library.opcheck(torch.ops.sluice.quantize.default, (x, number, False), test_utils=checks[1:2])


def test_a_gradient_is_refused(checkpoint, made):
    """It was left out, and what stood around the layer trained without it."""
    backend, engine, (x, idx, weights) = made
    layer = torch_ops.MoeLayer(engine, "normal")
    expected = layer(x, idx, weights)
    experts = sluice.repack(checkpoint.load_experts(LAYER, 0, 2), backend, max_rows=2 * TOKENS)
    rows = torch_ops.ExpertsLayer(experts, sluice.Recipe("direct-bf16"))
    num_rows = torch.tensor([TOKENS, 2], dtype=torch.int32, device=x.device)
    number = torch_ops.backend_number(backend, layer)
    calls = {
        "moe_forward": lambda leaf: leaf + layer(leaf, idx, weights),
        "experts_masked": lambda leaf: rows(torch.stack([leaf, leaf]), None, num_rows),
        "quantize": lambda leaf: leaf.float().sum() + torch.ops.sluice.quantize(leaf, number, False)[1].sum(),
    }
    for name, call in calls.items():
        leaf = x.clone().requires_grad_()
        with pytest.raises(sluice.Error, match=f"torch.ops.sluice.{name} has no backward pass") as error:
            call(leaf).float().sum().backward()
        assert error.value.code == "unsupported" and leaf.grad is None
    leaf, compiled = x.clone().requires_grad_(), torch.compile(layer, fullgraph=True)
    with pytest.raises(Exception, match="torch.ops.sluice.moe_forward has no backward pass"):
        compiled(leaf, idx, weights)  # As torch compiles both passes; it wraps what they raise.
    for mode in torch.no_grad, torch.inference_mode:
        for call in layer, compiled:
            with mode():
                y = call(leaf, idx, weights)
            assert not y.requires_grad and same(y, expected)


def test_a_tangent_is_refused(made):
    """Forward mode left it out, and what stood around the layer went on without it."""
    _, engine, (x, idx, weights) = made
    layer = torch_ops.MoeLayer(engine, "normal")
    operator = torch.ops.sluice.moe_forward
    for call in layer, lambda *a: operator(*a, layer.number, "normal"):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(sluice.Error, match="moe_forward has no forward-mode derivative") as error:
                call(dual, idx, weights)
            assert error.value.code == "unsupported"
            assert same(call(x, idx, weights), layer(x, idx, weights))
        with pytest.raises(sluice.Error, match="no forward-mode derivative"):
            torch.func.jvp(lambda t: t + call(t, idx, weights), (x,), (x,))


def python_functions(call):
    """Names of the functions of Python that a call goes through."""
    names = []
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode, torch.autocast])
def test_an_eager_call_does_without_the_dispatcher(checkpoint, made, context):
    """Each trip through it and back into Python takes as long as all else of the call."""
    backend, engine, (x, idx, weights) = made
    layer = torch_ops.MoeLayer(engine, "normal")
    experts = sluice.repack(checkpoint.load_experts(LAYER, 0, 2), backend, max_rows=2 * TOKENS)
    rows_layer = torch_ops.ExpertsLayer(experts, sluice.Recipe("direct-bf16"))
    rows, num_rows = torch.stack([x, x]), torch.tensor([TOKENS, TOKENS], dtype=torch.int32, device=x.device)
    expected, expected_rows = layer(x, idx, weights), rows_layer(rows, None, num_rows)
    with context(x.device.type) if context is torch.autocast else context():
        assert same(layer(x, idx, weights), expected) and same(rows_layer(rows, None, num_rows), expected_rows)
        for call in lambda: layer(x, idx, weights), lambda: rows_layer(rows, None, num_rows):
            names = python_functions(call)
            assert "run_alone" in names and "__call__" not in names and "redispatch" not in names, names
        names = python_functions(lambda: torch.ops.sluice.moe_forward(x, idx, weights, layer.number, "normal"))
        assert "__call__" in names and "redispatch" not in names, names


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    names = ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names += (str(func),)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_whoever_watches_sees_an_eager_call(made):
    _, engine, (x, idx, weights) = made
    layer = torch_ops.MoeLayer(engine, "normal")
    y, name = layer(x, idx, weights), "sluice::moe_forward"
    for mode in Seen(), SeenFunctions():
        with mode:
            assert same(layer(x, idx, weights), y)
        assert any(name.replace("::", one) in seen for seen in mode.names for one in ("::", ".")), mode.names
    with torch.profiler.profile() as profile:
        layer(x, idx, weights)
    assert name in [event.name for event in profile.events()]
    graph = make_fx(layer)(x, idx, weights)
    assert any(node.target is torch.ops.sluice.moe_forward.default for node in graph.graph.nodes)
    assert same(graph(x, idx, weights), y)
    with FakeTensorMode() as fake:
        one = layer(*(fake.from_tensor(t) for t in (x, idx, weights)))
    assert one.shape == y.shape and type(one) is not torch.Tensor
    traced = torch.jit.trace(layer, (x, idx, weights), check_trace=False)
    assert "sluice::moe_forward" in str(traced.graph) and same(traced(x, idx, weights), y)
    two = torch.vmap(layer, in_dims=(0, None, None))(torch.stack([x, x]), idx, weights)
    assert same(two[0], y) and same(two[1], y)


def test_tensors_that_the_dispatcher_resolves(made):
    """C++ refuses them, and the operator takes them."""
    _, engine, (x, idx, weights) = made
    layer = torch_ops.MoeLayer(engine, "normal")
    y = layer(x, idx, weights)
    assert same(layer(torch._neg_view(-x), idx, weights), y)
    assert same(layer(x, idx, torch._neg_view(-weights)), y)
    on_meta = layer(x.to("meta"), idx.to("meta"), weights.to("meta"))
    assert on_meta.is_meta and on_meta.shape == y.shape
    assert same(layer(torch.nn.Parameter(x, requires_grad=False), idx, weights), y)
    assert same(layer(x.as_subclass(Subclass), idx, weights).as_subclass(torch.Tensor), y)
    with pytest.raises(sluice.Error, match="x: expected C-contiguous") as error:
        layer(x.t().contiguous().t(), idx, weights)
    assert error.value.code == "invalid_argument"


def test_objects_go_with_their_module(made):
    _, engine, _ = made
    gc.collect()  # What tests before this one left in cycles.
    before = len(torch_ops._objects)
    layer = torch_ops.MoeLayer(engine, "normal")
    assert len(torch_ops._objects) == before + 1
    del layer
    gc.collect()
    assert len(torch_ops._objects) == before


def test_a_mode_that_is_not_there(checkpoint, device):
    backend = sluice.Backend(device, **({"num_threads": 1} if device == "cpu" else {}))
    engine = one_rank_engine(checkpoint, backend, normal=None)
    with pytest.raises(sluice.Error, match="normal"):
        torch_ops.MoeLayer(engine, "normal")


def test_a_copy_outlives_its_original(made):
    _, engine, tensors = made
    layer = torch_ops.MoeLayer(engine, "normal")
    expected = layer(*tensors)
    copies = [copy.deepcopy(layer), copy.copy(layer), copy.deepcopy(torch.nn.Sequential(layer))[0]]
    assert len({layer.number, *(c.number for c in copies)}) == 4 and all(c.mode == "normal" for c in copies)
    number = layer.number
    del layer
    gc.collect()
    for one in copies:
        assert same(one(*tensors), expected)
    with pytest.raises(sluice.Error, match=f"number {number}: the module that held it is gone"):
        torch.ops.sluice.moe_forward(*tensors, number, "normal")


def test_no_file_holds_a_layer(made):
    """Its number would be another layer's in another process."""
    layer = torch_ops.MoeLayer(made[1], "normal")
    for save in pickle.dumps, lambda one: torch.save(one, io.BytesIO()), lambda one: pickle.dumps(torch.nn.Sequential(one)):
        with pytest.raises(sluice.Error, match="MoeLayer: its experts live in this process alone") as error:
            save(layer)
        assert error.value.code == "unsupported"
