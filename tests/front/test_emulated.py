"""Arrays of an emulated machine, and that host code takes them the way it takes arrays in GPU memory."""

import numpy as np
import pytest

import nbfmha
from nbfmha import gpu_arrays, nvfp4
from nbfmha.emulated import Machine
from nbfmha.kernels.qk import qk
from ptx_inline.emu import UninitializedReadError

COPY = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry copy(.param .u64 x, .param .u64 y)
{
    .reg .b64 %a<3>;
    .reg .b32 %v, %t;
    ld.param.u64 %a0, [x];
    ld.param.u64 %a1, [y];
    mov.u32 %t, %tid.x;
    mul.wide.u32 %a2, %t, 4;
    add.s64 %a0, %a0, %a2;
    add.s64 %a1, %a1, %a2;
    ld.global.u32 %v, [%a0];
    st.global.u32 [%a1], %v;
    ret;
}
"""


class Copy:
    """A kernel that copies 32-bit words."""

    name = "copy"

    def ptx(self, target):
        return COPY


@pytest.fixture
def machine():
    return Machine("sm_80")


def test_a_launch_changes_its_arrays_in_place(machine):
    values = np.arange(8, dtype=np.int32)
    x, y = machine.array(values), machine.empty((2, 4), "int32")
    values[:] = 0
    gpu_arrays.launch(Copy(), (1,), (8,), (x, y))
    np.testing.assert_array_equal(y.copy_to_host(), np.arange(8, dtype=np.int32).reshape(2, 4))
    np.testing.assert_array_equal(x.copy_to_host(), np.arange(8, dtype=np.int32))


def test_memory_that_nobody_wrote_is_no_result(machine):
    x, y = machine.array(np.arange(8, dtype=np.int32)), machine.empty((8,), "int32")
    with pytest.raises(RuntimeError, match=r"the array of shape \(8,\) was never written"):
        y.copy_to_host()
    with pytest.raises(UninitializedReadError, match="argument 0"):
        machine.launch(Copy(), (1,), (8,), (y, x))
    with pytest.raises(RuntimeError, match="copy left 4 bytes of argument 1 unwritten"):
        machine.launch(Copy(), (1,), (7,), (x, y))
    assert machine.empty((0, 3), "float32").copy_to_host().shape == (0, 3)


def test_one_array_twice_is_one_buffer(machine):
    x = machine.array(np.arange(4, dtype=np.uint32))
    machine.launch(Copy(), (1,), (4,), (x, x))
    np.testing.assert_array_equal(x.copy_to_host(), np.arange(4))


def test_what_does_not_fit_is_refused(machine):
    x = machine.array(np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="argument 1 must lie on the machine of those before it"):
        machine.launch(Copy(), (1,), (4,), (x, Machine("sm_80").array(np.zeros(4, np.int32))))
    with pytest.raises(ValueError, match=r"content must be int32 \(4,\), got int32 \(5,\)"):
        x.write(np.zeros(5, np.int32))
    with pytest.raises(ValueError, match="arch must be sm_80 or newer"):
        Machine("sm_70")


def test_bfloat16_is_kept_as_its_bits(machine):
    bits = np.array([[0x3F80, 0xC000]], np.uint16)
    array = machine.array(bits, "bfloat16")
    assert (array.dtype, array.host_dtype, array.shape) == ("bfloat16", np.uint16, (1, 2))
    np.testing.assert_array_equal(array.copy_to_host(), bits)


def test_public_functions_take_emulated_arrays():
    machine = Machine("sm_120a")
    values = np.random.default_rng(0).standard_normal((2, 17, 64)).astype(np.float16)
    there, here = nbfmha.quantize(machine.array(values)), nvfp4.quantize(values)
    assert there.codes.machine is machine
    np.testing.assert_array_equal(there.codes.copy_to_host(), here.codes)
    np.testing.assert_array_equal(nbfmha.dequantize(there, "float16").copy_to_host(), nvfp4.dequantize(here, "float16"))
    scores = qk(there, there, implementation="blockscale")
    assert (scores.shape, scores.dtype) == ((2, 17, 17), "float32")
    with pytest.raises(TypeError, match="'amax' or None, got a GPU array"):
        nbfmha.quantize(machine.array(values), global_scale=machine.array(np.ones(1, np.float32)))
    with pytest.raises(ValueError, match="head_dim must be even"):
        nbfmha.quantize(machine.array(values[..., :3]))
