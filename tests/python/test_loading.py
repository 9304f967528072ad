"""Layers that go from the files straight to the backend: bits, progress, interruption, errors."""

import shutil

import numpy as np
import pytest
from conftest import on_every_rank

import sluice

RANKS, TOKENS = 2, 6


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A checkpoint of three layers."""
    geometry = sluice.ModelGeometry.preset("tiny")
    return sluice.make_checkpoint(tmp_path_factory.mktemp("several") / "model", geometry, num_layers=3,
                                  format="compressed-tensors")


def group_of(checkpoint, transport, rank=0, ranks=1):
    backend = sluice.Backend("cpu", num_threads=1, local_rank=rank, num_local_ranks=ranks)
    return sluice.LayerGroup(transport, backend, geometry=checkpoint.geometry, low_latency_tokens=TOKENS,
                             timeout_ms=20000)


def test_layers_of_one_load_are_those_of_weights(several):
    transports = sluice.Transport.inproc(RANKS)
    count = several.geometry.num_experts // RANKS

    def body(rank):
        x, idx, weights = sluice.make_workload(several.geometry, TOKENS, first_token=rank * TOKENS)
        routing = sluice.Routing(idx, weights)
        group = group_of(several, transports[rank], rank, RANKS)
        told = []
        layers = group.add_layers(several, several.moe_layers, progress=told.append, num_threads=3)
        assert [layer.name for layer in layers] == [f"model.layers.{n}.mlp.experts" for n in several.moe_layers]
        assert told[-1] == 1.0 and told == sorted(told)
        stats = group.load_stats()
        assert stats["num_threads"] == 3 and stats["seconds"] > 0 and stats["host_bytes"] > 0
        total = sum(several.load_experts(n, rank * count, count).nbytes for n in several.moe_layers)
        assert total <= stats["file_bytes"] < total + 64 * count * 3 * len(layers)  # And weight_shape.
        for number, layer in zip(several.moe_layers, layers, strict=True):
            mapped = group.add_layer(weights=several.load_experts(number, rank * count, count), name="mapped")
            one = group.add_layer(several, layer=number)
            expected = mapped.forward(x, routing)
            assert np.any(expected)
            assert np.array_equal(layer.forward(x, routing), expected)
            assert np.array_equal(one.forward(x, routing), expected)
        return True

    assert all(on_every_rank(RANKS, body))


def test_what_progress_raises_ends_the_load(several):
    group = group_of(several, sluice.Transport.inproc(1)[0])

    def stop(fraction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        group.add_layers(several, several.moe_layers, progress=stop)
    assert group.memory()["num_layers"] == 0
    layers = group.add_layers(several, several.moe_layers)
    assert group.memory()["num_layers"] == 3 and len(layers) == 3
    with pytest.raises(TypeError):
        group.add_layers(several, several.moe_layers, progress=7)
    with pytest.raises(sluice.Error, match="num_threads"):
        group.add_layers(several, several.moe_layers, num_threads=-1)
    with pytest.raises(sluice.Error, match="layer 99"):
        group.add_layers(several, [99])


def test_local_experts_of_one_load(several, backend):
    geometry = several.geometry
    group = sluice.LocalGroup(backend, hidden=geometry.hidden, intermediate=geometry.intermediate,
                              max_entries=TOKENS * geometry.num_topk)
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    routing = sluice.Routing(idx, weights)
    loaded = group.add_layers(several, several.moe_layers, first=1, count=4, recipe="direct")
    for number, experts in zip(several.moe_layers, loaded, strict=True):
        mapped = group.add_layer(several.load_experts(number, 1, 4))
        assert (experts.first_expert, len(experts), experts.weight_bytes) == (1, 4, mapped.weight_bytes)
        assert np.array_equal(experts.forward(x, routing), mapped.forward(x, routing))
    assert group.load_stats()["prepared_bytes"] == sum(e.weight_bytes for e in loaded)


def test_keys_that_are_not_known_are_warned_of(several, tmp_path):
    shutil.copytree(several.path, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("{", '{"brand_new": 1, ', 1))
    texts = sluice.Checkpoint(tmp_path / "model").warnings()
    assert len(texts) == 1 and "brand_new" in texts[0] and several.warnings() == []
