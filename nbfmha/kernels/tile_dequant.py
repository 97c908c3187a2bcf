"""A tile of 64 keys in NVFP4 for GPUs without the block-scale MMA: widened once by the CTA to f16 in shared memory.

E2M1 times UE4M3 is exact in f16 (at most 6 significant bits, 2^-10 .. 2688). Eight codes of a word become four registers
that hold codes (0, 4), (1, 5), (2, 6), (3, 7): those pairs lie 16 bits apart, so that two shifts and two masks place both
at once. Along head_dim that permutes the channels of Q and K alike, which no sum of products sees; along tokens it
permutes V's, and K's rows are put in the same order. So n tile t of the scores has token ``8 t + q + 4 e`` in column
``2 q + e``, and P is the A fragment of the second MMA as it stands.
"""

from __future__ import annotations

from nbfmha.kernels.tile_16bit import THREADS, TRANSPOSED_PITCH, row_pitch
from nbfmha.kernels.tile_codes import V_PITCH, Stage
from nbfmha.recipe import TILE_N


def _make_widen():
    """Device function ``(codes: u32[4], scales, smem, flip)``: 32 codes, two scales in the low bytes of ``scales``, to 64
    bytes of f16; word w goes to ``smem + (16 w ^ flip)``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    f16x2_e4m3x2, mul_f16x2, prmt, store = dev.cvt_rn_f16x2_e4m3x2, dev.mul_rn_f16x2, dev.prmt_b32, dev.st_shared_v4_u32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def widen(codes, scales, smem, flip):
        both = f16x2_e4m3x2(scales & u32(0xFFFF))
        h = cuda.local.array(4, u32)
        for w in unroll(4):
            scale = prmt(both, both, u32(0x1010 if w < 2 else 0x3232))
            for i in unroll(4):
                word = codes[w]
                sign = (word << u32(12 - 4 * i)) & u32(0x80008000)
                # exponent and mantissa at f16's bit 9 mean value * 2^-14, denormals included; the product is exact
                if i < 3:
                    magnitude = (word << u32(9 - 4 * i if i < 3 else 0)) & u32(0x0E000E00)
                else:
                    magnitude = (word >> u32(3)) & u32(0x0E000E00)
                h[i] = mul_f16x2(mul_f16x2(sign | magnitude, u32(0x74007400)), scale)
            store(smem + (u32(16 * w) ^ flip), h[0], h[1], h[2], h[3])

    return widen


def make_widen_q(head_dim: int):
    """Device function ``(smem, q: u8*, sfq: u8*, first_row, rows, thread)``: 64 queries from row ``first_row`` (i64) of the
    codes to rows of f16; rows from ``rows`` on are zeros."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    load = dev.ld_global_nc_u32
    widen = _make_widen()
    chunks, code_bytes, scale_bytes = head_dim // 32, 32 * Stage(head_dim).k_steps, 4 * Stage(head_dim).k_steps
    pitch = row_pitch(head_dim)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def widen_q(smem, q, sfq, first_row, rows, thread):
        codes = cuda.local.array(4, u32)
        for chunk in range(thread, TILE_N * chunks, THREADS):
            row, column = u32(chunk) // u32(chunks), u32(chunk) % u32(chunks)
            scales = u32(0)
            for w in unroll(4):
                codes[w] = u32(0)
            if i32(row) < rows:
                at = first_row + i64(row)
                for w in unroll(4):
                    codes[w] = load(q, at * i64(code_bytes) + i64(column) * i64(16) + i64(4 * w))
                scales = load(sfq, at * i64(scale_bytes) + i64(column >> u32(1)) * i64(4)) >> (u32(16) * (column & u32(1)))
            widen(codes, scales, smem + row * u32(pitch) + column * u32(64), u32(0))

    return widen_q


def make_widen_kv(head_dim: int):
    """Device function ``(stage, k_smem, v_smem, thread)``: a stage's codes to f16, K as rows of head_dim, V transposed."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, load, load_v4 = dev.ffi, dev.ld_shared_u32, dev.ld_shared_v4_u32
    widen = _make_widen()
    stage_of = Stage(head_dim)
    chunks, k_pitch, sfk_pitch = head_dim // 32, stage_of.k_pitch, 4 * stage_of.k_steps
    at_v, at_sfk, at_sfv = stage_of.v, stage_of.sfk, stage_of.sfv
    pitch = row_pitch(head_dim)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def widen_kv(stage, k_smem, v_smem, thread):
        codes = cuda.local.array(4, u32)
        lane = u32(thread)
        for i in unroll(-(-TILE_N * chunks // THREADS)):
            chunk = lane + u32(THREADS * i)
            if THREADS * (i + 1) <= TILE_N * chunks or chunk < u32(TILE_N * chunks):
                row, column = chunk // u32(chunks), chunk % u32(chunks)
                load_v4(ffi.from_buffer(codes), stage + row * u32(k_pitch) + column * u32(16))
                # every second pair of columns stores its words in another order: eight lanes hit eight groups of banks
                flip = (column >> u32(1)) & u32(1)
                for w in unroll(0, 4, 2):
                    even, odd = codes[w], codes[w + 1]
                    codes[w] = odd if flip else even
                    codes[w + 1] = even if flip else odd
                scales = load(stage + u32(at_sfk) + row * u32(sfk_pitch) + (column >> u32(1)) * u32(4))
                # stored row 32 j + 8 t + 2 q + e is token 32 j + 8 q + (2 t + e); it goes to row 8 (4 j + q) + its column
                within = ((row >> u32(2)) & u32(6)) | (row & u32(1))
                token_tile = ((row >> u32(5)) << u32(2)) | ((row >> u32(1)) & u32(3))
                to = (token_tile << u32(3)) | ((within & u32(3)) << u32(1)) | (within >> u32(2))
                address = k_smem + to * u32(pitch) + column * u32(64)
                widen(codes, scales >> (u32(16) * (column & u32(1))), address, u32(16) * flip)
        row, column = lane >> u32(1), lane & u32(1)
        for i in unroll(-(-head_dim // 64)):
            if 64 * (i + 1) <= head_dim or lane < u32(2 * head_dim - THREADS * i):
                at = row + u32(64 * i)
                load_v4(ffi.from_buffer(codes), stage + u32(at_v) + at * u32(V_PITCH) + column * u32(16))
                scales = load(stage + u32(at_sfv) + at * u32(4)) >> (u32(16) * column)
                widen(codes, scales, v_smem + at * u32(TRANSPOSED_PITCH) + column * u32(64), u32(0))

    return widen_kv


def make_round_p():
    """Device function ``(acc_s: f32[8, 4], sfp: u32[2])``: P / s, as ``softmax.make_step_nvfp4`` left it, to the nearest
    E2M1 and times s again, in place."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u16, u32 = types.uint16, types.uint32
    widen_f16, f16x2_e4m3x2 = dev.cvt_f32_f16, dev.cvt_rn_f16x2_e4m3x2
    e2m1x2, f16x2_e2m1x2 = dev.cvt_rn_satfinite_e2m1x2_f32, dev.cvt_rn_f16x2_e2m1x2

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def round_p(acc_s, sfp):
        for t in unroll(TILE_N // 8):
            for side in unroll(2):
                both = f16x2_e4m3x2((sfp[side] >> u32(16 * (t // 4))) & u32(0xFFFF))
                scale = widen_f16(u16((both >> u32(16 * (t // 2 % 2))) & u32(0xFFFF)))
                pair = f16x2_e2m1x2(e2m1x2(acc_s[t, 2 * side + 1], acc_s[t, 2 * side]))
                acc_s[t, 2 * side] = widen_f16(u16(pair & u32(0xFFFF))) * scale
                acc_s[t, 2 * side + 1] = widen_f16(u16(pair >> u32(16))) * scale

    return round_p
