"""Lanes that part and meet again: each program against a model of one lane in Python, and the order of blocks."""

import graphlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_text import WORD, kernel, run

from ptx_inline.emu import emulate
from ptx_inline.emu.flow import weak_topological_order

RNG = np.random.default_rng(8)
THREADS = 80
INPUT = RNG.integers(0, 64, THREADS, dtype=np.uint32)
#: Reads %r1; a body leaves its result in %r2.
START = WORD + "ld.global.u32 %r1, [%rd21];\nmov.u32 %r2, 0;\n"
END = "\nst.global.u32 [%rd21], %r2;"


def is_as(model, body, **options):
    (found,) = run(START + body + END, [INPUT], (THREADS,), **options)
    np.testing.assert_array_equal(found, [model(int(value)) % 2**32 for value in INPUT])


def test_nested_ifs():
    body = """
    setp.lt.u32 %p1, %r1, 32;
    @%p1 bra LOW;
    and.b32 %r3, %r1, 1;
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra EVEN;
    setp.gt.u32 %p3, %r1, 50;
    @!%p3 bra MIDDLE;
    add.u32 %r2, %r1, 1000;
    bra JOIN;
    MIDDLE: mul.lo.u32 %r2, %r1, 3;
    bra JOIN;
    EVEN: sub.u32 %r2, %r1, 100;
    JOIN: add.u32 %r2, %r2, 7;
    bra END;
    LOW: xor.b32 %r2, %r1, 255;
    END: shl.b32 %r2, %r2, 1;"""

    def model(x):
        if x < 32:
            return 2 * (x ^ 255)
        return 2 * ((x - 100 if x % 2 == 0 else x + 1000 if x > 50 else 3 * x) + 7)

    is_as(model, body)


def test_loops_with_trip_counts_of_their_own():
    """Collatz steps: nobody runs longer than its own count, and all meet at the end."""
    body = """
    add.u32 %r3, %r1, 1;
    LOOP: setp.eq.u32 %p1, %r3, 1;
    @%p1 bra DONE;
    add.u32 %r2, %r2, 1;
    and.b32 %r4, %r3, 1;
    setp.eq.u32 %p2, %r4, 0;
    @%p2 bra HALVE;
    mad.lo.u32 %r3, %r3, 3, 1;
    bra LOOP;
    HALVE: shr.u32 %r3, %r3, 1;
    bra LOOP;
    DONE: activemask.b32 %r5;
    setp.eq.u32 %p3, %r5, -1;
    setp.eq.u32 %p4, %r5, 0xFFFF;
    or.pred %p3, %p3, %p4;
    selp.u32 %r6, 0, 10000, %p3;
    add.u32 %r2, %r2, %r6;"""

    def model(x):
        x, steps = x + 1, 0
        while x != 1:
            x, steps = (x // 2 if x % 2 == 0 else 3 * x + 1), steps + 1
        return steps  # 10000 more if lanes came to the end apart

    is_as(model, body)


def test_nested_loops_with_breaks():
    body = """
    mov.u32 %r3, 0;
    OUTER: mov.u32 %r4, 0;
    INNER: mad.lo.u32 %r2, %r3, %r4, %r2;
    add.u32 %r4, %r4, 1;
    setp.gt.u32 %p1, %r2, 200;
    @%p1 bra OUT;
    setp.lt.u32 %p2, %r4, %r1;
    @%p2 bra INNER;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p3, %r3, 5;
    @%p3 bra OUTER;
    OUT:"""

    def model(x):
        total = 0
        for i in range(5):
            j = 0
            while True:
                total += i * j
                j += 1
                if total > 200:
                    return total
                if j >= x:
                    break
        return total

    is_as(model, body)


def test_early_exit_of_lanes():
    body = """
    mov.u32 %r3, 0;
    LOOP: setp.eq.u32 %p1, %r3, %r1;
    @%p1 st.global.u32 [%rd21], %r3;
    @%p1 ret;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p2, %r3, 40;
    @%p2 bra LOOP;
    mov.u32 %r2, 77;"""
    is_as(lambda x: x if x < 40 else 77, body)


def test_loop_laid_out_before_its_entry_and_after_its_exit():
    """Text order is not flow order: the exit comes first, then the body, then the test, which is the head."""
    body = """
    mov.u32 %r3, %r1;
    bra HEAD;
    EXIT: mad.lo.u32 %r2, %r2, 2, 1;
    bra STORE;
    BODY: add.u32 %r2, %r2, %r3;
    sub.u32 %r3, %r3, 1;
    HEAD: setp.ne.u32 %p1, %r3, 0;
    @%p1 bra BODY;
    bra EXIT;
    STORE:"""
    is_as(lambda x: x * (x + 1) + 1, body)


def test_reconvergence_saves_issues():
    """After a loop of different lengths the warp issues the rest once, and the loop as often as its longest lane."""
    body = """
    LOOP: setp.eq.u32 %p1, %r1, 0;
    @%p1 bra DONE;
    sub.u32 %r1, %r1, 1;
    bra LOOP;
    DONE: cvt.rn.f32.u32 %f1, %r2;"""
    values = RNG.permutation(32).astype(np.uint32)
    profile = emulate(kernel(START + body + END, "u64"), (1,), (32,), [values]).profile
    counts = {each.name: (each.warp_instructions, each.lane_instructions) for each in profile.by_class()}
    assert counts["conversion"] == (1, 32)
    assert counts["compare"] == (32, sum(range(1, 33)))
    assert counts["store"] == (1, 32)


def test_indexed_branches():
    body = """
    and.b32 %r3, %r1, 3;
    TABLE: .branchtargets A, B, C, A;
    brx.idx %r3, TABLE;
    A: add.u32 %r2, %r2, 1;
    B: add.u32 %r2, %r2, 10;
    bra JOIN;
    C: mov.u32 %r2, 500;
    JOIN: add.u32 %r2, %r2, %r1;"""
    is_as(lambda x: (11, 10, 500, 11)[x & 3] + x, body)


def test_a_loop_made_of_indexed_branches():
    body = """
    mov.u32 %r4, %r1;
    LOOP: add.u32 %r2, %r2, 1;
    shr.u32 %r4, %r4, 1;
    min.u32 %r3, %r4, 1;
    TABLE: .branchtargets OUT, LOOP;
    brx.idx %r3, TABLE;
    OUT:"""
    is_as(lambda x: max(x.bit_length(), 1), body)


def test_irreducible_control_flow():
    """A loop with two entries."""
    body = """
    mov.u32 %r3, %r1;
    and.b32 %r4, %r1, 1;
    setp.ne.u32 %p1, %r4, 0;
    @%p1 bra SECOND;
    FIRST: add.u32 %r2, %r2, 1;
    SECOND: add.u32 %r2, %r2, 100;
    shr.u32 %r3, %r3, 1;
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra OUT;
    and.b32 %r4, %r3, 2;
    setp.eq.u32 %p3, %r4, 0;
    @%p3 bra SECOND;
    bra FIRST;
    OUT:"""

    def model(x):
        total, rest, first = 0, x, x % 2 == 0
        while True:
            total += 101 if first else 100
            rest //= 2
            if rest == 0:
                return total
            first = rest & 2 != 0

    is_as(model, body)


@pytest.mark.parametrize("work", [0, 40], ids=["short loop", "long loop"])
@pytest.mark.parametrize("layout", ["backward branch", "backward fall-through", "indexed branch"])
def test_spin_lock_within_a_warp(layout, work):
    """The lane that holds the lock must get its turn however the others' loop is laid out, and however long it is."""
    padding = "add.u32 %r9, %r9, 1;\n" * work
    take = "atom.global.cas.b32 %r4, [%rd1], 0, 1;\nsetp.ne.u32 %p1, %r4, 0;\n" + padding
    table = "TABLE: .branchtargets GO, SPIN;\n"
    loops = {
        "backward branch": f"SPIN: {take}@%p1 bra SPIN;",
        "backward fall-through": f"bra HEAD;\nBODY: add.u32 %r9, %r9, 1;\nHEAD: {take}@%p1 bra BODY;",
        "indexed branch": table + f"SPIN: {take}selp.u32 %r5, 1, 0, %p1;\nbrx.idx %r5, TABLE;\nGO:",
    }
    body = START + loops[layout] + """
    ld.relaxed.gpu.global.u32 %r6, [%rd2];
    add.u32 %r6, %r6, %r1;
    st.relaxed.gpu.global.u32 [%rd2], %r6;
    membar.gl;
    atom.global.exch.b32 %r7, [%rd1], 0;"""
    args = [INPUT[:32], np.zeros(1, np.uint32), np.zeros(1, np.uint32)]
    _, lock, total = run(body, args, (32,), max_instructions=40_000_000)
    assert (lock[0], total[0]) == (0, INPUT[:32].sum())


# the order of blocks


@st.composite
def graphs(draw, acyclic=False):
    size = draw(st.integers(1, 24))
    blocks = st.integers(0, size - 1)
    edges = [draw(st.lists(blocks, max_size=3)) for _ in range(size)]
    if acyclic:
        rank = draw(st.permutations(range(1, size)))
        rank = [0, *rank]
        return [[other for other in found if rank[other] > rank[block]] for block, found in enumerate(edges)]
    return edges


def reachable(successors, start, inside=None):
    seen, todo = set(), [start]
    while todo:
        block = todo.pop()
        if block not in seen and (inside is None or block in inside):
            seen.add(block)
            todo += successors[block]
    return seen


@given(graphs())
def test_every_reachable_block_once(successors):
    order = weak_topological_order(successors)
    assert sorted(order) == sorted(reachable(successors, 0))
    assert order[0] == 0


@given(graphs(acyclic=True))
def test_acyclic_graphs_are_sorted(successors):
    order = weak_topological_order(successors)
    place = {block: number for number, block in enumerate(order)}
    for block in order:
        assert all(place[block] < place[other] for other in successors[block])
    graph = {block: {before for before in order if block in successors[before]} for block in order}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(order)


@given(graphs())
@settings(max_examples=200)
def test_loops_are_in_one_piece(successors):
    """Strongly connected parts: contiguous, begun by their head, and again so without it."""
    check_loops(successors, weak_topological_order(successors))


def check_loops(successors, order):
    inside = set(order)
    reach = {block: reachable(successors, block, inside) for block in order}
    done = set()
    for block in order:
        if block in done:
            continue
        loop = {other for other in reach[block] if block in reach[other]}
        done |= loop
        place = order.index(block)
        assert set(order[place : place + len(loop)]) == loop
        if len(loop) > 1:
            check_loops(successors, order[place + 1 : place + len(loop)])
