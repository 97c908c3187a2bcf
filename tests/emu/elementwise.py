"""PTX instructions over whole arrays: cases with an oracle, kernels made of them, inputs that reach the corners."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ptx_inline.emu import Output, emulate
from ptx_inline.toolchain import PtxKernel

#: Bits of each kind of value; a kind says how values are drawn, too.
WIDTHS = {
    "u8": 8, "u16": 16, "u32": 32, "u64": 64, "amount": 32, "selector": 32, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "f16x2": 32, "bf16x2": 32,
}  # fmt: skip
#: Sign, exponent and mantissa bits of the float kinds.
_FLOATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}
CASES_PER_KERNEL = 8


@dataclass(frozen=True)
class Case:
    """Some PTX from ``%a``, ``%b``, ``%c`` (and ``%e``) to ``%d``.

    Attributes:
        name: for messages. body: PTX statements; they may declare registers.
        sources, result: kinds of the operands, in the order a, b, c, e.
        oracle: the same on Python integers (bit patterns).
        nan_bits: whether the hardware's NaN is the one that PTX or the emulator's documentation names.
        target, version: what the PTX needs.
    """

    name: str
    body: str
    sources: tuple[str, ...]
    result: str
    oracle: Callable[..., int]
    nan_bits: bool = True
    target: str = "sm_90a"
    version: str = "8.0"


def storage(kind: str) -> np.dtype:
    return np.dtype(f"u{WIDTHS[kind] // 8}")


def elementwise_kernel(cases: Sequence[Case]) -> PtxKernel:
    """One kernel (n, sources..., a result for each case) that applies all cases, of the same sources, to every element."""
    (sources,) = {case.sources for case in cases}
    kinds = (*sources, *(case.result for case in cases))
    (target,), (version,) = {case.target for case in cases}, {case.version for case in cases}
    register = {8: ".b16", 16: ".b16", 32: ".b32", 64: ".b64"}
    lines = [
        f".version {version}", f".target {target}", ".address_size 64", "",
        ".visible .entry elementwise(.param .u32 n, " + ", ".join(f".param .u64 p{i}" for i in range(len(kinds))) + ")",
        "{", "    .reg .b32 %i, %n, %stride;", "    .reg .pred %done;",
        f"    .reg .b64 %p<{len(kinds)}>, %address, %index;",
    ]  # fmt: skip
    lines += [f"    .reg {register[WIDTHS[kind]]} %{name};" for name, kind in zip("abce", sources, strict=False)]
    lines += [f"    ld.param.u64 %p{i}, [p{i}];" for i in range(len(kinds))]
    lines += [
        "    ld.param.u32 %n, [n];", "    mov.u32 %i, %ctaid.x;", "    mov.u32 %stride, %ntid.x;",
        "    { .reg .b32 %t;", "    mov.u32 %t, %tid.x;", "    mad.lo.u32 %i, %i, %stride, %t;",
        "    mov.u32 %t, %nctaid.x;", "    mul.lo.u32 %stride, %stride, %t;", "    }", "next:",
        "    setp.ge.u32 %done, %i, %n;", "    @%done bra end;", "    cvt.u64.u32 %index, %i;",
    ]  # fmt: skip

    def address(number: int, kind: str) -> str:
        return f"    mad.lo.u64 %address, %index, {WIDTHS[kind] // 8}, %p{number};"

    for number, (name, kind) in enumerate(zip("abce", sources, strict=False)):
        lines += [address(number, kind), f"    ld.global.u{WIDTHS[kind]} %{name}, [%address];"]
    for number, case in enumerate(cases, len(sources)):
        kind = case.result
        lines += [f"    {{ .reg {register[WIDTHS[kind]]} %d;", f"    {case.body}", address(number, kind),
                  f"    st.global.u{WIDTHS[kind]} [%address], %d; }}"]  # fmt: skip
    lines += ["    add.u32 %i, %i, %stride;", "    bra next;", "end:", "    ret;", "}", ""]
    signature = ("u32", *(f"u{WIDTHS[kind]}*" for kind in kinds))
    return PtxKernel("\n".join(lines), signature)


def grouped(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases with the same sources and target together, at most ``CASES_PER_KERNEL`` of them."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.sources, case.target, case.version), []).append(case)
    return [
        group[start : start + CASES_PER_KERNEL]
        for group in groups.values()
        for start in range(0, len(group), CASES_PER_KERNEL)
    ]


def apply_cases(run: Callable, cases: Sequence[Case], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Results of each case by an executor, ``emulated`` or one for a GPU."""
    n = inputs[0].size
    outputs = [Output((n,), storage(case.result)) for case in cases]
    return list(run(elementwise_kernel(cases), (64,), (128,), (n, *inputs, *outputs)))[1 + len(inputs) :]


def emulated(kernel, grid, block, arguments, smem_bytes: int = 0) -> tuple:
    """Executor: the emulator. Arguments as of ``emulate``; returns them as the kernel left them."""
    return emulate(kernel, grid, block, arguments, smem_bytes=smem_bytes).outputs


# inputs


def draw(kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Bit patterns of a kind: edge values, small and large numbers, arbitrary bits."""
    width, dtype = WIDTHS[kind], storage(kind)
    words = rng.integers(0, 2**width, n, dtype=np.uint64 if width == 64 else dtype).astype(dtype)
    if kind in ("f16x2", "bf16x2"):
        halves = draw(kind[:-2], rng, 2 * n)
        return np.ascontiguousarray(halves).view(np.uint32)
    if kind in _FLOATS:
        return _draw_floats(kind, rng, words)
    if kind == "amount":
        edges = np.array([0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 2**31, 2**32 - 1], dtype)
        return np.where(rng.random(n) < 0.6, words % dtype.type(70), rng.choice(edges, n))
    if kind == "selector":
        return words
    edges = [0, 1, 2, 3, 7, 8, 2**width - 1, 2**width - 2, 2 ** (width - 1), 2 ** (width - 1) - 1, 2 ** (width - 1) + 1]
    edges += [int("5" * (width // 4), 16), int("A" * (width // 4), 16), 2 ** (width // 2), 2 ** (width // 2) - 1]
    small = words >> rng.integers(0, width, n, dtype=dtype)
    signed = np.where(rng.random(n) < 0.5, small, (~small).astype(dtype))
    pick = rng.random(n)
    return np.where(pick < 0.25, rng.choice(np.array(edges, dtype), n), np.where(pick < 0.6, signed, words)).astype(dtype)


def _draw_floats(kind: str, rng: np.random.Generator, words: np.ndarray) -> np.ndarray:
    exponent, mantissa = _FLOATS[kind]
    dtype, n = words.dtype, words.size
    infinity, bias = ((1 << exponent) - 1) << mantissa, (1 << (exponent - 1)) - 1
    normal = 1 << mantissa
    one = bias << mantissa
    magnitudes = [0, 1, 2, normal - 1, normal, normal + 1, one - 1, one, one + 1, one + normal // 2]
    magnitudes += [infinity - 2, infinity - 1, infinity, infinity + 1, infinity | (normal // 2), (normal << exponent) - 1]
    sign = 1 << (exponent + mantissa)
    edges = np.array([m | s for m in magnitudes for s in (0, sign)], dtype)
    # numbers of ordinary size, and numbers among the smallest
    spread = min(12, bias - 2)
    field = rng.integers(bias - spread, bias + spread, n).astype(dtype)
    ordinary = (words & dtype.type(sign | (normal - 1))) | (field << dtype.type(mantissa))
    tiny = words & dtype.type(sign | (4 * normal - 1))
    pick = rng.random(n)
    picked = np.where(pick < 0.12, rng.choice(edges, n), np.where(pick < 0.6, ordinary, np.where(pick < 0.7, tiny, words)))
    return picked.astype(dtype)


def inputs_of(sources: Sequence[str], rng: np.random.Generator, n: int) -> list[np.ndarray]:
    """Arrays for the sources; some second operands are near the first, some third ones near minus the product."""
    arrays = [draw(kind, rng, n) for kind in sources]
    if len(sources) > 1 and sources[0] == sources[1]:
        near = rng.random(n) < 0.15
        step = rng.integers(0, 4, n).astype(arrays[0].dtype)
        flip = (rng.integers(0, 2, n).astype(arrays[0].dtype)) << arrays[0].dtype.type(WIDTHS[sources[0]] - 1)
        arrays[1] = np.where(near, (arrays[0] + step) ^ flip, arrays[1])
    if len(sources) == 3 and sources[2] in ("f16", "f32", "f64") and len(set(sources)) == 1:
        near = rng.random(n) < 0.3
        x, y = (array.view(f"f{array.dtype.itemsize}") for array in arrays[:2])
        with np.errstate(all="ignore"):
            product = (-(x * y)).view(arrays[2].dtype)
        arrays[2] = np.where(near, product + rng.integers(0, 3, n).astype(product.dtype), arrays[2])
    return arrays


def check(cases: Sequence[Case], inputs: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> None:
    """Compare results with the oracles, bit for bit; the message shows operands."""
    operands = list(zip(*(array.tolist() for array in inputs), strict=True))
    for case, found in zip(cases, results, strict=True):
        for values, got in zip(operands, found.tolist(), strict=True):
            expected = case.oracle(*values)
            assert got == expected, f"{case.name} of {[hex(x) for x in values]}: {got:#x}, expected {expected:#x}"
