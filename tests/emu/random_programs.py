"""Random straight-line programs, their PTX, and what they compute by an oracle in Python integers and rational numbers.

A program is a list of steps; each takes registers of three pools, u32 (r), u64 (d) and f32 (f), and f16x2 words (h), and
overwrites one. The steps are the cases of the catalogues, so the oracle of a program is that of its cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from conversion_cases import CASES as CONVERSIONS
from elementwise import Case, draw
from float_cases import CASES as FLOATS
from hypothesis import strategies as st
from integer_cases import CASES as INTEGERS

from ptx_inline.toolchain import PtxKernel

#: Pool -> its PTX register type, registers, and the kind of its values.
POOLS = {"r": (".b32", 6, "u32"), "d": (".b64", 4, "u64"), "f": (".b32", 5, "f32"), "h": (".b32", 3, "f16x2")}
_POOL_OF = {"u32": "r", "amount": "r", "selector": "r", "u64": "d", "f32": "f", "f16x2": "h"}
#: Cases whose operands and result live in the pools, for sm_90a; results whose NaN is not settled are left out.
STEPS = tuple(
    case
    for case in (*INTEGERS, *FLOATS, *CONVERSIONS)
    if {*case.sources, case.result} <= set(_POOL_OF) and case.nan_bits and case.target == "sm_90a"
)
MOVES = (
    Case("mov r to f", "mov.b32 %d, %a;", ("u32",), "f32", lambda x: x),
    Case("mov f to r", "mov.b32 %d, %a;", ("f32",), "u32", lambda x: x),
    Case("mov r to h", "mov.b32 %d, %a;", ("u32",), "f16x2", lambda x: x),
    Case("mov h to r", "mov.b32 %d, %a;", ("f16x2",), "u32", lambda x: x),
)
#: How many registers of all pools each thread loads first and stores last.
REGISTERS = sum(count for _, count, _ in POOLS.values())


@dataclass(frozen=True)
class Step:
    """One case with the numbers of its registers, the result's last."""

    case: Case
    registers: tuple[int, ...]

    def __repr__(self) -> str:
        """For hypothesis's report: the instruction as PTX."""
        return self.ptx()

    def ptx(self) -> str:
        kinds = (*self.case.sources, self.case.result)
        names = [f"%{_POOL_OF[kind]}{number}" for kind, number in zip(kinds, self.registers, strict=True)]
        body = self.case.body
        for letter, name in zip("abce", names[:-1], strict=False):
            body = body.replace(f"%{letter}", f"@{name[1:]}")
        # some bodies write their result before they have read all operands: give it a register of its own
        width = POOLS[_POOL_OF[self.case.result]][0]
        body = body.replace("%d", "%result").replace("@", "%")
        return f"{{ .reg {width} %result; {body} mov{width} {names[-1]}, %result; }}"


def steps() -> st.SearchStrategy[Step]:
    """Any case, moves between the pools a little more often, with any registers."""

    def of(case: Case):
        limits = [POOLS[_POOL_OF[kind]][1] for kind in (*case.sources, case.result)]
        return st.tuples(*(st.integers(0, limit - 1) for limit in limits)).map(lambda chosen: Step(case, chosen))

    return st.one_of(st.sampled_from(STEPS), st.sampled_from(STEPS), st.sampled_from(MOVES)).flatmap(of)


def programs(longest: int = 24) -> st.SearchStrategy[list[Step]]:
    """Programs of 1 to ``longest`` steps."""
    return st.lists(steps(), min_size=1, max_size=longest)


def inputs(seed: int, threads: int) -> np.ndarray:
    """First content of the registers, uint64 (REGISTERS, threads)."""
    rng = np.random.default_rng(seed)
    rows = [draw(kind, rng, threads) for _, count, kind in POOLS.values() for _ in range(count)]
    return np.stack([row.astype(np.uint64) for row in rows])


def kernel(program: list[Step], threads: int) -> PtxKernel:
    """Kernel (inputs, outputs), uint64 (REGISTERS, threads) each; thread i has column i."""
    lines = [".version 8.6", ".target sm_90a", ".address_size 64", ""]
    lines += [".visible .entry program(.param .u64 p, .param .u64 o)", "{", ".reg .b64 %p, %o, %i; .reg .b32 %t, %u;"]
    lines += [f".reg {width} %{pool}<{count}>;" for pool, (width, count, _) in POOLS.items()]
    lines += ["ld.param.u64 %p, [p];", "ld.param.u64 %o, [o];", "mov.u32 %t, %ctaid.x;", "mov.u32 %u, %ntid.x;"]
    lines += ["mul.lo.u32 %t, %t, %u;", "mov.u32 %u, %tid.x;", "add.u32 %t, %t, %u;", "mul.wide.u32 %i, %t, 8;"]
    lines += ["add.u64 %p, %p, %i;", "add.u64 %o, %o, %i;"]
    names = [(f"%{pool}{i}", width) for pool, (width, count, _) in POOLS.items() for i in range(count)]
    for row, (name, width) in enumerate(names):
        lines.append(f"ld.global{width} {name}, [%p+{8 * threads * row}];")
    lines += [step.ptx() for step in program]
    for row, (name, width) in enumerate(names):
        if width == ".b32":
            lines.append(f"cvt.u64.u32 %i, {name}; st.global.b64 [%o+{8 * threads * row}], %i;")
        else:
            lines.append(f"st.global.b64 [%o+{8 * threads * row}], {name};")
    return PtxKernel("\n".join([*lines, "ret;", "}", ""]), ("u64*", "u64*"))


def oracle(program: list[Step], content: np.ndarray) -> np.ndarray:
    """What the registers hold at the end."""
    starts, total = {}, 0
    for pool, (_, count, _) in POOLS.items():
        starts[pool] = total
        total += count
    result = np.empty_like(content)
    for thread, registers in enumerate(content.T.tolist()):
        for step in program:
            kinds = (*step.case.sources, step.case.result)
            *sources, target = (
                starts[_POOL_OF[kind]] + number for kind, number in zip(kinds, step.registers, strict=True)
            )
            registers[target] = step.case.oracle(*(registers[source] for source in sources))
        result[:, thread] = registers
    return result
