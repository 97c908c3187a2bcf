"""Breakpoints, and what can be looked at where a warp has stopped: registers, fragments as matrices, shared memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ptx_inline.emu import encoding as enc
from ptx_inline.emu.faults import cta_coordinates
from ptx_inline.emu.machine import Machine, compiled_core
from ptx_inline.emu.profile import Profile
from ptx_inline.emu.scalar_types import BITS, F16, F32, F64, PRED, SIGNED
from ptx_inline.emu.simt import state as s
from ptx_inline.emu.simt.handle import table
from ptx_inline.isa.arithmetic import code_table
from ptx_inline.isa.fragments import Fragment, fragment
from ptx_inline.isa.instructions import INSTRUCTIONS, Instruction

OPERANDS = ("A", "B", "C", "SFA", "SFB")


@dataclass(frozen=True)
class Breakpoint:
    """Where to stop; everything that is given must hold.

    line: PTX line, from 1. mma: number of the MMA among those that its warp executes, from 0. when: function of the
    :class:`Stop`; alone it is asked before every instruction. cta: (x, y, z). warp: its number in the CTA.
    """

    line: int | None = None
    mma: int | None = None
    when: Callable[[Stop], bool] | None = None
    cta: tuple[int, int, int] | None = None
    warp: int | None = None


class Stop:
    """A warp before an instruction. Values are copies, read when asked for. Once the run has gone on, asking for more
    raises ``RuntimeError``: the registers have changed.

    Attributes:
        line, text: the instruction. cta: (x, y, z). warp: its number. lanes: numbers of the lanes about to execute it,
        guards not yet applied. mma: the MMA's number in its warp, ``None`` for another instruction.
    """

    def __init__(self, machine: Machine, worker: s.Worker, row: int, warp: int, mma: int | None):
        self._machine, self._worker, self._row = machine, worker, row
        self._code = machine.program.code[row]
        self.line = int(self._code[enc.LINE])
        self.text = machine.program.text(self.line)
        self.cta = cta_coordinates(machine.launch, int(worker.control[s.CTA]))
        self.warp = warp
        mask = int(worker.control[s.STOPPED_MASK])
        self.lanes = [lane for lane in range(32) if mask >> lane & 1]
        self.mma = mma
        self._over = False

    def register(self, name: str, warp: int | None = None) -> np.ndarray:
        """A register of all 32 lanes, in the dtype that it is declared with: ``.pred`` bool, ``.s32`` int32, ``.f32``
        float32; ``.b32`` and what NumPy has not got (``.bf16``, ``.f16x2``) as unsigned bits. ``name``: as in the PTX.

        Raises ``KeyError`` for a name that the kernel does not declare, ``ValueError`` for a warp that it has not.
        """
        program = self._machine.program
        if name not in program.registers:
            raise KeyError(f"{name} is no register of {program.name}; the PTX declares {len(program.registers)}")
        found = program.registers[name]
        values = self._values(found.row, self._check_warp(warp))
        if found.type == PRED:
            return values != 0
        size = BITS[found.type] // 8
        kind = "f" if found.type in (F16, F32, F64) else "i" if found.type in SIGNED else "u"
        return values.astype(f"u{size}").view(f"{kind}{size}")

    def registers(self) -> dict[str, np.ndarray]:
        """Every register of the kernel by name."""
        return {name: self.register(name) for name in self._machine.program.registers}

    @property
    def instruction(self) -> Instruction:
        """The MMA's description. Raises ``ValueError`` where the instruction is no MMA."""
        return INSTRUCTIONS[self._mma[0]]

    def fragment(self, operand: str) -> Fragment:
        """The map of an MMA operand, ``"A"``, ``"B"``, ``"C"``, ``"SFA"`` or ``"SFB"``, with the selectors in use."""
        key = self._mma[0]
        if operand not in OPERANDS:
            raise ValueError(f"operand must be one of {', '.join(OPERANDS)}, got {operand!r}")
        if operand in ("SFA", "SFB") and self._code[enc.COUNT]:
            rows = self._rows("SEL" + operand[2])
            byte_id, thread_id = (int(self._values(row, self.warp)[0]) for row in rows)
            return fragment(key, operand, byte_id=byte_id, thread_id=thread_id)
        return fragment(key, operand)

    def operand(self, operand: str) -> np.ndarray:
        """An MMA operand's registers: uint32 (32 lanes, registers)."""
        self.fragment(operand)
        rows = self._rows(operand)
        return np.stack([self._values(row, self.warp).astype(np.uint32) for row in rows], axis=-1)

    def codes(self, operand: str) -> np.ndarray:
        """An MMA operand as a matrix of bit patterns, in the shape of its fragment: codes (in their 8-bit containers for
        the f8f6f4 kinds), scale bytes, or for C the bits of float32."""
        return self.fragment(operand).unpack(self.operand(operand))

    def matrix(self, operand: str) -> np.ndarray:
        """An MMA operand as a matrix of float64 values, scales not applied."""
        codes = self.codes(operand)
        if operand == "C":
            return codes.view(np.float32).astype(np.float64)
        _, a, b, sf = self._mma
        name = {"A": a, "B": b}.get(operand, sf)
        return code_table(name, self.fragment(operand).element_bits)[0][codes]

    def shared(self, offset: int = 0, size: int | None = None) -> np.ndarray:
        """Bytes of the CTA's shared memory; what nobody has written reads 0xCD.

        Raises ``ValueError`` for bytes beyond its end.
        """
        self._check_current()
        total = int(self._machine.launch.numbers[s.SHARED_BYTES])
        end = total if size is None else offset + size
        if not 0 <= offset <= end <= total:
            raise ValueError(f"offset and size must lie in the {total} bytes of shared memory, got {offset}, {size}")
        return self._worker.s8[offset:end].copy()

    def __repr__(self) -> str:
        return f"Stop(line {self.line}: {self.text!r}, CTA {self.cta}, warp {self.warp}, {len(self.lanes)} lanes)"

    @property
    def _mma(self) -> tuple:
        if self._code[enc.KIND] != enc.MMA:
            raise ValueError(f"the warp must stand at an MMA for its operands, got {self.text!r}")
        return self._machine.program.mmas[self._code[enc.OP]]

    def _rows(self, operand: str) -> list[int]:
        """Rows of the register file that hold an operand, or the selectors SELA and SELB."""
        lists, start = self._machine.program.lists, int(self._code[enc.LIST])
        a, b = int(self._code[enc.AUX]), int(self._code[enc.AUX2])
        scales = start + 8 + a + b
        spans = {
            "A": (start + 4, a), "B": (start + 4 + a, b), "C": (start + 4 + a + b, 4), "SFA": (scales, 1),
            "SELA": (scales + 1, 2), "SFB": (scales + 3, 1), "SELB": (scales + 4, 2),
        }  # fmt: skip
        first, count = spans[operand]
        return [int(row) for row in lists[first : first + count]]

    def _check_current(self) -> None:
        if self._over:
            raise RuntimeError(
                f"the run has gone on since {self!r}; read what you need of a stop before asking for the next one"
            )

    def _values(self, row: int, warp: int) -> np.ndarray:
        self._check_current()
        first = (warp * self._machine.program.rows + row) * 32
        return self._worker.regs[first : first + 32].copy()

    def _check_warp(self, warp: int | None) -> int:
        warps = int(self._machine.launch.numbers[s.WARPS])
        if warp is not None and warp not in range(warps):
            raise ValueError(f"warp must be in 0..{warps - 1}, got {warp}")
        return self.warp if warp is None else warp


class Session:
    """A launch run from stop to stop: iterate over it. ``profile`` counts what has been executed so far."""

    def __init__(self, machine: Machine, breakpoints: Sequence[Breakpoint]):
        if not breakpoints:
            raise ValueError("breakpoints must name at least one place to stop, got none")
        self.machine, self.breakpoints = machine, tuple(breakpoints)
        self.worker = s.make_worker(machine.launch)
        self._seconds = 0.0
        code, breaks = machine.program.code, machine.launch.breaks
        mmas = code[:, enc.KIND] == enc.MMA
        for breakpoint in self.breakpoints:
            self._check_place(breakpoint)
            if breakpoint.line is not None:
                at = code[:, enc.LINE] == breakpoint.line
                if not np.any(at):
                    raise ValueError(f"breakpoint line {breakpoint.line} holds no instruction of {machine.program.name}")
                breaks[at & (code[:, enc.KIND] != enc.JUMP)] = 1
            elif breakpoint.mma is not None:
                breaks[mmas] = 1
            else:
                breaks[code[:, enc.KIND] != enc.JUMP] = 1
        if any(breakpoint.mma is not None for breakpoint in self.breakpoints):
            breaks[mmas] = 1

    def _check_place(self, breakpoint: Breakpoint) -> None:
        """Raises ``ValueError`` for a warp or CTA that the launch has not: the breakpoint would never be reached."""
        numbers = self.machine.launch.numbers
        warps, grid = int(numbers[s.WARPS]), tuple(int(size) for size in numbers[s.GRID_X : s.GRID_Z + 1])
        if breakpoint.warp is not None and breakpoint.warp not in range(warps):
            raise ValueError(f"breakpoint warp must be in 0..{warps - 1}, got {breakpoint.warp}")
        if breakpoint.cta is None:
            return
        inside = len(breakpoint.cta) == 3 and all(x in range(size) for x, size in zip(breakpoint.cta, grid, strict=True))
        if not inside:
            raise ValueError(f"breakpoint cta must be (x, y, z) in the grid {grid}, got {breakpoint.cta}")

    @property
    def profile(self) -> Profile:
        """What has been executed so far."""
        return Profile(self.machine.program, self.worker.counts.copy(), self.machine.ctas, self._seconds)

    def __iter__(self) -> Iterator[Stop]:
        run, launch, worker = compiled_core(), table(self.machine.launch), table(self.worker)
        code, control = self.machine.program.code, self.worker.control
        executed: dict[tuple[int, int], int] = {}
        resume = False
        while True:
            start = time.perf_counter()
            status = run(launch, worker, self.machine.ctas, resume)
            self._seconds += time.perf_counter() - start
            resume = True
            if status == s.FAILED:
                raise self.machine.error(self.worker.error)
            if status == s.FINISHED:
                return
            warp = int(control[s.NEXT_WARP])
            lane = int(control[s.STOPPED_MASK] & -control[s.STOPPED_MASK]).bit_length() - 1
            row = int(self.worker.pcs[warp, lane])
            number = None
            if code[row, enc.KIND] == enc.MMA:
                key = (int(control[s.CTA]), warp)
                number = executed.get(key, 0)
                executed[key] = number + 1
            stop = Stop(self.machine, self.worker, row, warp, number)
            if any(_holds(breakpoint, stop) for breakpoint in self.breakpoints):
                yield stop
            stop._over = True


def _holds(breakpoint: Breakpoint, stop: Stop) -> bool:
    return (
        (breakpoint.line is None or breakpoint.line == stop.line)
        and (breakpoint.mma is None or breakpoint.mma == stop.mma)
        and (breakpoint.cta is None or tuple(breakpoint.cta) == stop.cta)
        and (breakpoint.warp is None or breakpoint.warp == stop.warp)
        and (breakpoint.when is None or bool(breakpoint.when(stop)))
    )
