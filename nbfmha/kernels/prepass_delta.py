"""The correction of Q smoothing by tensor cores: delta[mean block, token] = qm . k' = qm . k - qm . km, in float32.

k is a value of a 16-bit format, qm is split into parts of that format: two for float16 (22 bits; a row is first multiplied
by a power of two, so that small values keep their bits), three for bfloat16 (24 bits). Each step of 16 channels begins a
sum of its own, smallest part first, and float32 additions put the steps together: ``mma`` rounds toward zero and cuts its
terms, which in one long chain would add up.

==========  ==============================================================================================================
CTA         4 warps, 64 rows (32 for head_dim 256) x up to four key tiles of one kv head, two tiles at a time. A row is a
            mean block of one query head: mean block after mean block, each with the query heads that share the kv head
warp        half of the rows x one key tile: ``mma.m16n8k16``, A from the parts of qm, B from k, both by ``ldmatrix``;
            nothing where none of its rows reads the tile
qm, km      read and split once a CTA; qm . km of a row in float32, eight lanes a row
k           slabs of 64 channels (48 for head_dim 96) in two stages by ``cp.async``; float32 through registers, rounded to
            float16. Rows lie permuted within each 16: a lane then has four neighbouring tokens, and stores 16 bytes
work        ``work_list``: what mean blocks read, hence no tiles past a causal edge or a window, none of other sequences
==========  ==============================================================================================================

head_dim 128, float16, two key tiles: 2^20 FMAs for each part of qm, 1024 ``mma`` in all; 32 KiB of k read, from L2 mostly,
32 KiB written; and for each four tiles 32 KiB of qm. smem: ``shared_bytes``, 73,728 bytes. Needs sm_80.
"""

from __future__ import annotations

import functools

import numpy as np

from nbfmha.kernels.tile_16bit import THREADS, row_pitch
from nbfmha.recipe import TILE_N
from nbfmha.tiles import MeanBlock
from ptx_inline.toolchain import Kernel

TILES_A_CTA = 4
"""Key tiles of a CTA: enough to make little of the time that splitting qm takes, few enough to fill a GPU."""
_META_BYTES = 32  # of a row: scale, -qm.km, first and last tile, head, place of tile 0


def rows_of(head_dim: int) -> int:
    """Rows of a CTA: all channels of their parts lie in shared memory."""
    return 64 if head_dim <= 128 else 32


def _slab_of(head_dim: int) -> int:
    """Channels of a slab of k."""
    return 64 if head_dim % 64 == 0 else 48


def _parts_of(dtype: str) -> int:
    return 3 if dtype == "bfloat16" else 2


def shared_bytes(dtype: str, head_dim: int) -> int:
    """Dynamic shared memory of a CTA: the parts of qm, two stages of k, the numbers of each row."""
    rows = rows_of(head_dim)
    q_bytes, k_bytes = rows * row_pitch(head_dim), 2 * TILE_N * row_pitch(_slab_of(head_dim))
    return _parts_of(dtype) * q_bytes + 2 * k_bytes + _META_BYTES * rows


def work_list(blocks: np.ndarray, group: int, rows: int) -> np.ndarray:
    """int32 (CTAs of a kv head, 3): first row, first key tile and the one after the last, ``TILES_A_CTA`` at most.

    Args:
        blocks: ``tiles.mean_blocks``. group: query heads of a kv head. rows: of a CTA, ``rows_of(head_dim)``.
    """
    begin, end = blocks[:, MeanBlock._fields.index("begin")], blocks[:, MeanBlock._fields.index("end")]
    work = []
    for first_row in range(0, len(blocks) * group, rows):
        own = slice(first_row // group, -(-(first_row + rows) // group))
        some = begin[own] < end[own]
        if some.any():
            stop = int(end[own][some].max())
            first = np.arange(int(begin[own][some].min()), stop, TILES_A_CTA)
            work.append(np.stack([np.full_like(first, first_row), first, np.minimum(first + TILES_A_CTA, stop)], axis=1))
    return np.concatenate(work).astype(np.int32) if work else np.zeros((0, 3), np.int32)


def make_delta(dtype: str, head_dim: int):
    """Kernel ``delta(delta, q_mean, k, k_mean, key_tiles, mean_blocks, work, has_mean, k_b, k_h, k_t, n_means, group,
    n_work, delta_tiles, num_heads_kv, n_sequences)``: delta f32 (heads_q, 64 delta_tiles); k: bytes, float32: words."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels.prepass_load import make_widen_pair
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi, fma, float_of, bits_of = dev.ffi, dev.fma_rn_f32, dev.mov_f32_b32, dev.mov_b32_f32
    load_v4, load_shared = dev.ld_global_nc_v4_u32, dev.ld_shared_v4_u32
    store_v4, store_shared_v2, store_shared_v4 = dev.st_global_v4_u32, dev.st_shared_v2_u32, dev.st_shared_v4_u32
    abs_f32, max_f32, bfly = dev.abs_f32, dev.max_f32, dev.shfl_sync_bfly_f32
    cp_async_16, commit, wait_0 = dev.cp_async_cg_16, dev.cp_async_commit_group, dev.cp_async_wait_group_0
    ldmatrix_x4, to_shared, widen_pair = dev.ldmatrix_x4, dev.cvta_to_shared_u32, make_widen_pair(dtype)
    bf16 = dtype == "bfloat16"
    pack = dev.cvt_rn_bf16x2_f32 if bf16 else dev.cvt_rn_f16x2_f32
    pack_f16, keep_branch = dev.cvt_rn_f16x2_f32, dev.keep_branch
    mma = dev.mma_m16n8k16_bf16 if bf16 else dev.mma_m16n8k16_f16

    rows, slab, parts = rows_of(head_dim), _slab_of(head_dim), _parts_of(dtype)
    m_tiles, slabs, chunks = rows // 32, head_dim // slab, slab // 8
    fragments_a, pair_tiles, acc_tiles = parts * m_tiles, 2 * m_tiles, TILE_N // 8 * m_tiles
    q_pitch, k_pitch = row_pitch(head_dim), row_pitch(slab)
    part_bytes, tile_bytes = rows * q_pitch, TILE_N * k_pitch
    at_k, block_fields = parts * part_bytes, len(MeanBlock._fields)
    at_meta = at_k + 4 * tile_bytes
    passes = TILE_N * chunks // THREADS
    tile_words = 8 * passes
    lane_words = head_dim // 8  # of a row of qm, of which eight lanes have a share
    # f16: the largest value of a row goes to [2^14, 2^15). A mean of 128 values of f16 is 2^-31 at least, or zero
    scaled, lowest, highest = not bf16, 127 - 31, 127 + 15

    @cuda.jit(device=True, forceinline=True)
    def place_of(chunk):
        """Row of the tile, 16 bytes of that row, and where they go: token 4 a + 2 e + b of each 16 becomes row
        8 e + 2 a + b, column 2 a + b of n tile e."""
        row, column = chunk // u32(chunks), chunk % u32(chunks)
        to = (row & u32(48)) | ((row & u32(2)) << u32(2)) | ((row & u32(12)) >> u32(1)) | (row & u32(1))
        return row, column, to * u32(k_pitch) + column * u32(16)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def copy_tile(smem, k, first, k_t, count, thread):
        """64 rows of a slab, from element ``first`` on; rows from ``count`` on are zeros."""
        for i in unroll(passes):
            row, column, to = place_of(thread + u32(THREADS * i))
            there = i32(row) < count
            element = first + i64(row) * k_t + i64(column) * i64(8) if there else first
            cp_async_16(smem + to, k, element * i64(2), u32(16) if there else u32(0))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def round_tile(smem, k, first, k_t, count, thread):
        """The same of float32. One tile's loads are under way at a time: two tiles' would not fit in registers."""
        words = cuda.local.array(tile_words, u32)
        halves = cuda.local.array(4, u32)
        for w in unroll(tile_words):
            words[w] = u32(0)
        if count > i32(0):
            keep_branch()
            for i in unroll(passes):
                row, column, to = place_of(thread + u32(THREADS * i))
                if i32(row) < count:
                    for w in unroll(0, 8, 4):
                        element = first + i64(row) * k_t + i64(column) * i64(8) + i64(w)
                        load_v4(ffi.from_buffer(words[8 * i + w :]), k, element)
        for i in unroll(passes):
            row, column, to = place_of(thread + u32(THREADS * i))
            for w in unroll(4):
                halves[w] = pack_f16(float_of(words[8 * i + 2 * w + 1]), float_of(words[8 * i + 2 * w]))
            store_shared_v4(smem + to, halves[0], halves[1], halves[2], halves[3])

    load_tile = round_tile if dtype == "float32" else copy_tile

    @cuda.jit(device=True, forceinline=True)
    def load_slab(smem, k, head_first, key_tiles, tile, stop, channel, k_t, thread):
        """A slab of key tiles ``tile`` and ``tile + 1``, zeros from ``stop`` on."""
        first = head_first + i64(channel)
        load_tile(smem, k, first + i64(key_tiles[4 * tile]) * k_t, k_t, key_tiles[4 * tile + 1], thread)
        source, count = i32(0), i32(0)
        if tile + i32(1) < stop:
            source, count = key_tiles[4 * tile + 4], key_tiles[4 * tile + 5]
        load_tile(smem + u32(tile_bytes), k, first + i64(source) * k_t, k_t, count, thread)
        commit()

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_parts(smem, values):
        """A lane's share of a row of qm as parts of 16 bits; leaves what is left of it."""
        for j in unroll(0, lane_words, 4):
            for p in unroll(parts):
                low, high = pack(values[j + 1], values[j]), pack(values[j + 3], values[j + 2])
                store_shared_v2(smem + u32(part_bytes * p + 16 * j), low, high)
                for w in unroll(2):
                    even, odd = widen_pair(low if w == 0 else high)
                    values[j + 2 * w] = values[j + 2 * w] - even
                    values[j + 2 * w + 1] = values[j + 2 * w + 1] - odd

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_rows(smem, q_mean, k_mean, mean_blocks, has_mean, first_row, head, group, n_means, n_sequences, thread):
        """The parts of qm and the numbers of each row, eight lanes a row."""
        lane_chunk = thread & u32(7)
        values = cuda.local.array(lane_words, f32)
        products = cuda.local.array(4, f32)
        words = cuda.local.array(4, u32)
        means = cuda.local.array(4, u32)
        for step in range(rows // 16):
            row = i32(thread >> u32(3)) + i32(step) * i32(16)
            block, head_q = i32(0), i32(0)
            begin, end, place = i32(0), i32(0), i32(0)
            for c in unroll(lane_words):
                values[c] = f32(0)
            for c in unroll(4):
                products[c] = f32(0)
            if first_row + row < n_means * group:
                block, head_q = (first_row + row) // group, head * group + (first_row + row) % group
                field = i32(block_fields) * block
                sequence, place = mean_blocks[field + 2], mean_blocks[field + 3]
                begin, end = mean_blocks[field + 4], mean_blocks[field + 5]
                q_at = (i64(head_q) * i64(n_means) + i64(block)) * i64(head_dim) + i64(u32(4) * lane_chunk)
                km_at = (i64(head) * i64(n_sequences) + i64(sequence)) * i64(head_dim) + i64(u32(4) * lane_chunk)
                for j in unroll(0, lane_words, 4):
                    load_v4(ffi.from_buffer(words), q_mean, q_at + i64(8 * j))
                    for c in unroll(4):
                        values[j + c] = float_of(words[c])
                    if has_mean != i32(0):
                        load_v4(ffi.from_buffer(means), k_mean, km_at + i64(8 * j))
                        for c in unroll(4):
                            products[c] = fma(values[j + c], float_of(means[c]), products[c])
            product = (products[0] + products[1]) + (products[2] + products[3])
            largest = f32(0)
            for c in unroll(lane_words):
                largest = max_f32(largest, abs_f32(values[c]))
            for i in unroll(3):
                product = product + bfly(product, u32(1 << i))
                largest = max_f32(largest, bfly(largest, u32(1 << i)))
            back = f32(1)
            if scaled:
                exponent = min(max(i32(bits_of(largest) >> u32(23)), i32(lowest)), i32(highest))
                scale = float_of(u32(i32(127 + 14 + 127) - exponent) << u32(23))
                back = float_of(u32(exponent - i32(14)) << u32(23))
                for c in unroll(lane_words):
                    values[c] = values[c] * scale
            store_parts(smem + u32(row) * u32(q_pitch) + lane_chunk * u32(8), values)
            if lane_chunk == u32(0):
                numbers = smem + u32(at_meta) + u32(_META_BYTES) * u32(row)
                store_shared_v4(numbers, bits_of(back), bits_of(-product), u32(begin), u32(end))
                store_shared_v4(numbers + u32(16), u32(head_q), u32(place), u32(0), u32(0))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def multiply(acc, q_at, k_at):
        """Adds the products of a slab: ``q_at``, ``k_at`` are the lane's addresses for ``ldmatrix``."""
        a = cuda.local.array((fragments_a, 4), u32)
        b = cuda.local.array(4, u32)
        step_sum = cuda.local.array((pair_tiles, 4), f32)
        for step in range(slab // 16):
            for i in unroll(fragments_a):
                offset = u32(part_bytes * (i // m_tiles) + 16 * q_pitch * (i % m_tiles))
                ldmatrix_x4(ffi.from_buffer(a[i]), q_at + u32(32) * u32(step) + offset)
            for pair in unroll(TILE_N // 16):
                ldmatrix_x4(ffi.from_buffer(b), k_at + u32(32) * u32(step) + u32(16 * k_pitch * pair))
                for i in unroll(pair_tiles):
                    for r in unroll(4):
                        step_sum[i, r] = f32(0)
                for p in unroll(parts - 1, -1, -1):
                    for i in unroll(pair_tiles):
                        c = ffi.from_buffer(step_sum[i])
                        mma(c, ffi.from_buffer(a[m_tiles * p + i // 2]), ffi.from_buffer(b[2 * (i % 2) :]), c)
                for i in unroll(pair_tiles):
                    for r in unroll(4):
                        t = 8 * (i // 2) + 2 * pair + i % 2
                        acc[t, r] = acc[t, r] + step_sum[i, r]

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store(delta, acc, numbers, tile, count, delta_tiles, thread_in_group):
        """Writes the warp's tile to the rows that read it; ``numbers``: of the lane's first row. Padding becomes zero."""
        first = cuda.local.array(4, u32)
        second = cuda.local.array(4, u32)
        words = cuda.local.array(4, u32)
        own = i32(4) * i32(thread_in_group)
        for i in unroll(pair_tiles):
            load_shared(ffi.from_buffer(first), numbers + u32(8 * _META_BYTES * i))
            if i32(first[2]) <= tile and tile < i32(first[3]):
                load_shared(ffi.from_buffer(second), numbers + u32(8 * _META_BYTES * i + 16))
                place = i64(i32(second[0])) * i64(delta_tiles) + i64(i32(second[1])) + i64(tile)
                at = place * i64(TILE_N) + i64(own)
                for n in unroll(TILE_N // 16):
                    for c in unroll(4):
                        base = float_of(first[1]) if own + i32(16 * n + c) < count else f32(0)
                        value = acc[8 * (i // 2) + 2 * n + c // 2, 2 * (i % 2) + c % 2]
                        words[c] = bits_of(fma(value, float_of(first[0]), base))
                    store_v4(delta, at + i64(16 * n), words[0], words[1], words[2], words[3])

    @unrolled
    def delta_kernel(
        delta, q_mean, k, k_mean, key_tiles, mean_blocks, work, has_mean, k_b, k_h, k_t, n_means, group, n_work,
        delta_tiles, num_heads_kv, n_sequences,
    ):  # fmt: skip
        smem = to_shared(ffi.from_buffer(cuda.shared.array(0, u32)))
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        lane, warp = thread & u32(31), thread >> u32(5)
        head, item = i32(cta // n_work), i32(cta % n_work)
        first_row, begin, stop = work[3 * item], work[3 * item + 1], work[3 * item + 2]
        head_first = i64(head // num_heads_kv) * k_b + i64(head % num_heads_kv) * k_h
        load_slab(smem + u32(at_k), k, head_first, key_tiles, begin, stop, i32(0), k_t, thread)
        load_rows(smem, q_mean, k_mean, mean_blocks, has_mean, first_row, head, group, n_means, n_sequences, thread)

        # the warp's key tile of two, and its half of the rows, which neighbouring CTAs swap: past a causal edge half of the
        # warps have nothing to do, and a warp keeps to its quarter of the SM
        side, half = warp & u32(1), (warp >> u32(1)) ^ u32(item & i32(1))
        own_row = u32(16 * m_tiles) * half
        first_own = first_row + i32(own_row)
        last_own = min(first_own + i32(16 * m_tiles), n_means * group) - i32(1)
        low, high = i32(0), i32(0)
        if first_own <= last_own:
            low = mean_blocks[i32(block_fields) * (first_own // group) + 4]
            high = mean_blocks[i32(block_fields) * (last_own // group) + 5]
        q_at = smem + (own_row + (lane & u32(15))) * u32(q_pitch) + (lane >> u32(4)) * u32(16)
        k_row = (lane & u32(7)) + ((lane >> u32(4)) << u32(3))
        k_at = smem + u32(at_k) + side * u32(tile_bytes) + k_row * u32(k_pitch) + ((lane >> u32(3)) & u32(1)) * u32(16)
        numbers = smem + u32(at_meta) + u32(_META_BYTES) * (own_row + (lane >> u32(2)))
        acc = cuda.local.array((acc_tiles, 4), f32)
        stage = u32(0)
        for tile in range(begin, stop, 2):
            own_tile = i32(tile) + i32(side)
            needed = own_tile < stop and own_tile >= low and own_tile < high
            for t in unroll(acc_tiles):
                for r in unroll(4):
                    acc[t, r] = f32(0)
            for s in range(slabs):
                wait_0()
                cuda.syncthreads()  # this slab is there (and qm), and nobody reads the one before
                other = u32(2 * tile_bytes) - stage
                next_tile, next_slab = i32(tile), i32(s) + i32(1)
                if next_slab == i32(slabs):
                    next_tile, next_slab = i32(tile) + i32(2), i32(0)
                if next_tile < stop:
                    channel = next_slab * i32(slab)
                    load_slab(smem + u32(at_k) + other, k, head_first, key_tiles, next_tile, stop, channel, k_t, thread)
                if needed:
                    multiply(acc, q_at + u32(s) * u32(2 * slab), k_at + stage)
                stage = other
            if needed:
                store(delta, acc, numbers, own_tile, key_tiles[4 * own_tile + 1], delta_tiles, lane & u32(3))

    return delta_kernel


@functools.cache
def delta_kernel(dtype: str, head_dim: int) -> Kernel:
    """The kernel for these constants."""
    k = "u32*" if dtype == "float32" else "u8*"
    signature = ("u32*", "u32*", k, "u32*", *("i32*",) * 3, "i32", *("i64",) * 3, *("i32",) * 6)
    # 168 registers, for three CTAs an SM, where so many find room in 228 KiB of shared memory; float32 needs more registers
    ctas = 2 if dtype == "float32" or shared_bytes(dtype, head_dim) > 75 * 1024 else 3
    return Kernel(make_delta, signature, {"dtype": dtype, "head_dim": head_dim}, launch_bounds=(THREADS, ctas))
