"""Forward attention: tiles, online softmax and both matrix products of one CTA, for every recipe that kernels take.

    S = (Q K^T [+ corrections]) softmax_scale,  O = softmax(S) V,  LSE = log sum exp(S) [+ shift]

CTA: 4 warps, 64 queries of one head; warp w has queries [16 w, 16 w + 16) and all 64 keys of a tile. Tiles come in
ascending order, in up to four runs: 16 bits (sinks), NVFP4, 16 bits (diagonal), NVFP4.

==============  ====================================================================================================
FP4 tile        codes and scales by ``cp.async`` to shared memory (:mod:`tile_codes`). ``blockscale``, ``legacy``: two
                stages, the MMA reads codes (:mod:`tile_blockscale`, :mod:`tile_legacy`). ``dequant``: one stage, which
                the CTA widens to f16 in shared memory, then ``ldmatrix`` and ``mma.m16n8k16`` (:mod:`tile_dequant`,
                :mod:`tile_16bit`)
16-bit tile     rows of k16 and v16 by ``cp.async``, ``ldmatrix``, ``mma.m16n8k16`` in the call's format
acc_S, acc_O    f32 registers; acc_S starts from ``delta`` (NVFP4, Q smoothing) or ``-shift`` (16 bits, K smoothing);
                ``legacy`` adds ``delta`` after the scales, and has acc_O in units of V's scales over FP4 tiles
P               f32 to f16 (or bf16 in 16-bit tiles), to NVFP4 or E4M3 after a factor (``P_SCALE``); no shuffle moves P
==============  ====================================================================================================

smem, dynamic: 64 rows of Q in 16 bits (``dequant`` or windows), then the larger of what the two kinds of tile need; see
``shared_bytes``. ``blockscale`` and ``legacy`` need sm_120a, ``dequant`` sm_80: one source, the tile functions differ.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from nbfmha import gpu_arrays
from nbfmha.kernels.operands import HEAD_DIMS, Operands
from nbfmha.kernels.tile_16bit import THREADS, TRANSPOSED_PITCH, row_pitch
from nbfmha.kernels.tile_codes import DELTA_BYTES, Stage
from nbfmha.problem import Problem
from nbfmha.recipe import P_SCALE, TILE_N, Recipe
from nbfmha.tiles import TILE_M, View
from nbfmha.validation import FLOAT_DTYPES, message
from ptx_inline.isa.shared_memory import shared_limit
from ptx_inline.toolchain import Kernel, Target

IMPLEMENTATIONS = ("blockscale", "legacy", "dequant")
#: CTAs that ptxas makes room for with ``dequant``: measured on an H100, more of them win over a few spilled registers.
CTAS_PER_SM = {64: 4, 96: 3, 128: 3, 256: 1}
NO_LIMIT = 1 << 30  # of a window's side


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

    from nbfmha.kernels import softmax, tile_16bit, tile_blockscale, tile_codes, tile_dequant, tile_legacy
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
    k_steps, o_tiles, n_tiles = Stage(head_dim).k_steps, head_dim // 8, TILE_N // 8
    scale_words, all_tiles = 2 if legacy else (k_steps + 1) // 2, o_tiles + rounded
    stage_bytes, q_bytes = Stage(head_dim, legacy).bytes, _q_bytes(implementation, head_dim, windows)
    rows_bytes, codes_bytes = TILE_N * row_pitch(head_dim), _codes_bytes(implementation, head_dim)
    bias = math.log2(P_SCALE[pv])
    log2e = 1.4426950408889634
    sixteen = "bfloat16" if dtype == "bfloat16" else "float16"

    load_rows, qk_16 = tile_16bit.make_load_rows(head_dim), tile_16bit.make_qk(head_dim, sixteen)
    pv_16 = tile_16bit.make_pv(head_dim, sixteen, False, rounded)
    load_codes = tile_codes.make_load_codes(head_dim, has_delta, legacy)
    load_q, qk_codes = (tile_legacy if legacy else tile_blockscale).make_load_q(head_dim), tile_blockscale.make_qk(head_dim)
    qk_rows, pv_e4m3 = tile_legacy.make_qk(head_dim, has_delta), tile_legacy.make_pv(head_dim, rounded)
    enter_units, leave_units = tile_legacy.make_units(head_dim)
    pv_codes_f16, pv_codes_nvfp4 = tile_blockscale.make_pv_f16(head_dim), tile_blockscale.make_pv_nvfp4(head_dim, rounded)
    widen_q, widen_kv = tile_dequant.make_widen_q(head_dim), tile_dequant.make_widen_kv(head_dim)
    qk_wide = tile_16bit.make_qk(head_dim, "float16")
    pv_wide = tile_16bit.make_pv(head_dim, "float16", True, rounded)
    round_p = tile_dequant.make_round_p()
    order = "stored" if by_codes else "widened"
    mask_16, mask_4 = softmax.make_mask("rows"), softmax.make_mask(order)
    step, step_nvfp4 = softmax.make_step(all_tiles, bias), softmax.make_step_nvfp4(all_tiles, order, bias)
    load_delta = tile_codes.make_load_delta(order)
    general_scores = softmax.make_general_scores()

    # what follows the scores of an NVFP4 tile: softmax and P V. Numba types every branch, so each variant is its function
    if legacy:

        @cuda.jit(device=True, forceinline=True)
        def finish_4(acc_s, acc_o, row_max, row_sum, scale, sfp, stage, lane):
            step(acc_s, acc_o, row_max, row_sum, scale)
            pv_e4m3(acc_o, acc_s, stage, lane)

    elif nvfp4_p and by_codes:

        @cuda.jit(device=True, forceinline=True)
        def finish_4(acc_s, acc_o, row_max, row_sum, scale, sfp, stage, lane):
            step_nvfp4(acc_s, acc_o, row_max, row_sum, scale, sfp)
            pv_codes_nvfp4(acc_o, acc_s, sfp, stage, lane)

    elif nvfp4_p:

        @cuda.jit(device=True, forceinline=True)
        def finish_4(acc_s, acc_o, row_max, row_sum, scale, sfp, stage, lane):
            step_nvfp4(acc_s, acc_o, row_max, row_sum, scale, sfp)
            round_p(acc_s, sfp)
            pv_wide(acc_o, acc_s, stage + u32(stage_bytes + rows_bytes), lane)

    elif by_codes:

        @cuda.jit(device=True, forceinline=True)
        def finish_4(acc_s, acc_o, row_max, row_sum, scale, sfp, stage, lane):
            step(acc_s, acc_o, row_max, row_sum, scale)
            pv_codes_f16(acc_o, acc_s, stage, lane)

    else:

        @cuda.jit(device=True, forceinline=True)
        def finish_4(acc_s, acc_o, row_max, row_sum, scale, sfp, stage, lane):
            step(acc_s, acc_o, row_max, row_sum, scale)
            pv_wide(acc_o, acc_s, stage + u32(stage_bytes + rows_bytes), lane)

    @cuda.jit(device=True, forceinline=True)
    def quad_sum(x):
        x = x + bfly(x, u32(1))
        return x + bfly(x, u32(2))

    @unrolled
    def prefill(
        out, lse, q, sfq, k, sfk, vt, sfv, q16, k16, v16, delta, shift, sinks, blocks, has_lse, has_shift,
        has_sinks, out_b, out_h, out_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, seqlen_q, padded, n_blocks, n_means,
        num_heads_q, qhead_per_kvhead, window_left, window_right, sink_tiles, diagonal_tiles, phases, n_sequences,
        softmax_scale, cap,
    ):  # fmt: skip
        smem = to_shared(ffi.from_buffer(cuda.shared.array(0, u32)))
        pool = smem + u32(q_bytes)
        deltas = pool + u32(codes_bytes)
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
        seqlen_k, mean_block = blocks[8 * block + 5], blocks[8 * block + 6]
        rows = i32(stop_row - first_row)
        row_low = i32(warp * i32(16) + group_id)
        q_row = i64(head) * i64(seqlen_q) + i64(first_row)
        delta_row = i64(head) * i64(n_means) + i64(mean_block)
        sfv_row = i64(kv_head) * i64(n_sequences) + i64(blocks[8 * block + 7])

        # tiles [begin, stop_sinks) in 16 bits, [.., diagonal) in NVFP4, [diagonal, end_diagonal) in 16 bits, the rest NVFP4
        last = i32(position + rows - i32(1))
        begin = i32(max(position - window_left, i32(0)) >> i32(6))
        end = i32(max((min(last + window_right + i32(1), seqlen_k) + i32(TILE_N - 1)) >> i32(6), begin))
        stop_sinks = i32(max(min(sink_tiles, end), begin))
        diagonal, end_diagonal = end, end
        if diagonal_tiles >= i32(0):
            diagonal = i32(max(min((position >> i32(6)) - diagonal_tiles, end), stop_sinks))
            end_diagonal = i32(max(min((last >> i32(6)) + diagonal_tiles + i32(1), end), diagonal))
        if not quantized:
            stop_sinks, diagonal, end_diagonal = end, end, end
        # tiles from full_from up to full_to are seen by every row as a whole
        full_from = i32(max(last - window_left, i32(0)))
        full_to = i32(min(position + window_right + i32(1), seqlen_k))

        acc_o = cuda.local.array((all_tiles, 4), f32)
        for t in unroll(all_tiles):
            for r in unroll(4):
                acc_o[t, r] = f32(0)
        row_max = cuda.local.array(2, f32)
        row_sum = cuda.local.array(2, f32)
        key_first = cuda.local.array(2, i32)
        key_stop = cuda.local.array(2, i32)
        shifted = cuda.local.array(2, f32)
        for side in unroll(2):
            row = i32(row_low + i32(8 * side))
            key_first[side] = max(position + row - window_left, i32(0))
            key_stop[side] = min(position + row + window_right + i32(1), seqlen_k)
            row_max[side] = f32(-np.inf)
            row_sum[side] = f32(0)
            shifted[side] = f32(0)
            if has_shift != i32(0) and row < rows:
                shifted[side] = shift[q_row + i64(row)]
        scale = f32(1) if general else softmax_scale * f32(log2e)
        acc_s = cuda.local.array((n_tiles, 4), f32)
        a = cuda.local.array((k_steps, 4), u32)
        sfa = cuda.local.array(scale_words, u32)
        sfp = cuda.local.array((2, 1 if by_codes else 2), u32)
        if quantized and by_codes:
            load_q(a, sfa, q, sfq, q_row, rows, row_low, thread_in_group)

        for phase in range(phases):
            run_from, run_to = (begin, stop_sinks) if phase == 0 else (diagonal, end_diagonal)
            if windows and run_from < run_to:
                cuda.syncthreads()  # the other kind of tile is done with shared memory
                q_first = (i64(batch) * q_b + i64(head_q) * q_h + i64(first_row) * q_t) * i64(2)
                k_first = (i64(batch) * k_b + i64(head_kv) * k_h + i64(k_source) * k_t) * i64(2)
                v_first = (i64(batch) * v_b + i64(head_kv) * v_h + i64(k_source) * v_t) * i64(2)
                k_smem, v_smem = pool, pool + u32(rows_bytes)
                load_rows(smem, q16, q_first, q_t * i64(2), rows, thread)
                k_tile = k_first + i64(run_from * i32(TILE_N)) * k_t * i64(2)
                load_rows(k_smem, k16, k_tile, k_t * i64(2), i32(seqlen_k - run_from * i32(TILE_N)), thread)
                commit()
                for tile in range(run_from, run_to):
                    first_n = i32(i32(tile) * i32(TILE_N))
                    wait_0()
                    cuda.syncthreads()  # K is there, and nobody reads the V before
                    v_tile = v_first + i64(first_n) * v_t * i64(2)
                    load_rows(v_smem, v16, v_tile, v_t * i64(2), i32(seqlen_k - first_n), thread)
                    commit()
                    for t in unroll(n_tiles):
                        for r in unroll(4):
                            acc_s[t, r] = -shifted[r // 2]
                    qk_16(acc_s, smem, k_smem, lane, warp)
                    if general:
                        general_scores(acc_s, shifted, softmax_scale, cap)
                    if first_n < full_from or first_n + i32(TILE_N) > full_to:
                        mask_16(acc_s, key_first, key_stop, first_n, thread_in_group)
                    step(acc_s, acc_o, row_max, row_sum, scale)
                    wait_0()
                    cuda.syncthreads()  # V is there, and nobody reads this K any more
                    if tile + 1 < run_to:
                        k_tile = k_first + i64(first_n + i32(TILE_N)) * k_t * i64(2)
                        load_rows(k_smem, k16, k_tile, k_t * i64(2), i32(seqlen_k - first_n - i32(TILE_N)), thread)
                    commit()
                    pv_16(acc_o, acc_s, v_smem, lane)

            run_from, run_to = (stop_sinks, diagonal) if phase == 0 else (end_diagonal, end)
            if quantized and run_from < run_to:
                cuda.syncthreads()
                first = i32(k_padded + run_from * i32(TILE_N))
                load_codes(pool, deltas, k, sfk, vt, sfv, delta, i64(kv_head), delta_row, first, padded, thread)
                commit()
                if legacy and windows:
                    enter_units(acc_o, sfv, sfv_row, thread_in_group)
                if not by_codes:
                    widen_q(smem, q, sfq, q_row, rows, thread)
                for tile in range(run_from, run_to):
                    first_n = i32(i32(tile) * i32(TILE_N))
                    odd = u32((i32(tile) - run_from) & i32(1))
                    this_delta, next_delta = deltas + odd * u32(DELTA_BYTES), deltas + (odd ^ u32(1)) * u32(DELTA_BYTES)
                    stage = pool
                    if by_codes:
                        stage = pool + odd * u32(stage_bytes)
                    wait_0()
                    cuda.syncthreads()  # this tile's codes are there, and nobody reads the tile before
                    if by_codes:
                        other = pool + (odd ^ u32(1)) * u32(stage_bytes)
                    else:
                        widen_kv(stage, pool + u32(stage_bytes), pool + u32(stage_bytes + rows_bytes), thread)
                        cuda.syncthreads()  # f16 is there, the codes are used up
                        other = pool
                    if tile + 1 < run_to:
                        first = i32(k_padded + first_n + i32(TILE_N))
                        load_codes(
                            other, next_delta, k, sfk, vt, sfv, delta, i64(kv_head), delta_row, first, padded, thread
                        )
                    commit()

                    if has_delta and not legacy:
                        load_delta(acc_s, this_delta, thread_in_group)
                    else:
                        for t in unroll(n_tiles):
                            for r in unroll(4):
                                acc_s[t, r] = f32(0)
                    if legacy:
                        qk_rows(acc_s, a, sfa, stage, this_delta, lane)
                    elif by_codes:
                        qk_codes(acc_s, a, sfa, stage, lane)
                    else:
                        qk_wide(acc_s, smem, pool + u32(stage_bytes), lane, warp)
                    if general:
                        general_scores(acc_s, shifted, softmax_scale, cap)
                    if first_n < full_from or first_n + i32(TILE_N) > full_to:
                        mask_4(acc_s, key_first, key_stop, first_n, thread_in_group)
                    finish_4(acc_s, acc_o, row_max, row_sum, scale, sfp, stage, lane)
                if legacy:
                    leave_units(acc_o, sfv, sfv_row, thread_in_group)

        for side in unroll(2):
            row = i32(row_low + i32(8 * side))
            total = acc_o[all_tiles - 1, 2 * side] if rounded else quad_sum(row_sum[side])
            origin = row_max[side] if row_max[side] > f32(-np.inf) else f32(0)
            # a row that sees no key has no P but a sum of zero; a NaN goes its way
            log_sum = f32(-np.inf) if total == f32(0) else (origin + lg2(total) - f32(bias)) * f32(1 / log2e)
            if not general or cap == f32(0):  # with a softcap the shift is in the scores; zero without smoothing
                log_sum = fma(shifted[side], softmax_scale, log_sum)
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
                at = i64(batch) * out_b + i64(head_q) * out_h + i64(first_row + row) * out_t + i64(2 * thread_in_group)
                for t in unroll(o_tiles):
                    even, odd = acc_o[t, 2 * side] * factor, acc_o[t, 2 * side + 1] * factor
                    if dtype == "float32":
                        out[at + i64(8 * t)] = even
                        out[at + i64(8 * t + 1)] = odd
                    else:
                        out[(at >> i64(1)) + i64(4 * t)] = pack(odd, even)

    return prefill


def _signature(dtype: str) -> tuple[str, ...]:
    """Types of: out, lse; q, sfq, k, sfk, vt, sfv, q16, k16, v16, delta as bytes; shift, sinks; blocks; 3 flags; strides of
    out, q16, k16, v16 in elements; seqlen_q ... n_sequences; softmax_scale, cap."""
    out = "f32*" if dtype == "float32" else "u32*"
    arrays = (out, "f32*", *("u8*",) * 10, *("f32*",) * 2, "i32*")
    return (*arrays, *("i32",) * 3, *("i64",) * 12, *("i32",) * 12, "f32", "f32")


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
    bounds = (THREADS, CTAS_PER_SM[head_dim]) if implementation == "dequant" else (THREADS,)
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
    return TILE_M * row_pitch(head_dim) if windows or implementation == "dequant" else 0


def _codes_bytes(implementation: str, head_dim: int) -> int:
    """Two stages of codes; or one, and K and V as f16."""
    stage = Stage(head_dim, implementation == "legacy").bytes
    if implementation != "dequant":
        return 2 * stage
    return stage + TILE_N * row_pitch(head_dim) + head_dim * TRANSPOSED_PITCH


def shared_bytes(implementation: str, head_dim: int, quantized: bool, windows: bool) -> int:
    """Dynamic shared memory of a CTA, in bytes."""
    codes, rows = _codes_bytes(implementation, head_dim) + 2 * DELTA_BYTES, TILE_N * row_pitch(head_dim)
    return _q_bytes(implementation, head_dim, windows) + max(codes if quantized else 0, 2 * rows if windows else 0)


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
    codes = (operands.q, operands.sfq, operands.k, operands.sfk, operands.vt, operands.sfv)
    optional = (operands.delta, operands.shift, operands.sinks)
    left, right = (NO_LIMIT if side is None else min(side, NO_LIMIT) for side in problem.bounds)
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
        0 if operands.k is None else operands.k.shape[1],
        n_blocks,
        1 if operands.delta is None else operands.delta.shape[1],
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
