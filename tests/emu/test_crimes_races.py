"""Races in shared and global memory, and that each way of ordering two accesses makes them legal."""

import numpy as np
import pytest
from crime_scene import is_crime, is_legal, race, words

from ptx_inline.emu import MemoryAccessError, RaceError

STORE, LOAD = "st.shared.u32 [{}], %r0;", "ld.shared.u32 %r5, [{}];"
SHARED = "shared memory"
#: Two accesses of a conflict, what the first thread has done to the byte, and what the second does to it.
CONFLICTS = {"WAW": (STORE, STORE, "written", "write"), "RAW": (STORE, LOAD, "written", "read"),
             "WAR": (LOAD, STORE, "read", "write")}  # fmt: skip
#: Fills shared memory, so that reads of it are of something. The warp that completes a barrier goes on first: after two of
#: them, warp 0 of two.
FILL = """
@!%p1 bra FILLED;
st.shared.u32 [%r3], 1000;
st.shared.u32 [%r3+128], 1000;
FILLED: bar.sync 0;
bar.sync 0;
"""
#: Warp 0 makes the first access and warp 1 the second; each to the other's word of the first.
WARPS = """
{fill}
@!%p1 bra SECOND;
{first}
{after}
bra END;
SECOND: {before}
{second}
END:
"""


def between_warps(conflict, after="", before=""):
    first, second, *_ = CONFLICTS[conflict]
    first, second = first.format("%r3"), second.format("%r3+-128") + " // HERE"
    return WARPS.format(fill=FILL, first=first, second=second, after=after, before=before)


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_between_warps(conflict):
    theirs, mine = CONFLICTS[conflict][2:]
    is_crime(RaceError, race(mine, theirs, 0, 0, SHARED), between_warps(conflict), block=(64,), warp=1, lane=0, address=0)


WAIT = "{name}: mbarrier.try_wait.parity.shared.b64 %p5, [shared+248], 0;\n@!%p5 bra {name};"
ORDERS = {
    "barrier": ("bar.sync 0;", "bar.sync 0;"),
    "barrier with a count": ("barrier.sync 3, 64;", "barrier.sync 3, 64;"),
    "barrier with a reduction": ("bar.red.popc.u32 %r9, 2, %p0;", "bar.red.popc.u32 %r9, 2, %p0;"),
    "arrival and barrier": ("bar.arrive 1, 64;", "bar.sync 1, 64;"),
    "mbarrier": ("mbarrier.arrive.shared.b64 %rd9, [shared+248];", WAIT.format(name="WAIT")),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("conflict", CONFLICTS)
def test_ordered_warps(conflict, order):
    body = between_warps(conflict, *ORDERS[order])
    if order == "mbarrier":
        body = "@%p0 mbarrier.init.shared.b64 [shared+248], 32;\nbar.sync 0;\n" + body.replace("[%r3+128]", "[%r3+64]")
    is_legal(body, block=(64,))


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_who_only_arrives_has_heard_of_nobody(conflict):
    """Arrival and wait the wrong way round: the second thread arrives and goes on."""
    theirs, mine = CONFLICTS[conflict][2:]
    body = between_warps(conflict, "bar.sync 1, 64;", "bar.arrive 1, 64;")
    is_crime(RaceError, race(mine, theirs, 0, 0, SHARED), body, block=(64,), warp=1, lane=0, address=0)


@pytest.mark.parametrize("conflict", CONFLICTS)
@pytest.mark.parametrize("sync", [False, True])
def test_between_lanes_of_a_warp(conflict, sync):
    """Each lane accesses its word, then that of the lane before it: a race without bar.warp.sync."""
    first, second, theirs, mine = CONFLICTS[conflict]
    order = "bar.warp.sync -1;" if sync else ""
    guard = "setp.gt.u32 %p2, %r1, 0;\n@%p2 "
    body = FILL + first.format("%r3") + f"\n{order}\n{guard}" + second.format("%r3+-4") + " // HERE"
    if sync:
        is_legal(body)
    else:
        is_crime(RaceError, race(mine, theirs, 0, 0, SHARED), body, lane=1, address=0)


def test_lanes_that_write_one_word():
    """In one instruction which value stays is undefined; the same value is no harm."""
    body = FILL + "st.shared.u32 [shared], {}; // HERE"
    is_crime(RaceError, race("write", "written", 0, 0, SHARED), body.format("%r1"), lane=1, address=0)
    is_legal(body.format(7))


def test_warps_that_write_the_same_value():
    is_legal(FILL + "st.shared.u32 [shared], 5;", block=(96,))


def test_many_readers():
    """A write must be ordered after all of them, not only after the last."""
    body = FILL + """
    ld.shared.u32 %r5, [shared];
    {}
    setp.eq.u32 %p2, %r0, 64;
    @%p2 st.shared.u32 [shared], 3; // HERE"""
    is_legal(body.format("bar.sync 0;"), block=(96,))
    is_crime(RaceError, race("write", "read", 1, None, SHARED), body.format(""), block=(96,), warp=2, lane=0, address=0)


def test_atomics_do_not_race_with_each_other():
    is_legal(FILL + "atom.shared.add.u32 %r5, [shared], 1;\nred.shared.max.u32 [shared], %r0;", block=(96,))
    is_legal(FILL + "st.volatile.shared.u32 [shared], %r0;\nld.volatile.shared.u32 %r5, [shared];", block=(96,))


def test_atomics_race_with_plain_accesses():
    atomic = "red.shared.add.u32 [%r3], 1;"
    body = WARPS.format(fill=FILL, first=atomic, second="ld.shared.u32 %r5, [%r3+-128]; // HERE", after="", before="")
    is_crime(RaceError, race("read", "written", 0, 0, SHARED), body, block=(64,), warp=1, lane=0, address=0)
    second = atomic.replace("%r3", "%r3+-128") + " // HERE"
    for first, theirs, mine in ((STORE, "written", "read"), (LOAD, "read", "write")):
        body = WARPS.format(fill=FILL, first=first.format("%r3"), second=second, after="", before="")
        is_crime(RaceError, race(mine, theirs, 0, 0, SHARED), body, block=(64,), warp=1, lane=0, address=0)


def test_a_thread_may_read_what_its_own_atomic_left():
    is_legal(FILL + "red.shared.add.u32 [%r3], 1;\nld.shared.u32 %r5, [%r3];\nst.shared.u32 [%r3], 2;")
    is_legal(FILL + "st.volatile.shared.u32 [%r3], 1;\nld.shared.u32 %r5, [%r3];")
    is_legal("red.global.add.u32 [%rd0], 1;\nld.global.u32 %r5, [%rd0];", [words(1)], block=(1,))


def test_a_word_of_several_threads_atomics_is_nobodys_own():
    """The last of the lanes that added is not alone: its plain read races with the others' atomics."""
    body = FILL + """
    red.shared.add.u32 [shared], 1;
    {}
    setp.eq.u32 %p2, %r1, 31;
    @%p2 ld.shared.u32 %r5, [shared]; // HERE"""
    is_crime(RaceError, race("read", "written", 0, None, SHARED), body.format(""), lane=31, address=0)
    is_legal(body.format("bar.warp.sync -1;"))


def test_stmatrix_and_ldmatrix_take_part():
    matrix = "mov.u32 %r8, shared;\nand.b32 %r9, %r1, 7;\nshl.b32 %r9, %r9, 4;\nadd.u32 %r8, %r8, %r9;\n"
    body = matrix + "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r8], {%r0};\n"
    body += "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r8]; // HERE"
    is_crime(RaceError, race("read", "written", 0, 1, SHARED), body, lane=0, address=4)
    is_legal(body.replace("ldmatrix", "bar.warp.sync -1;\nldmatrix"))


def test_what_an_mbarrier_copies_needs_the_mbarrier():
    """cp.async.mbarrier.arrive: even the lane that copied must wait for the barrier."""
    body = """
    @%p0 mbarrier.init.shared.b64 [shared+248], 1;
    @%p0 cp.async.ca.shared.global [shared], [%rd0], 16;
    @%p0 cp.async.mbarrier.arrive.noinc.shared.b64 [shared+248];
    {}
    @%p0 ld.shared.u32 %r5, [shared]; // HERE"""
    message = "data race: read of a byte that an asynchronous copy has written, and nothing orders the two (shared memory)"
    is_crime(RaceError, message, body.format(""), [words()], lane=0, address=0)
    is_legal(body.format("bar.warp.sync -1;\n" + WAIT.format(name="WAIT")), [words()])
    is_legal(body.format("cp.async.wait_all;"), [words()])


# global memory

ARGUMENT = "global memory, byte {} of the 256 bytes of argument 0"
ADDRESS = """
mul.wide.u32 %rd5, %r1, 4;
add.s64 %rd5, %rd5, %rd0;
"""


@pytest.mark.parametrize("conflict", CONFLICTS)
@pytest.mark.parametrize("order", ["", "bar.sync 0;"])
def test_global_between_warps(conflict, order):
    """Without a barrier warp 0 comes first; with one, warp 1 must not, so that the order is checked and not the luck."""
    first, second, theirs, mine = CONFLICTS[conflict]
    first, second = (part.replace("shared", "global").format("%rd5") for part in (first, second))
    body = ADDRESS + WARPS.format(fill="", first=first, second=second + " // HERE", after=order, before=order)
    if order:
        is_legal(body, [words(64)], block=(64,))
    else:
        where = ARGUMENT.format(0)
        is_crime(RaceError, race(mine, theirs, 0, 0, where), body, [words(64)], (64,), warp=1, lane=0, address=2 << 32)


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_global_between_ctas(conflict):
    first, second, theirs, mine = CONFLICTS[conflict]
    first, second = (part.replace("shared", "global").format("%rd5+64").replace("%r0", "%r6") for part in (first, second))
    body = ADDRESS + f"""
    mov.u32 %r6, %ctaid.x;
    setp.eq.u32 %p1, %r6, 0;
    @%p1 {first}
    @!%p1 {second} // HERE"""
    message = race(mine, theirs, 0, 0, ARGUMENT.format(64))
    options = {"cta": (1, 0, 0), "lane": 0, "address": (2 << 32) + 64}
    is_crime(RaceError, message, body, [words(64)], grid=(2,), **options)
    # a barrier orders the threads of one CTA only
    is_crime(RaceError, message, body.replace("@!%p1", "bar.sync 0;\n@!%p1"), [words(64)], grid=(2,), **options)


def test_readers_of_two_ctas_are_both_remembered():
    body = ADDRESS + """
    mov.u32 %r6, %ctaid.x;
    setp.eq.u32 %p1, %r6, 2;
    @!%p1 ld.global.u32 %r5, [%rd5];
    @%p1 st.global.u32 [%rd5], %r6; // HERE"""
    with pytest.raises(RaceError, match=r"of CTA \([01], 0, 0\) has read"):
        is_legal(body, [words(64)], grid=(3,), workers=1)
    # the CTA that writes has read it too
    body = body.replace("@!%p1 ld", "ld")
    with pytest.raises(RaceError, match=r"of CTA \([01], 0, 0\) has read"):
        is_legal(body, [words(64)], grid=(3,), workers=1)


LAST_REDUCES = """
mov.u32 %r6, %ctaid.x;
mad.lo.u32 %r7, %r6, 64, %r0;
mul.wide.u32 %rd5, %r7, 4;
add.s64 %rd5, %rd5, %rd0;
st.global.u32 [%rd5], %r7;
{fence}
bar.sync 0;
mov.u32 %r8, %nctaid.x;
@%p0 atom.global.add.u32 %r9, [%rd1], 1;
@%p0 st.shared.u32 [shared], %r9;
bar.sync 0;
ld.shared.u32 %r9, [shared];
add.u32 %r9, %r9, 1;
setp.ne.u32 %p2, %r9, %r8;
@%p2 ret;
@!%p0 ret;
mov.u32 %r10, 0;
shl.b32 %r11, %r8, 6;
mov.u64 %rd6, %rd0;
NEXT: ld.global.u32 %r12, [%rd6]; // HERE
add.u32 %r10, %r10, %r12;
add.s64 %rd6, %rd6, 4;
sub.u32 %r11, %r11, 1;
setp.ne.u32 %p3, %r11, 0;
@%p3 bra NEXT;
st.global.u32 [%rd2], %r10;
"""


def test_the_last_cta_reduces():
    """Every thread's result is fenced, counted by an atomic, and read by the CTA that counts last."""
    args = [np.zeros(4 * 64, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)]
    fenced = LAST_REDUCES.format(fence="membar.gl;")
    assert is_legal(fenced, args, (64,), (4,))[2] == sum(range(4 * 64))
    where = "global memory, byte 0 of the 1024 bytes of argument 0"
    is_crime(RaceError, race("read", "written", 0, 0, where), LAST_REDUCES.format(fence=""), args, (64,), (4,),
             cta=(3, 0, 0), lane=0, address=2 << 32)  # fmt: skip


def test_release_and_acquire_between_ctas():
    """A flag that is released orders what was written before it, for those that acquire it."""
    body = """
    mov.u32 %r6, %ctaid.x;
    setp.eq.u32 %p2, %r6, 0;
    @!%p0 ret;
    @!%p2 bra CONSUMER;
    st.global.u32 [%rd0], 77;
    st{release}.global.u32 [%rd1], 1;
    ret;
    CONSUMER: ld{acquire}.global.u32 %r7, [%rd1];
    setp.ne.u32 %p3, %r7, 1;
    @%p3 bra CONSUMER;
    ld.global.u32 %r8, [%rd0]; // HERE
    st.global.u32 [%rd2], %r8;"""
    args = [np.zeros(1, np.uint32) for _ in range(3)]
    legal = body.format(release=".release.gpu", acquire=".acquire.gpu")
    assert is_legal(legal, args, grid=(2,))[2] == 77
    where = "global memory, byte 0 of the 4 bytes of argument 0"
    for release, acquire in ((".relaxed.gpu", ".acquire.gpu"), (".release.gpu", ".relaxed.gpu")):
        is_crime(RaceError, race("read", "written", 0, 0, where), body.format(release=release, acquire=acquire), args,
                 grid=(2,), cta=(1, 0, 0), lane=0, address=2 << 32)  # fmt: skip


def test_read_only_loads_of_what_was_written():
    body = "@%p0 st.global.u32 [%rd0], 4;\nbar.sync 0;\nld.global.nc.u32 %r5, [%rd0]; // HERE"
    message = "ld.global.nc of memory that this kernel has written (" + ARGUMENT.format(0) + ")"
    is_crime(RaceError, message, body, [words(64)], lane=0, address=2 << 32)
    is_legal(body.replace(".nc", ""), [words(64)])


def test_ordinary_access_to_an_mbarrier():
    body = "@%p0 mbarrier.init.shared.b64 [shared+8], 1;\n{} // HERE"
    message = "ordinary access to an mbarrier object (shared memory)"
    for access in ("@%p0 ld.shared.u32 %r5, [shared+12];", "@%p0 st.shared.u16 [shared+12], %h0;"):
        is_crime(MemoryAccessError, message, body.format(access), lane=0, address=12)
