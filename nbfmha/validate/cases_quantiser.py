"""The quantisers' contract (top of ``nbfmha.nvfp4``), case by case, on inputs whose answer is known beforehand."""

from __future__ import annotations

import numpy as np

from nbfmha.testing import compare, relative_rmse, relative_rmse_standard_error
from nbfmha.validate.case import Context, Registry, Result

registry = Registry()

#: Relative RMSE of FP16 -> NVFP4 -> FP16 on Gaussian data (published: 9.5 %), here by an independent quantiser made of
#: ml_dtypes' casts on 25 million values: 0.09512, known to four digits.
GAUSSIAN_RMSE, GAUSSIAN_RMSE_ROUNDING = 0.0951, 0.00005
_STANDARD_ERRORS = 5  # a false alarm once in two million runs


def _representable(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, codes and scale bytes: every positive UE4M3 scale, 16 blocks each, one element of each block +-6."""
    from ptx_inline.isa.formats import E2M1, UE4M3

    scales = np.repeat(np.arange(1, 0x7F, dtype=np.uint8), 16)
    codes = rng.integers(0, 16, (scales.size, 16), dtype=np.uint8)
    codes[np.arange(scales.size), rng.integers(0, 16, scales.size)] = rng.choice([7, 15], scales.size)
    return E2M1.decode(codes) * UE4M3.decode(scales)[:, None], codes, scales


@registry.case("quantiser", "representable values, every scale: bit for bit", evidence="computed")
def representable(context: Context) -> Result:
    from nbfmha import nvfp4
    from ptx_inline.isa.formats import unpack_nibbles

    values, codes, scales = _representable(context.rng("representable"))
    quantized = nvfp4.quantize(values.astype(np.float32))
    for name, got, expected in (
        ("codes", unpack_nibbles(quantized.codes), codes),
        ("scale bytes", quantized.scales[:, 0], scales),
    ):
        comparison = compare(got, expected)
        if not comparison.ok:
            return Result.of(comparison, name)
    back = nvfp4.dequantize(quantized)
    comparison = compare(back, values)
    if comparison.ok and np.any(np.signbit(back) != np.signbit(values)):
        return Result.failed("signs of zero differ", "-0 must come back as -0")
    return Result.of(comparison, "values, codes and scales")


@registry.case("quantiser", "representable values in f16: bit for bit", evidence="computed")
def representable_f16(context: Context) -> Result:
    from nbfmha import nvfp4

    values, _, _ = _representable(context.rng("representable_f16"))
    halves = values.astype(np.float16)
    return Result.of(compare(nvfp4.dequantize(nvfp4.quantize(halves), "float16"), values), "values")


@registry.case("quantiser", "Gaussian data: relative RMSE 0.0951", evidence="computed")
def gaussian(context: Context) -> Result:
    from nbfmha import nvfp4

    values = context.rng("gaussian").standard_normal((2**15, 64)).astype(np.float16)
    back = nvfp4.dequantize(nvfp4.quantize(values), "float16")
    rmse = relative_rmse(back, values)
    allowed = GAUSSIAN_RMSE_ROUNDING + _STANDARD_ERRORS * relative_rmse_standard_error(back, values, group=16)
    comparison = compare(rmse, GAUSSIAN_RMSE, allowed)
    metric = f"relative RMSE {rmse:.4f} of {values.size} f16 values (+- {allowed:.4f} allowed)"
    if not comparison.ok:
        return Result.failed(metric, comparison.describe(), relative_rmse=rmse, allowed=allowed)
    return Result.passed(metric, relative_rmse=rmse, allowed=allowed)


@registry.case("quantiser", "zero blocks: scale byte 0, codes 0, never NaN", evidence="computed")
def zero_block(context: Context) -> Result:
    from nbfmha import nvfp4

    values = np.zeros((4, 32), np.float32)
    values[1] = -0.0
    values[2, 16:] = 1.0
    values[3, :16] = 2.0**-10  # 2^-10 / 6 is below half the smallest E4M3 subnormal: the scale underflows to 0
    quantized = nvfp4.quantize(values)
    bytes_wrong = np.any(quantized.codes[[0, 1]]) or np.any(quantized.scales[[0, 1, 3], 0])
    if bytes_wrong:
        return Result.failed("zero block is not all zero bytes", f"scale bytes {quantized.scales.tolist()}")
    back = nvfp4.dequantize(quantized)
    neighbours = compare(back[2, 16:], nvfp4.dequantize(nvfp4.quantize(values[2:3, 16:]))[0])
    if not neighbours.ok:
        return Result.of(neighbours, "neighbours of a zero block")
    return Result.of(compare(back[[0, 1, 3]], 0 * back[[0, 1, 3]]), "zeros")


@registry.case("quantiser", "E4M3-subnormal scales are kept (2^-9 ...)", evidence="computed")
def subnormal_scale(context: Context) -> Result:
    from nbfmha import nvfp4

    steps = np.arange(1, 8)
    values = np.repeat(6 * steps * 2.0**-9, 16).reshape(7, 16).astype(np.float32)
    quantized = nvfp4.quantize(values)
    comparison = compare(quantized.scales[:, 0], steps)
    if not comparison.ok:
        return Result.of(comparison, "subnormal scale bytes")
    return Result.of(compare(nvfp4.dequantize(quantized), values), "values with subnormal scales")


@registry.case("quantiser", "NaN or infinity marks its block and no other", evidence="computed")
def nan_block(context: Context) -> Result:
    from nbfmha import nvfp4

    values = np.ones((3, 48), np.float32)
    values[0, 20] = np.nan
    values[1, 3] = -np.inf
    quantized = nvfp4.quantize(values)
    marked = [int(quantized.scales[0, 1]), int(quantized.scales[1, 0])]
    if marked != [0x7F, 0x7F] or np.any(quantized.codes[0, 8:16]) or np.any(quantized.codes[1, :8]):
        return Result.failed("block is not marked", f"scale bytes {marked}, expected 127 (NaN) with codes 0")
    expected = nvfp4.dequantize(nvfp4.quantize(np.ones((3, 48), np.float32)))
    expected[0, 16:32] = expected[1, :16] = np.nan
    return Result.of(compare(nvfp4.dequantize(quantized), expected), "values")


@registry.case("quantiser", "global scale, in the decode direction", evidence="computed")
def global_scale(context: Context) -> Result:
    from nbfmha import nvfp4

    values = context.rng("global_scale").standard_normal((32, 64)).astype(np.float32)
    plain = nvfp4.quantize(values)
    scaled = nvfp4.quantize(values * np.float32(2**20), global_scale=2.0**20)
    if np.any(plain.codes != scaled.codes) or np.any(plain.scales != scaled.scales):
        return Result.failed("codes changed", "quantize(x * 2^20, global_scale=2^20) must equal quantize(x) byte for byte")
    return Result.of(compare(nvfp4.dequantize(scaled), nvfp4.dequantize(plain) * 2.0**20), "values")


@registry.case("quantiser", "four over six: no block worse than amax", evidence="computed")
def four_over_six(context: Context) -> Result:
    from nbfmha import nvfp4

    values = context.rng("four_over_six").standard_normal((512, 64)).astype(np.float32)
    errors = {}
    for scale in ("amax", "four_over_six"):
        back = nvfp4.dequantize(nvfp4.quantize(values, scale=scale)).astype(np.float64)
        errors[scale] = ((back - values) ** 2).reshape(-1, 16).sum(axis=1)
    # the quantiser compares sums of 16 squares in f32: difference, square and four additions, half an ulp each
    slack = 1 + 2 * 7 * 2.0**-24
    worse = int(np.count_nonzero(errors["four_over_six"] > errors["amax"] * slack))
    totals = {
        scale: float(np.sqrt(error.sum() / np.sum(values.astype(np.float64) ** 2))) for scale, error in errors.items()
    }
    metric = f"relative RMSE {totals['amax']:.4f} -> {totals['four_over_six']:.4f} on {errors['amax'].size} blocks"
    if worse:
        return Result.failed(metric, f"{worse} blocks are worse than with amax", **totals)
    return Result.passed(metric, **totals)


@registry.case("quantiser", "MXFP4, every scale: bit for bit", evidence="computed")
def mxfp4(context: Context) -> Result:
    from nbfmha import nvfp4
    from ptx_inline.isa.formats import E2M1

    rng = context.rng("mxfp4")
    exponents = np.arange(-126, 125)  # 4 * 2^e stays finite and 0.5 * 2^e is a float32 (subnormal at most)
    codes = rng.integers(0, 16, (exponents.size, 32), dtype=np.uint8)
    codes[:, 5] = 6  # 4.0 in every block: floor(log2 amax) - 2 is then the block's exponent, for 6.0 too
    values = np.ldexp(E2M1.decode(codes).astype(np.float64), exponents[:, None]).astype(np.float32)
    quantized = nvfp4.quantize(values, format="mxfp4")
    comparison = compare(quantized.scales[:, 0], exponents + 127)
    if not comparison.ok:
        return Result.of(comparison, "scale bytes")
    return Result.of(compare(nvfp4.dequantize(quantized), values), "values")


@registry.case("quantiser", "blocks along tokens = transposed along head_dim", evidence="computed")
def axis_tokens(context: Context) -> Result:
    from nbfmha import nvfp4

    values = context.rng("axis_tokens").standard_normal((2, 48, 64)).astype(np.float32)
    along = nvfp4.quantize(values, axis="tokens")
    across = nvfp4.quantize(np.swapaxes(values, -1, -2))
    if np.any(along.codes != across.codes) or np.any(along.scales != across.scales):
        return Result.failed("bytes differ", "axis='tokens' must store the transposed tensor")
    return Result.of(compare(nvfp4.dequantize(along), np.swapaxes(nvfp4.dequantize(across), -1, -2)), "values")


@registry.case("quantiser", "any length: padding is zero, nothing leaks", evidence="computed")
def odd_lengths(context: Context) -> Result:
    from nbfmha import nvfp4
    from ptx_inline.isa.formats import unpack_nibbles

    rng = context.rng("odd_lengths")
    count, whole = 0, None
    for tokens in (0, 1, 15, 17, 33):
        for head_dim in (2, 16, 30, 66):
            for axis in ("head_dim", "tokens"):
                values = rng.standard_normal((tokens, head_dim)).astype(np.float32)
                quantized = nvfp4.quantize(values, axis=axis)
                length = head_dim if axis == "head_dim" else tokens
                if np.any(unpack_nibbles(quantized.codes)[..., length:]):
                    return Result.failed("padding is not zero", f"tokens {tokens}, head_dim {head_dim}, axis {axis}")
                padded = np.zeros((-(-tokens // 16) * 16, -(-head_dim // 16) * 16), np.float32)
                padded[:tokens, :head_dim] = values
                whole = nvfp4.dequantize(nvfp4.quantize(padded, axis=axis))[:tokens, :head_dim]
                comparison = compare(nvfp4.dequantize(quantized), whole)
                if not comparison.ok:
                    return Result.of(comparison, f"values, tokens {tokens}, head_dim {head_dim}, axis {axis}")
                count += 1
    return Result.passed(f"{count} shapes exact", max_abs_error=0.0)


@registry.case("quantiser", "scale layouts: one-to-one, round trips, padding", evidence="computed")
def layouts(context: Context) -> Result:
    from nbfmha import nvfp4, scale_layouts

    names = ("linear", "blocked_128x4", "interleaved_64")
    rng = context.rng("layouts")
    shapes = ((1, 16), (63, 64), (64, 96), (130, 80), (257, 256))
    for tokens, head_dim in shapes:
        quantized = nvfp4.quantize(rng.standard_normal((tokens, head_dim)).astype(np.float32))
        rows, cols = quantized.scales.shape
        for name in names:
            places = scale_layouts.offset(name, np.arange(rows)[:, None], np.arange(cols)[None, :], rows, cols)
            if np.unique(places).size != rows * cols or places.max() >= scale_layouts.size(name, rows, cols):
                return Result.failed(f"{name} is not one-to-one", f"{rows} x {cols} scales")
            stored = nvfp4.relayout(quantized, name)
            flat = stored.scales.ravel()
            if np.count_nonzero(flat) != np.count_nonzero(quantized.scales):
                return Result.failed(f"{name}: padding is not zero", f"{rows} x {cols} scales")
            for other in names:
                back = nvfp4.relayout(nvfp4.relayout(stored, other), "linear")
                comparison = compare(back.scales, quantized.scales)
                if not comparison.ok:
                    return Result.of(comparison, f"scale bytes, {name} -> {other} -> linear")
    return Result.passed(f"{len(shapes)} shapes x {len(names) ** 2} conversions exact", max_abs_error=0.0)
