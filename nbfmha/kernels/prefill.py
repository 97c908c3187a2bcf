"""Forward attention: tiles, online softmax and both matrix products of one CTA, for every recipe that kernels take.

    S = (Q K^T [+ corrections]) softmax_scale,  O = softmax(S) V,  LSE = log sum exp(S) [+ shift]

CTA: 4 warps, ``rows_of_cta`` queries of one head, 16 or 32 a warp; every warp has all 64 keys of a tile. Tiles come in
ascending order, in up to four runs: 16 bits (sinks), NVFP4, 16 bits (diagonal), NVFP4. Where a run begins and ends depends
on the block of 64 queries: of a tile on which two blocks of a CTA differ, each run computes the warps that it concerns.

==============  ====================================================================================================
16-bit tile     rows of k16 and v16 by ``cp.async``, ``ldmatrix``, ``mma.m16n8k16`` in the call's format
                (:mod:`run_rows`, :mod:`tile_16bit`)
FP4 tile        ``blockscale``, ``legacy``: codes and scales by ``cp.async`` to two stages of shared memory
                (:mod:`tile_codes`), from which the MMA reads (:mod:`tile_blockscale`, :mod:`tile_legacy`).
                ``dequant``: as a 16-bit tile, of values that the pre-pass widened to f16: each is read by every CTA of
                its head, so widening it once is cheaper than in each
acc_S, acc_O    f32 registers; acc_S starts from ``delta`` (NVFP4, Q smoothing) or ``-shift`` (16 bits, K smoothing);
                ``legacy`` adds ``delta`` after the scales, and has acc_O in units of V's scales over FP4 tiles
P               f32 to f16 (or bf16 in 16-bit tiles), to NVFP4 or E4M3 after a factor (``P_SCALE``); no shuffle moves P
==============  ====================================================================================================

smem, dynamic: Q in 16 bits (``dequant`` or windows), then the larger of what the two kinds of tile need; see
``shared_bytes``. ``blockscale`` and ``legacy`` need sm_120a, ``dequant`` sm_80: one source, the tile functions differ.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from nbfmha import gpu_arrays
from nbfmha.kernels.operands import HEAD_DIMS, Operands
from nbfmha.kernels.tile_16bit import THREADS, WARPS, row_pitch
from nbfmha.kernels.tile_codes import DELTA_BYTES, Stage
from nbfmha.problem import NO_LIMIT, Problem
from nbfmha.recipe import P_SCALE, TILE_N, Recipe
from nbfmha.tiles import TILE_M, View
from nbfmha.validation import FLOAT_DTYPES, message
from ptx_inline.isa.shared_memory import shared_limit
from ptx_inline.toolchain import Kernel, Target

IMPLEMENTATIONS = ("blockscale", "legacy", "dequant")
#: CTAs an SM that ptxas makes room for with ``dequant``: 255 registers a thread. Three spill, and are slower on an H100.
CTAS_PER_SM = 2


def m_tiles_of(implementation: str, head_dim: int) -> int:
    """Tiles of 16 queries that a warp has. Two halve the reads of K and V from shared memory, which bound ``dequant``; for
    head_dim 256 two do not fit the registers."""
    return 2 if implementation == "dequant" and head_dim <= 128 else 1


def rows_of_cta(implementation: str, head_dim: int) -> int:
    """Queries of a CTA."""
    return 16 * WARPS * m_tiles_of(implementation, head_dim)


def make_prefill(
    implementation: str,
    head_dim: int,
    dtype: str,
    quantized: bool,
    windows: bool,
    pv: str,
    rounded: bool,
    general: bool,
    has_delta: bool,
):
    """Kernel ``prefill(out, ...)``: arguments as ``_signature`` lists them.

    dtype: of the call. quantized, windows: whether there are NVFP4 tiles, 16-bit tiles. pv, rounded: the recipe's. general:
    scores need more than one positive factor (softcap, or softmax_scale <= 0). has_delta: Q smoothing.
    """
    import numpy as np
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import softmax, tile_blockscale, tile_codes, tile_legacy
    from nbfmha.kernels.mma import make_clear_accumulator
    from nbfmha.kernels.run_rows import make_run_rows
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi = dev.ffi
    commit, wait_0 = dev.cp_async_commit_group, dev.cp_async_wait_group_0
    ex2, lg2, bfly, max_f32, fma = (
        dev.ex2_approx_ftz_f32,
        dev.lg2_approx_f32,
        dev.shfl_sync_bfly_f32,
        dev.max_f32,
        dev.fma_rn_f32,
    )
    pack = dev.cvt_rn_bf16x2_f32 if dtype == "bfloat16" else dev.cvt_rn_f16x2_f32
    to_shared = dev.cvta_to_shared_u32

    legacy, by_codes, nvfp4_p = implementation == "legacy", implementation != "dequant", pv == "nvfp4"
    m_tiles, blocks_of_cta = m_tiles_of(implementation, head_dim), rows_of_cta(implementation, head_dim) // TILE_M
    k_steps, o_tiles, n_tiles = Stage(head_dim).k_steps, head_dim // 8, TILE_N // 8
    scale_words, all_tiles = 2 if legacy else (k_steps + 1) // 2, o_tiles + rounded
    stage_bytes, q_bytes = Stage(head_dim, legacy).bytes, _q_bytes(implementation, head_dim, windows)
    deltas_at = stage_bytes if by_codes else _nvfp4_bytes(implementation, head_dim)
    bias = math.log2(P_SCALE[pv])
    log2e = 1.4426950408889634
    sixteen = "bfloat16" if dtype == "bfloat16" else "float16"

    make = functools.cache(lambda factory, *constants: factory(*constants))
    run_windows = make_run_rows(make, head_dim, sixteen, m_tiles, False, pv, rounded, general, False, bias)
    run_widened = make_run_rows(make, head_dim, "float16", m_tiles, True, pv, rounded, general, has_delta, bias)
    begin_codes, load_codes, next_codes = tile_codes.make_load_codes(head_dim, has_delta, legacy)
    load_q, qk_codes = (tile_legacy if legacy else tile_blockscale).make_load_q(head_dim), tile_blockscale.make_qk(head_dim)
    qk_rows, pv_e4m3 = tile_legacy.make_qk(head_dim, has_delta), tile_legacy.make_pv(head_dim, rounded)
    enter_units, leave_units = tile_legacy.make_units(head_dim)
    pv_codes_f16, pv_codes_nvfp4 = tile_blockscale.make_pv_f16(head_dim), tile_blockscale.make_pv_nvfp4(head_dim, rounded)
    mask, load_delta = softmax.make_mask("stored"), make(tile_codes.make_load_delta)
    step = make(softmax.make_step, all_tiles, bias)
    begin_nvfp4, step_nvfp4 = softmax.make_step_nvfp4(all_tiles, "stored", bias)
    general_scores, clear = softmax.make_general_scores(), make_clear_accumulator()

    # what follows the scores of codes: softmax and P V. Numba types every branch, so each variant is its function
    if legacy:

        @cuda.jit(device=True, forceinline=True)
        def finish(acc_s, acc_o, row_max, origin, row_sum, scale, sfp, stage, lane):
            step(acc_s, acc_o, row_max, row_sum, scale)
            pv_e4m3(acc_o, acc_s, stage, lane)

    elif nvfp4_p:

        @cuda.jit(device=True, forceinline=True)
        def finish(acc_s, acc_o, row_max, origin, row_sum, scale, sfp, stage, lane):
            step_nvfp4(acc_s, acc_o, row_max, origin, row_sum, scale, sfp)
            pv_codes_nvfp4(acc_o, acc_s, sfp, stage, lane)

    else:

        @cuda.jit(device=True, forceinline=True)
        def finish(acc_s, acc_o, row_max, origin, row_sum, scale, sfp, stage, lane):
            step(acc_s, acc_o, row_max, row_sum, scale)
            pv_codes_f16(acc_o, acc_s, stage, lane)

    @cuda.jit(device=True, forceinline=True)
    def edges(position, last, seqlen_k, window_left, window_right, sink_tiles, diagonal_tiles):
        """Of queries at position ... last: tiles [0th, 1st) in 16 bits, [1st, 2nd) in NVFP4, [2nd, 3rd) in 16 bits, up to
        the 4th in NVFP4. None of them falls from one block of queries to the next."""
        begin = i32(max(position - window_left, i32(0)) >> i32(6))
        end = i32(max((min(last + window_right + i32(1), seqlen_k) + i32(TILE_N - 1)) >> i32(6), begin))
        stop_sinks = i32(max(min(sink_tiles, end), begin))
        diagonal, end_diagonal = end, end
        if diagonal_tiles >= i32(0):
            diagonal = i32(max(min((position >> i32(6)) - diagonal_tiles, end), stop_sinks))
            end_diagonal = i32(max(min((last >> i32(6)) + diagonal_tiles + i32(1), end), diagonal))
        if not quantized:
            stop_sinks, diagonal, end_diagonal = end, end, end
        return begin, stop_sinks, diagonal, end_diagonal, end

    @cuda.jit(device=True, forceinline=True)
    def quad_sum(x):
        x = x + bfly(x, u32(1))
        return x + bfly(x, u32(2))

    if dtype == "float32":

        @cuda.jit(device=True, forceinline=True)
        def store_pair(out, at, even, odd):
            out[at] = even
            out[at + i64(1)] = odd

    else:

        @cuda.jit(device=True, forceinline=True)
        def store_pair(out, at, even, odd):
            out[at >> i64(1)] = pack(odd, even)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_low(out, at, acc_o, factor):
        for t in unroll(o_tiles):
            store_pair(out, at + i64(8 * t), acc_o[t, 0] * factor, acc_o[t, 1] * factor)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_high(out, at, acc_o, factor):
        for t in unroll(o_tiles):
            store_pair(out, at + i64(8 * t), acc_o[t, 2] * factor, acc_o[t, 3] * factor)

    @unrolled
    def prefill(
        out, lse, q, sfq, k, sfk, vt, sfv, q16, k16, v16, delta, shift, sinks, blocks, has_lse, has_shift, has_sinks,
        out_b, out_h, out_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, seqlen_q, padded, n_blocks, delta_tiles,
        mean_step, num_heads_q, qhead_per_kvhead, window_left, window_right, sink_tiles, diagonal_tiles, phases,
        n_sequences, softmax_scale, cap,
    ):  # fmt: skip
        smem = to_shared(ffi.from_buffer(cuda.shared.array(0, u32)))
        pool = smem + u32(q_bytes)
        deltas = pool + u32(deltas_at)
        thread = i32(cuda.threadIdx.x)
        lane, warp = i32(thread & i32(31)), i32(thread >> i32(5))
        group_id, thread_in_group = i32(lane >> i32(2)), i32(lane & i32(3))
        cta = u32(cuda.blockIdx.x)
        head = i32(cta // u32(n_blocks))
        block = i32(n_blocks - i32(1) - i32(cta % u32(n_blocks)))  # causal: the longest rows of a head first
        kv_head = i32(u32(head) // u32(qhead_per_kvhead))
        batch, head_q = i32(u32(head) // u32(num_heads_q)), i32(u32(head) % u32(num_heads_q))
        head_kv = i32(u32(head_q) // u32(qhead_per_kvhead))
        first_row, stop_row = blocks[8 * block], blocks[8 * block + 1]
        position, k_source, k_padded = blocks[8 * block + 2], blocks[8 * block + 3], blocks[8 * block + 4]
        seqlen_k, delta_tile = blocks[8 * block + 5], blocks[8 * block + 6]
        rows = i32(stop_row - first_row)
        row_low = i32(warp * i32(16 * m_tiles) + group_id)
        q_row = i64(head) * i64(seqlen_q) + i64(first_row)
        # of the next mean block of 64 queries; blocks of 128 are those of a CTA
        delta_step = i64(mean_step) * i64(i32(seqlen_k + i32(TILE_N - 1)) & i32(-TILE_N))
        delta_first = (i64(head) * i64(delta_tiles) + i64(delta_tile)) * i64(TILE_N)
        sfv_row = i64(kv_head) * i64(n_sequences) + i64(blocks[8 * block + 7])

        last = i32(position + rows - i32(1))
        low_last = i32(min(position + i32(TILE_M - 1), last))
        begin, stop_sinks, diagonal, end_diagonal, end = edges(
            position, low_last, seqlen_k, window_left, window_right, sink_tiles, diagonal_tiles
        )
        own_begin, own_stop_sinks, own_diagonal, own_end_diagonal, own_end = begin, stop_sinks, diagonal, end_diagonal, end
        top_stop_sinks, top_diagonal, top_end_diagonal, top_end = stop_sinks, diagonal, end_diagonal, end
        if blocks_of_cta == 2 and rows > i32(TILE_M):
            top_begin, top_stop_sinks, top_diagonal, top_end_diagonal, top_end = edges(
                i32(position + i32(TILE_M)), last, seqlen_k, window_left, window_right, sink_tiles, diagonal_tiles
            )
            if warp >= i32(WARPS // 2):
                own_begin, own_stop_sinks, own_diagonal = top_begin, top_stop_sinks, top_diagonal
                own_end_diagonal, own_end = top_end_diagonal, top_end

        acc_o = cuda.local.array((m_tiles, all_tiles, 4), f32)
        row_max = cuda.local.array((m_tiles, 2), f32)
        row_sum = cuda.local.array((m_tiles, 2), f32)
        for m in unroll(m_tiles):
            for t in unroll(all_tiles):
                clear(acc_o[m, t])
            for side in unroll(2):
                row_max[m, side] = f32(softmax.LOWEST)
                row_sum[m, side] = f32(0)
        scale = f32(1) if general else softmax_scale * f32(log2e)
        if quantized and by_codes:
            acc_s = cuda.local.array((n_tiles, 4), f32)
            a = cuda.local.array((k_steps, 4), u32)
            sfa = cuda.local.array(scale_words, u32)
            sfp = cuda.local.array(1, u32)
            origin = cuda.local.array((2, 2), f32)
            codes_at = cuda.local.array(5, i64)
            load_q(a, sfa, q, sfq, q_row, rows, row_low, thread_in_group)
            shifted = cuda.local.array(2, f32)
            for side in unroll(2):
                shifted[side] = f32(0)
                if general and has_shift != i32(0) and row_low + i32(8 * side) < rows:
                    shifted[side] = shift[q_row + i64(row_low + i32(8 * side))]
            # tiles [full_from, full_to) are seen by every row as a whole
            full_from = i32((max(last - window_left, i32(0)) + i32(TILE_N - 1)) >> i32(6))
            full_to = i32(min(position + window_right + i32(1), seqlen_k) >> i32(6))
            n_full = u32(max(i32(full_to - full_from), i32(0)))
            # the places of codes and deltas that a tile and the next one take in turn: each is this sum minus the other
            two_stages = u32(pool + pool + u32(stage_bytes + DELTA_BYTES))

        for phase in range(phases):
            run_from, run_to = (begin, top_stop_sinks) if phase == 0 else (diagonal, top_end_diagonal)
            own_from, own_to = (own_begin, own_stop_sinks) if phase == 0 else (own_diagonal, own_end_diagonal)
            if windows and run_from < run_to:
                q_first = (i64(batch) * q_b + i64(head_q) * q_h + i64(first_row) * q_t) * i64(2)
                k_first = (i64(batch) * k_b + i64(head_kv) * k_h + i64(k_source) * k_t) * i64(2)
                v_first = (i64(batch) * v_b + i64(head_kv) * v_h + i64(k_source) * v_t) * i64(2)
                run_windows(
                    acc_o, row_max, row_sum, smem, pool, deltas, q16, q_first, q_t * i64(2), rows, k16, k_first,
                    k_t * i64(2), v16, v_first, v_t * i64(2), delta, i64(0), i64(0), shift, q_row, has_shift, run_from,
                    run_to, own_from, own_to, seqlen_k, position + row_low, window_left, window_right, scale,
                    softmax_scale, cap, thread,
                )  # fmt: skip

            run_from, run_to = (stop_sinks, top_diagonal) if phase == 0 else (end_diagonal, top_end)
            own_from, own_to = (own_stop_sinks, own_diagonal) if phase == 0 else (own_end_diagonal, own_end)
            if quantized and not by_codes and run_from < run_to:
                k_first = (i64(kv_head) * i64(padded) + i64(k_source)) * i64(2 * head_dim)
                run_widened(
                    acc_o, row_max, row_sum, smem, pool, deltas, q, q_row * i64(2 * head_dim), i64(2 * head_dim), rows, k,
                    k_first, i64(2 * head_dim), vt, k_first, i64(2 * head_dim), delta,
                    delta_first + i64(k_padded), delta_step, shift, q_row, has_shift,
                    run_from, run_to, own_from, own_to, seqlen_k, position + row_low, window_left, window_right, scale,
                    softmax_scale, cap, thread,
                )  # fmt: skip

            if quantized and by_codes and run_from < run_to:
                cuda.syncthreads()
                first = i32(k_padded + run_from * i32(TILE_N))
                begin_codes(codes_at, i64(kv_head), delta_first, first, padded, thread)
                load_codes(pool, deltas, k, sfk, vt, sfv, delta, codes_at, padded, thread)
                commit()
                if legacy and windows:
                    enter_units(acc_o[0], sfv, sfv_row, thread_in_group)
                if nvfp4_p:
                    begin_nvfp4(origin, row_max[0])
                stage = u32(pool)
                tile = i32(run_from)
                while tile < run_to:  # range() would count in 64 bits
                    other = u32(two_stages - stage)
                    next_codes(codes_at)
                    wait_0()
                    cuda.syncthreads()  # this tile's codes are there, and nobody reads the tile before
                    if i32(tile + i32(1)) < run_to:
                        load_codes(other, other + u32(deltas_at), k, sfk, vt, sfv, delta, codes_at, padded, thread)
                    commit()

                    if has_delta and not legacy:
                        load_delta(acc_s, stage + u32(deltas_at), thread_in_group)
                    else:
                        for t in unroll(n_tiles):
                            clear(acc_s[t])
                    if legacy:
                        qk_rows(acc_s, a, sfa, stage, stage + u32(deltas_at), lane)
                    else:
                        qk_codes(acc_s, a, sfa, stage, lane)
                    if general:
                        general_scores(acc_s, shifted, softmax_scale, cap)
                    if u32(tile - full_from) >= n_full:
                        row_position, first_n = i32(position + row_low), i32(tile * i32(TILE_N))
                        mask(acc_s, row_position, window_left, window_right, seqlen_k, first_n, thread_in_group)
                    finish(acc_s, acc_o[0], row_max[0], origin, row_sum[0], scale, sfp, stage, lane)
                    stage = other
                    tile = i32(tile + i32(1))
                if legacy:
                    leave_units(acc_o[0], sfv, sfv_row, thread_in_group)

        for m in unroll(m_tiles):
            for side in unroll(2):
                row = i32(row_low + i32(16 * m + 8 * side))
                total = acc_o[m, all_tiles - 1, 2 * side] if rounded else quad_sum(row_sum[m, side])
                # a row that sees no key has no P but a sum of zero; a NaN goes its way
                log_sum = (row_max[m, side] + lg2(total) - f32(bias)) * f32(1 / log2e)
                if total == f32(0):
                    log_sum = f32(-np.inf)
                # with a softcap the shift is in the scores
                if (not general or cap == f32(0)) and has_shift != i32(0) and row < rows:
                    log_sum = fma(shift[q_row + i64(row)], softmax_scale, log_sum)
                factor = f32(0) if total == f32(0) else f32(1) / total
                if has_sinks != i32(0):
                    sink = sinks[head_q]
                    most = max_f32(log_sum, sink)
                    if most > f32(-np.inf):
                        both = ex2((log_sum - most) * f32(log2e)) + ex2((sink - most) * f32(log2e))
                        with_sink = most + lg2(both) * f32(1 / log2e)
                        factor = factor * ex2((log_sum - with_sink) * f32(log2e))
                        log_sum = with_sink
                if row < rows:
                    if has_lse != i32(0) and thread_in_group == i32(0):
                        lse[q_row + i64(row)] = log_sum
                    at = i64(batch) * out_b + i64(head_q) * out_h + i64(first_row + row) * out_t
                    if side == 0:
                        store_low(out, at + i64(2 * thread_in_group), acc_o[m], factor)
                    else:
                        store_high(out, at + i64(2 * thread_in_group), acc_o[m], factor)

    return prefill


def _signature(dtype: str) -> tuple[str, ...]:
    """Types of: out, lse; q, sfq, k, sfk, vt, sfv, q16, k16, v16, delta as bytes; shift, sinks; blocks; 3 flags; strides of
    out, q16, k16, v16 in elements; seqlen_q ... n_sequences; softmax_scale, cap."""
    out = "f32*" if dtype == "float32" else "u32*"
    arrays = (out, "f32*", *("u8*",) * 10, *("f32*",) * 2, "i32*")
    return (*arrays, *("i32",) * 3, *("i64",) * 12, *("i32",) * 13, "f32", "f32")


@functools.cache
def prefill_kernel(
    implementation: str,
    head_dim: int,
    dtype: str = "float16",
    quantized: bool = True,
    windows: bool = False,
    pv: str = "f16",
    rounded: bool = False,
    general: bool = False,
    has_delta: bool = False,
) -> Kernel:
    """The kernel for these constants, see ``make_prefill``."""
    constants = {
        "implementation": implementation, "head_dim": head_dim, "dtype": dtype, "quantized": quantized, "windows": windows,
        "pv": pv, "rounded": rounded, "general": general, "has_delta": has_delta,
    }  # fmt: skip
    bounds = (THREADS, CTAS_PER_SM) if implementation == "dequant" else (THREADS,)
    return Kernel(make_prefill, _signature(dtype), constants, launch_bounds=bounds)


def kernel_for(problem: Problem, recipe: Recipe, implementation: str) -> Kernel:
    """The kernel that runs ``problem`` by ``recipe``."""
    return prefill_kernel(
        implementation,
        problem.head_dim,
        problem.dtype,
        recipe.is_quantized,
        recipe.has_windows or not recipe.is_quantized,
        recipe.pv,
        recipe.row_sum == "rounded",
        problem.softcap is not None or problem.softmax_scale <= 0,
        recipe.smooth_q is not None,
    )


def _q_bytes(implementation: str, head_dim: int, windows: bool) -> int:
    needed = windows or implementation == "dequant"
    return rows_of_cta(implementation, head_dim) * row_pitch(head_dim) if needed else 0


def _nvfp4_bytes(implementation: str, head_dim: int) -> int:
    """A stage of codes; or a tile of K and V as f16."""
    if implementation == "dequant":
        return 2 * TILE_N * row_pitch(head_dim)
    return Stage(head_dim, implementation == "legacy").bytes


def shared_bytes(implementation: str, head_dim: int, quantized: bool, windows: bool) -> int:
    """Dynamic shared memory of a CTA, in bytes."""
    # two stages of codes, each with its deltas behind it; or K, V, and the deltas of each block of queries
    copies = 1 if implementation == "dequant" else 2
    deltas = DELTA_BYTES * m_tiles_of(implementation, head_dim)
    nvfp4, rows = copies * (_nvfp4_bytes(implementation, head_dim) + deltas), 2 * TILE_N * row_pitch(head_dim)
    return _q_bytes(implementation, head_dim, windows) + max(nvfp4 if quantized else 0, rows if windows else 0)


def why_not(problem: Problem, recipe: Recipe, implementation: str, target: Target) -> str | None:
    """Why ``implementation`` cannot run ``problem`` by ``recipe`` on ``target``, in words; None where it can."""
    if implementation != "dequant" and not target.has_block_scale_mma:
        mma = "f8f6f4" if implementation == "legacy" else "the block-scale MMA"
        return f"{mma} needs sm_120a or sm_121a, this is {target}"
    if problem.head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {problem.head_dim}; pad the last axis"
    if problem.dtype not in FLOAT_DTYPES:
        return f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {problem.dtype}"
    if implementation == "legacy" and recipe.scale_per != "row":
        return "legacy runs recipes with scale_per='row', such as recipe='legacy'"
    if implementation != "legacy" and recipe.scale_per == "row":
        return "scale_per='row' runs by 'legacy' alone, got one; scale_per='block' has a scale for 16 elements"
    if (recipe.qk == "nvfp4") != (recipe.v_format == "nvfp4"):
        return f"kernels have qk and v_format both in NVFP4 or both in 16 bits, got {recipe.qk} and {recipe.v_format}"
    if recipe.is_quantized and recipe.v_axis != "tokens":
        return f"kernels have V's scales along tokens, got v_axis={recipe.v_axis!r}"
    windows = recipe.has_windows or not recipe.is_quantized
    needed = shared_bytes(implementation, problem.head_dim, recipe.is_quantized, windows)
    if needed > shared_limit(target.name):
        return f"needs {needed} bytes of shared memory a CTA, {target} has {shared_limit(target.name)}"
    return None


def prefill(
    operands: Operands, problem: Problem, recipe: Recipe, *, implementation: str, out: View, lse: Any = None
) -> None:
    """One forward pass, queued where the operands lie, on the current stream there.

    A row that sees no key becomes 0 with an LSE of -inf, or the sink's logit.

    Args:
        operands: what ``prepass.prepare`` made of this problem and recipe. implementation: of ``IMPLEMENTATIONS``.
        out: (batch, num_heads_q, seqlen_q, head_dim) of problem.dtype, filled; even strides, 4-byte aligned.
        lse: float32 (batch * num_heads_q, seqlen_q), contiguous, filled with natural logarithms; or None.

    Raises ``ValueError`` for more than 2^31 - 1 blocks of 64 queries.
    """
    heads_q, n_blocks = problem.batch * problem.num_heads_q, operands.blocks.shape[0]
    ctas = heads_q * n_blocks
    if not ctas:
        return
    if ctas > 2**31 - 1:
        raise ValueError(message("q", "small enough for 2^31 - 1 blocks of 64 queries", ctas, "split the batch"))
    windows = recipe.has_windows or not recipe.is_quantized
    views = (operands.q16, operands.k16, operands.v16)
    if implementation != "dequant":
        codes = (operands.q, operands.sfq, operands.k, operands.sfk, operands.vt, operands.sfv)
    else:
        codes = (operands.q_values, None, operands.k_values, None, operands.v_values, None)
    optional = (operands.delta, operands.shift, operands.sinks)
    left, right = problem.limits
    diagonal = -1 if recipe.diagonal_tiles is None else min(recipe.diagonal_tiles, NO_LIMIT >> 6)
    arguments = (
        out.array,
        *(0 if array is None else array for array in (lse, *codes)),
        *(0 if view is None else view.array for view in views),
        *(0 if array is None else array for array in optional),
        operands.blocks,
        *(int(array is not None) for array in (lse, operands.shift, operands.sinks)),
        *out.strides,
        *(stride for view in views for stride in ((0, 0, 0) if view is None else view.strides)),
        problem.seqlen_q,
        0 if codes[2] is None else codes[2].shape[1],
        n_blocks,
        0 if operands.delta is None else operands.delta.shape[1] // TILE_N,
        int(recipe.smooth_q == TILE_M),
        problem.num_heads_q,
        problem.qhead_per_kvhead,
        left,
        right,
        min(recipe.sink_tokens, NO_LIMIT) // TILE_N,
        diagonal,
        1 if diagonal < 0 else 2,
        operands.sfv.shape[1] if recipe.scale_per == "row" else 0,
        problem.softmax_scale,
        problem.softcap or 0.0,
    )
    smem_bytes = shared_bytes(implementation, problem.head_dim, recipe.is_quantized, windows)
    kernel = kernel_for(problem, recipe, implementation)
    gpu_arrays.launch(kernel, (ctas,), (THREADS,), arguments, smem_bytes)
