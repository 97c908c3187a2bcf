"""Addresses, loads and stores of one lane, each checked: bounds, alignment, written before, ordered after other threads.

Two accesses to a byte, one of them a write, race unless something orders them. What orders is kept as clocks: a warp's
clock counts its releases (barriers, arrivals), ``known[w, v]`` is the last clock of warp ``v`` that warp ``w`` has
heard of, and each byte remembers who wrote it last, at which clock, and who has read it since. Inside a warp, lanes are
ordered by ``bar.warp.sync`` and barriers only. Source of the method: Flanagan and Freund, "FastTrack" (2009).
"""

from __future__ import annotations

import numpy as np

from ptx_inline.emu import encoding as enc
from ptx_inline.emu.simt import state as s
from ptx_inline.emu.simt.jit import compiled, inlined

_CLOCK_MASK = np.uint64((1 << s.CLOCK_BITS) - 1)
_LANE_SHIFT = np.uint64(s.CLOCK_BITS)
_WARP_SHIFT = np.uint64(s.CLOCK_BITS + s.LANE_BITS)
_CTA_SHIFT = np.uint64(s.CLOCK_BITS + s.LANE_BITS + s.WARP_BITS)
_LANE_MASK, _WARP_MASK = np.uint64((1 << s.LANE_BITS) - 1), np.uint64((1 << s.WARP_BITS) - 1)
_CTA_MASK = np.uint64((1 << s.CTA_BITS) - 1)
_U0, _U32 = np.uint64(0), np.uint64(32)
_LOW32 = np.uint64(0xFFFFFFFF)
_SHARED_HIGH, _LOCAL_HIGH = np.uint64(enc.SHARED_WINDOW >> 32), np.uint64(enc.LOCAL_WINDOW >> 32)
_SEVERAL = np.uint32(32)  # as a lane: more than one lane of the warp
_STAMP_CLOCK = np.uint32(0xFFFFFFC0)
_BESIDE = -1  # no error: both are atomic, and nothing orders them


@compiled
def fail(error, code, pc, cta, warp, lane, address, space, extra, other):
    """Record the first error."""
    if error[s.ERROR_CODE] == s.NO_ERROR:
        error[s.ERROR_CODE], error[s.ERROR_PC], error[s.ERROR_CTA] = code, pc, cta
        error[s.ERROR_WARP], error[s.ERROR_LANE], error[s.ERROR_ADDRESS] = warp, lane, address
        error[s.ERROR_SPACE], error[s.ERROR_EXTRA], error[s.ERROR_OTHER] = space, extra, other


@compiled
def record(cta, warp, lane, clock):
    """Shadow record of an access."""
    return (
        s.VALID
        | (np.uint64(cta) << _CTA_SHIFT)
        | (np.uint64(warp) << _WARP_SHIFT)
        | (np.uint64(lane) << _LANE_SHIFT)
        | (np.uint64(clock) & _CLOCK_MASK)
    )


@compiled
def record_parts(found):
    """CTA, warp, lane and clock of a record."""
    return (
        np.int64((found >> _CTA_SHIFT) & _CTA_MASK),
        np.int64((found >> _WARP_SHIFT) & _WARP_MASK),
        np.int64((found >> _LANE_SHIFT) & _LANE_MASK),
        np.int64(found & _CLOCK_MASK),
    )


@compiled
def _ordered(clocks, known, sync, shares, found, cta, warp, lane):
    """Whether the access of a record happened before what this lane does now."""
    other_cta, other_warp, other_lane, clock = record_parts(found)
    if other_cta == s.HOST_CTA:
        return True
    if other_cta != cta:
        # through atomics or ordered accesses; taken as ordered if the other has released since and this CTA has looked
        if not shares:
            return False
        first = sync[other_cta, s.FIRST_RELEASE]
        released = clock <= sync[other_cta, s.RELEASED_CLOCK + other_warp]
        return first > 0 and released and sync[cta, s.LAST_ACQUIRE] >= first
    if other_warp == warp:
        return (other_lane == lane and (found & s.SEVERAL_BIT) == _U0) or clock < clocks[warp]
    return clock <= known[warp, other_warp]


@compiled
def release(worker, warp, clocks):
    """Leave in ``clocks`` what this warp did and has heard of."""
    for other in range(s.CLOCKS):
        clocks[other] = max(clocks[other], worker.clocks[warp] if other == warp else worker.known[warp, other])
    worker.clocks[warp] += 1


@compiled
def acquire(worker, warp, clocks):
    """Hear of what was left in ``clocks``."""
    for other in range(s.CLOCKS):
        worker.known[warp, other] = max(worker.known[warp, other], clocks[other])


@inlined
def resolve(launch, worker, pc, warp, lane, space, address, size):
    """State space and index in its memory of ``size`` bytes (a power of two) at an address; index -1 after an error."""
    numbers = launch.numbers
    high, low = address >> _U32, np.int64(address & _LOW32)
    code, extra, index = s.NO_ERROR, np.int64(0), np.int64(0)
    if space == enc.GENERIC:
        space = enc.GLOBAL
        if high == _SHARED_HIGH:
            space = enc.SHARED
        elif high == _LOCAL_HIGH:
            space = enc.LOCAL
    elif space != enc.GLOBAL and high in (_SHARED_HIGH, _LOCAL_HIGH):
        code, extra = s.OUT_OF_BOUNDS, np.int64(-1)  # a generic address where one within the space belongs
    if code != s.NO_ERROR:
        index = np.int64(-1)
    elif low & (size - 1):
        code, extra = s.MISALIGNED, size
    elif space == enc.GLOBAL:
        segment = np.int64(high) - 1
        if segment < 0 or segment >= launch.segments.shape[0]:
            code, extra = s.OUT_OF_BOUNDS, np.int64(-1)
        elif low + size > launch.segments[segment, s.SEGMENT_SIZE]:
            code, extra = s.OUT_OF_BOUNDS, segment
        else:
            index = launch.segments[segment, s.SEGMENT_START] + low
    elif space == enc.SHARED:
        index = low
        if low + size > numbers[s.SHARED_BYTES]:
            code, extra = s.OUT_OF_BOUNDS, numbers[s.SHARED_BYTES]
    elif space == enc.LOCAL:
        index = (warp * 32 + lane) * numbers[s.LOCAL_STRIDE] + low
        if low + size > numbers[s.LOCAL_BYTES]:
            code, extra = s.OUT_OF_BOUNDS, numbers[s.LOCAL_BYTES]
    else:
        index = numbers[s.PARAM_START] + low
        if low + size > numbers[s.PARAM_BYTES]:
            code, extra = s.OUT_OF_BOUNDS, numbers[s.PARAM_BYTES]
    if code != s.NO_ERROR:
        fail(worker.error, code, pc, worker.control[s.CTA], warp, lane, np.int64(address), space, extra, size)
        index = np.int64(-1)
    return space, index


@compiled
def find_mbarrier(worker, index):
    """Number of the mbarrier at an index of shared memory; -1 if there is none."""
    for number in range(worker.control[s.MBARRIER_COUNT]):
        if worker.mbarriers[number, s.MB_ADDRESS] == index:
            return number
    return -1


@inlined
def _get(m8, m16, m32, m64, index, size):
    if size == 4:
        return np.uint64(m32[index >> 2])
    if size == 8:
        return m64[index >> 3]
    if size == 2:
        return np.uint64(m16[index >> 1])
    return np.uint64(m8[index])


@inlined
def _put(m8, m16, m32, m64, index, size, value):
    if size == 4:
        m32[index >> 2] = np.uint32(value & _LOW32)
    elif size == 8:
        m64[index >> 3] = value
    elif size == 2:
        m16[index >> 1] = np.uint16(value & np.uint64(0xFFFF))
    else:
        m8[index] = np.uint8(value & np.uint64(0xFF))


@inlined
def get(launch, worker, space, index, size):
    """The value of 1, 2, 4 or 8 bytes in memory."""
    if space == enc.SHARED:
        return _get(worker.s8, worker.s16, worker.s32, worker.s64, index, size)
    if space == enc.LOCAL:
        return _get(worker.l8, worker.l16, worker.l32, worker.l64, index, size)
    return _get(launch.g8, launch.g16, launch.g32, launch.g64, index, size)


@inlined
def put(launch, worker, space, index, size, value):
    """Write 1, 2, 4 or 8 bytes."""
    if space == enc.SHARED:
        _put(worker.s8, worker.s16, worker.s32, worker.s64, index, size, value)
    elif space == enc.LOCAL:
        _put(worker.l8, worker.l16, worker.l32, worker.l64, index, size, value)
    else:
        _put(launch.g8, launch.g16, launch.g32, launch.g64, index, size, value)


@compiled
def _state_error(found, write):
    """Error code of a record that is no access."""
    if found == s.IN_FLIGHT:
        return s.IN_FLIGHT_WRITE if write else s.IN_FLIGHT_READ
    if found == s.MBARRIER_OBJECT:
        return s.MBARRIER_ACCESS
    return s.NO_ERROR if write else s.UNWRITTEN


@compiled
def _uniform(records, index, size):
    """Whether ``size`` shadow records are all alike."""
    first = records[index]
    different = np.int64(0)
    for i in range(index + 1, index + size):
        different += records[i] != first
    return different == 0


@compiled
def _writer_error(launch, worker, warp, lane, found, flags, write):
    """Error code of accessing a byte whose last writer's record is ``found``."""
    if (found & s.VALID) == _U0:
        return _state_error(found, write)
    writer_cta, _, _, _ = record_parts(found)
    if writer_cta != s.HOST_CTA and (flags & enc.READ_ONLY) != 0:
        return s.READ_ONLY_WRITTEN
    shares = launch.numbers[s.SHARES_GLOBAL] != 0
    cta = worker.control[s.CTA]
    if _ordered(worker.clocks, worker.known, launch.sync, shares, found, cta, warp, lane):
        return s.NO_ERROR
    return _BESIDE if (flags & enc.STRONG) != 0 and (found & s.ATOMIC_BIT) != _U0 else s.RACE


@compiled
def _read_shared(worker, warp, lane, index, size):
    """Remember a read of shared memory."""
    bit = np.uint32(1) << np.uint32(warp)
    clock = np.uint32(worker.clocks[warp]) << np.uint32(6)
    stamp, several = clock | np.uint32(lane), clock | _SEVERAL
    start = warp * worker.swrite.shape[0]
    readers, stamps = worker.sreaders, worker.sclock
    for i in range(index, index + size):
        before = stamps[start + i]
        again = (readers[i] & bit) != np.uint32(0) and (before & _STAMP_CLOCK) == clock and before != stamp
        stamps[start + i] = several if again else stamp
        readers[i] |= bit


@compiled
def _read_global(launch, worker, warp, lane, index, size):
    """Remember a read of global memory: the last reader, and one before it of another CTA or else another warp."""
    cta, clock = worker.control[s.CTA], worker.clocks[warp]
    mine = record(cta, warp, lane, clock)
    for i in range(index, index + size):
        before = launch.gread[i]
        launch.gread[i] = mine
        if before in (_U0, mine):
            continue
        if before == mine | s.SEVERAL_BIT:
            launch.gread[i] = before
            continue
        other_cta, other_warp, other_lane, other_clock = record_parts(before)
        if other_cta != cta or other_warp != warp:
            older_cta, _, _, _ = record_parts(launch.gread2[i])
            if other_cta != cta or launch.gread2[i] == _U0 or older_cta == cta:
                launch.gread2[i] = before
        elif other_clock == clock and other_lane != lane:
            launch.gread[i] = mine | s.SEVERAL_BIT


@compiled
def check_read(launch, worker, pc, warp, lane, space, index, size, flags):
    """Check a read of ``size`` bytes and remember it. False after an error."""
    if space == enc.PARAM or size == 0:
        return True
    cta = worker.control[s.CTA]
    if space == enc.LOCAL:
        stride = launch.numbers[s.LOCAL_STRIDE]
        for i in range(index, index + size):
            if worker.linit[i] == 0:
                fail(worker.error, s.UNWRITTEN, pc, cta, warp, lane, i % stride, space, 0, 0)
                return False
        return True
    shared = space == enc.SHARED
    writers = worker.swrite if shared else launch.gwrite
    end = index + (1 if _uniform(writers, index, size) else size)  # one answer for all, as a rule
    for i in range(index, end):
        found = writers[i]
        code = _writer_error(launch, worker, warp, lane, found, flags, False)
        if code > s.NO_ERROR:
            fail(worker.error, code, pc, cta, warp, lane, i, space, 0, np.int64(found))
            return False
    if (flags & enc.STRONG) == 0:
        if shared:
            _read_shared(worker, warp, lane, index, size)
        else:
            _read_global(launch, worker, warp, lane, index, size)
    return True


@compiled
def _reader_race(launch, worker, warp, lane, shared, i):
    """Record of a reader of byte ``i`` whom nothing orders before a write by this lane; 0 if there is none."""
    cta = worker.control[s.CTA]
    if shared:
        readers = worker.sreaders[i]
        for reader in range(worker.warps.shape[0]):
            if (readers >> np.uint32(reader)) & np.uint32(1):
                stamp = worker.sclock[reader * worker.swrite.shape[0] + i]
                when, by = np.int64(stamp >> np.uint32(6)), np.int64(stamp & np.uint32(63))
                mine = reader == warp
                if (mine and when == worker.clocks[warp] and by != lane) or (
                    not mine and when > worker.known[warp, reader]
                ):
                    return record(cta, reader, by & 31, when) | (s.SEVERAL_BIT if by == 32 else _U0)
        return _U0
    shares = launch.numbers[s.SHARES_GLOBAL] != 0
    for number in range(2):
        reader = launch.gread[i] if number == 0 else launch.gread2[i]
        if reader != _U0 and not _ordered(worker.clocks, worker.known, launch.sync, shares, reader, cta, warp, lane):
            return reader
    return _U0


@compiled
def _anybody_read(launch, worker, shared, index, size):
    """Whether any of the bytes was read since it was written."""
    found = _U0
    if shared:
        for i in range(index, index + size):
            found |= np.uint64(worker.sreaders[i])
    else:
        for i in range(index, index + size):
            found |= launch.gread[i]
    return found != _U0


@compiled
def check_write(launch, worker, pc, warp, lane, space, index, size, flags, same, mark):
    """Check a write of ``size`` bytes and leave ``mark`` as their record. False after an error.

    ``same``: the bytes hold the value already, so that writing it again beside another thread is harmless.
    """
    if space == enc.LOCAL:
        for i in range(index, index + size):
            worker.linit[i] = 1
        return True
    cta = worker.control[s.CTA]
    shared = space == enc.SHARED
    writers = worker.swrite if shared else launch.gwrite
    end = index + (1 if _uniform(writers, index, size) else size)
    several = _U0
    for i in range(index, end):
        found = writers[i]
        if found != _U0:
            code = _writer_error(launch, worker, warp, lane, found, flags, True)
            if code == _BESIDE:
                several = s.SEVERAL_BIT
            elif code != s.NO_ERROR and not (same and code == s.RACE):
                fail(worker.error, code, pc, cta, warp, lane, i, space, 1, np.int64(found))
                return False
    if _anybody_read(launch, worker, shared, index, size):
        for i in range(index, index + size):
            reader = _U0 if same else _reader_race(launch, worker, warp, lane, shared, i)
            if reader != _U0:
                other = np.int64(reader & ~s.VALID)
                fail(worker.error, s.RACE, pc, cta, warp, lane, i, space, 1, other)
                return False
            if shared:
                worker.sreaders[i] = np.uint32(0)
            else:
                launch.gread[i], launch.gread2[i] = _U0, _U0
    for i in range(index, index + size):
        writers[i] = mark | several
    return True
