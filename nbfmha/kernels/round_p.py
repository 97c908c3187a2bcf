"""P in NVFP4 for GPUs without the block-scale MMA: rounded to E2M1 and multiplied with its scales again, exact in f16.

E2M1 times UE4M3 has at most 6 significant bits, 2^-10 .. 2688. Q, K and V were quantised and widened by the pre-pass.
"""

from __future__ import annotations

from nbfmha.recipe import TILE_N


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
