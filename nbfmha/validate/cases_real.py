"""Q·K^T on the shipped sample of real attention data: the multiplication's error apart from the format's."""

from __future__ import annotations

import numpy as np

from nbfmha.testing import compare, relative_rmse
from nbfmha.validate import problems
from nbfmha.validate.case import Context, Registry, Result

registry = Registry()


def _quantized(context: Context):
    from nbfmha import nvfp4

    return nvfp4.quantize(context.sample.q), nvfp4.quantize(context.sample.k)


@registry.case("real", "real Q·K^T against float64, dequantised inputs", evidence="implementation")
def real_scores(context: Context) -> Result:
    q, k = _quantized(context)
    got = context.implementation.qk(q, k, scales_in=context.implementation.scale_sources[0])
    budget = problems.score_budget(q, k, context.implementation)
    return Result.of(compare(got, problems.exact_scores(q, k), budget), "scores")


@registry.case("real", "real Q·K^T: what NVFP4 itself costs (reported)", evidence="computed")
def real_quantisation_error(context: Context) -> Result:
    from nbfmha import reference

    q, k = context.sample.q, context.sample.k
    exact = reference.qk(q, np.repeat(k, q.shape[0] // k.shape[0], axis=0))
    quantized = problems.exact_scores(*_quantized(context))
    error = relative_rmse(quantized, exact)
    worst = float(np.abs(quantized - exact).max())
    if not np.isfinite(error):
        return Result.failed("relative L2 is not a number", "quantised scores must be finite")
    metric = f"relative L2 {error:.4f} of the scores, largest |score| {np.abs(exact).max():.0f}"
    return Result.passed(metric, max_abs_error=worst, relative_l2=error)


@registry.case("real", "real Q, K, V: scales finite, error reported", evidence="computed")
def real_range(context: Context) -> Result:
    from nbfmha import nvfp4
    from ptx_inline.isa.formats import UE4M3

    details = {}
    for name in ("q", "k", "v"):
        quantized = nvfp4.quantize(getattr(context.sample, name))
        if np.any(quantized.scales >= 0x7F) or not np.any(quantized.codes):
            return Result.failed(f"{name} has NaN scales or no codes", "the sample is finite and not zero")
        scales = UE4M3.decode(quantized.scales)
        details[name] = {
            "relative_rmse": relative_rmse(nvfp4.dequantize(quantized), getattr(context.sample, name)),
            "scale_min": float(scales.min()),
            "scale_max": float(scales.max()),
            "saturated_blocks": int(np.count_nonzero(quantized.scales == 0x7E)),
        }
    metric = ", ".join(f"{name} {part['relative_rmse']:.4f}" for name, part in details.items())
    return Result.passed(f"relative RMSE {metric}", **details)
