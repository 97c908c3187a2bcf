"""Every correctly rounded float operation as a case with its meaning in exact rational numbers; the approximations, too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from elementwise import Case
from exact_floats import BF16, F16, F32, F64, TYPES, Type, choose, compare, operate

_COUNT = {"add": 2, "sub": 2, "mul": 2, "fma": 3, "div": 2, "rcp": 1, "sqrt": 1, "min": 2, "max": 2}
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")


def _operands(count: int) -> str:
    return ", ".join(f"%{letter}" for letter in "abc"[:count])


def _halves(function):
    """The same on the two halves of 32-bit words."""

    def packed(*words):
        low, high = (function(*(word >> shift & 0xFFFF for word in words)) for shift in (0, 16))
        return high << 16 | low

    return packed


def _rounded(op: str, ty: Type, rounding: str, *modifiers: str, kind: str | None = None) -> Case:
    """``op.rounding.modifiers.type``."""
    kind = kind or ty.name
    name = ".".join((op, rounding, *modifiers, kind))

    def oracle(*operands):
        return operate(op, ty, operands, rounding, modifiers)

    count = _COUNT[op]
    # the hardware hands on the payload of a double's NaN
    return Case(
        name, f"{name} %d, {_operands(count)};", (kind,) * count, kind, oracle if kind == ty.name else _halves(oracle),
        nan_bits=ty is not F64,
    )  # fmt: skip


def _chosen(op: str, ty: Type, *modifiers: str, kind: str | None = None) -> Case:
    kind = kind or ty.name
    name = ".".join((op, *modifiers, kind))

    def oracle(a, b):
        return choose(op, ty, a, b, modifiers)

    return Case(
        name, f"{name} %d, %a, %b;", (kind, kind), kind, oracle if kind == ty.name else _halves(oracle),
        nan_bits=ty is not F64,
    )  # fmt: skip


def _signs(ty: Type, kind: str) -> list[Case]:
    """neg and abs: of the bits; what becomes of a NaN is left open by PTX."""
    sign = ty.sign if kind == ty.name else ty.sign | ty.sign << 16
    return [
        Case(f"neg.{kind}", f"neg.{kind} %d, %a;", (kind,), kind, lambda x: x ^ sign, nan_bits=False),
        Case(f"abs.{kind}", f"abs.{kind} %d, %a;", (kind,), kind, lambda x: x & ~sign, nan_bits=False),
    ]


def _exact() -> list[Case]:
    cases = []
    for rounding in ("rn", "rz", "rm", "rp"):
        for op in ("add", "sub", "mul", "fma", "div", "rcp", "sqrt"):
            cases += [_rounded(op, F32, rounding), _rounded(op, F32, rounding, "ftz"), _rounded(op, F64, rounding)]
            if op in ("add", "sub", "mul", "fma"):
                cases += [_rounded(op, F32, rounding, "sat"), _rounded(op, F32, rounding, "ftz", "sat")]
    for kind, ty in (("f16", F16), ("bf16", BF16), ("f16x2", F16), ("bf16x2", BF16)):
        for op in ("add", "sub", "mul", "fma"):
            cases.append(_rounded(op, ty, "rn", kind=kind))
            if ty is F16:
                cases += [_rounded(op, ty, "rn", modifier, kind=kind) for modifier in ("ftz", "sat")]
        cases.append(_rounded("fma", ty, "rn", "relu", kind=kind))
        cases += _signs(ty, kind)
    for op in ("min", "max"):
        cases += [_chosen(op, F32), _chosen(op, F32, "ftz"), _chosen(op, F32, "NaN"), _chosen(op, F64)]
        for kind, ty in (("f16", F16), ("bf16", BF16), ("f16x2", F16), ("bf16x2", BF16)):
            cases += [_chosen(op, ty, kind=kind), _chosen(op, ty, "NaN", kind=kind)]
        cases.append(_chosen(op, F16, "ftz"))
    for ty in (F32, F64):
        cases += _signs(ty, ty.name)
        cases.append(
            Case(f"copysign.{ty.name}", f"copysign.{ty.name} %d, %a, %b;", (ty.name, ty.name), ty.name,
                 lambda a, b, s=ty.sign: (a & s) | (b & (s - 1)), nan_bits=False)
        )  # fmt: skip
    return cases


def _comparisons() -> list[Case]:
    cases = []
    for name in ("f16", "bf16"):  # these have one predicate only
        for comparison in COMPARISONS:
            body = f"{{ .reg .pred %x; setp.{comparison}.{name} %x, %a, %b; selp.u32 %d, 1, 0, %x; }}"
            cases.append(
                Case(f"setp.{comparison}.{name}", body, (name, name), "u32",
                     lambda a, b, c=comparison, t=TYPES[name]: int(compare(c, t, a, b)))
            )  # fmt: skip
    for name in ("f32", "f64"):
        for comparison in COMPARISONS:
            body = (
                f"{{ .reg .pred %x, %y; .reg .b32 %t; setp.{comparison}.{name} %x|%y, %a, %b; selp.u32 %d, 1, 0, %x;"
                " selp.u32 %t, 2, 0, %y; or.b32 %d, %d, %t; }"
            )
            cases.append(
                Case(f"setp.{comparison}.{name}", body, (name, name), "u32",
                     lambda a, b, c=comparison, t=TYPES[name]: 1 if compare(c, t, a, b) else 2)
            )  # fmt: skip
    body = "{ .reg .pred %x; setp.lt.ftz.f32 %x, %a, %b; selp.u32 %d, 1, 0, %x; }"
    cases.append(
        Case("setp.lt.ftz.f32", body, ("f32", "f32"), "u32",
             lambda a, b: int(operate("sub", F32, (a, b), "rn", ("ftz",)) >> 31 and _less_flushed(a, b)))
    )  # fmt: skip
    cases.append(
        Case("set.gtu.u32.f32", "set.gtu.u32.f32 %d, %a, %b;", ("f32", "f32"), "u32",
             lambda a, b: 0xFFFFFFFF if compare("gtu", F32, a, b) else 0)
    )  # fmt: skip
    return cases


def _less_flushed(a: int, b: int) -> bool:
    a, b = (bits & 0x80000000 if bits & 0x7F800000 == 0 else bits for bits in (a, b))
    return compare("lt", F32, a, b)


EXACT, FLOAT_COMPARISONS = _exact(), _comparisons()
CASES = (*EXACT, *FLOAT_COMPARISONS)


@dataclass(frozen=True)
class Approximation:
    """An approximated f32 instruction: its PTX, the true function on float64, the arguments and the bound PTX states.

    low, high: of the arguments' magnitudes. negative: whether there are arguments below zero. ulp, relative, absolute: the
    bound, one of them.
    """

    ptx: str
    function: object
    low: float
    high: float
    negative: bool = True
    ulp: float | None = None
    relative: float | None = None
    absolute: float | None = None

    @property
    def operands(self) -> int:
        return 2 if self.ptx.startswith("div") else 1

    @property
    def case(self) -> Case:
        return Case(self.ptx, f"{self.ptx} %d, {_operands(self.operands)};", ("f32",) * self.operands, "f32", None)

    def arguments(self, rng: np.random.Generator, n: int) -> list[np.ndarray]:
        """Bits of f32 arguments in range, uniform in the exponent; sin and cos: uniform."""

        def one():
            if self.low == 0.0:
                x = rng.uniform(-self.high, self.high, n)
            else:
                x = np.exp2(rng.uniform(math.log2(self.low), math.log2(self.high), n))
                x = np.where(rng.random(n) < 0.5, -x, x) if self.negative else x
            return x.astype(np.float32).view(np.uint32)

        return [one() for _ in range(self.operands)]

    def errors(self, arguments, result) -> dict[str, float]:
        """Largest error against the true function, by measure, and as a share of the bound."""
        with np.errstate(all="ignore"):
            x = [bits.view(np.float32).astype(np.float64) for bits in arguments]
            true = self.function(*x)
            got = result.view(np.float32).astype(np.float64)
            use = np.isfinite(true) & (np.abs(true) >= 2.0**-126) & (np.abs(true) < 2.0**127)
            true, got = true[use], got[use]
            error = np.abs(got - true)
            ulp = np.exp2(np.floor(np.log2(np.abs(true))) - 23)
            found = {"ulp": error / ulp, "relative": error / np.abs(true), "absolute": error}
            scales = {"ulp": ulp, "relative": np.abs(true), "absolute": np.ones_like(true)}
            (largest,) = (getattr(self, name) * scales[name] for name in scales if getattr(self, name) is not None)
            # half a unit for the rounding of the true value is the result's right
            share = float(np.max(error / (largest + ulp / 2)))
        return {**{name: float(np.max(values)) for name, values in found.items()}, "share": share}


#: Bounds: PTX ISA, "Floating Point Instructions", of each instruction.
APPROXIMATIONS = (
    *(
        Approximation(f"{name}.approx{ftz}.f32", *rest, **bound)
        for name, *rest, bound in (
            ("ex2", np.exp2, 2.0**-10, 120.0, {"ulp": 2}),
            ("rcp", lambda x: 1 / x, 2.0**-120, 2.0**120, {"ulp": 1}),
            ("rsqrt", lambda x: 1 / np.sqrt(x), 2.0**-125, 2.0**127, False, {"relative": 2.0**-22.9}),
            ("sqrt", np.sqrt, 2.0**-125, 2.0**127, False, {"relative": 2.0**-23}),
            ("lg2", np.log2, 0.5, 2.0, False, {"absolute": 2.0**-22}),
            ("lg2", np.log2, 2.0, 2.0**127, False, {"relative": 2.0**-22}),
            ("lg2", np.log2, 2.0**-125, 0.5, False, {"relative": 2.0**-22}),
            ("sin", np.sin, 0.0, math.pi, {"absolute": 2.0**-20.5}),
            ("cos", np.cos, 0.0, math.pi, {"absolute": 2.0**-20.5}),
            ("div", np.divide, 2.0**-60, 2.0**60, {"ulp": 2}),
        )
        for ftz in ("", ".ftz")
    ),
    Approximation("tanh.approx.f32", np.tanh, 2.0**-20, 16.0, relative=2.0**-11),
    Approximation("div.full.f32", np.divide, 2.0**-60, 2.0**60, ulp=2),
    Approximation("div.full.ftz.f32", np.divide, 2.0**-60, 2.0**60, ulp=2),
)

#: Instruction -> arguments and results as PTX's tables of special values have them; NaN is the canonical one.
INF, NAN = np.inf, np.nan
SPECIAL_VALUES = {
    "ex2.approx.f32": [(-INF, 0.0), (-200.0, 0.0), (-0.0, 1.0), (0.0, 1.0), (INF, INF), (200.0, INF), (NAN, NAN)],
    "ex2.approx.ftz.f32": [(-126.5, 0.0), (-126.0, 2.0**-126), (1e-40, 1.0)],
    "lg2.approx.f32": [(-INF, NAN), (-1.0, NAN), (-0.0, -INF), (0.0, -INF), (INF, INF), (NAN, NAN), (2.0**-140, -140.0)],
    "lg2.approx.ftz.f32": [(2.0**-140, -INF), (-(2.0**-140), -INF)],
    "rcp.approx.f32": [(-INF, -0.0), (-0.0, -INF), (0.0, INF), (INF, 0.0), (NAN, NAN), (2.0**127, 2.0**-127)],
    "rcp.approx.ftz.f32": [(2.0**-127, INF), (-(2.0**-127), -INF), (2.0**127, 0.0), (-(2.0**127), -0.0)],
    "rsqrt.approx.f32": [(-INF, NAN), (-1.0, NAN), (-0.0, -INF), (0.0, INF), (INF, 0.0), (NAN, NAN), (2.0**-140, 2.0**70)],
    "rsqrt.approx.ftz.f32": [(2.0**-140, INF), (-(2.0**-140), -INF)],
    "sqrt.approx.f32": [(-INF, NAN), (-1.0, NAN), (-0.0, -0.0), (0.0, 0.0), (INF, INF), (NAN, NAN), (2.0**-140, 2.0**-70)],
    "sqrt.approx.ftz.f32": [(2.0**-140, 0.0), (-(2.0**-140), -0.0)],
    "sin.approx.f32": [(-INF, NAN), (-0.0, -0.0), (0.0, 0.0), (INF, NAN), (NAN, NAN)],
    "cos.approx.f32": [(-INF, NAN), (-0.0, 1.0), (0.0, 1.0), (INF, NAN), (NAN, NAN)],
    "tanh.approx.f32": [(-INF, -1.0), (-0.0, -0.0), (0.0, 0.0), (INF, 1.0), (NAN, NAN)],
}
