"""The arrays that the compiled core works on, their columns, and how they are allocated.

A :class:`Launch` is what all CTAs share, a :class:`Worker` what one CTA needs while it runs; a worker runs CTA after CTA.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ptx_inline.emu import encoding as enc
from ptx_inline.emu.simt.handle import handle_type

# Columns of Launch.numbers.
(GRID_X, GRID_Y, GRID_Z, BLOCK_X, BLOCK_Y, BLOCK_Z, THREADS, WARPS, SHARED_BYTES, STATIC_SHARED, LOCAL_BYTES,
 LOCAL_STRIDE, PARAM_START, PARAM_BYTES, ROWS, LIMIT, SHARES_GLOBAL) = range(17)  # fmt: skip
NUMBERS = SHARES_GLOBAL + 1
# Columns of Launch.segments.
SEGMENT_START, SEGMENT_SIZE = range(2)
# Columns of Launch.sync: when a CTA first released and last acquired, the time (row 0 only), its warps' released clocks.
FIRST_RELEASE, LAST_ACQUIRE, SYNC_TIME, RELEASED_CLOCK = range(4)

MAX_WARPS = 32
ASYNC = MAX_WARPS  # the copy engine's place among the clocks
CLOCKS = MAX_WARPS + 1
MAX_MBARRIERS = 256
NAMED_BARRIERS = 16

# Columns of Worker.control.
CTA, NEXT_CTA, NEXT_WARP, RESUMED, STEPS, EVENTS, BULK_COUNT, MBARRIER_COUNT, STOPPED_MASK = range(9)
# Columns of Worker.warps.
EXITED, WAITING, STATE, FENCED, BARRIER_ID, BARRIER_PC, COPY_COUNT, SPINS = range(8)
# Column of Worker.groups where the groups of bulk copies begin; those of cp.async come before.
BULK_GROUPS = 32
# States of a warp.
READY, BLOCKED, STALLED, DONE = range(4)
# Columns of Worker.barriers.
ARRIVED, EXPECTED, WAITERS, BARRIER_OP, BARRIER_VALUE = range(5)
# Columns of Worker.mbarriers.
MB_ADDRESS, MB_COUNT, MB_PENDING, MB_TX, MB_PHASE = range(5)
# Columns of Worker.copies (cp.async) and Worker.bulks.
COPY_LANE, COPY_DST, COPY_SRC, COPY_SIZE, COPY_LENGTH, COPY_GROUP, COPY_PC = range(7)
BULK_OP, BULK_SHARED, BULK_GLOBAL, BULK_SIZE, BULK_MBARRIER, BULK_WARP, BULK_LANE, BULK_GROUP, BULK_PC = range(9)
MAX_COPIES, MAX_BULKS = 8192, 1024
# Columns of Worker.counts: a row an instruction.
ISSUED, LANES, REQUESTS, TRANSACTIONS, IDEAL = range(5)
# Columns of Worker.error.
ERROR_CODE, ERROR_PC, ERROR_CTA, ERROR_WARP, ERROR_LANE, ERROR_ADDRESS, ERROR_SPACE, ERROR_EXTRA, ERROR_OTHER = range(9)

# Error codes.
(NO_ERROR, OUT_OF_BOUNDS, MISALIGNED, UNWRITTEN, IN_FLIGHT_READ, IN_FLIGHT_WRITE, MBARRIER_ACCESS, READ_ONLY_WRITTEN, RACE,
 NOT_TOGETHER, LANES_GONE, MASK_DIFFERS, NOT_IN_MASK, INACTIVE_SOURCE, NOT_UNIFORM, BARRIER_MISMATCH, BARRIER_STUCK,
 DEADLOCK, TRAPPED, TOO_LONG, NO_MBARRIER, TOO_MANY, BAD_SELECTOR, BAD_BRANCH, MBARRIER_OVERFLOW, COPY_SIZE_WRONG,
 BARRIER_ID_WRONG) = range(27)  # fmt: skip

# Status of a run.
FINISHED, STOPPED, FAILED = range(3)

# Shadow records of a byte: who accessed it last. Zero is nobody; two small numbers are states.
IN_FLIGHT, MBARRIER_OBJECT = np.uint64(1), np.uint64(2)
# The access was atomic; it stands for several threads, of which the record names the last.
VALID, ATOMIC_BIT, SEVERAL_BIT = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
CLOCK_BITS, LANE_BITS, WARP_BITS, CTA_BITS = 24, 5, 6, 26
HOST_CTA = (1 << CTA_BITS) - 1
HOST_RECORD = np.uint64((1 << 63) | (HOST_CTA << (CLOCK_BITS + LANE_BITS + WARP_BITS)))


class Launch(NamedTuple):
    """What all CTAs share; ``g8`` to ``g64`` are views of one memory, as are ``s``, ``l`` of a :class:`Worker`.

    code, lists, presets, specials: the program's. gwrite: shadow record of each byte's last writer; gread, gread2: of two
    readers since. sync: what CTAs released. breaks: where to stop. mma_*: the :class:`MmaTables`.
    """

    code: np.ndarray
    lists: np.ndarray
    presets: np.ndarray
    specials: np.ndarray
    numbers: np.ndarray
    g8: np.ndarray
    g16: np.ndarray
    g32: np.ndarray
    g64: np.ndarray
    segments: np.ndarray
    gwrite: np.ndarray
    gread: np.ndarray
    gread2: np.ndarray
    sync: np.ndarray
    breaks: np.ndarray
    mma_numbers: np.ndarray
    mma_values: np.ndarray
    mma_exponents: np.ndarray
    mma_places: np.ndarray


class Worker(NamedTuple):
    """What a CTA needs while it runs.

    regs: warp after warp, row after row, 32 lanes each. pcs: each lane's next instruction. swrite, sreaders, sclock: last
    writer of each byte of shared memory, mask of the warps that read it since, and when. linit: bytes of local memory that
    were written. clocks, known: each warp's own clock, and how far it has heard of the others'. bclocks, mclocks, mdone:
    what named barriers and mbarriers pass on. counts: the profile. places, words, bytes16: scratch.
    """

    regs: np.ndarray
    warps: np.ndarray
    pcs: np.ndarray
    s8: np.ndarray
    s16: np.ndarray
    s32: np.ndarray
    s64: np.ndarray
    swrite: np.ndarray
    sreaders: np.ndarray
    sclock: np.ndarray
    l8: np.ndarray
    l16: np.ndarray
    l32: np.ndarray
    l64: np.ndarray
    linit: np.ndarray
    clocks: np.ndarray
    known: np.ndarray
    barriers: np.ndarray
    bclocks: np.ndarray
    mbarriers: np.ndarray
    mclocks: np.ndarray
    mdone: np.ndarray
    copies: np.ndarray
    groups: np.ndarray
    bulks: np.ndarray
    counts: np.ndarray
    error: np.ndarray
    control: np.ndarray
    places: np.ndarray
    words: np.ndarray
    bytes16: np.ndarray


_MEMORY = {8: (np.uint8, 1), 16: (np.uint16, 1), 32: (np.uint32, 1), 64: (np.uint64, 1)}
#: Table of a ``Launch`` -> handle, in compiled code; likewise for a ``Worker``.
launch_handle = handle_type(
    "emulated_launch",
    {
        "code": (np.int64, 2), "lists": (np.int64, 1), "presets": (np.uint64, 1), "specials": (np.int64, 2),
        "numbers": (np.int64, 1), **{f"g{bits}": kind for bits, kind in _MEMORY.items()}, "segments": (np.int64, 2),
        "gwrite": (np.uint64, 1), "gread": (np.uint64, 1), "gread2": (np.uint64, 1), "sync": (np.int64, 2),
        "breaks": (np.uint8, 1), "mma_numbers": (np.int64, 2), "mma_values": (np.float32, 1),
        "mma_exponents": (np.int16, 1), "mma_places": (np.int32, 1),
    },
)  # fmt: skip
worker_handle = handle_type(
    "emulated_worker",
    {
        "regs": (np.uint64, 1), "warps": (np.int64, 2), "pcs": (np.int64, 2),
        **{f"s{bits}": kind for bits, kind in _MEMORY.items()}, "swrite": (np.uint64, 1), "sreaders": (np.uint32, 1),
        "sclock": (np.uint32, 1), **{f"l{bits}": kind for bits, kind in _MEMORY.items()}, "linit": (np.uint8, 1),
        "clocks": (np.int64, 1), "known": (np.int64, 2), "barriers": (np.int64, 2), "bclocks": (np.int64, 2),
        "mbarriers": (np.int64, 2), "mclocks": (np.int64, 2), "mdone": (np.int64, 2), "copies": (np.int64, 3),
        "groups": (np.int64, 2), "bulks": (np.int64, 2), "counts": (np.int64, 2), "error": (np.int64, 1),
        "control": (np.int64, 1), "places": (np.int64, 1), "words": (np.uint32, 3), "bytes16": (np.uint8, 2),
    },
)  # fmt: skip


def views(size: int) -> tuple[np.ndarray, ...]:
    """Memory of at least ``size`` bytes, poisoned, as uint8, uint16, uint32 and uint64."""
    words = np.full(-(-max(size, 1) // 8), 0xCDCDCDCDCDCDCDCD, np.uint64)
    return words.view(np.uint8), words.view(np.uint16), words.view(np.uint32), words


def make_worker(launch: Launch) -> Worker:
    """Arrays for one CTA of a launch."""
    numbers = launch.numbers
    warps, rows, shared = (int(numbers[column]) for column in (WARPS, ROWS, SHARED_BYTES))
    local = int(numbers[THREADS]) * int(numbers[LOCAL_STRIDE])
    code = launch.code
    copies = MAX_COPIES if np.any(code[:, enc.KIND] == enc.CP_ASYNC) else 1
    bulks = MAX_BULKS if np.any(code[:, enc.KIND] == enc.BULK_COPY) else 1
    return Worker(
        np.zeros(warps * rows * 32, np.uint64),
        np.zeros((warps, SPINS + 1), np.int64),
        np.zeros((warps, 32), np.int64),
        *views(shared),
        np.zeros(max(shared, 1), np.uint64),
        np.zeros(max(shared, 1), np.uint32),
        np.zeros(max(shared, 1) * warps, np.uint32),
        *views(local),
        np.zeros(max(local, 1), np.uint8),
        np.ones(CLOCKS, np.int64),
        np.zeros((CLOCKS, CLOCKS), np.int64),
        np.zeros((NAMED_BARRIERS, BARRIER_VALUE + 1), np.int64),
        np.zeros((NAMED_BARRIERS, CLOCKS), np.int64),
        np.zeros((MAX_MBARRIERS, MB_PHASE + 1), np.int64),
        np.zeros((MAX_MBARRIERS, CLOCKS), np.int64),
        np.zeros((MAX_MBARRIERS, CLOCKS), np.int64),
        np.zeros((warps, copies, COPY_PC + 1), np.int64),
        np.zeros((warps, 2 * BULK_GROUPS), np.int64),
        np.zeros((bulks, BULK_PC + 1), np.int64),
        np.zeros((len(code), IDEAL + 1), np.int64),
        np.zeros(ERROR_OTHER + 1, np.int64),
        np.zeros(STOPPED_MASK + 1, np.int64),
        np.zeros(32, np.int64),
        np.zeros((6, 32, 4), np.uint32),
        np.zeros((32, 16), np.uint8),
    )
