"""The correction of Q smoothing: delta[mean block, token] = sum_c qm[block, c] k'[token, c], in float32.

CTA: 128 threads, 64 rows of qm x 128 padded tokens; a thread has 8 rows x 8 tokens in registers. The rows of all query
heads that share a kv head are rows of one product. Slabs of 32 channels of both operands lie in shared memory as f32,
pitch 36: a 16-byte load of four channels then has no bank conflict. Each output is one chain of FMAs in order of channels.

Bytes a CTA: 64 head_dim (4 for qm + 4 for k in 16 bits) read, from L2 mostly, 32 KiB written. smem 27,648 bytes.
Tokens of other sequences than the row's, and padding, become zero.
"""

from __future__ import annotations

import functools

from nbfmha.kernels.prepass_load import make_load_16, make_load_means, make_widen_pair
from nbfmha.recipe import TILE_N
from ptx_inline.toolchain import Kernel

THREADS = 128
TILE_ROWS = 64
TILE_TOKENS = 2 * TILE_N
SLAB = 32
SLAB_BYTES = 4 * SLAB
"""An argument of the kernel: for a constant LLVM would write the inner loop out, eight times 256 FMAs."""
_PITCH = SLAB + 4
_SIDE = 8  # rows, and tokens, of a thread
_ROW_STEP = TILE_ROWS // _SIDE
_TOKEN_STEP = TILE_TOKENS // _SIDE


def make_delta(dtype: str, head_dim: int):
    """Kernel ``delta(delta, q_mean, k, k_mean, key_tiles, mean_blocks, has_mean, k_b, k_h, k_t, rows, row_tiles, n_means,
    tiles, token_tiles, num_heads_kv, n_sequences, slab_bytes)``: ``rows`` = n_means times the query heads of a kv head."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi, fma, float_of, bits_of = dev.ffi, dev.fma_rn_f32, dev.mov_f32_b32, dev.mov_b32_f32
    load_v4, load_shared, store_shared = dev.ld_global_nc_v4_u32, dev.ld_shared_v4_u32, dev.st_shared_v4_u32
    to_shared = dev.cvta_to_shared_u32
    b_words, outputs = 4 * _SIDE, _SIDE * _SIDE
    row_words, token_words = TILE_ROWS * _PITCH, TILE_TOKENS * _PITCH
    load_16, widen_pair, load_means = make_load_16(dtype), make_widen_pair(dtype), make_load_means()

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_rows(smem, q_mean, first_row, left, channel, thread):
        """Rows of qm, eight threads a row; rows from ``left`` on are zeros."""
        words = cuda.local.array(4, u32)
        for i in unroll(TILE_ROWS * SLAB // 4 // THREADS):
            row, chunk = u32(16 * i) + (thread >> u32(3)), thread & u32(7)
            for w in unroll(4):
                words[w] = u32(0)
            if i32(row) < left:
                at = (first_row + i64(row)) * i64(head_dim) + i64(channel) + i64(u32(4) * chunk)
                load_v4(ffi.from_buffer(words), q_mean, at)
            store_shared(smem + u32(4 * _PITCH) * row + u32(16) * chunk, words[0], words[1], words[2], words[3])

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_tokens(smem, k, first, k_t, count, means, thread):
        """64 rows of k', two threads a row; tokens from ``count`` on are zeros."""
        words = cuda.local.array(8, u32)
        values = cuda.local.array(16, f32)
        row, half = thread >> u32(1), thread & u32(1)
        for c in unroll(16):
            values[c] = f32(0)
        if i32(row) < count:
            load_16(k, first + i64(row) * k_t + i64(u32(16) * half), words)
            for w in unroll(8):
                even, odd = widen_pair(words[w])
                values[2 * w] = even - means[2 * w]
                values[2 * w + 1] = odd - means[2 * w + 1]
        to = smem + u32(4 * _PITCH) * row + u32(64) * half
        for c in unroll(0, 16, 4):
            store_shared(
                to + u32(4 * c), bits_of(values[c]), bits_of(values[c + 1]), bits_of(values[c + 2]), bits_of(values[c + 3])
            )

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def add_row(acc, first, a, b):
        """acc[first + token] += the products of four channels; a function of its own, since Numba's time to compile one
        grows with the square of its statements."""
        for c in unroll(4):
            x = float_of(a[c])
            for j in unroll(_SIDE):
                acc[first + u32(j)] = fma(x, float_of(b[4 * j + c]), acc[first + u32(j)])

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def multiply(acc, rows_smem, tokens_smem, slab_bytes):
        """Adds the products of one slab; the addresses are those of the thread's first row and first token."""
        a = cuda.local.array(4, u32)
        b = cuda.local.array(b_words, u32)
        for step in range(0, slab_bytes, 16):
            for j in unroll(_SIDE):
                load_shared(ffi.from_buffer(b[4 * j :]), tokens_smem + u32(step) + u32(4 * _PITCH * _TOKEN_STEP * j))
            for i in unroll(_SIDE):
                load_shared(ffi.from_buffer(a), rows_smem + u32(step) + u32(4 * _PITCH * _ROW_STEP * i))
                add_row(acc, u32(_SIDE * i), a, b)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_row(delta, at, acc, first, sequence, row_sequence):
        for j in unroll(_SIDE):
            if sequence[j // 4] >= i32(0):
                value = acc[first + u32(j)] if sequence[j // 4] == row_sequence else f32(0)
                delta[at + i64(_TOKEN_STEP * j)] = value

    @unrolled
    def delta_kernel(
        delta, q_mean, k, k_mean, key_tiles, mean_blocks, has_mean, k_b, k_h, k_t, rows, row_tiles, n_means, tiles,
        token_tiles, num_heads_kv, n_sequences, slab_bytes,
    ):  # fmt: skip
        rows_smem = to_shared(ffi.from_buffer(cuda.shared.array(row_words, u32, 16)))
        tokens_smem = to_shared(ffi.from_buffer(cuda.shared.array(token_words, u32, 16)))
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        row_tile, other = cta % row_tiles, cta // row_tiles
        token_tile, head = other % token_tiles, other // token_tiles
        own_row, own_token = thread >> u32(4), thread & u32(15)
        first_row = row_tile * i32(TILE_ROWS)
        left = rows - first_row
        all_rows = i64(head) * i64(rows) + i64(first_row)

        # the two tiles of keys: row in k, keys (0 where there is none), sequence
        source = cuda.local.array(2, i32)
        count = cuda.local.array(2, i32)
        sequence = cuda.local.array(2, i32)
        for side in unroll(2):
            tile = i32(2) * token_tile + i32(side)
            source[side], count[side], sequence[side] = i32(0), i32(0), i32(-1)
            if tile < tiles:
                source[side], count[side], sequence[side] = (
                    key_tiles[4 * tile], key_tiles[4 * tile + 1], key_tiles[4 * tile + 3]
                )  # fmt: skip
        # sequences ascend with the mean blocks of a head: tiles of keys that belong to none of these rows need no product
        some_rows = min(left, i32(TILE_ROWS))
        block, last_block = first_row % n_means, (first_row + some_rows - i32(1)) % n_means
        needed = some_rows > n_means or block > last_block  # rows of two heads: sequences begin anew among them
        if not needed:
            low, high = mean_blocks[3 * block + 2], mean_blocks[3 * last_block + 2]
            for side in unroll(2):
                needed = needed or (sequence[side] >= low and sequence[side] <= high)

        acc = cuda.local.array(outputs, f32)
        for i in unroll(outputs):
            acc[i] = f32(0)
        means = cuda.local.array(16, f32)
        if needed:
            rows_from = rows_smem + u32(4 * _PITCH) * own_row
            tokens_from = tokens_smem + u32(4 * _PITCH) * own_token
            k_head = i64(head // num_heads_kv) * k_b + i64(head % num_heads_kv) * k_h
            for channel in range(0, head_dim, SLAB):
                load_rows(rows_smem, q_mean, all_rows, left, channel, thread)
                for side in unroll(2):
                    mean_row = i64(head) * i64(n_sequences) + i64(max(sequence[side], i32(0)))
                    mean_channel = u32(channel) + u32(16) * (thread & u32(1))
                    load_means(k_mean, mean_row, head_dim, mean_channel, has_mean, means)
                    first = k_head + i64(source[side]) * k_t + i64(channel)
                    to = tokens_smem + u32(4 * _PITCH * TILE_N * side)
                    load_tokens(to, k, first, k_t, count[side], means, thread)
                cuda.syncthreads()
                multiply(acc, rows_from, tokens_from, slab_bytes)
                cuda.syncthreads()

        padded = i64(tiles) * i64(TILE_N)
        at = all_rows * padded + i64(token_tile) * i64(TILE_TOKENS) + i64(own_token)
        for i in unroll(_SIDE):
            row = i32(own_row) + i32(_ROW_STEP * i)
            if row < left:
                row_sequence = mean_blocks[3 * ((first_row + row) % n_means) + 2]
                store_row(delta, at + i64(row) * padded, acc, u32(_SIDE * i), sequence, row_sequence)

    return delta_kernel


@functools.cache
def delta_kernel(dtype: str, head_dim: int) -> Kernel:
    """The kernel for these constants."""
    signature = ("f32*", "u32*", "u32*", "u32*", "i32*", "i32*", "i32", *("i64",) * 3, *("i32",) * 8)
    constants = {"dtype": dtype, "head_dim": head_dim}
    return Kernel(make_delta, signature, constants, launch_bounds=(THREADS, 3))
