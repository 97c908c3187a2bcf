"""What a team of the decode kernel asks L2 for before the kernel ahead of it in the stream is done.

Slot, length and page are read as they seem to be: that kernel may yet write them. Nothing but addresses follows from them,
none of which lies outside the cache: of hints, and of what is read again after the wait, where another slot than before
means that all is read once more; keys, values and queries are not read at all. So no result depends on what was read early,
and a page that was freed meanwhile does no harm.

Behind kernels of this package there is time for it: behind another decode, and behind an append, which lets the next kernel
begin at once. Others end before this one begins, and what it reads early is then 0.5 us lost (H200). For calls with splits
alone: without them a pair of append and decode gains 1 % at most, and 16 sequences of 8192 tokens behind others lose 3 %.
"""

from __future__ import annotations


def make_hint(head_dim: int, pages: str, passes: int):
    """Device function ``(slot, lengths: i32*, where, q: u8*, k_mean: u8*, source, q_at: i64[passes], q_bytes: u32[passes],
    own, num_slots, first_n, step_n, split, thread, lane) -> (slot, entry, place)``: hints for K (``source``) of the warp's
    first NVFP4 tile, at ``first_n``, and of the first split for the queries (``q_at``, ``q_bytes``: of ``decode_query``)
    and km. slot: of the sequence, as it seems to be; where, source: of :mod:`decode_loads`; own: of :mod:`decode_rows`.
    For pages "tile" and "tiles", and calls without a window: with one the first tile depends on the length.

    What it returns is the slot, or -1 if there is none such, and what ``decode_loads.make_look_up`` finds there.
    """
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import decode_loads, decode_share, tile_paged
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    peek, prefetch, prefetch_k = (
        dev.ld_relaxed_gpu_global_s32, dev.prefetch_global_l2, tile_paged.make_prefetch_k(head_dim, pages)
    )  # fmt: skip
    stop_of, index_of, (find, page_at, _) = (
        decode_share.make_stop(), tile_paged.make_index(), decode_loads.make_look_up(pages, early=True)
    )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def hint(
        slot, lengths, where, q, k_mean, source, q_at, q_bytes, own, num_slots, first_n, step_n, split, thread, lane
    ):  # fmt: skip
        if split == i32(0):
            for i in unroll(passes):
                if q_bytes[i] != u32(0):
                    prefetch(q, q_at[i])
        entry, place = i64(0), i32(0)
        if u32(slot) >= u32(num_slots):
            slot = i32(-1)
        else:
            if split == i32(0) and thread < i32(head_dim // 4):
                row = i64(u32(slot * where.num_heads_kv + own.kv_head))
                prefetch(k_mean, row * i64(4 * head_dim) + i64(u32(thread) * u32(16)))
            entry, place = find(where, slot, first_n, step_n, lane)
            page = page_at(where.tables, entry)
            there = first_n < stop_of(peek(lengths, i64(slot)), where.recent_tokens)
            if lane == i32(0) and there and u32(first_n) < where.table_tokens and page >= i32(0):
                index = index_of(page, where.num_heads_kv, own.kv_head)
                prefetch_k(source.codes, source.scales, index, place, where.page_size)
        return slot, entry, place

    return hint
