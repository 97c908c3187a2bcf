"""What the emulator raises: each error names the PTX line, and where it happened while running, CTA, warp and lane."""

from __future__ import annotations


class UnsupportedPTX(NotImplementedError):
    """An instruction, directive or operand that the emulator does not know."""


class EmulationError(RuntimeError):
    """The program did what PTX forbids.

    Attributes:
        line, text: PTX line (from 1) and its text; line 0 where no single instruction is to blame.
        cta: coordinates (x, y, z), ``None`` for an error found between CTAs.
        warp, lane, address: where known, else ``None``; an address within its state space.
    """

    def __init__(
        self,
        message: str,
        *,
        line: int = 0,
        text: str = "",
        cta: tuple[int, int, int] | None = None,
        warp: int | None = None,
        lane: int | None = None,
        address: int | None = None,
    ):
        self.line, self.text, self.cta, self.warp, self.lane, self.address = line, text, cta, warp, lane, address
        places = [f"PTX line {line}: {text}"] if line else []
        places += [f"CTA {cta}"] if cta is not None else []
        places += [f"{name} {value}" for name, value in (("warp", warp), ("lane", lane)) if value is not None]
        places += [f"address {address:#x}"] if address is not None else []
        super().__init__(message + "".join(f"\n  {place}" for place in places))


class MemoryAccessError(EmulationError):
    """Out of bounds, misaligned, or into the wrong state space."""


class UninitializedReadError(EmulationError):
    """A read of memory that nobody has written, or that a ``cp.async`` has not reached yet."""


class RaceError(EmulationError):
    """Two accesses to one byte, one of them a write, by threads that nothing ordered."""


class DivergenceError(EmulationError):
    """Lanes that PTX wants together at one ``.sync`` or ``.aligned`` instruction, and that are not."""


class BarrierError(EmulationError):
    """Warps that use one barrier in ways that do not fit together."""


class DeadlockError(EmulationError):
    """Every warp waits and none can go on."""


class TrapError(EmulationError):
    """The program executed ``trap``, or ran beyond the instruction limit."""
