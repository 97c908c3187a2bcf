"""The GPU half of :mod:`nbfmha.quantization`: allocates, picks a kernel by shape and layout, launches.

Results lie in the caller's library on its current stream; nothing here waits for the GPU. Arrays of an emulated machine
take the same way.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from nbfmha import gpu_arrays, nvfp4, scale_layouts
from nbfmha.quantized_tensor import QuantizedTensor, storage_shapes
from nbfmha.validation import check_float_dtype, check_global_scale, check_rank, message
from ptx_inline.toolchain import Kernel

_MAX_CTAS = 2**31 - 1  # along x
_MAX_CTAS_Y = 65535  # along y, and along z


def quantize(x: Any, *, format: str, axis: str, scale: str, scale_layout: str, global_scale: Any) -> QuantizedTensor:
    """As :func:`nbfmha.quantize`, for an array in GPU memory."""
    from nbfmha.kernels import quantize as kernels

    block = nvfp4.check_recipe(format, scale, global_scale)
    dtype = check_float_dtype("x", x)
    shape = check_rank("x", x, 2, "(..., tokens, head_dim)")
    codes_shape, scales_shape = storage_shapes(shape, format=format, axis=axis, scale_layout=scale_layout)
    gpu_arrays.check_contiguous("x", x)

    qt = QuantizedTensor(
        codes=gpu_arrays.empty(x, codes_shape, "uint8"),
        scales=gpu_arrays.empty(x, scales_shape, "uint8"),
        format=format,
        axis=axis,
        scale_layout=scale_layout,
        global_scale=_global_scale(x, dtype, global_scale),
        shape=shape,
    )
    if not math.prod(scales_shape):
        return qt
    has_global = qt.global_scale is not None
    g = qt.global_scale if has_global else 0  # a null address that the kernel never reads
    padded_rows, padded_cols = scale_layouts.padded_shape(scale_layout, qt.rows, qt.cols)
    batch = math.prod(shape[:-2])
    arguments = (x, g, qt.codes, qt.scales, *shape[-2:], padded_rows, padded_cols)
    aligned = gpu_arrays.is_aligned(x, 16)
    whole_blocks = shape[-1] % block.block_size == 0 and aligned
    if axis == "tokens":
        if not aligned:
            raise ValueError(message("x", "at an address that is a multiple of 16", "another", "copy it"))
        kernel = kernels.tokens_kernel(dtype, format, scale, scale_layout, has_global)
        _launch_by_tokens(kernel, batch, padded_rows, padded_cols, format, arguments)
    elif whole_blocks and scale_layout == "linear":
        kernel = kernels.flat_kernel(dtype, format, scale, has_global)
        blocks = math.prod(scales_shape)
        gpu_arrays.launch(kernel, _ctas(blocks, kernels.THREADS), (kernels.THREADS,), (*arguments[:4], blocks))
    else:
        kernel = kernels.rows_kernel(dtype, format, scale, scale_layout, has_global, whole_blocks)
        _launch_by_rows(kernel, batch, padded_rows, padded_cols, arguments)
    return qt


def dequantize(qt: QuantizedTensor, dtype: str) -> Any:
    """As :func:`nbfmha.dequantize`, for arrays in GPU memory."""
    from nbfmha.kernels import dequantize as kernels

    check_arrays(qt)
    y = gpu_arrays.empty(qt.codes, qt.shape, dtype)
    if not math.prod(qt.shape):
        return y
    has_global = qt.global_scale is not None
    g = qt.global_scale if has_global else 0
    padded_rows, padded_cols = scale_layouts.padded_shape(qt.scale_layout, qt.rows, qt.cols)
    batch = math.prod(qt.shape[:-2])
    arguments = (qt.codes, qt.scales, g, y, *qt.shape[-2:], padded_rows, padded_cols)
    if qt.axis == "tokens":
        kernel = kernels.tokens_kernel(dtype, qt.format, qt.scale_layout, has_global)
        _launch_by_tokens(kernel, batch, qt.rows, qt.cols, qt.format, arguments)
    elif qt.scale_layout == "linear" and qt.blocked_length % qt.block_size == 0:
        kernel = kernels.flat_kernel(dtype, qt.format, has_global)
        units = math.prod(qt.shape) // (4 if dtype == "float32" else 8)
        grid = _ctas(units, kernels.THREADS * kernels.UNITS)
        gpu_arrays.launch(kernel, grid, (kernels.THREADS,), (*arguments[:4], units))
    else:
        kernel = kernels.rows_kernel(dtype, qt.format, qt.scale_layout, has_global)
        _launch_by_rows(kernel, batch, qt.rows, qt.cols, arguments)
    return y


def relayout(qt: QuantizedTensor, scale_layout: str) -> QuantizedTensor:
    """As :func:`nbfmha.relayout`, for arrays in GPU memory."""
    from nbfmha.kernels import relayout as kernels

    check_arrays(qt)
    _, scales_shape = storage_shapes(qt.shape, format=qt.format, axis=qt.axis, scale_layout=scale_layout)
    moved = replace(qt, scales=gpu_arrays.empty(qt.codes, scales_shape, "uint8"), scale_layout=scale_layout)
    count = math.prod(scales_shape)
    if count:
        source = scale_layouts.padded_shape(qt.scale_layout, qt.rows, qt.cols)
        destination = scale_layouts.padded_shape(scale_layout, qt.rows, qt.cols)
        arguments = (qt.scales, moved.scales, count, qt.rows, qt.cols, *source, *destination)
        kernel = kernels.relayout_kernel(qt.scale_layout, scale_layout)
        gpu_arrays.launch(kernel, _ctas(count, kernels.THREADS), (kernels.THREADS,), arguments)
    return moved


def _ctas(count: int, threads: int) -> tuple[int]:
    ctas = -(-count // threads)
    if ctas > _MAX_CTAS:
        raise ValueError(message("x", f"small enough for {_MAX_CTAS} CTAs", ctas, "split the batch"))
    return (ctas,)


def _launch_by_rows(kernel: Kernel, batch: int, rows: int, cols: int, arguments: tuple) -> None:
    """Launch a ``rows`` kernel: a CTA is as many whole rows of scales as fit 256 threads."""
    from nbfmha.kernels.quantize import THREADS

    width = min(cols, THREADS)
    height = THREADS // width
    _launch_matrices(kernel, batch, (-(-rows // height), -(-cols // width)), (width, height), arguments)


def _launch_by_tokens(kernel: Kernel, batch: int, rows: int, cols: int, format: str, arguments: tuple) -> None:
    """Launch a ``tokens`` kernel: a CTA is ``CHANNELS`` x ``TOKENS``."""
    from nbfmha.kernels.quantize import BLOCK_SIZE, CHANNELS, THREADS_TOKENS, TOKENS

    tiles = -(-cols * BLOCK_SIZE[format] // TOKENS), -(-rows // CHANNELS)
    _launch_matrices(kernel, batch, tiles, (THREADS_TOKENS[format],), arguments)


def _launch_matrices(kernel: Kernel, batch: int, tiles: tuple[int, int], block: tuple[int, ...], arguments: tuple) -> None:
    """One launch for every 65,535 matrices, which is as many as a grid's z can count."""
    if tiles[0] > _MAX_CTAS or tiles[1] > _MAX_CTAS_Y:
        raise ValueError(message("x", f"small enough for a grid of {_MAX_CTAS} x {_MAX_CTAS_Y} CTAs", tiles))
    for first in range(0, batch, _MAX_CTAS_Y):
        gpu_arrays.launch(kernel, (*tiles, min(_MAX_CTAS_Y, batch - first)), block, (*arguments, first))


def _global_scale(x: Any, dtype: str, global_scale: Any) -> Any:
    if global_scale is None:
        return None
    scalar = gpu_arrays.empty(x, (1,), "float32")
    if not isinstance(global_scale, str):
        if gpu_arrays.runs_kernels(global_scale):
            raise TypeError(message("global_scale", "a number, 'amax' or None", "a GPU array", "its value with .item()"))
        return gpu_arrays.fill(scalar, float(check_global_scale(global_scale)))
    from nbfmha.kernels import amax as kernels

    bits = gpu_arrays.fill(gpu_arrays.empty(x, (1,), "int32"), 0)
    count = math.prod(x.shape)
    if count:
        grid = _ctas(count, kernels.THREADS * kernels.ELEMENTS)
        gpu_arrays.launch(kernels.amax_kernel(dtype), grid, (kernels.THREADS,), (x, bits, count))
    gpu_arrays.launch(kernels.global_scale_kernel(), (1,), (1,), (bits, scalar))
    return scalar


def check_arrays(qt: QuantizedTensor, name: str = "qt") -> None:
    """Raise ``ValueError`` where kernels cannot read the arrays of ``qt``, called ``name``, as they lie."""
    gpu_arrays.check_contiguous(f"{name}.codes", qt.codes)
    gpu_arrays.check_contiguous(f"{name}.scales", qt.scales)
    if not gpu_arrays.is_aligned(qt.codes, 8):
        raise ValueError(message(f"{name}.codes", "at an address that is a multiple of 8", "another", "copy it"))
