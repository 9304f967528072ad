"""Ranks whose calls differ: no output is wrong without an error, and every rank says who differs and how."""

import numpy as np
import pytest
from conftest import LAYER, MODES, on_every_rank

import sluice

RANKS, TOKENS = 2, 6


def after_right_calls(checkpoint, geometry, body, timeout_ms=20000):
    """body(rank, layers, x, routing, outputs) after a right call of each of two layers; its result, or what it threw."""
    transports = sluice.Transport.inproc(RANKS)

    def of_rank(rank):
        backend = sluice.Backend("cpu", num_threads=1, local_rank=rank, num_local_ranks=RANKS)
        group = sluice.LayerGroup(transports[rank], backend, geometry=geometry, low_latency_tokens=TOKENS,
                                  normal_tokens=TOKENS, timeout_ms=timeout_ms)
        weights = checkpoint.load_experts(LAYER, rank * geometry.num_experts // RANKS, geometry.num_experts // RANKS)
        layers = [group.add_layer(weights=weights, name=name) for name in ("first", "second")]
        x, idx, w = sluice.make_workload(geometry, TOKENS, first_token=rank * TOKENS)
        routing = sluice.Routing(idx, w)
        outputs = [layer.forward(x, routing, mode="low-latency") for layer in layers]
        try:
            return body(rank, layers, x, routing, outputs)
        except sluice.Error as error:
            return error

    return on_every_rank(RANKS, of_rank)


def expect_named(errors, *, rank_0, rank_1):
    for rank, error in enumerate(errors):
        assert isinstance(error, sluice.Error), f"rank {rank} went on: {error}"
        own, other = (rank_0, rank_1) if rank == 0 else (rank_1, rank_0)
        assert (f"rank(s) {1 - rank} dispatch for {other}, rank {rank} for {own}: "
                "ranks must make the same calls in the same order") in str(error)
        assert error.code == "transport" and list(error.ranks) == [1 - rank]


@pytest.mark.parametrize("mode", MODES)
def test_layers_in_another_order(checkpoint, geometry, mode):
    def body(rank, layers, x, routing, outputs):
        return [layer.forward(x, routing, mode=mode) for layer in (layers if rank == 0 else layers[::-1])]

    expect_named(after_right_calls(checkpoint, geometry, body), rank_0="first", rank_1="second")


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_one_rank_refused_and_left_out(checkpoint, geometry, mode):
    def body(rank, layers, x, routing, outputs):
        first, second = layers
        if rank == 1:
            x_many, idx, w = sluice.make_workload(geometry, TOKENS + 1)
            with pytest.raises(sluice.Error, match="max_tokens_per_rank"):
                first.forward(x_many, sluice.Routing(idx, w), mode=mode)
        else:
            first.forward(x, routing, mode=mode)
        return second.forward(x, routing, mode=mode)

    expect_named(after_right_calls(checkpoint, geometry, body), rank_0="first", rank_1="second")


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_one_rank_refused_and_made_again(checkpoint, geometry, mode):
    def body(rank, layers, x, routing, outputs):
        first, second = layers
        if rank == 1:
            _, idx, w = sluice.make_workload(geometry, TOKENS, first_token=TOKENS)
            idx[0, 0] = 99
            with pytest.raises(sluice.Error, match="= 99 is not in"):
                first.forward(x, sluice.Routing(idx, w), mode=mode)
        return [np.array_equal(layer.forward(x, routing, mode=mode), y) for layer, y in zip(layers, outputs)]

    assert after_right_calls(checkpoint, geometry, body) == [[True, True]] * RANKS


def test_another_mode_is_named_at_the_timeout(checkpoint, geometry):
    def body(rank, layers, x, routing, outputs):
        return layers[0].forward(x, routing, mode=MODES[rank])

    rows = "with rows of e4m3 + f32 scale per 128"
    expect_named(after_right_calls(checkpoint, geometry, body, timeout_ms=500),
                 rank_0=f"first in {MODES[0]} mode {rows}", rank_1=f"first in {MODES[1]} mode {rows}")
