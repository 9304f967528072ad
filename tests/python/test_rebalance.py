"""Experts in slots, from Python: any placement gives the bits of one rank, before and after moving."""

import numpy as np
import pytest
from conftest import LAYER, MODES, on_every_rank

import sluice

TOKENS = 6


def placements(geometry, ranks):
    experts, slots = geometry.num_experts, (geometry.num_experts + 2 * ranks) // ranks * ranks
    turned = [(e + 1) % experts for e in range(experts)] + [0] * (slots - experts)
    return [sluice.Placement.even(experts, ranks, slots), sluice.Placement(experts, ranks, turned)]


def make(checkpoint, geometry, transport, **options):
    backend = sluice.Backend("cpu", num_threads=1)
    group = sluice.LayerGroup(transport, backend, geometry=geometry, low_latency_tokens=TOKENS,
                              normal_tokens=TOKENS, timeout_ms=20000, **options)
    return group, backend


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_placement_changes_no_bit(checkpoint, geometry, ranks):
    transports = sluice.Transport.inproc(ranks)
    before, after = placements(geometry, ranks)

    def body(rank):
        x, idx, weights = sluice.make_workload(geometry, TOKENS, first_token=rank * TOKENS)
        routing = sluice.Routing(idx, weights)
        alone, _ = make(checkpoint, geometry, sluice.Transport.inproc(1)[0])
        expected = {mode: alone.add_layer(checkpoint, layer=LAYER).forward(x, routing, mode=mode) for mode in MODES}
        group, backend = make(checkpoint, geometry, transports[rank], num_slots=before.num_slots)
        [layer] = group.add_layers(checkpoint, [LAYER], placements=[before])
        assert group.memory() == sluice.plan(geometry, num_ranks=ranks, max_tokens_per_rank=TOKENS,
                                             num_slots=before.num_slots)
        engine = sluice.Engine(checkpoint, transports[rank], backend, layer=LAYER, max_tokens_per_rank=TOKENS,
                               placement=after, timeout_ms=20000)
        assert layer.placement == before and engine.placement == after
        for moved in (False, True):
            if moved:
                stats = layer.rebalance(after, keep_memory=True)
                assert group.memory()["moving_bytes"] == stats["extra_bytes"]
                assert stats["num_rounds"] > 0 and stats["extra_bytes"] > 0
                assert layer.placement == after
                counters = layer.rebalance_counters()
                assert counters.pop("num_rebalances") == 1 and engine.rebalance_counters()["num_rebalances"] == 0
                assert counters == {name: stats[name] for name in counters}
                assert ranks == 1 or counters["sent_bytes"] > 0
            for mode in MODES:
                assert np.array_equal(layer.forward(x, routing, mode=mode), expected[mode]), (moved, mode)
        layer.rebalance(after)
        assert group.memory()["moving_bytes"] == 0
        for mode in MODES:
            assert np.array_equal(engine.forward(x, routing, mode=mode), expected[mode])
        return True

    assert all(on_every_rank(ranks, body))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_layers_of_one_name_are_told_apart_by_number(checkpoint, geometry, device, request):
    """A rank that moves another layer of the same name is told before anything moves."""
    if device == "cuda":
        request.getfixturevalue("gpu")
        torch = pytest.importorskip("torch", reason="torch is not installed")
    ranks = 2
    transports = sluice.Transport.inproc(ranks)
    before, after = placements(geometry, ranks)

    def body(rank):
        if device == "cuda":  # Ranks that share a GPU each need a stream of their own.
            torch.cuda.set_stream(torch.cuda.Stream())
        backend = sluice.Backend("cuda") if device == "cuda" else sluice.Backend("cpu", num_threads=1)
        group = sluice.LayerGroup(transports[rank], backend, geometry=geometry, low_latency_tokens=TOKENS,
                                  normal_tokens=TOKENS, num_slots=before.num_slots, timeout_ms=20000)
        first, second = (group.add_layer(checkpoint, layer=LAYER, placement=before) for _ in range(2))
        x, idx, weights = sluice.make_workload(geometry, TOKENS, first_token=rank * TOKENS)
        if device == "cuda":
            x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
            idx, weights = torch.from_numpy(idx).cuda(), torch.from_numpy(weights).cuda()
        routing = sluice.Routing(idx, weights)

        def forward(layer):
            transports[rank].all_gather(b"")  # No rank waits on the device while another takes memory there.
            y = layer.forward(x, routing, mode="normal")
            return y if device == "cpu" else y.view(torch.int16).cpu().numpy().view(np.uint16)

        expected = forward(first)
        with pytest.raises(sluice.Error, match=r"\(number 1 of the group\).*rank 1 has.*\(number 2 of") as error:
            (second if rank == 1 else first).rebalance(after)
        assert error.value.code == "transport"
        for layer in first, second:
            assert layer.placement == before and np.array_equal(forward(layer), expected)
        first.rebalance(after)
        for layer, placement in (first, after), (second, before):
            assert layer.placement == placement and np.array_equal(forward(layer), expected)
        transports[rank].all_gather(b"")
        return True

    assert all(on_every_rank(ranks, body))


def test_what_is_refused(checkpoint, geometry):
    group, _ = make(checkpoint, geometry, sluice.Transport.inproc(1)[0])
    layer = group.add_layer(checkpoint, layer=LAYER)
    assert layer.placement == sluice.Placement.identity(geometry.num_experts, 1)
    with pytest.raises(sluice.Error, match="without num_slots"):
        layer.rebalance(layer.placement)
    with pytest.raises(sluice.Error, match="the group has no num_slots"):
        group.add_layer(checkpoint, layer=LAYER, placement=placements(geometry, 1)[0])
