"""Device functions that the kernels of the pre-pass share: inputs as their 16-bit values, sums over the rows of a CTA.

Threads of a CTA stand in ``code_cols`` columns (16 channels each) and 32 rows: thread t has column t mod code_cols. Columns
past head_dim, which head_dim 96 has, are there to write zeros.
"""

from __future__ import annotations

from nbfmha.recipe import TILE_N

ROWS_A_PASS = 32
BLOCK = 16
"""Tokens of V that a thread has, and elements that share a scale in NVFP4."""


def code_cols(head_dim: int) -> int:
    """Blocks of 16 channels of a row of codes: head_dim rounded up to whole k steps of 64."""
    return -(-head_dim // 64) * 4


def threads_of(head_dim: int) -> int:
    """Threads of a CTA that has ``ROWS_A_PASS`` rows of ``code_cols`` blocks at a time."""
    return ROWS_A_PASS * code_cols(head_dim)


def staged_words_of(head_dim: int) -> int:
    """Words of shared memory that ``make_column_sum`` wants."""
    return 16 * (threads_of(head_dim) + code_cols(head_dim))


def channels_of_v(head_dim: int) -> int:
    """Channels of a CTA of the kernels that read V."""
    return min(head_dim, 128)


def threads_of_v(head_dim: int) -> int:
    """Threads of a CTA of the kernels that read V: one for two channels and ``BLOCK`` tokens of a tile."""
    return channels_of_v(head_dim) // 2 * (TILE_N // BLOCK)


def make_load_16(dtype: str):
    """Device function ``(x: u32*, at, words: u32[8])``: 16 neighbours from element ``at`` (i64, a multiple of 8) on, in the
    16-bit format of the call, two a register. float32 is rounded to float16."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i64 = types.uint32, types.int64
    ffi, load_v4, float_of, pack = dev.ffi, dev.ld_global_nc_v4_u32, dev.mov_f32_b32, dev.cvt_rn_f16x2_f32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_packed(x, at, words):
        for w in unroll(0, 8, 4):
            load_v4(ffi.from_buffer(words[w:]), x, (at >> i64(1)) + i64(w))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_rounded(x, at, words):
        wide = cuda.local.array(16, u32)
        for w in unroll(0, 16, 4):
            load_v4(ffi.from_buffer(wide[w:]), x, at + i64(w))
        for w in unroll(8):
            words[w] = pack(float_of(wide[2 * w + 1]), float_of(wide[2 * w]))

    return load_rounded if dtype == "float32" else load_packed


def make_load_pair(dtype: str):
    """Device function ``(x: u32*, at) -> u32``: two neighbours from element ``at`` (i64, even) on, in the 16-bit format of
    the call. float32 is rounded to float16."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, i64 = types.uint32, types.int64
    ffi, load_v2, float_of, pack = dev.ffi, dev.ld_global_nc_v2_u32, dev.mov_f32_b32, dev.cvt_rn_f16x2_f32

    @cuda.jit(device=True, forceinline=True)
    def load_packed(x, at):
        return x[at >> i64(1)]

    @cuda.jit(device=True, forceinline=True)
    def load_rounded(x, at):
        two = cuda.local.array(2, u32)
        load_v2(ffi.from_buffer(two), x, at)
        return pack(float_of(two[1]), float_of(two[0]))

    return load_rounded if dtype == "float32" else load_packed


def make_widen_pair(dtype: str):
    """Device function ``(word) -> (even, odd)``: two values in the 16-bit format of the call as f32, exact."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u16, u32 = types.uint16, types.uint32
    float_of, f32_of_f16 = dev.mov_f32_b32, dev.cvt_f32_f16

    @cuda.jit(device=True, forceinline=True)
    def widen_bf16(word):
        return float_of(word << u32(16)), float_of(word & u32(0xFFFF0000))

    @cuda.jit(device=True, forceinline=True)
    def widen_f16(word):
        return f32_of_f16(u16(word & u32(0xFFFF))), f32_of_f16(u16(word >> u32(16)))

    return widen_bf16 if dtype == "bfloat16" else widen_f16


def make_keep_16(head_dim: int):
    """Device function ``(x: u32*, row, col, words: u32[8])``: the 16 channels of column ``col``, in their 16-bit format, to
    a row (i64) of head_dim."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    i64, store_v4 = types.int64, dev.st_global_v4_u32

    @cuda.jit(device=True, forceinline=True)
    def keep_16(x, row, col, words):
        at = (row * i64(head_dim) + i64(16) * i64(col)) >> i64(1)
        store_v4(x, at, words[0], words[1], words[2], words[3])
        store_v4(x, at + i64(4), words[4], words[5], words[6], words[7])

    return keep_16


def make_centre(dtype: str):
    """Device function ``(values: f32[16], words: u32[8], means: f32[16])``: 16 channels, less their means."""
    from numba import cuda

    from ptx_inline.unroll import unroll, unrolled

    widen_pair = make_widen_pair(dtype)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def centre(values, words, means):
        for w in unroll(8):
            even, odd = widen_pair(words[w])
            values[2 * w] = even - means[2 * w]
            values[2 * w + 1] = odd - means[2 * w + 1]

    return centre


def make_store_values():
    """Device function ``(x: u32*, at, values: f32[16])``: 16 neighbours from element ``at`` (i64, a multiple of 8) on, in
    f16."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i64 = types.uint32, types.int64
    pack, store_v4 = dev.cvt_rn_f16x2_f32, dev.st_global_v4_u32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_values(x, at, values):
        words = cuda.local.array(8, u32)
        for w in unroll(8):
            words[w] = pack(values[2 * w + 1], values[2 * w])
        for w in unroll(0, 8, 4):
            store_v4(x, (at >> i64(1)) + i64(w), words[w], words[w + 1], words[w + 2], words[w + 3])

    return store_values


def make_load_means():
    """Device function ``(k_mean, row, head_dim, first, has_mean, means: f32[16])``: 16 channels from ``first`` on of a row
    of k_mean (f32, any number of rows of head_dim); zeros without means."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    ffi, load_v4, float_of = dev.ffi, dev.ld_global_nc_v4_u32, dev.mov_f32_b32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_means(k_mean, row, head_dim, first, has_mean, means):
        words = cuda.local.array(16, u32)
        for c in unroll(16):
            words[c] = u32(0)
        if has_mean != i32(0) and i32(first) < i32(head_dim):
            for c in unroll(0, 16, 4):
                load_v4(ffi.from_buffer(words[c:]), k_mean, i64(row) * i64(head_dim) + i64(first) + i64(c))
        for c in unroll(16):
            means[c] = float_of(words[c])

    return load_means


def make_column_sum(head_dim: int):
    """Device function ``(sums: f32[16], staged: shared f32[staged_words_of], thread) -> f32``, called by all threads: each
    of the first ``16 * code_cols`` gets the sum over the 32 rows of channel ``thread // code_cols`` of column ``thread mod
    code_cols``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    f32, u32 = types.float32, types.uint32
    cols = code_cols(head_dim)
    pitch = threads_of(head_dim) + cols  # a stride that puts the 16 channels of a column in different banks

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def column_sum(sums, staged, thread):
        for c in unroll(16):
            staged[u32(c * pitch) + thread] = sums[c]
        cuda.syncthreads()
        total = f32(0)
        if thread < u32(16 * cols):
            first = (thread // u32(cols)) * u32(pitch) + thread % u32(cols)
            # four sums, each of rows that are four apart: short chains and small rounding errors
            quarters = cuda.local.array(4, f32)
            for part in unroll(4):
                quarters[part] = staged[first + u32(part * cols)]
            for step in unroll(4, ROWS_A_PASS, 4):
                for part in unroll(4):
                    quarters[part] += staged[first + u32((step + part) * cols)]
            total = (quarters[0] + quarters[1]) + (quarters[2] + quarters[3])
        return total

    return column_sum
