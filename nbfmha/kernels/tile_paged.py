"""A tile of 64 tokens of an NVFP4 KV cache, a warp alone: from pages to a stage of shared memory, and both products.

K's n tile t has in column c the token ``16 (c >> 1) + 4 (c & 1) + 8 (t >> 2) + (t & 3)``. Lane q of a quad then has, over
the eight n tiles, the scores of one block of 16 tokens, and they are the A fragments of four k steps as they stand, if
V's codes are widened as below: no shuffle moves P, and any order of K's rows is a matter of addresses.

Widening: a word of eight codes becomes four registers with codes (i, i + 4), i = 0..3: those lie 16 bits apart, so two
shifts and two masks place both. Exponent and mantissa of E2M1 at f16's bit 9 mean value * 2^-14, denormals included, and
the product with a UE4M3 scale is a multiple of 2^-24 with at most 6 significant bits: exact in f16, 2^14 times too small
(``UNIT``; the caller's factor). Pairs (i, i + 4) permute channels in Q K^T, where Q has the same order
(``channel_order``), and tokens in P V, where K's rows have it.

Instructions a thread and element, one m tile: 19 for 8 codes (7 shifts, 8 LOP3, 4 HMUL2), 2.4; an ``mma`` 0.25; with
loads, scales and softmax the loop on sm_90a has 4.1 at head_dim 64. Bytes: 4.5 bits. At 3 TB/s 132 SMs of 1.7 GHz get 23
elements a clock and SM, which leaves 5.5 instructions for each.

==============  ====================================================================================================
K codes         four blocks of 16 rows, head_dim / 2 bytes each, at a pitch of 16 more, and a gap after each block: the
                lanes of one access lie in different banks
V codes         head_dim rows of 32 bytes
sfk             four blocks of 16 rows of head_dim / 16 bytes, 16 more after each block
sfv             head_dim words: the four blocks of 16 tokens of one channel
==============  ====================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nbfmha.recipe import TILE_N

UNIT = 2.0**14
"""What widened K and V must be multiplied with."""
BLOCK = 16  # tokens that share a scale of V, and that always lie in one page


def words_of_lane(head_dim: int, m_tiles: int) -> int:
    """Neighbouring words of a row of K that a lane widens at once. Four make one access; their Q fragments take 32 m_tiles
    registers, for which two m tiles have no room."""
    return 4 if head_dim >= 128 and m_tiles == 1 else 2


def channel_order(head_dim: int, words: int) -> np.ndarray:
    """int (head_dim,): the channel at each place of Q's rows, so that k steps of 16 meet K as ``make_qk_widened`` takes
    it."""
    place = np.arange(head_dim)
    slab, inside = place // (32 * words), place % (32 * words)
    word, step, k = inside // 32, inside // 16 % 2, inside % 16
    return slab * 32 * words + k % 8 // 2 * 8 * words + 8 * word + 2 * step + k // 8 + 4 * (k % 2)


@dataclass(frozen=True)
class PagedStage:
    """Byte offsets of the parts of a stage. words: of ``words_of_lane``; 0 for ``blockscale``, which reads rows."""

    head_dim: int
    words: int

    @property
    def k_pitch(self) -> int:
        return self.head_dim // 2 + 16

    @property
    def k_block(self) -> int:
        return BLOCK * self.k_pitch + (32 if self.words == 2 else 16)

    @property
    def v(self) -> int:
        return TILE_N // BLOCK * self.k_block

    @property
    def sfk(self) -> int:
        return self.v + self.head_dim * TILE_N // 2

    @property
    def sfk_block(self) -> int:
        return self.head_dim + 16

    @property
    def sfv(self) -> int:
        return self.sfk + TILE_N // BLOCK * self.sfk_block

    @property
    def bytes(self) -> int:
        return self.sfv + 4 * self.head_dim


def make_load_tile(stage: PagedStage, whole: bool):
    """Device function ``(smem, k_codes, k_scales, v_codes, v_scales, tables, table_at, kv_head, num_heads_kv, page_size,
    first_n, limit, lane)``: a warp brings the tokens from ``first_n`` on, asynchronously.

    table_at: i64, place of the sequence's first page in ``tables``; -1 - page for a sequence that is one page. whole: pages
    of whole tiles, which are copied as they are. Else each block of 16 has its page, blocks from token ``limit`` on are
    zeros, and V's scales, whose bytes do not lie in words, are read one by one.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    cp_async_16, cp_async_8, cp_async_4, store = (
        dev.cp_async_cg_16, dev.cp_async_ca_8, dev.cp_async_ca_4, dev.st_shared_u32
    )  # fmt: skip
    head_dim, k_pitch, k_block = stage.head_dim, stage.k_pitch, stage.k_block
    at_v, at_sfk, at_sfv, sfk_block = stage.v, stage.sfk, stage.sfv, stage.sfk_block
    chunks, rows_a_pass = head_dim // 32, 1024 // head_dim  # of 16 bytes a row of K
    scale_chunks = head_dim // 16  # of 16 bytes a block of 16 rows of sfk
    blocks, lane_channels = TILE_N // BLOCK, head_dim // 32

    @cuda.jit(device=True, forceinline=True)
    def page_of(tables, table_at, kv_head, num_heads_kv, page_size, token):
        """(page and head as one index, place in the page) of a token."""
        if table_at < i64(0):
            return (i64(-1) - table_at) * i64(num_heads_kv) + i64(kv_head), token
        page = i32(u32(token) // u32(page_size))
        place = i32(token - page * page_size)
        return i64(tables[table_at + i64(page)]) * i64(num_heads_kv) + i64(kv_head), place

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_whole(
        smem, k_codes, k_scales, v_codes, v_scales, tables, table_at, kv_head, num_heads_kv, page_size, first_n, limit, lane
    ):
        index, place = page_of(tables, table_at, kv_head, num_heads_kv, page_size, first_n)
        token, own = index * i64(page_size) + i64(place), u32(lane)
        to = smem + (own // u32(chunks)) * u32(k_pitch) + (own % u32(chunks)) * u32(16)
        at = token * i64(head_dim // 2) + i64(own * u32(16))
        for i in unroll(TILE_N // rows_a_pass):
            row = rows_a_pass * i
            cp_async_16(to + u32(row // BLOCK * k_block + row % BLOCK * k_pitch), k_codes, at + i64(512 * i), u32(16))
        for i in unroll(-(-blocks * scale_chunks // 32)):
            chunk = own + u32(32 * i)
            if 32 * (i + 1) <= blocks * scale_chunks or chunk < u32(blocks * scale_chunks):
                to = smem + u32(at_sfk) + chunk // u32(scale_chunks) * u32(sfk_block) + chunk % u32(scale_chunks) * u32(16)
                cp_async_16(to, k_scales, token * i64(head_dim // 16) + i64(chunk * u32(16)), u32(16))
        row = index * i64(head_dim)
        code_pitch, scale_pitch = i64(page_size >> i32(1)), i64(page_size >> i32(4))
        at = (row + i64(own >> u32(1))) * code_pitch + i64(place >> i32(1)) + i64((own & u32(1)) * u32(16))
        for i in unroll(head_dim // 16):
            cp_async_16(smem + u32(at_v + 512 * i) + own * u32(16), v_codes, at + i64(16 * i) * code_pitch, u32(16))
        at = (row + i64(own)) * scale_pitch + i64(place >> i32(4))
        for i in unroll(lane_channels):
            cp_async_4(smem + u32(at_sfv + 128 * i) + own * u32(4), v_scales, at + i64(32 * i) * scale_pitch, u32(4))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_block(
        smem, words, b, k_codes, k_scales, v_codes, v_scales, index, place, there, page_size, lane
    ):  # fmt: skip
        own, size = u32(lane), u32(1) if there else u32(0)
        token = index * i64(page_size) + i64(place)
        to = smem + u32(b) * u32(k_block) + (own // u32(chunks)) * u32(k_pitch) + (own % u32(chunks)) * u32(16)
        for i in unroll(BLOCK // rows_a_pass):
            at = token * i64(head_dim // 2) + i64(own * u32(16)) + i64(512 * i)
            cp_async_16(to + u32(rows_a_pass * i * k_pitch), k_codes, at, u32(16) * size)
        if own < u32(scale_chunks):
            to = smem + u32(at_sfk) + u32(b) * u32(sfk_block) + own * u32(16)
            cp_async_16(to, k_scales, token * i64(head_dim // 16) + i64(own * u32(16)), u32(16) * size)
        row = index * i64(head_dim) + i64(own)
        for i in unroll(lane_channels):
            at = (row + i64(32 * i)) * i64(page_size >> i32(1)) + i64(place >> i32(1))
            to = smem + u32(at_v + 1024 * i) + own * u32(32) + u32(b) * u32(8)
            cp_async_8(to, v_codes, at, u32(8) * size)
            if there:
                byte = v_scales[(row + i64(32 * i)) * i64(page_size >> i32(4)) + i64(place >> i32(4))]
                words[i] |= u32(byte) << (u32(8) * u32(b))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_blocks(
        smem, k_codes, k_scales, v_codes, v_scales, tables, table_at, kv_head, num_heads_kv, page_size, first_n, limit, lane
    ):
        words = cuda.local.array(lane_channels, u32)
        for i in unroll(lane_channels):
            words[i] = u32(0)
        for b in unroll(blocks):
            token = i32(first_n + i32(BLOCK * b))
            there = token < limit
            index, place = i64(0), i32(0)
            if there:
                index, place = page_of(tables, table_at, kv_head, num_heads_kv, page_size, token)
            load_block(smem, words, b, k_codes, k_scales, v_codes, v_scales, index, place, there, page_size, lane)
        for i in unroll(lane_channels):
            store(smem + u32(at_sfv + 128 * i) + u32(lane) * u32(4), words[i])

    return load_whole if whole else load_blocks


def _make_widen_word():
    """Device function ``(word, scale: f16x2, b: u32[4])``: eight codes times their scale, 2^14 times too small: registers
    (i, i + 4)."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, mul_f16x2 = types.uint32, dev.mul_rn_f16x2

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def widen_word(word, scale, b):
        for i in unroll(4):
            sign = (word << u32(12 - 4 * i)) & u32(0x80008000)
            if i < 3:
                magnitude = (word << u32(9 - 4 * i if i < 3 else 0)) & u32(0x0E000E00)
            else:
                magnitude = (word >> u32(3)) & u32(0x0E000E00)
            b[i] = mul_f16x2(sign | magnitude, scale)

    return widen_word


def _make_multiply(m_tiles: int):
    """Device function ``(acc: f32[m_tiles, tiles, 4], a: u32[m_tiles, k steps, 4], t, w, word, scale)``: adds to n tile t
    the products of k steps 2 w, 2 w + 1 of ``a`` with the eight codes of ``word``, widened."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, ffi, mma, widen_word = types.uint32, dev.ffi, dev.mma_m16n8k16_f16, _make_widen_word()

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def multiply(acc, a, t, w, word, scale):
        b = cuda.local.array(4, u32)
        widen_word(word, scale, b)
        for step in unroll(2):
            for m in unroll(m_tiles):
                c = ffi.from_buffer(acc[m, t])
                mma(c, ffi.from_buffer(a[m, 2 * w + u32(step)]), ffi.from_buffer(b[2 * step :]), c)

    return multiply


def make_qk_widened(stage: PagedStage, m_tiles: int):
    """Device function ``(acc_s: f32[m_tiles, 8, 4], q_smem, stage, lane)``: adds the scores, ``UNIT`` times too small. Q:
    rows of f16 in ``channel_order``, at the pitch of :mod:`tile_16bit`."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels.tile_16bit import row_pitch
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4, load, prmt = dev.ffi, dev.ldmatrix_x4, dev.ld_shared_u32, dev.prmt_b32
    f16x2_e4m3x2, load_words = dev.cvt_rn_f16x2_e4m3x2, dev.ld_shared_v4_u32 if stage.words == 4 else dev.ld_shared_v2_u32
    multiply = _make_multiply(m_tiles)
    head_dim, words, k_pitch, k_block = stage.head_dim, stage.words, stage.k_pitch, stage.k_block
    at_sfk, sfk_block, q_pitch = stage.sfk, stage.sfk_block, row_pitch(stage.head_dim)
    slabs, k_steps, sfk_pitch, two_scales = head_dim // (32 * words), 2 * words, head_dim // 16, words == 4

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_q(a, q_at):
        for m in unroll(m_tiles):
            for step in unroll(k_steps):
                ldmatrix_x4(ffi.from_buffer(a[m, step]), q_at + u32(16 * q_pitch * m + 32 * step))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def slab_of_tile(acc_s, a, t, k_at, sfk_at, lane):
        codes = cuda.local.array(words, u32)
        load_words(ffi.from_buffer(codes), k_at)
        # scales of the lane's 32 channels, one of each half of a register; or of its 16, in both halves
        q = u32(lane & 3)
        selector = u32(0x4410) + u32(0x0022) * (q & u32(1)) if two_scales else u32(0x4400) + u32(0x0011) * q
        scales = f16x2_e4m3x2(prmt(load(sfk_at), u32(0), selector))
        for w in unroll(words):
            scale = prmt(scales, scales, u32(0x1010 if w < 2 else 0x3232)) if two_scales else scales
            multiply(acc_s, a, t, u32(w), codes[w], scale)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, q_smem, stage, lane):
        a = cuda.local.array((m_tiles, k_steps, 4), u32)
        column, q = u32(lane >> 2), u32(lane & 3)
        block, row = column >> u32(1), u32(4) * (column & u32(1))
        q_at = q_smem + u32(lane & 15) * u32(q_pitch) + u32(lane >> 4) * u32(16)
        k_at = stage + block * u32(k_block) + row * u32(k_pitch) + q * u32(4 * words)
        sfk_at = stage + u32(at_sfk) + block * u32(sfk_block) + row * u32(sfk_pitch)
        if two_scales:
            sfk_at += (q >> u32(1)) * u32(4)
        for slab in unroll(slabs):
            load_q(a, q_at + u32(32 * k_steps * slab))
            for t in unroll(TILE_N // 8):
                rows = 8 * (t >> 2) + (t & 3)
                at = sfk_at + u32(rows * sfk_pitch + 2 * words * slab)
                slab_of_tile(acc_s, a, u32(t), k_at + u32(rows * k_pitch + 16 * words * slab), at, lane)

    return qk


def make_qk_codes(stage: PagedStage, m_tiles: int):
    """Device function ``(acc_s: f32[m_tiles, 8, 4], a: u32[m_tiles, k_steps, 4], sfa: u32[m_tiles, words], stage, lane)``:
    adds the scores by the block-scale MMA. ``sfa`` as in :mod:`tile_blockscale`."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels.mma import make_mma
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4, load = dev.ffi, dev.ldmatrix_x4, dev.ld_shared_u32
    mma = make_mma("blockscale")
    k_steps, k_pitch, k_block = stage.head_dim // 64, stage.k_pitch, stage.k_block
    at_sfk, sfk_block, sfk_pitch = stage.sfk, stage.sfk_block, stage.head_dim // 16

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, a, sfa, stage, lane):
        b = cuda.local.array(4, u32)
        sfb = cuda.local.array(2, u32)
        # eight lanes address the rows of one matrix: two matrices an n tile
        column = u32(lane & 7)
        k_at = stage + (column >> u32(1)) * u32(k_block) + u32((lane >> 3) & 1) * u32(16)
        k_at += (u32(4) * (column & u32(1)) + u32(lane >> 4)) * u32(k_pitch)
        # lane q of a quad supplies the scales of n tiles q and q + 4
        column = u32(lane >> 2)
        sfk_at = stage + u32(at_sfk) + (column >> u32(1)) * u32(sfk_block)
        sfk_at += (u32(4) * (column & u32(1)) + u32(lane & 3)) * u32(sfk_pitch)
        for k_step in unroll(k_steps):
            for j in unroll(2):
                sfb[j] = load(sfk_at + u32(8 * sfk_pitch * j + 4 * k_step))
            for pair in unroll(TILE_N // 16):
                ldmatrix_x4(ffi.from_buffer(b), k_at + u32((8 * (pair >> 1) + 2 * (pair & 1)) * k_pitch + 32 * k_step))
                for side in unroll(2):
                    t = 2 * pair + side
                    for m in unroll(m_tiles):
                        mma(acc_s[m, t], a[m, k_step], b[2 * side :], sfa[m, k_step // 2], sfb[t // 4], k_step % 2, t % 4)

    return qk


def make_pv(stage: PagedStage, m_tiles: int):
    """Device function ``(acc_o: f32[m_tiles, tiles, 4], p: u32[m_tiles, 4, 4], stage, valid, lane)``: P in f16 as
    ``tile_16bit.make_pack`` leaves it, times V, ``UNIT`` times too small. valid: whether the lane's block of 16 tokens,
    block q of the tile, is to be read; V of another counts as zero, whatever its scales are."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, load, load_v2, prmt = dev.ffi, dev.ld_shared_u32, dev.ld_shared_v2_u32, dev.prmt_b32
    f16x2_e4m3x2, multiply = dev.cvt_rn_f16x2_e4m3x2, _make_multiply(m_tiles)
    at_v, at_sfv, head_dim = stage.v, stage.sfv, stage.head_dim

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pv(acc_o, p, stage, valid, lane):
        codes = cuda.local.array(2, u32)
        # the block's byte of the channel's word, twice; bytes 4 to 7 are zeros
        selector = u32(0x4400) + u32(0x0011) * u32(lane & 3) if valid else u32(0x4444)
        v_at = stage + u32(at_v) + u32(lane) * u32(8)
        sfv_at = stage + u32(at_sfv) + u32(lane >> 2) * u32(4)
        for t in unroll(head_dim // 8):
            load_v2(ffi.from_buffer(codes), v_at + u32(256 * t))
            scale = f16x2_e4m3x2(prmt(load(sfv_at + u32(32 * t)), u32(0), selector))
            for w in unroll(2):
                multiply(acc_o, p, u32(t), u32(w), codes[w], scale)

    return pv
