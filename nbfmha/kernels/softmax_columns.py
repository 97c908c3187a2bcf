"""The online softmax of decode: scores S^T of a warp, whose rows are tokens and whose columns are queries, eight of them a
query tile, in the log2 domain (Milakov and Gimelshein, 2018).

An m tile has 16 tokens: register r of a lane is row ``group_id + 8 (r >> 1)``, column ``2 q + (r & 1)`` (PTX ISA, C
fragment of ``m16n8``). A lane has all its scores of two queries, those whose columns of O^T it has as well
(:mod:`out_columns`); the other lanes of these queries are those of the same ``q``.
"""

from __future__ import annotations

TOKENS = {
    "widened": (
        lambda m, half: 8 * (m >> 1) + 2 * (m & 1) + half,
        lambda group_id: 16 * (group_id >> 1) + 4 * (group_id & 1),
    ),
    "rows": (lambda m, half: 16 * m + 8 * half, lambda group_id: group_id),
}
"""Which token of the tile a lane has in half ``half`` of m tile m: a constant of (m, half), plus one of ``group_id``.

"widened": as ``paged_products`` takes K's rows. "rows": tokens in their own order.
"""


def make_mask_columns(tokens: str, m_tiles: int):
    """Device function ``(acc_s: f32[m_tiles, 4], low: i32[2], high: i32[2], first_n, lane)``: scores of the tile from token
    ``first_n`` on become -inf but for the tokens [low, high) of each of the lane's two queries."""
    import numpy as np
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32 = types.float32, types.uint32, types.int32
    keep_branch = dev.keep_branch
    place = tuple(tuple(TOKENS[tokens][0](m, half) for half in range(2)) for m in range(m_tiles))
    own_token = cuda.jit(device=True, forceinline=True)(TOKENS[tokens][1])

    # a function of its own: Numba's time to compile one grows with the square of its statements
    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def mask_column(acc_s, e, low, high):
        width = u32(max(i32(high - low), i32(0)))
        for m in unroll(m_tiles):
            for half in unroll(2):
                if u32(i32(i32(place[m][half]) - low)) >= width:  # below low, too: it wraps around
                    acc_s[m, u32(2 * half) + e] = f32(-np.inf)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def mask_columns(acc_s, low, high, first_n, lane):
        keep_branch()
        own = i32(first_n + i32(own_token(lane >> i32(2))))
        for e in unroll(2):
            mask_column(acc_s, u32(e), i32(low[e] - own), i32(high[e] - own))

    return mask_columns


def make_general_columns(m_tiles: int):
    """Device function ``(acc_s: f32[m_tiles, 4], shifted: f32[2], softmax_scale, cap)``: scores in log2 units, for what
    ``make_weights_columns`` cannot do with one positive factor: cap * tanh(softmax_scale * (x + shifted) / cap), and any
    scale where cap is 0. ``shifted``: of the lane's two queries."""
    from numba import cuda

    from nbfmha.kernels.softmax import make_general_score
    from ptx_inline.unroll import unroll, unrolled

    general_score = make_general_score()

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def general_columns(acc_s, shifted, softmax_scale, cap):
        for m in unroll(m_tiles):
            for r in unroll(4):
                acc_s[m, r] = general_score(acc_s[m, r], shifted[r % 2], softmax_scale, cap)

    return general_columns


def make_weights_columns(m_tiles: int):
    """Device function ``(acc_s: f32[m_tiles, 4], row_max: f32[2], row_sum: f32[2], factor: f32[2], scale)``: scores to P,
    and 2^(old row_max - new) to ``factor``, of the lane's two queries; what was summed up before is yet to be multiplied
    with it.

    acc_s  scores; afterwards P = 2^(scale * score - row_max)
    row_max first LOWEST; of a whole column. row_sum: of this lane's rows
    scale  > 0: softmax_scale * log2(e)
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32 = types.float32, types.uint32
    max_f32, fma, ex2, bfly = dev.max_f32, dev.fma_rn_f32, dev.ex2_approx_ftz_f32, dev.shfl_sync_bfly_f32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def weights_column(acc_s, e, row_max, row_sum, factor, scale):
        largest = max_f32(acc_s[0, e], acc_s[0, e + u32(2)])
        for m in unroll(1, m_tiles):
            for half in unroll(2):
                largest = max_f32(largest, acc_s[m, e + u32(2 * half)])
        for i in unroll(3):
            largest = max_f32(largest, bfly(largest, u32(4 << i)))
        largest = max_f32(row_max[e], largest * scale)
        factor[e] = ex2(row_max[e] - largest)
        row_max[e] = largest
        total = f32(0)
        for m in unroll(m_tiles):
            for half in unroll(2):
                weight = ex2(fma(acc_s[m, e + u32(2 * half)], scale, -largest))
                acc_s[m, e + u32(2 * half)] = weight
                total += weight
        row_sum[e] = fma(row_sum[e], factor[e], total)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def weights_columns(acc_s, row_max, row_sum, factor, scale):
        for e in unroll(2):
            weights_column(acc_s, u32(e), row_max, row_sum, factor, scale)

    return weights_columns
