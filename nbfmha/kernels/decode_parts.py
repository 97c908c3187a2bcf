"""Parts of the decode kernel: tiles of the 16-bit windows, one warp's, and the merge of the warps of a CTA.

Tokens in 16 bits are rows in memory: the sinks one after the other, the ring with one place where it begins again.
"""

from __future__ import annotations

from nbfmha.kernels.out_columns import m_tiles_of, result_pitch, sides_of

LOG2E = 1.4426950408889634
SIXTEEN_TILE = 32
"""Tokens of a tile in 16 bits: its rows of K, and then of V, lie where an NVFP4 tile of twice as many tokens does."""


def sixteen_pitch(head_dim: int) -> int:
    """Bytes from one row of K or V in 16 bits to the next in shared memory: sectors of 32 bytes stay whole, and no more
    than two of eight rows share banks."""
    return 2 * head_dim + 32


def make_run_sixteen(make, head_dim: int, dtype: str, q_tiles: int, general: bool):
    """Device function ``(acc_o, row_max, row_sum, acc_s, p, q_smem, smem, k: u8*, v: u8*, base, ring, place, first_n,
    count, low, high, shifted, scale, softmax_scale, cap, lane)``: ``count`` (up to 32) tokens from token ``first_n`` on.

    make: as in :mod:`run_rows`. acc_s: f32[m_tiles, 4, 4]. p: u32[q_tiles, 2, 2]. base: i64, element of k and v where the
    sequence's and head's rows begin; the first token stands in row ``place`` of ``ring``. smem: of the warp, room for 32
    rows; K has it first, then V. low, high: i32[m_tiles, 2], the tokens that each row sees. shifted: f32[m_tiles, 2],
    q . km.
    """
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import out_columns, softmax, tile_16bit
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    cp_async_16, commit, wait_0, unknown = (
        dev.cp_async_cg_16, dev.cp_async_commit_group, dev.cp_async_wait_group_0, dev.unknown_u32
    )  # fmt: skip
    m_tiles, sides, n_tiles = m_tiles_of(q_tiles), sides_of(q_tiles), SIXTEEN_TILE // 8
    pitch = sixteen_pitch(head_dim)
    qk = make(tile_16bit.make_qk, head_dim, dtype, m_tiles, SIXTEEN_TILE, 8 * sides, pitch)
    pv = make(out_columns.make_pv_rows, head_dim, dtype, q_tiles, SIXTEEN_TILE, pitch)
    pack, mask = (
        make(out_columns.make_pack_columns, dtype, q_tiles, n_tiles),
        make(softmax.make_mask_ranges, "rows", sides, n_tiles),
    )
    general_scores, weights = (
        make(softmax.make_general_scores, sides, n_tiles), make(softmax.make_weights, sides, n_tiles, 0.0)
    )  # fmt: skip
    rescale = make(out_columns.make_rescale_columns, head_dim, q_tiles)
    chunks = head_dim // 8

    @cuda.jit(device=True, forceinline=True)
    def load_rows(smem, source, base, ring, place, count, lane):
        row, chunk = i32(u32(lane) // u32(chunks)), u32(lane) % u32(chunks)
        # a loop that stays one: written out, its addresses would be kept in registers that the tiles in NVFP4 need
        step = i32(unknown(u32(32 // chunks)))
        while row < i32(SIXTEEN_TILE):
            at = i32(place + row)
            if at >= ring:
                at = i32(at - ring)
            there = row < count
            offset = base * i64(2) + (i64(at) * i64(2 * head_dim) + i64(u32(16) * chunk) if there else i64(0))
            cp_async_16(smem + u32(row) * u32(pitch) + u32(16) * chunk, source, offset, u32(16) if there else u32(0))
            row = i32(row + step)
        commit()

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def run_sixteen(
        acc_o, row_max, row_sum, acc_s, p, q_smem, smem, k, v, base, ring, place, first_n, count, low, high, shifted, scale,
        softmax_scale, cap, lane,
    ):  # fmt: skip
        factor = cuda.local.array(2, f32)
        cuda.syncwarp()  # nobody reads what lies here any more
        load_rows(smem, k, base, ring, place, count, lane)
        for m in unroll(m_tiles):
            for t in unroll(n_tiles):
                for r in unroll(4):
                    acc_s[m, t, r] = -shifted[m, r // 2]
        wait_0()
        cuda.syncwarp()
        qk(acc_s, q_smem, smem, lane, i32(0))  # rows of warp 0: those of every warp
        cuda.syncwarp()
        load_rows(smem, v, base, ring, place, count, lane)
        for m in unroll(m_tiles):
            if general:
                general_scores(acc_s[m], shifted[m], softmax_scale, cap)
            mask(acc_s[m], low[m], high[m], first_n, i32(lane & i32(3)))
            weights(acc_s[m], row_max[m], row_sum[m], factor, scale)
            rescale(acc_o, u32(m), factor, lane)
        pack(p, acc_s)
        wait_0()
        cuda.syncwarp()
        pv(acc_o, p, smem, lane)

    return run_sixteen


def make_merge_warps(head_dim: int, dtype: str, warps: int):
    """Device function ``(out, lse, smem, warp_bytes, stats, stats_bytes, row, chunk, out_row, lse_row, shift2, has_sink,
    sink2, has_lse, partial)``: four channels of one row, from ``4 chunk`` on, of all warps' results.

    shift2: what is added to the row's logarithm, in log2 units, as ``sink2``, a part of the denominator where ``has_sink``.
    out: u32*, f32 where ``partial``, else of ``dtype``; ``out_row``, ``lse_row``: i64. A row that saw no key is 0 with an
    LSE of -inf.
    """
    import numpy as np
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import softmax
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi, load_v2, load_v4, max_f32, fma = (
        dev.ffi, dev.ld_shared_v2_u32, dev.ld_shared_v4_u32, dev.max_f32, dev.fma_rn_f32
    )  # fmt: skip
    ex2, lg2, rcp = dev.ex2_approx_ftz_f32, dev.lg2_approx_f32, dev.rcp_approx_ftz_f32
    float_of, bits_of = dev.mov_f32_b32, dev.mov_b32_f32
    store_v4, store_v2 = dev.st_global_v4_u32, dev.st_global_v2_u32
    pack = dev.cvt_rn_bf16x2_f32 if dtype == "bfloat16" else dev.cvt_rn_f16x2_f32
    pitch = result_pitch(head_dim)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def merge_warps(
        out, lse, smem, warp_bytes, stats, stats_bytes, row, chunk, out_row, lse_row, shift2, has_sink, sink2, has_lse,
        partial,
    ):  # fmt: skip
        two = cuda.local.array(2, u32)
        four = cuda.local.array(4, u32)
        maxima = cuda.local.array(warps, f32)
        sums = cuda.local.array(warps, f32)
        values = cuda.local.array(4, f32)
        own_sink = sink2 - shift2 if has_sink else f32(-np.inf)
        largest = max_f32(f32(softmax.LOWEST), own_sink)
        for w in unroll(warps):
            load_v2(ffi.from_buffer(two), stats + u32(w) * stats_bytes + u32(8) * u32(row))
            maxima[w], sums[w] = float_of(two[0]), float_of(two[1])
            largest = max_f32(largest, maxima[w])
        total = ex2(own_sink - largest)
        for i in unroll(4):
            values[i] = f32(0)
        for w in unroll(warps):
            weight = ex2(maxima[w] - largest)
            total = fma(sums[w], weight, total)
            load_v4(ffi.from_buffer(four), smem + u32(w) * warp_bytes + u32(row) * u32(pitch) + u32(16) * u32(chunk))
            for i in unroll(4):
                values[i] = fma(float_of(four[i]), weight, values[i])
        factor = f32(0) if total == f32(0) else rcp(total)  # 1 or more, for the row's maximum is among its terms
        for i in unroll(4):
            values[i] = values[i] * factor
        at = out_row * i64(head_dim) + i64(i32(4) * chunk)
        if partial:
            store_v4(out, at, bits_of(values[0]), bits_of(values[1]), bits_of(values[2]), bits_of(values[3]))
        else:
            store_v2(out, at >> i64(1), pack(values[1], values[0]), pack(values[3], values[2]))
        if has_lse and chunk == i32(0):
            log_sum = (largest + lg2(total) + shift2) * f32(1 / LOG2E)
            lse[lse_row] = f32(-np.inf) if total == f32(0) else log_sum

    return merge_warps

