"""A run of tiles whose keys and values are rows of 16 bits: loads, both products and the online softmax, tile after tile.

``nvfp4=False``: tiles of the 16-bit windows, k16 and v16 as they came, ``-shift`` under the scores. ``nvfp4=True``: what
``dequant`` has for NVFP4 tiles, rows of quantised values in f16, exactly as the block-scale MMA would read them, the
correction of Q smoothing (``delta``) under the scores, P by the recipe.

One stage of K and one of V, as in FlashAttention-2: V comes while Q K^T is computed, the next K while P V is.
"""

from __future__ import annotations

from collections.abc import Callable

from nbfmha.kernels.tile_codes import DELTA_BYTES
from nbfmha.recipe import TILE_N


def make_run_rows(
    make: Callable,
    head_dim: int,
    dtype: str,
    m_tiles: int,
    nvfp4: bool,
    pv: str,
    rounded: bool,
    general: bool,
    has_delta: bool,
    bias: float,
):
    """Device function ``run_rows(acc_o, row_max, row_sum, smem, pool, deltas, q, q_first, q_pitch, rows, k, k_first,
    k_pitch, v, v_first, v_pitch, delta, delta_at, delta_step, shift, shift_at, has_shift, run_from, run_to, own_from,
    own_to, seqlen_k, position, window_left, window_right, scale, softmax_scale, cap, thread)``: tiles [run_from, run_to)
    of a CTA.

    make(factory, *constants): a device function, the same one for the same constants: Numba compiles it once a kernel.
    dtype: of the MMAs. acc_o f32[m_tiles, tiles, 4]; row_max, row_sum f32[m_tiles, 2]; smem: place of Q, pool: of K and V,
    deltas: of 64 corrections for each 64 queries. q_first ... v_pitch: bytes (i64); q has ``rows`` rows. shift_at: of the
    CTA's first row. A warp computes tiles [own_from, own_to) alone; ``position`` is that of its lane's first row.
    delta_at, delta_step: element of ``delta`` for key 0 of the first 64 queries, and how much later it is for the next 64.
    """
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import softmax, tile_16bit, tile_codes
    from nbfmha.kernels.round_p import make_round_p
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    commit, wait_0, cp_async_4 = dev.cp_async_commit_group, dev.cp_async_wait_group_0, dev.cp_async_ca_4
    n_tiles, pv_steps, halves, o_tiles = TILE_N // 8, TILE_N // 16, m_tiles, head_dim // 8 + rounded
    smem_rows, rows_bytes = tile_16bit.WARPS * 16 * m_tiles, TILE_N * tile_16bit.row_pitch(head_dim)
    load_q, load_kv = (make(tile_16bit.make_load_rows, head_dim, rows) for rows in (smem_rows, TILE_N))
    qk = make(tile_16bit.make_qk, head_dim, dtype, m_tiles)
    pack = make(tile_16bit.make_pack, dtype, m_tiles)
    pv_mma = make(tile_16bit.make_pv, head_dim, dtype, m_tiles, rounded)
    load_delta, mask = make(tile_codes.make_load_delta), make(softmax.make_mask, "rows")
    general_scores, step = make(softmax.make_general_scores), make(softmax.make_step, o_tiles, bias)
    nvfp4_p = nvfp4 and pv == "nvfp4"
    with_delta, with_shift = nvfp4 and has_delta, general or not nvfp4
    begin_nvfp4, step_nvfp4 = make(softmax.make_step_nvfp4, o_tiles, "rows", bias)
    round_p, delta_token = make(make_round_p), make(tile_codes.make_delta_token, "rows")

    if nvfp4_p:

        @cuda.jit(device=True, forceinline=True)
        def softmax_step(acc_s, acc_o, row_max, origin, row_sum, scale):
            sfp = cuda.local.array(2, u32)
            step_nvfp4(acc_s, acc_o, row_max, origin, row_sum, scale, sfp)
            round_p(acc_s, sfp)

    else:

        @cuda.jit(device=True, forceinline=True)
        def softmax_step(acc_s, acc_o, row_max, origin, row_sum, scale):
            step(acc_s, acc_o, row_max, row_sum, scale)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_deltas(deltas, delta, delta_at, delta_step, rows, thread):
        """64 corrections for each 64 queries of the CTA that there are."""
        for half in unroll(halves):
            if i32(TILE_N * half) < rows:
                at = (delta_at + i64(half) * delta_step + i64(delta_token(thread))) * i64(4)
                cp_async_4(deltas + u32(DELTA_BYTES * half) + u32(4) * u32(thread), delta, at, u32(4))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def run_rows(
        acc_o, row_max, row_sum, smem, pool, deltas, q, q_first, q_pitch, rows, k, k_first, k_pitch, v, v_first, v_pitch,
        delta, delta_at, delta_step, shift, shift_at, has_shift, run_from, run_to, own_from, own_to, seqlen_k, position,
        window_left, window_right, scale, softmax_scale, cap, thread,
    ):  # fmt: skip
        lane, warp = i32(thread & i32(31)), i32(thread >> i32(5))
        thread_in_group, group_id = i32(lane & i32(3)), i32(lane >> i32(2))
        own_deltas = deltas + u32(DELTA_BYTES) * u32((warp * i32(m_tiles)) >> i32(2))
        k_smem, v_smem = pool, pool + u32(rows_bytes)
        acc_s = cuda.local.array((m_tiles, n_tiles, 4), f32)
        p = cuda.local.array((m_tiles, pv_steps, 4), u32)
        origin = cuda.local.array((m_tiles, 2, 2), f32)
        if nvfp4_p:
            for m in unroll(m_tiles):
                begin_nvfp4(origin[m], row_max[m])
        shifted = cuda.local.array((m_tiles, 2), f32)
        first_row = i32(i32(16 * m_tiles) * warp + group_id)
        for m in unroll(m_tiles):
            for side in unroll(2):
                shifted[m, side] = f32(0)
                row = i32(first_row + i32(16 * m + 8 * side))
                if with_shift and has_shift != i32(0) and row < rows:
                    shifted[m, side] = shift[shift_at + i64(row)]
        # tiles from full_from up to full_to are seen by every row of the warp as a whole
        own_first = i32(position - group_id)
        full_from = i32(own_first + i32(16 * m_tiles - 1) - window_left)
        full_to = i32(min(own_first + window_right + i32(1), seqlen_k))

        cuda.syncthreads()  # the run before is done with shared memory
        first_n = i32(run_from * i32(TILE_N))
        load_q(smem, q, q_first, q_pitch, rows, thread)
        k_at = k_first + i64(first_n) * k_pitch
        v_at = v_first + i64(first_n) * v_pitch
        load_kv(k_smem, k, k_at, k_pitch, i32(seqlen_k - first_n), thread)
        if with_delta:
            load_deltas(deltas, delta, delta_at + i64(first_n), delta_step, rows, thread)
        commit()
        stop_n, own_from_n, own_stop_n = (
            i32(run_to * i32(TILE_N)), i32(own_from * i32(TILE_N)), i32(own_to * i32(TILE_N))
        )  # fmt: skip
        while first_n < stop_n:
            active = first_n >= own_from_n and first_n < own_stop_n
            wait_0()
            cuda.syncthreads()  # K is there, and nobody reads the V before
            load_kv(v_smem, v, v_at, v_pitch, i32(seqlen_k - first_n), thread)
            commit()
            if active:
                for m in unroll(m_tiles):
                    if with_delta:
                        load_delta(acc_s[m], own_deltas, thread_in_group)
                    else:
                        for t in unroll(n_tiles):
                            for r in unroll(4):
                                acc_s[m, t, r] = -shifted[m, r // 2]
                qk(acc_s, smem, k_smem, lane, warp)
                if general:
                    for m in unroll(m_tiles):
                        general_scores(acc_s[m], shifted[m], softmax_scale, cap)
                if i32(min(first_n - full_from, full_to - first_n - i32(TILE_N))) < i32(0):
                    for m in unroll(m_tiles):
                        row_position = i32(position + i32(16 * m))
                        mask(acc_s[m], row_position, window_left, window_right, seqlen_k, first_n, thread_in_group)
                for m in unroll(m_tiles):
                    softmax_step(acc_s[m], acc_o[m], row_max[m], origin[m], row_sum[m], scale)
                pack(p, acc_s)
            wait_0()
            cuda.syncthreads()  # V is there, and nobody reads this K any more
            next_n = i32(first_n + i32(TILE_N))
            k_at += i64(TILE_N) * k_pitch
            v_at += i64(TILE_N) * v_pitch
            if next_n < stop_n:
                load_kv(k_smem, k, k_at, k_pitch, i32(seqlen_k - next_n), thread)
                if with_delta:
                    load_deltas(deltas, delta, delta_at + i64(next_n), delta_step, rows, thread)
            commit()
            if active:
                pv_mma(acc_o, p, v_smem, lane)
            first_n = next_n

    return run_rows
