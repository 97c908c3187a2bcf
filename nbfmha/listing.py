"""What ``nbfmha sass`` and ``nbfmha ptx`` show of a kernel."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Listing:
    """Text of one kernel for one target, and the counts of its instructions.

    name: of the kernel; text: SASS or PTX; opcodes: full opcode -> count; mma: how many of them are matrix
    instructions.
    """

    name: str
    text: str
    opcodes: dict[str, int]
    mma: int


def sass(kernel, target: str) -> Listing:
    """Disassembly of a kernel's machine code."""
    from ptx_inline.toolchain import instruction_mix

    text = kernel.sass(target)
    mix = instruction_mix(text)
    return Listing(kernel.name, text, mix.opcodes, mix.mma)


def ptx(kernel, target: str) -> Listing:
    """Final PTX of a kernel, every snippet inlined."""
    text = kernel.ptx(target)
    opcodes = ptx_opcodes(text)
    mma = sum(count for opcode, count in opcodes.items() if opcode.startswith(("mma.", "wgmma.mma")))
    return Listing(kernel.name, text, opcodes, mma)


def ptx_opcodes(text: str) -> dict[str, int]:
    """Instructions of a PTX text by full opcode, most frequent first; no directives, labels or comments."""
    without_comments = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    found = Counter()
    for statement in re.split(r"[;{}]", without_comments):
        # a statement may stand behind labels, and an instruction behind a predicate
        words = re.sub(r"^(?:\s*[\w$]+:)*\s*(?:@!?%\w+\s+)?", "", statement).split()
        if words and re.fullmatch(r"[a-z][a-z0-9_]*(?:[.:]+\w+)*", words[0]) and not words[0].startswith("."):
            found[words[0]] += 1
    return dict(found.most_common())
