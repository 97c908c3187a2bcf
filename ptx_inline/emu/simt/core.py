"""The interpreter: one warp until it waits, one CTA until it ends, CTA after CTA.

The lanes of a warp that stand at the lowest program counter run, until they reach where others wait, part, or end; blocks
are laid out so that this brings diverged lanes together again (:mod:`ptx_inline.emu.flow`). Lanes that must execute an
instruction together wait for each other there; if the ones still missing can no longer come, that is an error.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ptx_inline.emu import encoding as enc
from ptx_inline.emu.simt import accesses, barriers, lanes, together
from ptx_inline.emu.simt import state as s
from ptx_inline.emu.simt.integers import count_ones
from ptx_inline.emu.simt.jit import compiled, quickly
from ptx_inline.emu.simt.memory import fail

_ALL = np.int64(0xFFFFFFFF)
_FAR = np.int64(1) << 62
_SLICE = 1 << 14  # instructions of a warp before the next one's turn
_SPINS = 1 << 12  # backward branches after which waiting lanes of the same warp get a turn
_TURN = 1 << 10
_IDLE_ROUNDS = 64  # rounds of waiting warps without any event before it is a deadlock: one may poll, and then do without
_U0, _U1 = np.uint64(0), np.uint64(1)


@compiled
def _memory(launch, worker, pc, warp, mask):
    """Instructions that touch memory, lane by lane; False after an error."""
    row = launch.code[pc]
    kind = row[enc.KIND]
    if kind == enc.LOAD:
        return accesses.load(launch, worker, pc, warp, mask)
    if kind == enc.STORE:
        return accesses.store(launch, worker, pc, warp, mask)
    if kind == enc.ATOMIC:
        return accesses.atomic(launch, worker, pc, warp, mask)
    if kind == enc.CP_ASYNC:
        return accesses.cp_async(launch, worker, pc, warp, mask)
    if kind == enc.CP_ASYNC_WAIT:
        return accesses.cp_async_wait(launch, worker, warp, mask, row[enc.AUX], False)
    if kind in (enc.CP_ASYNC_COMMIT, enc.BULK_COMMIT):
        first = s.BULK_GROUPS if kind == enc.BULK_COMMIT else 0
        for lane in range(32):
            worker.groups[warp, first + lane] += (mask >> lane) & 1
        return True
    if kind == enc.FENCE:
        worker.warps[warp, s.FENCED] = 1
        return True
    if kind == enc.BULK_COPY:
        return accesses.bulk_copy(launch, worker, pc, warp, mask)
    if kind == enc.BULK_WAIT:
        return accesses.bulk_wait(launch, worker, warp, mask, row[enc.AUX])
    # CP_ASYNC_MBARRIER: the lane's copies arrive, then it does
    if not accesses.cp_async_wait(launch, worker, warp, mask, -1, True):
        return False
    base = (warp * launch.numbers[s.ROWS] + row[enc.A]) * 32
    for lane in range(32):
        if (mask >> lane) & 1:
            address = worker.regs[base + lane] + np.uint64(row[enc.OFFSET])
            index = np.int64(address & np.uint64(0xFFFFFFFF))
            if not barriers.copies_arrive_on(worker, pc, warp, lane, index, row[enc.AUX] != 0):
                return False
    worker.clocks[s.ASYNC] += 1
    return True


@compiled
def _together(launch, worker, pc, warp, mask):
    """Instructions that lanes execute together, all there. READY, BLOCKED, or -1 after an error."""
    kind = launch.code[pc, enc.KIND]
    good = True
    if kind == enc.MMA:
        good = together.mma(launch, worker, pc, warp)
    elif kind == enc.LDMATRIX:
        good = together.ldmatrix(launch, worker, pc, warp)
    elif kind == enc.STMATRIX:
        good = together.stmatrix(launch, worker, pc, warp)
    elif kind == enc.MOVMATRIX:
        together.movmatrix(launch, worker, pc, warp)
    elif kind == enc.SHUFFLE:
        good = together.shuffle(launch, worker, pc, warp, mask)
    elif kind == enc.VOTE:
        together.vote(launch, worker, pc, warp, mask)
    elif kind == enc.MATCH:
        together.match(launch, worker, pc, warp, mask)
    elif kind == enc.REDUCE:
        together.reduce(launch, worker, pc, warp, mask)
    elif kind == enc.ELECT:
        together.elect(launch, worker, pc, warp, mask)
    elif kind == enc.WARP_SYNC:
        worker.clocks[warp] += 1
    else:
        return barriers.barrier(launch, worker, pc, warp, mask)
    return s.READY if good else -1


@compiled
def _is_whole_warp(kind):
    return kind in (enc.MMA, enc.LDMATRIX, enc.STMATRIX, enc.MOVMATRIX)


@compiled
def _needed(launch, worker, pc, warp, lane, live):
    """Lanes that must come together for ``lane`` to execute the convergent instruction at ``pc``."""
    kind = launch.code[pc, enc.KIND]
    if _is_whole_warp(kind):
        return _ALL
    if kind == enc.BARRIER:
        return live
    return together.named_members(launch, worker, pc, warp, lane) & live


@compiled
def _waiting_at(launch, worker, pc, warp):
    """Lanes that wait at ``pc``; of ``bar.warp.sync`` PTX wants the same mask in all lanes, not the same instruction."""
    anywhere = launch.code[pc, enc.KIND] == enc.WARP_SYNC
    here = np.int64(0)
    for lane in range(32):
        if (worker.warps[warp, s.WAITING] >> lane) & 1:
            where = worker.pcs[warp, lane]
            here |= np.int64(where == pc or (anywhere and launch.code[where, enc.KIND] == enc.WARP_SYNC)) << lane
    return here


@compiled
def _assemble(launch, worker, pc, warp, mask, live):
    """Lanes that execute a convergent instruction now, once ``mask`` has arrived: 0 to wait, -1 after an error."""
    kind = launch.code[pc, enc.KIND]
    has_members = not _is_whole_warp(kind) and kind != enc.BARRIER
    if _is_whole_warp(kind) and live != _ALL:
        fail(worker.error, s.LANES_GONE, pc, worker.control[s.CTA], warp, -1, 0, 0, _ALL & ~live, 0)
        return np.int64(-1)
    if has_members and not together.in_own_masks(launch, worker, pc, warp, mask):
        return np.int64(-1)
    here = mask | _waiting_at(launch, worker, pc, warp)
    for lane in range(32):  # lanes that arrive together may name several masks, each the lanes of one group
        if (mask >> lane) & 1:
            needed = _needed(launch, worker, pc, warp, lane, live)
            if here & needed == needed:
                if has_members and not together.same_members(launch, worker, pc, warp, needed, live):
                    return np.int64(-1)
                return needed
    return np.int64(0)


@compiled
def _release_waiting(launch, worker, warp, live):
    """Where all lanes of a warp wait, let go those whose partners have ended since; false after an error if there are none.

    PTX and CUDA want the *non-exited* ones of the lanes that are named.
    """
    waiting = worker.warps[warp, s.WAITING]
    pcs = worker.pcs[warp]
    first = -1
    for lane in range(32):
        if (waiting >> lane) & 1:
            needed = _needed(launch, worker, pcs[lane], warp, lane, live)
            if _waiting_at(launch, worker, pcs[lane], warp) & needed == needed:
                worker.warps[warp, s.WAITING] = waiting & ~needed
                for other in range(32):  # they are about to be counted again
                    if (needed >> other) & 1:
                        worker.counts[pcs[other], s.LANES] -= 1
                return True
            if first < 0 or pcs[lane] < pcs[first]:
                first = lane
    pc, cta = pcs[first], worker.control[s.CTA]
    here = _waiting_at(launch, worker, pc, warp)
    missing = _needed(launch, worker, pc, warp, first, live) & ~here
    if missing & live == 0:
        fail(worker.error, s.LANES_GONE, pc, cta, warp, -1, 0, 0, missing, 0)
    else:
        fail(worker.error, s.NOT_TOGETHER, pc, cta, warp, first, 0, 0, here, missing & live)
    return False


@compiled
def _park(pcs, mask, pc):
    for lane in range(32):
        if (mask >> lane) & 1:
            pcs[lane] = pc


@compiled
def run_warp(launch, worker, warp):
    """Run a warp until it waits, ends, has had its turn, fails (-1) or comes to a breakpoint (-3); else its state."""
    code, regs, counts = launch.code, worker.regs, worker.counts
    pcs = worker.pcs[warp]
    base = warp * launch.numbers[s.ROWS] * 32
    limit = launch.numbers[s.LIMIT]
    budget = _SLICE
    turn, avoid = 0, np.int64(0)
    steps = worker.control[s.STEPS]
    while True:
        # the lanes at the lowest program counter
        live = _ALL & ~worker.warps[warp, s.EXITED]
        runnable = live & ~worker.warps[warp, s.WAITING]
        worker.control[s.STEPS] = steps
        if live == 0:
            return s.DONE
        if runnable == 0:
            if not _release_waiting(launch, worker, warp, live):
                return -1
            continue
        if budget <= 0:
            return s.READY
        pc, following = _FAR, _FAR
        if worker.warps[warp, s.SPINS] > _SPINS:  # the lowest lanes seem to wait for the others
            worker.warps[warp, s.SPINS], turn, avoid = 0, _TURN, np.int64(0)
            lowest = _FAR
            for lane in range(32):
                if (runnable >> lane) & 1:
                    lowest = min(lowest, pcs[lane])
            for lane in range(32):
                if (runnable >> lane) & 1 and pcs[lane] == lowest:
                    avoid |= np.int64(1) << lane
        if turn == 0 or runnable & ~avoid == 0:
            turn, avoid = 0, np.int64(0)
        mask = np.int64(0)
        for lane in range(32):
            if ((runnable & ~avoid) >> lane) & 1:
                if pcs[lane] < pc:
                    pc, following = pcs[lane], pc
                    mask = np.int64(1) << lane
                elif pcs[lane] == pc:
                    mask |= np.int64(1) << lane
                else:
                    following = min(following, pcs[lane])
        if following == _FAR and avoid == 0:
            worker.warps[warp, s.SPINS] = 0
        while True:
            if pc >= following or budget <= 0:
                _park(pcs, mask, pc)
                break
            if turn > 0:
                turn -= 1
                if turn == 0:
                    _park(pcs, mask, pc)
                    break
            if launch.breaks[pc] != 0 and worker.control[s.RESUMED] == 0:
                _park(pcs, mask, pc)
                worker.control[s.STEPS] = steps
                worker.control[s.STOPPED_MASK] = mask
                return -3
            worker.control[s.RESUMED] = 0
            row = code[pc]
            kind = row[enc.KIND]
            if kind == enc.JUMP:
                if row[enc.AUX] <= pc and following != _FAR:
                    worker.warps[warp, s.SPINS] += 1
                    if worker.warps[warp, s.SPINS] > _SPINS:
                        _park(pcs, mask, row[enc.AUX])
                        break
                pc = row[enc.AUX]
                continue
            active = mask
            if row[enc.GUARD] >= 0:
                guard = base + row[enc.GUARD] * 32
                true = np.int64(0)
                for lane in range(32):
                    true |= np.int64(regs[guard + lane] & _U1) << lane
                active = mask & (~true if row[enc.GUARD_NEGATED] else true)
            counts[pc, s.ISSUED] += 1
            counts[pc, s.LANES] += count_ones(active)
            steps += 1
            budget -= 1
            if steps > limit:
                fail(worker.error, s.TOO_LONG, pc, worker.control[s.CTA], warp, -1, 0, 0, limit, 0)
                return -1
            if active == 0:
                pc += 1
            elif kind == enc.INT:
                lanes.integers(row, regs, base, active)
                pc += 1
            elif kind == enc.FLOAT:
                lanes.floats(row, regs, base, active)
                pc += 1
            elif kind == enc.CONVERT:
                lanes.conversions(row, regs, base, active)
                pc += 1
            elif kind == enc.COMPARE:
                lanes.comparisons(row, regs, base, active)
                pc += 1
            elif kind <= enc.CLOCK:
                lanes.moves(row, launch.lists, regs, base, active, steps)
                pc += 1
            elif kind == enc.NOP:
                pc += 1
            elif kind <= enc.FENCE or kind in (enc.BULK_COPY, enc.BULK_COMMIT, enc.BULK_WAIT):
                if not _memory(launch, worker, pc, warp, active):
                    return -1
                pc += 1
            elif kind == enc.ACTIVE_MASK:
                for lane in range(32):
                    if (active >> lane) & 1:
                        regs[base + row[enc.DST] * 32 + lane] = np.uint64(active)
                pc += 1
            elif kind == enc.BRANCH:
                target = row[enc.AUX]
                if target <= pc and following != _FAR:
                    worker.warps[warp, s.SPINS] += 1
                    if worker.warps[warp, s.SPINS] > _SPINS:
                        _park(pcs, mask, pc + 1)
                        _park(pcs, active, target)
                        break
                if active == mask:
                    pc = target
                else:
                    _park(pcs, mask, pc + 1)
                    _park(pcs, active, target)
                    break
            elif kind == enc.EXIT:
                worker.warps[warp, s.EXITED] |= active
                worker.control[s.EVENTS] += 1
                _park(pcs, mask, pc + 1)
                break
            elif kind == enc.BRANCH_INDEXED:
                _park(pcs, mask, pc + 1)
                for lane in range(32):
                    if (active >> lane) & 1:
                        choice = np.int64(regs[base + row[enc.A] * 32 + lane])
                        if choice >= row[enc.COUNT]:
                            fail(
                                worker.error, s.BAD_BRANCH, pc, worker.control[s.CTA], warp, lane, 0, 0, choice,
                                row[enc.COUNT],
                            )  # fmt: skip
                            return -1
                        pcs[lane] = launch.lists[row[enc.LIST] + choice]
                worker.warps[warp, s.SPINS] += following != _FAR
                break
            elif kind == enc.MBARRIER:
                _park(pcs, mask, pc + 1)
                state = barriers.mbarrier(launch, worker, pc, warp, active)
                if state != s.READY:
                    if following != _FAR:  # it may be other lanes of the warp that are waited for
                        worker.warps[warp, s.SPINS] += _SPINS // 8
                    worker.control[s.STEPS] = steps
                    return state
                pc += 1
            elif kind == enc.TRAP:
                fail(worker.error, s.TRAPPED, pc, worker.control[s.CTA], warp, -1, 0, 0, active, 0)
                return -1
            else:  # together
                _park(pcs, mask, pc + 1)
                ready = _assemble(launch, worker, pc, warp, active, live)
                if ready < 0:
                    return -1
                if ready == 0:
                    _park(pcs, active, pc)
                    worker.warps[warp, s.WAITING] |= active
                    break
                worker.warps[warp, s.WAITING] &= ~ready
                for lane in range(32):
                    if ((ready & ~active) >> lane) & 1:  # from where it waited
                        pcs[lane] += 1
                left = active & ~ready  # another group, to come next
                _park(pcs, left, pc)
                counts[pc, s.LANES] -= count_ones(left)
                state = _together(launch, worker, pc, warp, ready)
                if state != s.READY:
                    worker.control[s.STEPS] = steps
                    return state
                if ready == mask:
                    pc += 1
                else:
                    break


@compiled
def _axis(number, x, y, axis):
    """Coordinate of the ``number``-th of a box of x by y by any."""
    if axis == 0:
        return number % x
    return number // x % y if axis == 1 else number // (x * y)


@compiled
def _special(numbers, cta, warp, lane, code):
    """Value of a special register."""
    if code < enc.NTID:
        return _axis(warp * 32 + lane, numbers[s.BLOCK_X], numbers[s.BLOCK_Y], code - enc.TID)
    if code < enc.CTAID:
        return numbers[s.BLOCK_X + code - enc.NTID]
    if code < enc.NCTAID:
        return _axis(cta, numbers[s.GRID_X], numbers[s.GRID_Y], code - enc.CTAID)
    if code < enc.LANEID:
        return numbers[s.GRID_X + code - enc.NCTAID]
    if code == enc.LANEID:
        return lane
    if code == enc.WARPID:
        return warp
    if code == enc.NWARPID:
        return numbers[s.WARPS]
    if code in (enc.SMID, enc.GRIDID):  # one multiprocessor, one grid
        return np.int64(0)
    if code == enc.TOTAL_SMEM_SIZE:
        return numbers[s.SHARED_BYTES]
    if code == enc.DYNAMIC_SMEM_SIZE:
        return numbers[s.SHARED_BYTES] - numbers[s.STATIC_SHARED]
    if code == enc.WARP_SIZE:
        return np.int64(32)
    one = np.int64(1) << lane
    if code == enc.MASK_EQ:
        return one
    if code == enc.MASK_LT:
        return one - 1
    if code == enc.MASK_LE:
        return 2 * one - 1
    if code == enc.MASK_GT:
        return _ALL & ~(2 * one - 1)
    return _ALL & ~(one - 1)


@compiled
def start_cta(launch, worker, cta):
    """Everything as it is when a CTA begins: registers zero but for constants and special registers, memory unwritten."""
    numbers = launch.numbers
    rows, warps = numbers[s.ROWS], numbers[s.WARPS]
    worker.control[s.CTA], worker.control[s.NEXT_WARP], worker.control[s.RESUMED] = cta, 0, 0
    worker.control[s.STEPS], worker.control[s.BULK_COUNT], worker.control[s.MBARRIER_COUNT] = 0, 0, 0
    worker.regs[:] = _U0
    for warp in range(warps):
        base = warp * rows * 32
        for row in range(rows):
            if launch.presets[row] != _U0:
                worker.regs[base + row * 32 : base + row * 32 + 32] = launch.presets[row]
        for k in range(launch.specials.shape[0]):
            for lane in range(32):
                value = _special(numbers, cta, warp, lane, launch.specials[k, 1])
                worker.regs[base + launch.specials[k, 0] * 32 + lane] = np.uint64(value)
    worker.warps[:] = 0
    for warp in range(warps):
        for lane in range(32):
            if warp * 32 + lane >= numbers[s.THREADS]:
                worker.warps[warp, s.EXITED] |= np.int64(1) << lane
    worker.pcs[:] = 0
    worker.s8[:] = np.uint8(0xCD)
    worker.l8[:] = np.uint8(0xCD)
    worker.swrite[:] = _U0
    worker.sreaders[:] = np.uint32(0)
    worker.linit[:] = np.uint8(0)
    worker.clocks[:] = 1
    worker.known[:] = 0
    worker.barriers[:] = 0
    worker.groups[:] = 0


@compiled
def _stuck(worker):
    """The error of a CTA in which no warp can go on."""
    cta = worker.control[s.CTA]
    waiting = barriers.waiting_warps(worker)
    for warp in range(worker.warps.shape[0]):
        if worker.warps[warp, s.STATE] == s.STALLED:
            fail(worker.error, s.DEADLOCK, worker.warps[warp, s.BARRIER_PC], cta, warp, -1, 0, 0, waiting, 0)
    for warp in range(worker.warps.shape[0]):
        if worker.warps[warp, s.STATE] == s.BLOCKED:
            number = worker.warps[warp, s.BARRIER_ID]
            fail(
                worker.error, s.BARRIER_STUCK, worker.warps[warp, s.BARRIER_PC], cta, warp, -1, 0, 0, number,
                worker.barriers[number, s.ARRIVED],
            )  # fmt: skip


@compiled
def _after_turn(launch, worker, warp, state):
    """Note how a warp's turn ended; true if it could have gone on."""
    if state != s.BLOCKED:
        worker.warps[warp, s.STATE] = state
    if state == s.DONE:  # barriers do not wait for those that have ended
        for number in range(s.NAMED_BARRIERS):
            if worker.barriers[number, s.ARRIVED]:
                barriers.complete_barrier(launch, worker, number)
    return state == s.READY


@compiled
def _is_running(worker):
    running = False
    for warp in range(worker.warps.shape[0]):
        running |= worker.warps[warp, s.STATE] != s.DONE
    return running


def make_run(digest: int, cache: bool):
    """The compiled core as one function, kept in Numba's cache if ``cache``.

    ``digest`` of the emulator's sources makes the cache notice a change: Numba compares the file of the cached function
    alone, but also what the function closes over.
    """

    @quickly
    @njit(nogil=True, error_model="numpy", cache=cache)
    def run(launch_table, worker_table, last, resume):
        """Run CTAs from ``control[NEXT_CTA]`` up to ``last``; returns FINISHED, STOPPED at a breakpoint, or FAILED."""
        if digest < 0:
            return s.FAILED
        launch, worker = s.launch_handle(launch_table), s.worker_handle(worker_table)
        if resume:
            worker.control[s.RESUMED] = 1
        while worker.control[s.NEXT_CTA] < last:
            if not resume:
                start_cta(launch, worker, worker.control[s.NEXT_CTA])
            resume, running, idle = False, True, 0
            while running:  # one turn for every warp that can go on
                events, progress = worker.control[s.EVENTS], False
                for warp in range(worker.control[s.NEXT_WARP], launch.numbers[s.WARPS]):
                    if worker.warps[warp, s.STATE] not in (s.READY, s.STALLED):
                        continue
                    state = run_warp(launch, worker, warp)
                    if state < 0:
                        worker.control[s.NEXT_WARP] = warp
                        return s.FAILED if state == -1 else s.STOPPED
                    progress |= _after_turn(launch, worker, warp, state)
                worker.control[s.NEXT_WARP] = 0
                running = _is_running(worker)
                idle = 0 if progress or worker.control[s.EVENTS] != events else idle + 1
                if running and idle > _IDLE_ROUNDS:
                    _stuck(worker)
                    return s.FAILED
            worker.control[s.NEXT_CTA] += 1
        return s.FINISHED

    return run
