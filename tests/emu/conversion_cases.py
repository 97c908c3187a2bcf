"""Every ``cvt`` as a case with its meaning in Python integers, exact rational numbers, or ml_dtypes."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
from elementwise import WIDTHS, Case
from exact_floats import BF16, F16, F32, F64, NAN, Type, clamp, decode, encode, flush, is_nan, is_tiny, to_integral
from integer_cases import signed

_INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_FLOATS = (F16, BF16, F32, F64)

#: Packed type -> its ml_dtypes element, bits of a half, largest finite number, code of NaN.
SMALL = {
    "e4m3x2": (ml_dtypes.float8_e4m3fn, 8, 448.0, 0x7F),
    "e5m2x2": (ml_dtypes.float8_e5m2, 8, 57344.0, 0x7F),
    "e2m3x2": (ml_dtypes.float6_e2m3fn, 8, 7.5, 0x1F),
    "e3m2x2": (ml_dtypes.float6_e3m2fn, 8, 28.0, 0x1F),
    "e2m1x2": (ml_dtypes.float4_e2m1fn, 4, 6.0, 0x7),
}
_MODULE = {"e4m3x2": ("sm_90a", "8.1"), "e5m2x2": ("sm_90a", "8.1")}


def _value(bits: int, ty: str) -> int:
    return signed(bits, int(ty[1:])) if ty[0] == "s" else bits


def _saturate(x: int, ty: str) -> int:
    width = int(ty[1:])
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if ty[0] == "s" else (0, (1 << width) - 1)
    return max(low, min(x, high))


def _stored(ty: str) -> str:
    """The kind that a result of an integer type is stored as: 8 bits come back in a 16-bit register, extended."""
    return "u16" if ty[1:] == "8" else f"u{ty[1:]}"


def _integers() -> list[Case]:
    cases = []
    for src in _INTEGERS:
        for dst in _INTEGERS:
            extremes = [_saturate(x, src) for x in (-(1 << 64), 1 << 64)]
            holds_all = all(_saturate(x, dst) == x for x in extremes)
            for sat in ("",) if holds_all else ("", ".sat"):  # .sat where it can do nothing is no PTX
                stored = _stored(dst)
                mask = (1 << WIDTHS[stored]) - 1

                def oracle(bits, src=src, dst=dst, sat=sat, mask=mask):
                    x = _value(bits, src)
                    x = _saturate(x, dst) if sat else _value(x & ((1 << int(dst[1:])) - 1), dst)
                    return x & mask

                name = f"cvt{sat}.{dst}.{src}"
                cases.append(Case(name, f"{name} %d, %a;", (f"u{src[1:]}",), stored, oracle))
    return cases


def _integers_and_floats() -> list[Case]:
    cases = []
    for ty in _FLOATS:
        for integer in _INTEGERS:
            if ty is BF16 and integer[1:] == "8":
                continue  # no such PTX
            for rounding in ("rn", "rz", "rm", "rp"):
                if ty is BF16 and rounding != "rn":
                    continue

                def to_float(bits, ty=ty, integer=integer, rounding=rounding):
                    x = _value(bits, integer)
                    return encode((x < 0, Fraction(abs(x))), ty, rounding)

                name = f"cvt.{rounding}.{ty.name}.{integer}"
                version = "8.6" if ty is BF16 else "8.0"
                cases.append(Case(name, f"{name} %d, %a;", (f"u{integer[1:]}",), ty.name, to_float, version=version))
            for rounding in ("rni", "rzi", "rmi", "rpi"):
                for ftz in ("", ".ftz") if ty is F32 else ("",):
                    stored = _stored(integer)

                    def to_integer(bits, ty=ty, integer=integer, rounding=rounding, ftz=ftz, stored=stored):
                        negative, magnitude = decode(flush(bits, ty) if ftz else bits, ty)
                        width = int(integer[1:])
                        if magnitude != magnitude:
                            x = _value(1 << width - 1, integer) if ty is F64 or width == 64 else 0
                        elif magnitude == math.inf:
                            x = -(1 << 80) if negative else 1 << 80
                        else:
                            x = to_integral(-magnitude if negative else magnitude, rounding)
                        return _saturate(x, integer) & ((1 << WIDTHS[stored]) - 1)

                    name = f"cvt.{rounding}{ftz}.{integer}.{ty.name}"
                    version = "8.6" if ty is BF16 else "8.0"
                    cases.append(Case(name, f"{name} %d, %a;", (ty.name,), stored, to_integer, version=version))
    return cases


def _floats() -> list[Case]:
    cases = []
    for src in _FLOATS:
        for dst in _FLOATS:
            if src is dst or {src, dst} == {F16, BF16}:
                continue
            widens = dst.bits > src.bits
            roundings = ("",) if widens else ("rn", "rz") if dst is BF16 else ("rn", "rz", "rm", "rp")
            if BF16 in (src, dst) and F64 in (src, dst):
                roundings = ("",) if widens else ("rn",)
            for rounding in roundings:
                for modifiers in _modifiers(src, dst, rounding):

                    def oracle(bits, src=src, dst=dst, rounding=rounding or "rn", modifiers=modifiers):
                        if "ftz" in modifiers and src is F32 and dst is not F16:
                            bits = flush(bits, F32)
                        exact = decode(bits, src)
                        if is_nan(exact) and not {"sat", "relu"} & {*modifiers}:
                            return _carried_nan(bits, src, dst)
                        result = encode(exact, dst, rounding)
                        if "relu" in modifiers and result != dst.nan and result & dst.sign:
                            result = 0
                        if "sat" in modifiers:
                            result = clamp(result, dst)
                        if "ftz" in modifiers and dst is F32 and is_tiny(exact, F32, rounding):
                            result &= F32.sign
                        return result

                    name = ".".join(filter(None, ("cvt", rounding, *modifiers, dst.name, src.name)))
                    version = "8.6" if BF16 in (src, dst) else "8.0"
                    cases.append(
                        Case(name, f"{name} %d, %a;", (src.name,), dst.name, oracle, nan_bits=dst is not F64,
                             version=version)
                    )  # fmt: skip
    for ty in (F16, F32, F64):
        for rounding in ("rni", "rzi", "rmi", "rpi"):

            def integral(bits, ty=ty, rounding=rounding):
                negative, magnitude = decode(bits, ty)
                if magnitude in (math.inf, 0) or magnitude != magnitude:
                    return encode((negative, magnitude), ty)
                return encode((negative, Fraction(abs(to_integral(-magnitude if negative else magnitude, rounding)))), ty)

            name = f"cvt.{rounding}.{ty.name}.{ty.name}"
            cases.append(Case(name, f"{name} %d, %a;", (ty.name,), ty.name, integral, nan_bits=ty is not F64))
    return cases


def _carried_nan(bits: int, src: Type, dst: Type) -> int:
    """A NaN of another width: an H100 keeps sign and upper bits from F64 down and from BF16 to F32; else canonical."""
    if src is BF16 and dst is F32:
        return bits << 16
    if src is not F64:
        return dst.nan
    sign = dst.sign if bits & src.sign else 0
    fraction = (bits & (1 << src.mantissa) - 1) >> (src.mantissa - dst.mantissa)
    return sign | dst.infinity | 1 << (dst.mantissa - 1) | fraction


def _modifiers(src, dst, rounding):
    yield ()
    if F64 not in (src, dst) and BF16 not in (src, dst):
        yield ("ftz",)
        yield ("sat",)
    if (src, dst) == (F64, F32):
        yield ("ftz",)
        yield ("sat",)
    if src is F32 and dst in (F16, BF16) and rounding in ("rn", "rz"):
        yield ("relu",)


def small_code(bits: int, src, name: str, relu: bool = False) -> int:
    """A float's code in the element type of a pair, saturated, by ml_dtypes."""
    dtype, _, largest, nan = SMALL[name]
    negative, magnitude = decode(bits, src)
    if magnitude != magnitude:
        return nan
    value = np.float32(largest if magnitude > largest else magnitude)
    if relu and negative:
        return 0
    code = int(np.array(-value if negative else value).astype(dtype).view(np.uint8))
    return code & ((1 << {"e2m1x2": 4, "e2m3x2": 6, "e3m2x2": 6}.get(name, 8)) - 1)


def _packed() -> list[Case]:
    cases = []
    for name, ty in (("f16x2", F16), ("bf16x2", BF16)):
        for rounding in ("rn", "rz"):
            for relu in ("", ".relu"):

                def pair(a, b, ty=ty, rounding=rounding, relu=relu):
                    high, low = (encode(decode(bits, F32), ty, rounding) for bits in (a, b))
                    if relu:
                        high, low = (0 if bits != ty.nan and bits & ty.sign else bits for bits in (high, low))
                    return high << 16 | low

                full = f"cvt.{rounding}{relu}.{name}.f32"
                cases.append(Case(full, f"{full} %d, %a, %b;", ("f32", "f32"), name, pair))
    for name, (_, width, _, _) in SMALL.items():
        target, version = _MODULE.get(name, ("sm_120a", "8.7"))
        for relu in ("", ".relu"):

            def pack(a, b, name=name, width=width, relu=bool(relu)):
                return small_code(a, F32, name, relu) << width | small_code(b, F32, name, relu)

            full = f"cvt.rn.satfinite{relu}.{name}.f32"
            body = f"{full} %d, %a, %b;"
            if width == 4:
                body = f"{{ .reg .b8 %t; {full} %t, %a, %b; cvt.u16.u8 %d, %t; }}"
            cases.append(Case(full, body, ("f32", "f32"), "u16", pack, target=target, version=version))

        def unpack(bits, name=name, width=width):
            element = (1 << {"e2m1x2": 4, "e2m3x2": 6, "e3m2x2": 6}.get(name, 8)) - 1
            return sum(_small_to_f16(bits >> width * half & element, name) << 16 * half for half in (0, 1))

        full = f"cvt.rn.f16x2.{name}"
        body = f"{full} %d, %a;"
        if width == 4:
            body = f"{{ .reg .b8 %t; cvt.u8.u16 %t, %a; {full} %d, %t; }}"
        cases.append(Case(full, body, ("u16",), "f16x2", unpack, target=target, version=version))
        if name in _MODULE:

            def narrow(bits, name=name):
                return small_code(bits >> 16, F16, name) << 8 | small_code(bits & 0xFFFF, F16, name)

            full = f"cvt.rn.satfinite.{name}.f16x2"
            cases.append(Case(full, f"{full} %d, %a;", ("f16x2",), "u16", narrow, target=target, version=version))
    for rounding in ("rz", "rp"):
        full = f"cvt.{rounding}.satfinite.ue8m0x2.f32"

        def scales(a, b, rounding=rounding):
            return _ue8m0(decode(a, F32)[1], rounding) << 8 | _ue8m0(decode(b, F32)[1], rounding)

        cases.append(Case(full, f"{full} %d, %a, %b;", ("f32", "f32"), "u16", scales, target="sm_120a", version="8.7"))
        full = f"cvt.{rounding}.satfinite.ue8m0x2.bf16x2"

        def narrow_scales(bits, rounding=rounding):
            high, low = (_ue8m0(decode(x, BF16)[1], rounding) for x in (bits >> 16, bits & 0xFFFF))
            return high << 8 | low

        cases.append(Case(full, f"{full} %d, %a;", ("bf16x2",), "u16", narrow_scales, target="sm_120a", version="8.7"))

    def widen_scales(bits):
        return sum(_ue8m0_to_bf16(bits >> 8 * half & 255) << 16 * half for half in (0, 1))

    cases.append(Case("cvt.rn.bf16x2.ue8m0x2", "cvt.rn.bf16x2.ue8m0x2 %d, %a;", ("u16",), "bf16x2", widen_scales,
                      target="sm_120a", version="8.7"))  # fmt: skip
    return cases


@functools.cache
def _small_to_f16(code: int, name: str) -> int:
    dtype, *_ = SMALL[name]
    x = float(np.array(code, np.uint8).view(dtype).astype(np.float32))
    number = NAN if x != x else (math.copysign(1, x) < 0, math.inf if math.isinf(x) else Fraction(abs(x)))
    return encode(number, F16)


@functools.cache
def _ue8m0_to_bf16(code: int) -> int:
    x = np.array(code, np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return encode(decode(int(x.view(np.uint32)), F32), BF16)


def _ue8m0(magnitude, rounding: str) -> int:
    if magnitude != magnitude:
        return 0xFF
    if magnitude == math.inf:
        return 0xFE
    if magnitude <= Fraction(1, 1 << 127):
        return 0
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    return min(exponent + 127 + (rounding == "rp" and Fraction(2) ** exponent != magnitude), 0xFE)


INTEGERS, INTEGERS_AND_FLOATS, FLOATS, PACKED = _integers(), _integers_and_floats(), _floats(), _packed()
CASES = (*INTEGERS, *INTEGERS_AND_FLOATS, *FLOATS, *PACKED)
