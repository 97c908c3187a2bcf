"""The online softmax of a warp's 16 queries over a tile of 64 keys, in the log2 domain (Milakov and Gimelshein, 2018).

A lane holds rows ``group_id`` (side 0) and ``group_id + 8`` (side 1) of eight n tiles; a quad's four lanes share a row.
"""

from __future__ import annotations

from nbfmha.recipe import TILE_N

N_TILES = TILE_N // 8
LOWEST = -1e30
"""The row maximum before any key, in place of -inf: something is subtracted from it."""

TOKENS = {
    "rows": (lambda t, e: 8 * t + e, 2),
    "stored": (lambda t, e: 32 * (t >> 2) + 2 * (t & 3) + e, 8),
}
"""Which token of the tile a lane has in n tile t, column e of its two: (constant(t, e), times thread_in_group).

"rows": keys in their own order. "stored": ``operands.stored_order``.
"""


def make_quad_max():
    """Device function ``(x) -> f32``: the maximum of a quad's four lanes; a NaN is passed over."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, max_f32, bfly = types.uint32, dev.max_f32, dev.shfl_sync_bfly_f32

    @cuda.jit(device=True, forceinline=True)
    def quad_max(x):
        x = max_f32(x, bfly(x, u32(1)))
        return max_f32(x, bfly(x, u32(2)))

    return quad_max


def places(tokens: str) -> tuple[tuple[int, ...], ...]:
    """The constants of an entry of ``TOKENS``: [n tile][column of the lane's two]."""
    constant, _ = TOKENS[tokens]
    return tuple(tuple(constant(t, e) for e in range(2)) for t in range(N_TILES))


def _make_mask_row(tokens: str):
    """Device function ``(acc_s: f32[8, 4], r, low, high)``: scores r, r + 1 of each n tile become -inf but for the
    tokens [low, high), counted from the lane's first."""
    import numpy as np
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32 = types.float32, types.uint32, types.int32
    place = places(tokens)

    # a function of its own: Numba's time to compile one grows with the square of its statements
    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def mask_row(acc_s, r, low, high):
        width = u32(max(i32(high - low), i32(0)))
        for t in unroll(N_TILES):
            for e in unroll(2):
                if u32(i32(place[t][e]) - low) >= width:  # below low, too: it wraps around
                    acc_s[t, r + u32(e)] = f32(-np.inf)

    return mask_row


def make_mask(tokens: str):
    """Device function ``(acc_s: f32[8, 4], position, window_left, window_right, seqlen_k, first_n, thread_in_group)``:
    scores of the tile from key ``first_n`` on become -inf where a row does not see the key; ``position``: of side 0's row
    on the keys."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32 = types.uint32, types.int32
    keep_branch, unknown = dev.keep_branch, dev.unknown_u32
    lane_tokens, mask_row = TOKENS[tokens][1], _make_mask_row(tokens)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def mask(acc_s, position, window_left, window_right, seqlen_k, first_n, thread_in_group):
        keep_branch()
        # else low and high would be counted down in every round, for the few tiles that are masked
        own = i32(i32(unknown(u32(first_n))) + i32(lane_tokens) * thread_in_group)
        for side in unroll(2):
            row = i32(position + i32(8 * side))
            low = i32(row - window_left - own)
            high = i32(min(row + window_right + i32(1), seqlen_k) - own)
            mask_row(acc_s, u32(2 * side), low, high)

    return mask


def _make_rescale(o_tiles: int):
    """Device function ``(acc_o: f32[o_tiles, 4], factor: f32[2])``: a row's maximum grows in few tiles, so that most of the
    time a vote is all there is to do."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, vote_any = types.float32, types.uint32, dev.vote_sync_any

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def rescale(acc, factor):
        for r in unroll(4):
            acc[r] = acc[r] * factor[r // 2]

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def rescale_all(acc_o, factor):
        if vote_any(u32(1) if factor[0] != f32(1) or factor[1] != f32(1) else u32(0)) != u32(0):
            for t in unroll(o_tiles):
                rescale(acc_o[t], factor)

    return rescale_all


def make_step(o_tiles: int, bias: float):
    """Device function ``(acc_s, acc_o, row_max, row_sum, scale)``: scores to P, the rest rescaled.

    acc_s  f32[8, 4], scores; afterwards P = 2^(scale * score - row_max + bias)
    acc_o  f32[o_tiles, 4], rescaled by 2^(old row_max - new); row_max f32[2], first LOWEST; row_sum f32[2]: of this lane
    scale  > 0: softmax_scale * log2(e); ``bias``: log2 of what P is multiplied by
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32 = types.float32
    max_f32, fma, ex2 = dev.max_f32, dev.fma_rn_f32, dev.ex2_approx_ftz_f32
    quad_max, rescale_all = make_quad_max(), _make_rescale(o_tiles)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def step(acc_s, acc_o, row_max, row_sum, scale):
        factor = cuda.local.array(2, f32)
        for side in unroll(2):
            largest = max_f32(acc_s[0, 2 * side], acc_s[0, 2 * side + 1])
            for t in unroll(1, N_TILES):
                for e in unroll(2):
                    largest = max_f32(largest, acc_s[t, 2 * side + e])
            largest = max_f32(row_max[side], quad_max(largest) * scale)
            factor[side] = ex2(row_max[side] - largest)
            row_max[side] = largest
            shift = f32(bias) - largest
            total = f32(0)
            for t in unroll(N_TILES):
                for e in unroll(2):
                    weight = ex2(fma(acc_s[t, 2 * side + e], scale, shift))
                    acc_s[t, 2 * side + e] = weight
                    total += weight
            row_sum[side] = fma(row_sum[side], factor[side], total)
        rescale_all(acc_o, factor)

    return step


def make_step_nvfp4(o_tiles: int, tokens: str, bias: float):
    """Device functions ``begin(origin, row_max)``, once before a run of tiles, and ``step(acc_s, acc_o, row_max, origin,
    row_sum, scale, sfp)``: as ``make_step``, P quantised.

    acc_s becomes P / s, to be rounded to E2M1, with the UE4M3 scale s of its 16 tokens.

    origin: f32[2, 2], [side] of bias - row_max, and that minus log2(6): they change with a row maximum, in few tiles.
    sfp: u32[groups / 2] of scale bytes: byte groups * side + g, four a word. "stored": a lane has eight tokens of a group
    of each half of the tile, and lanes q, q ^ 1 share it. "rows": group g is n tiles 2 g, 2 g + 1 of the quad.

    P's group maximum is 2^(that of the scores), so one pass of maxima serves softmax and scales (as in SageAttention3,
    arXiv 2505.11594); the division by s is a subtraction in the exponent; the row sum is that of the groups times s. The
    scale is at least 2^-9, the smallest UE4M3: nothing divides by zero. A group whose scale is above 448 = 2^bias / 6
    says that a row maximum grew: a vote on that is all that most tiles pay for the online part of the softmax.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u16, u32 = types.float32, types.uint16, types.uint32
    max_f32, fma, ex2, lg2 = dev.max_f32, dev.fma_rn_f32, dev.ex2_approx_ftz_f32, dev.lg2_approx_ftz_f32
    bfly, vote_any, keep_branch = dev.shfl_sync_bfly_f32, dev.vote_sync_any, dev.keep_branch
    e4m3x4, f16x2_e4m3x2, widen_f16 = dev.cvt_rn_satfinite_e4m3x4_f32, dev.cvt_rn_f16x2_e4m3x2, dev.cvt_f32_f16
    n_tiles, log2_6 = N_TILES, 2.584962500721156
    quad_wide = tokens == "rows"
    groups = 4 if quad_wide else 2
    scales, tiles_a_group = 2 * groups, n_tiles // groups

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def begin(origin, row_max):
        for side in unroll(2):
            origin[side, 0] = f32(bias) - row_max[side]
            origin[side, 1] = origin[side, 0] - f32(log2_6)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def rescale_row(acc, r, factor):
        for e in unroll(2):
            acc[r + u32(e)] = acc[r + u32(e)] * factor

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def grow(acc_o, largest_of, row_max, origin, row_sum, scale):
        for side in unroll(2):
            largest = largest_of[side, 0]
            for g in unroll(1, groups):
                largest = max_f32(largest, largest_of[side, g])
            if not quad_wide:
                largest = max_f32(largest, bfly(largest, u32(2)))
            largest = max_f32(row_max[side], largest * scale)
            factor = ex2(row_max[side] - largest)
            row_max[side] = largest
            row_sum[side] = row_sum[side] * factor
            for t in unroll(o_tiles):
                rescale_row(acc_o[t], u32(2 * side), factor)
        begin(origin, row_max)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def step(acc_s, acc_o, row_max, origin, row_sum, scale, sfp):
        largest_of = cuda.local.array((2, groups), f32)
        log_of = cuda.local.array(scales, f32)  # log2 of the groups' scales, [groups * side + g]
        grew = False
        for side in unroll(2):
            for g in unroll(groups):
                m = max_f32(acc_s[tiles_a_group * g, 2 * side], acc_s[tiles_a_group * g, 2 * side + 1])
                for t in unroll(1, tiles_a_group):
                    for e in unroll(2):
                        m = max_f32(m, acc_s[tiles_a_group * g + t, 2 * side + e])
                m = max_f32(m, bfly(m, u32(1)))
                if quad_wide:
                    m = max_f32(m, bfly(m, u32(2)))
                largest_of[side, g] = m
                log_of[groups * side + g] = fma(m, scale, origin[side, 1])
                grew |= log_of[groups * side + g] > f32(bias - log2_6)
        if vote_any(u32(grew)) != u32(0):
            keep_branch()
            grow(acc_o, largest_of, row_max, origin, row_sum, scale)
            for side in unroll(2):
                for g in unroll(groups):
                    log_of[groups * side + g] = fma(largest_of[side, g], scale, origin[side, 1])
        for i in unroll(scales):
            log_of[i] = max_f32(log_of[i], f32(-9))
        for w in unroll(groups // 2):
            sfp[w] = e4m3x4(ex2(log_of[4 * w]), ex2(log_of[4 * w + 1]), ex2(log_of[4 * w + 2]), ex2(log_of[4 * w + 3]))
        for side in unroll(2):
            for pair in unroll(groups // 2):
                at = groups // 2 * side + pair  # of two bytes in sfp
                both = f16x2_e4m3x2((sfp[at // 2] >> u32(16 * (at % 2))) & u32(0xFFFF))
                for i in unroll(2):
                    s = widen_f16(u16((both >> u32(16 * i)) & u32(0xFFFF)))
                    own = origin[side, 0] - lg2(s)
                    part = f32(0)
                    for t in unroll(tiles_a_group):
                        for e in unroll(2):
                            n = tiles_a_group * (2 * pair + i) + t
                            weight = ex2(fma(acc_s[n, 2 * side + e], scale, own))
                            acc_s[n, 2 * side + e] = weight
                            part = weight if t + e == 0 else part + weight
                    row_sum[side] = fma(part, s, row_sum[side])

    return begin, step


def make_general_score():
    """Device function ``(x, shifted, softmax_scale, cap) -> f32``: a score in log2 units, with whatever is no positive
    factor: cap * tanh(softmax_scale * (x + shifted) / cap), and any scale where cap is 0."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, ex2, log2e = types.float32, dev.ex2_approx_ftz_f32, 1.4426950408889634

    @cuda.jit(device=True, forceinline=True)
    def general_score(x, shifted, softmax_scale, cap):
        if cap > f32(0):
            x = (x + shifted) * softmax_scale / cap
            x = cap * (f32(1) - f32(2) / (f32(1) + ex2(x * f32(2 * log2e))))
        else:
            x = x * softmax_scale
        return x * f32(log2e)

    return general_score


def make_general_scores():
    """Device function ``(acc_s: f32[8, 4], shifted: f32[2], softmax_scale, cap)``: ``make_general_score`` of all scores,
    for what ``make_step`` cannot do with one positive factor. ``shifted``: of the lane's two rows."""
    from numba import cuda

    from ptx_inline.unroll import unroll, unrolled

    general_score = make_general_score()

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def general_scores(acc_s, shifted, softmax_scale, cap):
        for t in unroll(N_TILES):
            for r in unroll(4):
                acc_s[t, r] = general_score(acc_s[t, r], shifted[r // 2], softmax_scale, cap)

    return general_scores
