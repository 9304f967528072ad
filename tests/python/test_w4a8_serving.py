"""W4A8Experts as serving engines hold them: other orders of weights, memory, rooms, threads, odd arguments."""

import gc
import threading
import weakref

import numpy as np
import pytest
from spaces import SPACES, Numpy, Torch, as_bf16, as_float, space_of

import sluice
from sluice.compat import _w4a8_cache, _w4a8_rooms, w4a8
from sluice.compat.w4a8 import W4A8Experts

TOKENS = 6


@pytest.fixture(params=SPACES)
def space(request):
    return space_of(request.param)


@pytest.fixture()
def backend(space):
    return sluice.Backend("cuda") if on_gpu(space) else sluice.Backend("cpu", num_threads=1)


def on_gpu(space):
    return getattr(space, "device", "cpu") == "cuda"


@pytest.fixture()
def call(geometry, space):
    """grouped() of some experts on the same tokens: its bits."""
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    x, idx, weights = space.bf16(x), space.array(idx.astype(np.int64)), space.array(weights)
    return lambda experts, **k: space.bits(experts.grouped(x, None, k.get("idx", idx), k.get("weights", weights)))


@pytest.fixture()
def published(space, arrays):
    return [space.array(a.copy()) for a in arrays]


def interleaved(scale):
    """As SGLang has them after its own processing."""
    experts, rows, groups = scale.shape
    a = 4 if groups % 4 == 0 else 1
    blocks = scale.reshape(experts, rows, groups // a, a).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks.reshape(experts, groups // a, rows * a))


def uint4b8(codes, is_transposed):
    """As compressed-tensors has them: int32 words of weights + 8."""
    words = (codes.view(np.uint8) ^ 0x88).view(np.int32)
    return np.ascontiguousarray(words.transpose(0, 2, 1)) if is_transposed else words


def test_orders_of_weights(space, arrays, published, backend, call):
    w13, s13, w2, s2 = arrays
    expected = call(W4A8Experts(*published, backend=backend))
    assert np.any(expected)

    def same(codes13, scale13, codes2, scale2, **layout):
        arrays = [space.array(a) for a in (codes13, scale13, codes2, scale2)]
        return np.array_equal(call(W4A8Experts(*arrays, backend=backend, **layout)), expected)

    for layout in ({}, {"scale_layout": "interleaved"}):
        assert same(w13, interleaved(s13), w2, interleaved(s2), **layout)
    assert same(w13, s13, w2, s2, scale_layout="plain")
    assert same(uint4b8(w13, False), s13, uint4b8(w2, False), s2, weight_layout="uint4b8")
    turned = [np.ascontiguousarray(s.transpose(0, 2, 1)) for s in (s13, s2)]
    assert same(uint4b8(w13, True), turned[0], uint4b8(w2, True), turned[1], weight_layout="uint4b8-transposed")
    wide = np.zeros((*w13.shape[:2], w13.shape[2] + 10), np.int8)
    wide[..., : w13.shape[2]] = w13
    views = [space.array(wide)[..., : w13.shape[2]], published[1], published[2], published[3]]
    assert np.array_equal(call(W4A8Experts(*views, backend=backend)), expected)

    def refused(text, *given, **layout):
        with pytest.raises(sluice.Error, match=text) as caught:
            W4A8Experts(*[space.array(a) for a in given], backend=backend, **layout)
        assert caught.value.code == "invalid_argument"

    refused("w13: int32 words .* need weight_layout: uint4b8 or", uint4b8(w13, False), s13, uint4b8(w2, False), s2)
    refused("w13_scale: expected .* interleaved", w13, interleaved(s13), w2, s2, scale_layout="plain")
    refused("weight_layout: 'int8' is none of int4, uint4b8", w13, s13, w2, s2, weight_layout="int8")
    bad = s13.astype(np.float32) if s13.dtype == np.float32 else as_float(s13)
    bad = bad.copy()
    bad[2, bad.shape[1] - 1, 1] = np.nan
    good = s2 if s2.dtype == np.float32 else as_float(s2)
    refused(r"expert 2 up: scale \[\d+, 1\] = nan is not a finite number", w13, bad, w2, good)


def test_scales_of_zero_and_below(space, arrays, published, backend, call):
    """Taken as they are: engines' dummy weights have such."""
    w13, s13, w2, s2 = published
    expected = call(W4A8Experts(w13, s13, w2, s2, backend=backend))
    turned = space.array(arrays[3] ^ np.uint16(0x8000) if arrays[3].dtype == np.uint16 else -arrays[3])
    assert np.array_equal(call(W4A8Experts(w13, s13, w2, turned, backend=backend)), expected ^ 0x8000)
    none = space.array(np.zeros_like(arrays[1]))
    assert not np.any(call(W4A8Experts(w13, none, w2, s2, backend=backend)) & 0x7FFF)


def test_arguments_of_other_kinds_are_named(published, backend, call):
    for name, wrong in (("a1_scale", "1"), ("a2_scale", b"1"), ("a1_scale", [1.0])):
        with pytest.raises(sluice.Error, match=f"^{name}: expected a number or an array of them, got {type(wrong).__name__}"):
            W4A8Experts(*published, backend=backend, **{"a1_scale": 1.0, "a2_scale": 1.0, name: wrong})
    if isinstance(published[0], np.ndarray):
        with pytest.raises(sluice.Error, match="^topk_weights: expected dtype float32 .*, got float32 in foreign byte order"):
            call(W4A8Experts(*published, backend=backend), weights=np.zeros((TOKENS, 2), ">f4"))


@pytest.mark.parametrize("weight_layout", ["int4", "uint4b8", "uint4b8-transposed"])
def test_in_the_memory_of_the_weights(space, arrays, backend, geometry, weight_layout):
    """An engine's parameters and the repacked weights are the same bytes, one after the other."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if isinstance(space, Numpy):
        pytest.skip("weight_memory() gives tensors of torch")
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    run = lambda e: space.bits(e.grouped(  # noqa: E731
        space.bf16(x), None, space.array(idx.astype(np.int64)), space.array(weights)))
    published = [space.array(a) if a.dtype != np.uint16 else space.bf16(a) for a in arrays]
    expected = run(W4A8Experts(*published, backend=backend))
    is_transposed = weight_layout == "uint4b8-transposed"
    place = w4a8.weight_memory(
        geometry.num_experts, geometry.hidden, geometry.intermediate, scale_dtype=published[1].dtype,
        weight_layout=weight_layout, transposed_scales=is_transposed, device=space.device)
    for parameter, array in zip(place[1:], published):
        if parameter.dtype == torch.int32:
            array = torch.from_numpy(uint4b8(array.cpu().numpy(), is_transposed))
        elif is_transposed:
            array = array.transpose(1, 2)
        parameter.copy_(array)
    experts = W4A8Experts(*place[1:], backend=backend, weight_layout=weight_layout, memory=place.memory)
    assert experts.weight_bytes == place.memory.numel()
    memory = weakref.ref(place.memory.untyped_storage())
    del place, parameter
    gc.collect()
    assert memory() is not None  # The object keeps it.
    assert np.array_equal(run(experts), expected)
    del experts
    gc.collect()
    assert memory() is None
    small = w4a8.weight_memory(
        1, geometry.hidden, geometry.intermediate, scale_dtype=published[1].dtype, device=space.device)
    with pytest.raises(sluice.Error, match="memory has .* bytes, the packed weights"):
        W4A8Experts(*published, backend=backend, memory=small.memory)


def test_rooms_are_shared_and_growing_them_repacks_nothing(published, space, backend, geometry, monkeypatch):
    packed = []
    repack = sluice._core.repack_stacked
    monkeypatch.setattr(sluice._core, "repack_stacked", lambda *a, **k: packed.append(1) or repack(*a, **k))
    layers = [W4A8Experts(*published, backend=backend) for _ in range(3)]
    group = layers[0]._room.group
    assert all(layer._room.group is group for layer in layers) and len(packed) == 3
    sizes = []
    for max_m in (1, 8, 4, 16):
        x = space.bf16(np.zeros((geometry.num_experts, max_m, geometry.hidden), np.uint16))
        count = space.array(np.full(geometry.num_experts, max_m, np.int32))
        for layer in layers:
            layer.masked(x, None, count)
        sizes.append(group.memory()["scratch_bytes"])
    assert len(packed) == 3 and sizes[1] == sizes[2] and sizes[0] < sizes[1] < sizes[3]
    assert group.memory()["prepared_bytes"] == sum(layer.weight_bytes for layer in layers)


def test_four_threads(published, backend, call):
    """With one object, and with the functions' cache: calls take turns, weights are repacked once."""
    experts = W4A8Experts(*published, backend=backend)
    expected, seen = call(experts), []

    def run():
        for _ in range(20):
            seen.append(np.array_equal(call(experts), expected))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80 and all(seen)


def test_threads_of_the_functions_repack_once(published, space, geometry, monkeypatch):
    packed, seen = [], []
    repack = sluice._core.repack_stacked
    monkeypatch.setattr(sluice._core, "repack_stacked", lambda *a, **k: packed.append(1) or repack(*a, **k))
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    arguments = space.bf16(x), None, space.array(idx.astype(np.int64)), space.array(weights), *published
    together = threading.Barrier(4)

    def run():
        together.wait()
        seen.append(space.bits(w4a8.w4a8_moe_grouped(*arguments)))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) == 1 and len(seen) == 4 and all(np.array_equal(s, seen[0]) for s in seen)
    assert _w4a8_rooms.backend_for(arguments[0]) is _w4a8_rooms.backend_for(published[0])


def test_views_of_the_weights_are_the_weights(published, space, geometry, monkeypatch):
    """.data of a parameter, or all of an array: repacked once, dropped with the memory and not before."""
    packed = []
    repack = sluice._core.repack_stacked
    monkeypatch.setattr(sluice._core, "repack_stacked", lambda *a, **k: packed.append(1) or repack(*a, **k))
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    x, idx, weights = space.bf16(x), space.array(idx.astype(np.int64)), space.array(weights)
    view = (lambda a: a.data) if isinstance(space, Torch) else (lambda a: a[:])
    w13, s13, w2, s2 = published
    run = lambda: w4a8.w4a8_moe_grouped(x, None, idx, weights, view(w13), s13, view(w2), s2)  # noqa: E731
    first = run()
    gc.collect()
    assert np.array_equal(space.bits(run()), space.bits(first)) and len(packed) == 1
    kept = len(_w4a8_cache.cache)
    published.clear()
    last = view(w13)
    del w13, run
    gc.collect()
    assert len(_w4a8_cache.cache) == kept  # A view of it is there.
    del last
    gc.collect()
    assert len(_w4a8_cache.cache) == kept - 1


def test_the_functions_know_tensors_that_come_again(published, space, geometry, backend):
    """What is remembered of the objects hides no change of theirs."""
    if isinstance(space, Numpy):
        pytest.skip("arrays of numpy are not remembered")
    w13, s13, w2, s2 = published
    published.clear()
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    x, idx, weights = space.bf16(x), space.array(idx.astype(np.int64)), space.array(weights)

    def run(*, a13=s13, a2=s2, **k):
        return space.bits(w4a8.w4a8_moe_grouped(x, None, idx, weights, w13, a13, w2, a2, **k))

    expected = run()
    for _ in range(3):
        assert np.array_equal(run(), expected)
    assert id(w13) in _w4a8_cache._recent
    assert np.array_equal(run(backend=_w4a8_rooms.backend_for(w13)), expected)
    for field, change in {"w13_scale": {"a13": s13.clone()}, "w2_scale": {"a2": s2.clone()},
                          "a1_scale": {"a1_scale": 1.0, "a2_scale": 1.0}, "activation": {"activation": "swiglu:limit=1"},
                          "backend": {"backend": backend}}.items():
        for _ in range(2):
            with pytest.raises(sluice.Error, match=field):
                run(**change)
        assert np.array_equal(run(), expected)
    s13.data = s13.data * 2  # The same object over other memory.
    with pytest.raises(sluice.Error, match="w13_scale"):
        run()
    w4a8.forget(w13, w2)
    assert not np.array_equal(run(), expected)
    number = id(w13)
    w4a8.forget(w13, w2)
    del w13, run
    gc.collect()
    assert number not in _w4a8_cache._recent


def test_weights_of_the_router_in_bfloat16(published, space, backend, call, geometry):
    experts = W4A8Experts(*published, backend=backend)
    _, _, weights = sluice.make_workload(geometry, TOKENS)
    rounded = as_bf16(weights)
    for _ in range(2):  # The first call of a kind and one like it.
        bits = call(experts, weights=space.bf16(rounded))
        assert np.array_equal(bits, call(experts, weights=space.array(as_float(rounded)))) and np.any(bits)


def test_experts_elsewhere(published, space, backend, call, geometry):
    """-1, the number of experts, and any other number are passed over."""
    experts = W4A8Experts(*published, backend=backend)
    _, idx, _ = sluice.make_workload(geometry, TOKENS)
    none = idx.astype(np.int64)
    none[1:3] = -1
    expected = call(experts, idx=space.array(none))
    assert np.any(expected) and not np.any(expected[1:3])
    for number in (geometry.num_experts, geometry.num_experts + 7, -5, 2**40):
        there = none.copy()
        there[1:3] = number
        assert np.array_equal(call(experts, idx=space.array(there)), expected)


def test_one_scale_for_each_token(published, space, backend, geometry):
    """Rows that came with one scale each: direct-token, whose own cast of bf16 rows gives the same bits."""
    experts = W4A8Experts(*published, backend=backend)
    x, idx, weights = sluice.make_workload(geometry, TOKENS)
    x, idx, weights = space.bf16(x), space.array(idx.astype(np.int64)), space.array(weights)
    codes, scale = sluice.quantize(backend, x, per_token=True)
    assert [int(n) for n in scale.shape] == [TOKENS, 1]
    y = space.bits(experts.grouped(codes, scale, idx, weights))
    assert np.array_equal(y, space.bits(experts.grouped(x, None, idx, weights, recipe="direct-token")))
    assert not np.array_equal(y, space.bits(experts.grouped(x, None, idx, weights)))
    # Between calls with groups, which have another recipe.
    groups = sluice.quantize(backend, x)
    assert np.array_equal(space.bits(experts.grouped(*groups, idx, weights)),
                          space.bits(experts.grouped(x, None, idx, weights)))
    assert np.array_equal(space.bits(experts.grouped(codes, scale, idx, weights)), y)
    rows = space.bf16(np.tile(space.bits(x)[:4], (geometry.num_experts, 1, 1)))
    count = space.array(np.full(geometry.num_experts, 3, np.int32))
    codes, scale = sluice.quantize(backend, rows, per_token=True)
    y = space.bits(experts.masked(codes, scale, count))[:, :3]
    one = W4A8Experts(*published, backend=backend, a1_scale=1.0, a2_scale=1.0)
    with pytest.raises(sluice.Error, match="x_scale: one scale for each row, but the layer has static") as caught:
        one.masked(codes, scale, count)
    assert caught.value.code == "unsupported"
    for e in range(geometry.num_experts):  # As a routed call to that expert alone.
        only, weight = np.full((3, 1), e, np.int64), np.ones((3, 1), np.float32)
        expected = experts.grouped(codes[e][:3], scale[e][:3], space.array(only), space.array(weight))
        assert np.array_equal(y[e], space.bits(expected))


def test_ten_thousand_calls(published, space, backend, geometry):
    """Nothing is kept of a call: no memory of the group or the device, no reference to an argument. On a GPU every call
    has rows, in memory that comes again and in memory of its own."""
    experts = W4A8Experts(*published, backend=backend)
    x, idx, weights = (a[: TOKENS if on_gpu(space) else 0] for a in sluice.make_workload(geometry, TOKENS))
    x, idx, weights = space.bf16(x), space.array(idx.astype(np.int64)), space.array(weights)
    free = (lambda: space.torch.cuda.mem_get_info()[0]) if on_gpu(space) else (lambda: 0)

    def run(times):
        for i in range(times):
            experts.grouped(x.clone() if i % 2 and on_gpu(space) else x, None, idx, weights)
        gc.collect()

    run(100)
    scratch, free_before = experts._room.group.memory()["scratch_bytes"], free()
    before = len(gc.get_objects())
    run(10_000)
    assert free_before - free() < 1 << 20
    assert experts._room.group.memory()["scratch_bytes"] == scratch
    assert len(gc.get_objects()) < before + 100 and len(experts._grouped) == 1
