"""Inputs of the attention cases, what must come out, and how far a kernel may be from it.

Two kinds of expectation. *Exact inputs* are numbers that NVFP4 holds, with means of zero: quantising and smoothing change
nothing, so recipe "accurate" must give float64 attention up to the rounding of P and of the output. *Real* inputs are
held against the recipe's model (``nbfmha.recipe_model``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nbfmha import reference
from nbfmha.problem import Problem
from nbfmha.recipe import Recipe
from nbfmha.sample import Sample
from nbfmha.testing import compare, relative_rmse
from nbfmha.validate.case import Result

HEAD_DIM = 64
#: Exact under every scale that a block of them can get: largest element over 6, or over 4.
NUMBERS = np.array([0, 1.5, -1.5, 3, -3, 6, -6])
F16 = 2.0**-11
"""Largest relative error of rounding to float16."""
QUERIES, HEADS = 256, 2


class Attention(NamedTuple):
    """out (..., heads, queries, head_dim) and lse (..., heads, queries): a result, what was expected, or a budget."""

    out: np.ndarray
    lse: np.ndarray


def exact_inputs(
    rng: np.random.Generator, seqlen_q: int, seqlen_k: int, *, heads: tuple[int, int] = (4, 2)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v in float16, (heads, tokens, 64), of ``NUMBERS``. Every second row of q and k is minus the one before it, so
    that means over an even number of tokens from an even one on are zero; the last row of an odd length is zero."""
    q, k = (_paired(rng, count, length) for count, length in zip(heads, (seqlen_q, seqlen_k), strict=True))
    return q, k, rng.choice(NUMBERS, k.shape).astype(np.float16)


def _paired(rng: np.random.Generator, heads: int, tokens: int) -> np.ndarray:
    rows = np.zeros((heads, tokens, HEAD_DIM), np.float16)
    rows[:, : tokens // 2 * 2 : 2] = rng.choice(NUMBERS, (heads, tokens // 2, HEAD_DIM))
    rows[:, 1::2] = -rows[:, : tokens // 2 * 2 : 2]
    return rows


def exact_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, problem: Problem, *, sinks: np.ndarray | None = None
) -> tuple[Attention, Attention]:
    """(expected, budget) of float16 inputs that nothing but the rounding of P and of the output changes.

    P rounds to float16, by 2^-11 of itself or where it is subnormal by 2^-25; so does the output. 2^-16 covers exp2 and
    float32 sums, which add a few 2^-22.
    """
    expected = Attention(*reference.attention(q, k, v, problem, sinks=sinks, return_lse=True))
    magnitude = reference.attention(q, k, np.abs(v), problem, sinks=sinks)
    seen = (magnitude > 0) * (2.0**-25 * problem.seqlen_k * np.abs(v).max(initial=0))
    out = (F16 + 2.0**-16) * magnitude + seen + F16 * np.abs(expected.out)
    return expected, Attention(out, lse_budget(expected.lse))


def model_budget(expected: Attention, recipe: Recipe) -> Attention:
    """How far kernels in float16 may be from the recipe's model.

    exp2 is off by 2 ulp and sums are in float32, so a P near a tie may round the other way: in f16 by 2^-11 of itself, in
    E4M3 by an eighth, in NVFP4 by a quarter, of a weight that is a few hundredths at most in a row of real data. A wrong
    index, scale or mask is far beyond.
    """
    one_p = {"f16": F16, "e4m3": 2.0**-6, "nvfp4": 2.0**-5}[recipe.pv]
    row = np.abs(expected.out).max(axis=-1, keepdims=True, initial=0)
    out = np.where(row > 0, (one_p + F16) * row + F16 + 2.0**-12, 0)
    return Attention(np.broadcast_to(out, expected.out.shape), lse_budget(expected.lse))


def model_relative_l2(recipe: Recipe) -> float:
    """The same for the output as a whole: ties are rare."""
    return (5e-4 if recipe.pv == "f16" else 2e-3) + F16


def lse_budget(lse: np.ndarray) -> np.ndarray:
    """Float32 scores and sums, lg2 among them: a few units in the last place. Exact where a row sees nothing."""
    seen = np.where(np.isfinite(lse), lse, 0)
    return np.where(np.isfinite(lse), 6e-6 * np.maximum(1.0, np.abs(seen).max(initial=0)), 0)


def real_inputs(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last ``QUERIES`` queries of the first ``HEADS`` heads, which read one key head, and all of its keys."""
    return sample.q[:HEADS, -QUERIES:], sample.k[:1], sample.v[:1]


def judge(got: Attention, expected: Attention, budget: Attention, *, relative_l2: float = np.inf, **details: Any) -> Result:
    """Verdict on outputs and LSEs of one call, or of several: lists of each in place of one.

    relative_l2: the largest that is allowed of all outputs together.
    """
    calls = [(got, expected, budget)] if isinstance(got, Attention) else list(zip(got, expected, budget, strict=True))
    for one, wanted, _ in calls:
        if one.out.shape != wanted.out.shape or one.lse.shape != wanted.lse.shape:
            found = f"expected out {wanted.out.shape} and lse {wanted.lse.shape}, got {one.out.shape} and {one.lse.shape}"
            return Result.failed("wrong kind of result", found)
    everything = [np.concatenate([part.ravel() for one in column for part in one]) for column in zip(*calls, strict=True)]
    outs = [np.concatenate([one[part].out.ravel() for one in calls]) for part in range(2)]
    error, largest = relative_rmse(*outs), float(everything[2].max())
    what = f"outputs and LSEs (allowed up to {largest:.1e})"
    result = Result.of(compare(*everything), what, relative_l2=error, largest_budget=largest, **details)
    if result.status == "pass" and not error <= relative_l2:
        return Result.failed(result.metric, f"relative L2 {error:.3g}, allowed {relative_l2:.3g}", **result.details)
    return result
