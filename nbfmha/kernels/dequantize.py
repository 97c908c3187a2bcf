"""Dequantisation kernels: E2M1 codes and block scales -> (..., tokens, head_dim) of f16, bf16 or f32.

    y = value(code) * decode(scale) [* global_scale], computed in f32 and rounded once

Three kernels, the mirror images of :mod:`nbfmha.kernels.quantize`: ``flat`` (blocks along head_dim, no padding
anywhere: 16-byte stores), ``rows`` (blocks along head_dim, any shape and scale layout) and ``tokens`` (blocks along
tokens: codes are read along tokens, staged in shared memory and written coalesced along channels). One thread owns one
block. Needs sm_80.
"""

from __future__ import annotations

import functools

from nbfmha import scale_layouts
from nbfmha.kernels.blocks import BLOCK_SIZE, make_decode_scale
from nbfmha.kernels.quantize import CHANNELS, THREADS, THREADS_TOKENS, TOKENS
from ptx_inline.toolchain import Kernel

UNITS = 4


def _make_decode_pair():
    """Device function: eight codes in a word, pair number -> two f16 in a register."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32 = types.uint32
    f16x2_e2m1x2 = dev.cvt_rn_f16x2_e2m1x2
    return cuda.jit(device=True, forceinline=True)(lambda word, i: f16x2_e2m1x2((word >> u32(8 * i)) & u32(0xFF)))


def _make_store_floats(dtype: str):
    """Device function ``(y: u32*, pair index, low, high)``: two f32, rounded to the dtype, to neighbouring elements."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    i64 = types.int64
    store_v2, bits_of = dev.st_global_v2_u32, dev.mov_b32_f32
    narrow_pair = dev.cvt_rn_f16x2_f32 if dtype == "float16" else dev.cvt_rn_bf16x2_f32
    wide = dtype == "float32"

    @cuda.jit(device=True, forceinline=True)
    def store_floats(y, pair_index, low, high):
        if wide:
            store_v2(y, pair_index * i64(2), bits_of(low), bits_of(high))
        else:
            y[pair_index] = narrow_pair(high, low)

    return store_floats


def _make_store_pair(dtype: str):
    """Device function ``(y: u32*, pair index, two f16 codes, scale)``: their products with the scale."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u16, u32 = types.uint16, types.uint32
    f32_of_f16 = dev.cvt_f32_f16
    store_floats = _make_store_floats(dtype)

    @cuda.jit(device=True, forceinline=True)
    def store_pair(y, pair_index, pair, s):
        store_floats(y, pair_index, f32_of_f16(u16(pair & u32(0xFFFF))) * s, f32_of_f16(u16(pair >> u32(16))) * s)

    return store_pair


def make_flat(dtype: str, format: str, has_global: bool):
    """Kernel ``flat(codes, scales, global_scale, y, units)``; ``y`` 16-byte aligned, as 32-bit words.

    A unit is 16 bytes of output: 8 codes of a 16-bit dtype, 4 of float32. Neighbouring threads own neighbouring units, so
    that every store of a warp covers 512 bytes; each thread loads ``UNITS`` of them before it stores the first.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u16, u32, i64 = types.float32, types.uint16, types.uint32, types.int64
    wide = dtype == "float32"
    elements = 4 if wide else 8
    units_per_scale = BLOCK_SIZE[format] // elements
    narrow_pair = dev.cvt_rn_f16x2_f32 if dtype == "float16" else dev.cvt_rn_bf16x2_f32
    store_v4, bits_of, f32_of_f16 = dev.st_global_v4_u32, dev.mov_b32_f32, dev.cvt_f32_f16
    decode_scale, decode_pair = make_decode_scale(format), _make_decode_pair()

    @unrolled
    def flat(codes, scales, global_scale, y, units):
        first = i64(cuda.blockIdx.x) * i64(THREADS * UNITS) + i64(cuda.threadIdx.x)
        words = cuda.local.array(UNITS, u32)
        s = cuda.local.array(UNITS, f32)
        out = cuda.local.array(4, u32)
        g = global_scale[0] if has_global else f32(1)
        for n in unroll(UNITS):
            unit = first + i64(n * THREADS)
            if unit < units:
                words[n] = u32(codes[unit])
                s[n] = decode_scale(scales[unit // i64(units_per_scale)])
                if has_global:
                    s[n] = s[n] * g
        for n in unroll(UNITS):
            unit = first + i64(n * THREADS)
            if unit < units:
                for i in unroll(elements // 2):
                    pair = decode_pair(words[n], i)
                    low = f32_of_f16(u16(pair & u32(0xFFFF))) * s[n]
                    high = f32_of_f16(u16(pair >> u32(16))) * s[n]
                    if wide:
                        out[(2 * i) % 4] = bits_of(low)  # i < 2 here: the bound serves the other branch
                        out[(2 * i + 1) % 4] = bits_of(high)
                    else:
                        out[i] = narrow_pair(high, low)
                store_v4(y, unit * i64(4), out[0], out[1], out[2], out[3])

    return flat


def make_rows(dtype: str, format: str, scale_layout: str, has_global: bool):
    """Kernel ``rows(codes, scales, global_scale, y, rows, head_dim, padded_rows, padded_cols, first_matrix)``, grid and
    CTA as in quantisation; ``y`` aligned to two elements, written in pairs."""
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    u32, i64 = types.uint32, types.int64
    block = BLOCK_SIZE[format]
    code_words = block // 8
    decode_scale, decode_pair, store_pair = make_decode_scale(format), _make_decode_pair(), _make_store_pair(dtype)
    scale_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[scale_layout])

    @unrolled
    def rows(codes, scales, global_scale, y, rows, head_dim, padded_rows, padded_cols, first_matrix):
        matrix = i64(first_matrix) + i64(cuda.blockIdx.z)
        row = u32(u32(cuda.blockIdx.x) * u32(cuda.blockDim.y) + u32(cuda.threadIdx.y))
        col = u32(u32(cuda.blockIdx.y) * u32(cuda.blockDim.x) + u32(cuda.threadIdx.x))
        cols = u32((head_dim + u32(block - 1)) // u32(block))
        if row >= rows or col >= cols:
            return
        offset = matrix * i64(padded_rows) * i64(padded_cols) + i64(u32(scale_offset(row, col, padded_cols)))
        s = decode_scale(scales[offset])
        if has_global:
            s = s * global_scale[0]
        stored_row = matrix * i64(rows) + i64(row)
        first_pair = (stored_row * i64(head_dim) + i64(col) * i64(block)) >> i64(1)
        pairs_left = (i64(head_dim) - i64(col) * i64(block)) >> i64(1)
        for w in unroll(code_words):
            word = codes[(stored_row * i64(cols) + i64(col)) * i64(code_words) + i64(w)]
            for i in unroll(4):
                if i64(4 * w + i) < pairs_left:
                    store_pair(y, first_pair + i64(4 * w + i), decode_pair(word, i), s)

    return rows


def make_tokens(dtype: str, format: str, scale_layout: str, has_global: bool):
    """Kernel ``tokens(codes, scales, global_scale, y, tokens, head_dim, padded_rows, padded_cols, first_matrix)``, grid
    and CTA as in quantisation: a thread owns the blocks of two neighbouring channels; ``y`` aligned to two elements."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u8, u16, u32, i64 = types.uint8, types.uint16, types.uint32, types.int64
    block = BLOCK_SIZE[format]
    code_words = block // 8
    tile_cols = TOKENS // block
    tile_words = TOKENS // 8
    pitch = tile_words + 1  # odd: the channels of a warp hit different banks
    channels_a_pass = THREADS_TOKENS[format] // tile_words
    rows_a_pass = THREADS_TOKENS[format] // tile_cols
    f32_of_f16 = dev.cvt_f32_f16
    decode_scale, decode_pair, store_floats = make_decode_scale(format), _make_decode_pair(), _make_store_floats(dtype)
    scale_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[scale_layout])

    @unrolled
    def tokens(codes, scales, global_scale, y, tokens, head_dim, padded_rows, padded_cols, first_matrix):
        staged = cuda.shared.array((CHANNELS, pitch), u32)
        staged_scales = cuda.shared.array((CHANNELS, tile_cols), u8)
        token_tile, channel_tile = u32(cuda.blockIdx.x), u32(cuda.blockIdx.y)
        matrix = i64(first_matrix) + i64(cuda.blockIdx.z)
        thread = u32(cuda.threadIdx.x)
        cols = u32((tokens + u32(block - 1)) // u32(block))
        words_per_channel = u32(cols * u32(code_words))

        word = u32(thread % u32(tile_words))
        word_of_channel = u32(token_tile * u32(tile_words) + word)
        for step in unroll(0, CHANNELS, channels_a_pass):
            row = u32(u32(step) + thread // u32(tile_words))
            stored = u32(channel_tile * u32(CHANNELS) + row)
            if stored < head_dim and word_of_channel < words_per_channel:
                source = (matrix * i64(head_dim) + i64(stored)) * i64(words_per_channel) + i64(word_of_channel)
                staged[row, word] = codes[source]
        scales_of_matrix = matrix * i64(padded_rows) * i64(padded_cols)
        stored_col = u32(token_tile * u32(tile_cols) + thread % u32(tile_cols))
        for step in unroll(0, CHANNELS, rows_a_pass):
            row = u32(u32(step) + thread // u32(tile_cols))
            stored = u32(channel_tile * u32(CHANNELS) + row)
            if stored < head_dim and stored_col < cols:
                offset = i64(u32(scale_offset(stored, stored_col, padded_cols)))
                staged_scales[row, thread % u32(tile_cols)] = scales[scales_of_matrix + offset]
        cuda.syncthreads()

        channel_in_tile = u32(u32(2) * (thread & u32(31)))
        col_in_tile = u32(thread >> u32(5))
        channel = u32(channel_tile * u32(CHANNELS) + channel_in_tile)
        col = u32(token_tile * u32(tile_cols) + col_in_tile)
        if channel < head_dim and col < cols:  # head_dim is even: channel + 1 is inside too
            even_scale = decode_scale(staged_scales[channel_in_tile, col_in_tile])
            odd_scale = decode_scale(staged_scales[channel_in_tile + u32(1), col_in_tile])
            if has_global:
                even_scale, odd_scale = even_scale * global_scale[0], odd_scale * global_scale[0]
            first_token = i64(col) * i64(block)
            left = i64(tokens) - first_token
            pairs = i64(head_dim >> u32(1))
            first = (matrix * i64(tokens) + first_token) * pairs + i64(channel >> u32(1))
            for w in unroll(code_words):
                even_word = staged[channel_in_tile, col_in_tile * u32(code_words) + u32(w)]
                odd_word = staged[channel_in_tile + u32(1), col_in_tile * u32(code_words) + u32(w)]
                for i in unroll(4):
                    even, odd = decode_pair(even_word, i), decode_pair(odd_word, i)
                    if i64(8 * w + 2 * i) < left:
                        low, high = f32_of_f16(u16(even & u32(0xFFFF))), f32_of_f16(u16(odd & u32(0xFFFF)))
                        store_floats(y, first + i64(8 * w + 2 * i) * pairs, low * even_scale, high * odd_scale)
                    if i64(8 * w + 2 * i + 1) < left:
                        low, high = f32_of_f16(u16(even >> u32(16))), f32_of_f16(u16(odd >> u32(16)))
                        store_floats(y, first + i64(8 * w + 2 * i + 1) * pairs, low * even_scale, high * odd_scale)

    return tokens


@functools.cache
def flat_kernel(dtype: str, format: str, has_global: bool) -> Kernel:
    """The ``flat`` kernel for these constants."""
    constants = {"dtype": dtype, "format": format, "has_global": has_global}
    codes = "u16*" if dtype == "float32" else "u32*"
    return Kernel(make_flat, (codes, "u8*", "f32*", "u32*", "i64"), constants, launch_bounds=(THREADS,))


@functools.cache
def rows_kernel(dtype: str, format: str, scale_layout: str, has_global: bool) -> Kernel:
    """The ``rows`` kernel for these constants."""
    constants = {"dtype": dtype, "format": format, "scale_layout": scale_layout, "has_global": has_global}
    signature = ("u32*", "u8*", "f32*", "u32*", "u32", "u32", "u32", "u32", "i64")
    return Kernel(make_rows, signature, constants, launch_bounds=(THREADS,))


@functools.cache
def tokens_kernel(dtype: str, format: str, scale_layout: str, has_global: bool) -> Kernel:
    """The ``tokens`` kernel for these constants."""
    constants = {"dtype": dtype, "format": format, "scale_layout": scale_layout, "has_global": has_global}
    signature = ("u32*", "u8*", "f32*", "u32*", "u32", "u32", "u32", "u32", "i64")
    return Kernel(make_tokens, signature, constants, launch_bounds=(THREADS_TOKENS[format],))
