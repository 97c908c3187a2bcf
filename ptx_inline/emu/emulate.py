"""The emulator's front: a kernel, its launch, its arguments; outputs and a profile, or one stop after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ptx_inline.emu.inspect import Breakpoint, Session, Stop
from ptx_inline.emu.machine import Machine
from ptx_inline.emu.profile import Profile
from ptx_inline.emu.program import load

MAX_INSTRUCTIONS = 100_000_000


class HasPTX(Protocol):
    """What can be emulated: ``ptx_inline.toolchain.Kernel``, or anything with final PTX for a target."""

    def ptx(self, target: str) -> str:
        """The PTX text for a target such as ``"sm_120a"``."""
        ...


@dataclass(frozen=True)
class Emulation:
    """What a run left.

    Attributes:
        outputs: the arguments as the kernel left them: for each array (or ``Output``) a new array of its shape and
            dtype, scalars as they came. The caller's arrays are unchanged.
        profile: what was executed.
        unwritten: for each ``Output``, by its position, how many bytes nobody wrote.
    """

    outputs: tuple
    profile: Profile
    unwritten: dict[int, int]


def emulate(
    kernel: HasPTX | str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[object],
    arch: str = "sm_120a",
    *,
    smem_bytes: int = 0,
    entry: str | None = None,
    workers: int | None = None,
    max_instructions: int = MAX_INSTRUCTIONS,
    breakpoints: Sequence[Breakpoint] = (),
    on_stop: Callable[[Stop], object] | None = None,
) -> Emulation:
    """Run a kernel on the CPU.

    Args:
        kernel: an object with ``ptx(arch)`` such as a ``Kernel``, or PTX text. grid, block: CTAs and threads in x, y, z.
        args: one a parameter: a C-contiguous NumPy array, an ``Output`` (memory to be filled), or a number. The same
            array twice is one buffer.
        arch: target whose PTX is run; PTX text brings its own.
        smem_bytes: dynamic shared memory. entry: which kernel of a PTX text with several.
        workers: threads that run CTAs (``None``: one a core). CTAs that talk to each other through atomics or ordered
            accesses, and runs with breakpoints, use one. Of races between CTAs, those of two CTAs that run at the very
            same time may be missed with more than one.
        max_instructions: warp instructions of a CTA after which it counts as endless.
        breakpoints, on_stop: before an instruction that a breakpoint names, ``on_stop(stop)`` is called.

    Raises ``UnsupportedPTX`` before anything runs for what the emulator does not know, ``TypeError`` or ``ValueError``
    for a launch that does not fit the kernel, and an ``EmulationError`` for what PTX forbids.
    """
    if bool(breakpoints) != (on_stop is not None):
        raise ValueError("breakpoints and on_stop must be given together, or neither")
    machine = _machine(kernel, grid, block, args, arch, smem_bytes, entry, max_instructions)
    if on_stop is None:
        profile = machine.run(workers)
    else:
        session = Session(machine, breakpoints)
        for stop in session:
            on_stop(stop)
        profile = session.profile
    return Emulation(machine.image.results(), profile, machine.image.unwritten())


def stops(
    kernel: HasPTX | str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[object],
    arch: str = "sm_120a",
    *,
    breakpoints: Sequence[Breakpoint],
    smem_bytes: int = 0,
    entry: str | None = None,
    max_instructions: int = MAX_INSTRUCTIONS,
) -> Iterator[Stop]:
    """Run a kernel from breakpoint to breakpoint: an iterator of stops, each valid until the next one is asked for.

    Arguments and errors as :func:`emulate`; the kernel runs no further than the iterator is driven.
    """
    machine = _machine(kernel, grid, block, args, arch, smem_bytes, entry, max_instructions)
    return iter(Session(machine, breakpoints))


def _machine(kernel, grid, block, args, arch, smem_bytes, entry, max_instructions) -> Machine:
    if not isinstance(kernel, str) and not callable(getattr(kernel, "ptx", None)):
        raise TypeError(f"kernel must be PTX text or have a ptx(arch) method, got {type(kernel).__name__}")
    program = load(kernel if isinstance(kernel, str) else kernel.ptx(arch), entry)
    return Machine(program, grid, block, args, smem_bytes=smem_bytes, max_instructions=max_instructions)
