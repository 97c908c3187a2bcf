"""O^T = V^T P^T of a warp: accumulators whose rows are channels and whose columns are queries, eight of them a tile.

Few queries waste less of an MMA in its 8 columns than in its 16 rows, and the accumulators take half the registers. Scores
stay S = Q K^T: what a lane holds of two n tiles of a row is the B fragment of one k step, with no shuffle. A lane then
knows the row maximum of query ``group_id`` and has columns 2 q and 2 q + 1, of which a rescaling asks two other quads.

Query tile i is side i % 2 of m tile i // 2; one query tile alone is the first half of an m tile.
"""

from __future__ import annotations


def sides_of(q_tiles: int) -> int:
    """Rows of a lane's scores in each m tile that are queries."""
    return min(q_tiles, 2)


def m_tiles_of(q_tiles: int) -> int:
    """m tiles of Q K^T."""
    return (q_tiles + 1) // 2


def make_pack_columns(dtype: str, q_tiles: int, n_tiles: int):
    """Device function ``(p: u32[q_tiles, n_tiles / 2, 2], acc_s: f32[m_tiles, n_tiles, 4])``: P rounded to ``dtype``, as
    the B fragments of P^T."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    pack = dev.cvt_rn_bf16x2_f32 if dtype == "bfloat16" else dev.cvt_rn_f16x2_f32
    sides = sides_of(q_tiles)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pack_tile(p, acc_s, side):
        for t in unroll(n_tiles):
            p[t // 2, t % 2] = pack(acc_s[t, u32(2) * side + u32(1)], acc_s[t, u32(2) * side])

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pack_columns(p, acc_s):
        for i in unroll(q_tiles):
            pack_tile(p[i], acc_s[i // sides], u32(i % sides))

    return pack_columns


def make_rescale_columns(head_dim: int, q_tiles: int):
    """Device function ``(acc_o: f32[head_dim / 16, q_tiles, 4], m, factor: f32[2], lane)``: columns of m tile ``m`` times
    the factors of their queries, as ``softmax.make_weights`` leaves them. A row's maximum grows in few tiles, so that most
    of the time a vote is all there is to do."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32 = types.float32, types.uint32
    vote_any, shuffle, bits_of, float_of = dev.vote_sync_any, dev.shfl_sync_idx_b32, dev.mov_b32_f32, dev.mov_f32_b32
    sides, c_tiles = sides_of(q_tiles), head_dim // 16

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def rescale_tile(acc, even, odd):
        for half in unroll(2):
            acc[2 * half] = acc[2 * half] * even
            acc[2 * half + 1] = acc[2 * half + 1] * odd

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def rescale(acc_o, m, factor, lane):
        changed = factor[0] != f32(1)
        if sides == 2:
            changed = changed or factor[1] != f32(1)
        if vote_any(u32(changed)) != u32(0):
            source = u32(8) * u32(lane & 3)  # the first lane of quad 2 q
            for side in unroll(sides):
                bits = bits_of(factor[side])
                even, odd = float_of(shuffle(bits, source)), float_of(shuffle(bits, source + u32(4)))
                for c in unroll(c_tiles):
                    rescale_tile(acc_o[c, u32(sides) * m + u32(side)], even, odd)

    return rescale


def result_pitch(head_dim: int) -> int:
    """Bytes from one query of a warp's f32 result to the next in shared memory: what the lanes store at once lies in
    different banks."""
    return 4 * head_dim + 16


def make_store_result(head_dim: int, q_tiles: int):
    """Device function ``(smem, stats, acc_o, row_max: f32[m_tiles, 2], row_sum, lane)``: a warp's accumulators to rows of
    f32, one a query, and (maximum, sum) of each; the sums are still those of single lanes."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    store, store_v2, bits_of, bfly = dev.st_shared_u32, dev.st_shared_v2_u32, dev.mov_b32_f32, dev.shfl_sync_bfly_f32
    pitch, c_tiles, sides = result_pitch(head_dim), head_dim // 16, sides_of(q_tiles)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_tile(at, acc):
        for r in unroll(4):
            store(at + u32(pitch * (r % 2) + 32 * (r // 2)), bits_of(acc[r]))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_result(smem, stats, acc_o, row_max, row_sum, lane):
        group_id, q = u32(lane >> 2), u32(lane & 3)
        for i in unroll(q_tiles):
            total = row_sum[i // sides, i % sides]
            total = total + bfly(total, u32(1))
            total = total + bfly(total, u32(2))
            if q == u32(0):
                store_v2(stats + u32(8) * (u32(8 * i) + group_id), bits_of(row_max[i // sides, i % sides]), bits_of(total))
            at = smem + (u32(8 * i) + u32(2) * q) * u32(pitch) + u32(4) * group_id
            for c in unroll(c_tiles):
                store_tile(at + u32(64 * c), acc_o[c, i])

    return store_result
