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
from nbfmha.kernels.blocks import BLOCK_SIZE, element_pointer, make_decode_scale, make_narrow
from nbfmha.kernels.quantize import CHANNELS, THREADS, THREADS_TOKENS, TOKENS
from ptx_inline.toolchain import Kernel


def _make_decode_pair():
    """Device function: eight codes in a word, pair number -> two f16 in a register."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32 = types.uint32
    f16x2_e2m1x2 = dev.cvt_rn_f16x2_e2m1x2
    return cuda.jit(device=True, forceinline=True)(lambda word, i: f16x2_e2m1x2((word >> u32(8 * i)) & u32(0xFF)))


def make_flat(dtype: str, format: str, has_global: bool):
    """Kernel ``flat(codes, scales, global_scale, y, blocks)``; ``y`` 16-byte aligned, as 32-bit words."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u16, u32, i64 = types.uint16, types.uint32, types.int64
    ffi = dev.ffi
    block = BLOCK_SIZE[format]
    code_words = block // 8
    words = block if dtype == "float32" else block // 2
    load_v2, store_v4, bits_of, f32_of_f16 = (
        dev.ld_global_nc_v2_u32,
        dev.st_global_v4_u32,
        dev.mov_b32_f32,
        dev.cvt_f32_f16,
    )
    narrow_pair = dev.cvt_rn_f16x2_f32 if dtype == "float16" else dev.cvt_rn_bf16x2_f32
    decode_scale, decode_pair = make_decode_scale(format), _make_decode_pair()
    wide = dtype == "float32"

    def flat(codes, scales, global_scale, y, blocks):
        index = i64(cuda.blockIdx.x) * i64(THREADS) + i64(cuda.threadIdx.x)
        if index >= blocks:
            return
        packed = cuda.local.array(code_words, u32)
        out = cuda.local.array(words, u32)
        for w in range(0, code_words, 2):
            load_v2(ffi.from_buffer(packed[w:]), codes, index * i64(code_words) + i64(w))
        s = decode_scale(scales[index])
        if has_global:
            s = s * global_scale[0]
        for w in range(code_words):
            for i in range(4):
                pair = decode_pair(packed[w], i)
                low = f32_of_f16(u16(pair & u32(0xFFFF))) * s
                high = f32_of_f16(u16(pair >> u32(16))) * s
                if wide:
                    out[8 * w + 2 * i] = bits_of(low)
                    out[8 * w + 2 * i + 1] = bits_of(high)
                else:
                    out[4 * w + i] = narrow_pair(high, low)
        for w in range(0, words, 4):
            store_v4(y, index * i64(words) + i64(w), out[w], out[w + 1], out[w + 2], out[w + 3])

    return flat


def make_rows(dtype: str, format: str, scale_layout: str, has_global: bool):
    """Kernel ``rows(codes, scales, global_scale, y, batch, rows, head_dim, padded_rows, padded_cols)``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u16, u32, i32, i64 = types.uint16, types.uint32, types.int32, types.int64
    block = BLOCK_SIZE[format]
    code_words = block // 8
    f32_of_f16 = dev.cvt_f32_f16
    decode_scale, decode_pair, narrow = make_decode_scale(format), _make_decode_pair(), make_narrow(dtype)
    scale_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[scale_layout])

    def rows(codes, scales, global_scale, y, batch, rows, head_dim, padded_rows, padded_cols):
        index = i64(cuda.blockIdx.x) * i64(THREADS) + i64(cuda.threadIdx.x)
        cols = (head_dim + i32(block - 1)) // i32(block)
        col = i32(index % i64(cols))
        stored_row = index // i64(cols)
        matrix = stored_row // i64(rows)
        row = i32(stored_row % i64(rows))
        if matrix >= batch:
            return
        s = decode_scale(
            scales[matrix * i64(padded_rows) * i64(padded_cols) + i64(scale_offset(row, col, padded_cols))]
        )
        if has_global:
            s = s * global_scale[0]
        first = stored_row * i64(head_dim) + i64(col) * i64(block)
        left = head_dim - col * i32(block)
        for w in range(code_words):
            word = codes[index * i64(code_words) + i64(w)]
            for i in range(4):
                pair = decode_pair(word, i)
                element = i32(8 * w + 2 * i)
                if element < left:  # head_dim is even: both of the pair are inside, or neither is
                    y[first + i64(element)] = narrow(f32_of_f16(u16(pair & u32(0xFFFF))) * s)
                    y[first + i64(element) + i64(1)] = narrow(f32_of_f16(u16(pair >> u32(16))) * s)

    return rows


def make_tokens(dtype: str, format: str, scale_layout: str, has_global: bool):
    """Kernel ``tokens(codes, scales, global_scale, y, tokens, head_dim, padded_rows, padded_cols, token_tiles,
    channel_tiles)``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u16, u32, i32, i64 = types.uint16, types.uint32, types.int32, types.int64
    block = BLOCK_SIZE[format]
    code_words = block // 8
    tile_cols = TOKENS // block
    tile_words = TOKENS // 8
    pitch = tile_words + 1  # odd: the channels of a warp hit different banks
    threads = THREADS_TOKENS[format]
    f32_of_f16 = dev.cvt_f32_f16
    decode_scale, decode_pair, narrow = make_decode_scale(format), _make_decode_pair(), make_narrow(dtype)
    scale_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[scale_layout])

    def tokens(codes, scales, global_scale, y, tokens, head_dim, padded_rows, padded_cols, token_tiles, channel_tiles):
        staged = cuda.shared.array((CHANNELS, pitch), u32)
        tile = i32(cuda.blockIdx.x)
        token_tile = tile % token_tiles
        channel_tile = (tile // token_tiles) % channel_tiles
        matrix = i64(tile // (token_tiles * channel_tiles))
        thread = i32(cuda.threadIdx.x)
        cols = (tokens + i32(block - 1)) // i32(block)
        words_per_channel = cols * i32(code_words)

        word = thread % i32(tile_words)
        for channel_in_tile in range(thread // i32(tile_words), CHANNELS, threads // tile_words):
            channel = channel_tile * i32(CHANNELS) + i32(channel_in_tile)
            word_of_channel = token_tile * i32(tile_words) + word
            if channel < head_dim and word_of_channel < words_per_channel:
                source = (matrix * i64(head_dim) + i64(channel)) * i64(words_per_channel) + i64(word_of_channel)
                staged[channel_in_tile, word] = codes[source]
        cuda.syncthreads()

        channel_in_tile = thread % i32(CHANNELS)
        col_in_tile = thread // i32(CHANNELS)
        channel = channel_tile * i32(CHANNELS) + channel_in_tile
        col = token_tile * i32(tile_cols) + col_in_tile
        if channel < head_dim and col < cols:
            offset = matrix * i64(padded_rows) * i64(padded_cols) + i64(scale_offset(channel, col, padded_cols))
            s = decode_scale(scales[offset])
            if has_global:
                s = s * global_scale[0]
            first_token = col * i32(block)
            first = (matrix * i64(tokens) + i64(first_token)) * i64(head_dim) + i64(channel)
            for w in range(code_words):
                packed = staged[channel_in_tile, col_in_tile * i32(code_words) + i32(w)]
                for i in range(4):
                    pair = decode_pair(packed, i)
                    token = i32(8 * w + 2 * i)
                    if first_token + token < tokens:
                        y[first + i64(token) * i64(head_dim)] = narrow(f32_of_f16(u16(pair & u32(0xFFFF))) * s)
                    if first_token + token + i32(1) < tokens:
                        y[first + i64(token + i32(1)) * i64(head_dim)] = narrow(f32_of_f16(u16(pair >> u32(16))) * s)

    return tokens


@functools.cache
def flat_kernel(dtype: str, format: str, has_global: bool) -> Kernel:
    """The ``flat`` kernel for these constants."""
    constants = {"dtype": dtype, "format": format, "has_global": has_global}
    return Kernel(make_flat, ("u32*", "u8*", "f32*", "u32*", "i64"), constants, launch_bounds=(THREADS,))


@functools.cache
def rows_kernel(dtype: str, format: str, scale_layout: str, has_global: bool) -> Kernel:
    """The ``rows`` kernel for these constants."""
    constants = {"dtype": dtype, "format": format, "scale_layout": scale_layout, "has_global": has_global}
    signature = ("u32*", "u8*", "f32*", element_pointer(dtype), "i64", "i32", "i32", "i32", "i32")
    return Kernel(make_rows, signature, constants, launch_bounds=(THREADS,))


@functools.cache
def tokens_kernel(dtype: str, format: str, scale_layout: str, has_global: bool) -> Kernel:
    """The ``tokens`` kernel for these constants."""
    constants = {"dtype": dtype, "format": format, "scale_layout": scale_layout, "has_global": has_global}
    signature = ("u32*", "u8*", "f32*", element_pointer(dtype), "i32", "i32", "i32", "i32", "i32", "i32")
    return Kernel(make_tokens, signature, constants, launch_bounds=(THREADS_TOKENS[format],))
