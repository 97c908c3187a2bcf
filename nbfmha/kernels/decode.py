"""Decode attention: few query tokens of each sequence against its paged NVFP4 cache, split along the tokens.

    S = softmax_scale (Q K^T + q . km),  O = softmax(S) V,  LSE = log sum exp(S)

CTA: one sequence, one head of K and V, one split, one tile of 16 or 32 rows; a row is one query token of one of the heads
that share K and V (:mod:`decode_query`). Every warp has all rows and tiles of 64 tokens of its own, so that each element
of the cache is read and widened once a row tile; the warps' results meet in shared memory at the end. With more than one
split each writes its (out, LSE) in f32 and :mod:`combine` merges them; a split without tokens writes an LSE of -inf.

==============  ====================================================================================================
NVFP4 tile      ``cp.async`` to stages of each warp, the next ones while one is computed; Q K^T by f16 MMAs of widened
                codes (``dequant``) or by the block-scale MMA with Q quantised here (``blockscale``); P V by f16 MMAs of
                widened codes: :mod:`tile_paged`. Tokens [sink_tokens, quantized_tokens)
16-bit tile     sinks and ring, by MMAs in the call's format (:mod:`decode_parts`), all in one split: that in which the
                NVFP4 tiles end, or the one after, since they weigh ``SIXTEEN_WEIGHT`` NVFP4 tiles each
scores          of NVFP4 tiles without q . km, which all tokens of a row share; 16-bit tiles start from -q . km; the LSE,
                and the argument of a softcap, get it back
==============  ====================================================================================================

Lengths, tables and slots are read here, on the device, which divides each sequence: a launch depends on them through the
number of splits alone, and a sequence longer than the host thought makes its splits longer. smem, dynamic: Q as it came, Q
in f16 and the order of the codes (or its codes), q . km, the stages of the warps. ``dequant`` needs sm_80, ``blockscale``
sm_120a. head_dim 64, 128, 256.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbfmha import gpu_arrays
from nbfmha.gpu_arrays import Launch
from nbfmha.kernels.combine import combine
from nbfmha.kernels.decode_parts import LOG2E, result_pitch
from nbfmha.kernels.decode_query import MMA_M
from nbfmha.kernels.tile_16bit import row_pitch
from nbfmha.kernels.tile_paged import UNIT, PagedStage, words_of_lane
from nbfmha.kv_layout import BLOCK, HEAD_DIMS, CacheArrays, CacheLayout
from nbfmha.problem import Problem
from nbfmha.recipe import TILE_N
from ptx_inline.isa.shared_memory import shared_limit
from ptx_inline.toolchain import Kernel, Target

IMPLEMENTATIONS = ("blockscale", "dequant")
WARPS = {64: 4, 128: 4, 256: 2}
"""Of a CTA, by head_dim: as many as the 99 KiB of most GPUs hold the stages of."""
STAGES = {64: 3, 128: 2, 256: 2}
"""Tiles that a warp has in shared memory: one, and those that are on their way."""
SIXTEEN_WEIGHT = 4
"""NVFP4 tiles that a tile of 64 tokens in 16 bits counts as, by its bytes: 16 / 4.5."""
MAX_QUERIES = 16
NO_LIMIT = 1 << 30  # of a window's side


@dataclass(frozen=True)
class ContiguousLayout:
    """Sequences that are one page each, all of it in NVFP4 without a mean, in the words of ``CacheLayout``.

    ``page_size``: tokens of each, a multiple of 16 of any size.
    """

    num_heads_kv: int
    head_dim: int
    page_size: int
    dtype: str
    recent_tokens: int = 0
    sink_tokens: int = 0
    ring_tokens: int = 0

    def quantized_tokens(self, length: int) -> int:
        """All of them."""
        return length


def m_tiles_of(head_dim: int, rows: int) -> int:
    """Tiles of 16 rows that a CTA has, for so many rows of a head of K and V: two halve the work for each element of the
    cache; with head_dim 256 they do not fit the registers."""
    return 2 if rows > MMA_M and head_dim <= 128 else 1


def _stage(implementation: str, head_dim: int, m_tiles: int) -> PagedStage:
    return PagedStage(head_dim, words_of_lane(head_dim, m_tiles) if implementation == "dequant" else 0)


def _q_bytes(implementation: str, head_dim: int, m_tiles: int) -> tuple[int, int]:
    """Of Q as it came, and of Q for the NVFP4 tiles."""
    rows = MMA_M * m_tiles
    codes = rows * (head_dim // 2 + head_dim // BLOCK)
    return rows * row_pitch(head_dim), rows * row_pitch(head_dim) if implementation == "dequant" else codes


def _warp_bytes(implementation: str, head_dim: int, m_tiles: int) -> int:
    stages = STAGES[head_dim] * _stage(implementation, head_dim, m_tiles).bytes
    return max(stages, TILE_N * row_pitch(head_dim), MMA_M * m_tiles * result_pitch(head_dim))


def shared_bytes(implementation: str, head_dim: int, m_tiles: int) -> int:
    """Dynamic shared memory of a CTA, in bytes."""
    fixed = sum(_q_bytes(implementation, head_dim, m_tiles)) + 4 * MMA_M * m_tiles
    return fixed + WARPS[head_dim] * _warp_bytes(implementation, head_dim, m_tiles)


def make_decode(implementation: str, head_dim: int, dtype: str, m_tiles: int, general: bool, whole: bool):
    """Kernel ``decode(out, ...)``: arguments as ``SIGNATURE`` lists them.

    general: scores need more than one positive factor (softcap, or softmax_scale <= 0). whole: pages of whole tiles.
    """
    import numpy as np
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import decode_parts, decode_query, softmax, tile_16bit, tile_paged
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi, commit, to_shared = dev.ffi, dev.cp_async_commit_group, dev.cvta_to_shared_u32
    load_shared, float_of = dev.ld_shared_u32, dev.mov_f32_b32
    wait = {2: dev.cp_async_wait_group_1, 3: dev.cp_async_wait_group_2}[STAGES[head_dim]]
    blockscale = implementation == "blockscale"
    warps, stages, stage_of = WARPS[head_dim], STAGES[head_dim], _stage(implementation, head_dim, m_tiles)
    threads, stage_bytes = 32 * warps, stage_of.bytes
    cta_rows, o_tiles, n_tiles, k_steps = MMA_M * m_tiles, head_dim // 8, TILE_N // 8, head_dim // 64
    plain_bytes, quantised_bytes = _q_bytes(implementation, head_dim, m_tiles)
    warp_bytes, stats_bytes = _warp_bytes(implementation, head_dim, m_tiles), 8 * cta_rows
    chunks, codes_bytes = head_dim // 4, cta_rows * head_dim // 2
    scale_words, pv_steps = (k_steps + 1) // 2, TILE_N // 16
    k_unit = 1.0 if blockscale else UNIT

    make = functools.cache(lambda factory, *constants: factory(*constants))
    load_queries = decode_query.make_load_queries(head_dim, dtype, m_tiles, threads, not blockscale)
    load_tile = tile_paged.make_load_tile(stage_of, whole)
    pack = make(tile_16bit.make_pack, "float16", m_tiles)
    pv, mask = tile_paged.make_pv(stage_of, m_tiles), softmax.make_mask_ranges("widened")
    general_scores, step = make(softmax.make_general_scores), make(softmax.make_step, o_tiles, 0.0)
    run_sixteen = decode_parts.make_run_sixteen(make, head_dim, dtype, m_tiles, general)
    store_result = decode_parts.make_store_result(head_dim, m_tiles)
    merge_warps = decode_parts.make_merge_warps(head_dim, dtype, warps)

    # Q K^T of a tile, and Q as it reads it. Numba types every branch, so each implementation is its functions
    if blockscale:
        quantize_queries, load_fragments = decode_query.make_quantize_queries(head_dim, dtype, m_tiles, threads)
        qk_codes = tile_paged.make_qk_codes(stage_of, m_tiles)

        @cuda.jit(device=True, forceinline=True)
        def prepare_q(a, sfa, plain, own_q, thread):
            quantize_queries(plain, own_q, own_q + u32(codes_bytes), thread)
            cuda.syncthreads()
            load_fragments(a, sfa, own_q, own_q + u32(codes_bytes), i32(thread & i32(31)))

        @cuda.jit(device=True, forceinline=True)
        def scores(acc_s, a, sfa, own_q, stage, lane):
            qk_codes(acc_s, a, sfa, stage, lane)

    else:
        qk_widened = tile_paged.make_qk_widened(stage_of, m_tiles)

        @cuda.jit(device=True, forceinline=True)
        def prepare_q(a, sfa, plain, own_q, thread):
            pass

        @cuda.jit(device=True, forceinline=True)
        def scores(acc_s, a, sfa, own_q, stage, lane):
            qk_widened(acc_s, own_q, stage, lane)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def clear(acc):
        for r in unroll(4):
            acc[r] = f32(0)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def enlarge(acc):
        for r in unroll(4):
            acc[r] = acc[r] * f32(UNIT)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def compute_tile(
        acc_o, row_max, row_sum, acc_s, p, a, sfa, own_q, stage, first_n, full_low, full_high, begin, stop, low, high,
        shifted, scale, softmax_scale, cap, lane,
    ):  # fmt: skip
        thread_in_group = i32(lane & i32(3))
        for m in unroll(m_tiles):
            for t in unroll(n_tiles):
                clear(acc_s[m, t])
        scores(acc_s, a, sfa, own_q, stage, lane)
        for m in unroll(m_tiles):
            if general:
                general_scores(acc_s[m], shifted[m], softmax_scale, cap)
            if first_n < full_low or i32(first_n + i32(TILE_N)) > full_high:
                mask(acc_s[m], low[m], high[m], first_n, thread_in_group)
            step(acc_s[m], acc_o[m], row_max[m], row_sum[m], scale)
        pack(p, acc_s)
        block = i32(first_n + i32(BLOCK) * thread_in_group)
        pv(acc_o, p, stage, block >= begin and block < stop, lane)

    @unrolled
    def decode(
        out, lse, part, part_lse, q, k_codes, k_scales, v_codes, v_scales, k_recent, v_recent, k_sinks, v_sinks, k_mean,
        lengths, tables, seq_ids, sinks, has_lse, has_sinks, paged, has_lengths, batch_size, num_splits, split_tiles,
        row_tiles, q_len, num_heads_kv, group, page_size, table_width, recent_tokens, sink_tokens, window_left,
        softmax_scale, cap,
    ):  # fmt: skip
        plain = to_shared(ffi.from_buffer(cuda.shared.array(0, u32)))
        own_q = plain + u32(plain_bytes)
        shifts = own_q + u32(quantised_bytes)
        pool = shifts + u32(4 * cta_rows)
        stats = plain  # when all warps are done with Q
        thread = i32(cuda.threadIdx.x)
        lane, warp = i32(thread & i32(31)), i32(thread >> i32(5))
        group_id = i32(lane >> i32(2))
        stage_first = pool + u32(warp_bytes) * u32(warp)

        cta = u32(cuda.blockIdx.x)
        split, rest = i32(cta % u32(num_splits)), cta // u32(num_splits)
        row_tile, rest = i32(rest % u32(row_tiles)), rest // u32(row_tiles)
        kv_head, batch = i32(rest % u32(num_heads_kv)), i32(rest // u32(num_heads_kv))
        first_row, rows = i32(row_tile * i32(cta_rows)), i32(q_len * group)
        slot, length, table_at = batch, page_size, i64(-1) - i64(batch)
        if paged != i32(0):
            slot = i32(seq_ids[batch])
            table_at = i64(slot) * i64(table_width)
        if has_lengths != i32(0):
            length = i32(lengths[slot])
        heads = i32(num_heads_kv * group)
        all_rows = i64(batch_size) * i64(q_len) * i64(heads)

        # tokens of this tile of rows: in 16 bits [.., sink_stop) and [ring_first, length), in NVFP4 [begin, stop)
        position = i32(length - q_len)
        first_position = i32(position + i32(u32(first_row) // u32(group)))
        seen_from = i32(max(first_position - window_left, i32(0)))
        stop = i32(max(length - recent_tokens, i32(0)))
        if recent_tokens > i32(0):
            stop &= i32(-BLOCK)
        begin = i32(max(seen_from, sink_tokens) & i32(-TILE_N))
        tiles = i32(max(stop - max(begin, sink_tokens), i32(0)))
        tiles = i32((stop - begin + i32(TILE_N - 1)) >> i32(6)) if tiles > i32(0) else i32(0)
        sink_stop = i32(min(sink_tokens, length))
        sink_tiles = i32((sink_stop + i32(TILE_N - 1)) >> i32(6)) if seen_from < sink_stop else i32(0)
        ring_first = i32(max(max(stop, sink_stop), seen_from))
        ring_tiles = i32((max(length - ring_first, i32(0)) + i32(TILE_N - 1)) >> i32(6))
        weight = i32(i32(SIXTEEN_WEIGHT) * (sink_tiles + ring_tiles))
        share = i32(max(split_tiles, i32(u32(tiles + weight + num_splits - i32(1)) // u32(num_splits))))
        own_from = i32(min(split * share, tiles))
        own_to = i32(min(own_from + share, tiles))
        sixteen_split = i32(min(i32(u32(tiles + max(weight, i32(1)) - i32(1)) // u32(share)), num_splits - i32(1)))
        sixteen_tiles = i32(sink_tiles + ring_tiles) if split == sixteen_split else i32(0)
        partial = num_splits > i32(1)
        if partial and own_from == own_to and sixteen_tiles == i32(0):
            row = i32(first_row + thread)
            if thread < i32(cta_rows) and row < rows:
                token = i32(u32(row) // u32(group))
                at = (i64(batch) * i64(q_len) + i64(token)) * i64(heads) + i64(i32(kv_head * group + row - token * group))
                part_lse[i64(split) * all_rows + at] = f32(-np.inf)
            return

        # the first tiles come while Q is prepared
        tile = i32(own_from + warp)
        for s in unroll(stages - 1):
            ahead = i32(tile + i32(warps * s))
            if ahead < own_to:
                load_tile(
                    stage_first + u32(stage_bytes * s), k_codes, k_scales, v_codes, v_scales, tables, table_at, kv_head,
                    num_heads_kv, page_size, i32(begin + ahead * i32(TILE_N)), stop, lane,
                )  # fmt: skip
            commit()
        load_queries(
            plain, own_q, shifts, q, k_mean, paged, batch, kv_head, num_heads_kv, slot, first_row, rows, group, q_len,
            thread,
        )
        a = cuda.local.array((m_tiles, k_steps, 4), u32)
        sfa = cuda.local.array((m_tiles, scale_words), u32)
        cuda.syncthreads()
        prepare_q(a, sfa, plain, own_q, thread)

        acc_o = cuda.local.array((m_tiles, o_tiles, 4), f32)
        acc_s = cuda.local.array((m_tiles, n_tiles, 4), f32)
        p = cuda.local.array((m_tiles, pv_steps, 4), u32)
        row_max = cuda.local.array((m_tiles, 2), f32)
        row_sum = cuda.local.array((m_tiles, 2), f32)
        low = cuda.local.array((m_tiles, 2), i32)
        high = cuda.local.array((m_tiles, 2), i32)
        shifted = cuda.local.array((m_tiles, 2), f32)
        for m in unroll(m_tiles):
            for t in unroll(o_tiles):
                clear(acc_o[m, t])
            for side in unroll(2):
                row_max[m, side] = f32(softmax.LOWEST)
                row_sum[m, side] = f32(0)
                row = i32(group_id + i32(16 * m + 8 * side))
                own = i32(position + i32(u32(first_row + row) // u32(group)))
                low[m, side] = i32(max(own - window_left, sink_tokens))
                high[m, side] = i32(min(own + i32(1), stop))
                shifted[m, side] = float_of(load_shared(shifts + u32(4) * u32(row))) * f32(1 / k_unit)
        scale = f32(1) if general else softmax_scale * f32(LOG2E * k_unit)
        # tiles within these are seen by every row as a whole
        full_low = i32(max(length - i32(1) - window_left, sink_tokens))
        full_high = i32(min(first_position + i32(1), stop))

        stage, before = stage_first, stage_first + u32(stage_bytes * (stages - 1))
        while tile < own_to:
            cuda.syncwarp()  # nobody reads the tile before any more
            ahead = i32(tile + i32(warps * (stages - 1)))
            if ahead < own_to:
                load_tile(
                    before, k_codes, k_scales, v_codes, v_scales, tables, table_at, kv_head, num_heads_kv, page_size,
                    i32(begin + ahead * i32(TILE_N)), stop, lane,
                )  # fmt: skip
            commit()
            wait()
            cuda.syncwarp()
            compute_tile(
                acc_o, row_max, row_sum, acc_s, p, a, sfa, own_q, stage, i32(begin + tile * i32(TILE_N)), full_low,
                full_high, sink_tokens, stop, low, high, shifted, scale, softmax_scale * f32(k_unit), cap, lane,
            )  # fmt: skip
            before = stage
            stage += u32(stage_bytes)
            if stage == stage_first + u32(stage_bytes * stages):
                stage = stage_first
            tile = i32(tile + i32(warps))
        for m in unroll(m_tiles):
            for t in unroll(o_tiles):
                enlarge(acc_o[m, t])

        scale = f32(1) if general else softmax_scale * f32(LOG2E)
        tile = i32(warp)
        while tile < sixteen_tiles:
            is_sink = tile < sink_tiles
            first_n = i32(tile * i32(TILE_N)) if is_sink else i32(ring_first + (tile - sink_tiles) * i32(TILE_N))
            run_stop = sink_stop if is_sink else length
            ring = i32(recent_tokens + i32(BLOCK))
            place = i32(u32(first_n) % u32(ring))
            if is_sink:
                ring = i32(max(sink_tokens, i32(1)))
                place = first_n
            base = (i64(slot) * i64(num_heads_kv) + i64(kv_head)) * i64(ring) * i64(head_dim)
            for m in unroll(m_tiles):
                for side in unroll(2):
                    row = i32(group_id + i32(16 * m + 8 * side))
                    own = i32(position + i32(u32(first_row + row) // u32(group)))
                    low[m, side] = i32(max(own - window_left, i32(0)))
                    high[m, side] = i32(min(own + i32(1), run_stop))
                    shifted[m, side] = float_of(load_shared(shifts + u32(4) * u32(row)))
            run_sixteen(
                acc_o, row_max, row_sum, acc_s, p, plain, stage_first, k_sinks if is_sink else k_recent,
                v_sinks if is_sink else v_recent, base, ring, place, first_n, i32(min(run_stop - first_n, i32(TILE_N))),
                low, high, shifted, scale, softmax_scale, cap, lane,
            )  # fmt: skip
            tile = i32(tile + i32(warps))

        cuda.syncthreads()  # the results take the place of Q and of the tiles
        store_result(stage_first, stats + u32(stats_bytes) * u32(warp), acc_o, row_max, row_sum, lane)
        cuda.syncthreads()
        for i in range(thread, cta_rows * chunks, threads):
            row, chunk = i32(u32(i) // u32(chunks)), i32(u32(i) % u32(chunks))
            query = i32(first_row + row)
            if query < rows:
                token = i32(u32(query) // u32(group))
                head = i32(kv_head * group + query - token * group)
                at = (i64(batch) * i64(q_len) + i64(token)) * i64(heads) + i64(head)
                shift2 = f32(0)
                if not general or cap == f32(0):  # with a softcap the shift is in the scores
                    shift2 = float_of(load_shared(shifts + u32(4) * u32(row))) * softmax_scale * f32(LOG2E)
                sink2 = f32(0)
                has_sink = has_sinks != i32(0) and not partial
                if has_sink:
                    sink2 = sinks[head] * f32(LOG2E)
                lse_row = i64(split) * all_rows + at
                if not partial:
                    lse_row = (i64(batch) * i64(heads) + i64(head)) * i64(q_len) + i64(token)
                merge_warps(
                    part if partial else out, part_lse if partial else lse, pool, u32(warp_bytes), stats,
                    u32(stats_bytes), row, chunk, i64(split) * all_rows + at, lse_row, shift2, has_sink, sink2,
                    partial or has_lse != i32(0), partial,
                )  # fmt: skip

    return decode


#: Types of: out, lse; part, part_lse; q; the arrays of ``CacheArrays`` up to v_sinks as bytes; k_mean; lengths, tables,
#: seq_ids; sinks; 4 flags; batch_size ... window_left; softmax_scale, cap.
SIGNATURE = (
    "u32*", "f32*", "u32*", "f32*", "u32*", *("u8*",) * 8, "f32*", *("i32*",) * 3, "f32*", *("i32",) * 16, "f32", "f32"
)  # fmt: skip


@functools.cache
def decode_kernel(
    implementation: str, head_dim: int, dtype: str = "float16", m_tiles: int = 1, general: bool = False, whole: bool = True
) -> Kernel:
    """The kernel for these constants, see ``make_decode``."""
    constants = {
        "implementation": implementation, "head_dim": head_dim, "dtype": dtype, "m_tiles": m_tiles, "general": general,
        "whole": whole,
    }  # fmt: skip
    return Kernel(make_decode, SIGNATURE, constants, launch_bounds=(32 * WARPS[head_dim],))


def why_not(layout: CacheLayout | ContiguousLayout, rows: int, implementation: str, target: Target) -> str | None:
    """Why ``implementation`` cannot decode ``rows`` rows a head of K and V on ``target``, in words; None where it can."""
    if implementation == "blockscale" and not target.has_block_scale_mma:
        return f"the block-scale MMA needs sm_120a or sm_121a, this is {target}"
    if layout.head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {layout.head_dim}"
    needed = shared_bytes(implementation, layout.head_dim, m_tiles_of(layout.head_dim, rows))
    if needed > shared_limit(target.name):
        return f"needs {needed} bytes of shared memory a CTA, {target} has {shared_limit(target.name)}"
    return None


@dataclass(frozen=True)
class Splits:
    """How a call is divided: CTAs of one split, splits, and the NVFP4 tiles that a split has at least."""

    ctas: int
    num_splits: int
    tiles: int


def choose_splits(
    layout: CacheLayout | ContiguousLayout,
    problem: Problem,
    max_length: int,
    multiprocessors: int,
    num_splits: int | None,
) -> Splits:
    """Splits that fill the GPU about twice, for sequences of up to ``max_length`` tokens; each has two tiles a warp at
    least, which is what writing and merging its results is worth. ``num_splits``: as many, if it is given. Every sequence
    is divided by its own length, so that a ``max_length`` far above it costs splits without tokens, no more."""
    rows = problem.seqlen_q * problem.qhead_per_kvhead
    row_tiles = -(-rows // (MMA_M * m_tiles_of(layout.head_dim, rows)))
    ctas = problem.batch * problem.num_heads_kv * row_tiles
    left, _ = problem.bounds
    quantised = layout.quantized_tokens(max_length)
    if left is not None:
        quantised = min(quantised, left + problem.seqlen_q + TILE_N)
    sixteen = -(-layout.sink_tokens // TILE_N) + -(-layout.ring_tokens // TILE_N)
    work = -(-quantised // TILE_N) + SIXTEEN_WEIGHT * sixteen
    if num_splits is not None:
        return Splits(ctas, num_splits, 1)
    least = 2 * WARPS[layout.head_dim]
    return Splits(ctas, max(1, min(2 * multiprocessors // max(ctas, 1), work // least)), least)


def part_shapes(layout: CacheLayout | ContiguousLayout, problem: Problem, splits: Splits) -> tuple[tuple[int, ...], ...]:
    """Of ``part`` and ``part_lse``, float32, in which splits leave their results; empty where there is one split."""
    rows = problem.batch * problem.seqlen_q * problem.num_heads_q
    count = splits.num_splits
    return ((count, rows, layout.head_dim), (count, rows)) if count > 1 else ()


def launches(
    q: Any,
    layout: CacheLayout | ContiguousLayout,
    arrays: CacheArrays,
    seq_ids: Any | None,
    problem: Problem,
    splits: Splits,
    *,
    implementation: str,
    out: Any,
    lse: Any,
    sinks: Any,
    parts: Sequence[Any],
) -> list[Launch]:
    """What one pass queues, in order; ``parts``: arrays of ``part_shapes``, the others as in ``decode``."""
    group, head_dim = problem.qhead_per_kvhead, layout.head_dim
    rows = problem.seqlen_q * group
    m_tiles, (left, _) = m_tiles_of(head_dim, rows), problem.bounds
    # with several splits this kernel writes the parts alone
    results = (parts[0], 0, *parts) if parts else (out, 0 if lse is None else lse, 0, 0)
    held = (
        arrays.k_codes, arrays.k_scales, arrays.v_codes, arrays.v_scales, arrays.k_recent, arrays.v_recent,
        arrays.k_sinks, arrays.v_sinks, arrays.k_mean, arrays.lengths, arrays.block_tables,
    )  # fmt: skip
    arguments = (
        *results, q,
        *(0 if array is None else array for array in held),
        *(0 if array is None else array for array in (seq_ids, sinks)),
        *(int(x is not None) for x in (lse, sinks, seq_ids, arrays.lengths)),
        problem.batch, splits.num_splits, splits.tiles, -(-rows // (MMA_M * m_tiles)), problem.seqlen_q,
        layout.num_heads_kv, group, layout.page_size,
        0 if seq_ids is None else arrays.block_tables.shape[1], layout.recent_tokens, layout.sink_tokens,
        NO_LIMIT if left is None else min(left, NO_LIMIT), problem.softmax_scale, problem.softcap or 0.0,
    )  # fmt: skip
    general = problem.softcap is not None or problem.softmax_scale <= 0
    kernel = decode_kernel(implementation, head_dim, layout.dtype, m_tiles, general, layout.page_size % TILE_N == 0)
    smem_bytes = shared_bytes(implementation, head_dim, m_tiles)
    grid = (splits.ctas * splits.num_splits,)
    first = Launch(kernel, grid, (32 * WARPS[head_dim],), arguments, smem_bytes)
    if not parts:
        return [first]
    return [first, combine(*parts, out, lse, sinks, splits.num_splits, layout.dtype, problem)]


def decode(
    q: Any,
    layout: CacheLayout | ContiguousLayout,
    arrays: CacheArrays,
    seq_ids: Any | None,
    problem: Problem,
    splits: Splits,
    *,
    implementation: str,
    out: Any,
    lse: Any = None,
    sinks: Any = None,
) -> None:
    """One pass, queued where q lies, on the current stream there.

    q, out: (batch, q_len, num_heads_q, head_dim), contiguous, 16-byte aligned. lse: float32 (batch, num_heads_q, q_len) or
    None. seq_ids: int32 (batch,); None: sequence i is page i as a whole, ``arrays`` has no more than codes, scales and
    perhaps ``lengths``, else None. sinks: float32 (num_heads_q,) or None. ``problem``: its bounds, scale and softcap.
    """
    if not splits.ctas:
        return
    parts = [gpu_arrays.empty_for_parts(q, shape) for shape in part_shapes(layout, problem, splits)]
    given = {"implementation": implementation, "out": out, "lse": lse, "sinks": sinks, "parts": parts}
    for launch in launches(q, layout, arrays, seq_ids, problem, splits, **given):
        gpu_arrays.launch(*launch)
