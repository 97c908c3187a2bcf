"""Both products of a warp with a tile of 64 tokens of an NVFP4 KV cache that :mod:`tile_paged` has brought.

Scores: S^T = K Q^T; m tile m has in row g + 8 h the token ``16 (g >> 1) + 4 (g & 1) + 8 (m >> 1) + 2 (m & 1) + h``. Once
its rows are columns (:mod:`out_columns`), lane q of a quad has the weights of one block of 16 tokens, and they are the B
fragments of four k steps of O^T = V^T P^T as they stand, if V's codes are widened as below: any order of K's rows is a
matter of addresses.

Widening: exponent and mantissa of E2M1 at f16's bit 9, the sign at its bit 15, mean value * 2^-14, denormals included. A
product brings four codes of a word, two apart, to bits 12..9 of the halves; 7 * 2^12 added to it carries the sign to bit
15 or fills bits 14..12, which a mask clears with all that lies below bit 9: codes (i, i + 4), i = 0..3. The product with
a UE4M3 scale is a multiple of 2^-24 with at most 6 significant bits: exact in f16, 2^14 times too small (``UNIT``; the
caller's factor). Pairs (i, i + 4) permute channels in Q K^T, where Q has the same order (``channel_order``), and tokens in
P V, where K's rows have it.

Instructions of a thread for 8 codes: 5 LOP3 and 2 shifts with their additions on the ALU, 2 IMAD and a subtraction, 4
HMUL2: 1.75 an element. Two factors come from memory, for of a known power of two ptxas makes a shift, and the ALU, which
takes two clocks an instruction, would be the bound. An ``mma`` is 0.125 an element in either product for each query
tile. Bytes: 4.5 bits an element; at 4.5 TB/s 132 SMs of 1.8 GHz get 34 elements a clock and SM, which leaves 3.8
instructions for each.
"""

from __future__ import annotations

import numpy as np

from nbfmha.kernels.tile_paged import PagedStage, make_swizzle
from nbfmha.recipe import TILE_N

UNIT = 2.0**14
"""What widened K and V must be multiplied with."""


def words_of_lane(head_dim: int, q_tiles: int) -> int:
    """Neighbouring words of a row of K that a lane widens at once. Four make one access; their Q fragments take 16
    registers a query tile, for which four query tiles have no room."""
    return 4 if head_dim >= 128 and q_tiles <= 2 else 2


def channel_order(head_dim: int, words: int) -> np.ndarray:
    """int (head_dim,): the channel at each place of Q's rows, so that k steps of 16 meet K as ``make_qk_widened`` takes
    it."""
    place = np.arange(head_dim)
    slab, inside = place // (32 * words), place % (32 * words)
    word, step, k = inside // 32, inside // 16 % 2, inside % 16
    return slab * 32 * words + k % 8 // 2 * 8 * words + 8 * word + 2 * step + k // 8 + 4 * (k % 2)


FACTORS = (1 << 9, 1 << 5)
"""What brings code 0, of the even ones, and code 1, of the odd ones, to bits 12..9 of a half."""


def _make_widen_word():
    """Device function ``(word, scale, factors: u32[2], b: u32[4])``: eight codes times their scale, f16x2, 2^14 times too
    small: registers (i, i + 4). factors: ``FACTORS``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, mul_f16x2, mad, unknown = types.uint32, dev.mul_rn_f16x2, dev.mad_lo_u32, dev.unknown_u32
    carry, keep = 0x70007000, 0x8E008E00

    @cuda.jit(device=True, forceinline=True)
    def widen_word(word, scale, factors, b):
        even = unknown(word & u32(0x0F0F0F0F))  # else LLVM masks once more after each product
        odd = u32(word - even)
        b[0] = mul_f16x2(mad(even, factors[0], u32(carry)) & u32(keep), scale)
        b[1] = mul_f16x2(mad(odd, factors[1], u32(carry)) & u32(keep), scale)
        b[2] = mul_f16x2(mad(even, u32(2), u32(carry)) & u32(keep), scale)
        b[3] = mul_f16x2(u32((odd >> u32(3)) + u32(carry)) & u32(keep), scale)

    return widen_word


def _make_widen_rows():
    """Device function ``(a: u32[2, 4], low, low_scale, high, high_scale, factors)``: the A fragments of two k steps, of a
    word of row g (``low``) and one of row g + 8, each times its scale."""
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    u32, widen_word = types.uint32, _make_widen_word()

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def widen_rows(a, low, low_scale, high, high_scale, factors):
        rows = cuda.local.array((2, 4), u32)
        widen_word(low, low_scale, factors, rows[0])
        widen_word(high, high_scale, factors, rows[1])
        for step in unroll(2):
            for r in unroll(4):
                a[step, r] = rows[r % 2, 2 * step + r // 2]

    return widen_rows


def make_qk_widened(stage: PagedStage, q_tiles: int):
    """Device function ``(acc_s: f32[q_tiles, 4, 4], q_smem, stage, factors, lane)``: adds the scores, ``UNIT`` times too
    small. Q: rows of f16 in ``channel_order``, at the pitch of :mod:`tile_16bit`. factors: ``FACTORS``."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels.tile_16bit import row_pitch
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4, load, load_u16, prmt = dev.ffi, dev.ldmatrix_x4, dev.ld_shared_u32, dev.ld_shared_u16, dev.prmt_b32
    low_twice, high_twice = dev.mov_b32_low_twice, dev.mov_b32_high_twice
    f16x2_e4m3x2, load_words = dev.cvt_rn_f16x2_e4m3x2, dev.ld_shared_v4_u32 if stage.words == 4 else dev.ld_shared_v2_u32
    mma, widen_rows = dev.mma_m16n8k16_f16, _make_widen_rows()
    head_dim, words, chunks, swizzle = stage.head_dim, stage.words, stage.chunks, make_swizzle(stage)
    at_sfk, sfk_block, q_pitch = stage.sfk, stage.sfk_block, row_pitch(stage.head_dim)
    slabs, sfk_pitch, two_scales = head_dim // (32 * words), head_dim // 16, words == 4

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_q(b, q_at):
        for i in unroll(q_tiles):
            for w in unroll(words):
                ldmatrix_x4(ffi.from_buffer(b[i, w]), q_at + u32(8 * q_pitch * i + 64 * w))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def multiply(acc_s, b, m, w, low, low_scale, high, high_scale, factors):
        """Rows g (``low``) and g + 8 of m tile m, k steps 2 w and 2 w + 1."""
        a = cuda.local.array((2, 4), u32)
        widen_rows(a, low, low_scale, high, high_scale, factors)
        for step in unroll(2):
            for i in unroll(q_tiles):
                c = ffi.from_buffer(acc_s[i, m])
                mma(c, ffi.from_buffer(a[step]), ffi.from_buffer(b[i, w, 2 * step :]), c)

    # scales of the lane's 32 channels, one in each half of a register; or of its 16, in both halves
    if two_scales:

        @cuda.jit(device=True, forceinline=True)
        def load_scales(row, lane):
            return f16x2_e4m3x2(load_u16(row + u32(2) * u32(lane & 3)))

        @cuda.jit(device=True, forceinline=True)
        def scale_of(scales, w):
            return low_twice(scales) if w < u32(2) else high_twice(scales)

    else:

        @cuda.jit(device=True, forceinline=True)
        def load_scales(row, lane):
            return f16x2_e4m3x2(prmt(load(row), u32(0), u32(0x4400) + u32(0x0011) * u32(lane & 3)))

        @cuda.jit(device=True, forceinline=True)
        def scale_of(scales, w):
            return scales

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def slab_of_tile(acc_s, b, m, k_at, next_k_at, sfk_at, factors, lane):
        codes = cuda.local.array((2, words), u32)
        scales = cuda.local.array(2, u32)
        load_words(ffi.from_buffer(codes[0]), k_at)
        load_words(ffi.from_buffer(codes[1]), next_k_at)
        for half in unroll(2):
            scales[half] = load_scales(sfk_at + u32(sfk_pitch * half), lane)
        for w in unroll(words):
            multiply(
                acc_s, b, m, u32(w), codes[0, w], scale_of(scales[0], u32(w)), codes[1, w], scale_of(scales[1], u32(w)),
                factors,
            )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, q_smem, stage, factors, lane):
        b = cuda.local.array((q_tiles, words, 4), u32)
        group_id, q = u32(lane >> 2), u32(lane & 3)
        block, row = group_id >> u32(1), u32(4) * (group_id & u32(1))
        own_row = u32(16) * block + row
        # eight lanes address the rows of one matrix: both halves of two k steps
        q_at = q_smem + u32(lane & 7) * u32(q_pitch) + u32(lane >> 3) * u32(16)
        # the lane's bytes of a row, q times 4 words: a chunk's number among eight is exclusive-ored, the rest added
        k_at, own_bytes = stage + own_row * u32(16 * chunks), q * u32(4 * words)
        own_chunk = (own_bytes & u32(0x70)) ^ (u32(16) * swizzle(group_id))
        k_at += own_bytes & u32(15)
        sfk_at = stage + u32(at_sfk) + block * u32(sfk_block) + row * u32(sfk_pitch)
        for slab in unroll(slabs):
            load_q(b, q_at + u32(64 * words * slab))
            for m in unroll(TILE_N // 16):
                rows = 8 * (m >> 1) + 2 * (m & 1)
                chunk, after = 16 * (chunks * rows + words * slab), 16 * (chunks * (rows + 1) + words * slab)
                slab_of_tile(
                    acc_s, b, u32(m),
                    k_at + u32(chunk & ~0x7F) + (own_chunk ^ u32(chunk & 0x7F)),
                    k_at + u32(after & ~0x7F) + (own_chunk ^ u32(after & 0x7F)),
                    sfk_at + u32(rows * sfk_pitch + 2 * words * slab), factors, lane,
                )  # fmt: skip

    return qk


def make_qk_codes(stage: PagedStage, q_tiles: int):
    """Device function ``(acc_s: f32[q_tiles, 4, 4], b: u32[q_tiles, k_steps, 2], sfb: u32[q_tiles], stage, lane)``: adds
    the scores by the block-scale MMA; Q as ``decode_query`` loads it."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels.mma import make_mma
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4, load = dev.ffi, dev.ldmatrix_x4, dev.ld_shared_u32
    mma, k_steps, chunks, swizzle = make_mma("blockscale"), stage.head_dim // 64, stage.chunks, make_swizzle(stage)
    at_sfk, sfk_block, sfk_pitch = stage.sfk, stage.sfk_block, stage.head_dim // 16

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, b, sfb, stage, lane):
        a = cuda.local.array(4, u32)
        sfa = cuda.local.array(2, u32)
        # eight lanes address the rows of one matrix: rows g, rows g + 8, which are the next ones here, then high k
        group_id = u32(lane & 7)
        k_at = stage + (u32(16) * (group_id >> u32(1)) + u32(4) * (group_id & u32(1))) * u32(16 * chunks)
        own_chunk = u32((lane >> 3) & 1) * u32(chunks) + u32(lane >> 4)
        k_at += u32(16) * (own_chunk & u32(8))
        own_chunk = u32(16) * ((own_chunk & u32(7)) ^ swizzle(group_id))
        # lane q of a quad supplies the scales of half q & 1 of m tiles q >> 1 and 2 + (q >> 1)
        group_id = u32(lane >> 2)
        sfk_at = stage + u32(at_sfk) + (group_id >> u32(1)) * u32(sfk_block)
        sfk_at += (u32(4) * (group_id & u32(1)) + u32(lane & 3)) * u32(sfk_pitch)
        for k_step in unroll(k_steps):
            for j in unroll(2):
                sfa[j] = load(sfk_at + u32(8 * sfk_pitch * j + 4 * k_step))
            for m in unroll(TILE_N // 16):
                chunk = 16 * (chunks * (8 * (m >> 1) + 2 * (m & 1)) + 2 * k_step)
                ldmatrix_x4(ffi.from_buffer(a), k_at + u32(chunk & ~0x7F) + (own_chunk ^ u32(chunk & 0x7F)))
                for i in unroll(q_tiles):
                    mma(acc_s[i, m], a, b[i, k_step], sfa[m // 2], sfb[i], m % 2, k_step)

    return qk


def make_pv(stage: PagedStage, q_tiles: int):
    """Device function ``(acc_o: f32[head_dim / 16, q_tiles, 4], p: u32[q_tiles, 4, 2], stage, factors, lane)``: adds P in
    f16, as ``out_columns.make_pack_columns`` leaves it, times V, ``UNIT`` times too small. factors: ``FACTORS``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, load_v2, load_v4, prmt = dev.ffi, dev.ld_shared_v2_u32, dev.ld_shared_v4_u32, dev.prmt_b32
    low_twice, high_twice = dev.mov_b32_low_twice, dev.mov_b32_high_twice
    f16x2_e4m3x2, mma, widen_rows = dev.cvt_rn_f16x2_e4m3x2, dev.mma_m16n8k16_f16, _make_widen_rows()
    at_v, at_sfv, head_dim = stage.v, stage.sfv, stage.head_dim

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def multiply(acc, p, w, low, low_scale, high, high_scale, factors):
        """Channels g (``low``) and g + 8 of the quad's 16, tokens of k steps 2 w and 2 w + 1."""
        a = cuda.local.array((2, 4), u32)
        widen_rows(a, low, low_scale, high, high_scale, factors)
        for step in unroll(2):
            for i in unroll(q_tiles):
                c = ffi.from_buffer(acc[i])
                mma(c, ffi.from_buffer(a[step]), ffi.from_buffer(p[i, u32(2) * w + u32(step)]), c)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pv(acc_o, p, stage, factors, lane):
        codes = cuda.local.array((2, 2), u32)
        words = cuda.local.array(4, u32)
        q = u32(lane & 3)
        selector = u32(0x40) + u32(0x11) * q  # byte q of one channel's word and of another's
        v_at = stage + u32(at_v) + u32(lane) * u32(8)
        sfv_at = stage + u32(at_sfv) + u32(lane >> 2) * u32(head_dim // 2)
        for c in unroll(head_dim // 16):
            if c % 2 == 0:
                load_v4(ffi.from_buffer(words), sfv_at + u32(8 * c))
            for half in unroll(2):
                load_v2(ffi.from_buffer(codes[half]), v_at + u32(512 * c + 256 * half))
            scales = f16x2_e4m3x2(prmt(words[2 * (c % 2)], words[2 * (c % 2) + 1], selector))
            low, high = low_twice(scales), high_twice(scales)
            for w in unroll(2):
                multiply(acc_o[c], p, u32(w), codes[0, w], low, codes[1, w], high, factors)

    return pv
