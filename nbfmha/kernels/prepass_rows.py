"""Q and K of the pre-pass: means over tokens, and rows quantised along head_dim.

==========  ==============================================================================================================
``k_sums``  CTA = (kv head, tile of 64 keys): sums of the tile over its keys, per channel
``k_mean``  CTA = (kv head, sequence, 32 channels): km, from the sums of the sequence's tiles
``q``       CTA = (query head, block of 64 or 128 queries): qm, q - qm quantised, q.km; reads q twice, the second time from
            a cache
``k``       CTA = (kv head, tile of 64 keys): k - km quantised; codes with rows in ``operands.stored_order``
==========  ==============================================================================================================

``q`` and ``k`` write codes and scales, or with ``to_values`` what these stand for, in f16 (``dequant``).

``scale`` of ``q`` and ``k`` is how the UE4M3 scale of 16 channels is chosen, or "row": one f32 scale for the row.

A thread owns blocks of 16 channels, 32 rows apart: loads of 16 bytes, neighbouring threads read neighbours. No float
atomics: the same input gives the same bits. Needs sm_80.
"""

from __future__ import annotations

import functools

from nbfmha.kernels.blocks import make_quantize_block, make_round_block
from nbfmha.kernels.prepass_legacy import make_store_rows
from nbfmha.kernels.prepass_load import (
    ROWS_A_PASS,
    code_cols,
    make_centre,
    make_column_sum,
    make_keep_16,
    make_load_16,
    make_load_means,
    make_store_values,
    make_widen_pair,
    staged_words_of,
    threads_of,
)
from nbfmha.recipe import TILE_N
from nbfmha.tiles import MeanBlock
from ptx_inline.toolchain import Kernel

MEAN_PARTS = 8
MEAN_CHANNELS = 32
MEAN_THREADS = MEAN_PARTS * MEAN_CHANNELS


def make_k_sums(dtype: str, head_dim: int):
    """Kernel ``k_sums(sums, k, key_tiles, k_b, k_h, k_t, tiles, num_heads_kv)``: sums f32 (heads_kv, tiles, head_dim)."""
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    cols, staged_words = code_cols(head_dim), staged_words_of(head_dim)
    load_16, widen_pair, column_sum = make_load_16(dtype), make_widen_pair(dtype), make_column_sum(head_dim)

    @unrolled
    def k_sums(sums, k, key_tiles, k_b, k_h, k_t, tiles, num_heads_kv):
        staged = cuda.shared.array(staged_words, f32)
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        col, row = thread % u32(cols), i32(thread // u32(cols))
        head, tile = cta // tiles, cta % tiles
        source, count = key_tiles[4 * tile], key_tiles[4 * tile + 1]
        first = i64(head // num_heads_kv) * k_b + i64(head % num_heads_kv) * k_h + i64(16) * i64(col)
        totals = cuda.local.array(16, f32)
        words = cuda.local.array(8, u32)
        for c in unroll(16):
            totals[c] = f32(0)
        if col < u32(head_dim // 16):
            for token in range(row, count, ROWS_A_PASS):
                load_16(k, first + i64(source + i32(token)) * k_t, words)
                for w in unroll(8):
                    even, odd = widen_pair(words[w])
                    totals[2 * w] += even
                    totals[2 * w + 1] += odd
        total = column_sum(totals, staged, thread)
        channel = u32(16) * (thread % u32(cols)) + thread // u32(cols)
        if thread < u32(16 * cols) and channel < u32(head_dim):
            sums[(i64(head) * i64(tiles) + i64(tile)) * i64(head_dim) + i64(channel)] = total

    return k_sums


def make_k_mean(head_dim: int):
    """Kernel ``k_mean(means, sums, sequences, tiles, n_sequences)``: means f32 (heads_kv, n_sequences, head_dim), zero for
    a sequence without keys. sequences: (first tile, the one after the last, number of keys) each."""
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    slabs = head_dim // MEAN_CHANNELS

    @unrolled
    def k_mean(means, sums, sequences, tiles, n_sequences):
        staged = cuda.shared.array((MEAN_PARTS, MEAN_CHANNELS), f32)
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        lane, part = thread % u32(MEAN_CHANNELS), thread // u32(MEAN_CHANNELS)
        slab, pair = cta % i32(slabs), cta // i32(slabs)
        head, sequence = pair // n_sequences, pair % n_sequences
        first, stop, count = sequences[3 * sequence], sequences[3 * sequence + 1], sequences[3 * sequence + 2]
        channel = i64(slab) * i64(MEAN_CHANNELS) + i64(lane)
        total = f32(0)
        for tile in range(first + i32(part), stop, MEAN_PARTS):
            total += sums[(i64(head) * i64(tiles) + i64(tile)) * i64(head_dim) + channel]
        staged[part, lane] = total
        cuda.syncthreads()
        if part == u32(0):
            for p in unroll(1, MEAN_PARTS):
                total += staged[p, lane]
            means[i64(pair) * i64(head_dim) + channel] = total / f32(max(count, i32(1)))

    return k_mean


def _make_store(dtype: str, head_dim: int, scale: str):
    """Device function ``(codes: u32*, scales, values: f32[16], row, col, present)``: 16 channels quantised, and written
    where ``present``; scales u8* by 16 channels or, with "row", f32* as ``make_store_rows`` says."""
    if scale == "row":
        return make_store_rows(head_dim)
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u8, u32, i64 = types.float32, types.uint8, types.uint32, types.int64
    cols, store_v2 = code_cols(head_dim), dev.st_global_v2_u32
    quantize_block = make_quantize_block(dtype, "nvfp4", scale, False)

    @cuda.jit(device=True, forceinline=True)
    def store_blocks(codes, scales, values, row, col, present):
        packed = cuda.local.array(2, u32)
        if present:
            out = row * i64(cols) + i64(col)
            scales[out] = u8(quantize_block(values, f32(1), packed))
            store_v2(codes, out * i64(2), packed[0], packed[1])

    return store_blocks


def _scales_pointer(scale: str) -> str:
    return "f32*" if scale == "row" else "u8*"


def make_q(dtype: str, head_dim: int, rows: int, scale: str, smooth: bool, to_values: bool):
    """Kernel ``q(codes, scales, q, q_mean, shift, q16, k_mean, blocks, has_shift, has_16, q_b, q_h, q_t, seqlen_q,
    n_blocks, num_heads_q, qhead_per_kvhead, n_sequences)``; q_mean is written with ``smooth``, q16 of a float32 q with
    ``has_16``; with ``to_values`` ``codes`` are values."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    cols, staged_words, block_fields = code_cols(head_dim), staged_words_of(head_dim), len(MeanBlock._fields)
    pitch = 17  # of the 16 means of a column: different columns in different banks
    mean_words = pitch * cols
    halvings = cols.bit_length() - 1
    wide = dtype == "float32"
    load_16, widen_pair, load_means = make_load_16(dtype), make_widen_pair(dtype), make_load_means()
    column_sum, store = make_column_sum(head_dim), _make_store(dtype, head_dim, scale)
    round_block, store_values = make_round_block("amax" if scale == "row" else scale), make_store_values()
    fma, bfly, keep_16, centre = dev.fma_rn_f32, dev.shfl_sync_bfly_f32, make_keep_16(head_dim), make_centre(dtype)

    @unrolled
    def q_kernel(
        codes, scales, q, q_mean, shift, q16, k_mean, blocks, has_shift, has_16, q_b, q_h, q_t, seqlen_q, n_blocks,
        num_heads_q, qhead_per_kvhead, n_sequences,
    ):  # fmt: skip
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        col, first_row = thread % u32(cols), i32(thread // u32(cols))
        head, block = cta // n_blocks, cta % n_blocks
        field = i32(block_fields) * block
        first, count, sequence = blocks[field], blocks[field + 1] - blocks[field], blocks[field + 2]
        source = i64(head // num_heads_q) * q_b + i64(head % num_heads_q) * q_h + i64(first) * q_t + i64(16) * i64(col)
        there = col < u32(head_dim // 16)
        words = cuda.local.array(8, u32)
        values = cuda.local.array(16, f32)
        means = cuda.local.array(16, f32)
        totals = cuda.local.array(16, f32)
        for c in unroll(16):
            totals[c] = f32(0)
            means[c] = f32(0)

        if smooth or has_shift != i32(0):
            mean_row = i64(head // qhead_per_kvhead) * i64(n_sequences) + i64(sequence)
            load_means(k_mean, mean_row, head_dim, u32(16) * col, has_shift, means)
            for step in range(rows // ROWS_A_PASS):
                row = first_row + i32(step) * i32(ROWS_A_PASS)
                product = f32(0)
                if there and row < count:
                    load_16(q, source + i64(row) * q_t, words)
                    for w in unroll(8):
                        even, odd = widen_pair(words[w])
                        totals[2 * w] += even
                        totals[2 * w + 1] += odd
                        product = fma(odd, means[2 * w + 1], fma(even, means[2 * w], product))
                if has_shift != i32(0):
                    for i in unroll(halvings):
                        product = product + bfly(product, u32(1 << i))
                    if col == u32(0) and row < count:
                        shift[i64(head) * i64(seqlen_q) + i64(first + row)] = product
            for c in unroll(16):
                means[c] = f32(0)
        if smooth:
            staged = cuda.shared.array(staged_words, f32)
            shared_means = cuda.shared.array(mean_words, f32)
            mean = column_sum(totals, staged, thread) / f32(count)
            if thread < u32(16 * cols):
                mean_col, c_in_col = thread % u32(cols), thread // u32(cols)
                channel = u32(16) * mean_col + c_in_col
                shared_means[u32(pitch) * mean_col + c_in_col] = mean
                if channel < u32(head_dim):
                    q_mean[i64(cta) * i64(head_dim) + i64(channel)] = mean
            cuda.syncthreads()
            for c in unroll(16):
                means[c] = shared_means[u32(pitch) * col + u32(c)]

        for step in range(rows // ROWS_A_PASS):
            row = first_row + i32(step) * i32(ROWS_A_PASS)
            out_row = i64(head) * i64(seqlen_q) + i64(first + row)
            for w in unroll(8):
                words[w] = u32(0)
            if there and row < count:
                load_16(q, source + i64(row) * q_t, words)
                if wide and has_16 != i32(0):
                    keep_16(q16, out_row, col, words)
            centre(values, words, means)
            if to_values:
                if there and row < count:
                    round_block(values)
                    store_values(codes, out_row * i64(head_dim) + i64(16) * i64(col), values)
            else:
                store(codes, scales, values, out_row, col, row < count)

    return q_kernel


def make_k(dtype: str, head_dim: int, scale: str, to_values: bool):
    """Kernel ``k(codes, scales, k, k16, k_mean, key_tiles, has_mean, has_16, k_b, k_h, k_t, seqlen_k, tiles, num_heads_kv,
    n_sequences)``; k16 of a float32 k is written with ``has_16``; with ``to_values`` ``codes`` are values."""
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    cols = code_cols(head_dim)
    wide = dtype == "float32"
    load_16, load_means = make_load_16(dtype), make_load_means()
    store, keep_16, centre = _make_store(dtype, head_dim, scale), make_keep_16(head_dim), make_centre(dtype)
    round_block, store_values = make_round_block("amax" if scale == "row" else scale), make_store_values()

    @unrolled
    def k_kernel(
        codes, scales, k, k16, k_mean, key_tiles, has_mean, has_16, k_b, k_h, k_t, seqlen_k, tiles, num_heads_kv,
        n_sequences,
    ):  # fmt: skip
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        col, inside = thread % u32(cols), thread // u32(cols)
        head, tile = cta // tiles, cta % tiles
        source, count, sequence = key_tiles[4 * tile], key_tiles[4 * tile + 1], key_tiles[4 * tile + 3]
        first = i64(head // num_heads_kv) * k_b + i64(head % num_heads_kv) * k_h + i64(16) * i64(col)
        token_inside = inside
        if not to_values:  # operands.stored_order: the token, within 32, of the stored row ``inside``
            token_inside = (((inside & u32(7)) >> u32(1)) << u32(3)) | ((inside >> u32(3)) << u32(1)) | (inside & u32(1))
        means = cuda.local.array(16, f32)
        words = cuda.local.array(8, u32)
        values = cuda.local.array(16, f32)
        load_means(k_mean, i64(head) * i64(n_sequences) + i64(sequence), head_dim, u32(16) * col, has_mean, means)
        for step in range(TILE_N // ROWS_A_PASS):
            token = i32(token_inside) + i32(step) * i32(ROWS_A_PASS)
            for c in unroll(16):
                values[c] = f32(0)
            there = token < count and col < u32(head_dim // 16)
            if there:
                load_16(k, first + i64(source + token) * k_t, words)
                if wide and has_16 != i32(0):
                    keep_16(k16, i64(head) * i64(seqlen_k) + i64(source + token), col, words)
                centre(values, words, means)
            if to_values:
                if there:
                    round_block(values)
                    out_row = i64(head) * i64(seqlen_k) + i64(source + token)
                    store_values(codes, out_row * i64(head_dim) + i64(16) * i64(col), values)
            else:
                stored = i64(cta) * i64(TILE_N) + i64(step) * i64(ROWS_A_PASS) + i64(inside)
                store(codes, scales, values, stored, col, True)

    return k_kernel


@functools.cache
def k_sums_kernel(dtype: str, head_dim: int) -> Kernel:
    """The ``k_sums`` kernel for these constants."""
    signature = ("f32*", "u32*", "i32*", *("i64",) * 3, *("i32",) * 2)
    return Kernel(make_k_sums, signature, {"dtype": dtype, "head_dim": head_dim}, launch_bounds=(threads_of(head_dim),))


@functools.cache
def k_mean_kernel(head_dim: int) -> Kernel:
    """The ``k_mean`` kernel for this head_dim."""
    signature = ("f32*", "f32*", "i32*", "i32", "i32")
    return Kernel(make_k_mean, signature, {"head_dim": head_dim}, launch_bounds=(MEAN_THREADS,))


@functools.cache
def q_kernel(dtype: str, head_dim: int, rows: int, scale: str, smooth: bool, to_values: bool) -> Kernel:
    """The ``q`` kernel for these constants."""
    constants = {"dtype": dtype, "head_dim": head_dim, "rows": rows, "scale": scale, "smooth": smooth}
    constants["to_values"] = to_values
    signature = (
        "u32*", _scales_pointer(scale), "u32*", "f32*", "f32*", "u32*", "u32*", "i32*", "i32", "i32", *("i64",) * 3,
        *("i32",) * 5,
    )  # fmt: skip
    threads = threads_of(head_dim)
    # 80 registers are enough for 16-bit inputs (for values 64), and more threads an SM hide more latency
    launch_bounds = (threads,) if dtype == "float32" else (threads, max(1, (1024 if to_values else 768) // threads))
    return Kernel(make_q, signature, constants, launch_bounds=launch_bounds)


@functools.cache
def k_kernel(dtype: str, head_dim: int, scale: str, to_values: bool) -> Kernel:
    """The ``k`` kernel for these constants."""
    constants = {"dtype": dtype, "head_dim": head_dim, "scale": scale, "to_values": to_values}
    pointers = ("u32*", _scales_pointer(scale), "u32*", "u32*", "u32*", "i32*")
    signature = (*pointers, "i32", "i32", *("i64",) * 3, *("i32",) * 4)
    threads = threads_of(head_dim)
    # ptxas makes do with 64 registers at 512 threads; for float32 that spills, unless it is told that more are to be had
    launch_bounds = (threads, max(1, 768 // threads)) if dtype == "float32" else (threads,)
    return Kernel(make_k, signature, constants, launch_bounds=launch_bounds)
