"""From the compiled core's error numbers to exceptions that say what happened, where, and between whom."""

from __future__ import annotations

import numpy as np

from ptx_inline.emu import encoding as enc
from ptx_inline.emu import errors
from ptx_inline.emu.memory_image import MemoryImage, describe_buffer, describe_global
from ptx_inline.emu.program import Program
from ptx_inline.emu.simt import state as s
from ptx_inline.emu.simt.memory import record_parts

_CLASSES = {
    s.OUT_OF_BOUNDS: errors.MemoryAccessError,
    s.MISALIGNED: errors.MemoryAccessError,
    s.UNWRITTEN: errors.UninitializedReadError,
    s.IN_FLIGHT_READ: errors.UninitializedReadError,
    s.IN_FLIGHT_WRITE: errors.RaceError,
    s.MBARRIER_ACCESS: errors.MemoryAccessError,
    s.READ_ONLY_WRITTEN: errors.RaceError,
    s.RACE: errors.RaceError,
    s.NOT_TOGETHER: errors.DivergenceError,
    s.LANES_GONE: errors.DivergenceError,
    s.MASK_DIFFERS: errors.DivergenceError,
    s.NOT_IN_MASK: errors.DivergenceError,
    s.INACTIVE_SOURCE: errors.DivergenceError,
    s.NOT_UNIFORM: errors.DivergenceError,
    s.BARRIER_MISMATCH: errors.BarrierError,
    s.BARRIER_STUCK: errors.BarrierError,
    s.BARRIER_ID_WRONG: errors.BarrierError,
    s.NO_MBARRIER: errors.BarrierError,
    s.MBARRIER_OVERFLOW: errors.BarrierError,
    s.DEADLOCK: errors.DeadlockError,
    s.TRAPPED: errors.TrapError,
    s.TOO_LONG: errors.TrapError,
    s.TOO_MANY: errors.TrapError,
    s.BAD_SELECTOR: errors.EmulationError,
    s.BAD_BRANCH: errors.EmulationError,
    s.COPY_SIZE_WRONG: errors.MemoryAccessError,
}


def exception(program: Program, image: MemoryImage, launch: s.Launch, error: np.ndarray) -> errors.EmulationError:
    """The exception for the error that a worker recorded."""
    code = int(error[s.ERROR_CODE])
    pc = int(error[s.ERROR_PC])
    line = int(program.code[pc, enc.LINE]) if 0 <= pc < len(program.code) else 0
    warp, lane = int(error[s.ERROR_WARP]), int(error[s.ERROR_LANE])
    message, address = _describe(program, image, launch, error)
    return _CLASSES[code](
        message,
        line=line,
        text=program.text(line),
        cta=cta_coordinates(launch, int(error[s.ERROR_CTA])),
        warp=warp if warp >= 0 else None,
        lane=lane if lane >= 0 else None,
        address=address,
    )


def cta_coordinates(launch: s.Launch, cta: int) -> tuple[int, int, int]:
    """(x, y, z) of a CTA's number."""
    x, y = int(launch.numbers[s.GRID_X]), int(launch.numbers[s.GRID_Y])
    return cta % x, cta // x % y, cta // (x * y)


def lanes(mask: int) -> str:
    """``lanes 0-3, 7`` for a mask."""
    numbers = [lane for lane in range(32) if mask >> lane & 1]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"lane{'s' if len(numbers) != 1 else ''} {text or 'none'}"


def _describe(program: Program, image: MemoryImage, launch: s.Launch, error: np.ndarray) -> tuple[str, int | None]:
    code, space = int(error[s.ERROR_CODE]), int(error[s.ERROR_SPACE])
    extra, other, address = int(error[s.ERROR_EXTRA]), int(error[s.ERROR_OTHER]), int(error[s.ERROR_ADDRESS])
    wrong_kind = code == s.OUT_OF_BOUNDS and extra < 0 and space != enc.GLOBAL
    address &= (1 << 64) - 1 if space == enc.GLOBAL or wrong_kind else (1 << 32) - 1
    name = enc.SPACES[space] if 0 <= space < len(enc.SPACES) else "?"
    match code:
        case s.OUT_OF_BOUNDS:
            if wrong_kind:
                return f"generic address {address:#x} in an instruction for {name} memory", address
            if space != enc.GLOBAL:
                return f"{other} bytes at {name} address {address:#x} are outside its {extra} bytes", address
            if extra < 0:
                return f"{other} bytes at {address:#x} are in no buffer: not an address of any argument", address
            offset = address & 0xFFFFFFFF
            buffer = extra
            if offset >> 31 and extra + 1 < len(image.owners):  # before the next buffer rather than far behind this one
                buffer, offset = extra + 1, offset - (1 << 32)
            where = describe_buffer(image, buffer, offset)
            return f"{other} bytes out of bounds: {where}", address
        case s.MISALIGNED:
            return f"{name} address {address:#x} must be a multiple of the access's {extra} bytes", address
    if code in (s.UNWRITTEN, s.IN_FLIGHT_READ, s.IN_FLIGHT_WRITE, s.MBARRIER_ACCESS, s.READ_ONLY_WRITTEN, s.RACE):
        where = f"{name} memory"
        if space == enc.GLOBAL:
            address, words = describe_global(image, address)
            where += f", {words}"
        return f"{_access(code, extra, other, launch)} ({where})", address
    return _CONTROL[code](program, extra, other), address if code in (s.NO_MBARRIER, s.MBARRIER_OVERFLOW) else None


def _access(code: int, extra: int, other: int, launch: s.Launch) -> str:
    if code == s.UNWRITTEN:
        return "read of memory that nobody has written"
    if code == s.IN_FLIGHT_READ:
        return "read of memory that an asynchronous copy is to write, before it was waited for"
    if code == s.IN_FLIGHT_WRITE:
        return "write to memory that an asynchronous copy is to write"
    if code == s.MBARRIER_ACCESS:
        return "ordinary access to an mbarrier object"
    if code == s.READ_ONLY_WRITTEN:
        return "ld.global.nc of memory that this kernel has written"
    cta, warp, lane, _ = (int(part) for part in record_parts.py_func(np.uint64(other & (1 << 64) - 1)))
    several = other & int(s.SEVERAL_BIT)
    whom = f"several lanes of warp {warp}" if several else f"warp {warp} lane {lane}"
    who = "an asynchronous copy" if warp == s.ASYNC else f"{whom} of CTA {cta_coordinates(launch, cta)}"
    theirs = "written" if other < 0 or not extra else "read"
    mine = "write to" if extra else "read of"
    return f"data race: {mine} a byte that {who} {'have' if several else 'has'} {theirs}, and nothing orders the two"


_CONTROL = {
    s.NOT_TOGETHER: lambda program, here, missing: (
        f"{lanes(here)} wait at an instruction that lanes must execute together; {lanes(missing)} will not come"
    ),
    s.LANES_GONE: lambda program, gone, _: (
        f"a whole warp must execute this instruction, but {lanes(gone)} {'have' if gone & (gone - 1) else 'has'} ended"
    ),
    s.MASK_DIFFERS: lambda program, found, expected: (
        f"lanes name different member masks: {found:#010x}, where those here are {expected:#010x}"
    ),
    s.NOT_IN_MASK: lambda program, found, _: f"the lane is not in the member mask {found:#010x} that it names",
    s.INACTIVE_SOURCE: lambda program, source, _: f"shuffle from lane {source}, which does not take part",
    s.NOT_UNIFORM: lambda program, found, expected: (
        f"an operand must be the same in all lanes of the warp, got {found} and {expected}"
    ),
    s.BARRIER_MISMATCH: lambda program, number, expected: (
        f"barrier {number} is used in two ways at once: another operation, or another thread count than {expected or 'all'}"
    ),
    s.BARRIER_STUCK: lambda program, number, arrived: (
        f"barrier {number}: {arrived} threads have arrived, and no other warp can go on"
    ),
    s.BARRIER_ID_WRONG: lambda program, number, count: (
        f"barrier must be 0 to 15 and its thread count a positive multiple of 32, got {number}"
        + (f" and {count}" if number < s.NAMED_BARRIERS else "")
    ),
    s.NO_MBARRIER: lambda program, *_: "no mbarrier has been initialised at this address",
    s.MBARRIER_OVERFLOW: lambda program, count, pending: (
        f"{count} arrivals at an mbarrier that expects {pending} more in this phase"
    ),
    s.DEADLOCK: lambda program, waiting, _: (
        f"deadlock: this warp waits for an mbarrier, {waiting} warps wait at barriers, and none can go on"
    ),
    s.TRAPPED: lambda program, mask, _: f"trap executed by {lanes(mask)}",
    s.TOO_LONG: lambda program, limit, _: (
        f"a CTA has executed {limit} warp instructions without ending (max_instructions)"
    ),
    s.TOO_MANY: lambda program, limit, _: f"more than {limit} asynchronous copies or mbarriers at once",
    s.BAD_SELECTOR: lambda program, value, which: (
        f"{('byte_id_a', 'thread_id_a', 'byte_id_b', 'thread_id_b')[which]} {value} is not allowed for this instruction"
    ),
    s.BAD_BRANCH: lambda program, index, count: f"brx index {index} is beyond its {count} targets",
    s.COPY_SIZE_WRONG: lambda program, size, limit: (
        f"asynchronous copy of {size} bytes: must be at most, or a multiple of, {limit}"
    ),
}
