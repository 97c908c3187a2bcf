"""PTX text to machine code, without a GPU: what is assembled, what is refused, what the disk keeps."""

import pytest

from ptx_inline.toolchain import Kernel, PtxKernel, instruction_mix
from ptx_inline.toolchain import kernel as module
from ptx_inline.toolchain.compiler import entry_name

TEXT = """
.version 8.0
.target sm_80
.address_size 64

.visible .entry scale(.param .u64 x, .param .f32 factor)
{
    .reg .b32 %r<2>;
    .reg .f32 %f<4>;
    .reg .b64 %d<2>;
    ld.param.u64 %d0, [x];
    ld.param.f32 %f0, [factor];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d1, %r0, 4;
    add.s64 %d0, %d0, %d1;
    ld.global.f32 %f1, [%d0];
    mul.f32 %f2, %f1, %f0;
    add.f32 %f3, %f2, %f0;
    st.global.f32 [%d0], %f3;
    ret;
}
"""
SCALE = PtxKernel(TEXT, ("f32*", "f32"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_120a"])
def test_text_is_assembled_for_each_target(cache_directory, target):
    kernel = PtxKernel(TEXT, ("f32*", "f32"))
    mix = instruction_mix(kernel.sass(target))
    # without a rounding modifier an assembler may fuse these two
    assert (mix.count("FMUL"), mix.count("FADD"), mix.count("FFMA")) == (1, 1, 0)
    assert 0 < kernel.resources(target).registers < 32
    assert kernel.ptx(target) == TEXT


def test_machine_code_is_kept_on_disk_by_its_text(cache_directory, monkeypatch):
    cubin = PtxKernel(TEXT, ("f32*", "f32")).cubin("sm_90a")

    def refuse(source, target):
        raise AssertionError("assembled again")

    monkeypatch.setattr(module, "link_cubin", refuse)
    assert PtxKernel(TEXT, ("f32*", "f32")).cubin("sm_90a") == cubin
    for other, target in ((TEXT.replace("mul.f32", "add.f32"), "sm_90a"), (TEXT, "sm_120a")):
        with pytest.raises(AssertionError, match="assembled again"):
            PtxKernel(other, ("f32*", "f32")).cubin(target)


def test_what_the_assembler_refuses(cache_directory):
    with pytest.raises(RuntimeError, match=r"linking for sm_90a failed: .*Not a name of any known instruction: 'nonsense'"):
        PtxKernel(TEXT.replace("mul.f32", "nonsense "), ("f32*", "f32")).cubin("sm_90a")
    with pytest.raises(RuntimeError, match=r"linking for sm_80 failed"):
        PtxKernel(TEXT.replace("sm_80", "sm_90"), ("f32*", "f32")).cubin("sm_80")
    second = TEXT.split(".address_size 64")[1].replace("scale", "other")
    with pytest.raises(ValueError, match="exactly one kernel, got 2"):
        PtxKernel(TEXT + second, ("f32*", "f32")).cubin("sm_90a")


def test_a_function_that_the_assembler_adds_is_no_kernel(cache_directory):
    divides = TEXT.replace("add.s64 %d0, %d0, %d1;", "add.s64 %d0, %d0, %d1; div.u64 %d1, %d0, %d1; add.s64 %d0, %d0, %d1;")
    cubin = PtxKernel(divides, ("f32*", "f32")).cubin("sm_90a")
    assert b".text.__cuda_sm20_div_u64" in cubin
    assert entry_name(cubin) == "scale"


def test_wrong_arguments():
    with pytest.raises(TypeError, match="text must be PTX, got bytes"):
        PtxKernel(TEXT.encode(), ("f32*",))
    with pytest.raises(ValueError, match="f33"):
        PtxKernel(TEXT, ("f33*",))
    with pytest.raises(ValueError, match="arch must be sm_80 or newer"):
        SCALE.cubin("sm_75")


def test_launch_is_that_of_kernels():
    assert PtxKernel.launch is Kernel.launch
    with pytest.raises(TypeError, match="the kernel takes 2 arguments, got 1"):
        SCALE.launch((1,), (32,), (4096,))


@pytest.mark.gpu
def test_launch(gpu):
    x = gpu.arange(32, dtype=gpu.float32, device="cuda")
    expected = x * 3 + 3
    SCALE.launch((1,), (32,), (x, 3.0))
    assert gpu.equal(x, expected)
