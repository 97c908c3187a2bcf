"""Breakpoints and what a stopped warp shows, against what was put into its registers and memory."""

import ml_dtypes
import numpy as np
import pytest

from ptx_inline.emu import Breakpoint, Output, Profile, TrapError, emulate, stops
from ptx_inline.isa.arithmetic import mma_registers, to_containers
from ptx_inline.isa.fragments import fragment
from ptx_inline.isa.instructions import INSTRUCTIONS

HEAD = ".version 8.8\n.target sm_120a\n.address_size 64\n"
#: Counts %count up three times in every thread; even lanes also take the branch in between. Lines are counted from 1.
COUNTING = (
    HEAD
    + """.visible .entry counting(.param .u64 out)
{
    .reg .pred %p, %even;
    .reg .u16 %half;
    .reg .s32 %minus;
    .reg .f32 %float;
    .reg .f64 %double;
    .reg .f16 %small;
    .reg .b32 %tid, %count, %address, %parity, %value, %cta, %index;
    .reg .b64 %out;
    .shared .align 4 .b8 words[300];
    mov.u32 %tid, %tid.x;
    mov.u32 %count, 0;
    mov.u32 %address, words;
    mad.lo.u32 %address, %tid, 4, %address;
    st.shared.u32 [%address], %tid;
    neg.s32 %minus, %tid;
    cvt.rn.f32.u32 %float, %tid;
    cvt.f64.f32 %double, %float;
    cvt.rn.f16.f32 %small, %float;
    cvt.u16.u32 %half, %tid;
    and.b32 %parity, %tid, 1;
    setp.eq.u32 %even, %parity, 0;
again:
    add.u32 %count, %count, 1; // turn
    @!%even bra odd;
    add.u32 %value, %count, %tid; // even lanes
odd:
    setp.lt.u32 %p, %count, 3;
    @%p bra again;
    mov.u32 %cta, %ctaid.x;
    mad.lo.u32 %index, %cta, 64, %tid;
    ld.param.u64 %out, [out];
    mad.wide.u32 %out, %index, 4, %out;
    st.global.u32 [%out], %count;
    ret;
}
"""
)
LAUNCH = (COUNTING, (2,), (64,), (Output((128,), np.uint32),))


def line_of(text, ptx=COUNTING):
    return next(number for number, line in enumerate(ptx.splitlines(), 1) if text in line)


def places(*breakpoints):
    return [(stop.cta[0], stop.warp, stop.line) for stop in stops(*LAUNCH, breakpoints=breakpoints)]


# breakpoints


def test_a_line_stops_every_warp_of_every_cta_each_time():
    line = line_of("// turn")
    assert places(Breakpoint(line=line)) == [(cta, warp, line) for cta in (0, 1) for warp in (0, 1) for _ in range(3)]


def test_cta_and_warp_narrow_it():
    line = line_of("// turn")
    assert places(Breakpoint(line=line, cta=(1, 0, 0), warp=1)) == [(1, 1, line)] * 3


def test_when_is_a_question_to_the_stop():
    line = line_of("// turn")
    condition = Breakpoint(line=line, when=lambda stop: stop.register("%count")[0] == 1)
    assert places(condition) == [(cta, warp, line) for cta in (0, 1) for warp in (0, 1)]


def test_when_alone_is_asked_before_every_instruction():
    asked = []
    assert places(Breakpoint(when=lambda stop: asked.append(stop.line))) == []
    assert len(asked) == emulate(*LAUNCH).profile.warp_instructions
    assert asked[:2] == [line_of("%tid.x"), line_of("mov.u32 %count")]


def test_any_of_several_breakpoints_stops_once():
    first, second = line_of("// turn"), line_of("mov.u32 %cta")
    everywhere = Breakpoint(line=first, warp=0)
    found = places(Breakpoint(line=first, cta=(0, 0, 0), warp=0), Breakpoint(line=second, warp=0), everywhere)
    assert found == [(cta, 0, line) for cta in (0, 1) for line in (first, first, first, second)]


def test_lanes_are_those_about_to_execute():
    even = next(stops(*LAUNCH, breakpoints=[Breakpoint(line=line_of("// even lanes"))]))
    assert even.lanes == list(range(0, 32, 2))
    guarded = next(stops(*LAUNCH, breakpoints=[Breakpoint(line=line_of("bra odd"))]))
    assert guarded.lanes == list(range(32)), "guards are not yet applied"
    text = "add.u32 %value, %count, %tid; // even lanes"
    assert repr(even) == f"Stop(line {even.line}: '{text}', CTA (0, 0, 0), warp 0, 16 lanes)"


def test_the_kernel_runs_no_further_than_it_is_driven():
    trapping = COUNTING.replace("    mov.u32 %cta,", "    trap;\n    mov.u32 %cta,")
    run = stops(trapping, *LAUNCH[1:], breakpoints=[Breakpoint(line=line_of("// turn"))])
    for _ in range(3):
        next(run)
    with pytest.raises(TrapError, match="trap executed by lanes 0-31"):
        next(run)


def test_a_run_with_stops_leaves_what_a_run_without_leaves():
    plain = emulate(*LAUNCH)
    seen = []
    everywhere = Breakpoint(when=lambda stop: True)
    stopped = emulate(*LAUNCH, breakpoints=[everywhere], on_stop=lambda stop: seen.append(stop.line))
    np.testing.assert_array_equal(plain.outputs[0], np.full(128, 3))
    np.testing.assert_array_equal(stopped.outputs[0], plain.outputs[0])
    np.testing.assert_array_equal(stopped.profile.counts, plain.profile.counts)
    assert isinstance(stopped.profile, Profile)
    assert len(seen) == plain.profile.warp_instructions


# registers and shared memory


def test_registers_have_the_dtype_they_are_declared_with():
    stop = next(stops(*LAUNCH, breakpoints=[Breakpoint(line=line_of("// turn"), warp=1)]))
    thread = np.arange(32, 64)
    expected = {
        "%tid": thread.astype(np.uint32), "%minus": -thread.astype(np.int32), "%float": thread.astype(np.float32),
        "%double": thread.astype(np.float64), "%half": thread.astype(np.uint16), "%small": thread.astype(np.float16),
        "%even": thread % 2 == 0,
    }  # fmt: skip
    for name, values in expected.items():
        found = stop.register(name)
        assert found.dtype == values.dtype, name
        np.testing.assert_array_equal(found, values, err_msg=name)
    np.testing.assert_array_equal(stop.register("%tid", warp=0), np.arange(32))
    everything = stop.registers()
    assert {"%p", "%out", "%index", *expected} <= set(everything)
    np.testing.assert_array_equal(everything["%minus"], expected["%minus"])


def test_values_are_copies():
    stop = next(stops(*LAUNCH, breakpoints=[Breakpoint(line=line_of("// turn"))]))
    stop.register("%tid")[:] = 7
    stop.shared()[:] = 7
    np.testing.assert_array_equal(stop.register("%tid"), np.arange(32))
    assert stop.shared()[4] == 1


def test_shared_memory_shows_what_was_written_and_what_was_not():
    stop = next(stops(*LAUNCH, breakpoints=[Breakpoint(line=line_of("// turn"), warp=1)]))
    np.testing.assert_array_equal(stop.shared(0, 256).view(np.uint32), np.arange(64))
    np.testing.assert_array_equal(stop.shared(256), np.full(44, 0xCD))
    assert stop.shared().size == 300
    assert stop.shared(300, 0).size == 0
    for offset, size in ((-4, 4), (0, 301), (301, 0)):
        with pytest.raises(ValueError, match=f"must lie in the 300 bytes of shared memory, got {offset}, {size}"):
            stop.shared(offset, size)


def test_a_stop_that_is_over_says_so():
    run = stops(*LAUNCH, breakpoints=[Breakpoint(line=line_of("// turn"))])
    first, second = next(run), next(run)
    np.testing.assert_array_equal(second.register("%count"), np.ones(32))
    for read in (lambda: first.register("%count"), first.registers, first.shared):
        with pytest.raises(RuntimeError, match="read what you need of a stop before asking for the next one"):
            read()
    last = list(stops(*LAUNCH, breakpoints=[Breakpoint(line=line_of("ret;"))]))[-1]
    assert last.cta == (1, 0, 0)
    with pytest.raises(RuntimeError, match="the run has gone on"):
        last.register("%count")


# matrix operands


def mma_kernel(name, counts, selectors):
    """One warp a CTA: registers from memory, the MMA twice (the second adds to the first), registers to memory."""
    a, b = counts["a"], counts["b"]
    lines = [HEAD, ".visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 s, .param .u64 d) {"]
    lines += [".reg .b32 %lane, %a<4>, %b<2>, %sfa, %sfb;\n.reg .f32 %c<4>;\n.reg .b64 %at;\n.reg .b16 %id<4>;"]
    lines += [f"mov.b16 %id{i}, {selector};" for i, selector in enumerate(selectors)]
    lines += ["mov.u32 %lane, %laneid;"]

    def load(parameter, registers, pitch, offset=0):
        lines.extend([f"ld.param.u64 %at, [{parameter}];", f"mad.wide.u32 %at, %lane, {pitch}, %at;"])
        lines.extend(f"ld.global.b32 {register}, [%at+{offset + 4 * i}];" for i, register in enumerate(registers))

    load("a", [f"%a{i}" for i in range(a)], 4 * a)
    load("b", [f"%b{i}" for i in range(b)], 4 * b)
    load("c", [f"%c{i}" for i in range(4)], 16)
    load("s", ["%sfa", "%sfb"], 8)
    braces = ["{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}" for name, count in (("c", 4), ("a", a), ("b", b))]
    scales = ", {%sfa}, {%id0, %id1}, {%sfb}, {%id2, %id3}" if counts["sfa"] else ""
    lines += [f"{name} {', '.join((*braces, braces[0]))}{scales};"] * 2
    lines += ["ld.param.u64 %at, [d];", "mad.wide.u32 %at, %lane, 16, %at;"]
    lines += [f"st.global.f32 [%at+{4 * i}], %c{i};" for i in range(4)]
    return "\n".join([*lines, "ret;", "}"])


DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn, "e2m3": ml_dtypes.float6_e2m3fn, "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "ue4m3": ml_dtypes.float8_e4m3fn,
    "ue8m0": ml_dtypes.float8_e8m0fnu, "f16": np.float16, "bf16": ml_dtypes.bfloat16,
}  # fmt: skip
BITS = {"e2m1": 4, "e2m3": 6, "e3m2": 6, "e4m3": 8, "e5m2": 8, "f16": 16, "bf16": 16}
CASES = [
    ("m16n8k64.mxf4nvf4.4x", "e2m1", "e2m1", "ue4m3", (0, 0, 0, 0)),
    ("m16n8k64.mxf4nvf4.4x", "e2m1", "e2m1", "ue4m3", (0, 1, 0, 3)),
    ("m16n8k64.mxf4nvf4.2x", "e2m1", "e2m1", "ue8m0", (2, 1, 0, 2)),
    ("m16n8k32.mxf8f6f4.1x", "e4m3", "e2m1", "ue8m0", (3, 0, 1, 1)),
    ("m16n8k32.f8f6f4", "e3m2", "e5m2", None, (0, 0, 0, 0)),
    ("m16n8k32.f8f6f4", "e2m1", "e2m3", None, (0, 0, 0, 0)),
    ("m16n8k16.f16", "f16", "f16", None, (0, 0, 0, 0)),
    ("m16n8k16.bf16", "bf16", "bf16", None, (0, 0, 0, 0)),
]


def values(codes, name):
    """Float64 of codes by another library's tables."""
    return codes.astype(np.uint16 if BITS.get(name, 8) == 16 else np.uint8).view(DTYPES[name]).astype(np.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}-{''.join(map(str, case[4]))}")
def test_operands_are_what_was_packed(case):
    key, a_format, b_format, sf_format, selectors = case
    description, rng = INSTRUCTIONS[key], np.random.default_rng(3)
    m, n, k = description.shape
    codes = {}
    for operand, name, shape in (("A", a_format, (m, k)), ("B", b_format, (n, k))):
        bits = BITS[name]
        codes[operand] = rng.integers(0, 2**bits, shape, np.uint16)
        codes[operand] &= np.uint16(0xBFFF if bits == 16 else 0xFFFF if bits < 8 else 0xBB)  # no NaN, no infinity
    stored = {
        operand: to_containers(codes[operand], name) if key.startswith("m16n8k32") else codes[operand]
        for operand, name in (("A", a_format), ("B", b_format))
    }
    c = rng.standard_normal((m, n)).astype(np.float32)
    packed = {operand: fragment(key, operand).pack(stored[operand]) for operand in ("A", "B")}
    packed["C"] = fragment(key, "C").pack(c.view(np.uint32))
    scale_words = np.full((32, 2), 0xEEEEEEEE, np.uint32)
    if sf_format:
        low, high = (0x20, 0x48) if sf_format == "ue4m3" else (0x78, 0x88)
        for place, (operand, rows) in enumerate((("SFA", m), ("SFB", n))):
            codes[operand] = rng.integers(low, high, (rows, k // description.sf_vec_size), np.uint8)
            ids = dict(zip(("byte_id", "thread_id"), selectors[2 * place : 2 * place + 2], strict=True))
            map_ = fragment(key, operand, **ids)
            packed[operand] = map_.pack(codes[operand], fill=0xEEEEEEEE)
            scale_words[:, place] = packed[operand][:, 0]
    ptx = mma_kernel(description.ptx_name(a_format, b_format, sf_format), description.registers, selectors)
    arguments = (packed["A"], packed["B"], packed["C"].view(np.float32), scale_words, Output((32, 4), np.float32))
    launch = (ptx, (1,), (32,), arguments)

    run = stops(*launch, breakpoints=[Breakpoint(mma=0), Breakpoint(mma=1)])
    stop = next(run)
    assert (stop.mma, stop.instruction.key, stop.lanes) == (0, key, list(range(32)))
    for operand, words in packed.items():
        np.testing.assert_array_equal(stop.operand(operand), words, err_msg=operand)
    np.testing.assert_array_equal(stop.codes("C").view(np.float32), c)
    np.testing.assert_array_equal(stop.matrix("C"), c.astype(np.float64))
    for operand, name in (("A", a_format), ("B", b_format)):
        np.testing.assert_array_equal(stop.codes(operand), stored[operand])
        np.testing.assert_array_equal(stop.matrix(operand), values(codes[operand], name), err_msg=operand)
    if sf_format:
        for operand in ("SFA", "SFB"):
            np.testing.assert_array_equal(stop.codes(operand), codes[operand])
            np.testing.assert_array_equal(stop.matrix(operand), values(codes[operand], sf_format), err_msg=operand)
    else:
        with pytest.raises(ValueError, match=f"must be one of A, B, C for {key}, which has no scales, got 'SFA'"):
            stop.matrix("SFA")

    stop = next(run)
    formats = {"a_format": a_format, "b_format": b_format, "sf_format": sf_format}
    names = ("byte_id_a", "thread_id_a", "byte_id_b", "thread_id_b")
    scales = (scale_words[:, 0], scale_words[:, 1]) if sf_format else ()
    ids = dict(zip(names, selectors, strict=True)) if sf_format else {}
    between = mma_registers(key, packed["A"], packed["B"], packed["C"].view(np.float32), *scales, **formats, **ids)
    assert stop.mma == 1
    np.testing.assert_array_equal(stop.operand("C"), between.view(np.uint32))
    assert list(run) == []


# what cannot be asked for


def test_operands_of_another_instruction_are_refused():
    stop = next(stops(*LAUNCH, breakpoints=[Breakpoint(line=line_of("// turn"))]))
    assert stop.mma is None
    for read in (lambda: stop.operand("A"), lambda: stop.fragment("C"), lambda: stop.matrix("B"), lambda: stop.instruction):
        with pytest.raises(ValueError, match=r"the warp must stand at an MMA for its operands, got 'add\.u32 %count"):
            read()


def test_unknown_names_and_warps_are_refused():
    stop = next(stops(*LAUNCH, breakpoints=[Breakpoint(line=line_of("// turn"))]))
    with pytest.raises(KeyError, match="%r99 is no register of counting; the PTX declares 15"):
        stop.register("%r99")
    for warp in (2, -1):
        with pytest.raises(ValueError, match=rf"warp must be in 0\.\.1, got {warp}"):
            stop.register("%tid", warp=warp)


def test_unknown_operands_are_refused():
    description = INSTRUCTIONS["m16n8k16.f16"]
    ptx = mma_kernel(description.mnemonic, description.registers, (0, 0, 0, 0))
    arrays = (np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32), np.zeros((32, 4), np.float32))
    arguments = (*arrays, np.zeros((32, 2), np.uint32), Output((32, 4), np.float32))
    stop = next(stops(ptx, (1,), (32,), arguments, breakpoints=[Breakpoint(mma=0)]))
    with pytest.raises(ValueError, match="operand must be one of A, B, C, SFA, SFB, got 'D'"):
        stop.matrix("D")


@pytest.mark.parametrize(
    ("breakpoint", "message"),
    [
        (Breakpoint(line=1), "breakpoint line 1 holds no instruction of counting"),
        (Breakpoint(line=9999), "breakpoint line 9999 holds no instruction of counting"),
        (Breakpoint(warp=2), r"breakpoint warp must be in 0\.\.1, got 2"),
        (Breakpoint(cta=(2, 0, 0)), r"breakpoint cta must be \(x, y, z\) in the grid \(2, 1, 1\), got \(2, 0, 0\)"),
        (Breakpoint(cta=(0,)), r"breakpoint cta must be \(x, y, z\) in the grid \(2, 1, 1\), got \(0,\)"),
    ],
)
def test_breakpoints_that_can_never_be_reached_are_refused(breakpoint, message):
    with pytest.raises(ValueError, match=message):
        stops(*LAUNCH, breakpoints=[breakpoint])


def test_no_breakpoint_at_all_is_refused():
    with pytest.raises(ValueError, match="breakpoints must name at least one place to stop, got none"):
        stops(*LAUNCH, breakpoints=[])
