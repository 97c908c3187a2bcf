"""Both products of a warp with a tile of 64 tokens of an NVFP4 KV cache that :mod:`tile_paged` has brought.

Scores: K's n tile t has in column c the token ``16 (c >> 1) + 4 (c & 1) + 8 (t >> 2) + (t & 3)``. Lane q of a quad then
has, over the eight n tiles, the scores of one block of 16 tokens, and they are the B fragments of four k steps of
O^T = V^T P^T as they stand (:mod:`out_columns`), if V's codes are widened as below: no shuffle moves P, and any order of
K's rows is a matter of addresses.

Widening: exponent and mantissa of E2M1 at f16's bit 9, the sign at its bit 15, mean value * 2^-14, denormals included, and
lie in f16's upper byte alone. So four codes at a time become such bytes, of the even and of the odd nibbles of a word, and
a byte permutation or a mask makes two of them a register: codes (i, i + 4), i = 0..3. The product with a UE4M3 scale is a
multiple of 2^-24 with at most 6 significant bits: exact in f16, 2^14 times too small (``UNIT``; the caller's factor).
Pairs (i, i + 4) permute channels in Q K^T, where Q has the same order (``channel_order``), and tokens in P V, where K's
rows have it.

Instructions of a thread for 8 codes: 3 shifts, 4 LOP3, 4 to spread the bytes, 4 HMUL2: 1.9 an element. An ``mma`` is 0.25
an element in Q K^T, 0.125 for each query tile in P V. Bytes: 4.5 bits an element; at 3 TB/s 132 SMs of 1.7 GHz get 23
elements a clock and SM, which leaves 5.5 instructions for each.
"""

from __future__ import annotations

import numpy as np

from nbfmha.kernels.out_columns import m_tiles_of
from nbfmha.kernels.tile_paged import PagedStage, make_swizzle
from nbfmha.recipe import TILE_N

UNIT = 2.0**14
"""What widened K and V must be multiplied with."""


def words_of_lane(head_dim: int, q_tiles: int) -> int:
    """Neighbouring words of a row of K that a lane widens at once. Four make one access; their Q fragments take 32
    registers of each m tile, for which two m tiles have no room."""
    return 4 if head_dim >= 128 and q_tiles <= 2 else 2


def channel_order(head_dim: int, words: int) -> np.ndarray:
    """int (head_dim,): the channel at each place of Q's rows, so that k steps of 16 meet K as ``make_qk_widened`` takes
    it."""
    place = np.arange(head_dim)
    slab, inside = place // (32 * words), place % (32 * words)
    word, step, k = inside // 32, inside // 16 % 2, inside % 16
    return slab * 32 * words + k % 8 // 2 * 8 * words + 8 * word + 2 * step + k // 8 + 4 * (k % 2)


def _make_widen_word():
    """Device function ``(word, scale: f16x2, b: u32[4])``: eight codes times their scale, 2^14 times too small: registers
    (i, i + 4)."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, mul_f16x2, prmt = types.uint32, dev.mul_rn_f16x2, dev.prmt_b32

    @cuda.jit(device=True, forceinline=True)
    def widen_word(word, scale, b):
        even = ((word << u32(4)) & u32(0x80808080)) | ((word << u32(1)) & u32(0x0E0E0E0E))
        odd = (word & u32(0x80808080)) | ((word >> u32(3)) & u32(0x0E0E0E0E))
        # bytes 0 and 2 to where bytes 1 and 3 are
        b[0] = mul_f16x2(prmt(even, u32(0), u32(0x2404)), scale)
        b[1] = mul_f16x2(prmt(odd, u32(0), u32(0x2404)), scale)
        b[2] = mul_f16x2(even & u32(0xFF00FF00), scale)
        b[3] = mul_f16x2(odd & u32(0xFF00FF00), scale)

    return widen_word


def make_qk_widened(stage: PagedStage, q_tiles: int):
    """Device function ``(acc_s: f32[m_tiles, 8, 4], q_smem, stage, lane)``: adds the scores, ``UNIT`` times too small. Q:
    rows of f16 in ``channel_order``, at the pitch of :mod:`tile_16bit`.

    One query tile alone needs half of an A fragment: the other half is the next k step's. Two k steps then have one
    fragment and an accumulator each, the first with its scores in the upper half, the second in the lower; the other halves
    are products of one step's Q with the other's K, and forgotten. That halves the registers that Q takes.
    """
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels.tile_16bit import row_pitch
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    f32 = types.float32
    ffi, ldmatrix_x4, load, prmt = dev.ffi, dev.ldmatrix_x4, dev.ld_shared_u32, dev.prmt_b32
    f16x2_e4m3x2, load_words = dev.cvt_rn_f16x2_e4m3x2, dev.ld_shared_v4_u32 if stage.words == 4 else dev.ld_shared_v2_u32
    mma, widen_word, m_tiles, paired = dev.mma_m16n8k16_f16, _make_widen_word(), m_tiles_of(q_tiles), q_tiles == 1
    head_dim, words, chunks, swizzle = stage.head_dim, stage.words, stage.chunks, make_swizzle(stage)
    at_sfk, sfk_block, q_pitch = stage.sfk, stage.sfk_block, row_pitch(stage.head_dim)
    slabs, sfk_pitch, two_scales = head_dim // (32 * words), head_dim // 16, words == 4
    fragments = words if paired else 2 * words  # of Q a slab, each m tile
    fragment_bytes = 64 if paired else 32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_q(a, q_at):
        for m in unroll(m_tiles):
            for i in unroll(fragments):
                ldmatrix_x4(ffi.from_buffer(a[m, i]), q_at + u32(16 * q_pitch * m + fragment_bytes * i))

    # Numba types every branch, so each form is its functions
    if paired:

        @cuda.jit(device=True, forceinline=True)
        @unrolled
        def begin_tile(acc, acc_s, t):
            for r in unroll(2):
                acc[0, r], acc[0, r + 2] = acc_s[0, t, r], f32(0)
                acc[1, r], acc[1, r + 2] = f32(0), f32(0)

        @cuda.jit(device=True, forceinline=True)
        @unrolled
        def end_tile(acc, acc_s, t):
            for r in unroll(2):
                acc_s[0, t, r] = acc[0, r] + acc[1, r + 2]

        @cuda.jit(device=True, forceinline=True)
        def add_step(acc, acc_s, a, t, w, step, b):
            c = ffi.from_buffer(acc[step])
            mma(c, ffi.from_buffer(a[0, w]), ffi.from_buffer(b), c)

    else:

        @cuda.jit(device=True, forceinline=True)
        def begin_tile(acc, acc_s, t):
            pass

        @cuda.jit(device=True, forceinline=True)
        def end_tile(acc, acc_s, t):
            pass

        @cuda.jit(device=True, forceinline=True)
        @unrolled
        def add_step(acc, acc_s, a, t, w, step, b):
            for m in unroll(m_tiles):
                c = ffi.from_buffer(acc_s[m, t])
                mma(c, ffi.from_buffer(a[m, u32(2) * w + step]), ffi.from_buffer(b), c)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def multiply(acc, acc_s, a, t, w, word, scale):
        b = cuda.local.array(4, u32)
        widen_word(word, scale, b)
        for step in unroll(2):
            add_step(acc, acc_s, a, t, w, u32(step), b[2 * step :])

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def slab_of_tile(acc_s, a, t, k_at, sfk_at, lane):
        codes = cuda.local.array(words, u32)
        acc = cuda.local.array((2, 4), f32)
        load_words(ffi.from_buffer(codes), k_at)
        begin_tile(acc, acc_s, t)
        # scales of the lane's 32 channels, one of each half of a register; or of its 16, in both halves
        q = u32(lane & 3)
        selector = u32(0x4410) + u32(0x0022) * (q & u32(1)) if two_scales else u32(0x4400) + u32(0x0011) * q
        scales = f16x2_e4m3x2(prmt(load(sfk_at), u32(0), selector))
        for w in unroll(words):
            scale = prmt(scales, scales, u32(0x1010 if w < 2 else 0x3232)) if two_scales else scales
            multiply(acc, acc_s, a, t, u32(w), codes[w], scale)
        end_tile(acc, acc_s, t)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, q_smem, stage, lane):
        a = cuda.local.array((m_tiles, fragments, 4), u32)
        column, q = u32(lane >> 2), u32(lane & 3)
        block, row = column >> u32(1), u32(4) * (column & u32(1))
        own_row = u32(16) * block + row
        if paired:  # eight lanes address the rows of one matrix: low k of both steps, then high k
            q_at = q_smem + u32(lane & 7) * u32(q_pitch) + u32((lane >> 3) & 1) * u32(32) + u32(lane >> 4) * u32(16)
        else:
            q_at = q_smem + u32(lane & 15) * u32(q_pitch) + u32(lane >> 4) * u32(16)
        # the lane's bytes of a row, q times 4 words: a chunk's number among eight is exclusive-ored, the rest added
        k_at, own_bytes = stage + own_row * u32(16 * chunks), q * u32(4 * words)
        own_chunk = (own_bytes & u32(0x70)) ^ (u32(16) * swizzle(column))
        k_at += own_bytes & u32(15)
        sfk_at = stage + u32(at_sfk) + block * u32(sfk_block) + row * u32(sfk_pitch)
        if two_scales:
            sfk_at += (q >> u32(1)) * u32(4)
        for slab in unroll(slabs):
            load_q(a, q_at + u32(64 * words * slab))
            for t in unroll(TILE_N // 8):
                rows = 8 * (t >> 2) + (t & 3)
                at = sfk_at + u32(rows * sfk_pitch + 2 * words * slab)
                chunk = 16 * (chunks * rows + words * slab)
                slab_of_tile(acc_s, a, u32(t), k_at + u32(chunk & ~0x7F) + (own_chunk ^ u32(chunk & 0x7F)), at, lane)

    return qk


def make_qk_codes(stage: PagedStage, q_tiles: int):
    """Device function ``(acc_s: f32[m_tiles, 8, 4], a: u32[m_tiles, k_steps, 4], sfa: u32[m_tiles, words], stage, lane)``:
    adds the scores by the block-scale MMA. ``sfa`` as in :mod:`tile_blockscale`."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels.mma import make_mma
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4, load = dev.ffi, dev.ldmatrix_x4, dev.ld_shared_u32
    mma, m_tiles = make_mma("blockscale"), m_tiles_of(q_tiles)
    k_steps, chunks, swizzle = stage.head_dim // 64, stage.chunks, make_swizzle(stage)
    at_sfk, sfk_block, sfk_pitch = stage.sfk, stage.sfk_block, stage.head_dim // 16

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, a, sfa, stage, lane):
        b = cuda.local.array(4, u32)
        sfb = cuda.local.array(2, u32)
        # eight lanes address the rows of one matrix: two matrices an n tile
        column = u32(lane & 7)
        k_at = stage + (u32(16) * (column >> u32(1)) + u32(4) * (column & u32(1))) * u32(16 * chunks)
        own_chunk = u32(lane >> 4) * u32(chunks) + u32((lane >> 3) & 1)
        k_at += u32(16) * (own_chunk & u32(8))
        own_chunk = u32(16) * ((own_chunk & u32(7)) ^ swizzle(column))
        # lane q of a quad supplies the scales of n tiles q and q + 4
        column = u32(lane >> 2)
        sfk_at = stage + u32(at_sfk) + (column >> u32(1)) * u32(sfk_block)
        sfk_at += (u32(4) * (column & u32(1)) + u32(lane & 3)) * u32(sfk_pitch)
        for k_step in unroll(k_steps):
            for j in unroll(2):
                sfb[j] = load(sfk_at + u32(8 * sfk_pitch * j + 4 * k_step))
            for pair in unroll(TILE_N // 16):
                chunk = 16 * (chunks * (8 * (pair >> 1) + 2 * (pair & 1)) + 2 * k_step)
                ldmatrix_x4(ffi.from_buffer(b), k_at + u32(chunk & ~0x7F) + (own_chunk ^ u32(chunk & 0x7F)))
                for side in unroll(2):
                    t = 2 * pair + side
                    for m in unroll(m_tiles):
                        mma(acc_s[m, t], a[m, k_step], b[2 * side :], sfa[m, k_step // 2], sfb[t // 4], k_step % 2, t % 4)

    return qk


def make_pv(stage: PagedStage, q_tiles: int):
    """Device function ``(acc_o: f32[head_dim / 16, q_tiles, 4], p: u32[q_tiles, 4, 2], stage, valid, lane)``: adds P in
    f16, as ``out_columns.make_pack_columns`` leaves it, times V, ``UNIT`` times too small. valid: whether the lane's block
    of 16 tokens, block q of the tile, is to be read; V of another counts as zero, whatever its scales are."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, load_v2, load_v4, prmt = dev.ffi, dev.ld_shared_v2_u32, dev.ld_shared_v4_u32, dev.prmt_b32
    f16x2_e4m3x2, mma, widen_word = dev.cvt_rn_f16x2_e4m3x2, dev.mma_m16n8k16_f16, _make_widen_word()
    at_v, at_sfv, head_dim = stage.v, stage.sfv, stage.head_dim

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def multiply(acc, p, w, low, low_scale, high, high_scale):
        """Channels g (``low``) and g + 8 of the quad's 16, tokens of k steps 2 w and 2 w + 1."""
        a = cuda.local.array(4, u32)
        b = cuda.local.array((2, 4), u32)
        widen_word(low, low_scale, b[0])
        widen_word(high, high_scale, b[1])
        for step in unroll(2):
            for r in unroll(4):
                a[r] = b[r % 2, 2 * step + r // 2]
            for i in unroll(q_tiles):
                c = ffi.from_buffer(acc[i])
                mma(c, ffi.from_buffer(a), ffi.from_buffer(p[i, u32(2) * w + u32(step)]), c)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pv(acc_o, p, stage, valid, lane):
        codes = cuda.local.array((2, 2), u32)
        words = cuda.local.array(4, u32)
        q = u32(lane & 3)
        selector = u32(0x40) + u32(0x11) * q  # byte q of one channel's word and of another's
        keep = u32(0xFFFF) if valid else u32(0)
        v_at = stage + u32(at_v) + u32(lane) * u32(8)
        sfv_at = stage + u32(at_sfv) + u32(lane >> 2) * u32(head_dim // 2)
        for c in unroll(head_dim // 16):
            if c % 2 == 0:
                load_v4(ffi.from_buffer(words), sfv_at + u32(8 * c))
            for half in unroll(2):
                load_v2(ffi.from_buffer(codes[half]), v_at + u32(512 * c + 256 * half))
            scales = f16x2_e4m3x2(prmt(words[2 * (c % 2)], words[2 * (c % 2) + 1], selector) & keep)
            low, high = prmt(scales, scales, u32(0x1010)), prmt(scales, scales, u32(0x3232))
            for w in unroll(2):
                multiply(acc_o[c], p, u32(w), codes[0, w], low, codes[1, w], high)

    return pv
