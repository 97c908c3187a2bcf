"""The ends of the decode kernel: results of the warps of a CTA merged, and those of the splits of a row.

    lse = log(sum of exp(lse_s) [+ exp(sink)]),  out = sum of exp(lse_s - lse) out_s

What has seen no token has an LSE of -inf and no weight, whatever its ``out`` holds; a row of nothing else is 0 with an LSE
of -inf (its sink where there is one).
"""

from __future__ import annotations

from nbfmha.kernels.out_columns import result_pitch

LOG2E = 1.4426950408889634


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


def make_merge_splits(head_dim: int, dtype: str):
    """Device function ``(out: u32*, lse, part: u32*, part_lse, num_splits, all_rows, row, lse_row, has_sink, sink, has_lse,
    lane)``: one row by one warp, head_dim / 32 channels a lane.

    part, part_lse: f32, (num_splits, all_rows, head_dim) and (num_splits, all_rows), of which ``row`` (i64) is merged. out:
    of ``dtype``, (all_rows, head_dim); ``lse_row``: i64, place of the LSE. Bytes: 4 (head_dim + 1) a split.
    """
    import numpy as np
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    max_f32, fma, ex2, lg2, bfly = (
        dev.max_f32, dev.fma_rn_f32, dev.ex2_approx_ftz_f32, dev.lg2_approx_f32, dev.shfl_sync_bfly_f32
    )  # fmt: skip
    float_of = dev.mov_f32_b32
    pack = dev.cvt_rn_bf16x2_f32 if dtype == "bfloat16" else dev.cvt_rn_f16x2_f32
    pairs, together = head_dim // 64, 8

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def add_splits(values, part, part_lse, first, num_splits, all_rows, row, origin, lane):
        """Eight splits: what is loaded of them is on its way at once."""
        words = cuda.local.array((together, pairs, 2), u32)
        weights = cuda.local.array(together, f32)
        for j in unroll(together):
            split = i64(min(i32(first + i32(j)), i32(num_splits - i32(1))))
            at = split * i64(all_rows) + row
            weights[j] = part_lse[at]
            for i in unroll(pairs):
                for e in unroll(2):
                    words[j, i, e] = part[at * i64(head_dim) + i64(i32(2) * lane + i32(64 * i + e))]
        for j in unroll(together):
            weight = ex2((weights[j] - origin) * f32(LOG2E)) if i32(first + i32(j)) < num_splits else f32(0)
            for i in unroll(pairs):
                for e in unroll(2):
                    x = float_of(words[j, i, e])
                    values[i, e] = fma(x if weight > f32(0) else f32(0), weight, values[i, e])

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def merge_splits(
        out, lse, part, part_lse, num_splits, all_rows, row, lse_row, has_sink, sink, has_lse, lane
    ):  # fmt: skip
        most = sink if has_sink else f32(-np.inf)
        split = i32(lane)
        while split < num_splits:
            most = max_f32(most, part_lse[i64(split) * i64(all_rows) + row])
            split = i32(split + i32(32))
        for i in unroll(5):
            most = max_f32(most, bfly(most, u32(1 << i)))
        origin = most if most > f32(-np.inf) else f32(0)
        total = f32(0)
        split = i32(lane)
        while split < num_splits:
            total += ex2((part_lse[i64(split) * i64(all_rows) + row] - origin) * f32(LOG2E))
            split = i32(split + i32(32))
        for i in unroll(5):
            total += bfly(total, u32(1 << i))
        if has_sink:
            total += ex2((sink - origin) * f32(LOG2E))
        values = cuda.local.array((pairs, 2), f32)
        for i in unroll(pairs):
            for e in unroll(2):
                values[i, e] = f32(0)
        first = i32(0)
        while first < num_splits:
            add_splits(values, part, part_lse, first, num_splits, all_rows, row, origin, lane)
            first = i32(first + i32(together))
        factor = f32(0) if total == f32(0) else f32(1) / total
        for i in unroll(pairs):
            out[row * i64(head_dim // 2) + i64(lane + i32(32 * i))] = pack(values[i, 1] * factor, values[i, 0] * factor)
        if has_lse and lane == i32(0):
            lse[lse_row] = f32(-np.inf) if total == f32(0) else origin + lg2(total) * f32(1 / LOG2E)

    return merge_splits
