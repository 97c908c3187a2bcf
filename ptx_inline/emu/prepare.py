"""Compiles the emulator's core and leaves it in Numba's cache: ``python -m ptx_inline.emu.prepare``, 20 s of one core.

Whoever emulates something later, in any process, finds it there. Without this the first one to emulate compiles it.
"""

from __future__ import annotations

_NOTHING = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry nothing() { ret; }
"""


def prepare() -> None:
    """Compile the core, or read it from Numba's cache: what follows in this process starts at once."""
    from ptx_inline.emu.emulate import emulate

    emulate(_NOTHING, (1,), (1,), ())


if __name__ == "__main__":
    prepare()
