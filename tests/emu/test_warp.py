"""What the lanes of a warp do together, and special registers, against NumPy and Python integers."""

import itertools

import numpy as np
import pytest
from ptx_text import WORD, run

LANE = np.arange(32)
RNG = np.random.default_rng(20)
WORDS = RNG.integers(0, 2**32, 32, dtype=np.uint32)
FEW = RNG.integers(0, 4, 32, dtype=np.uint32)
OUT = np.zeros(32, np.uint32)


def bits(lanes):
    return int(sum(1 << int(lane) for lane in np.flatnonzero(lanes)))


def warp(body, *inputs, outputs=2, **options):
    """Run a body that finds a word of each input in %r1, %r2, ... and leaves results in %r10, %r11, ...: the results."""
    args = [*inputs, *[np.zeros(32, np.uint32) for _ in range(outputs)]]
    text = "mov.u32 %r0, %laneid;\nmul.wide.u32 %rd20, %r0, 4;\n"
    for number in range(len(args)):
        text += f"add.s64 %rd{number}, %rd{number}, %rd20;\n"
    for number in range(len(inputs)):
        text += f"ld.global.u32 %r{number + 1}, [%rd{number}];\n"
    text += body
    for number in range(outputs):
        text += f"\nst.global.u32 [%rd{len(inputs) + number}], %r{10 + number};"
    return run(text, args, **options)[len(inputs) :]


SEGMENTS = (32, 16, 8, 4, 2)


def shuffle_model(mode, values, b, width):
    """CUDA's words: segments of ``width`` lanes, each a little warp."""
    result, inside = values.copy(), np.zeros(32, np.uint32)
    for lane in range(32):
        first = lane // width * width
        position = lane - first
        source = {"up": position - b[lane], "down": position + b[lane], "bfly": position ^ b[lane], "idx": b[lane] % width}
        found = int(source[mode])
        # butterflies may reach into the segment before, never into the one after
        if mode == "bfly":
            found = (lane ^ int(b[lane])) - first
            inside[lane] = found < width
        else:
            inside[lane] = 0 <= found < width
        if inside[lane]:
            result[lane] = values[first + found]
    return result, inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode):
    for width in SEGMENTS:
        b = RNG.integers(0, 32, 32, dtype=np.uint32)
        c = (32 - width) << 8 | (0 if mode == "up" else 31)
        body = f"""
        shfl.sync.{mode}.b32 %r10|%p1, %r1, %r2, {c}, -1;
        selp.u32 %r11, 1, 0, %p1;"""
        value, inside = warp(body, WORDS, b)
        expected, expected_inside = shuffle_model(mode, WORDS, b.astype(np.int64), width)
        np.testing.assert_array_equal(inside, expected_inside, err_msg=f"width {width}")
        np.testing.assert_array_equal(value, expected, err_msg=f"width {width}")


def test_shfl_clamp_within_a_segment():
    """A clamp below the segment's end cuts it short; without a predicate too."""
    (value,) = warp("shfl.sync.down.b32 %r10, %r1, 1, 7, -1;", WORDS, outputs=1)
    np.testing.assert_array_equal(value[:8], WORDS[[1, 2, 3, 4, 5, 6, 7, 7]])
    np.testing.assert_array_equal(value[8:], WORDS[8:])  # beyond the clamp every lane keeps its own
    (value,) = warp("shfl.sync.up.b32 %r10, %r1, 4, 8, -1;", WORDS, outputs=1)
    np.testing.assert_array_equal(value, np.where(LANE - 4 >= 8, WORDS[LANE - 4], WORDS))


def test_shfl_takes_the_low_five_bits_of_the_lane():
    (value,) = warp("shfl.sync.idx.b32 %r10, %r1, 0x23, 31, -1;", WORDS, outputs=1)
    np.testing.assert_array_equal(value, np.full(32, WORDS[3]))


def test_shfl_in_groups_with_masks_of_their_own():
    """Lanes that arrive together may form several groups, as tiled partitions do."""
    body = """
    and.b32 %r3, %r0, 0x18;
    shl.b32 %r4, 0xFF, %r3;
    shfl.sync.bfly.b32 %r10, %r1, 7, 31, %r4;
    popc.b32 %r11, %r4;"""
    value, members = warp(body, WORDS)
    np.testing.assert_array_equal(value, WORDS[LANE ^ 7])
    assert set(members) == {8}


def test_shfl_of_a_diverged_half():
    """The two sides of a branch shuffle each among themselves, at instructions of their own."""
    body = """
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra LOW;
    shfl.sync.bfly.b32 %r10, %r1, 3, 31, 0xFFFF0000;
    bra JOIN;
    LOW: shfl.sync.bfly.b32 %r10, %r1, 5, 31, 0xFFFF;
    JOIN: activemask.b32 %r11;"""
    value, together = warp(body, WORDS)
    np.testing.assert_array_equal(value, np.where(LANE < 16, WORDS[LANE ^ 5], WORDS[LANE ^ 3]))
    np.testing.assert_array_equal(together, np.full(32, 0xFFFFFFFF))


@pytest.mark.parametrize("truth", [np.zeros(32), np.ones(32), LANE % 3 == 0, LANE >= 20], ids=["none", "all", "3", "20"])
def test_vote(truth):
    body = """
    setp.ne.u32 %p1, %r1, 0;
    vote.sync.all.pred %p2, %p1, -1;
    vote.sync.any.pred %p3, %p1, -1;
    vote.sync.uni.pred %p4, %p1, -1;
    vote.sync.all.pred %p5, !%p1, -1;
    vote.sync.ballot.b32 %r10, %p1, -1;
    vote.sync.ballot.b32 %r11, !%p1, -1;
    selp.u32 %r12, 1, 0, %p2;
    selp.u32 %r13, 1, 0, %p3;
    selp.u32 %r14, 1, 0, %p4;
    selp.u32 %r15, 1, 0, %p5;"""
    truth = np.asarray(truth, bool)
    results = warp(body, truth.astype(np.uint32), outputs=6)
    for result in results:
        assert len(set(result)) == 1
    expected = [bits(truth), bits(~truth), truth.all(), truth.any(), truth.all() or not truth.any(), not truth.any()]
    assert [int(result[0]) for result in results] == [int(value) for value in expected]


def test_vote_of_a_part():
    """Bits of lanes outside the mask are zero, and the other lanes keep their registers."""
    body = """
    mov.u32 %r10, 7;
    setp.lt.u32 %p2, %r0, 12;
    setp.ne.u32 %p1, %r1, 0;
    @%p2 vote.sync.ballot.b32 %r10, %p1, 0xFFF;"""
    (ballot,) = warp(body, FEW, outputs=1)
    np.testing.assert_array_equal(ballot, np.where(LANE < 12, bits(np.where(LANE < 12, FEW, 0)), 7))


@pytest.mark.parametrize("width", [32, 64])
def test_match(width):
    load = "mov.b32 %r9, %r1;" if width == 32 else "mov.b64 %rd9, {%r2, %r1};"
    register = "%r9" if width == 32 else "%rd9"
    body = f"""{load}
    match.any.sync.b{width} %r10, {register}, -1;
    match.all.sync.b{width} %r11|%p1, {register}, -1;
    selp.u32 %r12, 1, 0, %p1;"""
    low = RNG.integers(0, 2, 32, dtype=np.uint32)
    any_lanes, all_lanes, predicate = warp(body, FEW, low, outputs=3)
    key = FEW if width == 32 else FEW.astype(np.uint64) << np.uint64(32) | low
    np.testing.assert_array_equal(any_lanes, [bits(key == value) for value in key])
    np.testing.assert_array_equal(all_lanes, OUT)
    np.testing.assert_array_equal(predicate, OUT)
    same = np.full(32, 9, np.uint32)
    any_lanes, all_lanes, predicate = warp(body, same, same, outputs=3)
    assert set(any_lanes) == set(all_lanes) == {0xFFFFFFFF}
    assert set(predicate) == {1}


def test_redux():
    operations = [("add", "u32"), ("add", "s32"), ("min", "u32"), ("max", "u32"), ("min", "s32"), ("max", "s32"),
                  ("and", "b32"), ("or", "b32"), ("xor", "b32")]  # fmt: skip
    body = "".join(f"redux.sync.{op}.{type} %r{10 + n}, %r1, -1;\n" for n, (op, type) in enumerate(operations))
    for values in (WORDS, WORDS | np.uint32(0x80000001), WORDS & np.uint32(0x7FFFFFFF)):
        signed = values.view(np.int32)
        total = int(values.astype(np.uint64).sum()) % 2**32
        expected = [total, total, values.min(), values.max(), signed.min().view(np.uint32), signed.max().view(np.uint32),
                    np.bitwise_and.reduce(values), np.bitwise_or.reduce(values), np.bitwise_xor.reduce(values)]  # fmt: skip
        for result, value, operation in zip(warp(body, values, outputs=9), expected, operations, strict=True):
            assert set(result) == {np.uint32(value)}, operation


def test_redux_of_a_part():
    body = """
    mov.u32 %r10, 5;
    setp.ge.u32 %p1, %r0, 30;
    @%p1 redux.sync.add.u32 %r10, %r0, 0xC0000000;"""
    (total,) = warp(body, outputs=1)
    assert total.tolist() == [5] * 30 + [61, 61]


def test_elect_and_activemask():
    body = """
    mov.u32 %r10, 99;
    mov.u32 %r11, 99;
    mov.u32 %r12, 99;
    setp.ge.u32 %p1, %r0, 5;
    @!%p1 bra JOIN;
    elect.sync %r10|%p2, 0xFFFFFFE0;
    selp.u32 %r11, 1, 0, %p2;
    activemask.b32 %r12;
    JOIN:"""
    leader, elected, active = warp(body, outputs=3)
    np.testing.assert_array_equal(leader, np.where(LANE < 5, 99, 5))
    np.testing.assert_array_equal(elected, np.where(LANE < 5, 99, LANE == 5))
    np.testing.assert_array_equal(active, np.where(LANE < 5, 99, 0xFFFFFFE0))


def test_movmatrix():
    """NumPy's transpose of the 8 x 8 matrix, of which a lane holds two elements; twice, and in place, the matrix itself."""
    name = "movmatrix.sync.aligned.m8n8.trans.b16"
    transposed, again = warp(f"{name} %r10, %r1;\nmov.b32 %r11, %r10;\n{name} %r11, %r11;", WORDS)
    np.testing.assert_array_equal(transposed.view("<u2").reshape(8, 8), WORDS.view("<u2").reshape(8, 8).T)
    np.testing.assert_array_equal(again, WORDS)


def test_exited_lanes_are_not_waited_for():
    """A member mask means its non-exited lanes, whether the others end before or after the rest comes to wait."""
    early = """
    mov.u32 %r10, 1;
    setp.ge.u32 %p1, %r0, 20;
    @%p1 ret;
    redux.sync.add.u32 %r10, %r0, -1;"""
    late = """
    mov.u32 %r10, 1;
    setp.lt.u32 %p1, %r0, 20;
    @%p1 bra REDUCE;
    ret;
    REDUCE: redux.sync.add.u32 %r10, %r0, -1;"""
    for body in (early, late):
        (total,) = warp(body, outputs=1)
        assert total.tolist() == [190] * 20 + [0] * 12


def test_warp_sync_at_different_instructions():
    """bar.warp.sync orders lanes that execute any bar.warp.sync with the same mask."""
    body = """
    setp.lt.u32 %p1, %r0, 16;
    mov.u32 %r5, buffer;
    shl.b32 %r6, %r0, 2;
    add.u32 %r5, %r5, %r6;
    @%p1 bra READ;
    st.shared.u32 [%r5+-64], %r1;
    bar.warp.sync -1;
    mov.u32 %r10, 3;
    bra JOIN;
    READ: bar.warp.sync -1;
    ld.shared.u32 %r10, [%r5];
    JOIN:"""
    (value,) = warp(body, WORDS, outputs=1, declarations=".shared .align 4 .b32 buffer[16];")
    np.testing.assert_array_equal(value, np.where(LANE < 16, np.roll(WORDS, 16), 3))


def test_bar_red():
    """Counted over all threads, those of a last warp that is not full too."""
    body = (
        WORD
        + """
    ld.global.u32 %r1, [%rd21];
    setp.ne.u32 %p1, %r1, 0;
    bar.red.popc.u32 %r10, 0, %p1;
    bar.red.popc.u32 %r11, 0, !%p1;
    bar.red.and.pred %p2, 0, %p1;
    bar.red.or.pred %p3, 0, %p1;
    selp.u32 %r12, 1, 0, %p2;
    selp.u32 %r13, 1, 0, %p3;
    add.s64 %rd22, %rd1, %rd20;
    st.global.u32 [%rd22], %r10;
    add.s64 %rd22, %rd2, %rd20;
    st.global.u32 [%rd22], %r11;
    add.s64 %rd22, %rd3, %rd20;
    st.global.u32 [%rd22], %r12;
    add.s64 %rd22, %rd4, %rd20;
    st.global.u32 [%rd22], %r13;"""
    )
    for truth in (RNG.integers(0, 2, 75), np.zeros(75), np.ones(75)):
        truth = truth.astype(np.uint32)
        outputs = run(body, [truth, *[np.zeros(75, np.uint32) for _ in range(4)]], block=(75,))[1:]
        expected = [truth.sum(), 75 - truth.sum(), truth.all(), truth.any()]
        for output, value in zip(outputs, expected, strict=True):
            assert set(output) == {int(value)}


SPECIALS = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%warpid", "%nwarpid", "WARP_SZ", "%total_smem_size", "%dynamic_smem_size"),
    *(f"%lanemask_{name}" for name in ("eq", "lt", "le", "gt", "ge")),
)


@pytest.mark.parametrize(("grid", "block"), [((2, 3, 2), (5, 3, 3)), ((3,), (70,)), ((1, 2), (4, 16))])
def test_special_registers(grid, block):
    gx, gy, gz = (*grid, 1, 1)[:3]
    bx, by, bz = (*block, 1, 1)[:3]
    threads, ctas = bx * by * bz, gx * gy * gz
    body = """
    mov.u32 %r1, %ctaid.z;
    mov.u32 %r2, %nctaid.y;
    mov.u32 %r3, %ctaid.y;
    mad.lo.u32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %nctaid.x;
    mov.u32 %r3, %ctaid.x;
    mad.lo.u32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %ntid.z;
    mov.u32 %r3, %tid.z;
    mad.lo.u32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %ntid.y;
    mov.u32 %r3, %tid.y;
    mad.lo.u32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.u32 %r1, %r1, %r2, %r3;
    """ + f"mul.wide.u32 %rd1, %r1, {4 * len(SPECIALS)};\nadd.s64 %rd0, %rd0, %rd1;\n"
    for number, name in enumerate(SPECIALS):
        body += f"mov.u32 %r4, {name};\nst.global.u32 [%rd0+{4 * number}], %r4;\n"
    module = ".extern .shared .align 16 .b8 dynamic[];"
    declarations = ".shared .align 4 .b8 static[4];"
    options = {"module": module, "declarations": declarations, "smem_bytes": 48}
    (found,) = run(body, [np.zeros((ctas * threads, len(SPECIALS)), np.uint32)], block, grid, **options)
    rows = itertools.product(range(gz), range(gy), range(gx), range(bz), range(by), range(bx))
    for row, (cz, cy, cx, tz, ty, tx) in zip(found.tolist(), rows, strict=True):
        thread = tx + bx * (ty + by * tz)
        lane = thread % 32
        masks = [range(lane, lane + 1), range(lane), range(lane + 1), range(lane + 1, 32), range(lane, 32)]
        assert row == [
            *(tx, ty, tz, bx, by, bz, cx, cy, cz, gx, gy, gz),
            *(lane, thread // 32, -(-threads // 32), 32, 16 + 48, 48),
            *(sum(1 << other for other in mask) for mask in masks),
        ]
