"""Conversion snippets on a GPU against the codecs: the instruction where the GPU has it, the software form elsewhere.

The software forms of older targets run here too: PTX made for sm_80 is compiled for this GPU by the driver.
"""

import re

import numpy as np
import pytest

from ptx_inline.isa.formats import E2M1, E4M3
from ptx_inline.toolchain import Kernel

pytestmark = pytest.mark.gpu


def make_encode():
    from numba import cuda

    from ptx_inline import device as dev

    def encode(x, e2m1, e4m3, pairs):
        i = cuda.grid(1)
        if i < pairs:
            e2m1[i] = dev.cvt_rn_satfinite_e2m1x2_f32(x[2 * i + 1], x[2 * i])
            e4m3[i] = dev.cvt_rn_satfinite_e4m3x2_f32(x[2 * i + 1], x[2 * i])

    return encode


def make_decode():
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    def decode(e2m1, e4m3):
        i = types.uint32(cuda.grid(1))
        if i < types.uint32(256):
            e2m1[i] = dev.cvt_rn_f16x2_e2m1x2(i)
        e4m3[i] = dev.cvt_rn_f16x2_e4m3x2(i)

    return decode


@pytest.fixture(params=["native", "sm_80"])
def launch(gpu, request):
    """Launch a kernel compiled for this GPU, or from PTX for sm_80."""

    def native(kernel, grid, block, arguments):
        kernel.launch((grid,), (block,), arguments)

    def from_ptx(kernel, grid, block, arguments):
        from cuda.core import LEGACY_DEFAULT_STREAM, LaunchConfig, ObjectCode
        from cuda.core import launch as core_launch

        ptx = kernel.ptx("sm_80")
        loaded = ObjectCode.from_ptx(ptx.encode()).get_kernel(re.search(r"\.entry (\S+)\(", ptx)[1])
        _, _, raw = kernel._reader.read(arguments, None)
        core_launch(LEGACY_DEFAULT_STREAM, LaunchConfig(grid=grid, block=block), loaded, *raw)

    return native if request.param == "native" else from_ptx


def same_half(actual, expected):
    """Equal f16 bit patterns; any NaN equals any NaN."""
    actual, expected = actual.view(np.float16), expected.astype(np.float16)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(actual.view(np.uint16)[number], expected.view(np.uint16)[number])


def test_encoding_of_every_f16_and_of_random_f32(gpu, launch):
    every_f16 = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 1 << 22, np.uint32).view(np.float32)
    ties = np.concatenate([(f.values[1 : f.max_code + 1] + f.values[: f.max_code]) / 2 for f in (E2M1, E4M3)])
    around = [np.nextafter(ties, np.float32(bound)) for bound in (np.inf, -np.inf)]
    x = np.concatenate([every_f16, random, ties, -ties, *around, -around[0], -around[1]])
    pairs = len(x) // 2
    x = x[: 2 * pairs]
    e2m1, e4m3 = (gpu.empty(pairs, dtype=gpu.int32, device="cuda") for _ in range(2))
    kernel = Kernel(make_encode, ("f32*", "u32*", "u32*", "i32"))
    launch(kernel, -(-pairs // 256), 256, (gpu.from_numpy(x).cuda(), e2m1, e4m3, pairs))
    e2m1, e4m3 = e2m1.cpu().numpy(), e4m3.cpu().numpy()
    np.testing.assert_array_equal(np.stack([e2m1 & 15, e2m1 >> 4], -1).ravel(), E2M1.encode(x))
    np.testing.assert_array_equal(np.stack([e4m3 & 255, e4m3 >> 8], -1).ravel(), E4M3.encode(x))


def test_decoding_of_every_code_pair(gpu, launch):
    e2m1 = gpu.empty(256, dtype=gpu.int32, device="cuda")
    e4m3 = gpu.empty(65536, dtype=gpu.int32, device="cuda")
    launch(Kernel(make_decode, ("u32*", "u32*")), 256, 256, (e2m1, e4m3))
    codes = np.arange(256, dtype=np.uint8)
    same_half(e2m1.cpu().numpy().view(np.uint16), E2M1.decode(np.stack([codes & 15, codes >> 4], -1).ravel()))
    pairs = np.arange(65536, dtype=np.uint16).view(np.uint8)
    same_half(e4m3.cpu().numpy().view(np.uint16), E4M3.decode(pairs))
