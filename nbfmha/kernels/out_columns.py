"""O^T = V^T P^T of a warp: accumulators whose rows are channels and whose columns are queries, eight of them a query tile.

Few queries waste less of an MMA in its 8 columns than in its 16 rows, and the accumulators take half the registers. Scores
are S^T = K Q^T, with the same columns: what a lane knows of its two queries (:mod:`softmax_columns`) is what its
accumulators are rescaled with. P^T is the B operand, whose lanes have tokens of one query: one ``movmatrix`` for each 8 x 8
of it.
"""

from __future__ import annotations


def make_pack_columns(dtype: str, q_tiles: int, m_tiles: int):
    """Device function ``(p: u32[q_tiles, m_tiles, 2], acc_s: f32[q_tiles, >= m_tiles, 4])``: P rounded to ``dtype``, as the
    B fragments of P^T: of each m tile of 16 tokens one k step."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, transpose = types.uint32, dev.movmatrix_trans_b16
    pack = dev.cvt_rn_bf16x2_f32 if dtype == "bfloat16" else dev.cvt_rn_f16x2_f32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pack_tile(p, acc_s):
        for m in unroll(m_tiles):
            for half in unroll(2):
                p[m, half] = transpose(pack(acc_s[m, u32(2 * half + 1)], acc_s[m, u32(2 * half)]))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pack_columns(p, acc_s):
        for i in unroll(q_tiles):
            pack_tile(p[i], acc_s[i])

    return pack_columns


def make_rescale_columns(head_dim: int, q_tiles: int):
    """Device function ``(acc_o: f32[head_dim / 16, q_tiles, 4], i, factor: f32[2])``: query tile ``i`` times the factors of
    the lane's two queries, as ``softmax_columns.make_weights_columns`` leaves them. A maximum grows in few tiles, so that
    most of the time a vote is all there is to do."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, vote_any, c_tiles = types.float32, types.uint32, dev.vote_sync_any, head_dim // 16

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def rescale_tile(acc, factor):
        for r in unroll(4):
            acc[r] = acc[r] * factor[r % 2]

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def rescale(acc_o, i, factor):
        if vote_any(u32(1) if factor[0] != f32(1) or factor[1] != f32(1) else u32(0)) != u32(0):
            for c in unroll(c_tiles):
                rescale_tile(acc_o[c, i], factor)

    return rescale


def result_pitch(head_dim: int) -> int:
    """Bytes from one query of a warp's f32 result to the next in shared memory: what the lanes store at once lies in
    different banks."""
    return 4 * head_dim + 16


def make_store_result(head_dim: int, q_tiles: int):
    """Device function ``(smem, stats, acc_o, row_max: f32[q_tiles, 2], row_sum, lane)``: a warp's accumulators to rows of
    f32, one a query, and (maximum, sum) of each; the sums are still those of single lanes."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    store, store_v2, bits_of, bfly = dev.st_shared_u32, dev.st_shared_v2_u32, dev.mov_b32_f32, dev.shfl_sync_bfly_f32
    pitch, c_tiles = result_pitch(head_dim), head_dim // 16

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_tile(at, acc):
        for r in unroll(4):
            store(at + u32(pitch * (r % 2) + 32 * (r // 2)), bits_of(acc[r]))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_stats(stats, row_max, row_sum, group_id):
        for e in unroll(2):
            total = row_sum[e]
            for i in unroll(3):
                total = total + bfly(total, u32(4 << i))
            if group_id == u32(0):
                store_v2(stats + u32(8 * e), bits_of(row_max[e]), bits_of(total))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_result(smem, stats, acc_o, row_max, row_sum, lane):
        group_id, q = u32(lane >> 2), u32(lane & 3)
        for i in unroll(q_tiles):
            query = u32(8 * i) + u32(2) * q
            store_stats(stats + u32(8) * query, row_max[i], row_sum[i], group_id)
            at = smem + query * u32(pitch) + u32(4) * group_id
            for c in unroll(c_tiles):
                store_tile(at + u32(64 * c), acc_o[c, i])

    return store_result
