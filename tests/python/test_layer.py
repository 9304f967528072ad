"""The layer over four ranks: every recipe, both modes, by three roads that must agree to the byte."""

import json
import subprocess

import numpy as np
import pytest
from conftest import LAYER, MODES, on_every_rank

import sluice

RANKS, TOKENS = 4, 6


def outputs_digest(outputs):
    """What `sluice run` prints: over the bf16 bits of every rank, rank 0 first."""
    value, mask = 0xCBF29CE484222325, 0xFFFFFFFFFFFFFFFF
    for bits in np.concatenate([y.ravel() for y in outputs]).tolist():
        value = ((value ^ bits) * 0x9E3779B97F4A7C15) & mask
        value ^= value >> 32
    return f"{value:016x}"


def rank_backend(rank):
    return sluice.Backend("cpu", num_threads=1, local_rank=rank, num_local_ranks=RANKS)


def tokens_of(geometry, rank):
    x, idx, weights = sluice.make_workload(geometry, TOKENS, first_token=rank * TOKENS)
    return x, sluice.Routing(idx, weights)


def layer_by_engine(checkpoint, recipe, mode):
    transports = sluice.Transport.inproc(RANKS)

    def body(rank):
        x, routing = tokens_of(checkpoint.geometry, rank)
        engine = sluice.Engine(
            checkpoint,
            transports[rank],
            rank_backend(rank),
            layer=LAYER,
            max_tokens_per_rank=TOKENS,
            low_latency=recipe if mode == "low-latency" else None,
            normal=recipe if mode == "normal" else None,
            timeout_ms=20000,
        )
        assert engine.recipe().name == recipe and engine.recipe().mode == mode
        engine.record_stats()
        out = np.zeros_like(x)
        y = sluice.moe_forward(engine, x, routing, out=out)
        assert y is out
        stats = sluice.stats(engine)
        assert sum(stats["rows_per_expert"]) > 0 and stats["times"]["total_us"] > 0
        assert np.array_equal(y, sluice.moe_forward(engine, x, routing, mode=mode))
        return y

    return on_every_rank(RANKS, body)


def layer_by_parts(checkpoint, recipe_name, mode):
    """dispatch, experts and combine by themselves."""
    g = checkpoint.geometry
    s1, s2 = checkpoint.static_scales(LAYER)
    recipe = sluice.Recipe(recipe_name, mode, s1=s1, s2=s2)
    transports = sluice.Transport.inproc(RANKS)
    num_local = g.num_experts // RANKS

    def body(rank):
        x, routing = tokens_of(g, rank)
        backend = rank_backend(rank)
        exchange = sluice.Exchange(
            transports[rank],
            backend,
            mode=mode,
            wire=recipe.wire,
            num_experts=g.num_experts,
            num_topk=g.num_topk,
            hidden=g.hidden,
            max_tokens_per_rank=TOKENS,
            timeout_ms=20000,
        )
        weights = checkpoint.load_experts(LAYER, rank * num_local, num_local)
        experts = sluice.repack(weights, backend, max_rows=exchange.max_rows)
        s1_of_wire = recipe.s1 if "static" in recipe.wire else 0
        dispatched = sluice.dispatch(exchange, x, routing, static_scale=s1_of_wire)
        batch = dispatched.batch
        assert batch.masked == (mode == "low-latency")
        assert batch.num_rows.dtype == np.int32 and len(batch.num_rows) == num_local
        run = sluice.experts_masked if batch.masked else sluice.experts_grouped
        expert_y = run(experts, batch, recipe)
        out = np.zeros_like(x)
        assert sluice.combine(dispatched, expert_y, out=out) is out
        assert dispatched.consumed
        assert sum(exchange.counters()["dispatch_rows"]) > 0
        return out

    return on_every_rank(RANKS, body)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", sluice.recipe_names())
def test_engine_and_its_parts_agree(checkpoint, recipe, mode):
    try:
        sluice.Recipe(recipe, mode, s1=1.0, s2=1.0)
    except sluice.Error as error:
        assert error.code == "unsupported"
        return
    whole = layer_by_engine(checkpoint, recipe, mode)
    parts = layer_by_parts(checkpoint, recipe, mode)
    for rank in range(RANKS):
        assert np.any(whole[rank]) and np.array_equal(whole[rank], parts[rank])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", sluice.recipe_names())
def test_same_bytes_as_the_command_line(checkpoint, command_line, tmp_path, recipe, mode):
    try:
        y = layer_by_engine(checkpoint, recipe, mode)
    except sluice.Error as error:
        assert error.code == "unsupported"
        return
    report = tmp_path / "run.json"
    subprocess.run(
        [command_line, "--json", report, "run", "--checkpoint", checkpoint.path, "--ranks", str(RANKS),
         "--tokens", str(TOKENS), "--mode", mode, "--recipe", recipe, "--repeat", "1", "--verify", "4"],
        check=True, capture_output=True,
    )
    assert json.loads(report.read_text())["outputs_digest"] == outputs_digest(y)


def test_halves(checkpoint, geometry):
    """Sends and receives of two dispatches in flight, interleaved."""
    transports = sluice.Transport.inproc(2)

    def body(rank):
        exchange = sluice.Exchange(
            transports[rank],
            sluice.Backend(num_threads=1),
            num_experts=geometry.num_experts,
            num_topk=geometry.num_topk,
            hidden=geometry.hidden,
            max_tokens_per_rank=TOKENS,
            wire="bf16",
            timeout_ms=20000,
        )
        x, routing = tokens_of(geometry, rank)
        first = exchange.dispatch_send(x, routing)
        second = exchange.dispatch_send(x, routing)
        first.receive()
        second.receive()
        results = []
        for dispatched in (first, second):
            dispatched.combine_send(np.ascontiguousarray(dispatched.batch.x))
            results.append(dispatched.combine_receive())
        # The experts gave back what they got, and weights of a token add up to one.
        as_float = [(np.asarray(a, np.uint32) << 16).view(np.float32) for a in (x, *results)]
        assert np.allclose(as_float[1], as_float[0], rtol=2**-7)
        assert np.array_equal(results[0], results[1])

    on_every_rank(2, body)


def test_zero_tokens_on_one_rank(checkpoint, geometry):
    transports = sluice.Transport.inproc(2)

    def body(rank):
        engine = sluice.Engine(
            checkpoint, transports[rank], sluice.Backend(num_threads=1), layer=LAYER,
            max_tokens_per_rank=4, timeout_ms=20000,
        )
        x, idx, weights = sluice.make_workload(geometry, 4 * rank)
        y = sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode="normal")
        assert y.shape == (4 * rank, geometry.hidden)

    on_every_rank(2, body)


def test_direct_and_direct_bf16_feed_gemm1_the_same_bytes(checkpoint, geometry, backend):
    x, idx, weights = sluice.make_workload(geometry, 8)
    digests = []
    for recipe in ("direct", "direct-bf16"):
        engine = sluice.Engine(
            checkpoint, sluice.Transport.inproc(1)[0], backend, layer=LAYER, max_tokens_per_rank=8,
            low_latency=recipe, normal=None,
        )
        engine.record_gemm_input_digest()
        sluice.moe_forward(engine, x, sluice.Routing(idx.astype(np.int64), weights))
        digests.append(engine.gemm_input_digest)
    assert digests[0] == digests[1] != 0
