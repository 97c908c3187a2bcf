"""What a warp of the decode kernel loads: K or V of its next tile, from pages in NVFP4 or, in the same turn, 16 bits."""

from __future__ import annotations

from typing import Any, NamedTuple

from nbfmha.kernels.decode_frame import KV_HEAD, SIXTEEN_TILES, SLOT, STOP
from nbfmha.kernels.decode_sizes import Memory


class Source(NamedTuple):
    """K or V of all sequences, u8*: pages, and what is in 16 bits."""

    codes: Any
    scales: Any
    sinks: Any
    recent: Any


class Pages(NamedTuple):
    """How sequences lie in pages. tables: i32*; the others i32, but for ``table_tokens``, u32: those of a table's pages.
    paged: 0 where sequence i is page i as a whole, the only one of its table."""

    tables: Any
    paged: Any
    page_size: Any
    table_width: Any
    table_tokens: Any
    num_heads_kv: Any
    sink_tokens: Any
    recent_tokens: Any


def _make_table_of():
    """Device function ``(where, slot) -> i64``: ``table_at`` of ``tile_paged.make_find_page``."""
    from numba import cuda
    from numba.core import types

    i32, i64 = types.int32, types.int64

    @cuda.jit(device=True, forceinline=True)
    def table_of(where, slot):
        return i64(slot) * i64(where.table_width) if where.paged != i32(0) else i64(-1) - i64(slot)

    return table_of


def make_look_up(pages: str, early: bool = False):
    """Device functions ``find(where, slot, first_n, step_n, lane) -> (entry, place)`` of one of 32 of a warp's tiles, the
    first of them at ``first_n``, ``step_n`` tokens from one to the next: a look-up takes as long as a load. As far as the
    table goes, whatever the length: it may not be there yet. ``page_at(tables, entry) -> page``. ``look_up``, of what
    ``find`` takes ``-> (page, place)``: both. early: another kernel may be writing the tables."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import tile_paged

    u32, i32, table_of, (entry_of, page_at) = (
        types.uint32, types.int32, _make_table_of(), tile_paged.make_find_page(pages, early)
    )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def find(where, slot, first_n, step_n, lane):
        token = min(u32(u32(first_n) + u32(step_n) * u32(lane)), u32(where.table_tokens - u32(1)))
        return entry_of(table_of(where, slot), where.page_size, i32(token))

    @cuda.jit(device=True, forceinline=True)
    def look_up(where, slot, first_n, step_n, lane):
        entry, place = find(where, slot, first_n, step_n, lane)
        return page_at(where.tables, entry), place

    return find, page_at, look_up


def make_loads(head_dim: int, memory: Memory, pages: str, recall):
    """Device functions of a warp, for pages of a kind of ``tile_paged.PAGES``. frame, recall: of ``decode_frame``; stage:
    the warp's place in shared memory; turn: number of a tile among the warp's; where: ``Pages``; source: ``Source``.

    ``keep_pages(page, place, kv_head, num_heads_kv, stage, lane)``: what was found (``make_look_up``), for all lanes.

    ``load_first(stage, source, page, place, kv_head, where, lane)``: K of the warp's first tile, without frame or kept
    pages; nothing for pages "blocks". ``load_k(stage, source, where, frame, first_n, stop_n, turn, lane)`` and ``load_v``:
    of the tile at ``first_n``, in NVFP4 or in 16 bits, if there is one; and the commit. ``load_rows(to, source, where,
    frame, tile, lane)``: of tile number ``tile`` of those in 16 bits.

    ``again(lane) -> lane``, of which the compiler knows nothing: the addresses that follow from it are computed again in
    every tile. Kept from tile to tile they would take twenty registers that are not there, and local memory waits behind
    the tiles' loads.
    """
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import decode_sixteen, tile_paged
    from ptx_inline import device as dev

    u32, i32, whole, alone, at_pages = types.uint32, types.int32, pages != "blocks", pages == "tile", memory.pages
    load_shared, store_shared, unknown, shuffle, commit = (
        dev.ld_shared_u32, dev.st_shared_u32, dev.unknown_u32, dev.shfl_sync_idx_b32, dev.cp_async_commit_group
    )  # fmt: skip
    table_of, index_of, (load_k_tile, load_v_tile) = (
        _make_table_of(), tile_paged.make_index(), tile_paged.make_load_tile(memory.stage, pages)
    )  # fmt: skip
    load_sixteen = decode_sixteen.make_load(head_dim, recall)

    @cuda.jit(device=True, forceinline=True)
    def keep_pages(page, place, kv_head, num_heads_kv, stage, lane):
        at = stage + u32(at_pages) + u32(8) * u32(lane)
        store_shared(at, index_of(page, num_heads_kv, kv_head))
        if not alone:
            store_shared(at + u32(4), u32(place))
        cuda.syncwarp()

    @cuda.jit(device=True, forceinline=True)
    def again(lane):
        return i32(unknown(u32(lane)))

    # Numba types every branch, so each kind of pages is a function
    if whole:

        @cuda.jit(device=True, forceinline=True)
        def load_first(stage, source, page, place, kv_head, where, lane):
            index = shuffle(index_of(page, where.num_heads_kv, kv_head), u32(0))
            if not alone:
                place = i32(shuffle(u32(place), u32(0)))
            load_k_tile(stage, source.codes, source.scales, index, place, where.page_size, again(lane))

        @cuda.jit(device=True, forceinline=True)
        def load_tile(load, stage, source, where, frame, first_n, turn, lane):
            at = stage + u32(at_pages) + u32(8) * u32(turn & i32(31))
            index, place = load_shared(at), i32(0)
            if not alone:
                place = i32(load_shared(at + u32(4)))
            load(stage, source.codes, source.scales, index, place, where.page_size, lane)

    else:

        @cuda.jit(device=True, forceinline=True)
        def load_first(stage, source, page, place, kv_head, where, lane):
            pass

        @cuda.jit(device=True, forceinline=True)
        def load_tile(load, stage, source, where, frame, first_n, turn, lane):
            load(
                stage, source.codes, source.scales, where.tables, table_of(where, recall(frame, SLOT)),
                recall(frame, KV_HEAD), where.num_heads_kv, where.page_size, first_n, recall(frame, STOP), lane,
            )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def load_rows(to, source, where, frame, tile, lane):
        load_sixteen(
            to, source.sinks, source.recent, tile, frame, where.num_heads_kv, where.sink_tokens, where.recent_tokens, lane
        )

    def make_load(load, at_rows):
        @cuda.jit(device=True, forceinline=True)
        def load_next(stage, source, where, frame, first_n, stop_n, turn, lane):
            tile = i32(i32(first_n - stop_n) >> i32(6))
            if tile < i32(0):
                load_tile(load, stage, source, where, frame, first_n, turn, again(lane))
            elif tile < recall(frame, SIXTEEN_TILES):
                load_rows(stage + u32(at_rows), source, where, frame, tile, again(lane))
            commit()

        return load_next

    load_k, load_v = make_load(load_k_tile, 0), make_load(load_v_tile, memory.stage.v)
    return keep_pages, again, load_first, load_k, load_v, load_rows
