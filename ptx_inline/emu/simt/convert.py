"""PTX ``cvt`` on bits: one rounding, saturation as the PTX ISA documents it.

Packed conversions to a pair take two F32 (the first becomes the upper half) or one pair of F16 or BF16 in ``a``; pairs of
FP8, FP6 and UE8M0 fill two bytes, a pair of FP4 two nibbles of one byte. They saturate at the largest finite number.
"""

from __future__ import annotations

import math

import numpy as np

from ptx_inline.emu.scalar_types import (
    BF16,
    BF16X2,
    E2M1X2,
    E2M3X2,
    E3M2X2,
    E4M3X2,
    E5M2X2,
    F16,
    F16X2,
    F32,
    F64,
    FLOATS,
    FTZ,
    RELU,
    RMI,
    RN,
    RNI,
    RP,
    RPI,
    RZ,
    SAT,
    SIGNED,
    U8,
    U64,
    UE8M0X2,
)
from ptx_inline.emu.simt.floats import (
    SIGN,
    U0,
    U1,
    f64_bits,
    finish,
    float_value,
    flush,
    is_tiny,
    narrow,
    round_magnitude,
    rounds_up,
)
from ptx_inline.emu.simt.integers import extend, is_signed, low_bits, width_of
from ptx_inline.emu.simt.jit import compiled
from ptx_inline.isa.formats import FORMATS

# Rows E4M3X2 to UE8M0X2: mantissa bits, bias, code of the largest finite number, of NaN, sign bit, bits of a pair's half.
_SMALL = [FORMATS[name] for name in ("e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "ue8m0")]
_FIELDS = np.array(
    [
        (
            format.mantissa_bits,
            format.bias,
            format.max_code,
            format.nan_codes[0] if format.nan_codes else format.max_code,
            1 << (format.bits - 1) if format.signed else 0,
            4 if format.bits == 4 else 8,
        )
        for format in _SMALL
    ],
    np.int64,
)
_F32_FRACTION = np.uint64(0x7FFFFF)
_VALUES = np.array([np.resize(format.values, 256) for format in _SMALL], np.float64)  # bits above a code's are ignored


@compiled
def _int_to_int(src, dst, flags, a):
    value = extend(src, a)
    mask = low_bits(width_of(dst))
    if (flags & SAT) != 0:
        largest = mask >> U1 if is_signed(dst) else mask
        if is_signed(src) and np.int64(value) < 0:
            lowest = np.int64(~largest) if is_signed(dst) else np.int64(0)
            value = np.uint64(max(np.int64(value), lowest))
        else:
            value = min(value, largest)
    return value & mask


@compiled
def _int_to_float(src, dst, rounding, flags, a):
    magnitude = extend(src, a)
    negative = is_signed(src) and np.int64(magnitude) < 0
    if negative:
        magnitude = ~magnitude + U1
    shift = U0  # of the bits above float64's 53
    while shift < np.uint64(11) and (magnitude >> (np.uint64(53) + shift)) != U0:
        shift += U1
    kept = magnitude >> shift
    rest = magnitude & ((U1 << shift) - U1)
    if rest != U0:
        if dst == F64:
            if rounds_up(rounding, negative, (kept & U1) != U0, rest, U1 << (shift - U1)):
                kept += U1
        else:
            kept |= U1  # to odd: rounded later
    value = np.float64(kept) * np.float64(U1 << shift)
    return finish(narrow(-value if negative else value, dst, rounding), dst, flags & (SAT | RELU))


@compiled
def to_integral(value, rounding):
    """A float64 rounded to an integral value by RNI, RZI, RMI or RPI; zeros keep the sign."""
    if not abs(value) < 2.0**52:
        return value
    whole = np.int64(value)
    rest = value - np.float64(whole)
    if rounding == RNI:
        if abs(rest) > 0.5 or (abs(rest) == 0.5 and (whole & 1) != 0):
            whole += 1 if rest > 0.0 else -1
    elif rounding == RMI and rest < 0.0:
        whole -= 1
    elif rounding == RPI and rest > 0.0:
        whole += 1
    return math.copysign(np.float64(whole), value)


@compiled
def _float_to_int(src, dst, rounding, flags, a):
    """Saturates. NaN becomes 0, or where a type of 64 bits takes part the destination's highest bit alone."""
    if (flags & FTZ) != 0 and src == F32:
        a = flush(a, src)
    value = float_value(a, src)
    width = width_of(dst)
    highest = U1 << (width - U1)
    if value != value:
        return highest if src == F64 or width == np.uint64(64) else U0
    value = to_integral(value, rounding)
    if is_signed(dst):
        limit = np.float64(highest)
        if value >= limit:
            return highest - U1
        if value <= -limit:
            return highest
        return np.uint64(np.int64(value)) & low_bits(width)
    if value <= 0.0:
        return U0
    if value >= 2.0 * np.float64(highest):
        return low_bits(width)
    if value >= 2.0**63:
        return np.uint64(np.int64(value - 2.0**63)) | (U1 << np.uint64(63))
    return np.uint64(np.int64(value))


@compiled
def _carried_nan(src, dst, a):
    """A NaN as the hardware passes it on to a format of other width: sign and upper bits kept, made quiet."""
    if src == BF16:
        return a << np.uint64(16)
    if dst == F32:
        sign = (a >> np.uint64(32)) & np.uint64(0x80000000)
        return sign | np.uint64(0x7FC00000) | ((a >> np.uint64(29)) & _F32_FRACTION)
    drop = np.uint64(42) if dst == F16 else np.uint64(45)
    quiet, fraction = (np.uint64(0x7E00), np.uint64(0x3FF)) if dst == F16 else (np.uint64(0x7FC0), np.uint64(0x7F))
    return ((a >> np.uint64(48)) & np.uint64(0x8000)) | quiet | ((a >> drop) & fraction)


@compiled
def _float_to_float(src, dst, rounding, flags, a):
    if (flags & FTZ) != 0 and src == F32 and dst != F16:  # an H100 does not flush what becomes F16
        a = flush(a, src)
    value = float_value(a, src)
    carried = (src == F64 and dst < F64) or (src == BF16 and dst == F32)
    if value != value and carried and (flags & (SAT | RELU)) == 0:
        return _carried_nan(src, dst, a)
    if rounding >= RNI:
        value = to_integral(value, rounding)
        rounding = RN
    if dst != F32:
        flags &= ~FTZ
    bits = narrow(value, dst, rounding)
    if (flags & FTZ) != 0 and is_tiny(value, dst, rounding):
        bits &= SIGN[dst - F16]
    return finish(bits, dst, flags)


@compiled
def encode_small(value, ty, rounding, flags):
    """Code of a float64 in the element type of a pair, E4M3X2 to UE8M0X2."""
    row = ty - E4M3X2
    largest = np.uint64(_FIELDS[row, 2])
    if value != value:
        return np.uint64(_FIELDS[row, 3])
    bits = f64_bits(value)
    if ty == UE8M0X2:
        bits &= ~(U1 << np.uint64(63))
        exponent = np.int64(bits >> np.uint64(52)) - 1023 + _FIELDS[row, 1]
        if exponent < 0:
            return U0
        if rounding == RP and (bits << np.uint64(12)) != U0:
            exponent += 1
        return min(np.uint64(exponent), largest)
    negative = (bits >> np.uint64(63)) != U0
    if negative and (flags & RELU) != 0:
        return U0
    code = largest
    if abs(value) < math.inf:
        code = min(round_magnitude(value, _FIELDS[row, 0], _FIELDS[row, 1], RN), largest)
    return code | np.uint64(_FIELDS[row, 4]) if negative else code


@compiled
def decode_small(code, ty):
    """float64 value of a code of a pair's element type, E4M3X2 to UE8M0X2."""
    return _VALUES[ty - E4M3X2, np.int64(code)]


@compiled
def _half_width(ty):
    if ty >= E4M3X2:
        return np.uint64(_FIELDS[ty - E4M3X2, 5])
    return np.uint64(16)


@compiled
def _half_value(src, a, b, upper):
    """float64 value of the upper or lower source of a packed conversion."""
    if src == F32:
        return float_value(a if upper else b, F32)
    width = _half_width(src)
    bits = (a >> width if upper else a) & low_bits(width)
    if src >= E4M3X2:
        return decode_small(bits, src)
    return float_value(bits, F16 if src == F16X2 else BF16)


@compiled
def _half_bits(value, dst, rounding, flags):
    if dst >= E4M3X2:
        return encode_small(value, dst, rounding, flags)
    scalar = F16 if dst == F16X2 else BF16
    return finish(narrow(value, scalar, rounding), scalar, flags & (SAT | RELU))


@compiled
def convert(src, dst, rounding, flags, a, b):
    """``cvt``: bits (uint64) of type ``dst`` for those of ``src``; ``b`` is the second source of a packed conversion.

    ``rounding`` is RN, RZ, RM or RP, or an integral RNI to RPI for float to integer and for a float type to itself;
    RN where the conversion is exact. ``flags`` adds up FTZ, SAT, RELU. Use :func:`can_convert` beforehand.
    """
    if dst >= F16X2:
        result = U0
        for half in range(2):
            value = _half_value(src, a, b, half == 0)
            result = (result << _half_width(dst)) | _half_bits(value, dst, rounding, flags)
        return result
    if src < F16:
        if dst < F16:
            return _int_to_int(src, dst, flags, a)
        return _int_to_float(src, dst, rounding, flags, a)
    if dst < F16:
        return _float_to_int(src, dst, rounding, flags, a)
    return _float_to_float(src, dst, rounding, flags, a)


_INTEGERS = (*range(U8, U64 + 1), *SIGNED)
_PACKED_ROUNDINGS = {
    **{(F32, dst): (RN, RZ) for dst in (F16X2, BF16X2)},
    **{(F32, dst): (RN,) for dst in (E4M3X2, E5M2X2, E2M1X2, E2M3X2, E3M2X2)},
    **{(F16X2, dst): (RN,) for dst in (E4M3X2, E5M2X2)},
    **{(src, F16X2): (RN,) for src in (E4M3X2, E5M2X2, E2M1X2, E2M3X2, E3M2X2)},
    **{(src, UE8M0X2): (RZ, RP) for src in (F32, BF16X2)},
    (UE8M0X2, BF16X2): (RN,),
}


def can_convert(src_ty: int, dst_ty: int, rounding: int) -> bool:
    """Whether :func:`convert` has this conversion; asked once, when an instruction is decoded."""
    if (src_ty, dst_ty) in _PACKED_ROUNDINGS:
        return rounding in _PACKED_ROUNDINGS[src_ty, dst_ty]
    integral = RNI <= rounding <= RPI
    if src_ty in _INTEGERS and dst_ty in _INTEGERS:
        return rounding == RN
    if src_ty in _INTEGERS and dst_ty in FLOATS:
        return RN <= rounding <= RP
    if src_ty in FLOATS and dst_ty in _INTEGERS:
        return integral
    if src_ty in FLOATS and dst_ty in FLOATS:
        return RN <= rounding <= RP or (integral and src_ty == dst_ty)
    return False
