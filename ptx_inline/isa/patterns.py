"""Operands of one E2M1 tile whose product shows a wrong fragment map: all ones, and indicators of rows and of columns.

Each function takes the shape (M, N, K) of an MMA and returns codes a (M, K), b (N, K), uint8, and the expected D = A B,
float32 (M, N), with scales of one and C = 0. All sums are exact.

An indicator's row t holds ``indicator_values()[t % 8]`` along k: 0, 1/2, 1, 3/2, 2, 2, 3, 4, which is t / 2 rounded to
E2M1. So every row (column) of D is a known multiple of K, and only 4 and 5 agree. Their mean is 7/4: a packing that
mixes all eight columns evenly turns every column of ``col_indicator`` into 7/4 K, 112 for K = 64.
"""

from __future__ import annotations

import numpy as np

from ptx_inline.isa.formats import E2M1


def indicator_values() -> np.ndarray:
    """The eight values of an indicator, float32."""
    return E2M1.decode(_indicator_codes(8))


def all_ones(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A and B all 1: D is K everywhere, whatever the packing permutes."""
    m, n, k = shape
    return _ones(m, k), _ones(n, k), np.full((m, n), k, np.float32)


def row_indicator(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row m of A is an indicator, B all 1: every row of D is constant and known."""
    m, n, k = shape
    a = np.repeat(_indicator_codes(m)[:, None], k, axis=1)
    return a, _ones(n, k), np.repeat(k * E2M1.decode(a[:, :1]), n, axis=1)


def col_indicator(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A all 1, row n of the stored B (column n of B) is an indicator: every column of D is constant and known."""
    m, n, k = shape
    b = np.repeat(_indicator_codes(n)[:, None], k, axis=1)
    return _ones(m, k), b, np.repeat(k * E2M1.decode(b[:, :1]).T, m, axis=0)


def _indicator_codes(count: int) -> np.ndarray:
    return E2M1.encode(np.arange(count) % 8 / 2)


def _ones(rows: int, k: int) -> np.ndarray:
    return np.full((rows, k), E2M1.encode(np.float32(1)), np.uint8)
