"""Codecs checked against their definition, exhaustively, without another library.

The definition is evaluated here from the exponent and mantissa fields (OCP 8-bit and Microscaling specifications), the
codecs are ``ptx_inline.isa.formats``.
"""

from __future__ import annotations

import numpy as np

from nbfmha.testing import compare
from nbfmha.validate.case import Context, Registry, Result

registry = Registry()

FLOATS = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "ue4m3")


def _format(name: str):
    from ptx_inline.isa.formats import FORMATS

    return FORMATS[name]


def _codes(form) -> np.ndarray:
    """Every code that is a number: UE4M3's top bit is no part of it."""
    bits = 7 if form.name == "ue4m3" else form.bits
    codes = np.arange(2**bits, dtype=np.uint8)
    return codes[~np.isin(codes, (*form.nan_codes, *form.inf_codes))]


def _by_definition(form, codes: np.ndarray) -> np.ndarray:
    """(-1)^sign 2^(exponent - bias) (1 + mantissa / 2^m), or 2^(1 - bias) mantissa / 2^m where the exponent is 0."""
    mantissa_bits, exponent_bits = form.mantissa_bits, form.exponent_bits
    codes = codes.astype(np.int64)
    mantissa = codes % 2**mantissa_bits
    exponent = codes // 2**mantissa_bits % 2**exponent_bits
    sign = codes // 2 ** (mantissa_bits + exponent_bits) % 2
    significand = np.where(exponent == 0, mantissa, mantissa + 2**mantissa_bits)
    magnitude = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - form.bias - mantissa_bits)
    return np.where(sign == 1, -magnitude, magnitude)


def _nearest_even(form, values: np.ndarray) -> np.ndarray:
    """Values rounded to the nearest number of the format, ties to the even code, saturating: found by search."""
    codes = _codes(form)
    numbers = _by_definition(form, codes)
    positive = numbers >= 0
    positive &= ~np.signbit(numbers)
    order = np.argsort(numbers[positive])
    table, table_codes = numbers[positive][order], codes[positive][order]
    magnitude = np.abs(values)
    above = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    low, high = table[above - 1], table[above]
    middle = (low + high) / 2  # exact: both have few bits
    up = (magnitude > middle) | ((magnitude == middle) & (table_codes[above] % 2 == 0))
    return np.copysign(np.where(up, high, low), values)


@registry.case("formats", "every code decodes by its definition", evidence="computed")
def decode_by_definition(context: Context) -> Result:
    got, expected = [], []
    for name in FLOATS:
        form = _format(name)
        codes = _codes(form)
        got.append(form.decode(codes))
        expected.append(_by_definition(form, codes))
    ue8m0 = _format("ue8m0")
    got.append(ue8m0.decode(np.arange(255, dtype=np.uint8)))
    expected.append(np.ldexp(1.0, np.arange(255) - 127))
    return Result.of(compare(np.concatenate(got), np.concatenate(expected)), "codes of 7 formats")


@registry.case("formats", "decode, then encode, gives the code back", evidence="computed")
def codes_round_trip(context: Context) -> Result:
    got, expected = [], []
    for name in FLOATS:
        form = _format(name)
        codes = _codes(form)
        got.append(form.encode(form.decode(codes)))
        expected.append(codes)
    ue8m0 = _format("ue8m0")
    for rounding in ("rz", "rp"):
        codes = np.arange(255, dtype=np.uint8)
        got.append(ue8m0.encode(ue8m0.decode(codes), rounding=rounding))
        expected.append(codes)
    return Result.of(compare(np.concatenate(got), np.concatenate(expected)), "codes")


@registry.case("formats", "every f16 value rounds to nearest even", evidence="computed")
def every_f16(context: Context) -> Result:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    got, expected = [], []
    for name in FLOATS:
        form = _format(name)
        values = np.abs(finite) if name == "ue4m3" else finite
        got.append(form.decode(form.encode(values)))
        expected.append(_nearest_even(form, values.astype(np.float64)))
    got, expected = np.concatenate(got), np.concatenate(expected)
    comparison = compare(got, expected)
    if comparison.ok and np.any(np.signbit(got) != np.signbit(expected)):
        return Result.failed("signs of zero differ", "a negative value that rounds to zero must stay negative")
    return Result.of(comparison, "roundings of f16, 6 formats")


@registry.case("formats", "midpoints go to even, their neighbours do not", evidence="computed")
def ties(context: Context) -> Result:
    got, expected = [], []
    for name in FLOATS:
        form = _format(name)
        numbers = np.unique(np.abs(_by_definition(form, _codes(form))))
        middle = (numbers[1:] + numbers[:-1]) / 2
        probes = np.concatenate([middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf), numbers[-1:] * 1.01])
        got.append(form.decode(form.encode(probes)))
        expected.append(_nearest_even(form, probes))
    return Result.of(compare(np.concatenate(got), np.concatenate(expected)), "midpoints and neighbours (f64)")


@registry.case("formats", "NaN and infinity as the PTX conversions", evidence="computed")
def special_values(context: Context) -> Result:
    e2m1, e4m3, ue8m0 = (_format(name) for name in ("e2m1", "e4m3", "ue8m0"))
    special = np.array([np.nan, np.inf, -np.inf], np.float32)
    got = [*e2m1.encode(special), *e4m3.encode(special), *ue8m0.encode(special[:1], rounding="rz")]
    # cvt.rn.satfinite: e2m1 has no NaN (-> +6), e4m3 keeps NaN and saturates infinities, ue8m0 keeps NaN
    expected = [0x7, 0x7, 0xF, 0x7F, 0x7E, 0xFE, 0xFF]
    return Result.of(compare(got, expected), "special values")


@registry.case("formats", "two codes a byte, low nibble first, pack and unpack", evidence="computed")
def nibbles(context: Context) -> Result:
    from ptx_inline.isa.formats import pack_nibbles, unpack_nibbles

    codes = context.rng("nibbles").integers(0, 16, (5, 33), dtype=np.uint8)
    packed = pack_nibbles(codes)
    back = unpack_nibbles(packed, length=33)
    first = compare(packed[:, 0] & 15, codes[:, 0])
    padding = compare(packed[:, -1] >> 4, np.zeros(5))
    if not (first.ok and padding.ok):
        return Result.failed("nibble order or padding is wrong", (first if not first.ok else padding).describe())
    return Result.of(compare(back, codes), "codes")
