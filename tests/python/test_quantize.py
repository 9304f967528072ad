"""quantize and requantize against the formats written out in numpy."""

import numpy as np
import pytest

import sluice

ml_dtypes = pytest.importorskip("ml_dtypes")
E4M3 = ml_dtypes.float8_e4m3fn


@pytest.fixture(scope="module")
def rows():
    values = np.random.default_rng(1).standard_normal((5, 256)).astype(np.float32)
    return (values * np.float32(3)).astype(ml_dtypes.bfloat16)


def cast(values):
    return np.clip(values, -448, 448).astype(E4M3).view(np.uint8)


def by_group(x, pow2):
    groups = x.astype(np.float32).reshape(len(x), -1, 128)
    amax = np.maximum(np.abs(groups).max(-1), np.float32(1e-4))
    scale = amax * (np.float32(1) / np.float32(448))
    inverse = np.float32(448) / amax
    if pow2:
        scale = np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)
        inverse = np.float32(1) / scale
    return cast((groups * inverse[..., None]).reshape(x.shape)), scale


@pytest.mark.parametrize("pow2", [False, True])
def test_groups(backend, rows, pow2):
    codes, scale = sluice.quantize(backend, rows, pow2=pow2)
    expected_codes, expected_scale = by_group(rows, pow2)
    assert codes.dtype == np.uint8 and scale.dtype == np.float32
    assert np.array_equal(codes, expected_codes) and np.array_equal(scale, expected_scale)


def test_one_scale_per_row(backend, rows):
    codes, scale = sluice.quantize(backend, rows, per_token=True)
    amax = np.abs(rows.astype(np.float32)).max(1, keepdims=True)
    assert scale.shape == (5, 1) and np.array_equal(scale, amax * (np.float32(1) / np.float32(448)))
    assert np.array_equal(codes, cast(rows.astype(np.float32) * (np.float32(448) / amax)))
    for other in ({"pow2": True}, {"static_scale": 1.0}):
        with pytest.raises(sluice.Error, match="per token|per_token"):
            sluice.quantize(backend, rows, per_token=True, **other)


def test_static_and_requantize(backend, rows):
    s = np.float32(0.03)
    codes, scale = sluice.quantize(backend, rows, static_scale=s)
    assert scale is None
    assert np.array_equal(codes, cast(rows.astype(np.float32) * (np.float32(1) / s)))
    q, scale = sluice.quantize(backend, rows)
    moved = sluice.requantize(backend, q, scale, s)
    real = q.view(E4M3).astype(np.float32) * np.repeat(scale, 128, axis=1)
    assert np.array_equal(moved, cast(real * (np.float32(1) / s)))


def test_only_valid_rows_are_written(backend, rows):
    x = np.stack([rows.view(np.uint16)] * 2)
    codes, scale = np.full(x.shape, 7, np.uint8), np.full((2, 5, 2), 7, np.float32)
    result = sluice.quantize(backend, x, num_rows=np.array([2, 0], np.int32), out=(codes, scale))
    assert result[0] is codes and result[1] is scale
    assert np.array_equal(codes[0, :2], by_group(rows, False)[0][:2])
    assert np.all(codes[0, 2:] == 7) and np.all(codes[1] == 7) and np.all(scale[1] == 7)
    flat = np.full(rows.shape, 7, np.uint8)
    sluice.quantize(backend, rows, static_scale=1.0, num_rows=np.array([1, 2], np.int32),
                    row_begin=np.array([0, 3]), out=(flat, None))
    assert np.all(flat[1:3] == 7) and not np.all(flat[3] == 7)
