"""Where the scale of (row, scale column) lies: the only home of the three layouts.

A matrix of ``rows`` x ``cols`` scales (one byte each) is stored as

==================  ===============================================================  =====================  ==============
layout              offset of row ``r``, scale column ``c``, with ``C4 = ceil(cols/4)``  padded to (rows, cols)  array shape
==================  ===============================================================  =====================  ==============
``linear``          ``r*cols + c``                                                   nothing                (rows, cols)
``blocked_128x4``   ``(r/128)*C4*512 + (c/4)*512 + (r%32)*16 + ((r%128)/32)*4 + c%4``  multiples of 128, 4    (size,)
``interleaved_64``  ``(r/64)*C4*256 + (c/4)*256 + (r%16)*16 + ((r%64)/16)*4 + c%4``    multiples of 64, 4     (size,)
==================  ===============================================================  =====================  ==============

(integer divisions). Padding is zero: the kernels that read these layouts load whole 128x4 or 64x4 blocks.

Sources: ``blocked_128x4`` is cuBLAS's "1D block scaling factors layout" (cuBLAS documentation, Data Layout), which
``tcgen05.mma`` shares; ``interleaved_64`` is what SageAttention3's FP4 quantiser writes for every 64 tokens.
"""

from __future__ import annotations

import math

import numpy as np

from nbfmha.validation import check_choice, message

_PADDING = {"linear": (1, 1), "blocked_128x4": (128, 4), "interleaved_64": (64, 4)}

SCALE_LAYOUTS = tuple(_PADDING)
"""Names of the layouts."""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def padded_shape(layout: str, rows: int, cols: int) -> tuple[int, int]:
    """(rows, cols) of the matrix with its padding. Raises ``ValueError`` for an unknown layout or a negative size."""
    check_choice("scale_layout", layout, SCALE_LAYOUTS)
    if rows < 0 or cols < 0:
        raise ValueError(message("rows and cols", ">= 0", (rows, cols)))
    row_multiple, col_multiple = _PADDING[layout]
    return _round_up(rows, row_multiple), _round_up(cols, col_multiple)


def size(layout: str, rows: int, cols: int) -> int:
    """Bytes of one matrix of scales, padding included."""
    return math.prod(padded_shape(layout, rows, cols))


def array_shape(layout: str, rows: int, cols: int) -> tuple[int, ...]:
    """Shape of the array that holds one matrix: (rows, cols) for ``linear``, (size,) for the others."""
    return (rows, cols) if layout == "linear" else (size(layout, rows, cols),)


def _linear(row, col, padded_cols):
    return row * padded_cols + col


def _blocked_128x4(row, col, padded_cols):
    return row // 128 * (padded_cols * 128) + col // 4 * 512 + row % 32 * 16 + row % 128 // 32 * 4 + col % 4


def _interleaved_64(row, col, padded_cols):
    return row // 64 * (padded_cols * 64) + col // 4 * 256 + row % 16 * 16 + row % 64 // 16 * 4 + col % 4


FORMULAS = {"linear": _linear, "blocked_128x4": _blocked_128x4, "interleaved_64": _interleaved_64}
"""Layout -> offset of (row, col) in a matrix whose columns are padded to ``padded_cols``; integers or arrays. GPU kernels
compile these same functions."""


def offset(layout: str, row: np.ndarray, col: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Byte offset of the scale of ``row``, scale column ``col``; integers or arrays that broadcast, int64 out.

    Padding has addresses too: ``row`` and ``col`` may be anything inside ``padded_shape``. ``ValueError`` outside it.
    """
    padded_rows, padded_cols = padded_shape(layout, rows, cols)
    r, c = np.asarray(row, np.int64), np.asarray(col, np.int64)
    for name, index, bound in (("row", r, padded_rows), ("col", c, padded_cols)):
        if index.size and (index.min() < 0 or index.max() >= bound):
            raise ValueError(message(name, f"in [0, {bound})", f"{index.min()}..{index.max()}"))
    return FORMULAS[layout](r, c, padded_cols)


def apply(layout: str, scales: np.ndarray) -> np.ndarray:
    """Linear scales (..., rows, cols) in ``layout``: (..., size), padding zero. ``linear`` returns a copy."""
    *lead, rows, cols = scales.shape
    if layout == "linear":
        return scales.copy()
    stored = np.zeros((*lead, size(layout, rows, cols)), scales.dtype)
    stored[..., _offsets(layout, rows, cols)] = scales
    return stored


def undo(layout: str, stored: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Inverse of ``apply``: the linear (..., rows, cols) copy. ``ValueError`` when ``stored`` has another shape."""
    expected = array_shape(layout, rows, cols)
    if stored.shape[stored.ndim - len(expected) :] != expected:
        got = f"(..., {', '.join(map(str, expected))}) for {rows} x {cols} scales as {layout!r}"
        raise ValueError(message("scales.shape", got, stored.shape))
    if layout == "linear":
        return stored.copy()
    return stored[..., _offsets(layout, rows, cols)]


def _offsets(layout: str, rows: int, cols: int) -> np.ndarray:
    return offset(layout, np.arange(rows)[:, None], np.arange(cols)[None, :], rows, cols)
