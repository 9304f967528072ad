"""W4A8Experts called again: with memory of earlier calls, with other memory, with other shapes."""

import numpy as np
import pytest
from spaces import DEVICES, Torch

import sluice
from sluice.compat.w4a8 import W4A8Experts

TOKENS = 6


@pytest.mark.parametrize("device", DEVICES)
def test_calls_that_come_again(arrays, geometry, device):
    """A call with the memory of an earlier one is repeated; whatever differs is another call."""
    torch = Torch(device)
    experts = W4A8Experts(*[torch.array(a) for a in arrays], backend=sluice.Backend(device))
    loads = [sluice.make_workload(geometry, TOKENS, first_token=first) for first in (0, 100, 200)]
    loads = [(torch.bf16(x), torch.array(idx.astype(np.int64)), torch.array(w)) for x, idx, w in loads]
    expected = [torch.bits(experts.grouped(x.clone(), None, idx.clone(), w.clone())) for x, idx, w in loads]
    assert not np.array_equal(*expected[:2])
    layer, = experts._grouped.values()
    x, idx, w = (a.clone() for a in loads[0])
    out = torch.torch.empty_like(x)
    before = layer.num_repeated_calls
    for turn in range(12):  # Other contents.
        for mine, new in zip((x, idx, w), loads[turn % 3]):
            mine.copy_(new)
        assert experts.grouped(x, None, idx, w, out=out) is out
        assert np.array_equal(torch.bits(out), expected[turn % 3]), turn
    assert layer.num_repeated_calls - before >= 10  # Memory of before may come again, too.

    def again(*call, bits, **out):
        assert np.array_equal(torch.bits(experts.grouped(*call, **out)), bits)

    x0, idx0, w0 = loads[0]
    for mine, new in zip((x, idx, w), loads[0]):
        mine.copy_(new)
    for _ in range(4):
        again(x, None, idx, w, out=out, bits=expected[0])
        again(loads[1][0], None, loads[1][1], loads[1][2], out=out, bits=expected[1])  # Other memory,
        again(x0, None, idx, w, out=out, bits=expected[0])
        again(x, None, loads[1][1], loads[1][2], out=out,  # of one argument after the other,
              bits=torch.bits(experts.grouped(x.clone(), None, loads[1][1], loads[1][2])))
        again(x, None, idx.int(), w, out=out, bits=expected[0])  # other types
        again(x[:4], None, idx[:4], w[:4], out=out[:4], bits=expected[0][:4])  # and shapes,
        again(x[2:], None, idx[2:], w[2:], out=out[2:], bits=expected[0][2:])
        again(x, None, idx[:, :1], w[:, :1], out=out,  # strides,
              bits=torch.bits(experts.grouped(x, None, idx[:, :1].clone(), w[:, :1].clone())))
        again(x, None, idx, w, bits=expected[0])  # and none for the result.
    for wrong in (x[:, :-128], x.float()):
        with pytest.raises(sluice.Error, match="^x: expected"):
            experts.grouped(wrong, None, idx, w, out=out)
    with pytest.raises(sluice.Error, match="out: expected shape"):
        experts.grouped(x, None, idx, w, out=out[:4])


@pytest.mark.parametrize("device", DEVICES)
def test_calls_on_other_memory(arrays, geometry, device):
    """Calls of known shapes are not looked at anew, whatever their memory; more shapes than are remembered."""
    torch, backend = Torch(device), sluice.Backend(device)
    turned = [np.ascontiguousarray(a[::-1]) for a in arrays]
    layers = [W4A8Experts(*[torch.array(a) for a in weights], backend=backend) for weights in (arrays, turned)]
    loads = []
    for tokens in [*range(1, 20), *range(100, 150)]:
        x, idx, w = sluice.make_workload(geometry, tokens, first_token=31 * tokens)
        x, idx, w = torch.bf16(x), torch.array(idx.astype(np.int64)), torch.array(w)
        loads.append((x, idx, w, [torch.bits(layer.grouped(x, None, idx, w)) for layer in layers]))
        assert not np.array_equal(*loads[-1][3])
    for turn in range(3):
        for x, idx, w, expected in loads:
            for layer, bits in zip(layers, expected):
                made = [layer.grouped(x.clone(), None, idx.clone(), w.clone()) for _ in range(2)]
                out = torch.torch.full_like(x, float("nan"))
                assert layer.grouped(x.clone(), None, idx, w.clone(), out=out) is out
                for y in (*made, out):
                    assert np.array_equal(torch.bits(y), bits), (turn, len(x))
    x, idx, w, _ = loads[7]
    for wrong in (x[:, :-128], x.half(), x[:, None]):
        with pytest.raises(sluice.Error, match="^x: expected"):
            layers[0].grouped(wrong, None, idx, w)
    with pytest.raises(sluice.Error, match="^topk_weights: expected"):
        layers[0].grouped(x, None, idx, w[:5])
    with pytest.raises(sluice.Error, match="^out: expected"):
        layers[0].grouped(x, None, idx, w, out=x.t().contiguous().t())


@pytest.mark.parametrize("device", DEVICES)
def test_a_named_recipe_is_another_call(arrays, geometry, device):
    """Of the same memory: neither is taken for the other, whichever came first."""
    torch = Torch(device)
    weights = [torch.array(a) for a in arrays]
    plain, scaled = (W4A8Experts(*weights, a1_scale=s, a2_scale=s, backend=sluice.Backend(device)) for s in (None, 0.05))
    x, idx, w = sluice.make_workload(geometry, TOKENS)
    x, idx, w = torch.bf16(x), torch.array(idx.astype(np.int64)), torch.array(w)
    direct, static = (torch.bits(experts.grouped(x, None, idx, w)) for experts in (plain, scaled))
    assert not np.array_equal(direct, static)
    out = torch.torch.empty_like(x)
    for _ in range(4):
        assert np.array_equal(torch.bits(scaled.grouped(x, None, idx, w, recipe="direct-bf16", out=out)), direct)
        assert np.array_equal(torch.bits(scaled.grouped(x, None, idx, w, out=out)), static)
    for missing in ((None, None, idx, w), (x, None, None, w), (x, None, idx, None)):
        with pytest.raises(sluice.Error, match="expected an array of numpy or a tensor of torch, got NoneType"):
            scaled.grouped(*missing)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_that_come_again(arrays, geometry, device):
    torch, num, max_m = Torch(device), geometry.num_experts, 4
    experts = W4A8Experts(*[torch.array(a) for a in arrays], backend=sluice.Backend(device))
    rows = [torch.bf16(sluice.make_workload(geometry, num * max_m, first_token=first)[0]).view(num, max_m, -1)
            for first in (0, 500)]
    counts = [torch.array(np.arange(num, dtype=np.int32) % (max_m + 1)), torch.array(np.full(num, 2, np.int32))]

    def valid(y, i):
        return [torch.bits(y[e, :n]) for e, n in enumerate(counts[i].tolist())]

    expected = [valid(experts.masked(r.clone(), None, c.clone()), i) for i, (r, c) in enumerate(zip(rows, counts))]
    x, count = rows[0].clone(), counts[0].clone()
    out = torch.torch.empty_like(x)
    layer, = experts._masked.values()
    before = layer.num_repeated_calls
    for turn in range(12):
        x.copy_(rows[turn % 2]), count.copy_(counts[turn % 2])
        seen = valid(experts.masked(x, None, count, out=out), turn % 2)
        assert all(np.array_equal(a, b) for a, b in zip(seen, expected[turn % 2])), turn
    assert layer.num_repeated_calls - before >= 10
    if device == "cpu":  # Counts that the host sees are looked at in each call.
        count[0] = max_m + 1
        with pytest.raises(sluice.Error, match="num_rows"):
            experts.masked(x, None, count, out=out)
