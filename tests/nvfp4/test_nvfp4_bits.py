"""Bits of the quantiser against the oracle in block_oracle.py: recipes, dtypes, corner values."""

import block_oracle as oracle
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from nbfmha import nvfp4

RECIPES = [("nvfp4", "amax"), ("nvfp4", "four_over_six"), ("mxfp4", "amax")]


def assert_same_bits(x, format="nvfp4", scale="amax", global_scale=None):
    """Quantise and dequantise a matrix both ways and compare every byte and every float."""
    qt = nvfp4.quantize(x, format=format, scale=scale, global_scale=global_scale)
    g = np.float32(1) if global_scale is None else np.float32(global_scale)
    codes, scales = oracle.quantize_rows(x.astype(np.float32), format, scale, g)
    np.testing.assert_array_equal(qt.scales, scales)
    np.testing.assert_array_equal(oracle.nibbles(qt.codes), codes)
    values = oracle.dequantize_rows(codes, scales, format, g)[:, : x.shape[1]]
    back = nvfp4.dequantize(qt)
    np.testing.assert_array_equal(back, values)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(np.signbit(back[numbers]), np.signbit(values[numbers]))


@pytest.mark.parametrize(("format", "scale"), RECIPES)
@pytest.mark.parametrize("magnitude", [1e-38, 1e-6, 2.0**-9, 1.0, 1000.0, 1e9, 5e37])
def test_gaussian(format, scale, magnitude):
    x = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32) * np.float32(magnitude)
    assert_same_bits(x, format, scale)


@pytest.mark.parametrize("scale", ["amax", "four_over_six"])
@pytest.mark.parametrize("global_scale", [2.0**-64, 3.7e-5, 1 / 3, 1.0, 2.5, 1e10, 2.0**64])
def test_global_scales(scale, global_scale):
    x = np.random.default_rng(2).standard_normal((24, 64)).astype(np.float32)
    for factor in (1.0, global_scale, global_scale / 6 / 2**9, global_scale * 2688):
        assert_same_bits(x * np.float32(factor), scale=scale, global_scale=global_scale)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    bits=st_numpy.arrays(np.uint32, (2, 32), elements=st.integers(0, 2**32 - 1), fill=st.nothing()),
    recipe=st.sampled_from(RECIPES),
)
def test_any_float32_bits(bits, recipe):
    assert_same_bits(bits.view(np.float32), *recipe)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    x=st_numpy.arrays(np.float32, (2, 16), elements=st.floats(width=32, min_value=-8, max_value=8, allow_subnormal=True)),
    scale=st.sampled_from(["amax", "four_over_six"]),
    global_scale=st.one_of(st.none(), st.floats(2.0**-64, 2.0**64)),
)
def test_any_moderate_block(x, scale, global_scale):
    assert_same_bits(x, scale=scale, global_scale=global_scale)


@pytest.mark.parametrize(("format", "scale"), RECIPES)
def test_every_float16_value(format, scale):
    """Finite f16 values among their neighbours, then an eighth of all 65,536 in random company, NaN and Inf included."""
    everything = np.random.default_rng(3).permutation(np.arange(1 << 16).astype(np.uint16)).view(np.float16)
    finite = np.sort(everything[np.isfinite(everything)].astype(np.float32)).astype(np.float16)
    for values in (finite[: len(finite) // 64 * 64], everything[: 1 << 13]):
        assert_same_bits(values.reshape(-1, 64)[:: 4 if scale == "four_over_six" else 1], format, scale)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("format", "scale"), RECIPES)
def test_sixteen_bit_input_equals_its_exact_widening(dtype, format, scale):
    bits = np.random.default_rng(4).permutation(np.arange(1 << 16).astype(np.uint16)).reshape(-1, 64)
    narrow = bits.view(dtype)
    with np.errstate(invalid="ignore"):
        wide = narrow.astype(np.float32)
    got, expected = (nvfp4.quantize(x, format=format, scale=scale) for x in (narrow, wide))
    np.testing.assert_array_equal(got.codes, expected.codes)
    np.testing.assert_array_equal(got.scales, expected.scales)
    if format == "nvfp4":
        got, expected = (nvfp4.quantize(x, global_scale="amax") for x in (narrow, wide))
        np.testing.assert_array_equal(got.global_scale, expected.global_scale)
        np.testing.assert_array_equal(got.codes, expected.codes)


@pytest.mark.parametrize("special", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("format", "scale"), RECIPES)
def test_special_values_in_every_position(special, format, scale):
    size = oracle.BLOCK_SIZE[format]
    x = np.random.default_rng(5).standard_normal((size, 2 * size)).astype(np.float32)
    x[np.arange(size), np.arange(size)] = special
    assert_same_bits(x, format, scale)


def test_element_ties_round_to_the_even_code():
    """The eight decision points of E2M1, one float32 step below, on and above them, both signs, scale exactly 1."""
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    expected = {0: [0, 2, 2, 4, 4, 6, 6], -1: [0, 1, 2, 3, 4, 5, 6], 1: [1, 2, 3, 4, 5, 6, 7]}
    for step, codes in expected.items():
        values = midpoints if step == 0 else np.nextafter(midpoints, np.float32(np.inf * step))
        block = np.concatenate([values, -values, [6, 0]]).astype(np.float32)
        qt = nvfp4.quantize(block[None])
        assert qt.scales[0, 0] == 0x38
        assert oracle.nibbles(qt.codes)[0].tolist() == [*codes, *(c | 8 for c in codes), 7, 0]


def test_scale_ties_round_to_the_even_scale_and_saturate():
    """amax/6 halfway between neighbouring E4M3 scales (exact in float32) goes to the even byte, for every pair."""
    scales = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middle = (scales[1:] + scales[:-1]) / 2
    amax = 6 * middle
    assert np.all(amax / np.float32(6) == middle)
    got = nvfp4.quantize(np.repeat(amax[:, None], 16, axis=1)).scales[:, 0]
    low = np.arange(0x7E)
    np.testing.assert_array_equal(got, low + low % 2)
    beyond = np.array([6 * 448.0, 6 * 464.0, 6 * 465.0, 1e30, np.finfo(np.float32).max], np.float32)
    qt = nvfp4.quantize(np.repeat(beyond[:, None], 16, axis=1))
    assert np.all(qt.scales == 0x7E)
    assert np.all(qt.codes == 0x77)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dequantize_rounds_once_to_nearest_even(dtype):
    """Every code times every finite scale and a global scale with a full significand, against ml_dtypes."""
    scales = np.arange(0x7F, dtype=np.uint8)[:, None]
    packed = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8), (0x7F, 1))
    for g in (1.0, 1 / 3, 7.1e-5, 333.3):
        global_scale = np.array(g, np.float32)
        qt = nvfp4.QuantizedTensor(packed, scales, "nvfp4", "head_dim", "linear", global_scale, (0x7F, 16))
        exact = oracle.dequantize_rows(oracle.nibbles(packed), scales, g=np.float32(g))
        got = nvfp4.dequantize(qt, dtype)
        if dtype == "bfloat16":
            expected = exact.astype(ml_dtypes.bfloat16).view(np.uint16)
            assert got.dtype == np.uint16
        else:
            with np.errstate(over="ignore"):
                expected = exact.astype(dtype)
            bits = np.uint16 if dtype == "float16" else np.uint32
            got, expected = got.view(bits), expected.view(bits)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("dtype", "bits"), [("float32", np.uint32), ("float16", np.uint16), ("bfloat16", np.uint16)])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_nan_is_the_hardware_pattern(format, dtype, bits):
    x = np.ones((2, 64), np.float32)
    x[0, 40] = np.nan
    got = nvfp4.dequantize(nvfp4.quantize(x, format=format), dtype).view(bits)
    block = slice(32, 48) if format == "nvfp4" else slice(32, 64)
    canonical = 0x7FFFFFFF if dtype == "float32" else 0x7FFF
    assert np.all(got[0, block] == canonical)
    assert np.count_nonzero(got == canonical) == got[0, block].size


def test_dequantize_overflows_to_infinity_and_keeps_bfloat16_subnormals():
    x = np.array([[1e6, -1e6] * 8], np.float32)
    back = nvfp4.dequantize(nvfp4.quantize(x, global_scale=1000.0), "float16")
    np.testing.assert_array_equal(back, np.array([[np.inf, -np.inf] * 8], np.float16))
    tiny = np.full((1, 32), 2.0**-127, np.float32)
    back = nvfp4.dequantize(nvfp4.quantize(tiny, format="mxfp4"), "bfloat16")
    np.testing.assert_array_equal(back.view(ml_dtypes.bfloat16).astype(np.float32), tiny)
    np.testing.assert_array_equal(nvfp4.dequantize(nvfp4.quantize(tiny, format="mxfp4"), "float16"), 0 * tiny)


def test_mxfp4_exponents_over_the_whole_range():
    """Every power of two of float32, subnormals included, as the largest of a block."""
    exponents = np.arange(-149, 128)
    x = np.zeros((exponents.size, 32), np.float32)
    x[:, 7] = np.ldexp(1.0, exponents)
    expected = np.clip(exponents - 2, -127, 127) + 127
    np.testing.assert_array_equal(nvfp4.quantize(x, format="mxfp4").scales[:, 0], expected)
    assert_same_bits(x, "mxfp4")
    just_below = np.nextafter(x, np.float32(0))
    lower = np.clip(np.frexp(just_below[1:, 7])[1] - 3, -127, 127) + 127
    np.testing.assert_array_equal(nvfp4.quantize(just_below[1:], format="mxfp4").scales[:, 0], lower)
