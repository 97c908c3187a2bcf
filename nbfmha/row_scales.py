"""FP4 with one float32 scale a row, for MMAs without block scales: the NumPy reference that kernels equal bit for bit.

Contract, for a row of float32 values (a token of q or k over head_dim, a channel of v over the tokens of a sequence).
Every operation is one IEEE float32 operation, rounded to nearest even on its own; subnormals are kept:
    amax = max |x| of the row
    s    = amax / 6
    code = E2M1(x / s)              nearest even, saturating at 6; the sign of zero is kept

    s == 0 (a row of zeros)         every code 0 (also for -0)
    any NaN or Inf in the row       s = NaN (0x7FFFFFFF), every code 0: the row dequantises to NaN
"""

from __future__ import annotations

import numpy as np

from ptx_inline.isa.formats import E2M1


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of float32 rows (..., length): uint8 of that shape, one code a byte, and float32 (...).

    A row of length 0 has the scale 0. Raises ``TypeError`` for another dtype than float32.
    """
    if x.dtype != np.float32:
        raise TypeError(f"x must be of dtype float32, got {x.dtype}")
    with np.errstate(all="ignore"):  # NaN, Inf and zero are part of the contract
        amax = np.abs(x).max(axis=-1, initial=0)  # NaN when any element is
        scales = np.asarray(amax / np.float32(6))
        codes = E2M1.encode(x / scales[..., None])
    not_finite = ~np.isfinite(amax)
    codes[(scales == 0) | not_finite] = 0
    scales.view(np.uint32)[not_finite] = 0x7FFFFFFF
    return codes, scales


def dequantize_rows(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """code * scale, exact in float64: (..., length)."""
    return E2M1.decode(codes).astype(np.float64) * scales[..., None].astype(np.float64)
