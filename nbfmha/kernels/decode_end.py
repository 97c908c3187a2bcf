"""The end of a team of the decode kernel: rows of its warps' results, and, by the team that is done last, of the splits'.

Nothing hides what happens here, and all warps do it at once: what a thread needs is worked out before the barrier at which
most warps wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from nbfmha.kernels.decode_merge import LOG2E
from nbfmha.kernels.decode_rows import Q_TILE
from nbfmha.kernels.decode_sizes import Memory


class Result(NamedTuple):
    """Where results go. out, part: u32*; lse, part_lse, sinks: f32*; tickets: u32*, zeros before and after. The last two
    tell whether there are ``lse`` and ``sinks``, i32."""

    out: Any
    lse: Any
    part: Any
    part_lse: Any
    sinks: Any
    tickets: Any
    has_lse: Any
    has_sinks: Any


def make_end(memory: Memory, dtype: str, general: bool, warps: int):
    """Device function ``(result, own, pool, plain, shifts, split, num_splits, batch_size, softmax_scale, cap, thread,
    lane)`` of all threads, each warp's result being in its place of ``pool``, as ``out_columns`` leaves it.

    result: ``Result``; own: ``decode_rows.Rows``; plain, shifts: addresses as in ``Memory``, of which ``plain`` is free.
    With splits each team writes its own as f32 to ``part``, and the last one of these rows reads them all.
    """
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import decode_merge, decode_rows
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32 = types.float32, types.uint32, types.int32
    take_ticket, load_shared, store_shared = (
        dev.atom_acq_rel_gpu_global_inc_u32, dev.ld_shared_u32, dev.st_shared_u32
    )  # fmt: skip
    shuffle = dev.shfl_sync_idx_b32
    head_dim, q_tiles, warp_bytes, at_pages = memory.head_dim, memory.q_tiles, memory.warp_bytes, memory.pages
    team_rows, chunks, step = Q_TILE * q_tiles, head_dim // 4, 32 * warps // decode_merge.parts_of(warps)
    places_of, (_, shift2_of) = decode_rows.make_places_of(), decode_rows.make_shifts(general)
    first_item, place_of_item, part_of, meet = decode_merge.make_items(head_dim, warps)
    gather_warps, finish = (
        decode_merge.make_gather_warps(head_dim, warps, q_tiles), decode_merge.make_finish(head_dim, dtype)
    )  # fmt: skip
    together, find_splits, gather_splits = decode_merge.make_gather_splits(head_dim, warps)

    @cuda.jit(device=True, forceinline=True)
    def sink2_of(result, head, has_sink):
        return result.sinks[head] * f32(LOG2E) if has_sink else f32(0)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def find_first_splits(split_rows, own, num_splits, all_rows, thread, lane):
        """Those of the thread's first item, here and now: what is not shuffled the compiler puts off until it is needed."""
        row, _ = place_of_item(first_item(thread))
        find_splits(split_rows, num_splits, all_rows, places_of(own, row)[1], part_of(lane))
        for j in unroll(together):
            split_rows[j] = shuffle(split_rows[j], u32(lane))

    @cuda.jit(device=True, forceinline=True)
    def end(result, own, pool, plain, shifts, split, num_splits, all_rows, softmax_scale, cap, thread, lane):
        partial = num_splits > i32(1)
        items = i32(i32(min(i32(team_rows), i32(own.rows - own.first_row))) * i32(chunks))
        item, own_part, has_sink = first_item(thread), part_of(lane), result.has_sinks != i32(0) and not partial
        target, target_lse = result.part if partial else result.out, result.part_lse if partial else result.lse
        row, chunk = place_of_item(item)
        head, at, lse_row = places_of(own, row)
        shift2, split_at = f32(0), u32(split) * all_rows
        if item < items:
            shift2 = shift2_of(shifts, row, softmax_scale, cap)
        values = cuda.local.array(4, f32)
        state = cuda.local.array(2, f32)
        cuda.syncthreads()
        while item < items:
            gather_warps(values, state, pool, u32(warp_bytes), pool + u32(at_pages), row, chunk, own_part)
            meet(values, state)
            if own_part == i32(0):
                finish(
                    target, target_lse, values, state, split_at + at, chunk, split_at + at if partial else lse_row,
                    has_sink, sink2_of(result, head, has_sink), shift2, partial or result.has_lse != i32(0), partial,
                )  # fmt: skip
            item = i32(item + i32(step))
            if item < items:
                row, chunk = place_of_item(item)
                head, at, lse_row = places_of(own, row)
                shift2 = shift2_of(shifts, row, softmax_scale, cap)

        if partial:
            split_rows = cuda.local.array(together, u32)
            find_first_splits(split_rows, own, num_splits, all_rows, thread, lane)
            cuda.syncthreads()
            if thread == i32(0):
                before = take_ticket(result.tickets, own.number, u32(num_splits - i32(1)))
                store_shared(plain, u32(1) if before == u32(num_splits - i32(1)) else u32(0))
            cuda.syncthreads()
            if load_shared(plain) != u32(0):
                item = first_item(thread)
                while item < items:
                    row, chunk = place_of_item(item)
                    head, at, lse_row = places_of(own, row)
                    gather_splits(
                        values, state, split_rows, result.part, result.part_lse, num_splits, all_rows, at, chunk, own_part
                    )  # fmt: skip
                    meet(values, state)
                    if own_part == i32(0):
                        has_sink = result.has_sinks != i32(0)
                        finish(
                            result.out, result.lse, values, state, at, chunk, lse_row, has_sink,
                            sink2_of(result, head, has_sink), f32(0), result.has_lse != i32(0), False,
                        )  # fmt: skip
                    item = i32(item + i32(step))
                    if item < items:
                        row, chunk = place_of_item(item)
                        find_splits(split_rows, num_splits, all_rows, places_of(own, row)[1], own_part)

    return end
