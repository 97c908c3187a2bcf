"""Quantisation kernels: (..., tokens, head_dim) of f16, bf16 or f32 -> E2M1 codes and block scales.

    amax  = max |x| of 16 (NVFP4) or 32 (MXFP4) elements      s = decode(encode(amax / 6))      code = E2M1(x / s)

One thread owns one block. Three kernels:

==============  =============================  ==================================================================
kernel          blocks run along               work
==============  =============================  ==================================================================
``flat``        head_dim (a multiple of the    block i of the whole tensor is thread i: 16-byte loads, an 8-byte
                block), linear scales          store of codes, a byte of scale; no index arithmetic
``rows``        head_dim (any even), any       thread = (row, scale column) of the *padded* scale matrix, so that
                scale layout                   the padding is written as zero in the same pass
``tokens``      tokens, any scale layout       CTA = 64 channels x 128 tokens; reads are coalesced along channels,
                                               codes go through shared memory and leave along tokens
==============  =============================  ==================================================================

Bytes an element, f16 to NVFP4: 2 read, 0.5 + 1/16 written. Shared memory: none, none, 4.5 KiB. Needs sm_80; the E2M1
conversion is one instruction on sm_100a and sm_120a and a bit-identical software form elsewhere.
"""

from __future__ import annotations

import functools

from nbfmha import scale_layouts
from nbfmha.kernels.blocks import BLOCK_SIZE, element_pointer, make_quantize_block, make_widen
from ptx_inline.toolchain import Kernel

THREADS = 256
CHANNELS = 64
TOKENS = 128
THREADS_TOKENS = {name: CHANNELS * (TOKENS // block) for name, block in BLOCK_SIZE.items()}


def make_flat(dtype: str, format: str, scale: str, has_global: bool):
    """Kernel ``flat(x, global_scale, codes, scales, blocks)``; ``x`` 16-byte aligned, as 32-bit words."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u16, u32, i64 = types.float32, types.uint16, types.uint32, types.int64
    ffi = dev.ffi
    block = BLOCK_SIZE[format]
    elements_per_word = 1 if dtype == "float32" else 2
    words = block // elements_per_word
    code_words = block // 8
    widen = make_widen(dtype)
    quantize_block = make_quantize_block(format, scale, has_global)
    load_v4, store_v2, store_v4, float_of = (
        dev.ld_global_nc_v4_u32,
        dev.st_global_v2_u32,
        dev.st_global_v4_u32,
        dev.mov_f32_b32,
    )

    def flat(x, global_scale, codes, scales, blocks):
        index = i64(cuda.blockIdx.x) * i64(THREADS) + i64(cuda.threadIdx.x)
        if index >= blocks:
            return
        raw = cuda.local.array(words, u32)
        values = cuda.local.array(block, f32)
        packed = cuda.local.array(code_words, u32)
        for w in range(0, words, 4):
            load_v4(ffi.from_buffer(raw[w:]), x, index * i64(words) + i64(w))
        for w in range(words):
            if elements_per_word == 1:
                values[w] = float_of(raw[w])
            else:
                values[2 * w] = widen(u16(raw[w] & u32(0xFFFF)))
                values[2 * w + 1] = widen(u16(raw[w] >> u32(16)))
        g = global_scale[0] if has_global else f32(1)
        scales[index] = quantize_block(values, g, packed)
        if code_words == 2:
            store_v2(codes, index * i64(2), packed[0], packed[1])
        else:
            store_v4(codes, index * i64(4), packed[0], packed[1], packed[2], packed[3])

    return flat


def make_rows(dtype: str, format: str, scale: str, scale_layout: str, has_global: bool):
    """Kernel ``rows(x, global_scale, codes, scales, batch, rows, head_dim, padded_rows, padded_cols)``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u8, u32, i32, i64 = types.float32, types.uint8, types.uint32, types.int32, types.int64
    block = BLOCK_SIZE[format]
    code_words = block // 8
    widen = make_widen(dtype)
    quantize_block = make_quantize_block(format, scale, has_global)
    scale_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[scale_layout])
    store_v2 = dev.st_global_v2_u32

    def rows(x, global_scale, codes, scales, batch, rows, head_dim, padded_rows, padded_cols):
        index = i64(cuda.blockIdx.x) * i64(THREADS) + i64(cuda.threadIdx.x)
        col = i32(index % i64(padded_cols))
        row_of_all = index // i64(padded_cols)
        matrix = row_of_all // i64(padded_rows)
        row = i32(row_of_all % i64(padded_rows))
        if matrix >= batch:
            return
        cols = (head_dim + i32(block - 1)) // i32(block)
        scale_index = matrix * i64(padded_rows) * i64(padded_cols) + i64(scale_offset(row, col, padded_cols))
        if row >= rows or col >= cols:
            scales[scale_index] = u8(0)
            return
        values = cuda.local.array(block, f32)
        packed = cuda.local.array(code_words, u32)
        stored_row = matrix * i64(rows) + i64(row)
        first = stored_row * i64(head_dim) + i64(col) * i64(block)
        left = head_dim - col * i32(block)
        for i in range(block):
            values[i] = widen(x[first + i64(i)]) if i32(i) < left else f32(0)
        g = global_scale[0] if has_global else f32(1)
        scales[scale_index] = u8(quantize_block(values, g, packed))
        block_index = stored_row * i64(cols) + i64(col)
        for w in range(0, code_words, 2):
            store_v2(codes, block_index * i64(code_words) + i64(w), packed[w], packed[w + 1])

    return rows


def make_tokens(dtype: str, format: str, scale: str, scale_layout: str, has_global: bool):
    """Kernel ``tokens(x, global_scale, codes, scales, tokens, head_dim, padded_rows, padded_cols, token_tiles,
    channel_tiles)``: the stored matrix is the transpose, (head_dim, tokens)."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u8, u32, i32, i64 = types.float32, types.uint8, types.uint32, types.int32, types.int64
    block = BLOCK_SIZE[format]
    code_words = block // 8
    tile_cols = TOKENS // block
    channels_a_pass = THREADS_TOKENS[format] // (TOKENS // 16)
    pitch = tile_cols * code_words + 1  # odd: the channels of a warp hit different banks
    widen = make_widen(dtype)
    quantize_block = make_quantize_block(format, scale, has_global)
    scale_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[scale_layout])
    store_v2 = dev.st_global_v2_u32

    def tokens(x, global_scale, codes, scales, tokens, head_dim, padded_rows, padded_cols, token_tiles, channel_tiles):
        staged = cuda.shared.array((CHANNELS, pitch), u32)
        tile = i32(cuda.blockIdx.x)
        token_tile = tile % token_tiles
        channel_tile = (tile // token_tiles) % channel_tiles
        matrix = i64(tile // (token_tiles * channel_tiles))
        thread = i32(cuda.threadIdx.x)

        channel_in_tile = thread % i32(CHANNELS)
        col_in_tile = thread // i32(CHANNELS)
        channel = channel_tile * i32(CHANNELS) + channel_in_tile
        col = token_tile * i32(tile_cols) + col_in_tile
        cols = (tokens + i32(block - 1)) // i32(block)
        inside = channel < head_dim and col < cols
        if channel < padded_rows and col < padded_cols:
            byte = u32(0)
            if inside:
                values = cuda.local.array(block, f32)
                packed = cuda.local.array(code_words, u32)
                first_token = col * i32(block)
                first = (matrix * i64(tokens) + i64(first_token)) * i64(head_dim) + i64(channel)
                for i in range(block):
                    in_range = first_token + i32(i) < tokens
                    values[i] = widen(x[first + i64(i) * i64(head_dim)]) if in_range else f32(0)
                g = global_scale[0] if has_global else f32(1)
                byte = u32(quantize_block(values, g, packed))
                for w in range(code_words):
                    staged[channel_in_tile, col_in_tile * i32(code_words) + i32(w)] = packed[w]
            offset = matrix * i64(padded_rows) * i64(padded_cols) + i64(scale_offset(channel, col, padded_cols))
            scales[offset] = u8(byte)
        cuda.syncthreads()

        # eight lanes write the 64 bytes of a channel's 128 tokens
        pair_in_tile = thread % i32(TOKENS // 16)
        pairs_per_channel = cols * i32(code_words // 2)
        pair = token_tile * i32(TOKENS // 16) + pair_in_tile
        for channel_in_tile in range(thread // i32(TOKENS // 16), CHANNELS, channels_a_pass):
            channel = channel_tile * i32(CHANNELS) + i32(channel_in_tile)
            if channel < head_dim and pair < pairs_per_channel:
                destination = (matrix * i64(head_dim) + i64(channel)) * i64(pairs_per_channel) + i64(pair)
                low = staged[channel_in_tile, i32(2) * pair_in_tile]
                store_v2(codes, destination * i64(2), low, staged[channel_in_tile, i32(2) * pair_in_tile + i32(1)])

    return tokens


@functools.cache
def flat_kernel(dtype: str, format: str, scale: str, has_global: bool) -> Kernel:
    """The ``flat`` kernel for these constants."""
    constants = {"dtype": dtype, "format": format, "scale": scale, "has_global": has_global}
    return Kernel(make_flat, ("u32*", "f32*", "u32*", "u8*", "i64"), constants, launch_bounds=(THREADS,))


@functools.cache
def rows_kernel(dtype: str, format: str, scale: str, scale_layout: str, has_global: bool) -> Kernel:
    """The ``rows`` kernel for these constants."""
    constants = {
        "dtype": dtype,
        "format": format,
        "scale": scale,
        "scale_layout": scale_layout,
        "has_global": has_global,
    }
    signature = (element_pointer(dtype), "f32*", "u32*", "u8*", "i64", "i32", "i32", "i32", "i32")
    return Kernel(make_rows, signature, constants, launch_bounds=(THREADS,))


@functools.cache
def tokens_kernel(dtype: str, format: str, scale: str, scale_layout: str, has_global: bool) -> Kernel:
    """The ``tokens`` kernel for these constants."""
    constants = {
        "dtype": dtype,
        "format": format,
        "scale": scale,
        "scale_layout": scale_layout,
        "has_global": has_global,
    }
    signature = (element_pointer(dtype), "f32*", "u32*", "u8*", "i32", "i32", "i32", "i32", "i32", "i32")
    return Kernel(make_tokens, signature, constants, launch_bounds=(THREADS_TOKENS[format],))
