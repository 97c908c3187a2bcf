"""A tile of 64 keys in FP4 with one scale a row, for the plain FP4 MMA: ``mma.m16n8k32.f8f6f4``, scales applied after it.

The MMA wants one code a byte, E2M1 in bits [5:2] of it. Codes lie as for the block-scale MMA (two a byte, K's rows in
``operands.stored_order``) and are widened in registers, two instructions for four codes: the even codes of a word of eight
become one register, the odd ones another. A lane's fragment of m16n8k32 has k ``4 q + i + 16 (r >> 1)`` in byte i of A's
register r, and ``4 q + i + 16 r`` of B's (PTX ISA), so k slot ``4 q + i + 16 e`` stands for element ``8 q + 2 i + e`` of 32
in both operands alike, which no sum of products sees. (``ldmatrix...b4x16_p64`` would widen too, but wants a shift for each
register as well and twice the shared memory.)

Scores come with column ``2 q + e`` of n tile t being token ``32 (t / 4) + 8 q + 2 (t % 4) + e``: byte i of the A fragment
of P for a half of the tile is the score of n tile ``4 half + i`` in the lane's own registers. P is 448 P in E4M3.

A score is (sum of codes) sq sk [+ delta]. The channels' scales of V do not change along a sequence: over a run of such
tiles ``acc_O`` counts in units of them, ``enter`` and ``leave`` go from values to units and back. Needs sm_120a.
"""

from __future__ import annotations

from nbfmha.kernels.tile_codes import V_PITCH, Stage, make_load_q_codes
from nbfmha.recipe import TILE_N


def _make_widen():
    """Device function ``(word, e) -> u32``: the even (e = 0) or odd codes of eight, one in bits [5:2] of each byte."""
    from numba import cuda
    from numba.core import types

    u32 = types.uint32

    @cuda.jit(device=True, forceinline=True)
    def widen(word, e):
        return (word << u32(2) if e == 0 else word >> u32(2)) & u32(0x3C3C3C3C)

    return widen


def make_load_q(head_dim: int):
    """Device function ``(a: u32[k_steps, 4], sq: u32[2], q: u8*, sfq: u8*, first_row, rows, row, thread_in_group)``: codes
    of the queries ``row`` and ``row + 8`` after ``first_row`` (i64), and the bits of their scales; rows from ``rows`` on
    are zeros."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    load, load_codes = dev.ld_global_nc_u32, make_load_q_codes(head_dim)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_q(a, sq, q, sfq, first_row, rows, row, thread_in_group):
        load_codes(a, q, first_row, rows, row, thread_in_group)
        for side in unroll(2):
            this = i32(row + i32(8 * side))
            sq[side] = u32(0)
            if this < rows:
                sq[side] = load(sfq, (first_row + i64(this)) * i64(4))

    return load_q


def make_qk(head_dim: int, has_delta: bool):
    """Device function ``(acc_s: f32[8, 4], a, sq: u32[2], stage, delta_smem, lane)``: zeros become the scores of the warp's
    16 queries."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4, float_of = dev.ffi, dev.ldmatrix_x4, dev.mov_f32_b32
    load_v2, load_v4 = dev.ld_shared_v2_u32, dev.ld_shared_v4_u32
    fma, mma, widen = dev.fma_rn_f32, dev.mma_m16n8k32_f8f6f4_e2m1_e2m1, _make_widen()
    stage_of = Stage(head_dim, per_row=True)
    k_steps, k_pitch, at_sfk, chunks = stage_of.k_steps, stage_of.k_pitch, stage_of.sfk, head_dim // 32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, a, sq, stage, delta_smem, lane):
        wide = cuda.local.array((2, 4), u32)
        b = cuda.local.array(4, u32)
        two = cuda.local.array(2, u32)
        k_at = stage + u32((lane & 7) + ((lane >> 4) << 3)) * u32(k_pitch) + u32((lane >> 3) & 1) * u32(16)
        for k_step in unroll(k_steps):
            for half in unroll(2):
                for r in unroll(4):
                    wide[half, r] = widen(a[k_step, 2 * half + r % 2], r // 2)
            for pair in unroll(TILE_N // 16):
                ldmatrix_x4(ffi.from_buffer(b), k_at + u32(16 * k_pitch * pair + 32 * k_step))
                for half in unroll(min(2, chunks - 2 * k_step)):
                    for side in unroll(2):
                        for e in unroll(2):
                            two[e] = widen(b[2 * side + half], e)
                        c = ffi.from_buffer(acc_s[2 * pair + side])
                        mma(c, ffi.from_buffer(wide[half]), ffi.from_buffer(two), c)

        # products of codes are multiples of 1/4 below 2^24: the sums are exact
        sk_at = stage + u32(at_sfk) + u32(8) * u32(lane & 3)
        delta_at = delta_smem + u32(16) * u32(lane & 3)
        delta = cuda.local.array(4, u32)
        for t in unroll(TILE_N // 8):
            load_v2(ffi.from_buffer(two), sk_at + u32(32 * t))
            if has_delta:
                load_v4(ffi.from_buffer(delta), delta_at + u32(64 * t))
            for side in unroll(2):
                for e in unroll(2):
                    x = acc_s[t, 2 * side + e] * float_of(sq[side])
                    if has_delta:
                        acc_s[t, 2 * side + e] = fma(x, float_of(two[e]), float_of(delta[2 * side + e]))
                    else:
                        acc_s[t, 2 * side + e] = x * float_of(two[e])

    return qk


def make_pv(head_dim: int, rounded_sum: bool):
    """Device function ``(acc_o: f32[tiles, 4], acc_s: f32[8, 4], stage, lane)``: P (``acc_s``, times 448) in E4M3, times
    V's codes. ``rounded_sum``: a last tile of ``acc_o`` takes the sums of the rounded P, by a B operand of ones."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4, e4m3x4 = dev.ffi, dev.ldmatrix_x4, dev.cvt_rn_satfinite_e4m3x4_f32
    mma, widen = dev.mma_m16n8k32_f8f6f4_e4m3_e2m1, _make_widen()
    at_v, o_tiles = Stage(head_dim, per_row=True).v, head_dim // 8

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pv(acc_o, acc_s, stage, lane):
        p = cuda.local.array((2, 4), u32)
        b = cuda.local.array(4, u32)
        two = cuda.local.array(2, u32)
        for half in unroll(2):
            for r in unroll(4):
                n, c = 4 * half, 2 * (r % 2) + r // 2
                p[half, r] = e4m3x4(acc_s[n, c], acc_s[n + 1, c], acc_s[n + 2, c], acc_s[n + 3, c])
        v_at = stage + u32(at_v) + u32((lane & 7) + ((lane >> 4) << 3)) * u32(V_PITCH) + u32((lane >> 3) & 1) * u32(16)
        for pair in unroll(o_tiles // 2):
            ldmatrix_x4(ffi.from_buffer(b), v_at + u32(16 * V_PITCH * pair))
            for half in unroll(2):
                for side in unroll(2):
                    for e in unroll(2):
                        two[e] = widen(b[2 * side + half], e)
                    c = ffi.from_buffer(acc_o[2 * pair + side])
                    mma(c, ffi.from_buffer(p[half]), ffi.from_buffer(two), c)
        if rounded_sum:
            for e in unroll(2):
                two[e] = u32(0x08080808)  # E2M1 1.0
            for half in unroll(2):
                c = ffi.from_buffer(acc_o[o_tiles])
                mma(c, ffi.from_buffer(p[half]), ffi.from_buffer(two), c)

    return pv


def make_units(head_dim: int):
    """Device functions ``enter`` and ``leave``, both ``(acc_o: f32[tiles, 4], sfv: u8*, row, thread_in_group)``: the
    outputs divided by their channel's scale, and multiplied by it; row (i64) of sfv, f32 (..., head_dim).

    A channel of scale 0 is one of zeros, in 16 bits as well: there is nothing to divide.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, i64 = types.float32, types.int64
    load, float_of = dev.ld_global_nc_u32, dev.mov_f32_b32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def enter(acc_o, sfv, row, thread_in_group):
        at = row * i64(4 * head_dim) + i64(thread_in_group) * i64(8)
        for t in unroll(head_dim // 8):
            for e in unroll(2):
                s = float_of(load(sfv, at + i64(32 * t + 4 * e)))
                if s != f32(0):
                    for side in unroll(2):
                        acc_o[t, 2 * side + e] = acc_o[t, 2 * side + e] / s

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def leave(acc_o, sfv, row, thread_in_group):
        at = row * i64(4 * head_dim) + i64(thread_in_group) * i64(8)
        for t in unroll(head_dim // 8):
            for e in unroll(2):
                s = float_of(load(sfv, at + i64(32 * t + 4 * e)))
                for side in unroll(2):
                    acc_o[t, 2 * side + e] = acc_o[t, 2 * side + e] * s

    return enter, leave
