"""Tiled Q·K^T by the implementation under test, on inputs whose scores are known exactly."""

from __future__ import annotations

import numpy as np

from nbfmha.testing import compare
from nbfmha.validate import problems
from nbfmha.validate.case import Context, Registry, Result

registry = Registry()


def _compare_all(context: Context, make, what: str, *, exact: bool) -> Result:
    """Run `make(tokens_q, tokens_k, head_dim) -> (q, k)` on every shape and compare all scores at once."""
    got, expected, budget = [], [], []
    for rows, cols, head_dim in problems.SHAPES:
        q, k = make(rows, cols, head_dim)
        scores = context.implementation.qk(q, k)
        if scores.shape != (rows, cols) or scores.dtype != np.float32:
            return Result.failed(
                "wrong kind of result", f"expected float32 {(rows, cols)}, got {scores.dtype} {scores.shape}"
            )
        got.append(scores.ravel())
        expected.append(problems.exact_scores(q, k).ravel())
        allowed = 0.0 if exact else problems.score_budget(q, k, context.implementation.mma)
        budget.append(np.broadcast_to(allowed, scores.shape).ravel())
    comparison = compare(np.concatenate(got), np.concatenate(expected), np.concatenate(budget))
    return Result.of(comparison, what, shapes=[list(shape) for shape in problems.SHAPES])


@registry.case("qk", "UniformInputs_AllOnes: 64 everywhere", evidence="implementation")
def all_ones(context: Context) -> Result:
    q = problems.tensor(problems.all_ones(128, 64))
    return Result.of(compare(context.implementation.qk(q, q), np.full((128, 128), 64.0)), "scores")


@registry.case("qk", "RowIndicator: each query row holds its own value", evidence="implementation")
def row_indicator(context: Context) -> Result:
    def make(rows, cols, head_dim):
        return problems.tensor(problems.indicator(rows, head_dim)), problems.tensor(problems.all_ones(cols, head_dim))

    return _compare_all(context, make, "scores", exact=True)


@registry.case("qk", "ColIndicator: each key column holds its own value", evidence="implementation")
def col_indicator(context: Context) -> Result:
    def make(rows, cols, head_dim):
        return problems.tensor(problems.all_ones(rows, head_dim)), problems.tensor(problems.indicator(cols, head_dim))

    return _compare_all(context, make, "scores", exact=True)


@registry.case("qk", "one-hot rows: every (k, row, column) lands in its place", evidence="implementation")
def one_hot(context: Context) -> Result:
    def make(rows, cols, head_dim):
        # query m is 1 at k = m (mod head_dim) alone, so score (m, n) is element m of key n
        q = np.zeros((rows, head_dim), np.uint8)
        q[np.arange(rows), np.arange(rows) % head_dim] = 2
        return problems.tensor(q), problems.tensor(problems.random_codes(context.rng("one_hot"), cols, head_dim))

    return _compare_all(context, make, "scores", exact=True)


@registry.case("qk", "random E2M1, unit scales, any M, N, head_dim", evidence="implementation")
def random_e2m1(context: Context) -> Result:
    rng = context.rng("random_e2m1")

    def make(rows, cols, head_dim):
        return tuple(problems.tensor(problems.random_codes(rng, tokens, head_dim)) for tokens in (rows, cols))

    return _compare_all(context, make, "scores", exact=True)


@registry.case("qk", "one scale at a time: each of the head_dim / 16 blocks", evidence="implementation")
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


@registry.case("qk", "random E2M1, random UE4M3 scales with zero and subnormals", evidence="implementation")
def random_scales(context: Context) -> Result:
    rng = context.rng("random_scales")

    def make(rows, cols, head_dim):
        return tuple(
            problems.tensor(problems.random_codes(rng, tokens, head_dim), problems.random_scales(rng, tokens, head_dim))
            for tokens in (rows, cols)
        )

    return _compare_all(context, make, "scores", exact=False)


@registry.case("qk", "zero codes or zero scales give zero exactly", evidence="implementation")
def zeros(context: Context) -> Result:
    rng = context.rng("zeros")
    k = problems.tensor(problems.random_codes(rng, 40, 128), problems.random_scales(rng, 40, 128))
    no_codes = problems.tensor(np.zeros((24, 128), np.uint8), problems.random_scales(rng, 24, 128))
    no_scales = problems.tensor(problems.random_codes(rng, 24, 128), np.zeros((24, 8), np.uint8))
    scores = np.stack([context.implementation.qk(q, k) for q in (no_codes, no_scales)])
    return Result.of(compare(scores, np.zeros((2, 24, 40))), "scores")
