"""W4A8Experts of MXFP4: bytes as engines hold them, beside what the same bytes are to ExpertWeights."""

import json

import numpy as np
import pytest
from spaces import DEVICES, Numpy, Torch, as_float

import sluice
from sluice import _core
from sluice.compat import w4a8
from sluice.compat.w4a8 import W4A8Experts

E, H, I, TOKENS, TOPK = 4, 256, 128, 6, 2  # noqa: E741


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def backend(device):
    return sluice.Backend(device, **{} if device == "cuda" else {"num_threads": 1})


@pytest.fixture(params=["numpy", "torch"])
def space(request, device):
    if request.param == "torch":
        return Torch(device)
    if device == "cuda":
        pytest.skip("numpy has no arrays on a GPU")
    return Numpy()


@pytest.fixture(scope="module")
def published():
    """w13, w13_scale, w2, w2_scale: any bytes are codes; scales from 2^-9 to 2^-6."""
    rng = np.random.default_rng(5)
    draw = lambda low, high, *shape: rng.integers(low, high, shape, dtype=np.uint8)  # noqa: E731
    return (draw(0, 256, E, 2 * I, H // 2), draw(118, 122, E, 2 * I, H // 32), draw(0, 256, E, H, I // 2),
            draw(118, 122, E, H, I // 32))


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(6)
    bits = rng.standard_normal((TOKENS, H)).astype(np.float32).view(np.uint32) >> 16
    idx = np.stack([rng.permutation(E)[:TOPK] for _ in range(TOKENS)]).astype(np.int64)
    return bits.astype(np.uint16), idx, rng.random((TOKENS, TOPK), dtype=np.float32)


def dequantized(codes, scales):
    """In words: sign, two bits of exponent with a bias of 1, one of mantissa; times 2^(scale - 127)."""
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    exponent, mantissa = (nibbles >> 1) & 3, (nibbles & 1) * 0.5
    size = np.where(exponent == 0, mantissa, (1 + mantissa) * 2.0 ** (exponent.astype(int) - 1))
    return np.where(nibbles < 8, size, -size) * np.repeat(2.0 ** (scales.astype(int) - 127), 32, -1)


def test_the_same_bits_as_from_arrays_and_close_to_float64(space, published, tokens, backend):
    x, idx, weights = tokens
    arrays = [space.array(a) for a in published]
    call = lambda made: space.bits(made.grouped(  # noqa: E731
        space.bf16(x), None, space.array(idx), space.array(weights)))
    y = call(W4A8Experts(*arrays, backend=backend))
    assert np.array_equal(y, call(W4A8Experts(*arrays, backend=backend, weight_layout="mxfp4")))
    w13, s13, w2, s2 = published
    halves = [(np.ascontiguousarray(w13[:, a]), np.ascontiguousarray(s13[:, a]))
              for a in (slice(0, I), slice(I, 2 * I))]
    made = _core.ExpertWeights.from_arrays(*halves, (w2, s2), group_size=32, weight_format="mxfp4")
    group = _core.LocalGroup(backend, hidden=H, intermediate=I, max_entries=TOKENS * TOPK)
    layer = group.add_layer(made, recipe="direct-bf16")
    assert np.array_equal(y, space.bits(layer.forward_topk(
        space.bf16(x), space.array(idx), space.array(weights))))
    gate_up, down = dequantized(w13, s13), dequantized(w2, s2)
    exact = np.zeros((TOKENS, H))
    for t in range(TOKENS):
        for e, weight in zip(idx[t], weights[t]):
            c = gate_up[e] @ as_float(x[t])
            exact[t] += weight * (down[e] @ (c[:I] / (1 + np.exp(-c[:I])) * c[I:]))
    assert np.linalg.norm(as_float(y) - exact) < 0.1 * np.linalg.norm(exact)


def test_masked_and_the_functions_take_them(space, published, tokens, backend):
    x = np.stack([tokens[0]] * E)
    num_rows = np.array([3, 0, 6, 1], np.int32)
    arrays = [space.array(a) for a in published]
    experts = W4A8Experts(*arrays, backend=backend)
    one = space.bits(experts.masked(space.bf16(x), None, space.array(num_rows)))
    other = space.bits(w4a8.w4a8_moe_masked(space.bf16(x), None, space.array(num_rows), *arrays, backend=backend))
    for e, n in enumerate(num_rows):
        assert np.array_equal(one[e, :n], other[e, :n]) and (n == 0 or np.any(one[e, :n]))


def test_what_is_no_mxfp4_is_refused_by_name(space, published, backend):
    w13, s13, w2, s2 = published

    def refused(text, *arrays, **layout):
        with pytest.raises(sluice.Error, match=text) as caught:
            W4A8Experts(*[space.array(a) for a in arrays], backend=backend, **layout)
        assert caught.value.code == "invalid_argument"

    refused(r"w13_scale: expected uint8 \[4, 256, 256 / 32\] of e8m0", w13, s13[:, :, :4], w2, s2)
    refused("w13_scale: scales of mxfp4 lie plain", w13, s13, w2, s2, scale_layout="interleaved")
    refused("w13: expected uint8 .*, got int32", w13.view(np.int32), s13, w2, s2, weight_layout="mxfp4")
    bad = s13.copy()
    bad[2, I + 3, 1] = 255
    refused(r"expert 2 up: scale \[3, 1\] = nan is not a finite number", w13, bad, w2, s2)


def test_in_the_memory_of_the_weights(published, tokens, backend, device):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    space = Torch(device)
    x, idx, weights = tokens
    run = lambda e: space.bits(e.grouped(  # noqa: E731
        space.bf16(x), None, space.array(idx), space.array(weights)))
    expected = run(W4A8Experts(*[space.array(a) for a in published], backend=backend))
    place = w4a8.weight_memory(E, H, I, group_size=32, weight_layout="mxfp4", device=device)
    assert {p.dtype for p in place} == {torch.uint8}
    for parameter, array in zip(place[1:], published):
        parameter.copy_(space.array(array))
    experts = W4A8Experts(*place[1:], backend=backend, memory=place.memory)
    assert experts.weight_bytes == place.memory.numel()
    assert np.array_equal(run(experts), expected)
    e8m0 = getattr(torch, "float8_e8m0fnu", None)
    if e8m0 is not None:
        w13, s13, w2, s2 = (space.array(a) for a in published)
        assert np.array_equal(run(W4A8Experts(w13, s13.view(e8m0), w2, s2.view(e8m0), backend=backend)), expected)
    with pytest.raises(sluice.Error, match="scale_dtype: expected torch.uint8"):
        w4a8.weight_memory(E, H, I, group_size=32, weight_layout="mxfp4", scale_dtype=torch.bfloat16, device="cpu")


def padded_by_hand(array, rows, columns, fill):
    out = np.full((len(array), rows, columns), fill, array.dtype)
    out[:, : array.shape[1], : array.shape[2]] = array
    return out


@pytest.mark.parametrize("layout", ["mxfp4", "int4"])
def test_widths_of_whole_groups_are_padded(space, backend, layout):
    """Hidden 160 and intermediate 96 give the bits of the same weights with zeros up to 256 and 128, of which a row has
    160. bf16 rows may have either width."""
    hidden, inner, wide, wider = 160, 96, 256, 128
    rng = np.random.default_rng(9)
    codes_type, one = (np.uint8, 127) if layout == "mxfp4" else (np.int8, 1)
    shapes = [(2 * inner, hidden), (hidden, inner)]
    codes = [rng.integers(0, 256, (E, n, k // 2), dtype=np.uint8).view(codes_type) for n, k in shapes]
    scales = [rng.integers(118, 122, (E, n, k // 32), dtype=np.uint8) for n, k in shapes]
    if layout == "int4":
        scales = [(s.astype(np.float32) - 100) / 1024 for s in scales]
    own = [codes[0], scales[0], codes[1], scales[1]]
    halves = lambda array, columns, fill: np.concatenate(  # noqa: E731
        [padded_by_hand(part, wider, columns, fill) for part in np.split(array, 2, 1)], 1)
    by_hand = [halves(own[0], wide // 2, 0), halves(own[1], wide // 32, one),
               padded_by_hand(own[2], wide, wider // 2, 0), padded_by_hand(own[3], wide, wider // 32, one)]
    bits = rng.standard_normal((TOKENS, hidden)).astype(np.float32).view(np.uint32) >> 16
    idx = np.stack([rng.permutation(E)[:TOPK] for _ in range(TOKENS)]).astype(np.int64)
    weights = rng.random((TOKENS, TOPK), dtype=np.float32)
    x, wide_x = bits.astype(np.uint16), np.zeros((TOKENS, wide), np.uint16)
    wide_x[:, :hidden] = x
    run = lambda experts, rows, **out: space.bits(experts.grouped(  # noqa: E731
        space.bf16(rows), None, space.array(idx), space.array(weights), **out))
    experts = W4A8Experts(*map(space.array, own), backend=backend)
    assert (experts.hidden, experts.intermediate, experts.token_width) == (wide, wider, hidden)
    expected = run(W4A8Experts(*map(space.array, by_hand), backend=backend), wide_x)
    assert np.any(expected[:, :hidden]) and not np.any(expected[:, hidden:])
    for _ in range(3):  # The third is a kept call.
        assert np.array_equal(run(experts, x), expected[:, :hidden])
    assert np.array_equal(run(experts, wide_x), expected)
    with pytest.raises(sluice.Error, match=r"x: expected shape \[rows, 256\], got \[6, 192\]"):
        run(experts, wide_x[:, :192])
    num_rows = space.array(np.array([TOKENS, 0, 1, 2], np.int32))
    batch = np.stack([wide_x] * E)
    masked = space.bits(experts.masked(space.bf16(batch), None, num_rows))
    assert np.any(masked[0, :, :hidden]) and not np.any(masked[0, :, hidden:])


def test_what_is_not_padded_is_refused(published, backend, device):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    space = Torch(device)
    w13, s13, w2, s2 = (space.array(a) for a in published)
    narrow = [w13[:, :, : H // 2 - 16], s13[:, :, : H // 32 - 1], w2[:, : H - 32], s2[:, : H - 32]]
    with pytest.raises(sluice.Error, match="hidden 224, intermediate 128 are padded .* memory= nor"):
        W4A8Experts(*narrow, backend=backend, memory=torch.empty(1, dtype=torch.uint8, device=device))
    with pytest.raises(sluice.Error, match="multiples of 128"):  # Half a group.
        W4A8Experts(w13[:, :, : H // 2 - 8], s13, w2[:, : H - 16], s2[:, : H - 16], backend=backend)


def test_local_experts_of_a_checkpoint_take_the_models_own_width(tmp_path, backend, device):
    """Hidden 160, intermediate 96, from a file with DeepSeek-V4's names: every element against float64."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    mxfp4_files = pytest.importorskip("mxfp4_files")
    folder = tmp_path / "model"
    mxfp4_files.write(folder, "deepseek_v4", 160, 96)
    reference = mxfp4_files.Layer(folder)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "deepseek_v4", "hidden_size": 160, "moe_intermediate_size": 96,
        "swiglu_limit": reference.activation[1]["limit"], "n_routed_experts": mxfp4_files.EXPERTS,
        "num_experts_per_tok": mxfp4_files.TOPK, "num_hidden_layers": 4,
        "expert_dtype": "fp4", "quantization_config": mxfp4_files.QUANTIZATION["deepseek_v4"]}))
    checkpoint = sluice.Checkpoint(folder)
    assert (checkpoint.geometry.token_width, checkpoint.geometry.hidden) == (160, 256)
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, 160, generator=draw).bfloat16()
    ids = torch.stack([torch.randperm(mxfp4_files.EXPERTS, generator=draw)[: mxfp4_files.TOPK] for _ in range(TOKENS)])
    weights = torch.rand(ids.shape, generator=draw)
    group = _core.LocalGroup(backend, hidden=256, intermediate=128, max_entries=ids.numel())
    loaded = checkpoint.load_experts(mxfp4_files.LAYER, 0, mxfp4_files.EXPERTS)
    outputs = []
    for experts in (sluice.LocalExperts(loaded, backend, max_entries=ids.numel()), group.add_layer(loaded),
                    *group.add_layers(checkpoint, [mxfp4_files.LAYER], first=0, count=mxfp4_files.EXPERTS)):
        routing = sluice.Routing(ids.to(device), weights.to(device))
        y = experts.forward(x.to(device), routing)
        assert reference.check(y, x, ids, weights, roundings=1) > 0.5
        outputs.append(y)
        wide = experts.forward(torch.nn.functional.pad(x, (0, 96)).to(device), routing)
        assert torch.equal(wide[:, :160], y) and not wide[:, 160:].any()
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
