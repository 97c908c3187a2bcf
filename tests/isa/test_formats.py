"""Codecs against ml_dtypes, exhaustively where the domain allows."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptx_inline.isa.formats import E2M1, E4M3, E5M2, FORMATS, UE4M3, UE8M0, pack_nibbles, unpack_nibbles

ORACLES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "ue8m0": ml_dtypes.float8_e8m0fnu,
}
ALL_F16 = np.arange(65536, dtype=np.uint16).view(np.float16)


def bits(values):
    return np.asarray(values, np.float32).view(np.uint32)


def random_f32(count=1 << 20):
    """Random bit patterns: every exponent, subnormals, Inf and NaN among them."""
    return np.random.default_rng(7).integers(0, 2**32, count, np.uint32).view(np.float32)


def finite_values(format):
    return np.sort(format.values[np.isfinite(format.values)].astype(np.float64))


def near_ties(format):
    """The values of a format, the midpoints between them and the f32 neighbours of those, as f32."""
    finite = finite_values(format)
    with np.errstate(over="ignore"):
        ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
        up, down = np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))
    return np.concatenate([finite.astype(np.float32), ties, up, down])


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_every_code_decodes_as_ml_dtypes(name):
    codes = np.arange(1 << FORMATS[name].bits, dtype=np.uint8)
    expected = codes.view(ORACLES[name]).astype(np.float32)
    actual = FORMATS[name].decode(codes)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(actual[number]), bits(expected[number]))


def test_ue4m3_is_e4m3_without_a_sign():
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(UE4M3.decode(codes), E4M3.decode(codes & 0x7F))
    positive = np.abs(ALL_F16)
    np.testing.assert_array_equal(UE4M3.encode(positive), E4M3.encode(positive))


@pytest.mark.parametrize("name", sorted(set(ORACLES) - {"ue8m0"}))
@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "ties"])
def test_encode_as_ml_dtypes(name, source):
    format, oracle = FORMATS[name], ORACLES[name]
    values = {
        "f16": lambda: ALL_F16,
        "bf16": lambda: (np.arange(65536, dtype=np.uint32) << np.uint32(16)).view(np.float32),
        "f32": random_f32,
        "ties": lambda: near_ties(format),
    }[source]()
    nan = np.isnan(values)
    limit = values.dtype.type(min(format.max_finite, np.finfo(values.dtype).max))
    # ml_dtypes does not saturate, so the clamp does; its NaNs differ from the PTX ISA's
    expected = np.clip(np.where(nan, 0, values), -limit, limit).astype(oracle).view(np.uint8)
    expected[nan] = format.nan_codes[0] if format.nan_codes else format.max_code
    np.testing.assert_array_equal(format.encode(values), expected)


@pytest.mark.parametrize("name", sorted(set(ORACLES) - {"ue8m0"}))
def test_f64_is_not_rounded_twice(name):
    """One f64 step beside a tie decides it (ml_dtypes goes through f32 here, so it is no oracle)."""
    format = FORMATS[name]
    finite = finite_values(format)
    ties = (finite[1:] + finite[:-1]) / 2
    np.testing.assert_array_equal(format.decode(format.encode(np.nextafter(ties, np.inf))), finite[1:])
    np.testing.assert_array_equal(format.decode(format.encode(np.nextafter(ties, -np.inf))), finite[:-1])


@pytest.mark.parametrize("name", sorted(set(ORACLES) - {"ue8m0"}))
def test_saturation_and_nan(name):
    format = FORMATS[name]
    top = np.nextafter(np.float32(format.max_finite), np.float32(np.inf))
    large = np.array([top, 1e30, np.inf], np.float32)
    sign = 1 << (format.bits - 1)
    assert (format.encode(large) == format.max_code).all()
    assert (format.encode(-large) == format.max_code + sign).all()
    expected = format.nan_codes[0] if format.nan_codes else format.max_code
    assert (format.encode(np.array([np.nan, -np.nan])) == expected).all()


def test_negative_zero_keeps_its_sign():
    np.testing.assert_array_equal(E2M1.encode(np.array([-0.0, -0.25, 0.25, 0.0])), [8, 8, 0, 0])
    np.testing.assert_array_equal(E5M2.encode(np.array([-0.0, -1e-30])), [0x80, 0x80])


def test_e2m1_ties_go_to_the_even_code():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    np.testing.assert_array_equal(E2M1.encode(ties), [0, 2, 2, 4, 4, 6, 6])


def test_every_product_of_e2m1_and_ue4m3_is_a_number_of_f16():
    """So dequantising to f16 loses nothing: six significant bits at most, from 2^-10 to 2688."""
    products = np.multiply.outer(E2M1.values, UE4M3.values[: UE4M3.max_code + 1]).astype(np.float64)
    np.testing.assert_array_equal(products.astype(np.float16), products)
    magnitudes = np.abs(products[products != 0])
    assert (magnitudes.min(), magnitudes.max()) == (2.0**-10, 2688)
    fraction = np.frexp(magnitudes)[0]
    np.testing.assert_array_equal(fraction * 2**6, np.round(fraction * 2**6))


def test_every_product_of_e2m1_and_ue4m3_is_a_number_of_bf16():
    products = np.multiply.outer(E2M1.values, UE4M3.values[: UE4M3.max_code + 1])
    np.testing.assert_array_equal(products.view(np.uint32) & np.uint32(0xFFFF), 0)


def test_ue8m0_encodes_magnitudes():
    """The sign has no place in it: PTX cvt drops it, as NVIDIA's host emulation of it (cuda_fp8.hpp) does."""
    values = random_f32(1 << 16)
    for rounding in ("rz", "rp"):
        expected = UE8M0.encode(np.abs(values), rounding=rounding)
        np.testing.assert_array_equal(UE8M0.encode(-np.abs(values), rounding=rounding), expected)


@pytest.mark.parametrize("rounding", ["rz", "rp"])
def test_ue8m0_rounds_exponents(rounding):
    magnitudes = np.abs(
        np.concatenate([random_f32(), near_ties(UE8M0), np.exp2(np.arange(-149.0, 128), dtype=np.float32)])
    )
    magnitudes = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)].astype(np.float64)
    mantissa, exponent = np.frexp(magnitudes)
    expected = exponent - 1 + ((mantissa > 0.5) & (rounding == "rp"))
    np.testing.assert_array_equal(UE8M0.encode(magnitudes, rounding=rounding), np.clip(expected + 127, 0, 254))
    np.testing.assert_array_equal(UE8M0.encode(np.array([0.0, np.inf, np.nan]), rounding=rounding), [0, 254, 255])


def test_wrong_input_is_named():
    with pytest.raises(TypeError, match="codes must be of dtype uint8, got int64"):
        E2M1.decode(np.array([1]))
    with pytest.raises(TypeError, match="values must be of dtype float16, float32 or float64, got int64"):
        E2M1.encode(np.array([1]))
    with pytest.raises(ValueError, match="values must not be negative for ue4m3, got -1"):
        UE4M3.encode(np.array([-1.0]))
    with pytest.raises(ValueError, match="rounding must be one of rz, rp for ue8m0, got 'rn'"):
        UE8M0.encode(np.array([1.0]))


@given(st.lists(st.integers(0, 15), max_size=40), st.integers(0, 1))
def test_nibbles_round_trip(codes, axis):
    matrix = np.array([codes, codes[::-1]], np.uint8)
    matrix = matrix if axis else matrix.T
    packed = pack_nibbles(matrix, axis)
    assert packed.shape[axis] == (len(codes) + 1) // 2
    np.testing.assert_array_equal(unpack_nibbles(packed, len(codes), axis), matrix)
    if len(codes) % 2:
        assert (unpack_nibbles(packed, axis=axis).take(-1, axis) == 0).all()


def test_low_nibble_is_the_even_index():
    np.testing.assert_array_equal(pack_nibbles(np.array([1, 2, 3], np.uint8)), [0x21, 0x03])
