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
``tokens``      tokens, any scale layout       CTA = 64 channels x 64 tokens; reads are coalesced along channels,
                                               codes and scales go through shared memory and leave along tokens
==============  =============================  ==================================================================

Bytes an element, f16 to NVFP4: 2 read, 0.5 + 1/16 written. Shared memory: none, none, 2.5 KiB. Needs sm_80; the E2M1
conversion is one instruction on sm_100a and sm_120a and a bit-identical software form elsewhere.
"""

from __future__ import annotations

import functools

from nbfmha import scale_layouts
from nbfmha.kernels.blocks import BLOCK_SIZE, element_pointer, make_load_words, make_quantize_block, make_widen
from ptx_inline.toolchain import Kernel

THREADS = 256
CHANNELS = 64
TOKENS = 64
THREADS_TOKENS = {name: CHANNELS // 2 * (TOKENS // block) for name, block in BLOCK_SIZE.items()}


def make_flat(dtype: str, format: str, scale: str, has_global: bool):
    """Kernel ``flat(x, global_scale, codes, scales, blocks)``; ``x`` 16-byte aligned, as 32-bit words."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u32, i64 = types.float32, types.uint32, types.int64
    block = BLOCK_SIZE[format]
    code_words = block // 8
    load_words = make_load_words(dtype, block)
    quantize_block = make_quantize_block(dtype, format, scale, has_global)
    store_v2, store_v4 = dev.st_global_v2_u32, dev.st_global_v4_u32

    def flat(x, global_scale, codes, scales, blocks):
        index = i64(cuda.blockIdx.x) * i64(THREADS) + i64(cuda.threadIdx.x)
        if index >= blocks:
            return
        values = cuda.local.array(block, f32)
        packed = cuda.local.array(code_words, u32)
        load_words(x, index, values)
        g = global_scale[0] if has_global else f32(1)
        scales[index] = quantize_block(values, g, packed)
        if code_words == 2:
            store_v2(codes, index * i64(2), packed[0], packed[1])
        else:
            store_v4(codes, index * i64(4), packed[0], packed[1], packed[2], packed[3])

    return flat


def make_rows(dtype: str, format: str, scale: str, scale_layout: str, has_global: bool, whole_blocks: bool):
    """Kernel ``rows(x, global_scale, codes, scales, rows, head_dim, padded_rows, padded_cols, first_matrix)``.

    A CTA is a rectangle of the padded scale matrix, threadIdx.x along the columns; the grid is (row tiles, column tiles,
    matrices from ``first_matrix`` on), so that no thread divides. ``whole_blocks``:
    head_dim is a multiple of the block and ``x`` is 16-byte aligned, as 32-bit words.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u8, u32, i64 = types.float32, types.uint8, types.uint32, types.int64
    block = BLOCK_SIZE[format]
    code_words = block // 8
    widen, load_words = make_widen(dtype), make_load_words(dtype, block)
    quantize_block = make_quantize_block(dtype, format, scale, has_global)
    scale_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[scale_layout])
    store_v2 = dev.st_global_v2_u32

    def rows(x, global_scale, codes, scales, rows, head_dim, padded_rows, padded_cols, first_matrix):
        # unsigned 32-bit index arithmetic inside a matrix: Numba widens signed arithmetic to 64 bits
        matrix = i64(first_matrix) + i64(cuda.blockIdx.z)
        row = u32(u32(cuda.blockIdx.x) * u32(cuda.blockDim.y) + u32(cuda.threadIdx.y))
        col = u32(u32(cuda.blockIdx.y) * u32(cuda.blockDim.x) + u32(cuda.threadIdx.x))
        if row >= padded_rows or col >= padded_cols:
            return
        cols = u32((head_dim + u32(block - 1)) // u32(block))
        scale_index = matrix * i64(padded_rows) * i64(padded_cols) + i64(u32(scale_offset(row, col, padded_cols)))
        if row >= rows or col >= cols:
            scales[scale_index] = u8(0)
            return
        values = cuda.local.array(block, f32)
        packed = cuda.local.array(code_words, u32)
        stored_row = matrix * i64(rows) + i64(row)
        block_index = stored_row * i64(cols) + i64(col)
        if whole_blocks:
            load_words(x, block_index, values)
        else:
            first = stored_row * i64(head_dim) + i64(col) * i64(block)
            left = i64(head_dim) - i64(col) * i64(block)
            for i in range(block):
                values[i] = widen(x[first + i64(i)]) if i64(i) < left else f32(0)
        g = global_scale[0] if has_global else f32(1)
        scales[scale_index] = u8(quantize_block(values, g, packed))
        for w in range(0, code_words, 2):
            store_v2(codes, block_index * i64(code_words) + i64(w), packed[w], packed[w + 1])

    return rows


def make_tokens(dtype: str, format: str, scale: str, scale_layout: str, has_global: bool):
    """Kernel ``tokens(x, global_scale, codes, scales, tokens, head_dim, padded_rows, padded_cols, first_matrix)``, grid
    (token tiles, channel tiles, matrices from ``first_matrix`` on): the stored matrix is the transpose, (head_dim,
    tokens). A thread owns the blocks of two neighbouring channels; ``x`` is aligned to two elements."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u8, u16, u32, i64 = types.float32, types.uint8, types.uint16, types.uint32, types.int64
    ffi = dev.ffi
    block = BLOCK_SIZE[format]
    code_words = block // 8
    tile_cols = TOKENS // block
    pitch = tile_cols * code_words + 1  # odd: the channels of a warp hit different banks
    channels_a_pass = THREADS_TOKENS[format] // (TOKENS // 16)
    rows_a_pass = THREADS_TOKENS[format] // tile_cols
    widen = make_widen(dtype)
    wide = dtype == "float32"
    quantize_block = make_quantize_block(dtype, format, scale, has_global)
    scale_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[scale_layout])
    store_v2, load_v2, float_of = dev.st_global_v2_u32, dev.ld_global_nc_v2_u32, dev.mov_f32_b32

    words_a_pair = 2 if wide else 1
    raw_words = block * words_a_pair

    @cuda.jit(device=True, forceinline=True)
    def load_pair(x, index, i, raw):
        """Bits of element ``i`` of both blocks; ``index`` counts pairs. Two 16-bit elements stay in one register."""
        if wide:
            load_v2(ffi.from_buffer(raw[2 * i :]), x, index * i64(2))
        else:
            raw[i] = x[index]

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def widen_side(raw, side, values):
        """The even (0) or odd (1) channel of the pairs, as f32."""
        for i in unroll(block):
            if wide:
                values[i] = float_of(raw[words_a_pair * i + side])
            else:
                values[i] = widen(u16((raw[i] >> u32(16 * side)) & u32(0xFFFF)))

    @unrolled
    def tokens(x, global_scale, codes, scales, tokens, head_dim, padded_rows, padded_cols, first_matrix):
        staged = cuda.shared.array((CHANNELS, pitch), u32)
        staged_scales = cuda.shared.array((CHANNELS, tile_cols), u8)
        token_tile, channel_tile = u32(cuda.blockIdx.x), u32(cuda.blockIdx.y)
        matrix = i64(first_matrix) + i64(cuda.blockIdx.z)
        thread = u32(cuda.threadIdx.x)

        channel_in_tile = u32(u32(2) * (thread & u32(31)))
        col_in_tile = u32(thread >> u32(5))
        channel = u32(channel_tile * u32(CHANNELS) + channel_in_tile)
        col = u32(token_tile * u32(tile_cols) + col_in_tile)
        cols = u32((tokens + u32(block - 1)) // u32(block))
        if channel < padded_rows and col < padded_cols:
            even_byte, odd_byte = u32(0), u32(0)
            if channel < head_dim and col < cols:  # head_dim is even: channel + 1 is inside too
                raw = cuda.local.array(raw_words, u32)
                values = cuda.local.array(block, f32)
                packed = cuda.local.array(code_words, u32)
                first_token = i64(col) * i64(block)
                left = i64(tokens) - first_token
                pairs = i64(head_dim >> u32(1))
                first = (matrix * i64(tokens) + first_token) * pairs + i64(channel >> u32(1))
                if left >= i64(block):
                    for i in unroll(block):
                        load_pair(x, first + i64(i) * pairs, i, raw)
                else:
                    for i in unroll(raw_words):
                        raw[i] = u32(0)
                    for i in unroll(block):
                        if i64(i) < left:
                            load_pair(x, first + i64(i) * pairs, i, raw)
                g = global_scale[0] if has_global else f32(1)
                widen_side(raw, 0, values)
                even_byte = u32(quantize_block(values, g, packed))
                for w in unroll(code_words):
                    staged[channel_in_tile, col_in_tile * u32(code_words) + u32(w)] = packed[w]
                widen_side(raw, 1, values)
                odd_byte = u32(quantize_block(values, g, packed))
                for w in unroll(code_words):
                    staged[channel_in_tile + u32(1), col_in_tile * u32(code_words) + u32(w)] = packed[w]
            staged_scales[channel_in_tile, col_in_tile] = u8(even_byte)
            staged_scales[channel_in_tile + u32(1), col_in_tile] = u8(odd_byte)
        cuda.syncthreads()

        # neighbouring lanes write neighbouring tokens, so that the stores of a channel are contiguous
        scales_of_matrix = matrix * i64(padded_rows) * i64(padded_cols)
        stored_col = u32(token_tile * u32(tile_cols) + thread % u32(tile_cols))
        for step in unroll(0, CHANNELS, rows_a_pass):
            row = u32(u32(step) + thread // u32(tile_cols))
            stored = u32(channel_tile * u32(CHANNELS) + row)
            if stored < padded_rows and stored_col < padded_cols:
                offset = i64(u32(scale_offset(stored, stored_col, padded_cols)))
                scales[scales_of_matrix + offset] = staged_scales[row, thread % u32(tile_cols)]
        pair_in_tile = u32(thread % u32(TOKENS // 16))
        pairs_per_channel = u32(cols * u32(code_words // 2))
        pair = u32(token_tile * u32(TOKENS // 16) + pair_in_tile)
        for step in unroll(0, CHANNELS, channels_a_pass):
            row = u32(u32(step) + thread // u32(TOKENS // 16))
            stored = u32(channel_tile * u32(CHANNELS) + row)
            if stored < head_dim and pair < pairs_per_channel:
                destination = (matrix * i64(head_dim) + i64(stored)) * i64(pairs_per_channel) + i64(pair)
                low, high = staged[row, u32(2) * pair_in_tile], staged[row, u32(2) * pair_in_tile + u32(1)]
                store_v2(codes, destination * i64(2), low, high)

    return tokens


@functools.cache
def flat_kernel(dtype: str, format: str, scale: str, has_global: bool) -> Kernel:
    """The ``flat`` kernel for these constants."""
    constants = {"dtype": dtype, "format": format, "scale": scale, "has_global": has_global}
    return Kernel(make_flat, ("u32*", "f32*", "u32*", "u8*", "i64"), constants, launch_bounds=(THREADS,))


@functools.cache
def rows_kernel(
    dtype: str, format: str, scale: str, scale_layout: str, has_global: bool, whole_blocks: bool
) -> Kernel:
    """The ``rows`` kernel for these constants."""
    constants = {
        "dtype": dtype,
        "format": format,
        "scale": scale,
        "scale_layout": scale_layout,
        "has_global": has_global,
        "whole_blocks": whole_blocks,
    }
    x = "u32*" if whole_blocks else element_pointer(dtype)
    signature = (x, "f32*", "u32*", "u8*", "u32", "u32", "u32", "u32", "i64")
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
    signature = ("u32*", "f32*", "u32*", "u8*", "u32", "u32", "u32", "u32", "i64")
    threads = THREADS_TOKENS[format]
    # 48 registers are enough for this variant, and 1,280 threads an SM hide more latency than 1,024; the others spill
    fits = dtype != "float32" and format == "nvfp4" and scale == "amax" and not has_global
    launch_bounds = (threads, 1280 // threads) if fits else (threads,)
    return Kernel(make_tokens, signature, constants, launch_bounds=launch_bounds)
