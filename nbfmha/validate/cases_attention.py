"""``nbfmha.attention`` by the implementation under test: against float64 attention on inputs that no recipe changes, and
against the recipe's model on real data. Then what each recipe costs there."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np

from nbfmha.problem import Problem
from nbfmha.recipe import PRESETS, Recipe
from nbfmha.validate import attention_problems as problems
from nbfmha.validate.attention_problems import Attention
from nbfmha.validate.case import Context, Registry, Result

registry = Registry()

ACCURACY = "accuracy_of_recipes"
"""The case whose details hold the accuracy table."""
MOST_OF_SAGE3 = 1 / 3
"""What the relative L2 of "accurate" may be at most, as a share of that of "sage3"."""
#: Keeps the scores of exact inputs, sums of 64 products up to 36, where the softmax is neither flat nor one key's.
SCALE = 1 / 32


def _run(context: Context, q, k, v, **options) -> Attention:
    return Attention(*context.implementation.attention(q, k, v, **options))


def _exact(context: Context, *arrays, sinks=None, **options) -> tuple[Attention, Attention, Attention]:
    """(got, expected, budget) of one call with recipe "accurate" on exact inputs."""
    options = {"softmax_scale": SCALE, **options}
    problem = Problem.of(*arrays, has_sinks=sinks is not None, **options)
    expected, budget = problems.exact_attention(*arrays, problem, sinks=sinks)
    return _run(context, *arrays, sinks=sinks, recipe="accurate", **options), expected, budget


def _against_the_model(context: Context, name: str) -> Result:
    if not context.implementation.runs_kernels:
        return Result.skipped("needs a GPU or the emulator: the recipe's model would be compared with itself")
    from nbfmha.recipe_model import recipe_attention

    recipe = PRESETS[name]
    if recipe not in context.implementation.recipes:
        return Result.skipped("needs sm_120a: kernels have one scale a row for the plain FP4 MMA alone")
    q, k, v = problems.real_inputs(context.sample)
    got = _run(context, q, k, v, causal=True, recipe=recipe)
    expected = Attention(*recipe_attention(q, k, v, Problem.of(q, k, v, causal=True), recipe))
    budget = problems.model_budget(expected, recipe)
    return problems.judge(got, expected, budget, relative_l2=problems.model_relative_l2(recipe), recipe=name)


@registry.case("attention", "real data, recipe naive: its model", evidence="implementation")
def real_naive(context: Context) -> Result:
    return _against_the_model(context, "naive")


@registry.case("attention", "real data, recipe sage3: its model", evidence="implementation")
def real_sage3(context: Context) -> Result:
    return _against_the_model(context, "sage3")


@registry.case("attention", "real data, recipe fast: its model", evidence="implementation")
def real_fast(context: Context) -> Result:
    return _against_the_model(context, "fast")


@registry.case("attention", "real data, recipe accurate: its model", evidence="implementation")
def real_accurate(context: Context) -> Result:
    return _against_the_model(context, "accurate")


@registry.case("attention", "real data, recipe legacy: its model", evidence="implementation")
def real_legacy(context: Context) -> Result:
    return _against_the_model(context, "legacy")


@registry.case("attention", "inputs that NVFP4 holds: float64 attention", evidence="implementation")
def exact_inputs(context: Context) -> Result:
    return problems.judge(*_exact(context, *problems.exact_inputs(context.rng("exact_inputs"), 128, 256)))


@registry.case("attention", "seqlen_q != seqlen_k, causal and windows", evidence="implementation")
def lengths(context: Context) -> Result:
    rng = context.rng("lengths")
    calls = [
        _exact(context, *problems.exact_inputs(rng, 70, 330), causal=True),
        _exact(context, *problems.exact_inputs(rng, 1, 300), causal=True),
        _exact(context, *problems.exact_inputs(rng, 66, 200), causal=True, q_offset=20),
        _exact(context, *problems.exact_inputs(rng, 100, 400), window=(200, 30)),
    ]
    return problems.judge(*zip(*calls, strict=True))


@registry.case("attention", "packed sequences: each as if alone", evidence="implementation")
def packed(context: Context) -> Result:
    edges_q, edges_k = (0, 20, 20, 90, 150), (0, 130, 200, 200, 420)
    q, k, v = problems.exact_inputs(context.rng("packed"), edges_q[-1], edges_k[-1], heads=(2, 1))
    options = {"cu_seqlens_q": edges_q, "cu_seqlens_k": edges_k, "causal": True}
    got, expected, budget = _exact(context, q, k, v, **options)
    # the expectation too is that of each sequence alone, so that it knows nothing of packing
    for (q0, q1), (k0, k1) in zip(pairwise(edges_q), pairwise(edges_k), strict=True):
        alone = q[:, q0:q1], k[:, k0:k1], v[:, k0:k1]
        problem = Problem.of(*alone, causal=True, softmax_scale=SCALE)
        expected.out[:, q0:q1], expected.lse[:, q0:q1] = problems.exact_attention(*alone, problem)[0]
    return problems.judge(got, expected, budget)


@registry.case("attention", "sinks join the denominator", evidence="implementation")
def sinks(context: Context) -> Result:
    arrays = problems.exact_inputs(context.rng("sinks"), 64, 200)
    logits = np.array([0.5, -3.0, 6.0, -np.inf], np.float32)
    return problems.judge(*_exact(context, *arrays, sinks=logits, causal=True))


@registry.case("attention", "rows that see no key: 0 and -inf, exactly", evidence="implementation")
def masked_rows(context: Context) -> Result:
    got, expected, budget = _exact(context, *problems.exact_inputs(context.rng("masked_rows"), 130, 70), causal=True)
    masked = int(np.count_nonzero(np.isneginf(expected.lse)))
    if masked != 4 * 60:
        return Result.failed(f"{masked} masked rows", "60 of each head's 130 rows must see no key")
    return problems.judge(got, expected, budget, masked_rows=masked)


@registry.case("attention", "equal scores: the mean, LSE = ln S", evidence="implementation")
def uniform_scores(context: Context) -> Result:
    q, k, v = problems.exact_inputs(context.rng("uniform_scores"), 64, 100, heads=(2, 1))
    mean = np.broadcast_to(v.mean(axis=1, keepdims=True, dtype=np.float64), q.shape)
    expected = Attention(mean, np.full(q.shape[:-1], math.log(100)))
    # every P is 1 times the recipe's factor: no rounding but the output's and float32's
    allowed = Attention(problems.F16 * np.abs(mean) + 2.0**-20, np.full(q.shape[:-1], 1e-6))
    names = [name for name, recipe in PRESETS.items() if recipe in context.implementation.recipes]
    got = [_run(context, np.zeros_like(q), k, v, recipe=name) for name in names]
    return problems.judge(got, [expected] * len(got), [allowed] * len(got), recipes=names)


@registry.case("attention", "constant V comes back", evidence="implementation")
def constant_v(context: Context) -> Result:
    q, k, v = problems.exact_inputs(context.rng("constant_v"), 70, 200, heads=(2, 1))
    v[:] = 6
    options = {"causal": True, "softmax_scale": SCALE}
    plain = Problem.of(q, k, v, **options)
    expected, budget = problems.exact_attention(q, k, v, plain)
    # a P in NVFP4 is off by a sixth of its block's largest at most, and the divisor is the exact sum: a few per cent
    loose = Attention(np.full_like(budget.out, 0.6), budget.lse)
    got = [_run(context, q, k, v, recipe=name, **options) for name in ("accurate", "fast")]
    return problems.judge(got, [expected, expected], [budget, loose])


@registry.case("attention", "16-bit model: float64 attention", evidence="computed")
def model_sixteen_bits(context: Context) -> Result:
    from nbfmha.recipe_model import recipe_attention

    q, k, v = problems.real_inputs(context.sample)
    problem = Problem.of(q, k, v, causal=True)
    got = Attention(*recipe_attention(q, k, v, problem, Recipe(qk="f16", v_format="f16")))
    return problems.judge(got, *problems.exact_attention(q, k, v, problem))


@functools.cache
def sample_outputs() -> tuple[Attention, dict[str, Attention]]:
    """(float64 attention, the output of each recipe's model) on the whole sample, causal. Not to be changed."""
    from nbfmha import reference
    from nbfmha.recipe_model import recipe_attention
    from nbfmha.sample import load_sample

    q, k, v = load_sample()
    problem = Problem.of(q, k, v, causal=True)
    expected = Attention(*reference.attention(q, k, v, problem, return_lse=True))
    return expected, {name: Attention(*recipe_attention(q, k, v, problem, recipe)) for name, recipe in PRESETS.items()}


@registry.case("attention", "accurate: a third of sage3's error at most", evidence="computed", name=ACCURACY)
def accuracy_of_recipes(context: Context) -> Result:
    from nbfmha.accuracy import accuracy

    expected, outputs = sample_outputs()
    table = {name: accuracy(*output, *expected)._asdict() for name, output in outputs.items()}
    accurate, sage3 = table["accurate"]["relative_l2"], table["sage3"]["relative_l2"]
    metric = f"relative L2 {accurate:.4f} and {sage3:.4f}: {accurate / sage3:.3f}, allowed {MOST_OF_SAGE3:.3f}"
    details = {"ratio": accurate / sage3, "ratio_allowed": MOST_OF_SAGE3, "recipes": table}
    if not accurate <= MOST_OF_SAGE3 * sage3:
        return Result.failed(metric, "recipe 'accurate' must have a third of the error of 'sage3' at most", **details)
    return Result.passed(metric, **details)
