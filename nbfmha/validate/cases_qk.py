"""Tiled Q·K^T by the implementation under test, on inputs whose scores are known exactly."""

from __future__ import annotations

import numpy as np

from nbfmha.testing import compare
from nbfmha.validate import problems
from nbfmha.validate.case import Context, Registry, Result
from ptx_inline.isa import patterns

registry = Registry()


def _scores(context: Context, q, k) -> np.ndarray:
    return context.implementation.qk(q, k, scales_in=context.implementation.scale_sources[0])


def _compare_all(context: Context, make, what: str, *, exact: bool) -> Result:
    """Run ``make(tokens_q, tokens_k, head_dim) -> (q, k)`` on every shape and compare all scores at once."""
    got, expected, budget = [], [], []
    for rows, cols, head_dim in problems.SHAPES:
        q, k = make(rows, cols, head_dim)
        scores = _scores(context, q, k)
        if scores.shape != (rows, cols) or scores.dtype != np.float32:
            return Result.failed(
                "wrong kind of result", f"expected float32 {(rows, cols)}, got {scores.dtype} {scores.shape}"
            )
        got.append(scores.ravel())
        expected.append(problems.exact_scores(q, k).ravel())
        allowed = 0.0 if exact else problems.score_budget(q, k, context.implementation)
        budget.append(np.broadcast_to(allowed, scores.shape).ravel())
    comparison = compare(np.concatenate(got), np.concatenate(expected), np.concatenate(budget))
    return Result.of(comparison, what, shapes=[list(shape) for shape in problems.SHAPES])


def _compare_pattern(context: Context, make_pattern) -> Result:
    """A pattern of ``ptx_inline.isa.patterns``, which knows its product without any multiplication, on every shape."""
    got, expected = [], []
    for shape in problems.SHAPES:
        q_codes, k_codes, product = make_pattern(shape)
        got.append(_scores(context, problems.tensor(q_codes), problems.tensor(k_codes)).ravel())
        expected.append(product.ravel())
    return Result.of(compare(np.concatenate(got), np.concatenate(expected)), "scores")


@registry.case("qk", "UniformInputs_AllOnes: head_dim (64 ...) everywhere", evidence="implementation")
def all_ones(context: Context) -> Result:
    return _compare_pattern(context, patterns.all_ones)


@registry.case("qk", "RowIndicator: each query has its own value", evidence="implementation")
def row_indicator(context: Context) -> Result:
    return _compare_pattern(context, patterns.row_indicator)


@registry.case("qk", "ColIndicator: each key has its own value", evidence="implementation")
def col_indicator(context: Context) -> Result:
    return _compare_pattern(context, patterns.col_indicator)


@registry.case("qk", "one-hot queries: every (query, key, k) in its place", evidence="implementation")
def one_hot(context: Context) -> Result:
    def make(rows, cols, head_dim):
        # query m is 1 at k = m (mod head_dim) alone, so score (m, n) is element m of key n
        q = np.zeros((rows, head_dim), np.uint8)
        q[np.arange(rows), np.arange(rows) % head_dim] = 2
        return problems.tensor(q), problems.tensor(problems.random_codes(context.rng("one_hot"), cols, head_dim))

    return _compare_all(context, make, "scores", exact=True)


@registry.case("qk", "random E2M1, unit scales", evidence="implementation")
def random_e2m1(context: Context) -> Result:
    rng = context.rng("random_e2m1")

    def make(rows, cols, head_dim):
        return tuple(problems.tensor(problems.random_codes(rng, tokens, head_dim)) for tokens in (rows, cols))

    return _compare_all(context, make, "scores", exact=True)


@registry.case("qk", "power-of-two scales, another in each block", evidence="implementation")
def each_scale_block(context: Context) -> Result:
    rng = context.rng("each_scale_block")

    def make(rows, cols, head_dim):
        # powers of two, another one for each block and row: a scale applied to a wrong block or row shows, sums stay
        # exact
        pair = []
        for tokens in (rows, cols):
            blocks = np.arange(-(-head_dim // 16))
            exponents = (blocks[None, :] + 3 * np.arange(tokens)[:, None]) % 4
            scales = (problems.UE4M3_ONE + 8 * exponents).astype(np.uint8)
            pair.append(problems.tensor(problems.random_codes(rng, tokens, head_dim), scales))
        return pair

    return _compare_all(context, make, "scores", exact=True)


@registry.case("qk", "random E2M1, random UE4M3 scales", evidence="implementation")
def random_scales(context: Context) -> Result:
    rng = context.rng("random_scales")

    def make(rows, cols, head_dim):
        return tuple(problems.random_tensor(rng, tokens, head_dim) for tokens in (rows, cols))

    return _compare_all(context, make, "scores", exact=False)


@registry.case("qk", "zero codes or zero scales: zero", evidence="implementation")
def zeros(context: Context) -> Result:
    rng = context.rng("zeros")
    k = problems.random_tensor(rng, 40, 128)
    no_codes = problems.tensor(np.zeros((24, 128), np.uint8), problems.random_tensor(rng, 24, 128).scales)
    no_scales = problems.tensor(problems.random_codes(rng, 24, 128), np.zeros((24, 8), np.uint8))
    scores = np.stack([_scores(context, q, k) for q in (no_codes, no_scales)])
    return Result.of(compare(scores, np.zeros((2, 24, 40))), "scores")


@registry.case("qk", "scales in each layout, from each memory", evidence="implementation")
def scale_sources(context: Context) -> Result:
    from nbfmha import nvfp4, scale_layouts

    rng = context.rng("scale_sources")
    got, expected = [], []
    pair = [problems.random_tensor(rng, tokens, 96) for tokens in (70, 130)]  # 6 scale columns: no whole word of four
    once = _scores(context, *pair)
    # each layout from the last memory and each memory in one layout: all pairs are in `pytest -m gpu`, a kernel each
    sources = context.implementation.scale_sources
    linear, *others = scale_layouts.SCALE_LAYOUTS
    for layout, source in (*((linear, source) for source in sources), *((layout, sources[-1]) for layout in others)):
        q, k = (nvfp4.relayout(tensor, layout) for tensor in pair)
        got.append(context.implementation.qk(q, k, scales_in=source).ravel())
        expected.append(once.ravel())
    comparison = compare(np.concatenate(got), np.concatenate(expected))
    return Result.of(comparison, f"scores, {len(scale_layouts.SCALE_LAYOUTS)} layouts, scales in {' and '.join(sources)}")


@registry.case("qk", "grouped heads and global scales", evidence="implementation")
def heads(context: Context) -> Result:
    from nbfmha import nvfp4

    rng = context.rng("heads")
    q, k = (
        nvfp4.quantize(rng.standard_normal((2, count, tokens, 64)).astype(np.float32), global_scale=scale)
        for count, tokens, scale in ((6, 20, 0.03), (2, 40, 0.05))
    )
    budget = problems.score_budget(q, k, context.implementation)
    return Result.of(compare(_scores(context, q, k), problems.exact_scores(q, k), budget), "scores of 2 x 6 heads on 2 x 2")
