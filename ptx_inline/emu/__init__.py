"""Runs PTX on the CPU: the final PTX of a kernel, bit for bit where the bits are known, with every access checked.

:func:`emulate` runs a kernel and returns its outputs and a profile; :func:`stops` runs it from breakpoint to breakpoint.
What a kernel must not do raises: see :mod:`ptx_inline.emu.errors`.

The way of a kernel: ``parse`` (text to data) -> ``decode`` with ``opcodes_*`` (what each opcode means) -> ``flow``
(order of the blocks) -> ``program`` -> ``machine`` (memory, CTAs over cores) -> ``simt`` (the compiled core).
"""

from ptx_inline.emu.emulate import Emulation, emulate, stops
from ptx_inline.emu.errors import (
    BarrierError,
    DeadlockError,
    DivergenceError,
    EmulationError,
    MemoryAccessError,
    RaceError,
    TrapError,
    UninitializedReadError,
    UnsupportedPTX,
)
from ptx_inline.emu.inspect import Breakpoint, Stop
from ptx_inline.emu.memory_image import Output
from ptx_inline.emu.profile import Profile

__all__ = [
    "BarrierError",
    "Breakpoint",
    "DeadlockError",
    "DivergenceError",
    "Emulation",
    "EmulationError",
    "MemoryAccessError",
    "Output",
    "Profile",
    "RaceError",
    "Stop",
    "TrapError",
    "UninitializedReadError",
    "UnsupportedPTX",
    "emulate",
    "stops",
]
