"""Compilation targets by name, e.g. ``sm_90a``: the spelling of ptxas ``-arch``."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Targets that every kernel of this project is assembled for in the tests.
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


@dataclass(frozen=True)
class Target:
    """One GPU architecture; ``suffix`` is ``"a"`` where architecture-specific instructions are enabled."""

    major: int
    minor: int
    suffix: str = ""

    @classmethod
    def parse(cls, name: str | Target) -> Target:
        """Read ``"sm_120a"``. Raises ``ValueError`` for another form or an architecture older than sm_80."""
        if isinstance(name, Target):
            return name
        match = re.fullmatch(r"sm_(\d{1,2})(\d)([af]?)", name) if isinstance(name, str) else None
        if match is None or int(match[1]) < 8:
            raise ValueError(f"arch must be sm_80 or newer, written as one of {', '.join(TARGETS)}, got {name!r}")
        return cls(int(match[1]), int(match[2]), match[3])

    @classmethod
    def of_compute_capability(cls, major: int, minor: int) -> Target:
        """The target for a device: the ``a`` variant from compute capability 9.0 on, which is what unlocks wgmma and
        the block-scale MMA. Raises ``ValueError`` below 8.0."""
        if major < 8:
            raise ValueError(f"the GPU must have compute capability 8.0 or higher, got {major}.{minor}")
        return cls(major, minor, "a" if major >= 9 else "")

    @property
    def name(self) -> str:
        return f"sm_{self.major}{self.minor}{self.suffix}"

    @property
    def compute_capability(self) -> tuple:
        """As numba-cuda takes it: ``(12, 0, "a")`` or ``(8, 0)``."""
        return (self.major, self.minor, self.suffix) if self.suffix else (self.major, self.minor)

    @property
    def has_block_scale_mma(self) -> bool:
        """``mma.sync`` with ``.block_scale`` (PTX ISA, mma: sm_120a, sm_121a and their family; not sm_100a)."""
        return self.major == 12 and bool(self.suffix)

    def __str__(self) -> str:
        return self.name
