"""Device functions that are the same are compiled once, and no others; what comes out is what a kernel alone gives."""

import gc
import re

import numpy as np
import pytest

from nbfmha.kernels.quantize import flat_kernel
from ptx_inline import compiling
from ptx_inline.toolchain import Kernel, Target, shared_functions
from ptx_inline.toolchain.compiler import link_ptx, to_llvm, to_ltoir

SM_90A = Target.parse("sm_90a")


@pytest.fixture
def compiled(monkeypatch, cache_directory):
    """Names of device functions, in the order in which Numba compiles them."""
    from numba.cuda import dispatcher

    names, compile_cuda = [], dispatcher.compile_cuda

    def counting(function, *args, **kws):
        names.append(function.__name__)
        return compile_cuda(function, *args, **kws)

    monkeypatch.setattr(dispatcher, "compile_cuda", counting)
    monkeypatch.setattr(shared_functions, "_overloads", {})
    return names


def make_scale(factor, offset=0.0):
    """Kernel ``y = factor * x + offset``; its inner function knows the factor alone."""
    from numba import cuda

    @cuda.jit(device=True, forceinline=True)
    def multiply(x):
        return x * factor

    @cuda.jit(device=True, forceinline=True)
    def add(x):
        return multiply(x) + offset

    def scale(x, y):
        i = cuda.threadIdx.x
        y[i] = add(x[i])

    return scale


def scale(factor, offset=0.0):
    return Kernel(make_scale, ("f32*", "f32*"), {"factor": factor, "offset": offset})


def without_names(ptx):
    return re.sub(r"_ZN\w+|_cudapy_smem_\d+", "name", ptx)


def test_the_same_is_compiled_once(compiled):
    scale(3.0, 1.0).ltoir("sm_80")
    gc.collect()  # the first kernel's functions are gone
    scale(3.0, 1.0).ltoir("sm_120a")
    assert compiled == ["add", "multiply"]
    scale(3.0, 2.0).ltoir("sm_80")
    assert compiled == ["add", "multiply", "add"]


@pytest.mark.parametrize("other", [1, True, -1.0, 1.5])
def test_another_value_is_another_function(compiled, other):
    scale(1.0).ltoir("sm_80")
    scale(other).ltoir("sm_80")
    assert compiled == ["add", "multiply"] * 2


def test_zeros_of_both_signs_differ(compiled):
    scale(1.0, 0.0).ltoir("sm_80")
    scale(1.0, -0.0).ltoir("sm_80")
    assert compiled == ["add", "multiply", "add"]


table = np.zeros(4, np.float32)


def make_look_up():
    from numba import cuda

    @cuda.jit(device=True)
    def look_up(i):
        return table[i]

    def kernel(y):
        y[cuda.threadIdx.x] = look_up(cuda.threadIdx.x)

    return kernel


def test_an_array_is_what_it_holds_now(compiled):
    Kernel(make_look_up, ("f32*",)).ltoir("sm_80")
    table[:] = 1.0
    Kernel(make_look_up, ("f32*",)).ltoir("sm_80")
    assert compiled == ["look_up"] * 2


def make_two_buffers():
    """Kernel that reverses x and y by way of two arrays in shared memory, of two functions of the same code."""
    from numba import cuda
    from numba.core.types import float32

    def make_reverse():
        @cuda.jit(device=True)
        def reverse(value):
            buffer = cuda.shared.array(32, float32)
            buffer[31 - cuda.threadIdx.x] = value
            cuda.syncwarp()
            return buffer[cuda.threadIdx.x]

        return reverse

    first, second = make_reverse(), make_reverse()

    def kernel(x, y):
        i = cuda.threadIdx.x
        x[i], y[i] = first(x[i]), second(y[i])

    return kernel


def test_shared_memory_is_each_functions_own(compiled):
    assert Kernel(make_two_buffers, ("f32*", "f32*")).resources("sm_80").shared_bytes == 256
    assert compiled == ["reverse", "reverse"]


def test_kernels_are_what_they_are_alone(compiled, monkeypatch):
    def code(scale):
        kernel = flat_kernel("float16", "nvfp4", scale, False)
        program = to_llvm(kernel.factory(**kernel.constants), kernel.signature, None)
        return without_names(link_ptx(to_ltoir(program, SM_90A), SM_90A))

    code("amax")
    alone = len(compiled)
    after_another = code("four_over_six")
    assert len(compiled) < 2 * alone, "some of it is shared"
    monkeypatch.setattr(shared_functions, "_overloads", {})
    monkeypatch.setattr(compiling, "_signatures", {})
    assert code("four_over_six") == after_another
