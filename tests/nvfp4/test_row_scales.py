"""One float32 scale a row: every corner of the contract, against ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest

from nbfmha.row_scales import dequantize_rows, quantize_rows


def test_equals_ml_dtypes():
    x = np.random.default_rng(0).standard_normal((4, 500, 96)).astype(np.float32) * np.float32(3)
    codes, scales = quantize_rows(x)
    expected = np.abs(x).max(axis=-1) / np.float32(6)
    np.testing.assert_array_equal(scales, expected)
    np.testing.assert_array_equal(codes, (x / expected[..., None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
    assert (codes.dtype, scales.dtype) == (np.uint8, np.float32)
    np.testing.assert_array_equal((codes & 7).max(axis=-1), 7)  # the largest of a row is a 6


def test_what_a_scale_can_hold_comes_back():
    values = np.array([0, -0.5, 1, 1.5, -2, 3, 4, -6], np.float32)
    for factor in (1, 2.0**-20, 2.0**-140, 2.0**100):
        x = values * np.float32(factor)
        np.testing.assert_array_equal(dequantize_rows(*quantize_rows(x)), x)


def test_corners():
    x = np.ones((5, 16), np.float32)
    x[0], x[1, 3], x[2, 4], x[3], x[4] = -0.0, np.nan, -np.inf, 2.0**-149, np.finfo(np.float32).max
    codes, scales = quantize_rows(x)
    assert not codes[:4].any()
    assert not scales[[0, 3]].any(), "zeros, and what no float32 holds a sixth of"
    np.testing.assert_array_equal(scales[1:3].view(np.uint32), 0x7FFFFFFF)
    assert np.isnan(dequantize_rows(codes, scales)[1:3]).all()
    assert (codes[4] == 7).all()


def test_empty_rows_and_other_dtypes():
    codes, scales = quantize_rows(np.empty((3, 0), np.float32))
    assert (codes.shape, scales.tolist()) == ((3, 0), [0, 0, 0])
    with pytest.raises(TypeError, match="x must be of dtype float32, got float64"):
        quantize_rows(np.ones(4))
