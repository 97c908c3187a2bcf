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
    block = BLOCK_SIZE[format]
    words = block // 8
    # x / s leaves the f32 range only for the largest x of a wide dtype over a tiny global scale
    may_overflow = has_global and dtype != "float16"
    decode_scale = make_decode_scale(format)
    e2m1x2, e4m3x2, f16x2_e2m1x2 = (
        dev.cvt_rn_satfinite_e2m1x2_f32,
        dev.cvt_rn_satfinite_e4m3x2_f32,
        dev.cvt_rn_f16x2_e2m1x2,
    )
    fma, rcp, min_f32, max_f32, abs_f32 = dev.fma_rn_f32, dev.rcp_rn_f32, dev.min_f32, dev.max_f32, dev.abs_f32
    bits_of, float_of, f32_of_f16 = dev.mov_b32_f32, dev.mov_f32_b32, dev.cvt_f32_f16

    @cuda.jit(device=True, forceinline=True)
    def divide(x, s, reciprocal):
        """x / s rounded to nearest, with the reciprocal shared by the block (P. Markstein, IBM J. R&D 34, 1990). One
        correction is enough for the four significant bits of a scale byte, two for any f32. The residual is taken as
        q s - x, not x - q s: so -0 / s stays -0."""
        quotient = x * reciprocal
        quotient = fma(-fma(quotient, s, -x), reciprocal, quotient)
        if has_global:
            quotient = fma(-fma(quotient, s, -x), reciprocal, quotient)
        return quotient

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
    def block_amax(x):
        # magnitudes of f32 order like their bit patterns, and NaN above all: an integer maximum keeps NaN
        largest = u32(0)
        for i in range(block):
            largest = max(largest, bits_of(abs_f32(x[i])))
        return largest

    @cuda.jit(device=True, forceinline=True)
    def ue4m3_scale(amax, divisor):
        return e4m3x2(f32(0), amax / divisor)

    @cuda.jit(device=True, forceinline=True)
    def quantize_nvfp4(x, global_scale, codes):
        largest = block_amax(x)
        amax = float_of(largest)
        byte = ue4m3_scale(amax, f32(6) * global_scale)
        s = decode_scale(byte)
        if has_global:
            s = s * global_scale
        encode(x, s, codes)
        if byte == u32(0) or largest >= u32(0x7F800000):
            for w in range(words):
                codes[w] = u32(0)
        return u32(0x7F) if largest >= u32(0x7F800000) else byte

    @cuda.jit(device=True, forceinline=True)
    def squared_error(x, s, codes):
        error = cuda.local.array(block, f32)
        for w in range(words):
            for i in range(4):
                pair = f16x2_e2m1x2((codes[w] >> u32(8 * i)) & u32(0xFF))
                low = x[8 * w + 2 * i] - f32_of_f16(types.uint16(pair & u32(0xFFFF))) * s
                high = x[8 * w + 2 * i + 1] - f32_of_f16(types.uint16(pair >> u32(16))) * s
                error[8 * w + 2 * i] = low * low
                error[8 * w + 2 * i + 1] = high * high
        for i in range(8):
            error[i] += error[i + 8]
        for i in range(4):
            error[i] += error[i + 4]
        return (error[0] + error[2]) + (error[1] + error[3])

    @cuda.jit(device=True, forceinline=True)
    def quantize_four_over_six(x, global_scale, codes):
        byte = quantize_nvfp4(x, global_scale, codes)
        amax = float_of(block_amax(x))
        s = decode_scale(byte)
        if has_global:
            s = s * global_scale
        best = squared_error(x, s, codes)
        candidate = cuda.local.array(words, u32)
        for step in range(2):
            candidate_byte = ue4m3_scale(amax, f32(5 - step) * global_scale)
            s = decode_scale(candidate_byte)
            if has_global:
                s = s * global_scale
            encode(x, s, candidate)
            if candidate_byte == u32(0):
                for w in range(words):
                    candidate[w] = u32(0)
            error = squared_error(x, s, candidate)
            if error < best:  # false for the NaN of a block that is not finite
                best = error
                byte = candidate_byte
                for w in range(words):
                    codes[w] = candidate[w]
        return byte

    @cuda.jit(device=True, forceinline=True)
    def quantize_mxfp4(x, global_scale, codes):
        largest = block_amax(x)
        # floor(log2 amax) + 127 - 2; below 2^-124 the byte would be negative: clamp to 0, which is 2^-127
        exponent = largest >> u32(23)
        byte = exponent - u32(2) if exponent > u32(2) else u32(0)
        s = decode_scale(byte)
        encode(x, s, codes)
        if largest == u32(0) or largest >= u32(0x7F800000):
            for w in range(words):
                codes[w] = u32(0)
        return u32(0xFF) if largest >= u32(0x7F800000) else byte

    if format == "mxfp4":
        return quantize_mxfp4
    return quantize_four_over_six if scale == "four_over_six" else quantize_nvfp4
