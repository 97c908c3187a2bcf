"""PTX text: what is refused, by line and name, and that literals, labels, scopes and comments mean what PTX says."""

import numpy as np
import pytest
from ptx_text import kernel, line_of, run

from ptx_inline.emu import UnsupportedPTX, emulate
from ptx_inline.emu.parse import parse


def results(body, count=1, **options):
    (found,) = run(body, [np.zeros(count, np.uint32)], (1,), **options)
    return found.tolist()


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("frobnicate.b32 %r1, %r2;", "unknown instruction"),
        ("tex.2d.v4.f32.f32 {%f1, %f2, %f3, %f4}, [%rd0, {%f1, %f2}];", "expected ']', got ','"),
        ("add.fancy.u32 %r1, %r2, %r3;", "unknown modifier .fancy"),
        ("ld.global.sideways.u32 %r1, [%rd0];", "unknown modifier .sideways"),
        ("add.u32 %r1, %r2;", "wrong number of operands"),
        ("add %r1, %r2, %r3;", "no type"),
        ("mov.u32 %r1, %r99999;", "unknown register %r99999"),
        ("mov.u32 %r1, nowhere;", "unknown name nowhere"),
        ("ld.global.u32 %r1, [nowhere];", "unknown name nowhere"),
        ("ld.shared.u32 %r1, [p0];", "p0 is not in this state space"),
        ("st.param.u32 [p0], %r1;", "parameters are read-only"),
        ("ld.global.v2.u32 {%r1, %r2, %r3}, [%rd0];", "vector of another length"),
        ("ld.global.u32 %r1, %r2;", "expected an address"),
        ("add.u32 5, %r2, %r3;", "destination is not a register"),
        ("add.u32 %r1, !%p1, %r3;", "unexpected '!'"),
        ("bra nowhere;", "unknown label nowhere"),
        ("call foo;", "unknown instruction"),
        ("cp.async.ca.shared.global [%r1], [%rd0], 12;", "unsupported cp.async"),
        ("cp.async.cg.shared.global [%r1], [%rd0], 8;", "unsupported cp.async"),
        ("cp.async.shared.global [%r1], [%rd0], 16;", "unsupported cp.async"),
        ("cp.async.cg.shared.global [%r1], [%rd0], 16, %r2, %rd1;", "unsupported cp.async"),
        ("cp.async.cg.shared.global.L2::cache_hint [%r1], [%rd0], 16;", "unsupported cp.async"),
        ("cp.async.cg.shared.global.L2::cache_hint [%r1], [%rd0], 16, 8, %rd1, %rd2;", "unsupported cp.async"),
        ("cp.async.cg.shared.global.L2::cache_hint [%r1], [%rd0], 16, %r2;", "expected a register of 64 bits"),
        ("cp.async.cg.shared.global.L2::cache_hint [%r1], [%rd0], 16, %rd1, %rd2;", "expected a register of 32 bits"),
        ("cp.async.ca.shared.global [%r1], [%rd0], 8, %p1;", "expected a register of 32 bits"),
        ("cp.async.wait_group %r1;", "expected an integer constant"),
        ("createpolicy.fractional.L2::evict_first.b64 %rd1, 1.0;", "unknown instruction"),
        ("ld.global.L2::cache_hint.u32 %r1, [%rd0], %rd1;", "wrong number of operands"),
        ("atom.global.nand.b32 %r1, [%rd0], %r2;", "unsupported atomic operation"),
        ("match.any.sync %r1, %r2, -1;", "unsupported match"),
        ("vote.ballot.b32 %r1, %p1;", "wrong number of operands"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%fd1}, {%fd1}, {%fd1}, {%fd1};", "unknown matrix instruction"),
        ("ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r1}, [%r2];", "unsupported matrix access"),
        ("movmatrix.sync.aligned.m8n8.b16 %r1, %r2;", "unknown matrix instruction"),
        ("movmatrix.sync.aligned.m8n8.trans.b16 _, %r2;", "expected a register of 32 bits"),
        ("movmatrix.sync.aligned.m8n8.trans.b16 %r1, %rd2;", "expected a register of 32 bits"),
        ("mbarrier.pending_count.b64 %r1, %rd1;", "unsupported mbarrier operation"),
        ("mov.u32 %r1, %clock + 1;", "cannot read '+'"),
        ("add.u32 %r1, %clock, 1;", "a clock can only be moved to a register"),
        ("@%r77 mov.u32 %r1, 1;", "unknown register %r77"),
        (".reg .b128 %q<2>;", "unsupported register type"),
        (".shared .f128 x[2];", "unsupported .f128 in a declaration"),
        (".callprototype _ ();", "unsupported statement"),
    ],
)
def test_refused_with_line_and_text(statement, what):
    ptx = kernel(f"mov.u32 %r1, 1;\n{statement} // HERE\nmov.u32 %r1, 2;", "u64")
    with pytest.raises(UnsupportedPTX) as caught:
        emulate(ptx, (1,), (1,), [np.zeros(1, np.uint32)])
    assert str(caught.value) == f"line {line_of(ptx, '// HERE')}: {what}: {statement} // HERE"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (".func (.param .b32 r) f () { ret; }", "unsupported directive: .func (.param .b32 r) f () { ret; }"),
        (".tex .u64 t;", "unsupported directive: .tex .u64 t;"),
        (".global .u32 x = other;", "unsupported initialiser: .global .u32 x = other;"),
        (".global x;", "declaration without a type: .global x;"),
        ("$$$ ?", "unsupported directive: $$$ ?"),
    ],
)
def test_refused_in_a_module(module, message):
    text = module if "?" not in module else module.replace(" ?", "")
    with pytest.raises(UnsupportedPTX) as caught:
        parse(kernel("", module=text))
    assert str(caught.value) == f"line 4: {message.replace(' ?', '')}"


def test_characters_that_are_no_ptx():
    with pytest.raises(UnsupportedPTX, match=r"^line 2: cannot read '\?\?\?'$"):
        parse(".version 8.8\n???")


@pytest.mark.parametrize("last", ["mov.u32 %r1, 1;", "@%p1 ret;", "@%p1 bra BACK;"])
def test_code_that_runs_past_its_end(last):
    ptx = kernel(f"BACK: mov.u32 %r2, 1;\n{last} // HERE").replace("ret;\n}", "}")
    with pytest.raises(UnsupportedPTX) as caught:
        emulate(ptx, (1,), (1,), [])
    assert str(caught.value) == f"line {line_of(ptx, '// HERE')}: runs past the end of the kernel: {last} // HERE"


def test_kernel_without_instructions():
    with pytest.raises(UnsupportedPTX, match=r"^kernel k has no instructions$"):
        emulate(".version 8.8\n.target sm_120a\n.entry k() { }", (1,), (1,), [])


def test_comments():
    body = """
    /* mov.u32 %r1, 5;
       over lines */ mov.u32 %r1, 3; // mov.u32 %r1, 4;
    st.global.u32 [%rd0], /* in the middle */ %r1;
    frobnicate; // HERE"""
    ptx = kernel(body, "u64")
    with pytest.raises(UnsupportedPTX, match=rf"^line {line_of(ptx, 'frob')}: unknown instruction: frobnicate; // HERE$"):
        emulate(ptx, (1,), (1,), [np.zeros(1, np.uint32)])
    assert results(body.replace("frobnicate;", "")) == [3]


@pytest.mark.parametrize(
    ("type", "literal", "bits"),
    [
        ("u32", "0x1F", 31),
        ("u32", "0XffU", 255),
        ("u32", "017", 15),
        ("u32", "0b101", 5),
        ("u32", "0", 0),
        ("s32", "-1", 2**32 - 1),
        ("s32", "-0x10", 2**32 - 16),
        ("u32", "4294967295U", 2**32 - 1),
        ("f32", "0f3F800000", 0x3F800000),
        ("f32", "0Fbf800000", 0xBF800000),
        ("f32", "1.5", 0x3FC00000),
        ("f32", "-2.5e-1", 0xBE800000),
        ("f32", "0d3FB999999999999A", 0x3DCCCCCD),
        ("f32", "-0f00000000", 0x80000000),
        ("b32", "WARP_SZ", 32),
    ],
)
def test_immediates(type, literal, bits):
    register = "%f1" if type == "f32" else "%r1"
    assert results(f"mov.{type} {register}, {literal};\nst.global.b32 [%rd0], {register};") == [bits]


def test_wide_immediates():
    body = """
    mov.f64 %fd1, 0d400921FB54442D18;
    st.global.f64 [%rd0], %fd1;
    mov.s64 %rd1, -2;
    st.global.u64 [%rd0+8], %rd1;"""
    (found,) = run(body, [np.zeros(2, np.float64)], (1,))
    assert found[0] == np.pi
    assert found.view(np.int64)[1] == -2


def test_guards():
    body = """
    setp.eq.u32 %p1, 1, 1;
    mov.u32 %r1, 0;
    @%p1 add.u32 %r1, %r1, 1;
    @!%p1 add.u32 %r1, %r1, 10;
    setp.eq.and.u32 %p2|%p3, 1, 2, %p1;
    @%p2 add.u32 %r1, %r1, 100;
    @%p3 add.u32 %r1, %r1, 1000;
    st.global.u32 [%rd0], %r1;"""
    assert results(body) == [1001]


def test_registers_and_labels_of_scopes():
    """Inner names hide outer ones; a label may be branched to before it stands there; two scopes may use one label."""
    part = """
    {
    .reg .b32 %r1;
    .reg .pred %q;
    mov.u32 %r1, 100;
    setp.eq.u32 %q, %r2, 0;
    @%q bra DONE;
    add.u32 %r3, %r3, %r1;
    DONE: add.u32 %r3, %r3, 1;
    }
    """
    body = "mov.u32 %r1, 7;\nmov.u32 %r2, 0;\nmov.u32 %r3, 0;\n" + part + "mov.u32 %r2, 1;\n" + part + """
    setp.eq.u32 %p1, %r2, 5;
    @%p1 bra DONE;
    add.u32 %r3, %r3, %r1;
    DONE: st.global.u32 [%rd0], %r3;"""
    assert results(body) == [1 + 101 + 7]


def test_branch_targets_in_a_scope():
    body = """
    mov.u32 %r1, 1;
    {
    LIST: .branchtargets A, B;
    brx.idx %r1, LIST;
    A: mov.u32 %r2, 5;
    bra END;
    B: mov.u32 %r2, 6;
    END: st.global.u32 [%rd0], %r2;
    }"""
    assert results(body) == [6]


def test_an_inner_scope_branches_to_an_outer_label():
    body = "mov.u32 %r1, 1;\n{\nbra OUT;\n}\nmov.u32 %r1, 2;\nOUT: st.global.u32 [%rd0], %r1;"
    assert results(body) == [1]


def test_hints_and_debug_lines_are_skipped():
    body = ".loc 1 20 3\nmov.u32 %r1, 4;\n.pragma \"nounroll\";\n.loc 1 21, function_name $L, inlined_at 1 2 3\n"
    ptx = kernel(body + "st.global.u32 [%rd0], %r1;", "u64", module='.file 1 "a.cu"\n.file 2 "b.cu", 12, 34')
    ptx = ptx.replace("k(.param .u64 p0)", "k(.param .u64 .ptr .align 1 p0)\n.maxntid 64, 1, 1\n.minnctapersm 2")
    ptx += ".section .debug_str\n{\n$str: .b8 1, 2\n}\n"
    assert emulate(ptx, (1,), (1,), [np.zeros(1, np.uint32)]).outputs[0].tolist() == [4]


def test_operand_forms():
    """Vectors with a sink, offsets with signs, symbols with offsets, packing and unpacking."""
    body = """
    mov.b64 %rd5, 0x1122334455667788;
    mov.b64 {%r1, _}, %rd5;
    mov.b32 {%h1, %h2}, %r1;
    mov.b32 %r2, {%h2, %h1};
    mov.u32 %r3, array + 8;
    st.shared.u32 [%r3 + -4], %r2;
    ld.shared.u32 %r4, [array+4];
    add.s64 %rd0, %rd0, 8;
    st.global.v2.u32 [%rd0+-8], {%r1, %r4};"""
    assert results(body, 2, declarations=".shared .align 4 .b32 array[4];") == [0x55667788, 0x77885566]
