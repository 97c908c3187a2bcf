"""Snippets whose statement is more than an instruction's name, called from Numba: the PTX that comes out, against NumPy."""

import numpy as np
import pytest
import warp_kernels as wk
from elementwise import emulated
from executors import on_gpu

from ptx_inline.emu import Output
from ptx_inline.toolchain import Kernel

RNG = np.random.default_rng(17)
#: Bytes of shared memory for each lane: a copy of 16 bytes, one of 8, one of 4, and 4 that nobody copies.
ROW = 32


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def execute(request):
    return emulated if request.param == "emulator" else on_gpu(request.getfixturevalue("gpu"))


def make_words():
    from numba import cuda

    from ptx_inline import device as dev

    def words(x, y, transposed, low, high, sums):
        i = cuda.grid(1)
        transposed[i] = dev.movmatrix_trans_b16(x[i])
        low[i] = dev.mov_b32_low_twice(x[i])
        high[i] = dev.mov_b32_high_twice(x[i])
        sums[i] = dev.mad_lo_u32(x[i], y[i], x[i])

    return words


def test_words(execute):
    x, y = RNG.integers(0, 2**32, (2, 128), dtype=np.uint32)
    outputs = [Output((128,), np.uint32) for _ in range(4)]
    transposed, low, high, sums = execute(Kernel(make_words, ("u32*",) * 6), (2,), (64,), (x, y, *outputs))[2:]
    np.testing.assert_array_equal(transposed, wk.matrices_transposed(x))
    np.testing.assert_array_equal(low, (x & 0xFFFF) * np.uint32(0x10001))
    np.testing.assert_array_equal(high, (x >> 16) * np.uint32(0x10001))
    np.testing.assert_array_equal(sums, x * y + x)


def make_copies():
    from numba import cuda, types

    from ptx_inline import device as dev

    u32, i64, smem_words = types.uint32, types.int64, 32 * ROW // 4

    def copies(x, lengths, y):
        rows = cuda.shared.array(smem_words, u32)
        lane = cuda.threadIdx.x
        place, offset = dev.cvta_to_shared_u32(dev.ffi.from_buffer(rows)) + u32(lane * ROW), i64(lane * ROW)
        dev.cp_async_cg_16_evict_first(place, x, offset, lengths[3 * lane])
        dev.cp_async_ca_8_evict_first(place + u32(16), x, offset + i64(16), lengths[3 * lane + 1])
        dev.cp_async_ca_4_evict_first(place + u32(24), x, offset + i64(24), lengths[3 * lane + 2])
        dev.cp_async_commit_group()
        dev.cp_async_wait_group_0()
        for word in range(7):
            y[7 * lane + word] = rows[ROW // 4 * lane + word]

    return copies


def test_copies_that_l2_gives_up_first(execute):
    """Every length from none to all of each size; behind it zeros."""
    x = RNG.integers(1, 256, (32, ROW), dtype=np.uint8)
    lengths = np.arange(32, dtype=np.uint32)[:, None] % np.array([17, 9, 5], np.uint32)
    kernel = Kernel(make_copies, ("u8*", "u32*", "u32*"))
    found = execute(kernel, (1,), (32,), (x, lengths, Output((32, 7), np.uint32)))[2].view(np.uint8)
    first_byte, length = np.repeat([0, 16, 24], (16, 8, 4)), np.repeat(lengths, (16, 8, 4), axis=1)
    kept = np.arange(28) < first_byte + length
    np.testing.assert_array_equal(found, np.where(kept, x[:, :28], 0))
    assert kernel.ptx("sm_120a").count("L2::cache_hint") == 3


def make_early():
    from numba import cuda, types

    from ptx_inline import device as dev

    u32, i64 = types.uint32, types.int64

    def early(x, bytes_, y, flag):
        i = cuda.grid(1)
        dev.prefetch_global_l2(bytes_, i64(i))
        dev.cp_async_bulk_prefetch_l2_global(bytes_, i64(0), u32(64))
        y[i] = dev.ld_relaxed_gpu_global_s32(x, i64(i))
        flag[i] = dev.has_griddepcontrol()

    return early


def test_what_is_read_and_asked_for_early(execute):
    x, asked = RNG.integers(-(2**31), 2**31, 64, dtype=np.int32), np.zeros(64, np.uint8)
    kernel = Kernel(make_early, ("i32*", "u8*", "i32*", "u32*"))
    outputs = Output((64,), np.int32), Output((64,), np.uint32)
    y, flag = execute(kernel, (2,), (32,), (x, asked, *outputs))[2:]
    np.testing.assert_array_equal(y, x)
    assert set(flag) in ({0}, {1})
    assert "bulk.prefetch" in kernel.ptx("sm_90a")
    assert "bulk" not in kernel.ptx("sm_80")
