"""Floating point in exact rational numbers: the oracle of the emulator's arithmetic. Slow, and shares nothing with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Type:
    """An IEEE format: mantissa bits, exponent bits, the bits of a NaN result."""

    name: str
    mantissa: int
    exponent: int
    nan: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1


F16 = Type("f16", 10, 5, 0x7FFF)
BF16 = Type("bf16", 7, 8, 0x7FFF)
F32 = Type("f32", 23, 8, 0x7FFFFFFF)
F64 = Type("f64", 52, 11, 0x7FF8000000000000)
TYPES = {found.name: found for found in (F16, BF16, F32, F64)}

#: A number: (negative, magnitude), the magnitude a Fraction, infinity or NaN.
Number = tuple[bool, Fraction | float]
NAN: Number = (False, math.nan)


def is_nan(x: Number) -> bool:
    return x[1] != x[1]


def decode(bits: int, ty: Type) -> Number:
    """The number of a bit pattern."""
    negative, magnitude = bool(bits & ty.sign), bits & (ty.sign - 1)
    if magnitude >= ty.infinity:
        return negative, math.inf if magnitude == ty.infinity else math.nan
    field, fraction = magnitude >> ty.mantissa, magnitude & ((1 << ty.mantissa) - 1)
    significand = fraction | (1 << ty.mantissa) if field else fraction
    return negative, _scaled(significand, max(field, 1) - ty.bias - ty.mantissa)


def _scaled(significand: int, exponent: int) -> Fraction:
    return Fraction(significand << exponent) if exponent >= 0 else Fraction(significand, 1 << -exponent)


def encode(x: Number, ty: Type, rounding: str = "rn") -> int:
    """Bits of a number, rounded once; subnormals are kept."""
    negative, magnitude = x
    if magnitude != magnitude:
        return ty.nan
    sign = ty.sign if negative else 0
    if magnitude == math.inf:
        return sign | ty.infinity
    if magnitude == 0:
        return sign
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if _scaled(1, exponent) > magnitude:
        exponent -= 1
    unit = max(exponent, 1 - ty.bias) - ty.mantissa
    kept, rest = divmod(magnitude / _scaled(1, unit), 1)
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and kept % 2 == 1),
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[rounding]
    code = kept + up + ((unit + ty.mantissa + ty.bias - 1) << ty.mantissa)
    if code >= ty.infinity:
        outward = rounding == "rn" or (rounding == "rp" and not negative) or (rounding == "rm" and negative)
        code = ty.infinity if outward else ty.infinity - 1
    return sign | code


def _signed(x: Number) -> Fraction | float:
    return -x[1] if x[0] else x[1]


def add(x: Number, y: Number, rounding: str = "rn") -> Number:
    """Exact sum; the rounding decides the sign of a zero of unlike addends."""
    if is_nan(x) or is_nan(y) or (x[1] == y[1] == math.inf and x[0] != y[0]):
        return NAN
    if math.inf in (x[1], y[1]):
        return x if x[1] == math.inf else y
    total = _signed(x) + _signed(y)
    if total == 0:
        return (x[0] if x[0] == y[0] else rounding == "rm"), Fraction(0)
    return total < 0, abs(total)


def negate(x: Number) -> Number:
    return not x[0], x[1]


def multiply(x: Number, y: Number) -> Number:
    if is_nan(x) or is_nan(y) or {x[1], y[1]} == {0, math.inf}:
        return NAN
    return x[0] != y[0], math.inf if math.inf in (x[1], y[1]) else x[1] * y[1]


def divide(x: Number, y: Number) -> Number:
    if is_nan(x) or is_nan(y) or (x[1] == y[1] and x[1] in (0, math.inf)):
        return NAN
    negative = x[0] != y[0]
    if x[1] == math.inf or y[1] == 0:
        return negative, math.inf
    return negative, Fraction(0) if y[1] == math.inf else x[1] / y[1]


def root(x: Number) -> Number:
    """Square root to far more bits than any format has, with a last bit that says whether there are more."""
    negative, magnitude = x
    if magnitude == 0 or is_nan(x):
        return x
    if negative:
        return NAN
    if magnitude == math.inf:
        return x
    half = 1400  # bits after the point: the smallest double has 1074
    scaled = (magnitude.numerator << (2 * half)) // magnitude.denominator
    floor = math.isqrt(scaled)
    exact = floor * floor == scaled and (magnitude.numerator << (2 * half)) % magnitude.denominator == 0
    return False, Fraction(2 * floor + (not exact), 1 << (half + 1))


def flush(bits: int, ty: Type) -> int:
    """Subnormals to zeros of their sign."""
    return bits & ty.sign if (bits & (ty.sign - 1)) >> ty.mantissa == 0 else bits


def is_tiny(x: Number, ty: Type, rounding: str) -> bool:
    """Whether a number, rounded to the format's precision with any exponent, is below the smallest normal number."""
    if is_nan(x):
        return False
    unbounded = Type(ty.name, ty.mantissa, 16, 0)  # ample: exponents to -32766
    rounded = decode(encode(x, unbounded, rounding), unbounded)[1]
    return rounded < _scaled(1, 1 - ty.bias)


def clamp(bits: int, ty: Type) -> int:
    """``.sat``: into [0, 1], NaN to 0."""
    x = decode(bits, ty)
    if is_nan(x) or x[0] or x[1] == 0:
        return 0
    return bits if x[1] < 1 else encode((False, Fraction(1)), ty)


def operate(op: str, ty: Type, operands: tuple[int, ...], rounding: str = "rn", modifiers: tuple[str, ...] = ()) -> int:
    """Bits of one PTX operation: add, sub, mul, fma, div, rcp, sqrt with .ftz, .sat, .relu."""
    if "ftz" in modifiers:
        operands = tuple(flush(bits, ty) for bits in operands)
    x = [decode(bits, ty) for bits in operands]
    if op == "add":
        exact = add(x[0], x[1], rounding)
    elif op == "sub":
        exact = add(x[0], negate(x[1]), rounding)
    elif op == "mul":
        exact = multiply(x[0], x[1])
    elif op == "fma":
        exact = add(multiply(x[0], x[1]), x[2], rounding)
    elif op == "div":
        exact = divide(x[0], x[1])
    elif op == "rcp":
        exact = divide((False, Fraction(1)), x[0])
    else:
        exact = root(x[0])
    bits = encode(exact, ty, rounding)
    if "ftz" in modifiers and is_tiny(exact, ty, rounding):
        bits &= ty.sign
    if "relu" in modifiers and bits != ty.nan and bits & ty.sign:
        bits = 0
    if "sat" in modifiers:
        bits = clamp(bits, ty)
    return bits


def choose(op: str, ty: Type, a: int, b: int, modifiers: tuple[str, ...] = ()) -> int:
    """Bits of min or max with .NaN, .ftz: a NaN loses to a number unless .NaN; -0 is below +0."""
    if "ftz" in modifiers:
        a, b = flush(a, ty), flush(b, ty)
    x, y = decode(a, ty), decode(b, ty)
    if is_nan(x) or is_nan(y):
        if "NaN" in modifiers or (is_nan(x) and is_nan(y)):
            return ty.nan
        return b if is_nan(x) else a
    # negative numbers order backwards; -0 comes just before +0
    below = ((-x[1], not x[0]) if x[0] else (x[1], not x[0])) < ((-y[1], not y[0]) if y[0] else (y[1], not y[0]))
    return a if below == (op == "min") else b


def compare(comparison: str, ty: Type, a: int, b: int) -> bool:
    """One comparison of setp."""
    x, y = decode(a, ty), decode(b, ty)
    unordered = is_nan(x) or is_nan(y)
    if comparison in ("num", "nan"):
        return unordered == (comparison == "nan")
    if unordered:
        return comparison.endswith("u")
    x, y = _signed(x), _signed(y)
    name = comparison.removesuffix("u")
    return {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[name]


def to_integral(x: Fraction, rounding: str) -> int:
    """``rni``, ``rzi``, ``rmi``, ``rpi``."""
    return {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[rounding](x)
