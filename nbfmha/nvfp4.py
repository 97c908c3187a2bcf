"""Quantise to NVFP4 and MXFP4 and back: the NumPy reference, to which the CUDA kernels are bit-identical.

Bit-level contract. ``x`` is the element widened exactly to float32. Every operation below is one IEEE float32 operation,
rounded to nearest even on its own: no fused multiply-add, no reciprocal, no flush of subnormals.

NVFP4, blocks of 16, UE4M3 scales, ``g`` = global_scale (decode direction, 1 when None):
    amax = max |x| of the block
    sf   = E4M3(amax / (6*g))                       nearest even, saturating at 448, subnormals kept
    s    = value(sf) * g                            the *decoded* scale, not the one before rounding
    code = E2M1(clamp(x, -7*s, 7*s) / s)            nearest even, saturating at 6; the sign of zero is kept

    sf == 0 (a zero block, or underflow)            every code 0 (also for -0)
    any NaN or Inf in the block                     sf = 0x7F, every code 0: the block dequantises to NaN. (Saturating Inf
                                                    would turn its finite neighbours into zeros without a trace.)

MXFP4, blocks of 32, UE8M0 scales, no global scale (OCP Microscaling Formats 1.0, section 6.3):
    e = floor(log2(amax)) - 2 clamped to [-127, 127], sf = e + 127, s = 2^e, code as above
    amax == 0: sf = 0, every code 0.  Any NaN or Inf: sf = 0xFF, every code 0.

``scale="four_over_six"`` (NVFP4 only; Cook et al., "Four Over Six", arXiv 2512.02010, here with 5 as well): candidates
    sf_d = E4M3(amax / (d*g)) for d = 6, 5, 4, each quantised as above; squared error of the block
    q_i = e_i * e_i with e_i = x_i - value(code_i)*s, summed as a fixed tree q[i] + q[i+8], then + 4, + 2, + 1.
    A candidate replaces the best so far when its error is smaller: ties go to the earlier d, NaN and Inf never win.

``global_scale="amax"``: g = a / 2688 clamped to [2^-64, 2^64] with ``a`` the largest finite |x| of the whole tensor;
1 when ``a`` is 0. (2688 = 6*448, the largest E2M1 times the largest E4M3.)

Dequantise: y = value(code) * s, then one rounding to the asked dtype, nearest even, overflow to Inf. NaN is the pattern
that NVIDIA hardware writes: 0x7FFFFFFF in float32, 0x7FFF in float16 and bfloat16.

Layouts of codes and scales: ``nbfmha.quantized_tensor`` and ``nbfmha.scale_layouts``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from nbfmha import scale_layouts
from nbfmha.quantized_tensor import BlockFormat, QuantizedTensor, block_format, storage_shapes
from nbfmha.validation import (
    GLOBAL_SCALE_MAX,
    GLOBAL_SCALE_MIN,
    check_choice,
    check_float_dtype,
    check_global_scale,
    check_numpy,
    check_rank,
    dtype_name,
    message,
)
from ptx_inline.isa.formats import E2M1, UE4M3, UE8M0, pack_nibbles, unpack_nibbles

SCALE_RULES = ("amax", "four_over_six")
"""How the scale of a block is chosen."""

DEQUANTIZED_DTYPES = ("float32", "float16", "bfloat16")

_DIVISORS = {"amax": (6,), "four_over_six": (6, 5, 4)}
_TILE_ELEMS = 1 << 17  # of one working tile: its few float32 temporaries stay in the L2 cache


def quantize(
    x: np.ndarray,
    *,
    format: str = "nvfp4",
    axis: str = "head_dim",
    scale: str = "amax",
    scale_layout: str = "linear",
    global_scale: float | str | None = None,
) -> QuantizedTensor:
    """Quantise ``x`` (..., tokens, head_dim) by the contract at the top of this module.

    ``x`` is a NumPy array of any strides, float16, bfloat16 (ml_dtypes) or float32; it is not changed.
    ``global_scale`` is None, ``"amax"`` or a number in [2^-64, 2^64] in the decode direction; NVFP4 only. Zero tokens or
    a zero batch give an empty result.

    Raises ``TypeError`` for something that is no NumPy array or has another dtype; ``ValueError`` for a rank below 2, a
    head_dim that is odd or 0, an unknown name, a combination MXFP4 lacks or a global scale out of range.
    """
    block = check_recipe(format, scale, global_scale)
    check_numpy("x", x, "nbfmha.kernels quantises GPU arrays")
    check_float_dtype("x", x)
    shape = check_rank("x", x, 2, "(..., tokens, head_dim)")
    codes_shape, _ = storage_shapes(shape, format=format, axis=axis, scale_layout=scale_layout)

    matrix = _as_matrix(x if axis == "head_dim" else x.swapaxes(-1, -2))
    if isinstance(global_scale, str):
        global_scale = _amax_global_scale(matrix)
    elif global_scale is not None:
        global_scale = check_global_scale(global_scale)
    g = np.float32(1) if global_scale is None else global_scale

    *lead, rows, row_bytes = codes_shape
    cols = row_bytes * 2 // block.block_size
    codes = np.zeros((len(matrix), row_bytes), np.uint8)
    scales = np.zeros((len(matrix), cols), np.uint8)
    for row, col in _tiles(len(matrix), cols, block.block_size):
        blocks = _load_blocks(matrix[row], col, block.block_size)
        tile_codes, scales[row, col] = quantize_blocks(blocks, block, scale=scale, global_scale=g)
        packed = pack_nibbles(tile_codes.reshape(len(blocks), -1))
        codes[row, col.start * block.block_size // 2 : col.stop * block.block_size // 2] = packed
    return QuantizedTensor(
        codes=codes.reshape(codes_shape),
        scales=scale_layouts.apply(scale_layout, scales.reshape(*lead, rows, cols)),
        format=format,
        axis=axis,
        scale_layout=scale_layout,
        global_scale=None if global_scale is None else np.array(global_scale, np.float32),
        shape=shape,
    )


def dequantize(qt: QuantizedTensor, dtype: str = "float32") -> np.ndarray:
    """The values of ``qt`` as a C-contiguous array of ``qt.shape``.

    ``dtype`` is "float32", "float16" or "bfloat16". NumPy itself has no bfloat16: those values come as their bit patterns
    in uint16 (``.view(ml_dtypes.bfloat16)`` turns them into numbers).

    Raises ``TypeError`` for arrays that are not NumPy's, ``ValueError`` for another dtype.
    """
    _check_numpy_tensor(qt)
    check_choice("dtype", dtype, DEQUANTIZED_DTYPES)
    g = np.float32(1) if qt.global_scale is None else check_global_scale(qt.global_scale)
    size, length = qt.block_size, qt.blocked_length
    count = math.prod(qt.shape[:-2]) * qt.rows
    codes = qt.codes.reshape(count, qt.cols * size // 2)
    scales = scale_layouts.undo(qt.scale_layout, qt.scales, qt.rows, qt.cols).reshape(count, qt.cols)

    values = np.empty((count, length), np.uint16 if dtype == "bfloat16" else dtype)
    for row, col in _tiles(count, qt.cols, size):
        tile_codes = unpack_nibbles(codes[row, col.start * size // 2 : col.stop * size // 2])
        blocks = tile_codes.reshape(len(tile_codes), -1, size)
        tile = dequantize_blocks(blocks, scales[row, col], qt.block_format, global_scale=g).reshape(len(blocks), -1)
        valid = slice(col.start * size, min(col.stop * size, length))
        values[row, valid] = _round_to(tile[:, : valid.stop - valid.start], dtype)
    stored = values.reshape(*qt.shape[:-2], qt.rows, length)
    return stored if qt.axis == "head_dim" else np.ascontiguousarray(stored.swapaxes(-1, -2))


def relayout(qt: QuantizedTensor, scale_layout: str) -> QuantizedTensor:
    """``qt`` with its scales in another layout, codes shared. Raises as ``dequantize``."""
    _check_numpy_tensor(qt)
    check_choice("scale_layout", scale_layout, scale_layouts.SCALE_LAYOUTS)
    linear = scale_layouts.undo(qt.scale_layout, qt.scales, qt.rows, qt.cols)
    return QuantizedTensor(
        codes=qt.codes,
        scales=scale_layouts.apply(scale_layout, linear),
        format=qt.format,
        axis=qt.axis,
        scale_layout=scale_layout,
        global_scale=qt.global_scale,
        shape=qt.shape,
    )


def quantize_blocks(
    x: np.ndarray, block: BlockFormat, *, scale: str = "amax", global_scale: np.float32 = np.float32(1)
) -> tuple[np.ndarray, np.ndarray]:
    """The contract itself: float32 blocks (..., block_size) to E2M1 codes of that shape and scale bytes (...)."""
    with np.errstate(all="ignore"):  # Inf, NaN and underflow are part of the contract
        amax = _tree(np.maximum, np.abs(x))  # NaN when any element is
        amax[np.isinf(amax)] = np.nan
        if block.scale_format is UE8M0:
            # floor(log2(amax)) - 2 = floor(log2(amax/4)); exact in float64, where amax/4 is never subnormal
            quarter = amax.astype(np.float64) / 4
            sf = UE8M0.encode(quarter, rounding="rz")
            return _encode_elements(x, amax, UE8M0.decode(sf)), sf

        codes = sf = error = None
        for divisor in _DIVISORS[scale]:
            candidate_sf = UE4M3.encode(amax / (np.float32(divisor) * global_scale))
            s = UE4M3.decode(candidate_sf) * global_scale
            candidate = _encode_elements(x, amax, s)
            if scale == "amax":
                return candidate, candidate_sf
            difference = x - E2M1.decode(candidate) * s[..., None]
            candidate_error = _tree(np.add, difference * difference)
            if error is None:
                codes, sf, error = candidate, candidate_sf, candidate_error
            else:
                better = candidate_error < error
                codes = np.where(better[..., None], candidate, codes)
                sf = np.where(better, candidate_sf, sf)
                error = np.where(better, candidate_error, error)
        return codes, sf


def dequantize_blocks(
    codes: np.ndarray, scales: np.ndarray, block: BlockFormat, *, global_scale: np.float32 = np.float32(1)
) -> np.ndarray:
    """E2M1 codes (..., block_size) and scale bytes (...) to float32 values; NaN blocks are 0x7FFFFFFF."""
    with np.errstate(invalid="ignore"):
        s = block.scale_format.decode(scales) * global_scale
        values = E2M1.decode(codes) * s[..., None]
    values.view(np.uint32)[np.isnan(s)] = 0x7FFFFFFF
    return values


def _encode_elements(x: np.ndarray, amax: np.ndarray, s: np.ndarray) -> np.ndarray:
    limit = (np.float32(7) * s)[..., None]
    codes = E2M1.encode(np.clip(x, -limit, limit) / s[..., None])
    codes[~((amax > 0) & (s > 0))] = 0  # zero, underflow, NaN
    return codes


def _tree(operation: np.ufunc, values: np.ndarray) -> np.ndarray:
    """Reduce the last axis, a power of two long, by halves: the order that the contract fixes."""
    while (half := values.shape[-1] // 2) >= 1:
        values = operation(values[..., :half], values[..., half:])
    return values[..., 0]


def check_recipe(format: str, scale: str, global_scale: object) -> BlockFormat:
    """The block format, after checking names and combinations; ``ValueError`` as ``quantize`` documents it."""
    block = block_format(format)
    check_choice("scale", scale, SCALE_RULES)
    if isinstance(global_scale, str):
        check_choice("global_scale", global_scale, ("amax",), "give a number or None")
    if not block.has_global_scale and global_scale is not None:
        raise ValueError(message("global_scale", f"None for {format!r}", repr(global_scale), "'nvfp4' has one"))
    if not block.has_global_scale and scale != "amax":
        raise ValueError(message("scale", f"'amax' for {format!r}", repr(scale), "'nvfp4' has four_over_six"))
    return block


def _check_numpy_tensor(qt: object) -> None:
    if not isinstance(qt, QuantizedTensor):
        raise TypeError(message("qt", "a QuantizedTensor", type(qt).__name__))
    check_numpy("qt.codes", qt.codes, "copy the arrays to NumPy first")


def _as_matrix(x: np.ndarray) -> np.ndarray:
    """(..., rows, length) as (all rows, length); bfloat16 as its bits. Copies only what strides force it to."""
    if dtype_name(x) == "bfloat16":
        x = x.view(np.uint16)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _widen(values: np.ndarray) -> np.ndarray:
    """Exactly to float32; uint16 holds bfloat16 bits."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return values.astype(np.float32, copy=False)


def _tiles(rows: int, cols: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Cover ``rows`` x ``cols`` blocks by tiles of about ``_TILE_ELEMS`` elements."""
    if not rows or not cols:
        return
    col_step = min(cols, _TILE_ELEMS // block_size)
    row_step = max(1, _TILE_ELEMS // (col_step * block_size))
    for row in range(0, rows, row_step):
        for col in range(0, cols, col_step):
            yield slice(row, min(row + row_step, rows)), slice(col, min(col + col_step, cols))


def _load_blocks(rows: np.ndarray, col: slice, block_size: int) -> np.ndarray:
    """Float32 blocks (rows, blocks, block_size) of the scale columns ``col``, zero past the end of the row."""
    width = (col.stop - col.start) * block_size
    values = _widen(rows[:, col.start * block_size : col.stop * block_size])
    if values.shape[1] < width:
        padded = np.zeros((len(values), width), np.float32)
        padded[:, : values.shape[1]] = values
        values = padded
    return values.reshape(len(values), -1, block_size)


def _amax_global_scale(matrix: np.ndarray) -> np.float32:
    amax = np.float32(0)
    for row, col in _tiles(*matrix.shape, 1):
        magnitude = np.abs(_widen(matrix[row, col]))
        amax = max(amax, magnitude.max(where=np.isfinite(magnitude), initial=np.float32(0)))
    if amax == 0:
        return np.float32(1)
    with np.errstate(under="ignore"):
        scale = amax / np.float32(2688)
    return np.clip(scale, np.float32(GLOBAL_SCALE_MIN), np.float32(GLOBAL_SCALE_MAX))


def _round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore", under="ignore"):
            rounded = values.astype(np.float16)
        rounded.view(np.uint16)[np.isnan(values)] = 0x7FFF
        return rounded
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FFF
    return rounded
