"""Scales from one layout to another on the GPU: one thread a byte of the destination, padding written as zero."""

from __future__ import annotations

import functools

from nbfmha import scale_layouts
from ptx_inline.toolchain import Kernel

THREADS = 256


def make_relayout(source: str, destination: str):
    """Kernel ``relayout(scales, moved, count, rows, cols, source_rows, source_cols, padded_rows, padded_cols)``."""
    from numba import cuda
    from numba.core import types

    u8, i32, i64 = types.uint8, types.int32, types.int64
    source_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[source])
    destination_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[destination])

    def relayout(scales, moved, count, rows, cols, source_rows, source_cols, padded_rows, padded_cols):
        index = i64(cuda.blockIdx.x) * i64(THREADS) + i64(cuda.threadIdx.x)
        if index >= count:
            return
        col = i32(index % i64(padded_cols))
        row_of_all = index // i64(padded_cols)
        matrix = row_of_all // i64(padded_rows)
        row = i32(row_of_all % i64(padded_rows))
        byte = u8(0)
        if row < rows and col < cols:
            byte = scales[matrix * i64(source_rows) * i64(source_cols) + i64(source_offset(row, col, source_cols))]
        moved[matrix * i64(padded_rows) * i64(padded_cols) + i64(destination_offset(row, col, padded_cols))] = byte

    return relayout


@functools.cache
def relayout_kernel(source: str, destination: str) -> Kernel:
    """The kernel from one layout to another."""
    signature = ("u8*", "u8*", "i64", "i32", "i32", "i32", "i32", "i32", "i32")
    constants = {"source": source, "destination": destination}
    return Kernel(make_relayout, signature, constants, launch_bounds=(THREADS,))
