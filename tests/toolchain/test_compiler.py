"""From Python to PTX, cubin and SASS without a GPU: what is inlined, what is not fused, what is refused."""

import gc
import pickle
import re

import pytest

from ptx_inline import compiling
from ptx_inline.toolchain import Kernel, compiler, instruction_mix
from ptx_inline.toolchain.compiler import entry_name, to_llvm, to_ltoir
from ptx_inline.toolchain.disasm import InstructionMix


def make_multiply_add(fused):
    """Kernel ``y = a * b + c``, by operators or by the fma snippet."""
    from numba import cuda

    from ptx_inline import device as dev

    fma = dev.fma_rn_f32

    def multiply_add(a, b, c, y):
        i = cuda.threadIdx.x
        y[i] = fma(a[i], b[i], c[i]) if fused else a[i] * b[i] + c[i]

    return multiply_add


def make_nested():
    """Kernel that calls a Numba device function, which calls a snippet."""
    from numba import cuda

    from ptx_inline import device as dev

    convert = dev.cvt_f32_f16

    @cuda.jit(device=True)
    def widen(bits):
        return convert(bits)

    def nested(x, y):
        y[cuda.threadIdx.x] = widen(x[cuda.threadIdx.x])

    return nested


def multiply_add(fused):
    return Kernel(make_multiply_add, ("f32*",) * 4, {"fused": fused})


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_120a"])
def test_products_and_sums_are_fused_only_where_asked(cache_directory, target):
    plain, fused = multiply_add(False), multiply_add(True)
    assert instruction_mix(plain.sass(target)).count("FFMA") == 0
    assert instruction_mix(plain.sass(target)).count("FMUL") == 1
    assert instruction_mix(fused.sass(target)).count("FFMA") == 1
    assert "fma.rn.f32" in fused.ptx(target)
    assert "fma" not in plain.ptx(target)


def test_kernels_are_equal_when_they_are_made_of_the_same():
    kernel = multiply_add(True)
    assert kernel == multiply_add(True)
    assert len({kernel, multiply_add(True), multiply_add(False), multiply_add(1)}) == 3
    assert kernel != Kernel(make_multiply_add, ("f32*",) * 4, {"fused": True}, launch_bounds=(128,))
    assert kernel != Kernel(make_multiply_add, ("f32*",) * 4, {"fused": True}, programmatic=True)
    assert kernel != "kernel"


def test_a_kernel_in_another_process_is_made_of_the_same():
    kernel = Kernel(make_multiply_add, ("f32*",) * 4, {"fused": True}, launch_bounds=(128, 2), programmatic=True)
    copy = pickle.loads(pickle.dumps(kernel))
    assert copy == kernel
    assert copy.name == kernel.name
    assert copy.launch_bounds == (128, 2)
    assert copy.programmatic


def test_ptx_and_machine_code_are_made_of_one_compilation(cache_directory, monkeypatch):
    read, compiled = [], []
    monkeypatch.setattr("ptx_inline.toolchain.kernel.to_llvm", lambda *made_of: read.append(made_of) or to_llvm(*made_of))
    monkeypatch.setattr(
        "ptx_inline.toolchain.kernel.to_ltoir",
        lambda program, target: compiled.append(target.name) or to_ltoir(program, target),
    )
    kernel = multiply_add(True)
    assert "fma.rn.f32" in kernel.ptx("sm_90a")
    assert kernel.cubin("sm_90a").startswith(b"\x7fELF")
    assert compiled == ["sm_90a"]
    assert ".target sm_80" in kernel.ptx("sm_80")
    assert compiled == ["sm_90a", "sm_80"]
    assert len(read) == 1, "Numba's part is the same for every target"


def test_snippets_are_inlined_into_the_final_ptx(cache_directory):
    ptx = Kernel(make_nested, ("u16*", "f32*")).ptx("sm_120a")
    assert ".target sm_120a" in ptx
    assert "cvt.f32.f16" in ptx
    assert not re.search(r"^\s*call", ptx, re.MULTILINE)
    assert ".func" not in ptx


def test_resources_and_name(cache_directory):
    kernel = multiply_add(True)
    resources = kernel.resources("sm_90a")
    assert 0 < resources.registers <= 255
    assert (resources.spill_store_bytes, resources.spill_load_bytes, resources.stack_bytes) == (0, 0, 0)
    assert "multiply_add" in entry_name(kernel.cubin("sm_90a"))
    assert kernel.name == f"{__name__}.make_multiply_add(fused=True)"
    with pytest.raises(ValueError, match="exactly one kernel, got 0"):
        entry_name(b"nothing")


def test_launch_bounds_reach_the_assembler(cache_directory):
    bounded = Kernel(make_multiply_add, ("f32*",) * 4, {"fused": True}, launch_bounds=(128, 2)).ptx("sm_90a")
    assert re.search(r"\.maxntid\s+128", bounded)
    assert re.search(r"\.minnctapersm\s+2", bounded)


def test_an_instruction_that_the_target_lacks_is_named(cache_directory):
    from nbfmha.kernels.probe import probe_kernel

    for target in ("sm_90a", "sm_100a", "sm_120"):
        with pytest.raises(Exception, match="mma kind::mxf4nvf4 needs sm_120a or sm_121a"):
            probe_kernel("blockscale").cubin(target)


def test_numba_is_left_as_it_was_found(cache_directory):
    from numba.core.types.functions import BaseFunction
    from numba.cuda import dispatcher

    from nbfmha.kernels.probe import probe_kernel

    def patched():
        return dispatcher.get_current_device, dispatcher.CUDADispatcher.compile_device, BaseFunction.get_call_type

    before = patched()
    assert gc.isenabled()
    multiply_add(True).ltoir("sm_90a")
    with pytest.raises(Exception, match="needs sm_120a"):
        probe_kernel("blockscale").ltoir("sm_90a")
    assert patched() == before
    assert gc.isenabled()
    gc.disable()
    try:
        multiply_add(True).ltoir("sm_90a")
        assert not gc.isenabled(), "the caller's choice"
    finally:
        gc.enable()


def test_a_call_is_typed_once(cache_directory, monkeypatch):
    from numba.core.types.functions import BaseFunction

    asked, ask = [], BaseFunction.get_call_type

    def asking(function, context, args, kws):
        asked.append((function, args))
        return ask(function, context, args, kws)

    monkeypatch.setattr(compiling, "_signatures", {})
    monkeypatch.setattr(BaseFunction, "get_call_type", asking)
    multiply_add(False).ltoir("sm_80")
    assert len(asked) == len(set(asked)) > 0


def test_a_snippet_file_is_compiled_once_a_target(cache_directory, monkeypatch):
    from numba.cuda.cudadrv import nvrtc

    compiler._snippets_to_ltoir.cache_clear()
    compiled = []
    compile_source = nvrtc.compile

    def counting(source, name, cc, **options):
        compiled.append((name, cc))
        return compile_source(source, name, cc, **options)

    monkeypatch.setattr(nvrtc, "compile", counting)
    for target in ("sm_90a", "sm_80", "sm_90a"):
        multiply_add(True).ltoir(target)
    assert compiled == [("arith.cu", (9, 0, "a")), ("arith.cu", (8, 0))]


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/               @P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0040*/                   STL [R1], R8 ;
        /*0050*/                   EXIT ;
.L_x_1:
        /*0060*/                   BRA `(.L_x_1);
        /*0070*/                   NOP;
"""


def test_instruction_mix_counts_opcodes_without_padding():
    mix = instruction_mix(LISTING)
    assert mix.total == 6
    assert mix.mma == 1
    assert mix.local_memory == 1
    assert mix.count("LDG") == 1
    assert mix.opcodes["BRA"] == 1
    assert instruction_mix("") == InstructionMix({})
