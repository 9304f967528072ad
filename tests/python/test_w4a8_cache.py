"""The functions' cache where weights lose their memory, and others come to its address."""

import gc

import numpy as np
import pytest
from spaces import SPACES, Numpy, space_of

import sluice
from sluice.compat import _w4a8_cache, w4a8

TOKENS = 6


@pytest.fixture(params=SPACES)
def space(request):
    return space_of(request.param)


@pytest.fixture()
def packed(monkeypatch):
    """One entry for each time that weights were repacked."""
    calls, repack = [], sluice._core.repack_stacked
    monkeypatch.setattr(sluice._core, "repack_stacked", lambda *a, **k: calls.append(1) or repack(*a, **k))
    return calls


@pytest.fixture()
def run(space, geometry):
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    x, idx, weights = space.bf16(x), space.array(idx.astype(np.int64)), space.array(weights)
    return lambda *experts: space.bits(w4a8.w4a8_moe_grouped(x, None, idx, weights, *experts))


@pytest.fixture()
def exact(space, geometry):
    """What experts of their own give."""
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    x, idx, weights = space.bf16(x), space.array(idx.astype(np.int64)), space.array(weights)
    return lambda *experts: space.bits(w4a8.W4A8Experts(*experts).grouped(x, None, idx, weights))


def over_bytes(space, codes):
    """An array over memory that outlives it, and another one over the same memory later: (array, leave, other).

    leave() takes the memory from the first array's owner, which lives on."""
    if isinstance(space, Numpy):
        memory = bytearray(codes.tobytes())
        owner = np.frombuffer(memory, np.int8)
        return (owner.reshape(codes.shape), lambda: owner.__setstate__((1, (0,), owner.dtype, False, b"")),
                lambda: np.frombuffer(memory, np.int8).reshape(codes.shape))
    torch = space.torch
    if space.device == "cpu":
        memory = bytearray(codes.tobytes())
        array = torch.frombuffer(memory, dtype=torch.int8).view(codes.shape)
        return (array, lambda: array.untyped_storage().share_memory_(),
                lambda: torch.frombuffer(memory, dtype=torch.int8).view(codes.shape))
    array = space.array(codes)
    place, tried = array.data_ptr(), []

    def other():
        for _ in range(1000):
            tried.append(torch.empty_like(array))
            if tried[-1].data_ptr() == place:
                return tried.pop()
        raise AssertionError("the address did not come again")

    return array, lambda: array.untyped_storage().resize_(0), other


def fill(space, array, codes):
    if isinstance(space, Numpy):
        array[...] = codes
    else:
        array.copy_(space.array(codes))


def test_other_weights_at_the_address(space, arrays, run, exact, packed):
    """An owner that lives is not enough: FSDP and offloaders free a storage and keep it."""
    codes, turned = arrays[0], np.ascontiguousarray(arrays[0][::-1])
    s13, w2, s2 = (space.array(a.copy()) for a in arrays[1:])
    w13, leave, other = over_bytes(space, codes)
    before = exact(w13, s13, w2, s2)
    for _ in range(3):
        assert np.array_equal(run(w13, s13, w2, s2), before)
    place, size = _w4a8_cache._place_of(w13), len(_w4a8_cache.cache)
    leave()
    again = other()
    assert _w4a8_cache._place_of(again) == place
    fill(space, again, turned)
    expected = exact(again, s13, w2, s2)
    assert not np.array_equal(expected, before)
    repacks = len(packed)
    for _ in range(3):
        assert np.array_equal(run(again, s13, w2, s2), expected)
    assert len(packed) == repacks + 1 and len(_w4a8_cache.cache) == size
    del w13, leave  # What came after the first is not the first's to take away.
    gc.collect()
    assert np.array_equal(run(again, s13, w2, s2), expected) and len(packed) == repacks + 1
    del again, other
    gc.collect()
    assert len(_w4a8_cache.cache) == size - 1


def test_a_known_object_over_other_memory(space, arrays, run, exact):
    """The object that came before, its address too, but a storage that took the place of the first."""
    if isinstance(space, Numpy):
        pytest.skip("arrays of numpy are not remembered")
    s13, w2, s2 = (space.array(a.copy()) for a in arrays[1:])
    first, leave, other = over_bytes(space, arrays[0])
    w13 = first.detach()
    before = run(w13, s13, w2, s2)
    assert np.array_equal(run(w13, s13, w2, s2), before) and id(w13) in _w4a8_cache._recent
    leave()
    w13.data = other()
    fill(space, w13, np.ascontiguousarray(arrays[0][::-1]))
    expected = exact(w13, s13, w2, s2)
    assert np.array_equal(run(w13, s13, w2, s2), expected) and not np.array_equal(expected, before)


def test_weights_that_come_and_go(space, arrays, run, packed):
    """A storage that gets memory elsewhere again and again, as FSDP's do around a call, leaves nothing behind."""
    if isinstance(space, Numpy):
        pytest.skip("numpy frees no memory of an array that lives")
    w13, s13, w2, s2 = (space.array(a).clone() for a in arrays)
    before, size = run(w13, s13, w2, s2), len(_w4a8_cache.cache)
    for turn in range(1, 5):
        for array in (w13, w2):  # The new memory is there before the old one goes.
            place, num_bytes = array.data_ptr(), array.numel()
            array.untyped_storage().resize_(num_bytes * (1 + turn % 2))
            assert array.data_ptr() != place
        for _ in range(2):
            assert np.array_equal(run(w13, s13, w2, s2), before)
        assert len(_w4a8_cache.cache) == size and len(packed) == 1 + turn
