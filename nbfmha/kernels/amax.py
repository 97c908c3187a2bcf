"""Largest finite magnitude of a tensor, and the NVFP4 global scale made of it, without a visit to the host.

``amax`` reduces to a bit pattern by an atomic maximum (magnitudes of f32 order like their bits); ``global_scale`` is
one thread: clamp(amax / 2688, 2^-64, 2^64), 1 for a tensor of zeros. 2688 = 6 * 448, the largest NVFP4 magnitude.
"""

from __future__ import annotations

import functools

from nbfmha.kernels.blocks import element_pointer, make_widen
from ptx_inline.toolchain import Kernel

THREADS = 256
ELEMENTS = 16


def make_amax(dtype: str):
    """Kernel ``amax(x, bits, count)``: ``bits[0]`` must be 0 before."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, i32, i64 = types.uint32, types.int32, types.int64
    widen = make_widen(dtype)
    bits_of, abs_f32, shuffle, atomic_max = dev.mov_b32_f32, dev.abs_f32, dev.shfl_sync_idx_b32, dev.red_global_max_u32

    def amax(x, bits, count):
        thread = i32(cuda.threadIdx.x)
        base = i64(cuda.blockIdx.x) * i64(THREADS * ELEMENTS) + i64(thread)
        largest = u32(0)
        for i in range(ELEMENTS):
            index = base + i64(i * THREADS)
            if index < count:
                magnitude = bits_of(abs_f32(widen(x[index])))
                if magnitude < u32(0x7F800000):
                    largest = max(largest, magnitude)
        for step in (16, 8, 4, 2, 1):
            largest = max(largest, shuffle(largest, u32(thread) ^ u32(step)))
        if thread % i32(32) == 0 and largest > u32(0):
            atomic_max(bits, i64(0), largest)

    return amax


def make_global_scale():
    """Kernel ``global_scale(bits, scale)``, one thread."""
    from numba.core import types

    from ptx_inline import device as dev

    f32, u32 = types.float32, types.uint32
    float_of, min_f32, max_f32 = dev.mov_f32_b32, dev.min_f32, dev.max_f32
    smallest, largest = 2.0**-64, 2.0**64

    def global_scale(bits, scale):
        scale[0] = f32(1)
        if bits[0] > u32(0):
            scale[0] = min_f32(max_f32(float_of(bits[0]) / f32(2688), f32(smallest)), f32(largest))

    return global_scale


@functools.cache
def amax_kernel(dtype: str) -> Kernel:
    """The reduction for this dtype."""
    return Kernel(make_amax, (element_pointer(dtype), "u32*", "i64"), {"dtype": dtype}, launch_bounds=(THREADS,))


@functools.cache
def global_scale_kernel() -> Kernel:
    """The one-thread kernel that turns the maximum into a scale."""
    return Kernel(make_global_scale, ("u32*", "f32*"))
