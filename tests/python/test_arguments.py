"""Every wrong argument is refused, by name, with what was expected and what came."""

import os
import pickle

import numpy as np
import pytest
from conftest import LAYER, one_rank_engine

import sluice

TOKENS = 4


@pytest.fixture(scope="module")
def engine(checkpoint, backend):
    return one_rank_engine(checkpoint, backend)


@pytest.fixture(scope="module")
def workload(geometry):
    return sluice.make_workload(geometry, TOKENS)


@pytest.fixture(scope="module")
def routing(workload):
    return sluice.Routing(workload[1], workload[2])


@pytest.fixture()
def exchange(backend, geometry):
    return sluice.Exchange(
        sluice.Transport.inproc(1)[0],
        backend,
        num_experts=geometry.num_experts,
        num_topk=geometry.num_topk,
        hidden=geometry.hidden,
        max_tokens_per_rank=8,
    )


def refused(text, call, *args, code="invalid_argument", **kwargs):
    with pytest.raises(sluice.Error) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code, caught.value
    for part in text.split(" ... "):
        assert part in str(caught.value), caught.value
    return caught.value


def wide(array):
    """The same values, every other element of a wider array."""
    result = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)[..., ::2]
    result[...] = array
    return result


class Elsewhere:
    """An array that says it lives on a device of another kind."""

    def __init__(self, array, device):
        self.array, self.device = array, device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        return self.array.__dlpack__()


def test_whole_numbers_that_do_not_fit(geometry, checkpoint, backend):
    """By name, as numbers out of range; what is no whole number is of a wrong type."""
    limit, one = 2**31, sluice.Transport.inproc(1)[0]
    for number in (limit, -limit - 1, 2**63, -(2**200), np.int64(2**40)):
        text = f"{number} does not fit into 32 bits"
        for name in ("num_threads", "local_rank", "num_local_ranks"):
            refused(f"{name} {text}", sluice.Backend, "cpu", **{name: number})
        refused(f"num_ranks {text}", sluice.Transport.inproc, number)
        refused(f"layer {text}", checkpoint.load_experts, number, 0, 1)
        refused(f"first_expert {text}", checkpoint.load_experts, 3, number, 1)
        refused(f"num_experts {text}", checkpoint.load_experts, 3, 0, number)
        for name in ("num_ranks", "max_tokens_per_rank", "max_m", "num_layers", "num_slots"):
            refused(f"{name} {text}", sluice.plan, geometry, **{"num_ranks": 2, "max_tokens_per_rank": 4, name: number})
        for name in ("layer", "max_tokens_per_rank", "max_m", "num_slots", "sum_parts"):
            refused(f"{name} {text}", sluice.Engine, checkpoint, one, backend,
                    **{"layer": 3, "max_tokens_per_rank": 4, name: number})
    refused("max_tokens_per_rank 16777216 of 128 ranks: 2147483648 rows for an expert, at most 2^30",
            sluice.Exchange.workspace_bytes, num_experts=128, num_topk=2, hidden=256, max_tokens_per_rank=1 << 24,
            num_ranks=128)
    refused("num_threads of very many digits does not fit", sluice.Backend, "cpu", num_threads=10**5000)
    refused(f"num_threads {limit - 1}", sluice.Backend, "cpu", num_threads=limit - 1)
    for other in (1.0, "1", None, np.float32(1)):
        with pytest.raises(TypeError):
            sluice.Backend("cpu", num_threads=other)


def test_x(engine, workload, routing, geometry):
    x = workload[0]
    forward = lambda a: sluice.moe_forward(engine, a, routing, mode="normal")  # noqa: E731
    refused("x: expected dtype bfloat16 ... got float32", forward, x.astype(np.float32))
    refused("x: expected dtype bfloat16 ... got int16", forward, x.view(np.int16))
    refused("x: expected shape [num_tokens, 256], got [4, 128]", forward, x[:, :128].copy())
    refused("x: expected shape ... got [1024]", forward, x.reshape(-1))
    refused("x: expected C-contiguous memory ... strides [512, 2]", forward, wide(x))
    refused("x: expected C-contiguous memory", forward, x.T.copy().T)
    refused("x: expected an array ... got list", forward, x.tolist())
    refused("x: expected an array ... got str", forward, "x")
    refused("x: expected an array ... got ndarray of >f4: ... byte order", forward, np.zeros((4, 256), ">f4"))
    refused("x: expected an array ... got ndarray of object: ", forward, np.zeros((4, 256), object))
    refused("num_tokens 9 exceeds max_tokens_per_rank 8", forward, np.zeros((9, 256), np.uint16))
    with pytest.raises(TypeError):
        forward(None)


def test_routing(engine, workload):
    x, idx, weights = workload
    refused("topk_idx: expected dtype int32 or int64, got float32", sluice.Routing, weights, weights)
    refused("topk_idx: expected shape [num_tokens, num_topk], got [4]", sluice.Routing, idx[:, 0].copy(), weights)
    refused("topk_weights: expected dtype float32, got float64", sluice.Routing, idx, weights.astype(float))
    refused("topk_weights: expected shape [4, 2], got [3, 2]", sluice.Routing, idx, weights[:3])
    refused("topk_weights: expected C-contiguous", sluice.Routing, idx, wide(weights))
    short = sluice.Routing(idx[:3], weights[:3])
    refused("topk_idx ... [3, 2] ... [4, 2]", sluice.moe_forward, engine, x, short, mode="normal")
    bad = sluice.Routing(np.full_like(idx, 8), weights)
    refused("8", sluice.moe_forward, engine, x, bad, mode="normal")
    with pytest.raises(TypeError):
        sluice.moe_forward(engine, x, idx, mode="normal")


def test_out(engine, workload, routing):
    x = workload[0]
    forward = lambda out: sluice.moe_forward(engine, x, routing, mode="normal", out=out)  # noqa: E731
    refused("out: expected dtype bfloat16 ... got float32", forward, np.zeros(x.shape, np.float32))
    refused("out: expected shape ... got [3, 256]", forward, np.zeros((3, 256), np.uint16))
    refused("out: expected C-contiguous", forward, wide(x))
    read_only = np.zeros_like(x)
    read_only.flags.writeable = False
    refused("out: expected memory that is writable, got a read-only array", forward, read_only)


def test_inputs_may_be_read_only(engine, workload, routing):
    x = workload[0].copy()
    x.flags.writeable = False
    assert np.any(sluice.moe_forward(engine, x, routing, mode="normal"))


def test_ml_dtypes(engine, workload, routing):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = workload[0].view(ml_dtypes.bfloat16)
    out = np.zeros(x.shape, ml_dtypes.bfloat16)
    assert sluice.moe_forward(engine, x, routing, mode="normal", out=out) is out
    assert np.array_equal(out.view(np.uint16), sluice.moe_forward(engine, workload[0], routing, mode="normal"))
    refused("x: expected dtype", sluice.moe_forward, engine, x.astype(np.float16), routing, mode="normal")


def test_devices(engine, workload, routing):
    x = workload[0]
    host = sluice.moe_forward(engine, Elsewhere(x, (1, 0)), routing, mode="normal")
    assert np.array_equal(host, sluice.moe_forward(engine, x, routing, mode="normal"))
    refused("device 'tpu' is not one of", sluice.Backend, "tpu")
    refused("device 'cuda:x' is not one of", sluice.Backend, "cuda:x")
    refused("num_threads -1", sluice.Backend, num_threads=-1)


def test_modes_and_recipes(checkpoint, backend, engine, workload, routing):
    x = workload[0]
    refused("mode: expected 'low-latency' or 'normal'", sluice.moe_forward, engine, x, routing)
    refused("fast", sluice.moe_forward, engine, x, routing, mode="fast")
    one = one_rank_engine(checkpoint, backend, normal=None)
    refused("without a recipe for normal mode", sluice.moe_forward, one, x, routing, mode="normal")
    refused("direct", sluice.Recipe, "best")
    refused("s1 and s2: give both or neither", sluice.Recipe, "static", s1=1.0)
    refused("recipe static in low-latency mode needs static activation scales, and none are given for the layer; ",
            sluice.Recipe, "static", code="unsupported")
    refused("s1", sluice.Recipe, "static", s1=-1.0, s2=1.0)
    refused("layer 99", sluice.Engine, checkpoint, sluice.Transport.inproc(1)[0], backend, layer=99,
            max_tokens_per_rank=1)


def test_recipes_by_their_fields():
    for name in sluice.recipe_names():
        recipe = sluice.Recipe(name, s1=1.0, s2=1.0)
        fields = {"wire": recipe.wire, "gemm1": recipe.gemm1, "gemm2": recipe.gemm2}
        same = sluice.Recipe.from_fields(**fields, mode="normal", s1=1.0, s2=1.0)
        assert same.name == name and same.mode == "normal" and (same.s1, same.s2) == (recipe.s1, recipe.s2)
        again = sluice.Recipe(name, s1=1.0, s2=1.0)
        assert again == recipe != same and hash(again) == hash(recipe) and len({again, recipe, same}) == 2
    assert sluice.Recipe("static", s1=1.0, s2=1.0) != sluice.Recipe("static", s1=1.0, s2=2.0)
    make = sluice.Recipe.from_fields
    unnamed = make(wire="bf16", gemm1="static-pow2", gemm2="group", s1=3.0, s2=1.0)
    assert unnamed.name not in sluice.recipe_names() and (unnamed.s1, unnamed.s2) == (4.0, 0.0)
    refused("gemm1 none", make, wire="bf16", gemm1="none", gemm2="group", code="unsupported")
    refused("cast 'groups' is none of", make, wire="bf16", gemm1="groups", gemm2="group")
    refused("wire 'fp8' is none of", make, wire="fp8", gemm1="none", gemm2="group")
    refused("input_scale", make, wire="bf16", gemm1="static", gemm2="group", code="unsupported")


def test_checkpoint(tmp_path, checkpoint, geometry):
    refused("nowhere", sluice.Checkpoint, tmp_path / "nowhere", code="io")
    refused("", sluice.make_checkpoint, checkpoint.path, geometry)
    raw = tmp_path / os.fsdecode(b"n\xff")
    raw.symlink_to(checkpoint.path)
    assert sluice.Checkpoint(raw).path == raw and repr(sluice.Checkpoint(raw)) == f"<sluice.Checkpoint w4afp8 {raw}>"
    refused(f"{raw}{os.sep}none", sluice.Checkpoint, raw / "none", code="io")
    refused("scale_dtype 'f16'", sluice.make_checkpoint, tmp_path / "a", geometry, scale_dtype="f16")
    refused("tiny", sluice.ModelGeometry.preset, "huge")
    refused("", checkpoint.load_experts, LAYER, 7, 2)
    refused("", checkpoint.load_experts, 0, 0, 1)
    weights = checkpoint.load_experts(LAYER, 0, 2)
    refused("expert 2 is not in [0, 2)", weights.matrix, 2, "gate")
    refused("matrix 'w1'", weights.matrix, 0, "w1")


def test_exchange(exchange, workload, routing, geometry, backend):
    x = workload[0]
    dispatched = sluice.dispatch(exchange, x, routing)
    rows = np.zeros(dispatched.batch.x.shape, np.uint16)
    refused("expert_y: expected dtype bfloat16", sluice.combine, dispatched, rows.astype(np.uint8))
    refused("expert_y: expected shape [8, 8, 256]", sluice.combine, dispatched, rows[1:])
    refused("out: expected shape [4, 256]", sluice.combine, dispatched, rows, out=x[:2])
    assert not dispatched.consumed
    sluice.combine(dispatched, rows)
    refused("consumed", sluice.combine, dispatched, rows)
    refused("consumed", lambda: dispatched.batch)
    sent = exchange.dispatch_send(x, routing)
    refused("receive", lambda: sent.batch)
    make = lambda **k: sluice.Exchange(  # noqa: E731
        sluice.Transport.inproc(1)[0], backend,
        **{**dict(num_experts=8, num_topk=2, hidden=256, max_tokens_per_rank=8), **k})
    refused("hidden 200", make, hidden=200)
    refused("num_topk 33", make, num_topk=33)
    refused("wire 'fp4' is none of", make, wire="fp4")
    refused("num_in_flight 9", make, num_in_flight=9)
    refused("num_ranks 0", sluice.Transport.inproc, 0)


def test_a_missing_peer_is_named(checkpoint, backend):
    transport = sluice.Transport.inproc(2)[0]
    error = refused("missing rank(s) 1", sluice.Engine, checkpoint, transport, backend, layer=LAYER,
                    max_tokens_per_rank=1, timeout_ms=50, code="peer_timeout")
    assert error.ranks == (1,)


def test_experts(checkpoint, backend):
    experts = sluice.repack(checkpoint.load_experts(LAYER, 0, 2), backend, max_rows=8)
    recipe = sluice.Recipe("direct-bf16")
    x, num_rows = np.zeros((2, 4, 256), np.uint16), np.array([1, 4], np.int32)
    run = lambda *a, r=recipe, **k: sluice.experts_masked(  # noqa: E731
        experts, sluice.ExpertBatch(*a, **k), r)
    assert run(x, num_rows).shape == x.shape
    refused("x: expected dtype", run, x.astype(np.float32), num_rows)
    refused("x: expected shape [num_experts, max_m, width]", run, x[0], num_rows)
    refused("num_rows: expected dtype int32, got int64", run, x, num_rows.astype(np.int64))
    refused("num_rows: expected shape", run, x, num_rows[:1])
    refused("num_rows[1] = 5 is not in [0, 4]", run, x, np.array([0, 5], np.int32))
    refused("num_rows[0] = -1", run, x, np.array([-1, 0], np.int32))
    refused("row_begin[1]", run, x, num_rows, row_begin=np.array([0, 5]))
    refused("row_begin: expected dtype int64", run, x, num_rows, row_begin=num_rows)
    refused("x has 10 rows, more than max_rows 8", run, np.zeros((2, 5, 256), np.uint16), num_rows)
    refused("3 experts, the weights have 2", run, np.zeros((3, 2, 256), np.uint16), np.zeros(3, np.int32))
    refused("rows of 128, the weights take 256", run, np.zeros((2, 4, 128), np.uint16), num_rows)
    refused("x_scale is given", run, x, num_rows, x_scale=np.zeros((2, 4, 2), np.float32))
    refused("x_scale", run, x.astype(np.uint8), num_rows, r=sluice.Recipe("direct"))
    refused("max_rows 0", sluice.repack, checkpoint.load_experts(LAYER, 0, 2), backend, max_rows=0)
    rows = sluice.ExpertBatch(np.zeros((8, 256), np.uint16), np.array([5, 4], np.int32))
    refused("row_begin[1]", sluice.experts_grouped, experts, rows, recipe)


def test_quantize(backend):
    x = np.zeros((3, 256), np.uint16)
    refused("x: expected dtype", sluice.quantize, backend, x.astype(np.uint8))
    refused("rows of 100", sluice.quantize, backend, np.zeros((3, 100), np.uint16))
    refused("static_scale", sluice.quantize, backend, x, static_scale=0.0)
    refused("static_scale", sluice.quantize, backend, x, static_scale=float("nan"))
    refused("pow2", sluice.quantize, backend, x, static_scale=1.0, pow2=True)
    codes, scale = sluice.quantize(backend, x)
    refused("out[0]: expected shape", sluice.quantize, backend, x, out=(codes[:2], scale))
    refused("out[1]: expected", sluice.quantize, backend, x, out=(codes, None))
    refused("codes and x are the same memory", sluice.requantize, backend, codes, scale, 1.0, out=codes)
    refused("x_scale: expected shape [3, 2]", sluice.requantize, backend, codes, scale[:2], 1.0)


def test_weights_from_arrays(checkpoint):
    codes, scales = np.zeros((2, 128, 128), np.uint8), np.ones((2, 128, 2), np.float32)
    down = np.zeros((2, 256, 64), np.uint8), np.ones((2, 256, 1), np.float32)
    make = sluice.ExpertWeights.from_arrays
    assert len(make((codes, scales), (codes, scales), down)) == 2
    refused("up scales: expected dtype float32 or bfloat16", make, (codes, scales), (codes, scales.astype(float)), down)
    refused("down codes: expected shape", make, (codes, scales), (codes, scales), (codes, scales))
    refused("gate codes: expected dtype packed int4", make, (scales, scales), (codes, scales), down)
    refused("group_size 64", make, (codes, scales), (codes, scales), down, group_size=64)
    geometry = make((codes, scales), (codes, scales), down, weight_format="int4", activation="swiglu").geometry
    assert geometry.weight_format == "int4" and geometry.activation == "swiglu"
    assert checkpoint.geometry.weight_format == "int4" and checkpoint.geometry.activation == "swiglu"
    arrays = (codes, scales), (codes, scales), down
    refused("'nvfp4' is none of: int4, mxfp4", make, *arrays, weight_format="nvfp4", code="unsupported")
    refused("group_size 128 is not mxfp4's 32", make, *arrays, weight_format="mxfp4")
    refused("gate scales: expected dtype e8m0", make, *arrays, weight_format="mxfp4", group_size=32)
    powers = [(c, np.full((2, c.shape[1], c.shape[2] // 16), 127, np.uint8)) for c in (codes, codes, down[0])]
    assert make(*powers, weight_format="mxfp4", group_size=32).geometry.weight_format == "mxfp4"
    refused("'gelu' is none of: swiglu", make, *arrays, activation="gelu", code="unsupported")
    assert make(*arrays, activation="swiglu:limit=7").geometry.activation == "swiglu:limit=7"
    refused("limit = -7 must be finite", make, *arrays, activation="swiglu:limit=-7")
    assert checkpoint.activation(checkpoint.moe_layers[0]) == "swiglu"
    refused("layer 99", checkpoint.activation, 99)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
def test_scales_of_arrays_are_as_those_of_checkpoints(backend, dtype, matrix):
    number = np.dtype(np.float32) if dtype == "float32" else pytest.importorskip("ml_dtypes").bfloat16
    codes = {"gate": (2, 128, 128), "up": (2, 128, 128), "down": (2, 256, 64)}
    names = list(codes)

    def make(value):
        given = {n: (np.zeros(s, np.uint8), np.ones((2, s[1], s[2] // 64), number)) for n, s in codes.items()}
        given[matrix][1][1, 5, -1] = value
        return sluice.ExpertWeights.from_arrays(*[given[n] for n in names])

    group = 0 if matrix == "down" else 1
    for value in (0.0, -0.0, -1.0, np.nan, np.inf, 2.0**118):
        refused(f"expert 1 {matrix}: scale [5, {group}] = ... is not a positive finite number below 2^118", make, value)
    tiny = float(np.array(1e-45 if dtype == "float32" else 1e-40, number))
    assert tiny > 0  # A subnormal number is one.
    for value in (tiny, 3e35):
        sluice.repack(make(value), backend, max_rows=4)


def test_scales_of_two_to_the_118_are_refused_in_mxfp4_too():
    codes = [np.zeros(shape, np.uint8) for shape in ((1, 128, 64), (1, 128, 64), (1, 128, 64))]
    scales = [np.full((1, 128, 4), 127, np.uint8) for _ in codes]
    make = sluice.ExpertWeights.from_arrays
    for bad in (255, 245):
        scales[1][0, 3, 2] = bad
        refused("expert 0 up: scale [3, 2] = ", make, *zip(codes, scales), weight_format="mxfp4", group_size=32)
    scales[1][0, 3, 2] = 0
    assert len(make(*zip(codes, scales), weight_format="mxfp4", group_size=32)) == 1


def test_error_is_an_exception_like_others():
    error = sluice.Error("transport", "text", [2, 5])
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, RuntimeError) and copy.code == "transport" and str(copy) == "text"
    assert copy.ranks == (2, 5) and sluice.Error("io", "text").ranks == ()
