"""Conversions of several numbers in one statement, on the emulator: the same codes as the codecs, the first one lowest."""

import numpy as np
import pytest

from ptx_inline.emu import Output, emulate
from ptx_inline.isa.formats import E2M1, E4M3
from ptx_inline.toolchain import Kernel

LANES = 128


def make_encode_many():
    from numba import cuda

    from ptx_inline import device as dev

    def encode_many(x, e2m1, e4m3):
        i = cuda.grid(1)
        a, b, c, d = x[8 * i], x[8 * i + 1], x[8 * i + 2], x[8 * i + 3]
        e2m1[i] = dev.cvt_rn_satfinite_e2m1x8_f32(a, b, c, d, x[8 * i + 4], x[8 * i + 5], x[8 * i + 6], x[8 * i + 7])
        e4m3[i] = dev.cvt_rn_satfinite_e4m3x4_f32(a, b, c, d)

    return encode_many


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_120a"])
def test_codes_stand_in_order(target):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(8 * LANES) * 2.0 ** rng.integers(-12, 12, 8 * LANES)).astype(np.float32)
    outputs = Output((LANES,), np.uint32), Output((LANES,), np.uint32)
    run = emulate(Kernel(make_encode_many, ("f32*", "u32*", "u32*")), (1,), (LANES,), (x, *outputs), target)
    nibbles = run.outputs[1][:, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
    np.testing.assert_array_equal(nibbles.ravel(), E2M1.encode(x))
    np.testing.assert_array_equal(run.outputs[2].view(np.uint8), E4M3.encode(x.reshape(LANES, 8)[:, :4]).ravel())
