"""Inputs for the Q·K^T cases: codes and scale bytes chosen directly, so that the expected scores are known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nbfmha.testing import accumulation_budget

if TYPE_CHECKING:
    from nbfmha.validate.implementations import Accumulation, Implementation

UE4M3_ONE = 0x38
#: (queries, keys, head_dim): one MMA tile, whole tiles, and lengths that are no multiple of any tile.
SHAPES = ((16, 8, 64), (64, 64, 64), (33, 17, 96), (48, 72, 128), (1, 130, 256))


def tensor(codes, scales=None):
    """A ``QuantizedTensor`` (NVFP4, linear scales) of E2M1 codes (tokens, head_dim), one a byte, and UE4M3 scale bytes.

    scales: (tokens, ceil(head_dim / 16)), by default 1.0 everywhere.
    """
    from nbfmha.quantized_tensor import QuantizedTensor
    from ptx_inline.isa.formats import pack_nibbles

    tokens, head_dim = codes.shape
    blocks = -(-head_dim // 16)
    padded = np.zeros((tokens, blocks * 16), np.uint8)
    padded[:, :head_dim] = codes
    if scales is None:
        scales = np.full((tokens, blocks), UE4M3_ONE, np.uint8)
    return QuantizedTensor(
        codes=pack_nibbles(padded),
        scales=np.ascontiguousarray(scales, dtype=np.uint8),
        format="nvfp4",
        axis="head_dim",
        scale_layout="linear",
        global_scale=None,
        shape=(tokens, head_dim),
    )


def random_codes(rng: np.random.Generator, tokens: int, head_dim: int) -> np.ndarray:
    """Any E2M1 code, uint8 (tokens, head_dim)."""
    return rng.integers(0, 16, (tokens, head_dim), dtype=np.uint8)


def random_tensor(rng: np.random.Generator, tokens: int, head_dim: int):
    """Any E2M1 codes with any finite UE4M3 scales, zero and subnormals among them."""
    codes = random_codes(rng, tokens, head_dim)
    return tensor(codes, rng.integers(0, 0x7F, (tokens, -(-head_dim // 16)), dtype=np.uint8))


def dequantized(q, k) -> tuple[np.ndarray, np.ndarray]:
    """q and k as float64, each key head repeated for the query heads that read it."""
    from nbfmha import nvfp4

    q_values, k_values = (nvfp4.dequantize(tensor).astype(np.float64) for tensor in (q, k))
    return q_values, _for_query_heads(k_values, q, k, axis=-3)


def exact_scores(q, k) -> np.ndarray:
    """Scores in float64, not rounded: products are multiples of 2^-20 below 2^23, so 256 of them fit 53 bits."""
    from nbfmha import reference

    return reference.qk(*dequantized(q, k))


def score_budget(q, k, implementation: Implementation) -> np.ndarray:
    """Largest error that the implementation's accumulation can make in each score.

    A term is aligned by the product of two powers of two, at most as large as the largest scales (block-scale MMA) or
    elements (f16 MMA) of its row and column. Multiplying by global scales rounds once more, to nearest.
    """
    from nbfmha import nvfp4

    accumulation = implementation.accumulation
    plain = [replace(nvfp4.relayout(tensor, "linear"), global_scale=None) for tensor in (q, k)]
    rows, cols = (np.abs(values) for values in dequantized(*plain))
    if implementation.multiplies_scales:
        row_factor, col_factor = (tensor.scale_format.decode(tensor.scales).max(axis=-1) for tensor in plain)
        col_factor = _for_query_heads(col_factor, q, k, axis=-2)
    else:
        row_factor, col_factor = rows.max(axis=-1), cols.max(axis=-1)
    magnitude = rows @ np.swapaxes(cols, -1, -2)
    budget = accumulation_budget(
        magnitude,
        largest_term(row_factor, col_factor, accumulation),
        steps=accumulation.steps(q.shape[-1]),
        addends=accumulation.addends,
        fraction_bits=accumulation.fraction_bits,
    )
    if q.global_scale is None:
        return budget
    return (budget + 2.0**-23 * magnitude) * float(q.global_scale) * float(k.global_scale)


def _for_query_heads(values: np.ndarray, q, k, *, axis: int) -> np.ndarray:
    return np.repeat(values, q.shape[-3] // k.shape[-3], axis=axis) if len(q.shape) > 2 else values


def largest_term(row_factor: np.ndarray, col_factor: np.ndarray, accumulation: Accumulation) -> np.ndarray:
    """(..., M) and (..., N) largest factors of each row and column -> (..., M, N) largest power of two that aligns."""
    smallest = accumulation.smallest_factor
    return np.maximum(row_factor, smallest)[..., :, None] * np.maximum(col_factor, smallest)[..., None, :]
