"""sluice.compat.w4a8: the bytes of experts and engine, for every kind of input, repacked once."""

import gc
import json
import shutil

import numpy as np
import pytest
from conftest import LAYER, one_rank_engine
from spaces import Numpy, Torch, as_bf16, as_float

import sluice
from sluice.compat import _w4a8_cache, w4a8

TOKENS, MAX_M = 12, 8


@pytest.fixture()
def weights(space, arrays):
    return tuple(space.array(a.copy()) for a in arrays)


def masked_input(geometry):
    rng = np.random.default_rng(3)
    x = as_bf16(rng.standard_normal((geometry.num_experts, MAX_M, geometry.hidden)).astype(np.float32))
    num_rows = np.array([0, 1, MAX_M, 3, 2, 0, 5, 7], np.int32)
    return x, num_rows


CASES = {  # recipe -> (e4m3 rows, their scales, static scales)
    "direct": (True, True, False), "direct-bf16": (False, False, False),
    "bf16-static": (False, False, True), "requant-static": (True, True, True),
    "static": (True, False, True),
}  # fmt: skip


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
def test_masked(checkpoint, geometry, backend, space, weights, recipe, named):
    is_e4m3, has_scale, is_static = CASES[recipe]
    s1, s2 = checkpoint.static_scales(LAYER)
    x, num_rows = masked_input(geometry)
    codes, scale = sluice.quantize(backend, x, static_scale=None if has_scale or not is_e4m3 else s1)
    rows = codes if is_e4m3 else x
    experts = sluice.repack(checkpoint.load_experts(LAYER, 0, 8), backend, max_rows=8 * MAX_M)
    batch = sluice.ExpertBatch(rows, num_rows, x_scale=scale if has_scale else None)
    expected = sluice.experts_masked(
        experts, batch, sluice.Recipe(recipe, s1=s1, s2=s2), out=np.zeros(x.shape, np.uint16))

    given = space.array(rows) if is_e4m3 else space.bf16(x)
    if is_e4m3 and isinstance(space, Torch):
        given = given.view(space.torch.float8_e4m3fn)
    given_scale = None
    if has_scale:  # As deep_ep gives them: rows densest.
        given_scale = space.array(scale)
        given_scale = given_scale.transpose(0, 2, 1).copy().transpose(0, 2, 1) if isinstance(space, Numpy) \
            else given_scale.transpose(1, 2).contiguous().transpose(1, 2)
    out = space.bf16(np.zeros(x.shape, np.uint16))
    statics = {"a1_scale": space.array(np.array([s1, s1 / 2], np.float32)), "a2_scale": s2} if is_static else {}
    y = w4a8.w4a8_moe_masked(
        given, given_scale, space.array(num_rows), *weights, **statics, out=out, backend=backend,
        recipe=recipe if named else None)
    assert y is out and np.array_equal(space.bits(y), expected)
    for e, n in enumerate(num_rows):
        assert np.any(expected[e, :n]) or n == 0


@pytest.mark.parametrize("recipe", ["direct-bf16", "direct", "bf16-static"])
def test_grouped_gives_what_the_engine_gives(checkpoint, geometry, backend, space, weights, recipe):
    """Dispatch quantizes once, the experts' rows are the same, and so is the order of the sum."""
    is_e4m3, _, is_static = CASES[recipe]
    x, idx, w = sluice.make_workload(geometry, TOKENS)
    idx = idx.astype(np.int64)
    idx[0, 1], idx[3] = -1, -1
    engine = one_rank_engine(checkpoint, backend, TOKENS, normal=recipe, low_latency=None)
    expected = sluice.moe_forward(engine, x, sluice.Routing(idx, w))
    s1, s2 = checkpoint.static_scales(LAYER)
    rows, scale = (sluice.quantize(backend, space.bf16(x)) if is_e4m3 else (space.bf16(x), None))
    y = w4a8.w4a8_moe_grouped(
        rows, scale, space.array(idx), space.array(w), *weights, backend=backend,
        **({"a1_scale": s1, "a2_scale": s2} if is_static else {}))
    assert np.array_equal(space.bits(y), expected) and np.any(expected) and not np.any(expected[3])


@pytest.mark.parametrize("keys, activation", [
    ({"model_type": "deepseek_v4", "swiglu_limit": 0.05}, "swiglu:limit=0.05"),
    ({"model_type": "gpt_oss", "swiglu_limit": 0.05}, "swiglu-oai:alpha=1.702,limit=0.05"),
    ({"hidden_act": "situ", "activation_situ_beta": 0.5, "activation_situ_linear_beta": 0.1},
     "situ:beta=0.5,linear_beta=0.1"),
])
def test_the_activation_is_an_argument(checkpoint, geometry, backend, space, arrays, tmp_path, keys, activation):
    """It is what an engine reads from config.json; weights alone do not tell it."""
    shutil.copytree(checkpoint.path, tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    other = sluice.Checkpoint(tmp_path / "other")
    assert other.activation(LAYER) == other.geometry.activation == activation
    x, idx, w = sluice.make_workload(geometry, TOKENS)
    idx = idx.astype(np.int64)
    engine = one_rank_engine(other, backend, TOKENS, normal="direct-bf16", low_latency=None)
    expected = sluice.moe_forward(engine, x, sluice.Routing(idx, w))
    weights = tuple(space.array(a.copy()) for a in arrays)
    run = lambda **k: w4a8.w4a8_moe_grouped(  # noqa: E731
        space.bf16(x), None, space.array(idx), space.array(w), *weights, backend=backend, **k)
    assert np.array_equal(space.bits(run(activation=activation)), expected) and np.any(expected)
    with pytest.raises(sluice.Error, match="^activation: not what the first call"):
        run()
    w4a8.forget(weights[0], weights[2])
    assert not np.array_equal(space.bits(run()), expected)
    w4a8.forget(weights[0], weights[2])
    with pytest.raises(sluice.Error, match="'gelu' is none of") as caught:
        run(activation="gelu")
    assert caught.value.code == "unsupported"


def test_no_rows(geometry, space, weights, backend):
    none = np.zeros((0, geometry.num_topk), np.int64)
    y = w4a8.w4a8_moe_grouped(
        space.bf16(np.zeros((0, geometry.hidden), np.uint16)), None, space.array(none),
        space.array(none.astype(np.float32)), *weights, backend=backend)
    assert tuple(y.shape) == (0, geometry.hidden) and y.itemsize == 2


def test_repacked_once_and_dropped_with_the_weights(geometry, space, arrays, monkeypatch):
    weights = tuple(space.array(a.copy()) for a in arrays)
    packed = []
    repack = sluice._core.repack_stacked
    monkeypatch.setattr(sluice._core, "repack_stacked", lambda *a, **k: packed.append(k) or repack(*a, **k))
    x, num_rows = masked_input(geometry)
    arguments = space.bf16(x), None, space.array(num_rows), *weights
    first = w4a8.w4a8_moe_masked(*arguments)
    repacks = len(packed)
    second = w4a8.w4a8_moe_masked(*arguments)
    assert len(packed) == repacks and len(_w4a8_cache.cache) >= 1
    valid = np.arange(MAX_M) < num_rows[:, None]
    assert np.array_equal(space.bits(first)[valid], space.bits(second)[valid])
    w4a8.forget(weights[0], weights[2])
    w4a8.w4a8_moe_masked(*arguments)
    assert len(packed) > repacks
    size = len(_w4a8_cache.cache)
    del weights, arguments
    gc.collect()
    assert len(_w4a8_cache.cache) == size - 1


def test_what_differs_from_the_first_call_is_refused(geometry, space, arrays, backend):
    w13, s13, w2, s2 = (space.array(a.copy()) for a in arrays)
    x, num_rows = masked_input(geometry)
    valid = np.arange(MAX_M) < num_rows[:, None]
    valid_bits = lambda rows: space.bits(rows)[valid]  # noqa: E731
    x, num_rows = space.bf16(x), space.array(num_rows)
    given = {"w13_scale": s13, "w2_scale": s2, "a1_scale": 0.5, "a2_scale": 0.25, "backend": backend}

    def run(**changed):
        now = {**given, **changed}
        return valid_bits(w4a8.w4a8_moe_masked(
            x, None, num_rows, w13, now["w13_scale"], w2, now["w2_scale"], a1_scale=now["a1_scale"],
            a2_scale=now["a2_scale"], backend=now["backend"]))

    first = run()
    others = {"w13_scale": space.array(arrays[1] * 2), "w2_scale": space.array(arrays[3].copy()),
              "a1_scale": 0.75, "a2_scale": None, "backend": sluice.Backend("cpu", num_threads=1)}
    for name, other in others.items():
        with pytest.raises(sluice.Error, match=f"^{name}: not what the first call") as caught:
            run(**{name: other})
        assert caught.value.code == "invalid_argument"
    with pytest.raises(sluice.Error, match="^w2_scale, a1_scale: not what"):
        run(w2_scale=others["w2_scale"], a1_scale=None)
    # Another view of the same memory is the same; so is a call that leaves the backend to the first.
    assert np.array_equal(run(w13_scale=s13[:], backend=None), first)
    # Each object has scales of its own.
    make = lambda scale: w4a8.W4A8Experts(w13, scale, w2, s2, a1_scale=0.5, a2_scale=0.25, backend=backend)  # noqa: E731
    one, two = make(s13), make(others["w13_scale"])
    assert np.array_equal(valid_bits(one.masked(x, None, num_rows)), first)
    assert not np.array_equal(valid_bits(two.masked(x, None, num_rows)), first)
    w4a8.forget(w13, w2)
    run(a1_scale=0.75)


def test_after_a_dispatch_of_deep_ep(checkpoint, geometry, backend, space, weights):
    """The layer of an engine whose parts these are: the bytes of Sluice's own layer."""
    from sluice.compat.deep_ep import Buffer

    x, idx, w = sluice.make_workload(geometry, TOKENS)
    engine = one_rank_engine(checkpoint, backend, TOKENS)
    expected = sluice.moe_forward(engine, x, sluice.Routing(idx, w), mode="low-latency")
    buffer = Buffer(sluice.Transport.inproc(1)[0], backend=backend)
    idx, w = space.array(idx.astype(np.int64)), space.array(w)
    (codes, scale), count, handle, _, _ = buffer.low_latency_dispatch(
        space.bf16(x), idx, TOKENS, geometry.num_experts)
    rows = w4a8.w4a8_moe_masked(codes, scale, count, *weights, backend=backend)
    y, _, _ = buffer.low_latency_combine(rows, idx, w, handle)
    assert np.array_equal(space.bits(y), expected)


def test_refusals(geometry, space, weights, backend):
    w13, s13, w2, s2 = weights
    x, num_rows = masked_input(geometry)
    x, num_rows = space.bf16(x), space.array(num_rows)

    def refused(text, call, code="invalid_argument"):
        with pytest.raises(sluice.Error, match=text) as caught:
            call()
        assert caught.value.code == code

    run = lambda *w, **k: w4a8.w4a8_moe_masked(x, None, num_rows, *(w or weights), backend=backend, **k)  # noqa: E731
    refused("w13: expected 3 dimensions, got 2", lambda: run(w13[0], s13, w2, s2))
    refused("w2: 8 experts of .*, expected 8 of .hidden", lambda: run(w13, s13, w2[:, :-1], s2))
    refused("w13_scale: expected float32 or bfloat16", lambda: run(w13, s13[:, :-2], w2, s2))
    refused("w2_scale: expected float32 or bfloat16", lambda: run(w13, s13, w2, s2[:, :-1]))
    refused("a1_scale and a2_scale", lambda: run(w13[:], s13, w2[:], s2, a1_scale=1.0))
    refused("static", lambda: run(recipe="bf16-static"), "unsupported")
    refused("x: expected shape", lambda: w4a8.w4a8_moe_masked(x[0], None, num_rows, *weights, backend=backend))
    refused("masked_m: expected dtype int32, got int64", lambda: w4a8.w4a8_moe_masked(
        x, None, space.array(np.zeros(8, np.int64)), *weights, backend=backend))
    idx = space.array(np.zeros((TOKENS, 2), np.int64))
    refused("topk_idx: expected shape", lambda: w4a8.w4a8_moe_grouped(
        x[0], None, idx, idx, *weights, backend=backend))


def test_the_sum_is_rounded_once(geometry, space, weights, backend):
    """Against the rows themselves: weights in float32, in order of entries, then bf16."""
    x, _, _ = sluice.make_workload(geometry, 2)
    one = lambda e: space.bits(w4a8.w4a8_moe_grouped(  # noqa: E731
        space.bf16(x), None, space.array(np.full((2, 1), e, np.int64)),
        space.array(np.ones((2, 1), np.float32)), *weights, backend=backend))
    w = np.array([[0.3, 0.7], [0.9, -0.2]], np.float32)
    expected = as_bf16(w[:, :1] * as_float(one(4)) + w[:, 1:] * as_float(one(1)))
    y = w4a8.w4a8_moe_grouped(
        space.bf16(x), None, space.array(np.array([[4, 1]] * 2)), space.array(w), *weights, backend=backend)
    assert np.array_equal(space.bits(y), expected)
