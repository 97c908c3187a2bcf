"""A tile of 64 keys in NVFP4 for the block-scale MMA: both products straight from the codes in a stage of shared memory.

Q's fragments stay in registers. Scores come with K's rows in ``operands.stored_order``: column ``2 q + e`` of n tile t is
token ``32 (t / 4) + 8 q + 2 (t % 4) + e``, so lane q of a quad has the scores of eight neighbouring tokens of each half of
the tile, and these are the nibbles of its A fragment in the second MMA (PTX ISA, m16n8k64: register r, nibble i is row
``g + 8 (r & 1)``, k ``8 q + i + 32 (r >> 1)``). One word of scales serves four MMAs through thread-id-b.
"""

from __future__ import annotations

from nbfmha.kernels.mma import make_mma
from nbfmha.kernels.tile_codes import V_PITCH, Stage, make_load_q_codes
from nbfmha.recipe import TILE_N


def make_load_q(head_dim: int):
    """Device function ``(a: u32[k_steps, 4], sfa, q: u8*, sfq: u8*, first_row, rows, row, thread_in_group)``: fragments and
    scales of the queries ``row`` and ``row + 8`` after ``first_row`` (i64); rows from ``rows`` on are zeros."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    load, load_codes = dev.ld_global_nc_u32, make_load_q_codes(head_dim)
    k_steps = Stage(head_dim).k_steps

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_q(a, sfa, q, sfq, first_row, rows, row, thread_in_group):
        load_codes(a, q, first_row, rows, row, thread_in_group)
        # lanes 0, 1 of a quad supply the scales of rows g, g + 8 of an even k step, lanes 2, 3 those of the odd one
        this = i32(row + i32(8) * (thread_in_group & i32(1)))
        for pair in unroll((k_steps + 1) // 2):
            step = i32(2 * pair) + (thread_in_group >> i32(1))
            sfa[pair] = u32(0)
            if this < rows and step < i32(k_steps):
                sfa[pair] = load(sfq, (first_row + i64(this)) * i64(4 * k_steps) + i64(step) * i64(4))

    return load_q


def make_qk(head_dim: int):
    """Device function ``(acc_s: f32[8, 4], a, sfa, stage, lane)``: adds the scores of the warp's 16 queries."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4, load = dev.ffi, dev.ldmatrix_x4, dev.ld_shared_u32
    mma = make_mma("blockscale")
    stage_of = Stage(head_dim)
    k_steps, k_pitch, at_sfk = stage_of.k_steps, stage_of.k_pitch, stage_of.sfk

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, a, sfa, stage, lane):
        b = cuda.local.array(4, u32)
        sfb = cuda.local.array(2, u32)
        k_at = stage + u32((lane & 7) + ((lane >> 4) << 3)) * u32(k_pitch) + u32((lane >> 3) & 1) * u32(16)
        sfk_at = stage + u32(at_sfk) + u32((lane & 3) * 8 + (lane >> 2)) * u32(4 * k_steps)
        for k_step in unroll(k_steps):
            for j in unroll(2):
                sfb[j] = load(sfk_at + u32(32 * 4 * k_steps * j + 4 * k_step))
            for pair in unroll(TILE_N // 16):
                ldmatrix_x4(ffi.from_buffer(b), k_at + u32(16 * k_pitch * pair + 32 * k_step))
                for side in unroll(2):
                    t = 2 * pair + side
                    mma(acc_s[t], a[k_step], b[2 * side :], sfa[k_step // 2], sfb[t // 4], k_step % 2, t % 4)

    return qk


def make_pv_f16(head_dim: int):
    """Device function ``(acc_o: f32[tiles, 4], acc_s: f32[8, 4], stage, lane)``: P rounded to f16, V widened exactly to f16
    in the registers of each warp, ``mma.m16n8k16``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, mma, load, pack = dev.ffi, dev.mma_m16n8k16_f16, dev.ld_shared_u32, dev.cvt_rn_f16x2_f32
    f16x2_e2m1x2, f16x2_e4m3x2, mul_f16x2 = dev.cvt_rn_f16x2_e2m1x2, dev.cvt_rn_f16x2_e4m3x2, dev.mul_rn_f16x2
    stage_of = Stage(head_dim)
    at_v, at_sfv = stage_of.v, stage_of.sfv

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pv(acc_o, acc_s, stage, lane):
        p = cuda.local.array((2, 4), u32)
        v = cuda.local.array(2, u32)
        v_at = stage + u32(at_v) + u32(lane >> 2) * u32(V_PITCH) + u32(lane & 3) * u32(4)
        sfv_at = stage + u32(at_sfv) + u32(lane >> 2) * u32(4)
        for half in unroll(2):
            for step in unroll(2):
                for i in unroll(2):
                    n = 4 * half + 2 * step + i
                    p[step, 2 * i] = pack(acc_s[n, 1], acc_s[n, 0])
                    p[step, 2 * i + 1] = pack(acc_s[n, 3], acc_s[n, 2])
            for t in unroll(head_dim // 8):
                codes = load(v_at + u32(8 * V_PITCH * t + 16 * half))
                byte = (load(sfv_at + u32(32 * t)) >> (u32(16 * half) + u32(8) * u32((lane & 3) >> 1))) & u32(0xFF)
                scale = f16x2_e4m3x2(byte | (byte << u32(8)))
                c = ffi.from_buffer(acc_o[t])
                for step in unroll(2):
                    for i in unroll(2):
                        v[i] = mul_f16x2(f16x2_e2m1x2((codes >> u32(16 * step + 8 * i)) & u32(0xFF)), scale)
                    mma(c, ffi.from_buffer(p[step]), ffi.from_buffer(v), c)

    return pv


def make_pv_nvfp4(head_dim: int, rounded_sum: bool):
    """Device function ``(acc_o: f32[tiles, 4], acc_s: f32[8, 4], sfp: u32[1], stage, lane)``: P / s, as
    ``softmax.make_step_nvfp4`` left it, rounded to E2M1, both operands of one block-scale MMA for each n tile.
    ``rounded_sum``: a last tile of ``acc_o`` takes the sums of the quantised P, by a B operand of ones."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4, load, prmt = dev.ffi, dev.ldmatrix_x4, dev.ld_shared_u32, dev.prmt_b32
    bfly, bits_of, float_of = dev.shfl_sync_bfly_f32, dev.mov_b32_f32, dev.mov_f32_b32
    e2m1x8 = dev.cvt_rn_satfinite_e2m1x8_f32
    mma = make_mma("blockscale")
    stage_of = Stage(head_dim)
    at_v, at_sfv, o_tiles = stage_of.v, stage_of.sfv, head_dim // 8

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pv(acc_o, acc_s, sfp, stage, lane):
        a = cuda.local.array(4, u32)
        b = cuda.local.array(4, u32)
        for side in unroll(2):
            for half in unroll(2):
                n, e = 4 * half, 2 * side
                a[2 * half + side] = e2m1x8(
                    acc_s[n, e], acc_s[n, e + 1], acc_s[n + 1, e], acc_s[n + 1, e + 1],
                    acc_s[n + 2, e], acc_s[n + 2, e + 1], acc_s[n + 3, e], acc_s[n + 3, e + 1],
                )  # fmt: skip
        # lanes q and q ^ 2 hold the scales of one row's four groups; lane 0 supplies side 0, lane 1 side 1, and nobody
        # reads those of lanes 2 and 3
        other = bits_of(bfly(float_of(sfp[0]), u32(2)))
        sfa = prmt(sfp[0], other, u32(0x7362) if (lane & 1) else u32(0x5140))

        v_at = stage + u32(at_v) + u32((lane & 7) + ((lane >> 4) << 3)) * u32(V_PITCH) + u32((lane >> 3) & 1) * u32(16)
        sfv_at = stage + u32(at_sfv) + u32((lane & 3) * 8 + (lane >> 2)) * u32(4)
        sfb = u32(0)
        for pair in unroll(o_tiles // 2):
            if pair % 2 == 0:
                sfb = load(sfv_at + u32(64 * pair))
            ldmatrix_x4(ffi.from_buffer(b), v_at + u32(16 * V_PITCH * pair))
            for i in unroll(2):
                t = 2 * pair + i
                mma(acc_o[t], a, b[2 * i :], sfa, sfb, 0, t % 4)
        if rounded_sum:
            b[0] = u32(0x22222222)  # E2M1 1.0, with scales of 1.0
            b[1] = u32(0x22222222)
            mma(acc_o[o_tiles], a, b, sfa, u32(0x38383838), 0, 0)

    return pv
