"""Layers that share buffers: the bits of engines of their own, from checkpoints and from arrays."""

import gc

import numpy as np
import pytest
from conftest import LAYER, MODES, on_every_rank, one_rank_engine

import sluice

RANKS, TOKENS = 2, 6
RECIPES = [("direct", "bf16-static"), ("static", "direct"), ("requant-static", "pow2-static")]


def group_of(geometry, rank, transport, **options):
    backend = sluice.Backend("cpu", num_threads=1, local_rank=rank, num_local_ranks=RANKS)
    options = {"low_latency_tokens": TOKENS, "normal_tokens": TOKENS, "timeout_ms": 20000, **options}
    return sluice.LayerGroup(transport, backend, geometry=geometry, **options), backend


def tokens_of(geometry, rank):
    x, idx, weights = sluice.make_workload(geometry, TOKENS, first_token=rank * TOKENS)
    return x, sluice.Routing(idx, weights)


def test_layers_of_a_group_give_the_bits_of_engines(checkpoint, geometry):
    transports = sluice.Transport.inproc(RANKS)

    def body(rank):
        x, routing = tokens_of(geometry, rank)
        group, backend = group_of(geometry, rank, transports[rank])
        layers = [group.add_layer(checkpoint, layer=LAYER, low_latency=a, normal=b) for a, b in RECIPES]
        together = {(i, mode): layer.forward(x, routing, mode=mode)
                    for i, layer in enumerate(layers) for mode in MODES}
        for i, (a, b) in enumerate(RECIPES):
            engine = sluice.Engine(checkpoint, transports[rank], backend, layer=LAYER, low_latency=a,
                                   normal=b, max_tokens_per_rank=TOKENS, timeout_ms=20000)
            assert isinstance(engine, sluice.Layer)
            assert engine.name == layers[i].name == f"model.layers.{LAYER}.mlp.experts"
            for mode in MODES:
                assert layers[i].recipe(mode).name == (a if mode == "low-latency" else b)
                expected = sluice.moe_forward(engine, x, routing, mode=mode)
                assert np.array_equal(together[i, mode], expected), (i, mode)
                assert np.array_equal(sluice.moe_forward(layers[i], x, routing, mode=mode), expected)
        return True

    assert all(on_every_rank(RANKS, body))


def test_two_layers_in_flight(checkpoint, geometry):
    """Finished in either order, on two ranks; a third call is refused."""
    transports = sluice.Transport.inproc(RANKS)

    def body(rank):
        x, routing = tokens_of(geometry, rank)
        other, *parts = sluice.make_workload(geometry, TOKENS, first_token=100 + rank * TOKENS)
        other_routing = sluice.Routing(*parts)
        group, _ = group_of(geometry, rank, transports[rank], num_in_flight=2)
        a, b = (group.add_layer(checkpoint, layer=LAYER, low_latency="static", normal="static") for _ in range(2))
        for mode in MODES:
            expected = a.forward(x, routing, mode=mode), b.forward(other, other_routing, mode=mode)
            for order in ((0, 1), (1, 0)):
                calls = [a.dispatch_send(x, routing, mode=mode), b.dispatch_send(other, other_routing, mode=mode)]
                if order == (0, 1):
                    with pytest.raises(sluice.Error, match="num_in_flight is 2"):
                        a.dispatch_send(x, routing, mode=mode)
                for i in order:
                    out = np.zeros_like(x)
                    assert calls[i].finish(out=out) is out and np.array_equal(out, expected[i]), (mode, order, i)
                with pytest.raises(sluice.Error, match="this call is finished"):
                    calls[0].finish()
        return True

    assert all(on_every_rank(RANKS, body))


def test_weights_of_the_caller_give_the_bits_of_the_checkpoint(checkpoint, geometry):
    transports = sluice.Transport.inproc(RANKS)
    num_local = geometry.num_experts // RANKS

    def body(rank):
        x, routing = tokens_of(geometry, rank)
        group, _ = group_of(geometry, rank, transports[rank])
        read = checkpoint.load_experts(LAYER, rank * num_local, num_local)
        s1, s2 = read.static_scales
        matrix = lambda name: tuple(np.stack(part) for part in zip(  # noqa: E731
            *(read.matrix(e, name) for e in range(num_local)), strict=True))
        own = sluice.ExpertWeights.from_arrays(
            matrix("gate"), matrix("up"), matrix("down"), s1=s1, s2=s2, first_expert=rank * num_local)
        recipes = {"low_latency": "static", "normal": "direct"}
        first = group.add_layer(checkpoint, layer=LAYER, **recipes)
        second = group.add_layer(weights=own, name="mine", identity=7, **recipes)
        del own, read
        gc.collect()
        assert second.name == "mine"
        for mode in MODES:
            assert np.array_equal(first.forward(x, routing, mode=mode), second.forward(x, routing, mode=mode))
        return True

    assert all(on_every_rank(RANKS, body))


def test_memory_is_what_plan_names_and_buffers_count_once(checkpoint, geometry):
    transport = sluice.Transport.inproc(1)[0]
    backend = sluice.Backend("cpu", num_threads=1)
    group = sluice.LayerGroup(transport, backend, geometry=geometry, low_latency_tokens=TOKENS,
                              normal_tokens=TOKENS)
    layers = []
    for count in (1, 2, 3):
        layers.append(group.add_layer(checkpoint, layer=LAYER, low_latency="requant-static"))
        plan = sluice.plan(geometry, num_ranks=1, max_tokens_per_rank=TOKENS,
                           low_latency="requant-static", num_layers=count)
        assert group.memory() == plan and plan["num_layers"] == count
    one = sluice.plan(geometry, num_ranks=1, max_tokens_per_rank=TOKENS, low_latency="requant-static")
    for shared in ("exchange_bytes", "scratch_bytes"):
        assert plan[shared] == one[shared]
    assert plan["prepared_bytes"] == 3 * one["prepared_bytes"] == 3 * layers[0].weight_bytes
    del layers[1]
    gc.collect()
    assert group.memory()["num_layers"] == 2


def test_layers_outlive_the_names_of_what_they_use(checkpoint, geometry, backend):
    x, routing = tokens_of(geometry, 0)
    expected = sluice.moe_forward(one_rank_engine(checkpoint, backend, TOKENS), x, routing, mode="normal")
    group, own = group_of(geometry, 0, sluice.Transport.inproc(1)[0])
    layer = group.add_layer(checkpoint, layer=LAYER)
    del group, own
    gc.collect()
    assert np.array_equal(layer.forward(x, routing, mode="normal"), expected)


def test_refusals(checkpoint, geometry):
    group, backend = group_of(geometry, 0, sluice.Transport.inproc(1)[0], normal_tokens=0)
    weights = checkpoint.load_experts(LAYER, 0, geometry.num_experts)
    part = checkpoint.load_experts(LAYER, 0, 1)

    def refused(text, call, *arguments, **named):
        with pytest.raises(sluice.Error, match=text) as caught:
            call(*arguments, **named)
        assert caught.value.code == "invalid_argument"

    add = group.add_layer
    refused("checkpoint, weights: give one", add)
    refused("checkpoint, weights: give one", add, checkpoint, layer=LAYER, weights=weights)
    refused("layer: a checkpoint needs", add, checkpoint)
    refused("layer: is for a checkpoint", add, weights=weights, layer=LAYER)
    refused("name, identity: a checkpoint", add, checkpoint, layer=LAYER, name="mine")
    refused("layer 99", add, checkpoint, layer=99)
    refused(r"experts \[0, 1\), rank 0 has experts", add, weights=part)
    refused("recipe static is for normal mode", add, weights=weights, normal="static")
    refused("'dircet'", add, weights=weights, low_latency="dircet")
    refused("neither mode", sluice.LayerGroup, sluice.Transport.inproc(1)[0], backend, geometry=geometry)
    for count in (0, 1001, 2**31 - 1):
        refused(rf"num_layers {count} is outside \[1, 1000\]", sluice.plan, geometry, num_ranks=1, max_tokens_per_rank=1,
                num_layers=count)
    layer = add(weights=weights)
    x, routing = tokens_of(geometry, 0)
    assert layer.forward(x, routing).shape == x.shape  # The only mode there is.
    refused("without a recipe for normal mode", layer.forward, x, routing, mode="normal")
