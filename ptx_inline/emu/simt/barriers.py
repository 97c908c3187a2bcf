"""Barriers of a CTA: named ones (``bar``, ``barrier``) and mbarriers, and the order between warps that they make."""

from __future__ import annotations

import numpy as np

from ptx_inline.emu import encoding as enc
from ptx_inline.emu.simt import state as s
from ptx_inline.emu.simt.accesses import bulk_arrive
from ptx_inline.emu.simt.integers import count_ones
from ptx_inline.emu.simt.jit import compiled
from ptx_inline.emu.simt.memory import acquire, check_write, fail, find_mbarrier, release, resolve

_LOW32 = np.uint64(0xFFFFFFFF)
_MBARRIER_BYTES = 8


@compiled
def uniform(worker, base, row, mask, pc, warp):
    """The value of a register row that all lanes of ``mask`` must agree on; -1 after an error."""
    value, first = np.int64(-1), True
    for lane in range(32):
        if (mask >> lane) & 1:
            found = np.int64(worker.regs[base + row * 32 + lane] & _LOW32)
            if first:
                value, first = found, False
            elif found != value:
                fail(worker.error, s.NOT_UNIFORM, pc, worker.control[s.CTA], warp, lane, 0, 0, found, value)
                return np.int64(-1)
    return value


@compiled
def barrier(launch, worker, pc, warp, mask):
    """``bar.sync``, ``.arrive`` or ``.red`` of a whole warp. Returns READY, BLOCKED, or -1 after an error."""
    row = launch.code[pc]
    base = warp * launch.numbers[s.ROWS] * 32
    cta, error = worker.control[s.CTA], worker.error
    number = uniform(worker, base, row[enc.A], mask, pc, warp)
    if number < 0:
        return -1
    if number >= s.NAMED_BARRIERS:
        fail(error, s.BARRIER_ID_WRONG, pc, cta, warp, -1, 0, 0, number, 0)
        return -1
    expected = np.int64(0)  # all that have not exited
    if row[enc.B] >= 0:
        expected = uniform(worker, base, row[enc.B], mask, pc, warp)
        if expected < 0:
            return -1
        if expected == 0 or expected % 32:
            fail(error, s.BARRIER_ID_WRONG, pc, cta, warp, -1, 0, 0, number, expected)
            return -1
    state = worker.barriers[number]
    op = row[enc.OP]
    kind = enc.BARRIER_SYNC if op == enc.BARRIER_ARRIVE else op
    if state[s.ARRIVED] == 0:
        state[s.EXPECTED], state[s.BARRIER_OP] = expected, kind
        state[s.BARRIER_VALUE] = 1 if op == enc.BARRIER_AND else 0
        worker.bclocks[number, :] = 0
    elif state[s.EXPECTED] != expected or state[s.BARRIER_OP] != kind:
        fail(error, s.BARRIER_MISMATCH, pc, cta, warp, -1, 0, 0, number, state[s.EXPECTED])
        return -1
    if op >= enc.BARRIER_POPC:
        for lane in range(32):
            if (mask >> lane) & 1:
                p = (worker.regs[base + row[enc.C] * 32 + lane] != np.uint64(0)) != (row[enc.AUX] != 0)
                if op == enc.BARRIER_POPC:
                    state[s.BARRIER_VALUE] += p
                elif op == enc.BARRIER_AND:
                    state[s.BARRIER_VALUE] &= p
                else:
                    state[s.BARRIER_VALUE] |= p
    state[s.ARRIVED] += 32
    worker.control[s.EVENTS] += 1
    release(worker, warp, worker.bclocks[number])
    if op != enc.BARRIER_ARRIVE:
        state[s.WAITERS] |= 1 << warp
        worker.warps[warp, s.STATE] = s.BLOCKED
        worker.warps[warp, s.BARRIER_ID], worker.warps[warp, s.BARRIER_PC] = number, pc
    complete_barrier(launch, worker, number)
    return worker.warps[warp, s.STATE]


@compiled
def complete_barrier(launch, worker, number):
    """Let the waiting warps go on if all that are expected have arrived."""
    state = worker.barriers[number]
    expected = state[s.EXPECTED]
    if expected == 0:
        for warp in range(worker.warps.shape[0]):
            expected += 32 * (worker.warps[warp, s.STATE] != s.DONE)
    if state[s.ARRIVED] == 0 or state[s.ARRIVED] < expected:
        return
    for warp in range(worker.warps.shape[0]):
        if (state[s.WAITERS] >> warp) & 1:
            acquire(worker, warp, worker.bclocks[number])
            worker.warps[warp, s.STATE] = s.READY
            row = launch.code[worker.warps[warp, s.BARRIER_PC]]
            if row[enc.OP] >= enc.BARRIER_POPC and row[enc.DST] >= 0:
                base = (warp * launch.numbers[s.ROWS] + row[enc.DST]) * 32
                for lane in range(32):
                    worker.regs[base + lane] = np.uint64(state[s.BARRIER_VALUE])
    state[s.ARRIVED], state[s.WAITERS] = 0, 0
    worker.control[s.EVENTS] += 1


@compiled
def _advance(worker, number):
    """Complete the phase if nothing is pending."""
    state = worker.mbarriers[number]
    if state[s.MB_PENDING] == 0 and state[s.MB_TX] == 0:
        state[s.MB_PHASE] += 1
        state[s.MB_PENDING] = state[s.MB_COUNT]
        for other in range(s.CLOCKS):
            worker.mdone[number, other] = max(worker.mdone[number, other], worker.mclocks[number, other])
        worker.mclocks[number, :] = 0
        worker.control[s.EVENTS] += 1


@compiled
def _copies_arrive(launch, worker, number):
    """Let the bulk copies that complete on an mbarrier arrive."""
    entry = 0
    while entry < worker.control[s.BULK_COUNT]:
        bulk = worker.bulks[entry]
        if bulk[s.BULK_OP] == enc.BULK_TO_SHARED and bulk[s.BULK_MBARRIER] == worker.mbarriers[number, s.MB_ADDRESS]:
            size = bulk_arrive(launch, worker, entry)
            if size == 0:
                return
            worker.mbarriers[number, s.MB_TX] -= size
            worker.mclocks[number, s.ASYNC] = max(worker.mclocks[number, s.ASYNC], worker.clocks[s.ASYNC])
            worker.clocks[s.ASYNC] += 1
        else:
            entry += 1
    _advance(worker, number)


@compiled
def mbarrier_arrive(worker, pc, warp, lane, index, count):
    """``count`` arrivals at the mbarrier at ``index`` of shared memory; its number, -1 after an error."""
    cta = worker.control[s.CTA]
    number = find_mbarrier(worker, index)
    if number < 0:
        fail(worker.error, s.NO_MBARRIER, pc, cta, warp, lane, index, enc.SHARED, 0, 0)
        return -1
    state = worker.mbarriers[number]
    if count > state[s.MB_PENDING]:
        fail(worker.error, s.MBARRIER_OVERFLOW, pc, cta, warp, lane, index, enc.SHARED, count, state[s.MB_PENDING])
        return -1
    state[s.MB_PENDING] -= count
    worker.control[s.EVENTS] += 1
    release(worker, warp, worker.mclocks[number])
    _advance(worker, number)
    return number


@compiled
def copies_arrive_on(worker, pc, warp, lane, index, counted):
    """``cp.async.mbarrier.arrive``: an arrival that the barrier expects (``counted``, .noinc), or one more of its own."""
    number = find_mbarrier(worker, index)
    if number >= 0:
        worker.mbarriers[number, s.MB_PENDING] += not counted
        worker.mclocks[number, s.ASYNC] = max(worker.mclocks[number, s.ASYNC], worker.clocks[s.ASYNC])
    return mbarrier_arrive(worker, pc, warp, lane, index, 1) >= 0


@compiled
def _init(launch, worker, pc, warp, lane, index, count):
    cta = worker.control[s.CTA]
    if not check_write(
        launch, worker, pc, warp, lane, enc.SHARED, index, _MBARRIER_BYTES, 0, False, s.MBARRIER_OBJECT
    ):
        return
    number = worker.control[s.MBARRIER_COUNT]
    if number >= s.MAX_MBARRIERS:
        fail(worker.error, s.TOO_MANY, pc, cta, warp, lane, index, enc.SHARED, s.MAX_MBARRIERS, 0)
        return
    worker.control[s.MBARRIER_COUNT] += 1
    state = worker.mbarriers[number]
    state[s.MB_ADDRESS], state[s.MB_COUNT], state[s.MB_PENDING] = index, count, count
    state[s.MB_TX], state[s.MB_PHASE] = 0, 0
    worker.mclocks[number, :] = 0
    worker.mdone[number, :] = 0


@compiled
def _invalidate(worker, number):
    index = worker.mbarriers[number, s.MB_ADDRESS]
    worker.swrite[index : index + _MBARRIER_BYTES] = np.uint64(0)
    last = worker.control[s.MBARRIER_COUNT] - 1
    worker.mbarriers[number] = worker.mbarriers[last]
    worker.mclocks[number] = worker.mclocks[last]
    worker.mdone[number] = worker.mdone[last]
    worker.control[s.MBARRIER_COUNT] = last


@compiled
def mbarrier(launch, worker, pc, warp, mask):
    """Any mbarrier operation, lane after lane. Returns READY, STALLED where a lane's wait failed, -1 after an error."""
    row = launch.code[pc]
    regs, base = worker.regs, warp * launch.numbers[s.ROWS] * 32
    op = row[enc.OP]
    result = s.READY
    for lane in range(32):
        if not (mask >> lane) & 1:
            continue
        address = regs[base + row[enc.A] * 32 + lane] + np.uint64(row[enc.OFFSET])
        value = np.int64(regs[base + row[enc.B] * 32 + lane])
        _, index = resolve(launch, worker, pc, warp, lane, enc.SHARED, address, _MBARRIER_BYTES)
        if index < 0:
            return -1
        if op == enc.MBARRIER_INIT:
            _init(launch, worker, pc, warp, lane, index, value)
            if worker.error[s.ERROR_CODE] != s.NO_ERROR:
                return -1
            continue
        number = find_mbarrier(worker, index)
        if number < 0:
            fail(worker.error, s.NO_MBARRIER, pc, worker.control[s.CTA], warp, lane, index, enc.SHARED, 0, 0)
            return -1
        state = worker.mbarriers[number]
        target = base + row[enc.DST] * 32 + lane
        if op == enc.MBARRIER_INVALIDATE:
            _invalidate(worker, number)
        elif op == enc.MBARRIER_EXPECT:
            state[s.MB_TX] += value
        elif op in (enc.MBARRIER_ARRIVE, enc.MBARRIER_ARRIVE_EXPECT, enc.MBARRIER_ARRIVE_DROP):
            count = value
            if op == enc.MBARRIER_ARRIVE_EXPECT:
                state[s.MB_TX] += value
                count = np.int64(1)
            if op == enc.MBARRIER_ARRIVE_DROP:
                state[s.MB_COUNT] -= count
            if row[enc.DST] >= 0:
                regs[target] = np.uint64(state[s.MB_PHASE])
            if mbarrier_arrive(worker, pc, warp, lane, index, count) < 0:
                return -1
        else:
            done = _phase_done(op, state[s.MB_PHASE], value)
            if not done:
                _copies_arrive(launch, worker, number)
                if worker.error[s.ERROR_CODE] != s.NO_ERROR:
                    return -1
                done = _phase_done(op, state[s.MB_PHASE], value)
            if done:
                acquire(worker, warp, worker.mdone[number])
            else:
                result = s.STALLED
                worker.warps[warp, s.BARRIER_PC] = pc
            regs[target] = np.uint64(done)
    return result


@compiled
def _phase_done(op, phase, value):
    if op == enc.MBARRIER_TEST_PARITY:
        return (phase & 1) != (value & 1)
    return phase > value


@compiled
def waiting_warps(worker):
    """How many warps wait at a named barrier."""
    count = 0
    for number in range(s.NAMED_BARRIERS):
        count += count_ones(worker.barriers[number, s.WAITERS])
    return count
