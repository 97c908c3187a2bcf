"""The profile's numbers against figures worked out by hand."""

import numpy as np
import pytest
from ptx_text import kernel

from ptx_inline.emu import emulate

DATA = np.zeros(4096, np.uint32)


def profile(body, block=(32,), grid=(1,), declarations=".shared .align 16 .b8 buffer[16384];"):
    ptx = kernel("mov.u32 %r0, %tid.x;\nmov.u32 %r1, buffer;\n" + body, "u64", declarations)
    return emulate(ptx, grid, block, [DATA]).profile


def access(body, space):
    (found,) = (each for each in profile(body).accesses() if each.space == space)
    return found.requests, found.transactions, found.ideal


def test_counts_by_class_and_opcode():
    """Two CTAs of two warps, the second of 8 lanes; a loop of three rounds; a guard that holds in lanes 0-4."""
    body = """
    mov.u32 %r5, 3;
    LOOP: sub.u32 %r5, %r5, 1;
    setp.ne.u32 %p1, %r5, 0;
    @%p1 bra LOOP;
    setp.lt.u32 %p2, %r0, 5;
    @%p2 add.u32 %r6, %r5, 1;
    @%p2 st.shared.u32 [buffer], 1;
    bar.sync 0;"""
    found = profile(body, (40,), (2,))
    by_class = {each.name: (each.warp_instructions, each.lane_instructions) for each in found.by_class()}
    # a warp: mov 3 (tid, buffer, 3), sub 3, add 1 integers; ld.param 1; setp 4; bra 3 and ret 1; st 1; bar 1
    assert by_class == {
        "integer": (4 * 7, 2 * (40 * 6 + 5)),
        "load": (4, 2 * 40),
        "compare": (4 * 4, 2 * 40 * 4),
        "branch": (4 * 4, 2 * (40 * 2 + 40 + 40 - 40)),
        "store": (4, 2 * 5),
        "synchronisation": (4, 2 * 40),
    }
    assert found.warp_instructions == sum(pair[0] for pair in by_class.values())
    assert found.lane_instructions == sum(pair[1] for pair in by_class.values())
    assert found.opcodes()["sub.u32"] == 12
    assert found.opcodes()["setp.lt.u32"] == 4
    assert found.opcodes()["bra"] == 12
    assert found.ctas == 2
    assert "28 integer" in repr(found)


def test_both_sides_of_a_branch():
    body = """
    setp.lt.u32 %p1, %r0, 10;
    @%p1 bra LOW;
    add.f32 %f1, %f2, %f3;
    bra JOIN;
    LOW: mul.f32 %f1, %f2, %f3;
    JOIN: cvt.u32.u16 %r5, %h1;"""
    by_class = {each.name: (each.warp_instructions, each.lane_instructions) for each in profile(body).by_class()}
    assert by_class["float"] == (2, 32)
    assert by_class["conversion"] == (1, 32)
    assert by_class["branch"] == (3, 10 + 22 + 32)


@pytest.mark.parametrize(
    ("stride", "width", "passes", "ideal"),
    [
        (4, 4, 1, 1),  # a word a lane, one after the other
        (8, 4, 2, 1),
        (128, 4, 32, 1),  # all in one bank
        (132, 4, 1, 1),  # the same with a word of padding
        (0, 4, 1, 1),  # one word for all
        (2, 2, 1, 1),  # two lanes a word
        (8, 8, 2, 2),  # half a warp at a time
        (16, 8, 4, 2),
        (16, 16, 4, 4),  # a quarter at a time
        (128, 16, 32, 4),  # rows of 32 words: eight lanes in the same four banks
        (144, 16, 4, 4),  # rows with 16 bytes of padding
        (32, 16, 8, 4),
    ],
)
def test_bank_conflicts(stride, width, passes, ideal):
    four = "v4.u32 [%r5], {%r2, %r2, %r2, %r2}"
    value = {2: "u16 [%r5], %h1", 4: "u32 [%r5], %r2", 8: "u64 [%r5], %rd0", 16: four}[width]
    found = access(f"mov.u32 %r2, 7;\nmad.lo.u32 %r5, %r0, {stride}, %r1;\nst.shared.{value};", "shared")
    assert found == (1, passes, ideal)


def test_bank_conflicts_of_active_lanes_only():
    body = "setp.lt.u32 %p1, %r0, {};\nmad.lo.u32 %r5, %r0, 128, %r1;\n@%p1 st.shared.u32 [%r5], 1;"
    assert access(body.format(4), "shared") == (1, 4, 1)
    body = body.replace("st.shared.u32 [%r5], 1", "st.shared.v4.u32 [%r5], {{%r1, %r1, %r1, %r1}}")
    assert access(body.format(9), "shared") == (1, 9, 2)  # eight in the first quarter, one in the second


@pytest.mark.parametrize(
    ("stride", "count", "passes"), [(16, 1, 1), (16, 4, 4), (128, 1, 8), (128, 4, 32), (144, 4, 4), (64, 2, 8)]
)
def test_ldmatrix(stride, count, passes):
    registers = ", ".join(f"%r{10 + k}" for k in range(count))
    body = f"""
    mov.u32 %r5, %r1;
    mov.u32 %r6, 1024;
    FILL: mad.lo.u32 %r5, %r6, 16, %r1;
    sub.u32 %r6, %r6, 1;
    st.shared.v4.u32 [%r5+-16], {{%r1, %r1, %r1, %r1}};
    setp.ne.u32 %p1, %r6, 0;
    @%p1 bra FILL;
    bar.warp.sync -1;
    mad.lo.u32 %r5, %r0, {stride}, %r1;
    ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{registers}}}, [%r5];"""
    (found,) = (each for each in profile(body).accesses() if each.text.startswith("ldmatrix"))
    assert (found.space, found.requests, found.transactions, found.ideal) == ("shared", 1, passes, count)
    assert found.excess == passes / count


def test_movmatrix_counts_as_a_shuffle_does():
    found = profile("movmatrix.sync.aligned.m8n8.trans.b16 %r5, %r0;\nshfl.sync.bfly.b32 %r5, %r5, 1, 31, -1;")
    (each,) = (each for each in found.by_class() if each.name == "warp")
    assert (each.warp_instructions, each.lane_instructions) == (2, 64)
    assert found.accesses() == []


@pytest.mark.parametrize(
    ("stride", "offset", "kind", "sectors", "ideal"),
    [
        (4, 0, "u32", 4, 4),  # 128 bytes in a row
        (4, 4, "u32", 5, 4),  # misaligned by a word
        (8, 0, "u32", 8, 4),
        (32, 0, "u32", 32, 4),  # a sector each
        (128, 0, "u32", 32, 4),
        (0, 0, "u32", 1, 1),  # one word for all
        (1, 0, "u8", 1, 1),
        (16, 0, "v4", 16, 16),
        (32, 0, "v4", 32, 16),
    ],
)
def test_sectors(stride, offset, kind, sectors, ideal):
    load = {"u32": "u32 %r6", "u8": "u8 %r6", "v4": "v4.u32 {%r6, %r7, %r8, %r9}"}[kind]
    body = f"mul.wide.u32 %rd5, %r0, {stride};\nadd.s64 %rd5, %rd5, %rd0;\nld.global.{load}, [%rd5+{offset}];"
    found = profile(body)
    (each,) = found.accesses()
    assert (each.space, each.requests, each.transactions, each.ideal) == ("global", 1, sectors, ideal)
    assert found.coalescing == sectors / ideal
    assert found.bank_conflicts == 0


def test_accesses_add_up_over_ctas_and_come_in_order():
    body = """
    mul.wide.u32 %rd5, %r0, 8;
    add.s64 %rd5, %rd5, %rd0;
    ld.global.u32 %r6, [%rd5];
    mad.lo.u32 %r5, %r0, 8, %r1;
    st.shared.u32 [%r5], %r6;"""
    found = profile(body, (64,), (3,))
    assert [(each.space, each.requests, each.transactions, each.ideal) for each in found.accesses()] == [
        ("global", 6, 48, 24), ("shared", 6, 12, 6)]  # fmt: skip
    assert found.bank_conflicts == 6
    assert found.coalescing == 2.0
    assert found.lane_instructions_per_second == found.lane_instructions / found.seconds
