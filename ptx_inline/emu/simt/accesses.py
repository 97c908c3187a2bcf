"""Memory instructions of a warp: loads, stores, atomics, ``cp.async`` and bulk copies, and what they cost.

A ``cp.async`` writes its bytes when its group is waited for and not before; a bulk copy when somebody waits for its
mbarrier or group. Until then the destination counts as in flight, and touching it is an error.
"""

from __future__ import annotations

import numpy as np

from ptx_inline.emu import encoding as enc
from ptx_inline.emu.scalar_types import BF16X2, BITS, F16, F16X2, RN
from ptx_inline.emu.simt import state as s
from ptx_inline.emu.simt.float_alu import float_alu
from ptx_inline.emu.simt.integers import count_ones, extend, int_alu, is_signed, low_bits
from ptx_inline.emu.simt.jit import compiled
from ptx_inline.emu.simt.memory import (
    check_read,
    check_write,
    fail,
    find_mbarrier,
    get,
    put,
    record,
    release,
    resolve,
)

_BYTES = np.array([max(bits // 8, 1) for bits in BITS], np.int64)
_U0, _U1 = np.uint64(0), np.uint64(1)
_BANKS, _SECTOR = 32, 32


@compiled
def bank_transactions(places, mask, size, lanes):
    """Passes that an access of ``size`` bytes a lane to shared memory takes, ``lanes`` lanes at a time: in each pass a
    bank serves one 4-byte word, to any number of lanes."""
    total = 0
    words = np.empty((_BANKS, 32 * 4), np.int64)  # of each bank
    counts = np.empty(_BANKS, np.int64)
    for first in range(0, 32, lanes):
        counts[:] = 0
        passes = 0
        for lane in range(first, first + lanes):
            if (mask >> lane) & 1:
                for word in range(places[lane] >> 2, (places[lane] + size + 3) >> 2):
                    bank, i = word % _BANKS, 0
                    while i < counts[bank] and words[bank, i] != word:
                        i += 1
                    if i == counts[bank]:
                        words[bank, i] = word
                        counts[bank] += 1
                        passes = max(passes, counts[bank])
        total += passes
    return total


@compiled
def sector_transactions(places, mask, size):
    """32-byte sectors that an access to global memory touches."""
    sectors = np.empty(32 * 2, np.int64)
    count = 0
    for lane in range(32):
        if (mask >> lane) & 1:
            for sector in range(places[lane] // _SECTOR, (places[lane] + size - 1) // _SECTOR + 1):
                new = True
                for i in range(count - 1, -1, -1):
                    if sectors[i] == sector:
                        new = False
                        break
                if new:
                    sectors[count] = sector
                    count += 1
    return count


@compiled
def _profile(worker, pc, space, mask, size):
    """Requests, transactions and the fewest transactions possible of the accesses in ``worker.places``."""
    if space == enc.SHARED:
        lanes = 32 if size <= 4 else 16 if size == 8 else 8
        worker.counts[pc, s.TRANSACTIONS] += bank_transactions(worker.places, mask, size, lanes)
        for first in range(0, 32, lanes):
            worker.counts[pc, s.IDEAL] += ((mask >> first) & ((1 << lanes) - 1)) != 0
    elif space == enc.GLOBAL:
        sectors = sector_transactions(worker.places, mask, size)
        worker.counts[pc, s.TRANSACTIONS] += sectors
        # lanes that read the same bytes need fewer than bytes of their own would
        worker.counts[pc, s.IDEAL] += min(sectors, (count_ones(mask) * size + _SECTOR - 1) // _SECTOR)
    else:
        return
    worker.counts[pc, s.REQUESTS] += 1


@compiled
def load(launch, worker, pc, warp, mask):
    """``ld``: each lane's vector, sign-extended to the registers for signed types."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    ty, flags, count, start = row[enc.TYPE], row[enc.FLAGS], row[enc.COUNT], row[enc.LIST]
    size = _BYTES[ty]
    signed = is_signed(ty)
    space = enc.GLOBAL
    for lane in range(32):
        if not (mask >> lane) & 1:
            continue
        address = regs[base + row[enc.A] * 32 + lane] + np.uint64(row[enc.OFFSET])
        space, index = resolve(launch, worker, pc, warp, lane, row[enc.SPACE], address, size * count)
        if index < 0 or not check_read(launch, worker, pc, warp, lane, space, index, size * count, flags):
            return False
        for k in range(count):
            value = get(launch, worker, space, index + k * size, size)
            if signed:
                value = extend(ty, value) & low_bits(np.uint64(row[enc.AUX]))
            target = launch.lists[start + k]
            if target >= 0:
                regs[base + target * 32 + lane] = value
        worker.places[lane] = index
    if (flags & enc.ACQUIRE) != 0:
        acquire_global(launch, worker)
    _profile(worker, pc, space, mask, size * count)
    return True


@compiled
def store(launch, worker, pc, warp, mask):
    """``st``: each lane's vector."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    ty, flags, count, start = row[enc.TYPE], row[enc.FLAGS], row[enc.COUNT], row[enc.LIST]
    size = _BYTES[ty]
    space = enc.GLOBAL
    strong = s.ATOMIC_BIT if (flags & enc.STRONG) != 0 else _U0
    if (flags & enc.RELEASE) != 0:
        release_global(launch, worker, warp)
    for lane in range(32):
        if not (mask >> lane) & 1:
            continue
        address = regs[base + row[enc.A] * 32 + lane] + np.uint64(row[enc.OFFSET])
        space, index = resolve(launch, worker, pc, warp, lane, row[enc.SPACE], address, size * count)
        if index < 0:
            return False
        mark = strong | record(worker.control[s.CTA], warp, lane, worker.clocks[warp])
        bits = low_bits(np.uint64(8 * size))
        same = True
        for k in range(count):
            value = regs[base + launch.lists[start + k] * 32 + lane] & bits
            same &= get(launch, worker, space, index + k * size, size) == value
        if not check_write(launch, worker, pc, warp, lane, space, index, size * count, flags, same, mark):
            return False
        for k in range(count):
            value = regs[base + launch.lists[start + k] * 32 + lane] & bits
            put(launch, worker, space, index + k * size, size, value)
        worker.places[lane] = index
    worker.control[s.EVENTS] += 1
    _profile(worker, pc, space, mask, size * count)
    return True


@compiled
def _atomic_result(how, op, ty, old, b, c):
    if how == enc.ATOM_EXCHANGE:
        return b
    if how == enc.ATOM_CAS:
        return c if old == b else old
    if how == enc.ATOM_INC:
        return _U0 if old >= b else old + _U1
    if how == enc.ATOM_DEC:
        return b if old == _U0 or old > b else old - _U1
    if ty >= F16:
        return float_alu(op, ty, 0, RN, old, b, _U0)
    return int_alu(op, ty, 0, old, b, _U0, _U0)


@compiled
def atomic(launch, worker, pc, warp, mask):
    """``atom`` and ``red``: lane after lane."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    ty, flags = row[enc.TYPE], row[enc.FLAGS]
    size = np.int64(4) if ty in (F16X2, BF16X2) else _BYTES[ty]
    space = enc.GLOBAL
    if (flags & enc.RELEASE) != 0 or worker.warps[warp, s.FENCED]:
        release_global(launch, worker, warp)
    for lane in range(32):
        if not (mask >> lane) & 1:
            continue
        address = regs[base + row[enc.A] * 32 + lane] + np.uint64(row[enc.OFFSET])
        space, index = resolve(launch, worker, pc, warp, lane, row[enc.SPACE], address, size)
        if index < 0 or not check_read(launch, worker, pc, warp, lane, space, index, size, flags):
            return False
        mark = s.ATOMIC_BIT | record(worker.control[s.CTA], warp, lane, worker.clocks[warp])
        if not check_write(launch, worker, pc, warp, lane, space, index, size, flags, False, mark):
            return False
        old = get(launch, worker, space, index, size)
        b = regs[base + row[enc.B] * 32 + lane]
        c = regs[base + max(row[enc.C], 0) * 32 + lane]
        put(launch, worker, space, index, size, _atomic_result(row[enc.AUX], row[enc.OP], ty, old, b, c))
        if row[enc.DST] >= 0:
            regs[base + row[enc.DST] * 32 + lane] = old
        worker.places[lane] = index
    acquire_global(launch, worker)
    worker.control[s.EVENTS] += 1
    _profile(worker, pc, space, mask, size)
    return True


@compiled
def release_global(launch, worker, warp):
    """Publish to other CTAs what this warp did, and what it has heard of from its own CTA."""
    if launch.numbers[s.SHARES_GLOBAL] == 0:
        return
    sync, cta = launch.sync, worker.control[s.CTA]
    time = sync[0, s.SYNC_TIME] + 1
    sync[0, s.SYNC_TIME] = time
    if sync[cta, s.FIRST_RELEASE] == 0:
        sync[cta, s.FIRST_RELEASE] = time
    release(worker, warp, sync[cta, s.RELEASED_CLOCK :])


@compiled
def acquire_global(launch, worker):
    """From now on this CTA is ordered after everything that was released."""
    if launch.numbers[s.SHARES_GLOBAL] != 0:
        launch.sync[worker.control[s.CTA], s.LAST_ACQUIRE] = launch.sync[0, s.SYNC_TIME]


@compiled
def _resolve_run(launch, worker, pc, warp, lane, space, address, size, alignment):
    """Index of ``size`` bytes, not a power of two perhaps, at an aligned address; -1 after an error."""
    _, index = resolve(launch, worker, pc, warp, lane, space, address, alignment)
    if index >= 0 and size > alignment:
        _, end = resolve(launch, worker, pc, warp, lane, space, address + np.uint64(size - 1), 1)
        index = index if end >= 0 else end
    return index


@compiled
def cp_async(launch, worker, pc, warp, mask):
    """Issue: the destination is in flight from here on."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    size = row[enc.AUX]
    for lane in range(32):
        if not (mask >> lane) & 1:
            continue
        number = worker.warps[warp, s.COPY_COUNT]
        cta = worker.control[s.CTA]
        if number >= worker.copies.shape[1]:
            fail(worker.error, s.TOO_MANY, pc, cta, warp, lane, 0, enc.SHARED, s.MAX_COPIES, 0)
            return False
        length = np.int64(regs[base + row[enc.C] * 32 + lane] & np.uint64(0xFFFFFFFF))
        if length > size:
            fail(worker.error, s.COPY_SIZE_WRONG, pc, cta, warp, lane, 0, enc.SHARED, length, size)
            return False
        address = regs[base + row[enc.A] * 32 + lane] + np.uint64(row[enc.OFFSET])
        _, target = resolve(launch, worker, pc, warp, lane, enc.SHARED, address, size)
        if target < 0:
            return False
        source = np.int64(0)
        if length:  # with nothing to read the source address does not matter
            address = regs[base + row[enc.B] * 32 + lane] + np.uint64(row[enc.AUX2])
            if address & np.uint64(size - 1):
                fail(
                    worker.error, s.MISALIGNED, pc, cta, warp, lane, np.int64(address), enc.GLOBAL, size, size
                )
                return False
            _, source = resolve(launch, worker, pc, warp, lane, enc.GLOBAL, address, size if length == size else 1)
            if source < 0:
                return False
            if length < size:
                last = address + np.uint64(length - 1)
                _, end = resolve(launch, worker, pc, warp, lane, enc.GLOBAL, last, 1)
                if end < 0:
                    return False
        if not check_write(launch, worker, pc, warp, lane, enc.SHARED, target, size, 0, False, s.IN_FLIGHT):
            return False
        entry = worker.copies[warp, number]
        entry[s.COPY_LANE], entry[s.COPY_DST], entry[s.COPY_SRC] = lane, target, source
        entry[s.COPY_SIZE], entry[s.COPY_LENGTH] = size, length
        entry[s.COPY_GROUP], entry[s.COPY_PC] = worker.groups[warp, lane], pc
        worker.warps[warp, s.COPY_COUNT] += 1
        worker.places[lane] = target
    _profile(worker, pc, enc.SHARED, mask, size)
    return True


@compiled
def cp_async_wait(launch, worker, warp, mask, pending, through_mbarrier):
    """Let arrive what was issued, but for the last ``pending`` groups of each lane (all of it if -1).

    ``through_mbarrier``: not the lanes wait but an mbarrier, and who wants to read must wait for that.
    """
    kept = 0
    if not through_mbarrier:
        worker.known[warp, s.ASYNC] = max(worker.known[warp, s.ASYNC], worker.clocks[s.ASYNC] - 1)
    for number in range(worker.warps[warp, s.COPY_COUNT]):
        entry = worker.copies[warp, number]
        lane = entry[s.COPY_LANE]
        waited = (mask >> lane) & 1 and (pending < 0 or entry[s.COPY_GROUP] < worker.groups[warp, lane] - pending)
        if not waited:
            worker.copies[warp, kept] = entry
            kept += 1
            continue
        target, source, length = entry[s.COPY_DST], entry[s.COPY_SRC], entry[s.COPY_LENGTH]
        pc = entry[s.COPY_PC]
        if not check_read(launch, worker, pc, warp, lane, enc.GLOBAL, source, length, 0):
            return False
        writer = s.ASYNC if through_mbarrier else warp
        mark = record(worker.control[s.CTA], writer, 0 if through_mbarrier else lane, worker.clocks[writer])
        for i in range(entry[s.COPY_SIZE]):
            worker.s8[target + i] = launch.g8[source + i] if i < length else np.uint8(0)
            worker.swrite[target + i] = mark
    worker.warps[warp, s.COPY_COUNT] = kept
    worker.control[s.EVENTS] += 1
    return True


@compiled
def bulk_copy(launch, worker, pc, warp, mask):
    """Issue of ``cp.async.bulk`` by each active lane."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    cta = worker.control[s.CTA]
    for lane in range(32):
        if not (mask >> lane) & 1:
            continue
        number = worker.control[s.BULK_COUNT]
        if number >= worker.bulks.shape[0]:
            fail(worker.error, s.TOO_MANY, pc, cta, warp, lane, 0, enc.SHARED, s.MAX_BULKS, 0)
            return False
        size = np.int64(regs[base + row[enc.C] * 32 + lane])
        shared_address = regs[base + row[enc.A] * 32 + lane] + np.uint64(row[enc.OFFSET])
        global_address = regs[base + row[enc.B] * 32 + lane] + np.uint64(row[enc.AUX2])
        if size <= 0 or size % 16:
            fail(worker.error, s.COPY_SIZE_WRONG, pc, cta, warp, lane, 0, enc.SHARED, size, 16)
            return False
        inside = _resolve_run(launch, worker, pc, warp, lane, enc.SHARED, shared_address, size, 16)
        if inside < 0:
            return False
        outside = _resolve_run(launch, worker, pc, warp, lane, enc.GLOBAL, global_address, size, 16)
        if outside < 0:
            return False
        entry = worker.bulks[number]
        if row[enc.OP] == enc.BULK_TO_SHARED:
            if not check_write(launch, worker, pc, warp, lane, enc.SHARED, inside, size, 0, False, s.IN_FLIGHT):
                return False
            bar = regs[base + row[enc.D] * 32 + lane] + np.uint64(row[enc.AUX])
            _, place = resolve(launch, worker, pc, warp, lane, enc.SHARED, bar, 8)
            if place < 0:
                return False
            if find_mbarrier(worker, place) < 0:
                fail(worker.error, s.NO_MBARRIER, pc, cta, warp, lane, place, enc.SHARED, 0, 0)
                return False
            entry[s.BULK_MBARRIER] = place
        elif not check_read(launch, worker, pc, warp, lane, enc.SHARED, inside, size, 0):
            return False
        entry[s.BULK_OP], entry[s.BULK_SHARED], entry[s.BULK_GLOBAL] = row[enc.OP], inside, outside
        entry[s.BULK_SIZE], entry[s.BULK_WARP], entry[s.BULK_LANE], entry[s.BULK_PC] = size, warp, lane, pc
        entry[s.BULK_GROUP] = worker.groups[warp, s.BULK_GROUPS + lane]
        worker.control[s.BULK_COUNT] += 1
    worker.control[s.EVENTS] += 1
    return True


@compiled
def bulk_arrive(launch, worker, number):
    """Let bulk copy ``number`` arrive and forget it; returns its bytes, 0 after an error."""
    entry = worker.bulks[number].copy()
    inside, outside, size = entry[s.BULK_SHARED], entry[s.BULK_GLOBAL], entry[s.BULK_SIZE]
    warp, lane, pc = entry[s.BULK_WARP], entry[s.BULK_LANE], entry[s.BULK_PC]
    worker.bulks[number] = worker.bulks[worker.control[s.BULK_COUNT] - 1]
    worker.control[s.BULK_COUNT] -= 1
    cta = worker.control[s.CTA]
    if entry[s.BULK_OP] == enc.BULK_TO_SHARED:
        if not check_read(launch, worker, pc, warp, lane, enc.GLOBAL, outside, size, 0):
            return np.int64(0)
        mark = record(cta, s.ASYNC, 0, worker.clocks[s.ASYNC])
        for i in range(size):
            worker.s8[inside + i] = launch.g8[outside + i]
            worker.swrite[inside + i] = mark
    else:
        mark = record(cta, warp, lane, worker.clocks[warp])
        for i in range(size):
            same = launch.g8[outside + i] == worker.s8[inside + i]
            if not check_write(launch, worker, pc, warp, lane, enc.GLOBAL, outside + i, 1, 0, same, mark):
                return np.int64(0)
            launch.g8[outside + i] = worker.s8[inside + i]
    worker.control[s.EVENTS] += 1
    return size


@compiled
def bulk_wait(launch, worker, warp, mask, pending):
    """``cp.async.bulk.wait_group``: let the copies to global memory arrive, but for the last ``pending`` groups."""
    number = 0
    while number < worker.control[s.BULK_COUNT]:
        entry = worker.bulks[number]
        lane = entry[s.BULK_LANE]
        if (
            entry[s.BULK_OP] == enc.BULK_TO_GLOBAL
            and entry[s.BULK_WARP] == warp
            and (mask >> lane) & 1
            and entry[s.BULK_GROUP] < worker.groups[warp, s.BULK_GROUPS + lane] - pending
        ):
            if bulk_arrive(launch, worker, number) == 0:
                return False
        else:
            number += 1
    return True
