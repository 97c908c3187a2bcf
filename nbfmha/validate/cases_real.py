"""Q·K^T on the shipped sample of real attention data: the multiplication's error apart from the format's."""

from __future__ import annotations

import numpy as np

from nbfmha.testing import compare, relative_rmse
from nbfmha.validate import problems
from nbfmha.validate.case import Context, Registry, Result

registry = Registry()

#: Queries taken of each head of the sample; all keys are used.
QUERIES = 128


def _quantized_heads(context: Context):
    """(q, k) of every query head, with its key head (grouped queries): f16 arrays and their NVFP4 tensors."""
    from nbfmha import nvfp4

    sample = context.sample
    qhead_per_kvhead = sample.q.shape[0] // sample.k.shape[0]
    keys = [nvfp4.quantize(head) for head in sample.k]
    for head, queries in enumerate(sample.q):
        part = queries[-QUERIES:]
        yield part, sample.k[head // qhead_per_kvhead], nvfp4.quantize(part), keys[head // qhead_per_kvhead]


@registry.case("real", "real Q and K: scores against float64 on the dequantised inputs", evidence="implementation")
def real_scores(context: Context) -> Result:
    got, expected, budget = [], [], []
    for _, _, q, k in _quantized_heads(context):
        got.append(context.implementation.qk(q, k))
        expected.append(problems.exact_scores(q, k))
        budget.append(problems.score_budget(q, k, context.implementation.mma))
    return Result.of(compare(np.stack(got), np.stack(expected), np.stack(budget)), "scores")


@registry.case("real", "real Q and K: what NVFP4 itself costs (reported, not judged)", evidence="computed")
def real_quantisation_error(context: Context) -> Result:
    exact, quantized = [], []
    for q_values, k_values, q, k in _quantized_heads(context):
        exact.append(q_values.astype(np.float64) @ k_values.astype(np.float64).T)
        quantized.append(problems.exact_scores(q, k))
    exact, quantized = np.stack(exact), np.stack(quantized)
    error = relative_rmse(quantized, exact)
    worst = float(np.abs(quantized - exact).max())
    if not np.isfinite(error):
        return Result.failed("relative L2 is not a number", "quantised scores must be finite")
    return Result.passed(f"relative L2 {error:.4f} of the scores, largest |score| {np.abs(exact).max():.0f}",
                         max_abs_error=worst, relative_l2=error)  # fmt: skip


@registry.case("real", "real Q, K, V: scale bytes and codes use their range", evidence="computed")
def real_range(context: Context) -> Result:
    from ptx_inline.isa.formats import UE4M3

    from nbfmha import nvfp4

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
