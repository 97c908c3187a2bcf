"""What a run executed: instructions by class, lanes in use, bank conflicts and coalescing of every memory access."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ptx_inline.emu import encoding as enc
from ptx_inline.emu.program import Program
from ptx_inline.emu.simt import state as s

_LABEL = re.compile(r"^[\w$]+:(?!:)\s*")  # before an instruction on the same line


@dataclass(frozen=True)
class ClassCount:
    """Instructions of one class: executed by warps, and by lanes."""

    name: str
    warp_instructions: int
    lane_instructions: int


@dataclass(frozen=True)
class Access:
    """All executions of one memory instruction.

    line, text: of the PTX. requests: times a warp executed it. transactions: shared memory: passes over the banks;
    global memory: 32-byte sectors. ideal: the fewest that the bytes and the width of the access allow.
    """

    line: int
    text: str
    space: str
    requests: int
    transactions: int
    ideal: int

    @property
    def excess(self) -> float:
        """Transactions over the fewest possible; 1.0 is free of bank conflicts, or perfectly coalesced."""
        return self.transactions / self.ideal if self.ideal else 1.0


class Profile:
    """The counts of a run; ``counts`` is int64 (instructions, 5): issued, lanes, requests, transactions, ideal."""

    def __init__(self, program: Program, counts: np.ndarray, ctas: int, seconds: float):
        self.program, self.counts, self.ctas, self.seconds = program, counts, ctas, seconds

    @property
    def warp_instructions(self) -> int:
        """Instructions that warps executed."""
        return int(self.counts[:, s.ISSUED].sum())

    @property
    def lane_instructions(self) -> int:
        """The same, counted a lane: inactive ones and those whose guard was false left out."""
        return int(self.counts[:, s.LANES].sum())

    @property
    def lane_instructions_per_second(self) -> float:
        """How fast the emulator was, all cores together."""
        return self.lane_instructions / self.seconds if self.seconds else 0.0

    def by_class(self) -> list[ClassCount]:
        """Counts a class, most first."""
        found: dict[str, list[int]] = {}
        for row, counts in zip(self.program.code, self.counts, strict=True):
            name = enc.CLASSES.get(int(row[enc.KIND]))
            if name is not None and counts[s.ISSUED]:
                total = found.setdefault(name, [0, 0])
                total[0] += int(counts[s.ISSUED])
                total[1] += int(counts[s.LANES])
        return sorted((ClassCount(name, *total) for name, total in found.items()), key=lambda c: -c.warp_instructions)

    def opcodes(self) -> dict[str, int]:
        """Warp instructions by opcode, most first."""
        found: dict[str, int] = {}
        for row, counts in zip(self.program.code, self.counts, strict=True):
            if row[enc.KIND] != enc.JUMP and counts[s.ISSUED]:
                opcode = _opcode(self.program.text(int(row[enc.LINE])))
                found[opcode] = found.get(opcode, 0) + int(counts[s.ISSUED])
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def accesses(self) -> list[Access]:
        """Every instruction that touched shared or global memory, in the order of the PTX."""
        found = []
        for row, counts in zip(self.program.code, self.counts, strict=True):
            if counts[s.REQUESTS]:
                line = int(row[enc.LINE])
                text = self.program.text(line)
                kind = int(row[enc.KIND])
                in_shared = kind in (enc.LDMATRIX, enc.STMATRIX, enc.CP_ASYNC) or row[enc.SPACE] == enc.SHARED
                space = "shared" if in_shared else enc.SPACES[row[enc.SPACE]]
                found.append(Access(line, text, space, *(int(n) for n in counts[s.REQUESTS :])))
        return sorted(found, key=lambda access: access.line)

    @property
    def bank_conflicts(self) -> int:
        """Passes over the banks of shared memory beyond the fewest possible."""
        return sum(a.transactions - a.ideal for a in self.accesses() if a.space == "shared")

    @property
    def coalescing(self) -> float:
        """Sectors of global memory over the fewest possible; 1.0 without any access."""
        found = [access for access in self.accesses() if access.space != "shared"]
        ideal = sum(access.ideal for access in found)
        return sum(access.transactions for access in found) / ideal if ideal else 1.0

    def __repr__(self) -> str:
        classes = ", ".join(f"{c.warp_instructions} {c.name}" for c in self.by_class())
        return (
            f"Profile(CTAs: {self.ctas}, {self.warp_instructions} warp instructions: {classes}; "
            f"{self.bank_conflicts} bank conflicts, {self.coalescing:.2f} x the fewest sectors)"
        )


def _opcode(text: str) -> str:
    words = _LABEL.sub("", text).split()
    return words[1 if words[0].startswith("@") else 0].rstrip(";")
