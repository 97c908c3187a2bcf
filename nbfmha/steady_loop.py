"""The loop of a kernel's machine code that its MMAs stand in: how many other instructions an MMA costs there. A leaf."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LABEL = re.compile(r"\s*(\.L_\w+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")
"""Of a line of SASS: predicate, opcode, operands."""
_CONDITION = re.compile(r"\s*!?U?P\d")
_MMA = ("OMMA", "QMMA", "HMMA", "HGMMA")
#: A part of the loop with one of these is run in every round; a part without one may be skipped by the branch before it.
_NEEDED = (*_MMA, "LDGSTS", "LDSM", "BAR", "LDGDEPBAR")


@dataclass(frozen=True)
class SteadyLoop:
    """One round of the innermost loop with the most of a kernel's best MMA (OMMA before QMMA before HMMA).

    mma           MMAs in it
    instructions  all instructions on its steady path: parts that a branch skips are left out where they hold no MMA, load
                  or barrier (masking of an edge, rescaling where a row maximum grew)
    whole         all instructions of the loop, those parts too
    longest_span  most instructions in a row on the steady path without an MMA, round the back edge too
    """

    mma: int
    instructions: int
    whole: int
    longest_span: int

    @property
    def others_per_mma(self) -> float:
        """Instructions that are no MMA for each that is, on the steady path."""
        return (self.instructions - self.mma) / self.mma


def steady_loop(sass: str) -> SteadyLoop | None:
    """The steady loop of a disassembly by nvdisasm; None where no loop holds an MMA."""
    instructions, labels = _parse(sass)
    loops: dict[range, list[int]] = {}
    for at, (opcode, rest, _) in enumerate(instructions):
        target = labels.get(_target(rest)) if opcode.startswith("BRA") else None
        if target is not None and target <= at:
            body = range(target, at + 1)
            counts = [sum(instructions[i][0].startswith(kind) for i in body) for kind in _MMA]
            if any(counts):
                loops[body] = counts
    inner = [loop for loop in loops if not any(other != loop and _within(other, loop) for other in loops)]
    if not inner:
        return None
    body = max(inner, key=lambda loop: (loops[loop], len(loop)))
    path = [instructions[i][0] for i in _steady_path(instructions, labels, body)]
    places = [i for i, opcode in enumerate(path) if opcode.startswith(_MMA)]
    gaps = [after - before - 1 for before, after in zip(places, [*places[1:], places[0] + len(path)], strict=True)]
    return SteadyLoop(len(places), len(path), len(body), max(gaps))


def _within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def _parse(sass: str) -> tuple[list[tuple[str, str, bool]], dict[str, int]]:
    """(opcode, operands, whether conditional) of each instruction, and the index that each label stands before.

    A predicate stands before the opcode or, of a branch, as its first operand: ``@P0 BRA``, ``BRA.U !UP0``.
    """
    instructions: list[tuple[str, str, bool]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        found = INSTRUCTION.search(line)
        if found:
            instructions.append((found[2], found[3], found[1] is not None or _CONDITION.match(found[3]) is not None))
    return instructions, labels


def _target(operands: str) -> str | None:
    found = re.search(r"(\.L_\w+)", operands)
    return found[1] if found else None


def _steady_path(instructions, labels, body: range):
    """Indices of the loop's instructions in order, without the parts that a conditional branch may skip."""
    at = body.start
    while at < body.stop:
        yield at
        opcode, rest, conditional = instructions[at]
        target = labels.get(_target(rest)) if opcode.startswith("BRA") else None
        if target is not None and at < target < body.stop:
            skipped = instructions[at + 1 : target]
            if not conditional or not any(name.startswith(_NEEDED) for name, _, _ in skipped):
                at = target
                continue
        at += 1
