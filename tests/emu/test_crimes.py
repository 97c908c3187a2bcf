"""Every memory crime and every misuse of the machine that the emulator says it refuses, each by one small kernel."""

import numpy as np
import pytest
from crime_scene import is_crime, is_legal, race, words
from ptx_text import kernel, run

from ptx_inline.emu import (
    DivergenceError,
    EmulationError,
    MemoryAccessError,
    Output,
    RaceError,
    TrapError,
    UninitializedReadError,
    emulate,
)

FIRST, SECOND = 2 << 32, 3 << 32  # addresses of the first two arguments; the module's variables come before
UNWRITTEN = "read of memory that nobody has written"
IN_FLIGHT = "read of memory that an asynchronous copy is to write, before it was waited for (shared memory)"


# bounds and alignment


@pytest.mark.parametrize(
    ("body", "message", "address"),
    [
        ("ld.global.u32 %r5, [%rd0+128]; // HERE", "4 bytes out of bounds: byte 128 of the 128 bytes of argument 0",
         FIRST + 128),
        ("ld.global.u32 %r5, [%rd1+-4]; // HERE", "4 bytes out of bounds: byte -4 of the 64 bytes of argument 1",
         SECOND - 4),
        ("ld.global.u32 %r5, [%rd0+-8]; // HERE", "4 bytes out of bounds: byte -8 of the 128 bytes of argument 0",
         FIRST - 8),
        ("st.global.v4.u32 [%rd1+64], {%r0, %r0, %r0, %r0}; // HERE",
         "16 bytes out of bounds: byte 64 of the 64 bytes of argument 1", SECOND + 64),
        ("atom.global.add.u32 %r5, [%rd1+64], 1; // HERE", "4 bytes out of bounds: byte 64 of the 64 bytes of argument 1",
         SECOND + 64),
        ("mov.u64 %rd5, 64;\nld.global.u32 %r5, [%rd5]; // HERE",
         "4 bytes at 0x40 are in no buffer: not an address of any argument", 0x40),
        ("mov.u64 %rd5, -16;\nld.u32 %r5, [%rd5]; // HERE",
         "4 bytes at 0xfffffffffffffff0 are in no buffer: not an address of any argument", 2**64 - 16),
        ("ld.shared.u32 %r5, [shared+256]; // HERE", "4 bytes at shared address 0x100 are outside its 256 bytes", 0x100),
        ("mov.u32 %r6, shared;\nst.shared.u32 [%r6+-4], %r0; // HERE",
         "4 bytes at shared address 0xfffffffc are outside its 256 bytes", 0xFFFFFFFC),
        ("cvta.shared.u64 %rd5, 256;\nst.u8 [%rd5], %r0; // HERE",
         "1 bytes at shared address 0x100 are outside its 256 bytes", 0x100),
        ("cvta.shared.u64 %rd5, 16;\nst.shared.u8 [%rd5], %r0; // HERE",
         "generic address 0x7ffe00000010 in an instruction for shared memory", 0x7FFE00000010),
        ("st.local.u32 [local+24], %r0; // HERE", "4 bytes at local address 0x18 are outside its 24 bytes", 0x18),
        ("ld.global.u32 %r5, [%rd0+2]; // HERE", "global address 0x200000002 must be a multiple of the access's 4 bytes",
         FIRST + 2),
        ("ld.global.v2.u32 {%r5, %r6}, [%rd0+4]; // HERE",
         "global address 0x200000004 must be a multiple of the access's 8 bytes", FIRST + 4),
        ("st.shared.v4.u32 [shared+8], {%r0, %r0, %r0, %r0}; // HERE",
         "shared address 0x8 must be a multiple of the access's 16 bytes", 8),
        ("st.local.u64 [local+4], %rd0; // HERE", "local address 0x4 must be a multiple of the access's 8 bytes", 4),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [shared+8]; // HERE",
         "shared address 0x8 must be a multiple of the access's 16 bytes", 8),
        ("cp.async.ca.shared.global [shared+8], [%rd0], 16; // HERE",
         "shared address 0x8 must be a multiple of the access's 16 bytes", 8),
        ("cp.async.ca.shared.global [shared], [%rd0+8], 16, 4; // HERE",
         "global address 0x200000008 must be a multiple of the access's 16 bytes", FIRST + 8),
        ("cp.async.ca.shared.global [shared], [%rd1+64], 16; // HERE",
         "16 bytes out of bounds: byte 64 of the 64 bytes of argument 1", SECOND + 64),
    ],
)  # fmt: skip
def test_addresses(body, message, address):
    is_crime(MemoryAccessError, message, body, [words(), words(16)], lane=0, address=address)


def test_the_first_lane_outside_is_named():
    body = "mul.wide.u32 %rd5, %r0, 4;\nadd.s64 %rd5, %rd5, %rd0;\nst.global.u32 [%rd5], %r0; // HERE"
    message = "4 bytes out of bounds: byte 280 of the 280 bytes of argument 0"
    found = is_crime(MemoryAccessError, message, body, [words(70)], (96,), warp=2, lane=6, address=(2 << 32) + 280)
    assert str(found).endswith("\n  CTA (0, 0, 0)\n  warp 2\n  lane 6\n  address 0x200000118")


def test_the_cta_is_named():
    body = """
    mov.u32 %r5, %ctaid.y;
    setp.eq.u32 %p2, %r5, 2;
    @%p2 ld.shared.u32 %r5, [shared]; // HERE"""
    is_crime(UninitializedReadError, f"{UNWRITTEN} (shared memory)", body, grid=(2, 3), cta=(0, 2, 0), lane=0, address=0)


# memory that holds nothing yet


@pytest.mark.parametrize(
    ("body", "where", "address"),
    [
        ("@%p0 st.shared.u16 [shared], %h0;\nld.shared.u32 %r5, [shared]; // HERE", "shared memory", 2),
        ("ld.shared.v2.u32 {%r5, %r6}, [shared+8]; // HERE", "shared memory", 8),
        ("st.local.u32 [local+8], %r0;\nld.local.u64 %rd5, [local+8]; // HERE", "local memory", 12),
        ("ld.global.u8 %r5, [%rd0+5]; // HERE", "global memory, byte 5 of the 64 bytes of argument 0", (2 << 32) + 5),
        ("atom.global.add.u32 %r5, [%rd0], 1; // HERE", "global memory, byte 0 of the 64 bytes of argument 0", 2 << 32),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [shared]; // HERE", "shared memory", 0),
    ],
)
def test_uninitialised(body, where, address):
    body = "mov.b16 %h0, 1;\n" + body
    is_crime(UninitializedReadError, f"{UNWRITTEN} ({where})", body, [Output((16,), np.uint32)], lane=0, address=address)


def test_unwritten_bytes_of_an_output_are_counted():
    ptx = kernel("st.global.u32 [%rd0+4], 7;", "u64")
    emulation = emulate(ptx, (1,), (1,), [Output((4,), np.uint32)])
    assert emulation.unwritten == {0: 12}
    assert emulation.outputs[0].tolist() == [0xCDCDCDCD, 7, 0xCDCDCDCD, 0xCDCDCDCD]


# asynchronous copies

COPY = "@%p0 cp.async.ca.shared.global [{}], [%rd0], 16;\n"


def test_read_before_the_wait():
    body = COPY.format("shared") + "cp.async.commit_group;\n@%p0 ld.shared.u32 %r5, [shared+4]; // HERE"
    is_crime(UninitializedReadError, IN_FLIGHT, body, [words()], lane=0, address=4)


def test_read_of_a_later_group_than_waited_for():
    two = COPY.format("shared") + "cp.async.commit_group;\n" + COPY.format("shared+16") + "cp.async.commit_group;\n"
    body = two + "cp.async.wait_group 1;\n@%p0 ld.shared.u32 %r5, [shared+{}]; // HERE"
    is_legal(body.format(0), [words()])
    is_crime(UninitializedReadError, IN_FLIGHT, body.format(16), [words()], lane=0, address=16)
    is_legal(body.replace("wait_group 1", "wait_group 0").format(16), [words()])


def test_copies_outside_a_group_need_wait_all():
    body = COPY.format("shared") + "cp.async.{};\n@%p0 ld.shared.u32 %r5, [shared]; // HERE"
    is_crime(UninitializedReadError, IN_FLIGHT, body.format("wait_group 0"), [words()], lane=0, address=0)
    is_legal(body.format("wait_all"), [words()])


def test_groups_of_bulk_copies_are_counted_apart():
    """A bulk group committed after it must not make a cp.async group look one older."""
    body = COPY.format("shared") + """
    cp.async.commit_group;
    cp.async.bulk.commit_group;
    cp.async.wait_group 1;
    @%p0 ld.shared.u32 %r5, [shared]; // HERE"""
    is_crime(UninitializedReadError, IN_FLIGHT, body, [words()], lane=0, address=0)


def test_write_to_what_is_in_flight():
    message = "write to memory that an asynchronous copy is to write (shared memory)"
    for second in ("@%p0 st.shared.u32 [shared+8], %r0; // HERE", COPY.format("shared").replace("\n", " // HERE")):
        address = 8 if "st." in second else 0
        is_crime(RaceError, message, COPY.format("shared") + second, [words()], lane=0, address=address)


def test_other_lanes_need_a_barrier_after_the_wait():
    body = COPY.format("shared") + "cp.async.wait_all;\n{}\nld.shared.u32 %r5, [shared]; // HERE"
    message = race("read", "written", 0, 0, "shared memory")
    is_crime(RaceError, message, body.format(""), [words()], lane=1, address=0)
    is_legal(body.format("bar.warp.sync -1;"), [words()])


def test_copy_larger_than_its_size():
    message = "asynchronous copy of 5 bytes: must be at most, or a multiple of, 4"
    body = "@%p0 cp.async.ca.shared.global [shared], [%rd0], 4, 5; // HERE"
    is_crime(MemoryAccessError, message, body, [words()], lane=0)


BULK = """
@%p0 mbarrier.init.shared.b64 [shared+128], 1;
@%p0 mbarrier.arrive.expect_tx.shared.b64 %rd9, [shared+128], 32;
@%p0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [shared], [%rd0], 32, [shared+128];
"""


def test_bulk_copy_before_its_mbarrier():
    body = BULK + "@%p0 ld.shared.u32 %r5, [shared+8]; // HERE"
    is_crime(UninitializedReadError, IN_FLIGHT, body, [words()], lane=0, address=8)
    waited = BULK + """
    bar.warp.sync -1;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p5, [shared+128], 0;
    @!%p5 bra WAIT;
    ld.shared.u32 %r5, [shared+8];"""
    is_legal(waited, [words()])


def test_bulk_copy_of_a_wrong_size():
    message = "asynchronous copy of 24 bytes: must be at most, or a multiple of, 16"
    body = BULK.replace("[%rd0], 32, [shared+128];", "[%rd0], 24, [shared+128]; // HERE")
    is_crime(MemoryAccessError, message, body, [words()], lane=0)


def test_bulk_copy_out_of_bounds():
    body = BULK.replace("[%rd0], 32, [shared+128];", "[%rd0+112], 32, [shared+128]; // HERE")
    message = "1 bytes out of bounds: byte 143 of the 128 bytes of argument 0"
    is_crime(MemoryAccessError, message, body, [words()], lane=0, address=(2 << 32) + 143)


# matrix instructions

MMA = (
    "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
    "{{%f0, %f1, %f2, %f3}}, {{%r5, %r5, %r5, %r5}}, {{%r5, %r5}}, {{%f4, %f4, %f4, %f4}}, "
    "%r5, {{{}, {}}}, %r5, {{{}, {}}}; // HERE"
)


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ((1, 0, 0, 0), "byte_id_a 1 is not allowed for this instruction"),
        ((0, 2, 0, 0), "thread_id_a 2 is not allowed for this instruction"),
        ((0, 0, 2, 0), "byte_id_b 2 is not allowed for this instruction"),
        ((0, 1, 0, 4), "thread_id_b 4 is not allowed for this instruction"),
    ],
)
def test_selectors_out_of_range(selectors, message):
    is_crime(EmulationError, message, "mov.b32 %r5, 0;\nmov.f32 %f4, 0f00000000;\n" + MMA.format(*selectors))


def test_selectors_that_differ_between_lanes():
    body = "mov.b32 %r5, 0;\nmov.f32 %f4, 0f00000000;\nshr.u32 %r6, %r1, 4;\ncvt.u16.u32 %h1, %r6;\n"
    message = "an operand must be the same in all lanes of the warp, got 1 and 0"
    is_crime(DivergenceError, message, body + MMA.format(0, "%h1", 0, 0), lane=16)


# control


def test_indexed_branch_out_of_range():
    body = """
    setp.eq.u32 %p2, %r1, 9;
    selp.u32 %r5, 2, 1, %p2;
    LIST: .branchtargets A, B;
    brx.idx %r5, LIST; // HERE
    A: mov.u32 %r6, 1;
    B: mov.u32 %r6, 2;"""
    is_crime(EmulationError, "brx index 2 is beyond its 2 targets", body, lane=9)
    is_legal(body.replace("selp.u32 %r5, 2, 1", "selp.u32 %r5, 0, 1"))


def test_trap():
    body = "setp.gt.u32 %p2, %r1, 28;\nsetp.eq.u32 %p3, %r2, 1;\nand.pred %p2, %p2, %p3;\n@%p2 trap; // HERE"
    is_crime(TrapError, "trap executed by lanes 29-31", body, block=(64,), warp=1)
    is_legal(body, block=(32,))


def test_endless_loop():
    message = "a CTA has executed 1000 warp instructions without ending (max_instructions)"
    is_crime(TrapError, message, "FOREVER: bra FOREVER; // HERE", max_instructions=1000)


# the launch


def test_shared_memory_limit():
    ptx = kernel("mov.u32 %r1, smem;", module=".extern .shared .align 16 .b8 smem[];")
    emulate(ptx, (1,), (32,), [], smem_bytes=99 * 1024)
    with pytest.raises(ValueError, match=r"^shared memory must be at most 101376 bytes on sm_120a, got 101377$"):
        emulate(ptx, (1,), (32,), [], smem_bytes=99 * 1024 + 1)
    emulate(ptx.replace("sm_120a", "sm_90a"), (1,), (32,), [], smem_bytes=227 * 1024)


WIDE = np.zeros((4, 4), np.float32)


@pytest.mark.parametrize(
    ("params", "args", "error", "message"),
    [
        ("u64", [], ValueError, "arguments must be 1 for k, got 0"),
        ("u64", [WIDE, 1], ValueError, "arguments must be 1 for k, got 2"),
        ("u64", [WIDE.T[1:]], ValueError, "argument 0 must be C-contiguous, got strides (4, 16); copy it first"),
        ("u64 u64", [WIDE, WIDE[1:]], ValueError,
         "argument 1 must be the same array as argument 0 or share no memory with it; pass one array"),
        ("u64", [np.array([None])], TypeError, "argument 0 must be an array of numbers, got dtype object"),
        ("u32", [WIDE], TypeError, "argument 0 must be a number, as the kernel declares it, got an array"),
        ("f64", [WIDE], TypeError, "argument 0 must be a number, as the kernel declares it, got an array"),
        ("u64", ["x"], TypeError, "argument 0 must be an integer, a NumPy array or an Output, got str"),
        ("u64", [[1, 2]], TypeError, "argument 0 must be an integer, a NumPy array or an Output, got list"),
        ("u32", [None], TypeError, "argument 0 must be an integer, got NoneType"),
        ("f32", ["1"], TypeError, "argument 0 must be a number, got str"),
        ("u64 .ptr .global", [1.5], TypeError, "argument 0 must be an integer, a NumPy array or an Output, got float"),
        ("u32", [2**32], ValueError, "argument 0 must fit 32 bits, got 4294967296"),
        ("u8", [-129], ValueError, "argument 0 must fit 8 bits, got -129"),
    ],
)  # fmt: skip
def test_arguments(params, args, error, message):
    ptx = kernel("", params.split(" .")[0])
    if ".ptr" in params:
        ptx = ptx.replace(".param .u64 p0", ".param .u64 .ptr .global .align 16 p0")
    with pytest.raises(error) as caught:
        emulate(ptx, (1,), (32,), args)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("grid", "block", "options", "error", "message"),
    [
        ((1,), (1025,), {}, ValueError, "block must have at most 1024 threads, got (1025, 1, 1)"),
        ((1,), (0,), {}, ValueError, "block must be at least 1, got 0"),
        ((1, -1), (32,), {}, ValueError, "grid must be at least 1, got -1"),
        (1, (32,), {}, TypeError, "grid must be a tuple of one to three sizes, got 1"),
        ((1,), (1, 1, 1, 1), {}, TypeError, "block must be a tuple of one to three sizes, got (1, 1, 1, 1)"),
        ((1.0,), (32,), {}, TypeError, "grid must be an integer, got float"),
        ((1,), (32,), {"smem_bytes": -1}, ValueError, "smem_bytes must be at least 0, got -1"),
        ((1,), (32,), {"max_instructions": 0}, ValueError, "max_instructions must be at least 1, got 0"),
        ((1,), (32,), {"workers": 0}, ValueError, "workers must be at least 1, got 0"),
        ((1,), (32,), {"entry": "other"}, ValueError, "entry must be one of k, got 'other'"),
        ((1,), (32,), {"on_stop": print}, ValueError, "breakpoints and on_stop must be given together, or neither"),
    ],
)  # fmt: skip
def test_launch(grid, block, options, error, message):
    with pytest.raises(error) as caught:
        emulate(kernel(""), grid, block, [], **options)
    assert str(caught.value) == message


def test_kernel_of_another_type():
    with pytest.raises(TypeError, match=r"^kernel must be PTX text or have a ptx\(arch\) method, got int$"):
        emulate(3, (1,), (32,), [])


def test_the_same_array_twice_is_one_buffer_and_the_callers_is_unchanged():
    array = words(1)
    outputs = run("st.global.u32 [%rd0], 9;\nld.global.u32 %r1, [%rd1];\nst.global.u32 [%rd2], %r1;",
                  [array, array, words(1)], block=(1,))  # fmt: skip
    assert [output.tolist() for output in outputs] == [[9], [9], [9]]
    assert array.tolist() == [1]
