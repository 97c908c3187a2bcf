"""Device functions for one scale block: quantise it, read its scale, load and store elements of any input dtype.

The bit-level contract stands in :mod:`nbfmha.nvfp4`; the NumPy form there and these functions give the same bits. Each
function here is a factory: it builds the device function for its compile-time constants.
"""

from __future__ import annotations

BLOCK_SIZE = {"nvfp4": 16, "mxfp4": 32}
DTYPES = ("float16", "bfloat16", "float32")


def element_pointer(dtype: str) -> str:
    """Kernel argument type by which elements of this dtype are read one at a time."""
    return "f32*" if dtype == "float32" else "u16*"


def make_widen(dtype: str):
    """Device function: an element as it lies in memory -> f32, exact."""
    from numba import cuda

    from ptx_inline import device as dev

    cvt_f32_f16, cvt_f32_bf16 = dev.cvt_f32_f16, dev.cvt_f32_bf16
    if dtype == "float16":
        return cuda.jit(device=True, forceinline=True)(lambda bits: cvt_f32_f16(bits))
    if dtype == "bfloat16":
        return cuda.jit(device=True, forceinline=True)(lambda bits: cvt_f32_bf16(bits))
    return cuda.jit(device=True, forceinline=True)(lambda value: value)


def make_load_words(dtype: str, block: int):
    """Device function ``(x: u32*, index, values: f32[block])``: block ``index`` of a tensor that is 16-byte aligned."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u16, u32, i64 = types.uint16, types.uint32, types.int64
    ffi, load_v4, float_of = dev.ffi, dev.ld_global_nc_v4_u32, dev.mov_f32_b32
    widen = make_widen(dtype)
    wide = dtype == "float32"
    words = block if wide else block // 2

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_words(x, index, values):
        raw = cuda.local.array(words, u32)
        for w in unroll(0, words, 4):
            load_v4(ffi.from_buffer(raw[w:]), x, index * i64(words) + i64(w))
        for w in unroll(words):
            if wide:
                values[w] = float_of(raw[w])
            else:
                values[2 * w] = widen(u16(raw[w] & u32(0xFFFF)))
                values[2 * w + 1] = widen(u16(raw[w] >> u32(16)))

    return load_words


def make_decode_scale(format: str):
    """Device function: scale byte -> f32; NaN bytes give NaN."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u16, u32 = types.uint16, types.uint32
    cvt_f32_f16, cvt_rn_f16x2_e4m3x2, mov_f32_b32 = dev.cvt_f32_f16, dev.cvt_rn_f16x2_e4m3x2, dev.mov_f32_b32

    @cuda.jit(device=True, forceinline=True)
    def decode_ue4m3(byte):
        return cvt_f32_f16(u16(cvt_rn_f16x2_e4m3x2(u32(byte)) & u32(0xFFFF)))

    @cuda.jit(device=True, forceinline=True)
    def decode_ue8m0(byte):
        # 2^(byte - 127): the byte is the exponent field; 0 is the denormal 2^-127 and 255 the NaN
        bits = u32(byte) << u32(23)
        if byte == u32(0):
            bits = u32(0x00400000)
        if byte == u32(255):
            bits = u32(0x7FC00000)
        return mov_f32_b32(bits)

    return decode_ue4m3 if format == "nvfp4" else decode_ue8m0


def make_quantize_block(dtype: str, format: str, scale: str, has_global: bool):
    """Device function ``(x: f32[block], global_scale, codes: u32[block / 8]) -> scale byte``.

    ``codes`` receives eight E2M1 codes a register, low nibble first.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u32 = types.float32, types.uint32
    words = BLOCK_SIZE[format] // 8
    # x / s leaves the f32 range only for the largest x of a wide dtype over a tiny global scale
    may_overflow = has_global and dtype != "float16"
    decode_ue8m0, divide, block_amax = make_decode_scale("mxfp4"), _make_divide(has_global), _make_block_amax(format)
    choose_scale = _make_choose_scale(scale, has_global, _make_nearest_by_codes(has_global))
    e2m1x2, rcp, min_f32, max_f32 = dev.cvt_rn_satfinite_e2m1x2_f32, dev.rcp_rn_f32, dev.min_f32, dev.max_f32

    @cuda.jit(device=True, forceinline=True)
    def encode(x, s, codes):
        reciprocal = rcp(s)
        top = f32(7) * s
        for w in range(words):
            word = u32(0)
            for i in range(4):
                low, high = x[8 * w + 2 * i], x[8 * w + 2 * i + 1]
                if may_overflow:
                    low, high = max_f32(min_f32(low, top), -top), max_f32(min_f32(high, top), -top)
                word |= e2m1x2(divide(high, s, reciprocal), divide(low, s, reciprocal)) << u32(8 * i)
            codes[w] = word

    @cuda.jit(device=True, forceinline=True)
    def quantize_nvfp4(x, global_scale, codes):
        largest = block_amax(x)
        byte, s = choose_scale(x, largest, global_scale)
        encode(x, s, codes)
        if byte == u32(0) or largest >= u32(0x7F800000):
            for w in range(words):
                codes[w] = u32(0)
        return u32(0x7F) if largest >= u32(0x7F800000) else byte

    @cuda.jit(device=True, forceinline=True)
    def quantize_mxfp4(x, global_scale, codes):
        largest = block_amax(x)
        # floor(log2 amax) + 127 - 2; below 2^-124 the byte would be negative: clamp to 0, which is 2^-127
        exponent = largest >> u32(23)
        byte = exponent - u32(2) if exponent > u32(2) else u32(0)
        s = decode_ue8m0(byte)
        encode(x, s, codes)
        if largest == u32(0) or largest >= u32(0x7F800000):
            for w in range(words):
                codes[w] = u32(0)
        return u32(0xFF) if largest >= u32(0x7F800000) else byte

    return quantize_mxfp4 if format == "mxfp4" else quantize_nvfp4


def make_round_block(scale: str):
    """Device function ``(x: f32[16])``: each x becomes what its NVFP4 code and scale stand for; without a global scale."""
    import numpy as np
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u32 = types.float32, types.uint32
    bits_of, float_of, abs_f32 = dev.mov_b32_f32, dev.mov_f32_b32, dev.abs_f32
    nearest_two = _make_nearest_by_steps(True)
    choose_scale = _make_choose_scale(scale, False, _make_nearest_by_steps(False))
    block_amax = _make_block_amax("nvfp4")
    reciprocal_of, block = dev.rcp_approx_ftz_f32, BLOCK_SIZE["nvfp4"]

    @cuda.jit(device=True, forceinline=True)
    def with_sign(magnitude, x):
        return float_of(bits_of(magnitude) | (bits_of(x) & u32(0x80000000)))

    @cuda.jit(device=True, forceinline=True)
    def round_block(x):
        largest = block_amax(x)
        _, s = choose_scale(x, largest, f32(1))
        reciprocal = reciprocal_of(s)
        if largest >= u32(0x7F800000):
            s = f32(np.nan)
        for i in range(0, block, 2):
            even, odd = nearest_two(abs_f32(x[i]), abs_f32(x[i + 1]), s, reciprocal)
            x[i], x[i + 1] = with_sign(even * s, x[i]), with_sign(odd * s, x[i + 1])

    return round_block


def _make_block_amax(format: str):
    """Device function ``(x: f32[block]) -> u32``: bits of the largest magnitude. Magnitudes of f32 order like their bit
    patterns, and NaN above all: an integer maximum keeps NaN."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, bits_of, abs_f32, block = types.uint32, dev.mov_b32_f32, dev.abs_f32, BLOCK_SIZE[format]

    @cuda.jit(device=True, forceinline=True)
    def block_amax(x):
        largest = u32(0)
        for i in range(block):
            largest = max(largest, bits_of(abs_f32(x[i])))
        return largest

    return block_amax


def _make_divide(has_global: bool):
    """Device function ``(x, s, reciprocal) -> f32``: x / s rounded to nearest, with the reciprocal shared by the block
    (P. Markstein, IBM J. R&D 34, 1990). One correction is enough for the four significant bits of a scale byte, two for any
    f32. The residual is taken as q s - x, not x - q s: so -0 / s stays -0."""
    from numba import cuda

    from ptx_inline import device as dev

    fma = dev.fma_rn_f32

    @cuda.jit(device=True, forceinline=True)
    def divide(x, s, reciprocal):
        quotient = x * reciprocal
        quotient = fma(-fma(quotient, s, -x), reciprocal, quotient)
        if has_global:
            quotient = fma(-fma(quotient, s, -x), reciprocal, quotient)
        return quotient

    return divide


def _make_nearest_by_codes(has_global: bool):
    """Device function ``(even, odd, s, reciprocal) -> (f32, f32)``: the E2M1 magnitudes nearest to two magnitudes over s,
    by the conversion to codes and back: cheapest where the GPU has these instructions."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u16, u32, divide = types.uint16, types.uint32, _make_divide(has_global)
    e2m1x2, f16x2_e2m1x2, widen = dev.cvt_rn_satfinite_e2m1x2_f32, dev.cvt_rn_f16x2_e2m1x2, dev.cvt_f32_f16

    @cuda.jit(device=True, forceinline=True)
    def nearest_two(even, odd, s, reciprocal):
        two = f16x2_e2m1x2(e2m1x2(divide(odd, s, reciprocal), divide(even, s, reciprocal)))
        return widen(u16(two & u32(0xFFFF))), widen(u16(two >> u32(16)))

    return nearest_two


def _make_nearest_by_steps(exact: bool):
    """As ``_make_nearest_by_codes``, without conversions, which take GPUs without the instructions twenty operations.

    Not ``exact``: the quotient is not corrected, so that what lies within 2^-22 of the middle between two magnitudes may
    go to either. For the sum of squared errors that is all the same: to both it is equally far.

    E2M1 steps by 2^(e - 1) from 2^e on, and by 1/2 below 1: what is added and taken away again, 2^(e + 22), has just these
    steps, and the sum rounds ties to even.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u32 = types.float32, types.uint32
    divide, min_f32, max_f32 = _make_divide(False), dev.min_f32, dev.max_f32
    bits_of, float_of = dev.mov_b32_f32, dev.mov_f32_b32

    @cuda.jit(device=True, forceinline=True)
    def nearest(magnitude, s, reciprocal):
        quotient = divide(magnitude, s, reciprocal) if exact else magnitude * reciprocal
        value = min_f32(quotient, f32(6))  # a NaN, of s = 0, becomes 6; times s it is 0
        power = float_of(bits_of(max_f32(value, f32(1))) & u32(0x7F800000))
        steps = power * f32(4194304.0)
        return (value + steps) - steps

    @cuda.jit(device=True, forceinline=True)
    def nearest_two(even, odd, s, reciprocal):
        return nearest(even, s, reciprocal), nearest(odd, s, reciprocal)

    return nearest_two


def _make_choose_scale(scale: str, has_global: bool, nearest_two):
    """Device function ``(x: f32[16], largest, global_scale) -> (byte, s)``: the UE4M3 scale of a block by the rule
    ``scale`` and what codes are divided by, from the bits of the largest magnitude."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32 = types.float32
    decode_ue4m3, divide = make_decode_scale("nvfp4"), _make_divide(has_global)
    # without a global scale one unit in the last place is near enough: after its correction the quotient is off by 2^-46
    # before it is rounded, and no f32 but t s itself is nearer to t s than 2^-24 of it, where E2M1's rounding changes at t
    reciprocal_of = dev.rcp_rn_f32 if has_global else dev.rcp_approx_ftz_f32
    e4m3x2, abs_f32, float_of = dev.cvt_rn_satfinite_e4m3x2_f32, dev.abs_f32, dev.mov_f32_b32
    fma = dev.fma_rn_f32
    block = BLOCK_SIZE["nvfp4"]

    @cuda.jit(device=True, forceinline=True)
    def divided_by(divisor, reciprocal, amax, global_scale):
        # without a global scale an infinity gives NaN, which is its block's scale anyway
        quotient = amax / (divisor * global_scale) if has_global else divide(amax, divisor, reciprocal)
        byte = e4m3x2(f32(0), quotient)
        s = decode_ue4m3(byte)
        if has_global:
            s = s * global_scale
        return byte, s

    @cuda.jit(device=True, forceinline=True)
    def square(x):
        return x * x

    @cuda.jit(device=True, forceinline=True)
    def rest(x, code, s):
        # without a global scale the product has 6 bits: exact, so that fusing it changes nothing
        return x - code * s if has_global else fma(-code, s, x)

    @cuda.jit(device=True, forceinline=True)
    def squared_error(x, s):
        reciprocal = reciprocal_of(s)
        error = cuda.local.array(block, f32)
        for i in range(0, block, 2):
            even, odd = abs_f32(x[i]), abs_f32(x[i + 1])
            nearest_even, nearest_odd = nearest_two(even, odd, s, reciprocal)
            error[i], error[i + 1] = square(rest(even, nearest_even, s)), square(rest(odd, nearest_odd, s))
        for i in range(8):
            error[i] += error[i + 8]
        for i in range(4):
            error[i] += error[i + 4]
        return (error[0] + error[2]) + (error[1] + error[3])

    @cuda.jit(device=True, forceinline=True)
    def amax_rule(x, largest, global_scale):
        return divided_by(f32(6), f32(1 / 6), float_of(largest), global_scale)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def four_over_six(x, largest, global_scale):
        amax = float_of(largest)
        byte, s = divided_by(f32(6), f32(1 / 6), amax, global_scale)
        best = squared_error(x, s)
        for step in unroll(2):
            other_byte, other_s = divided_by(f32(5 - step), f32(1 / (5 - step)), amax, global_scale)
            error = squared_error(x, other_s)
            if error < best:  # false for the NaN of a block that is not finite
                best, byte, s = error, other_byte, other_s
        return byte, s

    return four_over_six if scale == "four_over_six" else amax_rule
