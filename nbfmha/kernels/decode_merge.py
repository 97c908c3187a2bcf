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
    """Device functions of a CTA's warps, four channels a lane in turn, with a barrier between them:

    ``gather(smem, part: u32*, part_lse, first, step, num_splits, all_rows, row, lane)``: splits ``first``, ``first`` +
    ``step``, ... of one row to the warp's place in shared memory: (maximum, sum) of the LSEs, and ``out`` times that sum.

    ``finish(out: u32*, lse, smem, warp_bytes, pieces, row, lse_row, has_sink, sink, has_lse, lane)``: a row of what
    ``pieces`` warps have gathered, whose places begin at ``smem``, ``warp_bytes`` apart.

    part, part_lse: f32, (num_splits, all_rows, head_dim) and (num_splits, all_rows), of which ``row`` (i64) is merged. out:
    of ``dtype``, (all_rows, head_dim); ``lse_row``: i64, place of the LSE. Bytes: 4 (head_dim + 1) a split.
    """
    import numpy as np
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi, load_v4, load_shared_v4, load_shared_v2 = (
        dev.ffi, dev.ld_global_v4_u32, dev.ld_shared_v4_u32, dev.ld_shared_v2_u32
    )  # fmt: skip
    store_shared_v4, store_shared_v2, store_v2 = dev.st_shared_v4_u32, dev.st_shared_v2_u32, dev.st_global_v2_u32
    max_f32, fma, ex2, lg2 = dev.max_f32, dev.fma_rn_f32, dev.ex2_approx_ftz_f32, dev.lg2_approx_f32
    float_of, bits_of = dev.mov_f32_b32, dev.mov_b32_f32
    pack = dev.cvt_rn_bf16x2_f32 if dtype == "bfloat16" else dev.cvt_rn_f16x2_f32
    groups, owners, together = max(head_dim // 128, 1), min(head_dim // 4, 32), 8

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def add(values, state, other, other_sum, words, present):
        """One more result of log2 weight ``other``, sum ``other_sum`` and values ``words``, if it is there."""
        most = max_f32(state[0], other) if present else state[0]
        origin = most if most > f32(-np.inf) else f32(0)
        factor, weight = ex2(state[0] - origin), ex2(other - origin) if present else f32(0)
        state[0], state[1] = most, fma(other_sum, weight, state[1] * factor)
        for g in unroll(groups):
            for i in unroll(4):
                x = float_of(words[g, i]) if weight > f32(0) else f32(0)  # what has no weight may hold anything
                values[g, i] = fma(x, weight, values[g, i] * factor)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def add_splits(values, state, part, part_lse, first, step, num_splits, all_rows, row, lane):
        """Eight splits: what is loaded of them is on its way at once."""
        words = cuda.local.array((together, groups, 4), u32)
        weights = cuda.local.array(together, f32)
        for j in unroll(together):
            split = i64(min(i32(first + i32(j) * step), i32(num_splits - i32(1))))
            at = split * i64(all_rows) + row
            weights[j] = part_lse[at] * f32(LOG2E)
            for g in unroll(groups):
                if lane < i32(owners):
                    load_v4(ffi.from_buffer(words[j, g]), part, at * i64(head_dim) + i64(i32(4) * lane + i32(128 * g)))
        for j in unroll(together):
            add(values, state, weights[j], f32(1), words[j], i32(first + i32(j) * step) < num_splits)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def clear(values, state):
        state[0], state[1] = f32(-np.inf), f32(0)
        for g in unroll(groups):
            for i in unroll(4):
                values[g, i] = f32(0)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def gather(smem, part, part_lse, first, step, num_splits, all_rows, row, lane):
        values = cuda.local.array((groups, 4), f32)
        state = cuda.local.array(2, f32)
        clear(values, state)
        while first < num_splits:
            add_splits(values, state, part, part_lse, first, step, num_splits, all_rows, row, lane)
            first = i32(first + i32(together) * step)
        if lane == i32(0):
            store_shared_v2(smem + u32(4 * head_dim), bits_of(state[0]), bits_of(state[1]))
        if lane < i32(owners):
            for g in unroll(groups):
                store_shared_v4(
                    smem + u32(16) * u32(lane) + u32(512 * g), bits_of(values[g, 0]), bits_of(values[g, 1]),
                    bits_of(values[g, 2]), bits_of(values[g, 3]),
                )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def add_piece(values, state, smem, lane):
        words = cuda.local.array((groups, 4), u32)
        two = cuda.local.array(2, u32)
        load_shared_v2(ffi.from_buffer(two), smem + u32(4 * head_dim))
        for g in unroll(groups):
            load_shared_v4(ffi.from_buffer(words[g]), smem + u32(16) * u32(lane & i32(owners - 1)) + u32(512 * g))
        add(values, state, float_of(two[0]), float_of(two[1]), words, True)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def finish(out, lse, smem, warp_bytes, pieces, row, lse_row, has_sink, sink, has_lse, lane):
        values = cuda.local.array((groups, 4), f32)
        state = cuda.local.array(2, f32)
        clear(values, state)
        if has_sink:
            state[0], state[1] = sink * f32(LOG2E), f32(1) if sink > f32(-np.inf) else f32(0)
        for piece in range(pieces):
            add_piece(values, state, smem + u32(piece) * warp_bytes, lane)
        factor = f32(0) if state[1] == f32(0) else f32(1) / state[1]
        if lane < i32(owners):
            for g in unroll(groups):
                at = row * i64(head_dim // 2) + i64(i32(2) * lane + i32(64 * g))
                low = pack(values[g, 1] * factor, values[g, 0] * factor)
                store_v2(out, at, low, pack(values[g, 3] * factor, values[g, 2] * factor))
        if has_lse and lane == i32(0):
            total = (state[0] + lg2(state[1])) * f32(1 / LOG2E)
            lse[lse_row] = f32(-np.inf) if state[1] == f32(0) else total

    return gather, finish
