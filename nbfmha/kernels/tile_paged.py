"""Tiles of 64 tokens of an NVFP4 KV cache: from pages to shared memory, by a warp alone. The products read them there:
:mod:`paged_products`.

==============  ====================================================================================================
K codes         64 rows of head_dim / 2 bytes, in chunks of 16 bytes that are exchanged among eight neighbours
                (``swizzle``): the lanes of one access lie in different banks
sfk             four blocks of 16 rows of head_dim / 16 bytes, 32 more after each block
V codes         head_dim rows of 32 bytes
sfv             head_dim words, the four blocks of 16 tokens of one channel each: channels 8 i + g, i = 0, 1, ..., of g = 0,
                then those of g = 1, ...: a quad's, which it reads four at a time
==============  ====================================================================================================

Every 32 bytes of global memory stay 32 aligned bytes here: a copy to another alignment reads each sector of L2 once and a
half (measured: 24 % of all sectors when rows had a pitch of 16 bytes more than they need).

K and V of a tile come apart, since each is done with at another time: while V is computed with, K of the warp's next tile
is on its way, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbfmha.recipe import TILE_N

BLOCK = 16  # tokens that share a scale of V, and that always lie in one page

PAGES = ("tile", "tiles", "blocks")
"""Kinds of pages: one tile each, whole tiles, blocks."""


def pages_of(page_size: int) -> str:
    """Kind of pages of so many tokens."""
    if page_size % TILE_N:
        return "blocks"
    return "tile" if page_size == TILE_N else "tiles"


@dataclass(frozen=True)
class PagedStage:
    """Byte offsets of the parts of a stage. words: of ``paged_products.words_of_lane``; 0 for ``blockscale``, which reads
    rows."""

    head_dim: int
    words: int

    @property
    def chunks(self) -> int:
        """Of 16 bytes in a row of K."""
        return self.head_dim // 32

    def swizzle(self, row: int) -> int:
        """What the number of a chunk of K, counted from the first row's, is exclusive-ored with. Rows that one access meets
        are 16 (c >> 1) + 4 (c & 1), c = 0, 1, ...: four of them 32 bytes each or two of them 64 (``words``), else eight of
        them 16 bytes each by ``ldmatrix``, which alone takes halves of a sector apart."""
        half = 0 if self.words else row >> 5 & 1
        return (row >> 2 & 1) << 2 | (row >> 4 & 1) << 1 | half

    @property
    def sfk(self) -> int:
        return TILE_N * self.head_dim // 2

    @property
    def sfk_block(self) -> int:
        return self.head_dim + 32

    @property
    def v(self) -> int:
        return self.sfk + TILE_N // BLOCK * self.sfk_block

    @property
    def sfv(self) -> int:
        return self.v + self.head_dim * TILE_N // 2

    @property
    def bytes(self) -> int:
        return self.sfv + 4 * self.head_dim


def make_swizzle(stage: PagedStage):
    """Device function ``(column) -> u32``: ``stage.swizzle`` of row 16 (column >> 1) + 4 (column & 1)."""
    from numba import cuda
    from numba.core import types

    u32 = types.uint32
    halves = not stage.words

    @cuda.jit(device=True, forceinline=True)
    def swizzle(column):
        return ((column & u32(1)) << u32(2)) | (column & u32(2)) | ((column >> u32(2)) if halves else u32(0))

    return swizzle


def make_find_page(pages: str, early: bool = False):
    """Device functions ``entry_of(table_at, page_size, token) -> (entry: i64, place)``: where the page of a token stands in
    the tables, and the token's place in the page, pages of a kind of ``PAGES``; of "tile", tokens that are multiples of 64
    have one, 0. ``page_at(tables: i32*, entry) -> page``.

    table_at: i64, entry of the sequence's first page; -1 - page for a sequence that is one page, and so is the entry then.
    early: another kernel may be writing the tables."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, i32, i64, alone = types.uint32, types.int32, types.int64, pages == "tile"
    peek = dev.ld_relaxed_gpu_global_s32

    @cuda.jit(device=True, forceinline=True)
    def entry_of(table_at, page_size, token):
        if table_at < i64(0):
            return table_at, i32(0) if alone else token
        number = u32(token) // u32(TILE_N if alone else page_size)
        return table_at + i64(number), i32(0) if alone else i32(token - i32(number) * page_size)

    @cuda.jit(device=True, forceinline=True)
    def page_at(tables, entry):
        if entry < i64(0):
            return i32(i64(-1) - entry)
        return peek(tables, entry) if early else tables[entry]

    return entry_of, page_at


def make_keep_blocks(stage: PagedStage):
    """Device function ``(smem, first_n, first, stop, lane)``, of a warp: V's scales of all blocks of the tile from token
    ``first_n`` on that do not lie in [first, stop) become zero: no token there has a weight, but a NaN would be one all the
    same."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, load, store, keep_branch = (
        types.uint32, types.int32, dev.ld_shared_u32, dev.st_shared_u32, dev.keep_branch
    )  # fmt: skip
    at_sfv = stage.sfv

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def keep_blocks(smem, first_n, first, stop, lane):
        keep_branch()
        kept = u32(0)
        for b in unroll(TILE_N // BLOCK):
            block = i32(first_n + i32(BLOCK * b))
            kept |= u32(0xFF << 8 * b) if block >= first and block < stop else u32(0)
        for i in unroll(stage.head_dim // 32):
            at = smem + u32(at_sfv + 128 * i) + u32(4) * u32(lane)
            store(at, load(at) & kept)
        cuda.syncwarp()

    return keep_blocks


def make_index():
    """Device function ``(page, num_heads_kv, kv_head) -> u32``: of a page and head. 32 bits: each has 576 bytes at least,
    and no memory has 2 TB."""
    from numba import cuda
    from numba.core import types

    u32 = types.uint32

    @cuda.jit(device=True, forceinline=True)
    def index_of(page, num_heads_kv, kv_head):
        return u32(u32(page) * u32(num_heads_kv) + u32(kv_head))

    return index_of


def _make_token_at(pages: str):
    """Device function ``(index, place, page_size) -> i64``: which token of all pages and heads is at ``place`` of the page
    and head of ``index``."""
    from numba import cuda
    from numba.core import types

    u32, i64, alone = types.uint32, types.int64, pages == "tile"

    @cuda.jit(device=True, forceinline=True)
    def token_at(index, place, page_size):
        return i64(index) * i64(TILE_N) if alone else i64(index) * i64(u32(page_size)) + i64(u32(place))

    return token_at


def make_prefetch_k(head_dim: int, pages: str):
    """Device function ``(codes, scales, index, place, page_size)``: a lane asks L2 for K of a tile, as ``load_k`` of
    ``make_load_tile`` takes it."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, i64, token_at, prefetch = types.uint32, types.int64, _make_token_at(pages), dev.cp_async_bulk_prefetch_l2_global

    @cuda.jit(device=True, forceinline=True)
    def prefetch_k(codes, scales, index, place, page_size):
        token = token_at(index, place, page_size)
        prefetch(codes, token * i64(head_dim // 2), u32(TILE_N * head_dim // 2))
        prefetch(scales, token * i64(head_dim // 16), u32(TILE_N * head_dim // 16))

    return prefetch_k


def make_load_tile(stage: PagedStage, pages: str):
    """Device functions ``load_k`` and ``load_v``, of ``(smem, codes, scales, index, place, page_size, lane)``: a warp
    brings K or V of a tile, asynchronously, from ``place`` of the page and head of ``index`` (``make_index``). pages:
    "tile", whose place is 0, or "tiles".

    For "blocks", of ``(smem, codes, scales, tables, table_at, kv_head, num_heads_kv, page_size, first_n, limit, lane)``:
    each block of 16 from token ``first_n`` on has its page, which is looked up here (``make_find_page``); blocks from token
    ``limit`` on are zeros, and V's scales, whose bytes do not lie in words, are read one by one.

    K and V are read once, and are the first that L2 gives up: what is read again (tables, queries, the kernel) stays.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    cp_async_16, cp_async_8, cp_async_4, store = (
        dev.cp_async_cg_16_evict_first, dev.cp_async_ca_8_evict_first, dev.cp_async_ca_4_evict_first, dev.st_shared_u32
    )  # fmt: skip
    head_dim, at_v, at_sfk, at_sfv, sfk_block = stage.head_dim, stage.v, stage.sfk, stage.sfv, stage.sfk_block
    chunks, rows_a_pass = stage.chunks, 32 // stage.chunks
    swizzles = tuple(16 * stage.swizzle(row) for row in range(TILE_N))
    lane_bit = 4 if rows_a_pass > 4 else 0  # of the swizzle: what the lane's row in a pass has to do with it
    scale_chunks = head_dim // 16  # of 16 bytes a block of 16 rows of sfk
    blocks, lane_channels, alone = TILE_N // BLOCK, head_dim // 32, pages == "tile"
    entry_of, page_at = make_find_page(pages)
    index_of, token_at, halves = make_index(), _make_token_at(pages), not stage.words

    @cuda.jit(device=True, forceinline=True)
    def sfv_of(smem, own):
        """Where the word of channel ``own``, one of the first 32, stands; that of 32 i more 16 i bytes behind it."""
        return smem + u32(at_sfv) + (own & u32(7)) * u32(head_dim // 2) + (own >> u32(3)) * u32(4)

    @cuda.jit(device=True, forceinline=True)
    def k_of(smem, own):
        """Where a pass of 32 chunks puts that of lane ``own``, but for the rows' swizzle."""
        return smem + u32(16) * (own ^ ((own // u32(chunks)) & u32(lane_bit)))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_k_whole(smem, codes, scales, index, place, page_size, lane):
        token, own = token_at(index, place, page_size), u32(lane)
        to, at = k_of(u32(0), own), token * i64(head_dim // 2) + i64(own * u32(16))
        for i in unroll(TILE_N // rows_a_pass):
            cp_async_16(
                smem + (to ^ u32(swizzles[rows_a_pass * i])) + u32(512 * i), codes, at + i64(512 * i), u32(16)
            )
        for i in unroll(-(-blocks * scale_chunks // 32)):
            chunk = own + u32(32 * i)
            if 32 * (i + 1) <= blocks * scale_chunks or chunk < u32(blocks * scale_chunks):
                to = smem + u32(at_sfk) + chunk // u32(scale_chunks) * u32(sfk_block) + chunk % u32(scale_chunks) * u32(16)
                cp_async_16(to, scales, token * i64(head_dim // 16) + i64(chunk * u32(16)), u32(16))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_v_whole(smem, codes, scales, index, place, page_size, lane):
        row, own = i64(index) * i64(head_dim), u32(lane)
        code_pitch = i64(TILE_N // 2) if alone else i64(page_size >> i32(1))
        scale_pitch = i64(TILE_N // BLOCK) if alone else i64(page_size >> i32(4))
        at = (row + i64(own >> u32(1))) * code_pitch + i64((own & u32(1)) * u32(16))
        scale_at, to = (row + i64(own)) * scale_pitch, sfv_of(smem, own)
        if not alone:
            at += i64(place >> i32(1))
            scale_at += i64(place >> i32(4))
        for i in unroll(head_dim // 16):
            cp_async_16(smem + u32(at_v + 512 * i) + own * u32(16), codes, at + i64(16 * i) * code_pitch, u32(16))
        for i in unroll(lane_channels):
            cp_async_4(to + u32(16 * i), scales, scale_at + i64(32 * i) * scale_pitch, u32(4))

    @cuda.jit(device=True, forceinline=True)
    def find_block(tables, table_at, kv_head, num_heads_kv, page_size, token, limit):
        """(page and head as one index, place, 1 where the block is there) of the block from ``token`` on."""
        if token >= limit:
            return i64(0), i32(0), u32(0)
        entry, place = entry_of(table_at, page_size, token)
        return i64(index_of(page_at(tables, entry), num_heads_kv, kv_head)), place, u32(1)

    @cuda.jit(device=True, forceinline=True)
    def swizzle_of_block(b):
        """16 times that of row 16 b."""
        return (u32(32) * (b & u32(1))) ^ (u32(16) * (b >> u32(1)) if halves else u32(0))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_k_block(smem, b, codes, scales, index, place, size, page_size, lane):
        own = u32(lane)
        token = index * i64(page_size) + i64(place)
        to = k_of(u32(0), own)
        for i in unroll(BLOCK // rows_a_pass):
            at = token * i64(head_dim // 2) + i64(own * u32(16)) + i64(512 * i)
            own_to = to ^ u32(swizzles[rows_a_pass * i]) ^ swizzle_of_block(b)
            cp_async_16(smem + own_to + u32(8 * head_dim) * b + u32(512 * i), codes, at, u32(16) * size)
        if own < u32(scale_chunks):
            to = smem + u32(at_sfk) + b * u32(sfk_block) + own * u32(16)
            cp_async_16(to, scales, token * i64(head_dim // 16) + i64(own * u32(16)), u32(16) * size)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_k_blocks(
        smem, codes, scales, tables, table_at, kv_head, num_heads_kv, page_size, first_n, limit, lane
    ):  # fmt: skip
        for b in unroll(blocks):
            token = i32(first_n + i32(BLOCK * b))
            index, at, size = find_block(tables, table_at, kv_head, num_heads_kv, page_size, token, limit)
            load_k_block(smem, u32(b), codes, scales, index, at, size, page_size, lane)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_v_block(smem, words, b, codes, scales, index, place, size, page_size, lane):
        own = u32(lane)
        row = index * i64(head_dim) + i64(own)
        for i in unroll(lane_channels):
            at = (row + i64(32 * i)) * i64(page_size >> i32(1)) + i64(place >> i32(1))
            to = smem + u32(at_v + 1024 * i) + own * u32(32) + u32(b) * u32(8)
            cp_async_8(to, codes, at, u32(8) * size)
            if size != u32(0):
                byte = scales[(row + i64(32 * i)) * i64(page_size >> i32(4)) + i64(place >> i32(4))]
                words[i] |= u32(byte) << (u32(8) * u32(b))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_v_blocks(
        smem, codes, scales, tables, table_at, kv_head, num_heads_kv, page_size, first_n, limit, lane
    ):  # fmt: skip
        words = cuda.local.array(lane_channels, u32)
        for i in unroll(lane_channels):
            words[i] = u32(0)
        for b in unroll(blocks):
            token = i32(first_n + i32(BLOCK * b))
            index, at, size = find_block(tables, table_at, kv_head, num_heads_kv, page_size, token, limit)
            load_v_block(smem, words, b, codes, scales, index, at, size, page_size, lane)
        for i in unroll(lane_channels):
            store(sfv_of(smem, u32(lane)) + u32(16 * i), words[i])

    return (load_k_blocks, load_v_blocks) if pages == "blocks" else (load_k_whole, load_v_whole)
