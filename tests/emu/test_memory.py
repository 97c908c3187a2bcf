"""Loads, stores, atomics, matrix loads and state spaces through PTX, against NumPy."""

import numpy as np
import pytest
from ptx_text import WORD, kernel, run

from ptx_inline.emu import emulate

RNG = np.random.default_rng(4)
LANE = np.arange(32)
WORDS = RNG.integers(0, 2**32, 128, dtype=np.uint32)
BYTES = RNG.integers(0, 256, 512, dtype=np.uint8)

REGISTER = {8: "h", 16: "h", 32: "r", 64: "rd"}
VECTORS = [(bits, count) for bits in (8, 16, 32, 64) for count in (1, 2, 4)] + [(32, 8)]


@pytest.mark.parametrize("space", ["global", "shared", "local", "generic"])
@pytest.mark.parametrize(("bits", "count"), VECTORS)
def test_every_width_and_vector(bits, count, space):
    """Bytes go in from global memory, through the space, and out again."""
    size = bits * count // 8
    names = ", ".join(f"%{REGISTER[bits]}{10 + k}" for k in range(count))
    value = f"{{{names}}}" if count > 1 else names
    vector = f".v{count}" if count > 1 else ""
    place = "%rd30" if space == "generic" else {"shared": "%rd6", "local": "buffer", "global": "%rd5"}[space]
    body = f"""
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd4, %r0, {size};
    add.s64 %rd0, %rd0, %rd4;
    add.s64 %rd1, %rd1, %rd4;
    add.s64 %rd5, %rd2, %rd4;
    mov.u64 %rd6, sbuffer;
    add.s64 %rd6, %rd6, %rd4;
    cvta.shared.u64 %rd30, %rd6;
    ld.global{vector}.b{bits} {value}, [%rd0];
    """
    name = "" if space == "generic" else "." + space
    body += f"st{name}{vector}.b{bits} [{place}], {value};\n"
    body += "\n".join(f"mov.b{max(bits, 16)} %{REGISTER[bits]}{10 + k}, 0;" for k in range(count))
    body += f"\nld{name}{vector}.b{bits} {value}, [{place}];\nst.global{vector}.b{bits} [%rd1], {value};"
    data = RNG.integers(0, 256, 32 * size, dtype=np.uint8)
    declarations = f".shared .align 32 .b8 sbuffer[{32 * size}];\n.local .align 32 .b8 buffer[{size}];"
    _, found, _ = run(body, [data, np.zeros_like(data), np.zeros_like(data)], declarations=declarations)
    np.testing.assert_array_equal(found, data)


NARROW = [("s8", np.int8), ("u8", np.uint8), ("s16", np.int16), ("u16", np.uint16), ("s32", np.int32), ("u32", np.uint32)]


@pytest.mark.parametrize(
    ("type", "dtype", "register"),
    [(*each, register) for each in NARROW for register in (32, 64) if np.dtype(each[1]).itemsize * 8 < register],
)
def test_loads_into_wider_registers(type, dtype, register):
    """Signed types are extended by their sign, the others by zeros; stores take the low bits."""
    size = np.dtype(dtype).itemsize
    name = f"%{REGISTER[register]}5"
    body = f"""
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd4, %r0, {size};
    add.s64 %rd0, %rd0, %rd4;
    add.s64 %rd2, %rd2, %rd4;
    mul.wide.u32 %rd4, %r0, {register // 8};
    add.s64 %rd1, %rd1, %rd4;
    ld.global.{type} {name}, [%rd0];
    st.global.b{register} [%rd1], {name};
    xor.b{register} {name}, {name}, -1;
    st.global.{type} [%rd2], {name};"""
    values = BYTES[: 32 * size].view(dtype)
    _, wide, inverted = run(body, [values, np.zeros(32, f"i{register // 8}"), np.zeros(32, dtype)])
    np.testing.assert_array_equal(wide, values.astype(f"i{register // 8}"))
    np.testing.assert_array_equal(inverted, ~values)


def test_generic_addresses():
    """A generic address finds its space; cvta.to and isspacep know it."""
    body = """
    mov.u32 %r0, 11;
    st.shared.u32 [sbuffer+4], %r0;
    mov.u32 %r0, 22;
    st.local.u32 [lbuffer+4], %r0;
    cvta.shared.u64 %rd5, sbuffer;
    cvta.local.u64 %rd6, lbuffer;
    cvta.global.u64 %rd7, gbuffer;
    """
    for number, register in enumerate(("%rd5", "%rd6", "%rd7")):
        body += f"ld.u32 %r5, [{register}+4];\nst.global.u32 [%rd0+{16 * number}], %r5;\n"
        for k, space in enumerate(("shared", "local", "global")):
            body += f"isspacep.{space} %p1, {register};\nselp.u32 %r6, 1, 0, %p1;\n"
            body += f"st.global.u32 [%rd0+{16 * number + 4 * k + 4}], %r6;\n"
    body += """
    cvta.to.shared.u64 %rd8, %rd5;
    ld.shared.u32 %r7, [%rd8+4];
    st.global.u32 [%rd0+48], %r7;
    cvta.to.global.u64 %rd8, %rd7;
    ld.global.u32 %r7, [%rd8+8];
    st.global.u32 [%rd0+52], %r7;"""
    declarations = ".shared .align 8 .b8 sbuffer[16];\n.local .align 8 .b8 lbuffer[8];"
    module = ".global .align 4 .u32 gbuffer[3] = {32, 33, 34};"
    (found,) = run(body, [np.zeros(14, np.uint32)], (1,), declarations=declarations, module=module)
    assert found.tolist() == [11, 1, 0, 0, 22, 0, 1, 0, 33, 0, 0, 1, 11, 34]


def test_module_variables():
    """Initialisers of every kind, constant memory, alignment, what has none reads zero."""
    module = """
    .global .align 1 .u8 bytes[3] = {1, 255, 0x10};
    .const .align 8 .f32 floats[3] = {0f3F800000, -2.5, 0f7F800000};
    .global .align 8 .s64 wide = -5;
    .const .align 4 .b32 table[2][2] = {{1, 2}, {3}};
    .visible .global .align 4 .u32 zeros[2];"""
    body = ""
    loads = [("global.u8", "bytes+1"), ("global.s8", "bytes+1"), ("const.u32", "floats"), ("const.u32", "floats+4"),
             ("const.b32", "floats+8"), ("global.u32", "wide"), ("global.u32", "wide+4"), ("const.u32", "table+4"),
             ("const.u32", "table+8"), ("const.u32", "table+12"), ("global.u32", "zeros+4")]  # fmt: skip
    for number, (kind, place) in enumerate(loads):
        body += f"ld.{kind} %r1, [{place}];\nst.global.u32 [%rd0+{4 * number}], %r1;\n"
    body += "mov.u64 %rd5, wide;\nand.b64 %rd5, %rd5, 7;\nst.global.u32 [%rd0+44], %rd5;"
    (found,) = run(body, [np.zeros(12, np.uint32)], (1,), module=module)
    minus = np.float32(-2.5).view(np.uint32)
    assert found.tolist() == [255, 2**32 - 1, 0x3F800000, minus, 0x7F800000, 2**32 - 5, 2**32 - 1, 2, 3, 0, 0, 0]


def test_module_variables_can_be_written():
    body = """
    atom.global.add.u32 %r1, [count], 1;
    mul.wide.u32 %rd4, %r1, 4;
    add.s64 %rd0, %rd0, %rd4;
    st.global.u32 [%rd0], 1;"""
    (found,) = run(body, [np.zeros(64, np.uint32)], module=".global .align 4 .u32 count = 32;")
    assert found.tolist() == [0] * 32 + [1] * 32


def test_parameters():
    """Parameters at their aligned places, of every type, and read by parts."""
    params = "u8 u64 f32 u16 s32 f64 b64"
    body = """
    ld.param.u8 %r1, [p0];
    ld.param.f32 %f1, [p2];
    ld.param.s16 %r2, [p3];
    ld.param.s32 %r3, [p4];
    ld.param.u32 %r4, [p5+4];
    ld.param.v2.u16 {%h1, %h2}, [p4];
    ld.param.u64 %rd6, [p6];
    st.global.u32 [%rd1], %r1;
    st.global.f32 [%rd1+4], %f1;
    st.global.u32 [%rd1+8], %r2;
    st.global.u32 [%rd1+12], %r3;
    st.global.u32 [%rd1+16], %r4;
    st.global.u16 [%rd1+20], %h2;
    st.global.u16 [%rd1+22], %h1;
    st.global.u64 [%rd1+24], %rd6;"""
    args = [200, np.zeros(8, np.uint32), 1.5, -3, -0x12345678, np.float64(2.5), 7.25]
    found = run(body, args, (1,), params=params)[1]
    high = int(np.float64(2.5).view(np.uint64)) >> 32
    low16, high16 = (-0x12345678 & 0xFFFF), (-0x12345678 >> 16 & 0xFFFF)
    expected = [200, 0x3FC00000, 2**32 - 3, 2**32 - 0x12345678, high, high16 | low16 << 16]
    assert found[:6].tolist() == expected
    assert found[6:].view(np.float64)[0] == 7.25


def test_scalars_come_back_as_they_were():
    assert run("", [3, -1], (1,), params="u32 s64") == (3, -1)


def test_dynamic_shared_memory():
    """It begins behind the static part, aligned as declared; two names are one memory."""
    body = """
    mov.u32 %r1, first;
    mov.u32 %r2, second;
    mov.u32 %r3, static;
    st.global.u32 [%rd0], %r1;
    st.global.u32 [%rd0+4], %r2;
    st.global.u32 [%rd0+8], %r3;
    st.shared.u32 [first+60], 5;
    ld.shared.u32 %r4, [second+60];
    st.global.u32 [%rd0+12], %r4;"""
    options = {"module": ".extern .shared .align 16 .b8 first[];\n.extern .shared .align 4 .b8 second[];",
               "declarations": ".shared .align 4 .b8 static[20];"}  # fmt: skip
    (found,) = run(body, [np.zeros(4, np.uint32)], (1,), smem_bytes=64, **options)
    assert found.tolist() == [32, 32, 0, 5]


def test_local_memory_is_each_lanes_own():
    body = WORD + """
    ld.global.u32 %r1, [%rd21];
    st.local.u32 [mine], %r1;
    bar.sync 0;
    ld.local.u32 %r2, [mine];
    not.b32 %r2, %r2;
    st.global.u32 [%rd21], %r2;"""
    (found,) = run(body, [WORDS[:96]], (96,), declarations=".local .align 4 .b8 mine[4];")
    np.testing.assert_array_equal(found, ~WORDS[:96])


# atomics

INTEGER_ATOMICS = {
    ("add", "u32"): lambda old, b: old + b,
    ("min", "u32"): min,
    ("max", "u32"): max,
    ("and", "b32"): lambda old, b: old & b,
    ("or", "b32"): lambda old, b: old | b,
    ("xor", "b32"): lambda old, b: old ^ b,
    ("exch", "b32"): lambda old, b: b,
    ("inc", "u32"): lambda old, b: 0 if old >= b else old + 1,
    ("dec", "u32"): lambda old, b: b if old == 0 or old > b else old - 1,
    ("add", "u64"): lambda old, b: old + b,
    ("max", "u64"): max,
    ("xor", "b64"): lambda old, b: old ^ b,
}


@pytest.mark.parametrize("space", ["global", "shared", ""])
@pytest.mark.parametrize(("op", "type"), INTEGER_ATOMICS)
def test_integer_atomics(op, type, space):
    """All lanes at one word: the old values are what one lane after the other finds."""
    bits = int(type[1:])
    size, name = bits // 8, REGISTER[bits]
    place = {"global": "%rd2", "shared": "buffer", "": "%rd10"}[space]
    dot = f".{space}" if space else ""
    body = f"""
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd4, %r0, {size};
    add.s64 %rd0, %rd0, %rd4;
    add.s64 %rd1, %rd1, %rd4;
    setp.eq.u32 %p0, %r0, 0;
    ld.global.b{bits} %{name}20, [%rd2];
    @%p0 st.shared.b{bits} [buffer], %{name}20;
    cvta.shared.u64 %rd10, buffer;
    bar.sync 0;
    ld.global.b{bits} %{name}21, [%rd0];
    atom{dot}.{op}.{type} %{name}22, [{place}], %{name}21;
    st.global.b{bits} [%rd1], %{name}22;
    bar.sync 0;
    @%p0 ld{dot}.b{bits} %{name}23, [{place}];
    @%p0 st.global.b{bits} [%rd2], %{name}23;"""
    dtype = np.dtype(f"u{size}")
    values = RNG.integers(0, 40 if op in ("inc", "dec") else 2**bits, 32, dtype=dtype)
    start = np.array([RNG.integers(0, 40 if op in ("inc", "dec") else 2**bits, dtype=dtype)])
    declarations = f".shared .align 8 .b{bits} buffer[1];"
    _, old, last = run(body, [values, np.zeros(32, dtype), start], declarations=declarations)
    current, expected = int(start[0]), []
    for value in values.tolist():
        expected.append(current)
        current = INTEGER_ATOMICS[op, type](current, value) % 2**bits
    assert (old.tolist(), last.tolist()) == (expected, [current])


@pytest.mark.parametrize("op", ["min", "max"])
def test_signed_atomics(op):
    body = WORD + f"ld.global.u32 %r1, [%rd21];\nred.global.{op}.s32 [%rd1], %r1;"
    found = run(body, [WORDS, np.zeros(1, np.int32)], (128,))[1]
    signed = WORDS.view(np.int32)
    assert found[0] == (min(0, signed.min()) if op == "min" else max(0, signed.max()))


def test_compare_and_swap():
    """Each lane advances the word from its own number to the next: in order, every one succeeds."""
    body = WORD + """
    add.u32 %r1, %r0, 1;
    atom.global.cas.b32 %r2, [%rd1], %r0, %r1;
    st.global.u32 [%rd21], %r2;
    atom.global.cas.b32 %r3, [%rd2], 1000, %r1;"""
    old, chain, untouched = run(body, [np.zeros(32, np.uint32), np.zeros(1, np.uint32), np.full(1, 7, np.uint32)])
    assert (old.tolist(), chain.tolist(), untouched.tolist()) == (list(range(32)), [32], [7])


@pytest.mark.parametrize("space", ["global", "shared"])
def test_float_atomics(space):
    """Additions round one by one, in the order of the lanes."""
    place = {"global": "%rd2", "shared": "buffer"}[space]
    body = WORD + f"""
    ld.global.f32 %f1, [%rd21];
    add.s64 %rd22, %rd1, %rd20;
    setp.eq.u32 %p0, %r0, 0;
    mov.f32 %f2, 0f00000000;
    @%p0 st.shared.f32 [buffer], %f2;
    bar.sync 0;
    atom.{space}.add.f32 %f3, [{place}], %f1;
    st.global.f32 [%rd22], %f3;
    bar.sync 0;
    @%p0 ld.{space}.f32 %f4, [{place}];
    @%p0 st.global.f32 [%rd2], %f4;"""
    values = RNG.standard_normal(32).astype(np.float32) * np.float32(10) ** RNG.integers(-3, 4, 32).astype(np.float32)
    old, last = run(body, [values, np.zeros(32, np.float32), np.zeros(1, np.float32)],
                    declarations=".shared .align 4 .f32 buffer[1];")[1:]  # fmt: skip
    current, expected = np.float32(0), []
    for value in values:
        expected.append(current)
        current = np.float32(current + value)
    assert old.tolist() == [float(value) for value in expected]
    assert last[0] == current


def test_packed_half_atomics():
    body = WORD + "ld.global.b32 %r1, [%rd21];\natom.global.add.noftz.f16x2 %r2, [%rd1], %r1;\nst.global.b32 [%rd21], %r2;"
    values = RNG.standard_normal((32, 2)).astype(np.float16)
    old, last = run(body, [values, np.zeros((1, 2), np.float16)])
    sums = np.zeros((33, 2), np.float16)
    for lane in range(32):
        sums[lane + 1] = sums[lane] + values[lane]
    np.testing.assert_array_equal(old, sums[:32])
    np.testing.assert_array_equal(last[0], sums[32])


# matrices

ROWS = """
mov.u32 %r0, %laneid;
mul.wide.u32 %rd4, %r0, 16;
add.s64 %rd0, %rd0, %rd4;
add.s64 %rd1, %rd1, %rd4;
mov.u32 %r1, buffer;
shl.b32 %r2, %r0, 4;
add.u32 %r1, %r1, %r2;
"""
ROW_BUFFER = ".shared .align 16 .b8 buffer[512];"


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("shape", ["m8n8 b16", "m8n8.trans b16", "m8n16 b8x16.b4x16_p64", "m8n16 b8x16.b6x16_p32"])
def test_ldmatrix(shape, count):
    form, kind = shape.split()
    trans = ".trans" if "trans" in form else ""
    registers = ", ".join(f"%r{10 + k}" for k in range(count))
    body = ROWS + f"""
    ld.global.v4.u32 {{%r20, %r21, %r22, %r23}}, [%rd0];
    st.shared.v4.u32 [%r1], {{%r20, %r21, %r22, %r23}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.{form.partition(".")[0]}.x{count}{trans}.shared.{kind} {{{registers}}}, [%r1];
    """ + "\n".join(f"st.global.u32 [%rd1+{4 * k}], %r{10 + k};" for k in range(count))
    rows = BYTES.reshape(32, 16)
    found = run(body, [rows, np.zeros((32, 4), np.uint32)], declarations=ROW_BUFFER)[1][:, :count]
    if kind == "b16":
        matrices = rows.view(np.uint16).reshape(4, 8, 8).astype(np.uint32)
        matrices = matrices.transpose(0, 2, 1) if trans else matrices
        expected = matrices[:count, LANE // 4, LANE % 4 * 2] | matrices[:count, LANE // 4, LANE % 4 * 2 + 1] << 16
    else:
        width = 4 if "b4" in kind else 6
        integers = [int.from_bytes(row.tobytes(), "little") for row in rows]
        codes = np.array([[row >> width * k & (1 << width) - 1 for k in range(16)] for row in integers], np.uint32)
        codes = codes.reshape(4, 8, 4, 4)[:count, LANE // 4, LANE % 4]
        expected = (codes << np.arange(0, 32, 8, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    np.testing.assert_array_equal(found, expected.T)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix(count, trans):
    """What ldmatrix loads of the same form, stmatrix stores."""
    registers = ", ".join(f"%r{20 + k}" for k in range(count))
    body = ROWS + f"""
    ld.global.v4.u32 {{%r20, %r21, %r22, %r23}}, [%rd0];
    stmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 [%r1], {{{registers}}};
    bar.warp.sync -1;
    setp.lt.u32 %p1, %r0, {8 * count};
    @%p1 ld.shared.v4.u32 {{%r20, %r21, %r22, %r23}}, [%r1];
    @%p1 st.global.v4.u32 [%rd1], {{%r20, %r21, %r22, %r23}};"""
    values = WORDS.reshape(32, 4)
    found = run(body, [values, np.zeros((32, 4), np.uint32)], declarations=ROW_BUFFER)[1]
    matrices = np.zeros((4, 8, 8), np.uint16)
    for lane in range(32):
        for k in range(count):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                place = (column, row) if trans else (row, column)
                matrices[k][place] = int(values[lane, k]) >> 16 * half & 0xFFFF
    np.testing.assert_array_equal(found[: 8 * count], matrices[:count].reshape(-1, 8).view(np.uint32))


def test_several_kernels_in_one_file():
    one, two = kernel("st.global.u32 [%rd0], 1;", "u64"), kernel("st.global.u32 [%rd0], 2;", "u64")
    both = one + two.partition(".address_size 64\n")[2].replace("entry k(", "entry other(")
    for entry, value in (("k", 1), ("other", 2)):
        assert emulate(both, (1,), (1,), [np.zeros(1, np.uint32)], entry=entry).outputs[0].tolist() == [value]
    with pytest.raises(ValueError, match=r"^entry must be one of k, other, got None$"):
        emulate(both, (1,), (1,), [np.zeros(1, np.uint32)])
