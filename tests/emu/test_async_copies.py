"""cp.async, bulk copies and mbarriers: when bytes arrive, what is filled with zeros, phases over many rounds."""

import numpy as np
import pytest
from ptx_text import kernel, line_of, run

from ptx_inline.emu import Breakpoint, stops

RNG = np.random.default_rng(11)
WORDS = RNG.integers(0, 2**32, 512, dtype=np.uint32)
BUFFER = ".shared .align 16 .b8 buffer[2048];"


def places(size):
    """%r1: the thread's ``size`` bytes of shared memory; %rd10, %rd11: those of the first two arguments."""
    return f"""
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, buffer;
    mad.lo.u32 %r1, %r0, {size}, %r1;
    mul.wide.u32 %rd9, %r0, {size};
    add.s64 %rd10, %rd0, %rd9;
    add.s64 %rd11, %rd1, %rd9;
    setp.eq.u32 %p0, %r0, 0;
    """


def copy_out(size):
    return "\n".join(
        f"ld.shared.u32 %r9, [%r1+{place}];\nst.global.u32 [%rd11+{place}], %r9;" for place in range(0, size, 4)
    )


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("zero_fill", [False, True])
@pytest.mark.parametrize("hint", [False, True])
def test_sizes_and_zero_fill(size, zero_fill, hint):
    """src-size: so many bytes are read, the rest is zero; with none the address may be anything. L2's policy, the last
    operand with or without a src-size, changes no byte."""
    opcode = f"cp.async.{'cg' if size == 16 else 'ca'}.shared.global{'.L2::cache_hint' if hint else ''}"
    rest = (", %r2" if zero_fill else "") + (", %rd12" if hint else "")
    body = places(size) + f"""
    rem.u32 %r2, %r0, {size + 1};
    setp.eq.u32 %p1, %r2, 0;
    {"@%p1 mov.u64 %rd10, 24;" if zero_fill else ""}
    mov.b64 %rd12, 0x12F0000000000000;
    {opcode} [%r1], [%rd10], {size}{rest};
    cp.async.wait_all;
    """ + copy_out(size)
    data = WORDS[: 8 * size].view(np.uint8)
    found = run(body, [data, np.zeros_like(data)], declarations=BUFFER)[1].reshape(32, size)
    kept = np.arange(32) % (size + 1) if zero_fill else np.full(32, size)
    np.testing.assert_array_equal(found, np.where(np.arange(size) < kept[:, None], data.reshape(32, size), 0))


def test_groups_arrive_at_the_wait_and_not_before():
    body = places(16) + """
    cp.async.cg.shared.global [%r1], [%rd10], 16;
    cp.async.commit_group;
    cp.async.cg.shared.global [%r1+512], [%rd10], 16;
    cp.async.commit_group;
    nanosleep.u32 1; // ISSUED
    cp.async.wait_group 1;
    nanosleep.u32 1; // FIRST
    cp.async.wait_group 0;
    nanosleep.u32 1; // SECOND"""
    ptx = kernel(body, "u64 u64", BUFFER)
    lines = [line_of(ptx, f"// {name}") for name in ("ISSUED", "FIRST", "SECOND")]
    run_of_stops = stops(ptx, (1,), (32,), [WORDS, WORDS], breakpoints=[Breakpoint(line=line) for line in lines])
    data, poison = WORDS[:128].view(np.uint8), np.full(512, 0xCD, np.uint8)
    expected = [(poison, poison), (data, poison), (data, data)]
    for stop, line, (first, second) in zip(run_of_stops, lines, expected, strict=True):
        assert stop.line == line
        np.testing.assert_array_equal(stop.shared(0, 512), first)
        np.testing.assert_array_equal(stop.shared(512, 512), second)


WAIT = "{name}: mbarrier.try_wait.parity.shared.b64 %p5, [{bar}], {parity};\n@!%p5 bra {name};\n"


@pytest.mark.parametrize("noinc", [True, False])
def test_copies_that_arrive_on_an_mbarrier(noinc):
    """.noinc: one of the arrivals that the barrier expects; without, the copies count on top of them."""
    arrive = "cp.async.mbarrier.arrive.noinc.shared.b64 [bar];" if noinc else """
    cp.async.mbarrier.arrive.shared.b64 [bar];
    mbarrier.arrive.shared.b64 %rd20, [bar];"""
    body = places(16) + f"""
    @%p0 mbarrier.init.shared.b64 [bar], 64;
    bar.sync 0;
    cp.async.ca.shared.global [%r1], [%rd10], 16;
    {arrive}
    {WAIT.format(name="WAIT", bar="bar", parity=0)}
    xor.b32 %r1, %r1, 512;
    """ + copy_out(16)
    declarations = BUFFER + "\n.shared .align 8 .b64 bar;"
    found = run(body, [WORDS, np.zeros(256, np.uint32)], (64,), declarations=declarations)[1]
    np.testing.assert_array_equal(found, np.roll(WORDS[:256], 128))


def test_bulk_copies_in_and_out():
    body = places(16) + """
    @!%p0 bra LOADED;
    mbarrier.init.shared.b64 [bar], 1;
    mbarrier.arrive.expect_tx.shared.b64 %rd20, [bar], 512;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [buffer], [%rd0], 384, [bar];
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [buffer+384], [%rd0+384], 128, [bar];
    LOADED: bar.sync 0;
    """ + WAIT.format(name="WAIT", bar="bar", parity=0) + """
    ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r1];
    not.b32 %r4, %r4;
    st.shared.u32 [%r1], %r4;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p0 ret;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [buffer], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;"""
    declarations = BUFFER + "\n.shared .align 8 .b64 bar;"
    found = run(body, [WORDS, np.zeros(130, np.uint32)], declarations=declarations)[1]
    expected = WORDS[:128].copy()
    expected[::4] = ~expected[::4]
    np.testing.assert_array_equal(found, [*expected, 0, 0])


def test_bulk_groups_arrive_one_by_one():
    body = """
    st.shared.v2.u64 [buffer], {%rd0, %rd1};
    cp.async.bulk.global.shared::cta.bulk_group [%rd0], [buffer], 16;
    cp.async.bulk.commit_group;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [buffer], 16;
    cp.async.bulk.commit_group;
    cp.async.commit_group;
    cp.async.bulk.wait_group 1;
    ld.global.u64 %rd5, [%rd0];
    ld.global.u64 %rd6, [%rd1];
    st.global.u64 [%rd2], %rd5;
    st.global.u64 [%rd2+8], %rd6;
    cp.async.bulk.wait_group.read 0;"""
    args = [np.zeros(2, np.uint64) for _ in range(3)]
    first, second, seen = run(body, args, (1,), declarations=BUFFER)
    both = [2 << 32, 3 << 32]
    assert (first.tolist(), second.tolist(), seen.tolist()) == (both, both, [2 << 32, 0])


ROUNDS, STAGES = 9, 2


@pytest.mark.parametrize("bulk", [False, True])
def test_producer_and_consumers_over_many_rounds(bulk):
    """A pipeline: warp 0 fills stages, warps 1 and 2 sum them, full and empty mbarriers with alternating parities."""
    if bulk:
        produce = """
        elect.sync %r20|%p6, -1;
        @%p6 mbarrier.arrive.expect_tx.shared.b64 %rd20, [%r12], 256;
        @%p6 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r11], [%rd0], 256, [%r12];"""
    else:
        produce = """
        mul.wide.u32 %rd9, %r0, 8;
        add.s64 %rd9, %rd9, %rd0;
        mad.lo.u32 %r13, %r0, 8, %r11;
        ld.global.u64 %rd21, [%rd9];
        st.shared.u64 [%r13], %rd21;
        mbarrier.arrive.shared.b64 %rd20, [%r12];"""
    body = f"""
    mov.u32 %r0, %laneid;
    mov.u32 %r1, %warpid;
    mov.u32 %r2, %tid.x;
    setp.ne.u32 %p0, %r2, 0;
    @%p0 bra READY;
    mbarrier.init.shared.b64 [full], {1 if bulk else 32};
    mbarrier.init.shared.b64 [full+8], {1 if bulk else 32};
    mbarrier.init.shared.b64 [empty], 64;
    mbarrier.init.shared.b64 [empty+8], 64;
    READY: bar.sync 0;
    mov.u32 %r5, 0;
    mov.u32 %r6, 0;
    setp.ne.u32 %p1, %r1, 0;
    NEXT:
    and.b32 %r7, %r5, {STAGES - 1};
    shr.u32 %r8, %r5, 1;
    and.b32 %r8, %r8, 1;
    mov.u32 %r11, buffer;
    mad.lo.u32 %r11, %r7, 256, %r11;
    mov.u32 %r12, full;
    mad.lo.u32 %r12, %r7, 8, %r12;
    mov.u32 %r14, empty;
    mad.lo.u32 %r14, %r7, 8, %r14;
    @%p1 bra CONSUME;
    xor.b32 %r9, %r8, 1;
    {WAIT.format(name="EMPTY", bar="%r14", parity="%r9")}
    {produce}
    add.s64 %rd0, %rd0, 256;
    bra JOIN;
    CONSUME:
    {WAIT.format(name="FULL", bar="%r12", parity="%r8")}
    and.b32 %r15, %r2, 31;
    sub.u32 %r16, %r1, 1;
    mad.lo.u32 %r15, %r16, 32, %r15;
    mad.lo.u32 %r15, %r15, 4, %r11;
    ld.shared.u32 %r17, [%r15];
    mad.lo.u32 %r6, %r6, 3, %r17;
    mbarrier.arrive.shared.b64 %rd20, [%r14];
    JOIN:
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p2, %r5, {ROUNDS};
    @%p2 bra NEXT;
    @!%p1 ret;
    sub.u32 %r2, %r2, 32;
    mul.wide.u32 %rd9, %r2, 4;
    add.s64 %rd9, %rd9, %rd1;
    st.global.u32 [%rd9], %r6;"""
    declarations = BUFFER + "\n.shared .align 8 .b64 full[2];\n.shared .align 8 .b64 empty[2];"
    data = RNG.integers(0, 2**32, (ROUNDS, 64), dtype=np.uint32)
    found = run(body, [data, np.zeros(64, np.uint32)], (96,), declarations=declarations)[1]
    expected = np.zeros(64, np.uint32)
    for part in data:
        expected = expected * np.uint32(3) + part
    np.testing.assert_array_equal(found, expected)


def test_tokens_counts_and_drops():
    """test_wait with the token that an arrival gave; arrivals of several; arrive_drop lowers the next phase's count."""
    steps = [
        ("init", "mbarrier.init.shared.b64 [bar], 4;"),
        (0, "mbarrier.arrive.shared.b64 %rd5, [bar], 3;\nmbarrier.test_wait.shared.b64 %p1, [bar], %rd5;"),
        (1, "mbarrier.arrive_drop.shared.b64 %rd6, [bar];\nmbarrier.test_wait.shared.b64 %p1, [bar], %rd5;"),
        (1, "mbarrier.test_wait.parity.shared.b64 %p1, [bar], 0;"),
        (0, "mbarrier.test_wait.parity.shared.b64 %p1, [bar], 1;"),
        (0, "mbarrier.arrive.shared.b64 %rd5, [bar], 2;\nmbarrier.test_wait.shared.b64 %p1, [bar], %rd5;"),
        (1, "mbarrier.arrive.shared.b64 _, [bar];\nmbarrier.test_wait.shared.b64 %p1, [bar], %rd5;"),
        (1, "mbarrier.test_wait.parity.shared.b64 %p1, [bar], 1;"),
    ]
    body, expected = "", []
    for number, (value, text) in enumerate(steps):
        body += text + "\n"
        if value != "init":
            body += f"selp.u32 %r1, 1, 0, %p1;\nst.global.u32 [%rd0+{4 * (number - 1)}], %r1;\n"
            expected.append(value)
    (found,) = run(body, [np.full(7, 9, np.uint32)], (1,), declarations=".shared .align 8 .b64 bar;")
    assert found.tolist() == expected
