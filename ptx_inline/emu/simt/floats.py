"""Floating-point formats of the compiled core: bits to float64 and back, rounded once. NaN results are canonical."""

from __future__ import annotations

import math

import numpy as np
from numba.extending import intrinsic

from ptx_inline.emu.scalar_types import BF16, F16, F32, F64, FTZ, RELU, RM, RN, RP, SAT
from ptx_inline.emu.simt.jit import compiled

U0, U1 = np.uint64(0), np.uint64(1)
_U16, U52, _U63 = np.uint64(16), np.uint64(52), np.uint64(63)
_MAGNITUDE_F64 = np.uint64((1 << 63) - 1)
_FRACTION_F64 = np.uint64((1 << 52) - 1)
_HIDDEN_F64 = np.uint64(1 << 52)
INFINITY_F64 = np.uint64(0x7FF << 52)

# Bits of each scalar type, in the order F16, BF16, F32, F64.
SIGN = np.array([1 << 15, 1 << 15, 1 << 31, 1 << 63], np.uint64)
_INFINITY = np.array([0x7C00, 0x7F80, 0x7F800000, 0x7FF << 52], np.uint64)
_ONE = np.array([0x3C00, 0x3F80, 0x3F800000, 0x3FF << 52], np.uint64)
CANONICAL_NAN = np.array([0x7FFF, 0x7FFF, 0x7FFFFFFF, 0x7FF8 << 48], np.uint64)
_SMALLEST_NORMAL = np.array([1 << 10, 1 << 7, 1 << 23, 1 << 52], np.uint64)
_MANTISSA_BITS = np.array([10, 7, 23, 52], np.int64)
_BIAS = np.array([15, 127, 127, 1023], np.int64)


@intrinsic
def fused(typing_context, x, y, z):
    """``x * y + z`` rounded once to nearest, on three float32 or three float64."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return x(x, x, x), generate


@compiled
def f32_value(bits):
    """float32 of its bits."""
    return np.uint32(bits).view(np.float32)


@compiled
def f32_bits(value):
    """Bits of a float32."""
    return np.uint64(np.float32(value).view(np.uint32))


@compiled
def f64_value(bits):
    """float64 of its bits."""
    return np.uint64(bits).view(np.float64)


@compiled
def f64_bits(value):
    """Bits of a float64."""
    return np.float64(value).view(np.uint64)


@compiled
def f16_value(bits):
    """float64 value of F16 bits."""
    bits = np.uint64(bits)
    exponent = (bits >> np.uint64(10)) & np.uint64(0x1F)
    mantissa = bits & np.uint64(0x3FF)
    sign = (bits & np.uint64(0x8000)) << np.uint64(48)
    if exponent == U0:
        magnitude = f64_bits(np.float64(mantissa) * 2.0**-24)
    elif exponent == np.uint64(0x1F):
        magnitude = INFINITY_F64 | (mantissa << np.uint64(42))
    else:
        magnitude = ((exponent + np.uint64(1008)) << U52) | (mantissa << np.uint64(42))
    return f64_value(magnitude | sign)


@compiled
def bf16_value(bits):
    """float64 value of BF16 bits."""
    return np.float64(f32_value(np.uint64(bits) << _U16))


@compiled
def float_value(bits, ty):
    """float64 value of F16, BF16, F32 or F64 bits: exact."""
    if ty == F32:
        return np.float64(f32_value(bits))
    if ty == F16:
        return f16_value(bits)
    if ty == BF16:
        return bf16_value(bits)
    return f64_value(bits)


@compiled
def rounds_up(rounding, negative, odd, rest, half):
    """Whether a magnitude with ``rest`` below its last kept bit, worth ``2 * half``, moves up."""
    if rounding == RN:
        return rest > half or (rest == half and odd)
    if rest == U0:
        return False
    return (rounding == RP and not negative) or (rounding == RM and negative)


@compiled
def round_magnitude(value, mantissa_bits, bias, rounding):
    """Exponent and mantissa fields of a finite float64 in a narrower format without an upper limit; sign dropped."""
    bits = f64_bits(value)
    magnitude = bits & _MAGNITUDE_F64
    exponent = np.int64(magnitude >> U52)
    significand = magnitude & _FRACTION_F64
    if exponent != 0:
        significand |= _HIDDEN_F64
    smallest = 1024 - bias  # float64's exponent field of the format's smallest normal number
    shift = 52 - mantissa_bits
    code = U0
    if exponent >= smallest:
        code = np.uint64(exponent - smallest) << np.uint64(mantissa_bits)  # the hidden bit adds one
    else:
        shift = min(shift + smallest - exponent, 55)
    kept = significand >> np.uint64(shift)
    rest = significand & ((U1 << np.uint64(shift)) - U1)
    code += kept
    if rounds_up(rounding, (bits >> _U63) != U0, (kept & U1) != U0, rest, U1 << np.uint64(shift - 1)):
        code += U1
    return code


@compiled
def overflows_to_infinity(rounding, negative):
    """Whether a rounding takes an overflow to infinity, and not to the largest finite number."""
    return rounding == RN or (rounding == RP and not negative) or (rounding == RM and negative)


@compiled
def narrow(value, ty, rounding):
    """Bits in ``ty`` of a float64, rounded once; rounded to odd beforehand where the exact value needs more bits.

    Subnormals are kept, overflow goes to infinity or the largest finite number as IEEE 754 has it, NaN is canonical.
    """
    row = ty - F16
    if value != value:
        return CANONICAL_NAN[row]
    if ty == F64:
        return f64_bits(value)
    if ty == F32 and rounding == RN:
        return f32_bits(np.float32(value))
    negative = (f64_bits(value) >> _U63) != U0
    infinity = _INFINITY[row]
    if abs(value) == math.inf:
        code = infinity
    else:
        code = round_magnitude(value, _MANTISSA_BITS[row], _BIAS[row], rounding)
        if code >= infinity:
            code = infinity if overflows_to_infinity(rounding, negative) else infinity - U1
    return code | SIGN[row] if negative else code


@compiled
def flush(bits, ty):
    """Subnormal numbers become zeros of their sign."""
    row = ty - F16
    if (bits & (SIGN[row] - U1)) < _SMALLEST_NORMAL[row]:
        return bits & SIGN[row]
    return bits


@compiled
def is_tiny(value, ty, rounding):
    """Whether a result counts as subnormal for .ftz, which depends on its exact value (a float64, rounded to odd where it
    needs more bits): rounded as if there were no smallest exponent, it must stay below the smallest normal number. An H100
    decides so; PTX leaves it open.
    """
    row = ty - F16
    smallest = float_value(_SMALLEST_NORMAL[row], ty)
    step = smallest * 2.0 ** -np.float64(_MANTISSA_BITS[row] + 1)  # to the number below, had it an exponent of its own
    magnitude = abs(value)
    if rounding == RN:
        return magnitude < smallest - 0.5 * step
    if (rounding == RP and value > 0.0) or (rounding == RM and value < 0.0):
        return magnitude <= smallest - step
    return magnitude < smallest


@compiled
def finish(bits, ty, flags):
    """Result bits after RELU, SAT and FTZ."""
    row = ty - F16
    magnitude = bits & (SIGN[row] - U1)
    negative = (bits & SIGN[row]) != U0
    nan = magnitude > _INFINITY[row]
    if (flags & (RELU | SAT)) != 0 and negative and not nan:
        return U0
    if (flags & SAT) != 0:
        if nan:
            return U0
        bits = min(bits, _ONE[row])
    if (flags & FTZ) != 0:
        bits = flush(bits, ty)
    return bits
