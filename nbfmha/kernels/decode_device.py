"""Decode attention: few query tokens of each sequence against its paged NVFP4 cache, split along the tokens.

    S = softmax_scale (Q K^T + q . km),  O = softmax(S) V,  LSE = log sum exp(S)

Team, of 4, 8 or 16 warps: one sequence, one head of K and V, one split, and 8, 16 or 32 rows; a row is one query token of
one of the heads that share K and V (:mod:`decode_rows`). Every warp has all rows and tiles of 64 tokens of its own, so that
each element of the cache is read and widened once for these rows; the warps' results meet in shared memory at the end. With
more than one split each writes its (out, LSE) in f32, and the team of these rows that is done last merges them
(:mod:`decode_end`); a split without tokens writes an LSE of -inf.

CTA: one, two or four teams, with nothing in common but barriers (``decode_sizes.teams_of`` says what for). The grid is
(heads of K and V times tiles of rows, splits, sequences); with several teams (all of these but the splits, by the number of
teams; splits).

==============  ====================================================================================================
NVFP4 tile      ``cp.async`` by each warp to one place for K and one for V: K of its next tile comes while V is computed
                with, V while K is (:mod:`tile_paged`). S^T = K Q^T by f16 MMAs of widened codes (``dequant``) or by the
                block-scale MMA with Q quantised here (``blockscale``); O^T = V^T P^T by f16 MMAs of widened codes
                (:mod:`paged_products`): queries are the columns of both. Tokens [sink_tokens, quantized_tokens)
16-bit tile     16 tokens of sinks or ring, in place and turn of an NVFP4 tile, by MMAs in the call's format
                (:mod:`tile_sixteen`)
scores          of NVFP4 tiles without q . km, which all tokens of a row share; 16-bit tiles start from -q . km; the LSE,
                and the argument of a softcap, get it back
==============  ====================================================================================================

Lengths, tables and slots are read here, on the device, which divides each sequence (:mod:`decode_share`): a launch depends
on them through the number of splits alone, and a sequence longer than the host thought makes its splits longer. smem,
dynamic, of each team: Q as it came, Q in f16 and the order of the codes (or its codes), q . km, K and V of each warp.
``dequant`` needs sm_80, ``blockscale`` sm_120a. head_dim 64, 128, 256.

Few rows leave the registers to sixteen warps an SM, whose loads and whose dependent instructions hide each other's waits;
one place for K and one for V a warp is then enough to have 70 KiB of an SM on their way at any time. What comes before the
first load and after the last nothing hides, and all warps do it at once, so that every instruction counts: Q comes first,
then the slot, km, the length and a warp's pages together, then K, behind whose tiles Q and km would wait; what the end
needs is worked out before the barriers at which warps wait. From sm_90 on the kernel may be launched before the one ahead
of it in the stream has ended (programmatic dependent launch): meanwhile it does what needs no memory and gives hints
(:mod:`decode_hints`), and it waits before it reads anything that counts.
"""

from __future__ import annotations

from nbfmha.kernels.decode_end import Result
from nbfmha.kernels.decode_frame import (
    FIRST_FACTOR,
    FIRST_ROW,
    KV_HEAD,
    LENGTH,
    POSITION,
    RING_FIRST,
    RING_PLACE,
    SINK_STOP,
    SINK_TILES,
    SIXTEEN_TILES,
    SLOT,
    STOP,
)
from nbfmha.kernels.decode_loads import Pages, Source
from nbfmha.kernels.decode_merge import LOG2E
from nbfmha.kernels.decode_rows import Q_TILE
from nbfmha.kernels.decode_sizes import Memory
from nbfmha.kernels.paged_products import FACTORS, UNIT
from nbfmha.kv_layout import BLOCK
from nbfmha.problem import NO_LIMIT
from nbfmha.recipe import TILE_N


def make_decode(
    implementation: str, head_dim: int, dtype: str, q_tiles: int, general: bool, pages: str, warps: int, teams: int
):
    """Kernel ``decode(out, ...)``: arguments as ``decode.SIGNATURE`` lists them.

    general: scores need more than one positive factor (softcap, or softmax_scale <= 0). pages: one of
    ``tile_paged.PAGES``. warps: of a team. teams: of a CTA.
    """
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import (
        decode_end,
        decode_frame,
        decode_hints,
        decode_loads,
        decode_merge,
        decode_query,
        decode_rows,
        decode_share,
        decode_sixteen,
        out_columns,
        paged_products,
        softmax,
        softmax_columns,
        tile_paged,
        tile_sixteen,
    )
    from nbfmha.kernels.mma import make_clear_accumulator
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi, commit, to_shared = dev.ffi, dev.cp_async_commit_group, dev.cvta_to_shared_u32
    launch_dependents, wait_for_others = dev.griddepcontrol_launch_dependents, dev.griddepcontrol_wait
    wait_for_all, wait_but_newest, unknown, keep_branch = (
        dev.cp_async_wait_group_0, dev.cp_async_wait_group_1, dev.unknown_u32, dev.keep_branch
    )  # fmt: skip
    blockscale, memory = implementation == "blockscale", Memory(implementation, head_dim, q_tiles)
    threads, whole, n_factors = 32 * warps, pages != "blocks", len(FACTORS)
    team_rows, c_tiles, m_tiles, k_steps = Q_TILE * q_tiles, head_dim // 16, TILE_N // 16, head_dim // 64
    at_q_tile, at_shifts, at_mean, at_frame, at_warps, at_v, at_pages, warp_bytes = (
        memory.q_tile, memory.shifts, memory.mean, memory.frame, memory.warps, memory.stage.v, memory.pages,
        memory.warp_bytes,
    )  # fmt: skip
    team_bytes, codes_bytes = memory.bytes(warps), team_rows * head_dim // 2
    k_unit = 1.0 if blockscale else UNIT

    keep, recall, recall_factors = decode_frame.make_frame()
    find_bounds, (shift_of, _) = decode_rows.make_find_bounds(recall), decode_rows.make_shifts(general)
    find_team, rows_of = decode_rows.make_find_rows(team_rows, threads, teams)
    token_of, begin_of, stop_of, share = (
        decode_rows.make_token_of(), decode_share.make_begin(), decode_share.make_stop(), decode_share.make_share()
    )  # fmt: skip
    q_passes, find_queries, fetch_queries, fetch_mean, prepare_queries = decode_query.make_load_queries(
        head_dim, dtype, q_tiles, threads, not blockscale
    )
    may_be_early, peek, hint = (
        dev.has_griddepcontrol, dev.ld_relaxed_gpu_global_s32, decode_hints.make_hint(head_dim, pages, q_passes)
    )  # fmt: skip
    (_, page_at, look_up), (keep_pages, again, load_first, load_k, load_v, load_rows) = (
        decode_loads.make_look_up(pages), decode_loads.make_loads(head_dim, memory, pages, recall)
    )  # fmt: skip
    keep_blocks = tile_paged.make_keep_blocks(memory.stage)
    pv, pack = paged_products.make_pv(memory.stage, q_tiles), out_columns.make_pack_columns("float16", q_tiles, m_tiles)
    mask, general_scores, weights = (
        softmax_columns.make_mask_columns("widened", m_tiles), softmax_columns.make_general_columns(m_tiles),
        softmax_columns.make_weights_columns(m_tiles),
    )  # fmt: skip
    rescale = out_columns.make_rescale_columns(head_dim, q_tiles)
    score_sixteen, weigh_sixteen, pv_sixteen = (
        decode_sixteen.make_score(head_dim, dtype, q_tiles, shift_of),
        decode_sixteen.make_weigh(dtype, q_tiles, general, recall, shift_of, find_bounds, rescale),
        tile_sixteen.make_pv(head_dim, dtype, q_tiles),
    )  # fmt: skip
    clear, store_result = make_clear_accumulator(), out_columns.make_store_result(head_dim, q_tiles)
    parts, end = decode_merge.parts_of(warps), decode_end.make_end(memory, dtype, general, warps)
    stats_of = decode_merge.make_stats_of(q_tiles)

    # Q K^T of a tile, and Q as it reads it. Numba types every branch, so each implementation is its functions
    if blockscale:
        quantize_queries, load_fragments = decode_query.make_quantize_queries(head_dim, dtype, q_tiles, threads)
        qk_codes = paged_products.make_qk_codes(memory.stage, q_tiles)

        @cuda.jit(device=True, forceinline=True)
        def quantize_q(plain, own_q, thread):
            quantize_queries(plain, own_q, own_q + u32(codes_bytes), thread)

        @cuda.jit(device=True, forceinline=True)
        def load_q(b, sfb, own_q, lane):
            load_fragments(b, sfb, own_q, own_q + u32(codes_bytes), lane)

        @cuda.jit(device=True, forceinline=True)
        def scores(acc_s, b, sfb, own_q, stage, factors, lane):
            qk_codes(acc_s, b, sfb, stage, lane)

    else:
        qk_widened = paged_products.make_qk_widened(memory.stage, q_tiles)

        @cuda.jit(device=True, forceinline=True)
        def quantize_q(plain, own_q, thread):
            pass

        @cuda.jit(device=True, forceinline=True)
        def load_q(b, sfb, own_q, lane):
            pass

        @cuda.jit(device=True, forceinline=True)
        def scores(acc_s, b, sfb, own_q, stage, factors, lane):
            qk_widened(acc_s, own_q, stage, factors, lane)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def enlarge(acc):
        for r in unroll(4):
            acc[r] = acc[r] * f32(UNIT)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def compute_scores(acc_s, b, sfb, own_q, stage, frame, lane):
        factors = cuda.local.array(n_factors, u32)
        if not blockscale:
            recall_factors(factors, frame)
        for i in unroll(q_tiles):
            for m in unroll(m_tiles):
                clear(acc_s[i, m])
        scores(acc_s, b, sfb, own_q, stage, factors, lane)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def add_values(acc_o, p, stage, frame, lane):
        factors = cuda.local.array(n_factors, u32)
        recall_factors(factors, frame)
        pv(acc_o, p, stage, factors, lane)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def compute_weights(
        acc_o, row_max, row_sum, acc_s, p, first_n, frame, group, q_len, window_left, first, full_from, full_to, shifted,
        scale, softmax_scale, cap, lane,
    ):  # fmt: skip
        factor = cuda.local.array(2, f32)
        low = cuda.local.array(2, i32)
        high = cuda.local.array(2, i32)
        for i in unroll(q_tiles):
            if general:
                general_scores(acc_s[i], shifted[i], softmax_scale, cap)
            if first_n < full_from or i32(first_n + i32(TILE_N)) > full_to:
                find_bounds(low, high, u32(i), lane, frame, group, q_len, window_left, first, recall(frame, STOP))
                mask(acc_s[i], low, high, first_n, lane)
            weights(acc_s[i], row_max[i], row_sum[i], factor, scale)
            rescale(acc_o, u32(i), factor)
        pack(p, acc_s)

    @unrolled
    def decode(
        seq_ids, lengths, tables, q, k_mean, k_codes, k_scales, early, paged, num_splits, row_tiles, q_len,
        num_heads_kv, group, page_size, table_width, recent_tokens, sink_tokens, window_left, v_codes, v_scales, k_recent,
        v_recent, k_sinks, v_sinks, out, lse, part, part_lse, sinks, tickets, has_lse, has_sinks, has_lengths, batch_size,
        num_slots, softmax_scale, cap,
    ):  # fmt: skip
        team, thread, batch, pair, pairs, split = find_team(num_heads_kv, row_tiles)
        plain = to_shared(ffi.from_buffer(cuda.shared.array(0, u32)))
        if teams > 1:
            plain += u32(team * i32(team_bytes))
        own_q, shifts, frame = plain + u32(at_q_tile), plain + u32(at_shifts), plain + u32(at_frame)
        mean, pool = plain + u32(at_mean), plain + u32(at_warps)
        thread = i32(unknown(u32(thread)))
        lane, warp = i32(thread & i32(31)), i32(thread >> i32(5))
        stage = unknown(pool + u32(warp_bytes) * u32(warp))

        launch_dependents()
        hints, likely = i32(0), i32(-1)
        if whole and early != i32(0) and may_be_early() != u32(0):
            # before all else: CTAs that begin last have no time to wait for it
            hints, likely = i32(1), peek(seq_ids, i64(batch))
        # what needs no memory: the kernel ahead may still run
        own = rows_of(batch, pair, pairs, num_heads_kv, row_tiles, group, q_len)
        kv_head, first_row = own.kv_head, own.first_row
        q_to = cuda.local.array(q_passes, u32)
        q_at = cuda.local.array(q_passes, i64)
        q_bytes = cuda.local.array(q_passes, u32)
        find_queries(q_to, q_at, q_bytes, own, plain, thread)
        first_token, table_tokens = token_of(first_row, group, q_len), u32(page_size)
        if paged != i32(0):
            table_tokens = u32(u32(table_width) * u32(page_size))
        k_source = Source(k_codes, k_scales, k_sinks, k_recent)
        v_source = Source(v_codes, v_scales, v_sinks, v_recent)
        where = Pages(tables, paged, page_size, table_width, table_tokens, num_heads_kv, sink_tokens, recent_tokens)
        ahead = i32(num_splits * i32(warps))  # the warp's next tile is so many tiles away
        # the last warps first: what is left over is theirs, and they are ahead of warps 0 and 1 of each four
        step_n, first_tile = i32(ahead * i32(TILE_N)), i32(i32(i32(warps - 1) - warp) * num_splits + split)
        begin = begin_of(i32(0), sink_tokens)
        first_n = i32(begin + first_tile * i32(TILE_N))
        entry, page_place = i64(0), i32(0)
        if hints != i32(0):
            likely, entry, page_place = hint(
                likely, lengths, where, q, k_mean, k_source, q_at, q_bytes, own, num_slots, first_n, step_n, split, thread,
                lane,
            )  # fmt: skip
        wait_for_others()  # no result depends on what was read before

        slot, length, page = batch, page_size, i32(0)
        fetch_queries(q, q_to, q_at, q_bytes, thread)  # else Q would come after the first tiles of all CTAs
        if likely >= i32(0):  # one wait instead of two
            fetch_mean(mean, k_mean, paged, kv_head, num_heads_kv, likely, thread)
            length, page, slot = i32(lengths[likely]), page_at(tables, entry), i32(seq_ids[batch])
        elif paged != i32(0):
            slot = i32(seq_ids[batch])
        if slot != likely:
            if likely >= i32(0):  # another sequence's km is on its way
                commit()
                wait_for_all()
            fetch_mean(mean, k_mean, paged, kv_head, num_heads_kv, slot, thread)
            if has_lengths != i32(0):
                length = i32(lengths[slot])
            if whole:
                page, page_place = look_up(where, slot, first_n, step_n, lane)
            if window_left < i32(NO_LIMIT):
                # a branch of its own: even an instruction that a predicate skips waits for its operands, here the length
                keep_branch()
                begin = begin_of(i32(length - q_len + first_token - window_left), sink_tokens)
                first_n = i32(begin + first_tile * i32(TILE_N))
                if whole:
                    page, page_place = look_up(where, slot, first_n, step_n, lane)
        commit()
        # K's first tiles before all that can wait
        stop = stop_of(length, recent_tokens)
        if whole and first_n < stop and sink_tokens < stop:
            load_first(stage, k_source, page, page_place, kv_head, where, lane)
        commit()
        all_rows = u32(batch_size * q_len * own.heads)
        position = i32(length - q_len)
        first_position = i32(position + first_token)
        stop_n, sink_stop, sink_tiles, ring_first, sixteen = share(
            length, first_position, begin, stop, window_left, sink_tokens
        )
        if whole:
            keep_pages(page, page_place, kv_head, num_heads_kv, stage, lane)
        if thread == i32(0):
            keep(frame, SLOT, slot)
            keep(frame, KV_HEAD, kv_head)
            keep(frame, LENGTH, length)
            keep(frame, POSITION, position)
            keep(frame, FIRST_ROW, first_row)
            keep(frame, SINK_TILES, sink_tiles)
            keep(frame, SINK_STOP, sink_stop)
            keep(frame, RING_FIRST, ring_first)
            keep(frame, RING_PLACE, i32(u32(ring_first) % u32(recent_tokens + i32(BLOCK))))
            keep(frame, SIXTEEN_TILES, sixteen)
            keep(frame, STOP, stop)
            for i in unroll(n_factors):
                keep(frame, FIRST_FACTOR + i, FACTORS[i])
        wait_but_newest()  # Q is there, and is prepared while K comes
        cuda.syncthreads()
        b = cuda.local.array((q_tiles, k_steps, 2), u32)
        sfb = cuda.local.array(q_tiles, u32)
        prepare_queries(plain, mean, shifts, own_q, thread)
        quantize_q(plain, own_q, thread)
        cuda.syncthreads()
        load_q(b, sfb, own_q, lane)
        if not whole or first_n >= stop_n:
            load_k(stage, k_source, where, frame, first_n, stop_n, i32(0), lane)
        # not before, or every warp's K would wait for V of others
        load_v(stage, v_source, where, frame, first_n, stop_n, i32(0), lane)

        acc_o = cuda.local.array((c_tiles, q_tiles, 4), f32)
        acc_s = cuda.local.array((q_tiles, m_tiles, 4), f32)
        p = cuda.local.array((q_tiles, m_tiles, 2), u32)
        row_max = cuda.local.array((q_tiles, 2), f32)
        row_sum = cuda.local.array((q_tiles, 2), f32)
        shifted = cuda.local.array((q_tiles, 2), f32)
        for c in unroll(c_tiles):
            for i in unroll(q_tiles):
                clear(acc_o[c, i])
        for i in unroll(q_tiles):
            for e in unroll(2):
                row_max[i, e] = f32(softmax.LOWEST)
                row_sum[i, e] = f32(0)
                shifted[i, e] = shift_of(shifts, u32(i), u32(e), lane) * f32(1 / k_unit)
        scale = f32(1) if general else softmax_scale * f32(LOG2E * k_unit)

        # from where, up to where, every row sees a tile as a whole
        full_from = i32(max(i32(length - i32(1) - window_left), sink_tokens))
        full_to = i32(min(i32(first_position + i32(1)), stop))
        turn = i32(0)
        while first_n < stop_n:
            next_n, turn = i32(first_n + step_n), i32(turn + i32(1))
            if whole and (turn & i32(31)) == i32(0):
                page, page_place = look_up(where, recall(frame, SLOT), next_n, step_n, lane)
                cuda.syncwarp()  # nobody reads the last ones any more
                keep_pages(page, page_place, recall(frame, KV_HEAD), num_heads_kv, stage, lane)
            wait_but_newest()  # K is there
            cuda.syncwarp()
            compute_scores(acc_s, b, sfb, own_q, stage, frame, again(lane))
            cuda.syncwarp()  # nobody reads K any more
            load_k(stage, k_source, where, frame, next_n, stop_n, turn, lane)
            compute_weights(
                acc_o, row_max, row_sum, acc_s, p, first_n, frame, group, q_len, window_left, sink_tokens, full_from,
                full_to, shifted, scale, softmax_scale * f32(k_unit), cap, lane,
            )  # fmt: skip
            wait_but_newest()  # V is there
            cuda.syncwarp()
            if first_n < sink_tokens or i32(first_n + i32(TILE_N)) > recall(frame, STOP):
                keep_blocks(stage, first_n, sink_tokens, recall(frame, STOP), lane)
            add_values(acc_o, p, stage, frame, again(lane))
            cuda.syncwarp()
            load_v(stage, v_source, where, frame, next_n, stop_n, turn, lane)
            first_n = next_n
        for c in unroll(c_tiles):
            for i in unroll(q_tiles):
                enlarge(acc_o[c, i])

        scale = f32(1) if general else softmax_scale * f32(LOG2E)
        tile = i32(i32(first_n - stop_n) >> i32(6))  # the turn goes on
        while tile < recall(frame, SIXTEEN_TILES):
            next_tile = i32(tile + ahead)
            wait_but_newest()
            cuda.syncwarp()
            score_sixteen(acc_s, plain, stage, shifts, lane)
            cuda.syncwarp()
            if next_tile < recall(frame, SIXTEEN_TILES):
                load_rows(stage, k_source, where, frame, next_tile, lane)
            commit()
            weigh_sixteen(
                acc_o, row_max, row_sum, acc_s, p, tile, frame, group, q_len, window_left, shifts, scale, softmax_scale,
                cap, lane,
            )  # fmt: skip
            wait_but_newest()
            cuda.syncwarp()
            pv_sixteen(acc_o, p, stage + u32(at_v), lane)
            cuda.syncwarp()
            if next_tile < recall(frame, SIXTEEN_TILES):
                load_rows(stage + u32(at_v), v_source, where, frame, next_tile, lane)
            commit()
            tile = next_tile

        if teams > 1:  # found once more, not kept through the loop
            _, thread, batch, pair, pairs, split = find_team(num_heads_kv, row_tiles)
            own = rows_of(batch, pair, pairs, num_heads_kv, row_tiles, group, q_len)
        stats = stage + u32(at_pages) + stats_of(u32(warp) // u32(warps // parts))
        store_result(stage, stats, acc_o, row_max, row_sum, lane)
        result = Result(out, lse, part, part_lse, sinks, tickets, has_lse, has_sinks)
        end(result, own, pool, plain, shifts, split, num_splits, all_rows, softmax_scale, cap, thread, lane)

    return decode
