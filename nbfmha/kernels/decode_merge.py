"""The ends of the decode kernel: results of the warps of a team merged, and those of the splits of a row.

    lse = log(sum of exp(lse_s) [+ exp(sink)]),  out = sum of exp(lse_s - lse) out_s

What has seen no token has an LSE of -inf, or a sum of 0, and no weight; a row of nothing else is 0 with an LSE of -inf (its
sink where there is one).

A lane has four channels of one row, and the results of every ``parts``-th warp or split: the lanes of a warp that have the
same channels then merge theirs by shuffles. One lane with all results would wait for each of them, while others idle.
"""

from __future__ import annotations

from nbfmha.kernels.out_columns import result_pitch

LOG2E = 1.4426950408889634


def parts_of(warps: int) -> int:
    """Lanes that share the results of a team's warps, or of the splits: four warps each."""
    return max(warps // 4, 1)


def make_stats_of(q_tiles: int):
    """Device function ``(part) -> u32``: where the (maximum, sum) pairs of the warps of a part stand in the 256 bytes that
    they have: what lanes of different parts read at once lies in different banks, as far as there is room."""
    from numba import cuda
    from numba.core import types

    u32 = types.uint32

    @cuda.jit(device=True, forceinline=True)
    def stats_of(part):
        return (u32(part) * u32(64 * q_tiles)) & u32(255)

    return stats_of


def make_items(head_dim: int, warps: int):
    """Device functions of how rows and chunks of four channels are shared by a team's threads:

    ``first(thread) -> i32``: the lane's first item; its next ones are ``32 * warps / parts`` further each. ``place(item) ->
    (row, chunk)``. ``part(lane) -> i32``: which results it has; ``meet(values: f32[4], state: f32[2])``: (maximum, sum) and
    values in its units, of all parts."""
    import numpy as np
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32 = types.float32, types.uint32, types.int32
    max_f32, ex2, bfly = dev.max_f32, dev.ex2_approx_ftz_f32, dev.shfl_sync_bfly_f32
    chunks, parts = head_dim // 4, parts_of(warps)
    items, steps = 32 // parts, parts.bit_length() - 1  # items of a warp at once; halvings

    @cuda.jit(device=True, forceinline=True)
    def first(thread):
        return i32((thread >> i32(5)) * i32(items) + (thread & i32(items - 1)))

    @cuda.jit(device=True, forceinline=True)
    def place(item):
        return i32(u32(item) // u32(chunks)), i32(u32(item) % u32(chunks))

    @cuda.jit(device=True, forceinline=True)
    def part(lane):
        return i32(u32(lane) // u32(items))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def meet(values, state):
        most = state[0]
        for i in unroll(steps):
            most = max_f32(most, bfly(most, u32(items << i)))
        factor = ex2(state[0] - (most if most > f32(-np.inf) else f32(0)))
        state[0], state[1] = most, state[1] * factor
        for j in unroll(4):
            values[j] = values[j] * factor
        for i in unroll(steps):
            state[1] = state[1] + bfly(state[1], u32(items << i))
            for j in unroll(4):
                values[j] = values[j] + bfly(values[j], u32(items << i))

    return first, place, part, meet


def make_gather_warps(head_dim: int, warps: int, q_tiles: int):
    """Device function ``(values: f32[4], state: f32[2], smem, warp_bytes, stats, row, chunk, part)``: four channels of one
    row, from ``4 chunk`` on, of the warps of a part, and their (maximum, sum).

    smem, stats: of the first warp, the next one's ``warp_bytes`` behind them; its pairs at ``stats_of``."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import softmax
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32 = types.float32, types.uint32
    ffi, load_v2, load_v4, max_f32, fma = (
        dev.ffi, dev.ld_shared_v2_u32, dev.ld_shared_v4_u32, dev.max_f32, dev.fma_rn_f32
    )  # fmt: skip
    ex2, float_of = dev.ex2_approx_ftz_f32, dev.mov_f32_b32
    pitch, each, stats_of = result_pitch(head_dim), warps // parts_of(warps), make_stats_of(q_tiles)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def gather_warps(values, state, smem, warp_bytes, stats, row, chunk, part):
        pairs = cuda.local.array((each, 2), u32)
        words = cuda.local.array((each, 4), u32)
        own = u32(part) * u32(each) * warp_bytes
        own_stats = stats + own + stats_of(part) + u32(8) * u32(row)
        own += smem + u32(row) * u32(pitch) + u32(16) * u32(chunk)
        largest = f32(softmax.LOWEST)
        for w in unroll(each):
            load_v2(ffi.from_buffer(pairs[w]), own_stats + u32(w) * warp_bytes)
            load_v4(ffi.from_buffer(words[w]), own + u32(w) * warp_bytes)
        for w in unroll(each):
            largest = max_f32(largest, float_of(pairs[w, 0]))
        state[0], state[1] = largest, f32(0)
        for i in unroll(4):
            values[i] = f32(0)
        for w in unroll(each):
            weight = ex2(float_of(pairs[w, 0]) - largest)
            state[1] = fma(float_of(pairs[w, 1]), weight, state[1])
            for i in unroll(4):
                values[i] = fma(float_of(words[w, i]), weight, values[i])

    return gather_warps


def make_gather_splits(head_dim: int, warps: int):
    """``together``, how many splits are on their way at once, and device functions of four channels of one row, from
    ``4 chunk`` on, of splits ``own``, ``own`` + ``parts_of(warps)``, ...:

    ``find(rows: u32[together], num_splits, all_rows, row, own)``: which rows of all splits those of the first ones are.
    ``gather(values: f32[4], state: f32[2], rows, part, part_lse, num_splits, all_rows, row, chunk, own)``: all of them, and
    their (maximum, sum), log2; the first ones from there.

    part, part_lse: f32 (as u32*, f32*), (num_splits, all_rows, head_dim) and (num_splits, all_rows), of which ``row`` (u32)
    is meant. Bytes: 4 (head_dim + 1) a split.
    """
    import numpy as np
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi, load_v4, max_f32, fma, ex2, float_of = (
        dev.ffi, dev.ld_global_v4_u32, dev.max_f32, dev.fma_rn_f32, dev.ex2_approx_ftz_f32, dev.mov_f32_b32
    )  # fmt: skip
    parts, together = parts_of(warps), 4

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def find(rows, num_splits, all_rows, row, own):
        for j in unroll(together):
            rows[j] = u32(min(i32(own + i32(parts * j)), i32(num_splits - i32(1)))) * all_rows + row

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def add_splits(values, state, rows, part, part_lse, num_splits, chunk, own):
        words = cuda.local.array((together, 4), u32)
        weights = cuda.local.array(together, f32)
        for j in unroll(together):
            weights[j] = part_lse[i64(rows[j])]
            load_v4(ffi.from_buffer(words[j]), part, i64(rows[j]) * i64(head_dim) + i64(i32(4) * chunk))
        most = state[0]
        for j in unroll(together):
            weights[j] = weights[j] * f32(LOG2E) if i32(own + i32(parts * j)) < num_splits else f32(-np.inf)
            most = max_f32(most, weights[j])
        origin = most if most > f32(-np.inf) else f32(0)
        factor = ex2(state[0] - origin)
        state[0], state[1] = most, state[1] * factor
        for i in unroll(4):
            values[i] = values[i] * factor
        for j in unroll(together):
            weights[j] = ex2(weights[j] - origin)
            state[1] = state[1] + weights[j]
            for i in unroll(4):
                values[i] = fma(float_of(words[j, i]), weights[j], values[i])

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def gather(values, state, rows, part, part_lse, num_splits, all_rows, row, chunk, own):
        state[0], state[1] = f32(-np.inf), f32(0)
        for i in unroll(4):
            values[i] = f32(0)
        add_splits(values, state, rows, part, part_lse, num_splits, chunk, own)
        own = i32(own + i32(parts * together))
        while own < num_splits:
            find(rows, num_splits, all_rows, row, own)
            add_splits(values, state, rows, part, part_lse, num_splits, chunk, own)
            own = i32(own + i32(parts * together))

    return together, find, gather


def make_finish(head_dim: int, dtype: str):
    """Device function ``(out: u32*, lse, values: f32[4], state: f32[2], row, chunk, lse_row, has_sink, sink2, shift2,
    has_lse, partial)``: four channels of one row, from ``4 chunk`` on, divided by their sum, of which 2^sink2 is a part
    where ``has_sink``; chunk 0 has the LSE.

    shift2: what is added to the row's logarithm, in log2 units. out: f32 where ``partial``, else of ``dtype``, (rows,
    head_dim), of which ``row`` (u32) is written; ``lse_row``: u32.
    """
    import numpy as np
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, i32, i64 = types.float32, types.int32, types.int64
    max_f32, ex2, lg2, rcp, bits_of = (
        dev.max_f32, dev.ex2_approx_ftz_f32, dev.lg2_approx_f32, dev.rcp_approx_ftz_f32, dev.mov_b32_f32
    )  # fmt: skip
    store_v4, store_v2 = dev.st_global_v4_u32, dev.st_global_v2_u32
    pack = dev.cvt_rn_bf16x2_f32 if dtype == "bfloat16" else dev.cvt_rn_f16x2_f32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def finish(out, lse, values, state, row, chunk, lse_row, has_sink, sink2, shift2, has_lse, partial):
        if has_sink:
            most = max_f32(state[0], sink2 - shift2)
            origin = most if most > f32(-np.inf) else f32(0)
            factor = ex2(state[0] - origin)
            state[0], state[1] = most, state[1] * factor + ex2(sink2 - shift2 - origin)
            for i in unroll(4):
                values[i] = values[i] * factor
        # the sum is 1 or more, for the row's maximum is among its terms
        factor = f32(0) if state[1] == f32(0) else rcp(state[1])
        for i in unroll(4):
            values[i] = values[i] * factor
        at = i64(row) * i64(head_dim) + i64(i32(4) * chunk)
        if partial:
            store_v4(out, at, bits_of(values[0]), bits_of(values[1]), bits_of(values[2]), bits_of(values[3]))
        else:
            store_v2(out, at >> i64(1), pack(values[1], values[0]), pack(values[3], values[2]))
        if has_lse and chunk == i32(0):
            log_sum = (state[0] + lg2(state[1]) + shift2) * f32(1 / LOG2E)
            lse[i64(lse_row)] = f32(-np.inf) if state[1] == f32(0) else log_sum

    return finish
