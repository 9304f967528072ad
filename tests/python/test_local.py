"""LocalExperts and LocalGroup: the engine's bits without an exchange, and what they share."""

import gc
import weakref

import numpy as np
import pytest
from conftest import LAYER, one_rank_engine
from spaces import as_float

import sluice
from sluice.compat import w4a8

TOKENS = 9


def entries(geometry, tokens=TOKENS):
    return tokens * geometry.num_topk


def all_experts(checkpoint, geometry):
    return checkpoint.load_experts(LAYER, 0, geometry.num_experts)


@pytest.mark.parametrize("recipe", ["direct", "direct-bf16", "bf16-static", "requant-static", "static", "pow2-static",
                                    "direct-token"])
def test_the_bits_of_an_engine(checkpoint, geometry, backend, space, recipe):
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    engine = one_rank_engine(checkpoint, backend, TOKENS, normal=recipe, low_latency=None,
                             routed_scaling_factor=2.5)
    expected = sluice.moe_forward(engine, x, sluice.Routing(idx, weights))
    local = sluice.LocalExperts(all_experts(checkpoint, geometry), backend, max_entries=entries(geometry),
                                recipe=recipe, routed_scaling_factor=2.5)
    assert len(local) == geometry.num_experts and local.first_expert == 0
    assert local.recipe.name == recipe and local.weight_bytes > 0
    routing = sluice.Routing(space.array(idx.astype(np.int64)), space.array(weights))
    y = local.forward(space.bf16(x), routing)
    assert np.array_equal(space.bits(y), expected) and np.any(expected)
    out = space.bf16(np.zeros_like(x))
    assert local.forward(space.bf16(x), routing, out=out) is out
    assert np.array_equal(space.bits(out), expected)


def test_parts_and_sentinels(checkpoint, geometry, backend):
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    make = lambda first, count: sluice.LocalExperts(  # noqa: E731
        checkpoint.load_experts(LAYER, first, count), backend, max_entries=entries(geometry))
    whole, part = make(0, geometry.num_experts), make(2, 3)
    assert (part.first_expert, len(part)) == (2, 3)
    here = (idx >= 2) & (idx < 5)
    assert here.any() and not here.all()
    expected = whole.forward(x, sluice.Routing(np.where(here, idx, -1), weights))
    for elsewhere in (-1, geometry.num_experts, 2**31 - 1, -5):
        marked = np.where(here, idx, elsewhere).astype(np.int32)
        assert np.array_equal(part.forward(x, sluice.Routing(marked, weights)), expected)
    assert np.array_equal(part.forward(x, sluice.Routing(idx, weights)), expected)
    # Two halves, as a stack that all-reduces adds them up; each is rounded to bf16 first.
    half = geometry.num_experts // 2
    routing = sluice.Routing(idx, weights)
    total = sum(as_float(make(first, half).forward(x, routing)) for first in (0, half))
    y = as_float(whole.forward(x, routing))
    assert np.linalg.norm(total - y) < 0.01 * np.linalg.norm(y)


def test_slices_add_up(tmp_path, backend):
    """Tensor parallelism: intermediate channels cut in as many parts as groups of 128 allow."""
    geometry = sluice.ModelGeometry(num_experts=8, num_topk=2, hidden=256, intermediate=512)
    experts = all_experts(sluice.make_checkpoint(tmp_path / "wide", geometry), geometry)
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    routing = sluice.Routing(idx, weights)
    make = lambda part: sluice.LocalExperts(part, backend, max_entries=entries(geometry))  # noqa: E731
    y = as_float(make(experts).forward(x, routing))
    for num in (2, 4):
        parts = [sluice.slice_experts(experts, i, num) for i in range(num)]
        assert all(part.geometry.intermediate == 512 // num for part in parts)
        total = sum(as_float(make(part).forward(x, routing)) for part in parts)
        assert np.linalg.norm(total - y) < 0.01 * np.linalg.norm(y)
    with pytest.raises(sluice.Error, match="slices are multiples of 128"):
        sluice.slice_experts(experts, 0, 8)


def test_e4m3_of_a_dispatch(checkpoint, geometry, backend):
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    routing = sluice.Routing(idx, weights)
    local = sluice.LocalExperts(all_experts(checkpoint, geometry), backend, max_entries=entries(geometry))
    codes, scale = sluice.quantize(backend, x)
    assert np.array_equal(local.forward(codes, routing, x_scale=scale), local.forward(x, routing))
    with pytest.raises(sluice.Error, match="x_scale"):
        local.forward(codes, routing)
    with pytest.raises(sluice.Error, match="x_scale is given"):
        local.forward(x, routing, x_scale=scale)


def test_a_group_shares_and_grows(checkpoint, geometry, backend):
    group = sluice.LocalGroup(backend, hidden=geometry.hidden, intermediate=geometry.intermediate,
                              max_entries=entries(geometry, 2))
    first = group.add_layer(all_experts(checkpoint, geometry), name="first")
    experts = sluice.repack(all_experts(checkpoint, geometry), backend, max_rows=1)
    s1, s2 = checkpoint.static_scales(LAYER)
    second = group.add_layer(experts, recipe=sluice.Recipe("bf16-static", s1=s1, s2=s2))
    memory = group.memory()
    assert first.name == "first" and memory["num_layers"] == 2
    assert memory["prepared_bytes"] == first.weight_bytes + experts.weight_bytes
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    routing = sluice.Routing(idx, weights)
    with pytest.raises(sluice.Error, match="exceed max_entries"):
        first.forward(x, routing)
    group.reserve(entries(geometry))
    assert group.max_entries == entries(geometry)
    assert group.memory()["scratch_bytes"] > memory["scratch_bytes"]
    for layer, recipe in ((first, "direct"), (second, "bf16-static")):
        engine = one_rank_engine(checkpoint, backend, TOKENS, normal=recipe, low_latency=None)
        assert np.array_equal(layer.forward(x, routing), sluice.moe_forward(engine, x, routing))
    # The layers keep what they use.
    del group, experts
    gc.collect()
    assert np.any(second.forward(x, routing))


def test_refusals(checkpoint, geometry, backend):
    make = lambda **k: sluice.LocalExperts(  # noqa: E731
        all_experts(checkpoint, geometry), backend, **{"max_entries": entries(geometry), **k})
    for text, call in {
        "max_entries 0": lambda: make(max_entries=0),
        "none of: direct": lambda: make(recipe="fastest"),
        "routed_scaling_factor": lambda: make(routed_scaling_factor=float("inf")),
        "hidden 100": lambda: sluice.LocalGroup(backend, hidden=100, intermediate=128, max_entries=1),
        "hidden .* the group has 128": lambda: sluice.LocalGroup(
            backend, hidden=128, intermediate=geometry.intermediate,
            max_entries=1).add_layer(all_experts(checkpoint, geometry)),
    }.items():
        with pytest.raises(sluice.Error, match=text):
            call()
    local, (x, idx, weights) = make(), sluice.make_workload(geometry, TOKENS)
    routing = sluice.Routing(idx, weights)
    for text, call in {
        r"x: expected shape \[num_tokens, ": lambda: local.forward(x[:, :128].copy(), routing),
        "topk_idx has shape": lambda: local.forward(x[1:], routing),
        "x: expected dtype": lambda: make(recipe="direct-bf16").forward(x.view(np.uint8), routing),
        "out: ": lambda: local.forward(x, routing, out=np.zeros((1, 1), np.uint16)),
    }.items():
        with pytest.raises(sluice.Error, match=text) as caught:
            call()
        assert caught.value.code == "invalid_argument"


def published(checkpoint, geometry):
    weights = all_experts(checkpoint, geometry)
    gate, up, down = ([np.stack(a) for a in zip(*(weights.matrix(e, name) for e in range(len(weights))), strict=True)]
                      for name in ("gate", "up", "down"))
    return np.concatenate([gate[0], up[0]], 1), np.concatenate([gate[1], up[1]], 1), *down


def test_w4a8_experts_repack_once_and_share(checkpoint, geometry, monkeypatch):
    """Larger and larger calls of two layers: one repacking each, one set of buffers."""
    backend = sluice.Backend("cpu", num_threads=1)
    repacks = []
    repack = sluice._core.repack_stacked
    monkeypatch.setattr(sluice._core, "repack_stacked", lambda *a, **k: repacks.append(k) or repack(*a, **k))
    layers = [w4a8.W4A8Experts(*published(checkpoint, geometry), backend=backend) for _ in range(2)]
    whole = sluice.LocalExperts(all_experts(checkpoint, geometry), backend, max_entries=entries(geometry, 40),
                                recipe="direct-bf16")
    for tokens in (1, 3, 8, 40, 2):
        x, idx, weights = sluice.make_workload(geometry, tokens)
        expected = whole.forward(x, sluice.Routing(idx, weights))
        sentinel = np.concatenate([idx, np.full((tokens, 1), geometry.num_experts, np.int32)], 1)
        padded = np.concatenate([weights, np.ones((tokens, 1), np.float32)], 1)
        for layer in layers:
            assert np.array_equal(layer.grouped(x, None, idx, weights), expected)
            out = np.zeros_like(x)
            assert layer.grouped(x, None, sentinel, padded, out=out) is out
            assert np.array_equal(out, expected)
        num_rows = np.full(geometry.num_experts, tokens, np.int32)
        masked = np.repeat(x[None], geometry.num_experts, 0)
        assert np.any(layers[0].masked(masked, None, num_rows))
    assert len(repacks) == 2
    group = layers[0]._room.group
    assert group is layers[1]._room.group
    assert group.memory()["num_layers"] == 3  # Grouped of both, masked of one.
    gone = weakref.ref(group)
    del group
    del layers, layer
    gc.collect()
    assert gone() is None


def test_a_batch_in_the_room_that_layers_share(checkpoint, geometry):
    """The bits of experts that have memory of their own; more rows than there is room for are refused."""
    backend = sluice.Backend("cpu", num_threads=1)
    weights = all_experts(checkpoint, geometry)
    repacked = sluice.repack(weights, backend, max_rows=64)
    group = sluice.LocalGroup(backend, hidden=geometry.hidden, intermediate=geometry.intermediate, max_entries=1)
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((geometry.num_experts, 5, geometry.hidden)).astype(np.float32).view(np.uint32) >> 16)
    x, count = x.astype(np.uint16), np.array([5, 0, 1, 2, 3, 4, 5, 0], np.int32)
    for name in ("direct-bf16", "direct"):
        recipe = sluice.Recipe(name)
        rows, scale = (x, None) if name == "direct-bf16" else sluice.quantize(backend, x)
        layer = group.add_layer(repacked, recipe=recipe)
        expected = sluice.experts_masked(repacked, sluice.ExpertBatch(rows, count, x_scale=scale), recipe,
                                         out=np.zeros_like(x))
        with pytest.raises(sluice.Error, match=r"x has 40 rows, more than max_rows 0"):
            sluice.LocalGroup(backend, hidden=geometry.hidden, intermediate=geometry.intermediate,
                              max_entries=1).add_layer(repacked, recipe=recipe).forward_batch(rows, count, scale)
        layer.reserve_batch(40)
        assert layer.max_batch_rows == 40
        y = layer.forward_batch(rows, count, scale, 3, np.zeros_like(x))
        assert np.array_equal(y, expected) and np.any(y)
        for text, arguments in {r"x: expected shape": (rows[:7], count, scale),
                                r"num_rows: expected shape": (rows, count[:7], scale),
                                r"num_rows\[0\] = 6 is not in": (rows, count + 1, scale)}.items():
            with pytest.raises(sluice.Error, match=text) as caught:
                layer.forward_batch(*arguments)
            assert caught.value.code == "invalid_argument"
