"""MMAs read from a physical sm_120 GPU, reproduced by real PTX: parser, decoder, register file and arithmetic together.

Covered is every case of ``sm120_mma_transcripts.json``: f8f6f4 (m16n8k32), mxf8f6f4 (1X), mxf4 (2X) and mxf4nvf4 (2X ue8m0,
4X ue4m3), all dense, with the selectors that each case names.
"""

import numpy as np
import pytest

from ptx_inline.emu import Output, UnsupportedPTX, emulate
from ptx_inline.isa.instructions import INSTRUCTIONS
from ptx_inline.isa.transcripts import input_registers, result_hash, transcripts
from ptx_inline.toolchain import PtxKernel


def kernel(case) -> PtxKernel:
    """One MMA whose registers are loaded, lane by lane, from arrays: a, b, c, sfa, sfb, and d to be filled."""
    found = INSTRUCTIONS[case.mma]
    counts = found.registers
    names = ("a", "b", "c", "sfa", "sfb", "d")
    lines = [".version 9.1", ".target sm_120a", ".address_size 64", ".visible .entry one_mma("]
    lines += [",\n".join(f".param .u64 p_{name}" for name in names), ")", "{", ".reg .b32 %lane;", ".reg .b64 %p, %o;"]
    lines += [f".reg .b32 %{name}<{counts[name]}>;" for name in ("a", "b", "sfa", "sfb") if counts[name]]
    lines += [".reg .f32 %c<4>, %d<4>;", "mov.u32 %lane, %laneid;"]

    def places(name):
        return [f"ld.param.u64 %p, [p_{name}];", f"mul.wide.u32 %o, %lane, {4 * counts[name]};", "add.u64 %p, %p, %o;"]

    for name in names[:-1]:
        if counts[name]:
            lines += places(name)
            lines += [f"ld.global.b32 %{name}{i}, [%p+{4 * i}];" for i in range(counts[name])]
    operands = ["{" + ", ".join(f"%{name}{i}" for i in range(counts[name])) + "}" for name in ("d", "a", "b", "c")]
    if found.sf_vec_size:
        byte_a, thread_a, byte_b, thread_b = case.selectors
        operands += ["{%sfa0}", f"{{{byte_a}, {thread_a}}}", "{%sfb0}", f"{{{byte_b}, {thread_b}}}"]
    lines.append(f"{found.ptx_name(case.a_format, case.b_format, case.sf_format)} {', '.join(operands)};")
    lines += places("d")
    lines += [f"st.global.f32 [%p+{4 * i}], %d{i};" for i in range(4)]
    return PtxKernel("\n".join([*lines, "ret;", "}", ""]), ("u32*", "u32*", "f32*", "u32*", "u32*", "f32*"))


CASES = transcripts()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ptx_reproduces_the_gpu(case):
    inputs = input_registers()
    arguments = [inputs[name] for name in ("a", "b", "c", "sfa", "sfb")]
    counts = INSTRUCTIONS[case.mma].registers
    arguments[0], arguments[1] = (np.ascontiguousarray(x[:, : counts[n]]) for x, n in zip(arguments, "ab", strict=False))
    result = emulate(kernel(case), (1,), (32,), (*arguments, Output((32, 4), np.float32)), "sm_120a")
    assert result_hash(result.outputs[5]) == case.hash


def test_all_kinds_are_covered():
    assert {case.mma for case in CASES} == {key for key in INSTRUCTIONS if not key.startswith("m16n8k16.")}
    assert len(CASES) == 18


@pytest.mark.parametrize("key", sorted({case.mma for case in CASES}))
def test_the_kernels_assemble(cache_directory, key):
    case = next(case for case in CASES if case.mma == key)
    sass = kernel(case).sass("sm_120a")
    assert ("OMMA" if "k64" in key else "QMMA") in sass


def test_another_selector_is_another_hash():
    case = next(case for case in CASES if case.name == "nvf4_4X_ue4m3_s0000")
    text = kernel(case).text.replace("{%sfa0}, {0, 0}", "{%sfa0}, {0, 1}")
    inputs = input_registers()
    arguments = [inputs[name].copy() for name in ("a", "b", "c", "sfa", "sfb")]
    d = emulate(text, (1,), (32,), (*arguments, Output((32, 4), np.float32))).outputs[5]
    assert result_hash(d) != case.hash


def test_an_unknown_shape_is_refused():
    text = kernel(CASES[0]).text.replace("m16n8k32", "m16n8k31").replace("m16n8k64", "m16n8k63")
    with pytest.raises(UnsupportedPTX, match=r"unknown matrix instruction: mma\.sync\.aligned"):
        emulate(text, (1,), (32,), [np.zeros(512, np.uint32)] * 6)
