"""Lanes that should come together and do not, and barriers of a CTA that are used in ways that do not fit."""

import re

import numpy as np
import pytest
from crime_scene import is_crime, is_legal

from ptx_inline.emu import BarrierError, DeadlockError, DivergenceError

BYTES = np.zeros(16, np.uint8)
HALVES = "setp.lt.u32 %p2, %r1, 16;\n"
MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r0, %r0, %r0, %r0}, {%r0, %r0}, "
    "{%f4, %f4, %f4, %f4};"
)
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [shared];"
MOVMATRIX = "movmatrix.sync.aligned.m8n8.trans.b16 %r5, %r1;"


def apart(here, missing):
    return f"{here} wait at an instruction that lanes must execute together; {missing} will not come"


#: Lanes 0-15 execute an instruction while the others wait at a barrier behind it.
HALF = HALVES + "@!%p2 bra OTHER;\n{} // HERE\nOTHER: bar.sync 0;"
ALIGNED = [
    MMA,
    LDMATRIX,
    MOVMATRIX,
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [shared], {%r0};",
    "bar.sync 1;",
    "bar.red.popc.u32 %r5, 1, %p2;",
    "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;",
    "vote.sync.ballot.b32 %r5, %p2, -1;",
    "match.any.sync.b32 %r5, %r1, -1;",
    "redux.sync.add.u32 %r5, %r1, -1;",
    "elect.sync %r5|%p4, -1;",
    "bar.warp.sync -1;",
]


@pytest.mark.parametrize("instruction", ALIGNED, ids=lambda text: text.split()[0])
def test_half_a_warp(instruction):
    is_crime(DivergenceError, apart("lanes 0-15", "lanes 16-31"), HALF.format(instruction), lane=0)


@pytest.mark.parametrize("instruction", ALIGNED, ids=lambda text: text.split()[0])
def test_half_a_warp_by_a_guard(instruction):
    """The same with a guard instead of a branch."""
    body = HALVES + f"@!%p2 {instruction} // HERE\nbar.sync 0;"
    with pytest.raises(DivergenceError) as caught:
        is_legal(body)
    assert re.match(r"lanes [-0-9]+ wait at .*; lanes [-0-9]+ will not come\n", str(caught.value))
    assert {text in str(caught.value) for text in ("lanes 0-15", "lanes 16-31")} == {True}


def test_the_two_sides_of_a_branch_at_two_barriers():
    body = HALVES + "@!%p2 bra OTHER;\nbar.sync 0;\nret;\nOTHER: bar.sync 0; // HERE"
    is_crime(DivergenceError, apart("lanes 16-31", "lanes 0-15"), body, lane=16)


@pytest.mark.parametrize("matrix", [MMA, LDMATRIX, MOVMATRIX], ids=["mma", "ldmatrix", "movmatrix"])
def test_matrix_instructions_with_exited_lanes(matrix):
    """The lanes must be there: not exited before, after, or never started."""
    before = f"setp.gt.u32 %p2, %r1, 29;\n@%p2 ret;\n{matrix} // HERE"
    gone = "a whole warp must execute this instruction, but lanes 30-31 has ended"
    is_crime(DivergenceError, gone.replace("has", "have"), before)
    after = f"setp.gt.u32 %p2, %r1, 29;\n@!%p2 bra MATRIX;\nret;\nMATRIX: {matrix} // HERE"
    is_crime(DivergenceError, gone.replace("has", "have"), after)
    one = f"setp.eq.u32 %p2, %r1, 4;\n@%p2 ret;\n{matrix} // HERE"
    is_crime(DivergenceError, gone.replace("lanes 30-31", "lane 4"), one)
    never = f"@!%p1 {matrix} // HERE"
    is_crime(DivergenceError, gone.replace("lanes 30-31 has", "lanes 8-31 have"), never, block=(40,), warp=1)


def test_barriers_do_not_count_exited_lanes():
    is_legal("setp.gt.u32 %p2, %r1, 20;\n@%p2 ret;\nbar.sync 0;", block=(64,))
    is_legal("setp.gt.u32 %p2, %r1, 20;\n@!%p2 bra BARRIER;\nret;\nBARRIER: bar.sync 0;", block=(64,))


def test_member_masks():
    shuffle = "shfl.sync.idx.b32 %r5, %r1, {}, 31, {}; // HERE"
    body = HALVES + "selp.b32 %r6, 0xFFFF, 0xFFFFFFFF, %p2;\n" + shuffle.format(0, "%r6")
    # lanes 0-15 have left as a group of their own
    is_crime(DivergenceError, apart("lanes 16-31", "lanes 0-15"), body + "\nbar.sync 0;", lane=16)
    body = HALVES + "selp.b32 %r6, 0xFFFFFFFF, 0xFFFF0000, %p2;\n" + shuffle.format(0, "%r6")
    message = "lanes name different member masks: 0xffff0000, where those here are 0xffffffff"
    is_crime(DivergenceError, message, body, lane=16)
    message = "the lane is not in the member mask 0xfffffff7 that it names"
    is_crime(DivergenceError, message, shuffle.format(0, "0xFFFFFFF7"), lane=3)
    body = "setp.lt.u32 %p2, %r1, 8;\n@%p2 " + shuffle.format("%r7", "0xFF")
    is_crime(DivergenceError, "shuffle from lane 12, which does not take part", "xor.b32 %r7, %r1, 12;\n" + body, lane=0)


# barriers


def test_barriers_of_other_numbers():
    body = "add.u32 %r5, %r2, 3;\nbar.sync %r5; // HERE"
    is_crime(BarrierError, "barrier 3: 32 threads have arrived, and no other warp can go on", body, block=(64,))
    is_legal(body, block=(32,))


def test_barrier_number_that_differs_between_lanes():
    message = "an operand must be the same in all lanes of the warp, got 1 and 0"
    is_crime(DivergenceError, message, "bar.sync %r1; // HERE", lane=1)


def test_thread_counts_that_do_not_fit():
    body = "mad.lo.u32 %r5, %r2, 32, 64;\nbar.sync 1, %r5; // HERE"
    message = "barrier 1 is used in two ways at once: another operation, or another thread count than 64"
    is_crime(BarrierError, message, body, block=(64,), warp=1)
    body = "@%p1 bar.sync 2;\n@!%p1 bar.sync 2, 64; // HERE"
    message = "barrier 2 is used in two ways at once: another operation, or another thread count than all"
    is_crime(BarrierError, message, body, block=(64,), warp=1)
    body = "@%p1 bar.sync 2;\n@!%p1 bar.red.or.pred %p5, 2, %p0; // HERE"
    is_crime(BarrierError, message, body, block=(64,), warp=1)


def test_count_that_never_fills():
    message = "barrier 1: 64 threads have arrived, and no other warp can go on"
    is_crime(BarrierError, message, "bar.sync 1, 96; // HERE", block=(64,))


def test_arrivals_alone_hold_nobody():
    is_legal("bar.arrive 1, 128;", block=(64,))


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ("16", "barrier must be 0 to 15 and its thread count a positive multiple of 32, got 16"),
        ("1, 48", "barrier must be 0 to 15 and its thread count a positive multiple of 32, got 1 and 48"),
        ("1, 0", "barrier must be 0 to 15 and its thread count a positive multiple of 32, got 1 and 0"),
    ],
)
def test_wrong_operands(operands, message):
    is_crime(BarrierError, message, f"bar.sync {operands}; // HERE", block=(64,))


# mbarriers

INIT = "@%p0 mbarrier.init.shared.b64 [shared+8], {};\nbar.sync 0;\n"


def test_wait_for_an_mbarrier_that_nobody_arrives_at():
    wait = "WAIT: {}mbarrier.try_wait.parity.shared.b64 %p5, [shared+8], 0; // HERE\n{}@!%p5 bra WAIT;"
    message = "deadlock: this warp waits for an mbarrier, 0 warps wait at barriers, and none can go on"
    is_crime(DeadlockError, message, INIT.format(1) + wait.format("", ""))
    # a lane that is not the first, while the other warps are at a barrier
    last = "setp.ne.u32 %p2, %r0, 70;\n@%p2 bra JOIN;\n" + wait.format("", "") + "\nJOIN: bar.sync 0;"
    is_crime(DeadlockError, message.replace("0 warps", "2 warps"), INIT.format(1) + last, block=(96,), warp=2)


def test_polling_is_no_deadlock():
    """Who looks once, and does something else, is not stuck."""
    poll = "mbarrier.test_wait.parity.shared.b64 %p5, [shared+8], 0;\n" * 20
    body = INIT.format(32) + poll + "mbarrier.arrive.shared.b64 %rd9, [shared+8];\nst.global.u8 [%rd0], 1;"
    assert is_legal(body, [BYTES])[0][:1].tolist() == [1]


def test_a_lane_may_wait_for_lanes_of_its_own_warp():
    body = INIT.format(31) + """
    @!%p0 bra ARRIVE;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p5, [shared+8], 0;
    @!%p5 bra WAIT;
    st.global.u8 [%rd0], 9;
    ret;
    ARRIVE: mbarrier.arrive.shared.b64 %rd9, [shared+8];"""
    assert is_legal(body, [BYTES])[0][:1].tolist() == [9]


@pytest.mark.parametrize(
    "operation",
    [
        "mbarrier.arrive.shared.b64 %rd9, [shared];",
        "mbarrier.try_wait.parity.shared.b64 %p5, [shared], 0;",
        "mbarrier.expect_tx.relaxed.cta.shared.b64 [shared], 16;",
        "mbarrier.inval.shared.b64 [shared];",
        "cp.async.mbarrier.arrive.shared.b64 [shared];",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [shared+16], [%rd0], 16, [shared];",
    ],
    ids=lambda text: text.split()[0],
)
def test_no_mbarrier(operation):
    message = "no mbarrier has been initialised at this address"
    is_crime(BarrierError, message, f"@%p0 {operation} // HERE", [BYTES], lane=0, address=0)
    moved = INIT.format(1) + f"@%p0 {operation} // HERE"
    is_crime(BarrierError, message, moved, [BYTES], lane=0, address=0)


def test_too_many_arrivals():
    body = INIT.format(3) + "mbarrier.arrive.shared.b64 %rd9, [shared+8], 2; // HERE"
    is_crime(BarrierError, "2 arrivals at an mbarrier that expects 1 more in this phase", body, lane=1, address=8)


def test_invalidated_mbarrier():
    body = INIT.format(1) + """
    @%p0 mbarrier.inval.shared.b64 [shared+8];
    @%p0 mbarrier.arrive.shared.b64 %rd9, [shared+8]; // HERE"""
    is_crime(BarrierError, "no mbarrier has been initialised at this address", body, lane=0, address=8)
    is_legal(INIT.format(1) + "@%p0 mbarrier.inval.shared.b64 [shared+8];\n@%p0 st.shared.u32 [shared+8], %r0;")
