"""Scalar floating-point operations of the compiled core: bits in, bits out, rounded once as the hardware rounds.

Sums, products, quotients, square roots and fused multiply-adds are exact for all inputs, roundings and subnormal results.
A result of F16, BF16 or F32 is first taken in float64 *rounded to odd* (inexact values get an odd last bit), which makes
the one rounding to the narrow format right (Boldo and Melquiond); F32 to nearest runs on the host's own float32 instead.

The ``*_APPROX`` functions are float64 results rounded to nearest, with PTX's special cases: within the error PTX states,
but not the hardware's bits.
"""

from __future__ import annotations

import math

import numpy as np

from ptx_inline.emu.scalar_types import (
    BF16,
    BF16X2,
    EQ,
    EQU,
    F16,
    F16X2,
    F32,
    F64,
    FABS,
    FADD,
    FCOPYSIGN,
    FDIV,
    FDIV_APPROX,
    FEX2_APPROX,
    FFMA,
    FLG2_APPROX,
    FMIN,
    FMUL,
    FNEG,
    FRCP,
    FRCP_APPROX,
    FRSQRT_APPROX,
    FSIN_APPROX,
    FSQRT,
    FSQRT_APPROX,
    FSUB,
    FTANH_APPROX,
    FTZ,
    GT,
    GTU,
    ISNAN,
    LE,
    LEU,
    LT,
    LTU,
    NAN,
    NE,
    NEU,
    NUM,
    RM,
    RN,
    RP,
    RZ,
)
from ptx_inline.emu.simt.floats import (
    CANONICAL_NAN,
    INFINITY_F64,
    SIGN,
    U0,
    U1,
    U52,
    f32_bits,
    f32_value,
    f64_bits,
    f64_value,
    finish,
    float_value,
    flush,
    fused,
    is_tiny,
    narrow,
    overflows_to_infinity,
)
from ptx_inline.emu.simt.jit import compiled

_SIGN_F64 = np.uint64(1 << 63)
_NOT_26 = np.uint64((1 << 64) - (1 << 27))  # keeps 26 significant bits of a float64
_HALF_WORD = np.uint64(0xFFFF)


@compiled
def round_to_odd(value, error):
    """``value`` (float64) for the exact ``value + error`` with a smaller ``error``: inexact values end in an odd bit."""
    bits = f64_bits(value)
    if error == 0.0 or (bits & U1) != U0:
        return value
    if (error > 0.0) == (value > 0.0):
        return f64_value(bits + U1)
    return f64_value(bits - U1)


@compiled
def _sum_error(x, y, total):
    """Exact ``x + y - total`` for ``total = fl(x + y)`` (Knuth's TwoSum)."""
    part = total - x
    return (x - (total - part)) + (y - part)


@compiled
def _sum_to_odd(x, y, rounding):
    total = x + y
    if total == 0.0:  # an exact zero of unlike signs is -0 when rounding down
        if rounding == RM and ((f64_bits(x) | f64_bits(y)) & _SIGN_F64) != U0:
            return -0.0
        return total
    if not abs(total) < math.inf:
        return total
    return round_to_odd(total, _sum_error(x, y, total))


@compiled
def _quotient_to_odd(x, y):
    """``x / y`` of numbers with at most 24 significant bits."""
    quotient = x / y
    if quotient == 0.0 or not abs(quotient) < math.inf or not abs(y) < math.inf:
        return quotient
    quotient = f64_value(f64_bits(quotient) & _NOT_26)
    rest = x - quotient * y  # both exact: 26 bits times 24 bits
    return round_to_odd(quotient, rest if y > 0.0 else -rest)


@compiled
def _root_to_odd(x):
    root = math.sqrt(x)
    if root == 0.0 or not root < math.inf:
        return root
    root = f64_value(f64_bits(root) & _NOT_26)
    return round_to_odd(root, x - root * root)


@compiled
def f32_nearest(op, x, y, z):
    """Operations FADD to FSQRT on float32 values, by the host."""
    if op == FADD:
        value = x + y
    elif op == FSUB:
        value = x - y
    elif op == FMUL:
        value = x * y
    elif op == FFMA:
        value = fused(x, y, z)
    elif op == FDIV:
        value = x / y
    elif op == FRCP:
        value = np.float32(1.0) / x
    else:
        value = math.sqrt(x)
    if value != value:
        return CANONICAL_NAN[F32 - F16]
    return f32_bits(value)


@compiled
def is_exact(op):
    """Whether the operation is correctly rounded (and not an approximation or a choice of bits)."""
    return op <= FFMA or op in (FDIV, FRCP, FSQRT)


@compiled
def _exact(op, rounding, x, y, z):
    """The correctly rounded operations on numbers of F16, BF16 or F32, as float64 rounded to odd."""
    if op == FADD:
        return _sum_to_odd(x, y, rounding)
    if op == FSUB:
        return _sum_to_odd(x, -y, rounding)
    if op == FMUL:
        return x * y
    if op == FFMA:
        return _sum_to_odd(x * y, z, rounding)
    if op == FDIV:
        return _quotient_to_odd(x, y)
    if op == FRCP:
        return _quotient_to_odd(1.0, x)
    return _root_to_odd(x)


@compiled
def _approximate(op, x, y):
    """The approximated functions, in float64; the caller rounds."""
    if op == FEX2_APPROX:
        return 2.0**x
    if op == FRCP_APPROX:
        return 1.0 / x
    if op == FDIV_APPROX:
        if 2.0**126 < abs(y) < 2.0**128:
            return x * math.copysign(0.0, y)  # PTX: 0, and NaN for an infinite dividend
        return x / y
    if op == FSQRT_APPROX:
        return math.sqrt(x)
    if op == FRSQRT_APPROX:
        if x == 0.0:
            return 1.0 / x
        return 1.0 / math.sqrt(x)
    if op == FLG2_APPROX:
        if x == 0.0:
            return -math.inf
        return np.log2(x) if x > 0.0 else math.nan
    if op == FTANH_APPROX:
        return math.tanh(x)
    if not abs(x) < math.inf:
        return math.nan
    return math.sin(x) if op == FSIN_APPROX else math.cos(x)


@compiled
def _select(op, ty, flags, a, b):
    """FMIN, FMAX, FABS, FNEG, FCOPYSIGN: choices of bits, without rounding."""
    row = ty - F16
    sign = SIGN[row]
    if op == FNEG:
        return a ^ sign
    if op == FABS:
        return a & ~sign
    if op == FCOPYSIGN:
        return (a & sign) | (b & ~sign)
    x, y = float_value(a, ty), float_value(b, ty)
    if x != x or y != y:
        if (flags & NAN) != 0 or (x != x and y != y):
            return CANONICAL_NAN[row]
        return b if x != x else a
    if x == y:  # alike but for the signs of zeros
        return a | b if op == FMIN else a & b
    return a if (x < y) == (op == FMIN) else b


@compiled
def _step(value, up):
    """The float64 next to a finite ``value``."""
    bits = f64_bits(value)
    if value == 0.0:
        return f64_value(U1 if up else U1 | _SIGN_F64)
    return f64_value(bits + U1 if (value > 0.0) == up else bits - U1)


@compiled
def _direct(value, error, rounding):
    """A float64 result to nearest, moved for a directed rounding by the sign of ``exact - value``."""
    if abs(value) == math.inf:  # an overflow: the operands are finite
        if overflows_to_infinity(rounding, value < 0.0):
            return value
        return math.copysign(f64_value(INFINITY_F64 - U1), value)
    negative = value < 0.0 or (value == 0.0 and error < 0.0)
    if error > 0.0 and (rounding == RP or (rounding == RZ and negative)):
        return _step(value, True) if value != 0.0 or rounding == RP else value
    if error < 0.0 and (rounding == RM or (rounding == RZ and not negative)):
        return _step(value, False)
    return value


@compiled
def _product_error(x, y, z):
    """A number of the sign of ``x * y - z`` for ``z`` near ``x * y``, of finite numbers; right in the subnormals too."""
    if abs(z) < 2.0**-900:
        if z == 0.0:
            zero = x == 0.0 or y == 0.0
            return 0.0 if zero else math.copysign(1.0, x) * math.copysign(1.0, y)
        z *= 2.0**1000
        if abs(x) < abs(y):
            x *= 2.0**1000
        else:
            y *= 2.0**1000
    return fused(x, y, -z)


@compiled
def _power_of_two(exponent):
    return f64_value(np.uint64(exponent + 1023) << U52)


@compiled
def _unit_and_exponent(x):
    """A finite ``x`` that is not zero as a number of magnitude in [1, 2), and the power of two that was taken out."""
    exponent = np.int64(0)
    if abs(x) < 2.0**-1022:
        x *= 2.0**54
        exponent = np.int64(-54)
    bits = f64_bits(x)
    exponent += np.int64((bits & INFINITY_F64) >> U52) - 1023
    return f64_value((bits & ~INFINITY_F64) | (np.uint64(1023) << U52)), exponent


@compiled
def _fused_error(x, y, z, value):
    """A number of the sign of ``x * y + z - value``, for x and y that are not zero and ``value`` the nearest to the sum.

    All is scaled so that x and y are near 1; then the four exact parts are added up without loss (Shewchuk).
    """
    x, x_exponent = _unit_and_exponent(x)
    y, y_exponent = _unit_and_exponent(y)
    scale = x_exponent + y_exponent
    if z != 0.0:
        z, exponent = _unit_and_exponent(z)
        if exponent - scale > 150:  # value is z
            return x * y
        z *= _power_of_two(max(exponent - scale, np.int64(-200)))  # below the last bit of x * y only its sign matters
    if value != 0.0:
        value, exponent = _unit_and_exponent(value)
        value *= _power_of_two(exponent - scale)
    product = x * y
    low = fused(x, y, -product)
    error0 = low
    middle = product + z
    error1 = _sum_error(product, z, middle)
    # expansion (error0, error1) grown by middle, then by -value; its last component that is not zero has the sign
    head = error0 + error1
    part0 = _sum_error(error0, error1, head)
    total = part0 + middle
    e0 = _sum_error(part0, middle, total)
    top = head + total
    e1 = _sum_error(head, total, top)
    total = e0 - value
    f0 = _sum_error(e0, -value, total)
    total1 = e1 + total
    f1 = _sum_error(e1, total, total1)
    total2 = top + total1
    f2 = _sum_error(top, total1, total2)
    if total2 != 0.0:
        return total2
    if f2 != 0.0:
        return f2
    return f1 if f1 != 0.0 else f0


@compiled
def _f64_exact(op, rounding, x, y, z):
    if op == FRCP:
        x, y = 1.0, x
    elif op == FSUB:
        y = -y
    if op <= FSUB:
        value = x + y
    elif op == FMUL:
        value = x * y
    elif op == FFMA:
        value = fused(x, y, z)
    elif op == FSQRT:
        value = math.sqrt(x)
    else:
        value = x / y
    if rounding == RN or not abs(x) < math.inf or value != value:
        return value
    if op == FSQRT:
        if x < 2.0**-900:
            return _direct(value, -_product_error(value * 2.0**100, value * 2.0**100, x * 2.0**200), rounding)
        return _direct(value, -_product_error(value, value, x), rounding)
    if not abs(y) < math.inf:
        return value
    if op <= FSUB:
        if value == 0.0:
            return _sum_to_odd(x, y, rounding)
        return _direct(value, _sum_error(x, y, value), rounding)
    if op == FMUL:
        return _direct(value, _product_error(x, y, value), rounding)
    if op == FFMA:
        if not abs(z) < math.inf:
            return value
        if x == 0.0 or y == 0.0:
            return _sum_to_odd(x * y, z, rounding)
        error = _fused_error(x, y, z, value)
        if error == 0.0 and value == 0.0:  # z is minus the product
            return -0.0 if rounding == RM else 0.0
        return _direct(value, error, rounding)
    if y == 0.0:
        return value
    if value == 0.0:
        return _direct(value, x * math.copysign(1.0, y), rounding)
    return _direct(value, -_product_error(value, y, x) * math.copysign(1.0, y), rounding)


@compiled
def _scalar_alu(op, ty, flags, rounding, a, b, c):
    if (flags & FTZ) != 0 and ty != F64:
        a, b, c = flush(a, ty), flush(b, ty), flush(c, ty)
    if op >= FMIN:
        return _select(op, ty, flags, a, b)
    if not is_exact(op):
        value = _approximate(op, float_value(a, ty), float_value(b, ty))
        bits = narrow(value, ty, RN)
    elif ty == F32 and rounding == RN and flags == 0:
        return f32_nearest(op, f32_value(a), f32_value(b), f32_value(c))
    else:
        x, y, z = float_value(a, ty), float_value(b, ty), float_value(c, ty)
        value = _f64_exact(op, rounding, x, y, z) if ty == F64 else _exact(op, rounding, x, y, z)
        bits = narrow(value, ty, rounding)
        if (flags & FTZ) != 0 and is_tiny(value, ty, rounding):
            bits &= SIGN[ty - F16]
    return bits if flags == 0 else finish(bits, ty, flags)


@compiled
def float_alu(op, ty, flags, rounding, a, b, c):
    """One arithmetic operation: bits (uint64) of ``a op b`` (``a * b + c`` for FFMA) in F16, BF16, F32, F64 or a pair.

    ``rounding`` is RN, RZ, RM or RP and matters for FADD to FDIV, FRCP and FSQRT; ``flags`` adds up FTZ, SAT, RELU, NAN.
    FCOPYSIGN puts the sign of ``a`` on ``b``, as PTX does. Unused operands may hold anything.
    """
    if ty != F16X2 and ty != BF16X2:
        return _scalar_alu(op, ty, flags, rounding, a, b, c)
    scalar = F16 if ty == F16X2 else BF16
    result = U0
    for half in range(2):
        shift = np.uint64(16 * half)
        part = _scalar_alu(
            op,
            scalar,
            flags,
            rounding,
            (a >> shift) & _HALF_WORD,
            (b >> shift) & _HALF_WORD,
            (c >> shift) & _HALF_WORD,
        )
        result |= part << shift
    return result


@compiled
def float_compare(comparison, ty, flags, a, b):
    """One comparison of ``setp`` on F16, BF16, F32 or F64."""
    if (flags & FTZ) != 0 and ty != F64:
        a, b = flush(a, ty), flush(b, ty)
    x, y = float_value(a, ty), float_value(b, ty)
    unordered = x != x or y != y
    if comparison == NUM:
        return not unordered
    if comparison == ISNAN:
        return unordered
    if unordered:
        return comparison >= EQU
    if comparison in (EQ, EQU):
        return x == y
    if comparison in (NE, NEU):
        return x != y
    if comparison in (LT, LTU):
        return x < y
    if comparison in (LE, LEU):
        return x <= y
    if comparison in (GT, GTU):
        return x > y
    return x >= y
