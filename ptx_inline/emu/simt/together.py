"""What a warp's lanes do together: shuffles, votes, matches, reductions, ``ldmatrix``, ``stmatrix``, ``movmatrix``, MMA."""

from __future__ import annotations

import numpy as np

from ptx_inline.emu import encoding as enc
from ptx_inline.emu.simt import state as s
from ptx_inline.emu.simt.accesses import bank_transactions
from ptx_inline.emu.simt.barriers import uniform
from ptx_inline.emu.simt.integers import int_alu
from ptx_inline.emu.simt.jit import compiled
from ptx_inline.emu.simt.ldmatrix import M8N8_B16, ldmatrix_registers
from ptx_inline.emu.simt.memory import check_read, check_write, fail, record, resolve
from ptx_inline.emu.simt.mma import MmaTables, selector_allowed
from ptx_inline.emu.simt.mma import mma as multiply

_U0, _LOW32 = np.uint64(0), np.uint64(0xFFFFFFFF)
_ROW_BYTES = 16


@compiled
def shuffle(launch, worker, pc, warp, mask):
    """``shfl.sync``: source lane and predicate as PTX ISA's pseudocode has them."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    old = np.empty(32, np.uint64)
    for lane in range(32):
        old[lane] = regs[base + row[enc.A] * 32 + lane]
    for lane in range(32):
        if not (mask >> lane) & 1:
            continue
        b = np.int64(regs[base + row[enc.B] * 32 + lane] & np.uint64(31))
        c = np.int64(regs[base + row[enc.C] * 32 + lane])
        clamp, segment = c & 31, (c >> 8) & 31
        last = (lane & segment) | (clamp & ~segment)
        first = lane & segment
        if row[enc.OP] == enc.SHUFFLE_UP:
            source = lane - b
            inside = source >= last
        elif row[enc.OP] == enc.SHUFFLE_DOWN:
            source = lane + b
            inside = source <= last
        elif row[enc.OP] == enc.SHUFFLE_BUTTERFLY:
            source = lane ^ b
            inside = source <= last
        else:
            source = first | (b & ~segment)
            inside = source <= last
        if not inside:
            source = lane
        if not (mask >> source) & 1:
            fail(worker.error, s.INACTIVE_SOURCE, pc, worker.control[s.CTA], warp, lane, 0, 0, source, 0)
            return False
        if row[enc.DST] >= 0:
            regs[base + row[enc.DST] * 32 + lane] = old[source]
        if row[enc.DST2] >= 0:
            regs[base + row[enc.DST2] * 32 + lane] = np.uint64(inside)
    return True


@compiled
def vote(launch, worker, pc, warp, mask):
    """``vote.sync``."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    ballot = np.int64(0)
    for lane in range(32):
        if (mask >> lane) & 1 and (regs[base + row[enc.A] * 32 + lane] != _U0) != (row[enc.AUX] != 0):
            ballot |= np.int64(1) << lane
    if row[enc.OP] == enc.VOTE_BALLOT:
        result = ballot
    elif row[enc.OP] == enc.VOTE_ALL:
        result = np.int64(ballot == mask)
    elif row[enc.OP] == enc.VOTE_ANY:
        result = np.int64(ballot != 0)
    else:
        result = np.int64(ballot in (0, mask))
    for lane in range(32):
        if (mask >> lane) & 1:
            regs[base + row[enc.DST] * 32 + lane] = np.uint64(result)


@compiled
def match(launch, worker, pc, warp, mask):
    """``match.sync``: any, or all with its predicate."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    results = np.zeros(32, np.int64)
    for lane in range(32):
        if (mask >> lane) & 1:
            for other in range(32):
                if (mask >> other) & 1 and regs[base + row[enc.A] * 32 + lane] == regs[base + row[enc.A] * 32 + other]:
                    results[lane] |= np.int64(1) << other
    for lane in range(32):
        if (mask >> lane) & 1:
            alike = results[lane] == mask
            if row[enc.OP] == 1:
                results[lane] = mask if alike else 0
            if row[enc.DST] >= 0:
                regs[base + row[enc.DST] * 32 + lane] = np.uint64(results[lane])
            if row[enc.DST2] >= 0:
                regs[base + row[enc.DST2] * 32 + lane] = np.uint64(alike)


@compiled
def reduce(launch, worker, pc, warp, mask):
    """``redux.sync``."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    total, first = _U0, True
    for lane in range(32):
        if (mask >> lane) & 1:
            value = regs[base + row[enc.A] * 32 + lane]
            total = value if first else int_alu(row[enc.OP], row[enc.TYPE], 0, total, value, _U0, _U0)
            first = False
    for lane in range(32):
        if (mask >> lane) & 1:
            regs[base + row[enc.DST] * 32 + lane] = total


@compiled
def elect(launch, worker, pc, warp, mask):
    """``elect.sync``: the lowest lane."""
    row = launch.code[pc]
    base = warp * launch.numbers[s.ROWS] * 32
    leader = 0
    while not (mask >> leader) & 1:
        leader += 1
    for lane in range(32):
        if (mask >> lane) & 1:
            if row[enc.DST] >= 0:
                worker.regs[base + row[enc.DST] * 32 + lane] = np.uint64(leader)
            if row[enc.DST2] >= 0:
                worker.regs[base + row[enc.DST2] * 32 + lane] = np.uint64(lane == leader)


@compiled
def _row_places(launch, worker, pc, warp, rows, write):
    """Shared-memory indices of the rows that the first ``rows`` lanes point at, checked; False after an error."""
    row = launch.code[pc]
    base = (warp * launch.numbers[s.ROWS] + row[enc.A]) * 32
    for lane in range(rows):
        address = worker.regs[base + lane] + np.uint64(row[enc.OFFSET])
        _, index = resolve(launch, worker, pc, warp, lane, enc.SHARED, address, _ROW_BYTES)
        if index < 0:
            return False
        if not write and not check_read(launch, worker, pc, warp, lane, enc.SHARED, index, _ROW_BYTES, 0):
            return False
        worker.places[lane] = index
    mask = (np.int64(1) << rows) - 1
    worker.counts[pc, s.REQUESTS] += 1
    worker.counts[pc, s.IDEAL] += rows // 8
    worker.counts[pc, s.TRANSACTIONS] += bank_transactions(worker.places, mask, _ROW_BYTES, 8)
    return True


@compiled
def ldmatrix(launch, worker, pc, warp):
    """``ldmatrix`` of a whole warp; False after an error."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    count = row[enc.COUNT]
    if not _row_places(launch, worker, pc, warp, 8 * count, False):
        return False
    for lane in range(8 * count):
        for i in range(_ROW_BYTES):
            worker.bytes16[lane, i] = worker.s8[worker.places[lane] + i]
    out = worker.words[0]
    ldmatrix_registers(row[enc.OP], count, row[enc.AUX] != 0, worker.bytes16, out)
    for k in range(count):
        target = launch.lists[row[enc.LIST] + k]
        if target >= 0:
            for lane in range(32):
                regs[base + target * 32 + lane] = np.uint64(out[lane, k])
    return True


@compiled
def stmatrix(launch, worker, pc, warp):
    """``stmatrix`` of a whole warp, the reverse of ``ldmatrix``; False after an error."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    count = row[enc.COUNT]
    if not _row_places(launch, worker, pc, warp, 8 * count, True):
        return False
    mark_clock = worker.clocks[warp]
    for matrix_row in range(8 * count):
        k, r = matrix_row // 8, matrix_row % 8
        source = base + launch.lists[row[enc.LIST] + k] * 32
        index = worker.places[matrix_row]
        for column in range(8):
            lane, half = (4 * column + r // 2, r % 2) if row[enc.AUX] else (4 * r + column // 2, column % 2)
            value = np.uint16((regs[source + lane] >> np.uint64(16 * half)) & np.uint64(0xFFFF))
            place = index + 2 * column
            same = worker.s16[place >> 1] == value
            mark = record(worker.control[s.CTA], warp, lane, mark_clock)
            if not check_write(launch, worker, pc, warp, lane, enc.SHARED, place, 2, 0, same, mark):
                return False
            worker.s16[place >> 1] = value
    worker.control[s.EVENTS] += 1
    return True


@compiled
def movmatrix(launch, worker, pc, warp):
    """``movmatrix`` of a whole warp: what storing the matrix and ``ldmatrix.trans`` would give."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    for lane in range(32):
        word = regs[base + row[enc.A] * 32 + lane]
        for byte in range(4):
            worker.bytes16[lane // 4, 4 * (lane % 4) + byte] = np.uint8((word >> np.uint64(8 * byte)) & np.uint64(0xFF))
    out = worker.words[0]
    ldmatrix_registers(M8N8_B16, 1, True, worker.bytes16, out)
    for lane in range(32):
        regs[base + row[enc.DST] * 32 + lane] = np.uint64(out[lane, 0])


@compiled
def mma(launch, worker, pc, warp):
    """An MMA of a whole warp; False after an error."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    lists, start = launch.lists, row[enc.LIST]
    a_count, b_count = row[enc.AUX], row[enc.AUX2]
    a, b, c, d = worker.words[0], worker.words[1], worker.words[2], worker.words[3]
    for lane in range(32):
        for k in range(a_count):
            a[lane, k] = np.uint32(regs[base + lists[start + 4 + k] * 32 + lane])
        for k in range(b_count):
            b[lane, k] = np.uint32(regs[base + lists[start + 4 + a_count + k] * 32 + lane])
        for k in range(4):
            c[lane, k] = np.uint32(regs[base + lists[start + 4 + a_count + b_count + k] * 32 + lane])
    sfa, sfb = worker.words[4].reshape(128)[:32], worker.words[5].reshape(128)[:32]
    selectors = np.zeros(4, np.int64)
    if row[enc.COUNT]:
        first = start + 8 + a_count + b_count
        for lane in range(32):
            sfa[lane] = np.uint32(regs[base + lists[first] * 32 + lane])
            sfb[lane] = np.uint32(regs[base + lists[first + 3] * 32 + lane])
        numbers = launch.mma_numbers[row[enc.OP]]
        for k in range(4):
            where = first + (1, 2, 4, 5)[k]
            selectors[k] = uniform(worker, base, lists[where], 0xFFFFFFFF, pc, warp)
            if selectors[k] < 0:
                return False
            if not selector_allowed(numbers, k, selectors[k]):
                fail(worker.error, s.BAD_SELECTOR, pc, worker.control[s.CTA], warp, -1, 0, 0, selectors[k], k)
                return False
    tables = MmaTables(launch.mma_numbers, launch.mma_values, launch.mma_exponents, launch.mma_places)
    multiply(tables, row[enc.OP], selectors[0], selectors[1], selectors[2], selectors[3], a, b, c, sfa, sfb, d)
    for k in range(4):
        target = lists[start + k]
        if target >= 0:
            for lane in range(32):
                regs[base + target * 32 + lane] = np.uint64(d[lane, k])
    return True


@compiled
def named_members(launch, worker, pc, warp, lane):
    """The member mask that a lane names: at ``pc``, or where it waits."""
    if (worker.warps[warp, s.WAITING] >> lane) & 1:
        pc = worker.pcs[warp, lane]
    row = warp * launch.numbers[s.ROWS] + launch.code[pc, enc.D]
    return np.int64(worker.regs[row * 32 + lane] & _LOW32)


@compiled
def in_own_masks(launch, worker, pc, warp, mask):
    """Check that each lane of ``mask`` is in the member mask that it names."""
    for lane in range(32):
        if (mask >> lane) & 1:
            found = named_members(launch, worker, pc, warp, lane)
            if not (found >> lane) & 1:
                fail(worker.error, s.NOT_IN_MASK, pc, worker.control[s.CTA], warp, lane, 0, 0, found, 0)
                return False
    return True


@compiled
def same_members(launch, worker, pc, warp, members, live):
    """Check that the lanes ``members``, which have come together, all name just these of the live ones."""
    for lane in range(32):
        if (members >> lane) & 1:
            found = named_members(launch, worker, pc, warp, lane)
            if (found & live) != members:
                fail(worker.error, s.MASK_DIFFERS, pc, worker.control[s.CTA], warp, lane, 0, 0, found, members)
                return False
    return True
