"""How far quantised attention ends from attention: numbers for each recipe, and for each kind of KV cache. A leaf, for
reports and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nbfmha import reference
from nbfmha.cache_model import decode_outputs
from nbfmha.kv_layout import CacheLayout
from nbfmha.problem import Problem
from nbfmha.recipe import PRESETS, Recipe
from nbfmha.recipe_model import recipe_attention
from nbfmha.testing import relative_rmse
from nbfmha.validation import dtype_name


class Accuracy(NamedTuple):
    """Distance of an output from the expected one, and of the LSEs from theirs.

    cosine        of the two outputs, all elements as one vector
    relative_l2   ||out - expected|| / ||expected||, all elements as one vector
    worst_row     the largest relative L2 of one query row of one head (rows whose expected output is zero apart)
    lse_error     the largest |lse - expected| over rows that see a key
    """

    cosine: float
    relative_l2: float
    worst_row: float
    lse_error: float


def accuracy(out, lse, expected_out, expected_lse) -> Accuracy:
    """Compare (..., rows, head_dim) outputs and (..., rows) LSEs in float64. Zero on both sides compares as 1, 0, 0.

    Raises ``ValueError`` where the shapes differ or a row is masked (lse = -inf) on one side alone.
    """
    out, expected_out = np.asarray(out, np.float64), np.asarray(expected_out, np.float64)
    lse, expected_lse = np.asarray(lse, np.float64), np.asarray(expected_lse, np.float64)
    if out.shape != expected_out.shape or lse.shape != expected_lse.shape:
        raise ValueError(
            f"out and lse must be of shapes {expected_out.shape} and {expected_lse.shape}, got {out.shape} and {lse.shape}"
        )
    seen = np.isfinite(expected_lse)
    if not np.array_equal(np.isneginf(lse), np.isneginf(expected_lse)):
        raise ValueError("lse must be -inf for the same rows on both sides; a row is masked on one side alone")
    norms = np.sqrt(np.sum(out**2) * np.sum(expected_out**2))
    row_size = np.sum(expected_out**2, axis=-1)
    row_error = np.sum((out - expected_out) ** 2, axis=-1)[row_size > 0] / row_size[row_size > 0]
    return Accuracy(
        cosine=float(np.sum(out * expected_out) / norms) if norms else float(not out.any() and not expected_out.any()),
        relative_l2=relative_rmse(out, expected_out),
        worst_row=float(np.sqrt(row_error.max(initial=0.0))),
        lse_error=float(np.abs(lse[seen] - expected_lse[seen]).max(initial=0.0)),
    )


def accuracy_table(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    recipes: Mapping[str, Recipe] = PRESETS,
    *,
    causal: bool = True,
) -> dict[str, Accuracy]:
    """``accuracy`` of each recipe's model against float64 attention on the inputs as they came, not quantised."""
    problem = Problem.of(q, k, v, causal=causal)
    expected = reference.attention(q, k, v, problem, return_lse=True)
    return {name: accuracy(*recipe_attention(q, k, v, problem, recipe), *expected) for name, recipe in recipes.items()}


CACHES = {
    "plain NVFP4": {"scale": "amax", "smooth_k": False, "windows": False, "v_axis": "head_dim"},
    "no 16-bit windows": {"windows": False, "v_axis": "head_dim"},
    "no 16-bit windows, V along tokens": {"windows": False},
    "default": {},
    "default, V along head_dim": {"v_axis": "head_dim"},
}
"""Name -> how K and V are kept: options of ``cache_model.decode_outputs``, and ``CacheLayout``'s scale."""


def cache_accuracy_table(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, chunks: Sequence[int] = (1, 16, 64), **options: Any
) -> dict[str, dict[int, float]]:
    """Name of ``CACHES`` -> chunk -> relative L2 of attention read from such a KV cache, ``chunk`` tokens appended at a
    time, against float64 causal attention on the history as it came.

    q (num_heads_q, n, head_dim), k, v (num_heads_kv, n, head_dim), float16 or bfloat16. options: of ``CacheLayout``.
    """
    expected = reference.attention(q, k, v, causal=True)
    table = {}
    for name, how in CACHES.items():
        scale = {"scale": how["scale"]} if "scale" in how else {}
        layout = CacheLayout(k.shape[0], k.shape[-1], dtype=dtype_name(k), **options | scale)
        read = {option: value for option, value in how.items() if option != "scale"}
        table[name] = {n: relative_rmse(decode_outputs(q, k, v, layout, chunk=n, **read), expected) for n in chunks}
    return table
