"""V of the pre-pass, and float32 inputs that nothing quantises.

===========  =============================================================================================================
``v``        CTA = (kv head, tile of 64 tokens, up to 128 channels): V transposed, each thread quantises 16 tokens of two
             channels, by a scale of their own or (``scale="row"``) the channel's. Reads are coalesced along channels;
             codes and scales go through shared memory and leave along tokens
``values``   the same CTA and threads: what the codes of ``v`` and their scales stand for, in f16, where V's rows lie
             (``dequant``)
``convert``  a thread rounds 8 elements of a float32 input to float16
===========  =============================================================================================================
"""

from __future__ import annotations

import functools

from nbfmha.kernels.blocks import make_quantize_block, make_round_block
from nbfmha.kernels.prepass_legacy import make_encode
from nbfmha.kernels.prepass_load import BLOCK, channels_of_v, make_load_pair, make_widen_pair, threads_of_v
from nbfmha.recipe import TILE_N
from ptx_inline.toolchain import Kernel

CONVERT_THREADS = 256
_BLOCKS = TILE_N // BLOCK


def _make_load_pairs(dtype: str, head_dim: int):
    """Device function ``(raw: u32[16], v, v16, key_tiles, has_16, v_b, v_h, v_t, seqlen_k, tiles, num_heads_kv) -> (left,
    at)``: two channels of the 16 tokens of this thread, zeros after the sequence's last one; how many tokens there are, and
    where the first pair lies in a contiguous tensor. v16 of a float32 v is written with ``has_16``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    load_pair = make_load_pair(dtype)
    pairs, parts, row_pairs = channels_of_v(head_dim) // 2, head_dim // channels_of_v(head_dim), head_dim // 2
    wide = dtype == "float32"

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_pairs(raw, v, v16, key_tiles, has_16, v_b, v_h, v_t, seqlen_k, tiles, num_heads_kv):
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        pair, block = thread % u32(pairs), thread // u32(pairs)
        part, other = cta % i32(parts), cta // i32(parts)
        head, tile = other // tiles, other % tiles
        first = i32(u32(BLOCK) * block)
        source, left = key_tiles[4 * tile] + first, i32(key_tiles[4 * tile + 1] - first)
        row_pair = i64(part) * i64(pairs) + i64(pair)
        at = i64(head // num_heads_kv) * v_b + i64(head % num_heads_kv) * v_h + i64(source) * v_t + i64(2) * row_pair
        at_16 = (i64(head) * i64(seqlen_k) + i64(source)) * i64(row_pairs) + row_pair
        for i in unroll(BLOCK):
            raw[i] = u32(0)
            if i32(i) < left:
                raw[i] = load_pair(v, at + i64(i) * v_t)
        if wide and has_16 != i32(0):
            for i in unroll(BLOCK):
                if i32(i) < left:
                    v16[at_16 + i64(i * row_pairs)] = raw[i]
        return left, at_16

    return load_pairs


def make_v(dtype: str, head_dim: int, scale: str):
    """Kernel ``v(codes, scales, v, v16, key_tiles, has_16, v_b, v_h, v_t, seqlen_k, tiles, num_heads_kv, n_sequences)``;
    v16 of a float32 v is written with ``has_16``; with ``scale="row"`` the scales are read."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u8, u32, i32, i64 = types.float32, types.uint8, types.uint32, types.int32, types.int64
    store_v2 = dev.st_global_v2_u32
    channels, pairs = channels_of_v(head_dim), channels_of_v(head_dim) // 2
    parts = head_dim // channels
    rows_a_pass = threads_of_v(head_dim) // _BLOCKS
    pitch = 2 * _BLOCKS + 1  # odd: the channels of a warp hit different banks
    per_row = scale == "row"
    load_pairs, widen_pair, encode = _make_load_pairs(dtype, head_dim), make_widen_pair(dtype), make_encode()
    quantize_block = make_quantize_block(dtype, "nvfp4", "amax" if per_row else scale, False)

    # Numba types every branch, so each kind of scale is its function
    if per_row:

        @cuda.jit(device=True, forceinline=True)
        def quantize(values, packed, staged_scales, channel, block, scales, at):
            encode(values, scales[at + i64(channel)], packed)

    else:

        @cuda.jit(device=True, forceinline=True)
        def quantize(values, packed, staged_scales, channel, block, scales, at):
            staged_scales[channel, block] = u8(quantize_block(values, f32(1), packed))

    @unrolled
    def v_kernel(codes, scales, v, v16, key_tiles, has_16, v_b, v_h, v_t, seqlen_k, tiles, num_heads_kv, n_sequences):
        staged = cuda.shared.array((channels, pitch), u32)
        staged_scales = cuda.shared.array((channels, _BLOCKS), u8)
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        pair, block = thread % u32(pairs), thread // u32(pairs)
        part, other = cta % i32(parts), cta // i32(parts)
        head, tile = other // tiles, other % tiles
        scale_row = i64(head) * i64(n_sequences) + i64(key_tiles[4 * tile + 3])
        scale_at = scale_row * i64(head_dim) + i64(part) * i64(channels)
        raw = cuda.local.array(BLOCK, u32)
        values = cuda.local.array(BLOCK, f32)
        packed = cuda.local.array(2, u32)
        load_pairs(raw, v, v16, key_tiles, has_16, v_b, v_h, v_t, seqlen_k, tiles, num_heads_kv)
        channel = u32(2) * pair
        for i in unroll(BLOCK):
            values[i], _ = widen_pair(raw[i])
        quantize(values, packed, staged_scales, channel, block, scales, scale_at)
        for w in unroll(2):
            staged[channel, u32(2) * block + u32(w)] = packed[w]
        for i in unroll(BLOCK):
            _, values[i] = widen_pair(raw[i])
        quantize(values, packed, staged_scales, channel + u32(1), block, scales, scale_at)
        for w in unroll(2):
            staged[channel + u32(1), u32(2) * block + u32(w)] = packed[w]
        cuda.syncthreads()

        # neighbouring lanes write neighbouring tokens: 32 bytes of codes and 4 of scales a channel
        column = thread % u32(_BLOCKS)
        for step in unroll(0, channels, rows_a_pass):
            row = u32(step) + thread // u32(_BLOCKS)
            out = (i64(head) * i64(head_dim) + i64(part) * i64(channels) + i64(row)) * i64(tiles) + i64(tile)
            out = out * i64(_BLOCKS) + i64(column)
            if not per_row:
                scales[out] = staged_scales[row, column]
            store_v2(codes, out * i64(2), staged[row, u32(2) * column], staged[row, u32(2) * column + u32(1)])

    return v_kernel


def make_values(dtype: str, head_dim: int, scale: str):
    """Kernel ``values(values, v, v16, key_tiles, has_16, v_b, v_h, v_t, seqlen_k, tiles, num_heads_kv)``: values f16
    (heads_kv, seqlen_k, head_dim), two of them an element."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    pack, row_pairs = dev.cvt_rn_f16x2_f32, head_dim // 2
    load_pairs, widen_pair, round_block = (
        _make_load_pairs(dtype, head_dim), make_widen_pair(dtype), make_round_block(scale)
    )  # fmt: skip

    @unrolled
    def values_kernel(values, v, v16, key_tiles, has_16, v_b, v_h, v_t, seqlen_k, tiles, num_heads_kv):
        raw = cuda.local.array(BLOCK, u32)
        channel = cuda.local.array(BLOCK, f32)
        left, at = load_pairs(raw, v, v16, key_tiles, has_16, v_b, v_h, v_t, seqlen_k, tiles, num_heads_kv)
        # one channel after the other, what is done in the halves of ``raw``: registers for twice the threads
        for i in unroll(BLOCK):
            channel[i], _ = widen_pair(raw[i])
        round_block(channel)
        for i in unroll(BLOCK):
            rounded = pack(f32(0), channel[i])
            _, channel[i] = widen_pair(raw[i])
            raw[i] = rounded
        round_block(channel)
        for i in unroll(BLOCK):
            if i32(i) < left:
                values[at + i64(i * row_pairs)] = raw[i] | pack(channel[i], f32(0))

    return values_kernel


def make_convert(head_dim: int):
    """Kernel ``convert(y, x, x_b, x_h, x_t, heads, tokens, chunks)``: x f32 to y float16 (batch, heads, tokens, head_dim),
    contiguous; ``chunks`` of eight elements in all."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i64 = types.uint32, types.int64
    ffi, float_of, pack = dev.ffi, dev.mov_f32_b32, dev.cvt_rn_f16x2_f32
    load_v4, store_v4 = dev.ld_global_nc_v4_u32, dev.st_global_v4_u32

    @unrolled
    def convert(y, x, x_b, x_h, x_t, heads, tokens, chunks):
        chunk = i64(cuda.blockIdx.x) * i64(CONVERT_THREADS) + i64(cuda.threadIdx.x)
        if chunk < chunks:
            row, column = chunk // i64(head_dim // 8), chunk % i64(head_dim // 8)
            head, token = row // i64(tokens), row % i64(tokens)
            at = (head // i64(heads)) * x_b + (head % i64(heads)) * x_h + token * x_t + column * i64(8)
            wide = cuda.local.array(8, u32)
            words = cuda.local.array(4, u32)
            for w in unroll(0, 8, 4):
                load_v4(ffi.from_buffer(wide[w:]), x, at + i64(w))
            for w in unroll(4):
                words[w] = pack(float_of(wide[2 * w + 1]), float_of(wide[2 * w]))
            store_v4(y, chunk * i64(4), words[0], words[1], words[2], words[3])

    return convert


@functools.cache
def v_kernel(dtype: str, head_dim: int, scale: str) -> Kernel:
    """The ``v`` kernel for these constants."""
    constants = {"dtype": dtype, "head_dim": head_dim, "scale": scale}
    scales = "f32*" if scale == "row" else "u8*"
    signature = ("u32*", scales, "u32*", "u32*", "i32*", "i32", *("i64",) * 3, *("i32",) * 4)
    threads = threads_of_v(head_dim)
    # ptxas makes do with 64 registers; for float32 that spills on sm_120a, unless it is told that 80 are to be had
    launch_bounds = (threads, max(1, 768 // threads)) if dtype == "float32" else (threads,)
    return Kernel(make_v, signature, constants, launch_bounds=launch_bounds)


@functools.cache
def values_kernel(dtype: str, head_dim: int, scale: str) -> Kernel:
    """The ``values`` kernel for these constants."""
    constants = {"dtype": dtype, "head_dim": head_dim, "scale": scale}
    signature = ("u32*", "u32*", "u32*", "i32*", "i32", *("i64",) * 3, *("i32",) * 3)
    threads = threads_of_v(head_dim)
    return Kernel(make_values, signature, constants, launch_bounds=(threads,))


@functools.cache
def convert_kernel(head_dim: int) -> Kernel:
    """The ``convert`` kernel for this head_dim."""
    signature = ("u32*", "u32*", *("i64",) * 3, "i32", "i32", "i64")
    return Kernel(make_convert, signature, {"head_dim": head_dim}, launch_bounds=(CONVERT_THREADS,))
