"""Quantise, dequantise and relayout, wherever the tensor lies.

NumPy arrays and CPU tensors go through the reference in :mod:`nbfmha.nvfp4`; torch, CuPy and Numba arrays in GPU memory
through the kernels in :mod:`nbfmha.kernels`, on the library's current stream; arrays of an emulated machine
(:mod:`nbfmha.emulated`) through the PTX of those. All give the same bits.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from nbfmha import gpu_arrays, gpu_quantization, nvfp4, scale_layouts
from nbfmha.quantized_tensor import QuantizedTensor
from nbfmha.validation import check_choice, check_float_dtype, dtype_name, message
from ptx_inline.toolchain.arrays import is_torch


def quantize(
    x: Any,
    *,
    format: str = "nvfp4",
    axis: str = "head_dim",
    scale: str = "amax",
    scale_layout: str = "linear",
    global_scale: Any = None,
) -> QuantizedTensor:
    """Quantise ``x`` of shape (..., tokens, head_dim) and dtype float16, bfloat16 or float32 to 4-bit codes and scales.

    Args:
        x: NumPy array (any strides), torch tensor, or CuPy / Numba array; on a GPU contiguous. Not changed.
        format: ``"nvfp4"`` (16 elements share a UE4M3 scale) or ``"mxfp4"`` (32 share a UE8M0 scale).
        axis: ``"head_dim"`` or ``"tokens"``: along which the elements of a block lie.
        scale: ``"amax"`` (amax / 6) or ``"four_over_six"`` (best of amax / 6, / 5, / 4 by squared error; NVFP4 only).
        scale_layout: ``"linear"``, ``"blocked_128x4"`` or ``"interleaved_64"``; see :mod:`nbfmha.scale_layouts`.
        global_scale: ``None``, ``"amax"`` (largest magnitude / 2688, computed where the tensor lies) or a number in
            [2^-64, 2^64] by which every dequantised value is multiplied; NVFP4 only.

    Returns a :class:`~nbfmha.quantized_tensor.QuantizedTensor` with arrays of the same library on the same device.
    The bit-level contract stands at the top of :mod:`nbfmha.nvfp4`.

    Raises ``TypeError`` for another dtype or kind of array, ``ValueError`` for a rank below 2, a head_dim that is odd or
    0, an unknown name, a combination that MXFP4 lacks, strides on a GPU, or a global scale out of range.
    """
    options = {
        "format": format,
        "axis": axis,
        "scale": scale,
        "scale_layout": scale_layout,
        "global_scale": global_scale,
    }
    if gpu_arrays.runs_kernels(x):
        return gpu_quantization.quantize(x, **options)
    if is_torch(x):
        check_float_dtype("x", x)
        x = x.detach()
        numpy = x.float().numpy() if dtype_name(x) == "bfloat16" else x.numpy()
        return nvfp4.quantize(numpy, **options).with_arrays(sys.modules["torch"].from_numpy)
    return nvfp4.quantize(x, **options)


def dequantize(qt: QuantizedTensor, dtype: str = "float32") -> Any:
    """The values of ``qt``, shape ``qt.shape``, as ``dtype`` ("float32", "float16" or "bfloat16"), rounded once.

    NumPy results of dtype bfloat16 come as bit patterns in uint16; torch results as torch.bfloat16.
    Raises ``TypeError`` for something else than a QuantizedTensor, ``ValueError`` for another dtype.
    """
    _check_quantized(qt)
    check_choice("dtype", dtype, nvfp4.DEQUANTIZED_DTYPES)
    if gpu_arrays.runs_kernels(qt.codes):
        return gpu_quantization.dequantize(qt, dtype)
    if is_torch(qt.codes):
        torch = sys.modules["torch"]
        return torch.from_numpy(nvfp4.dequantize(qt.with_arrays(lambda t: t.numpy()))).to(getattr(torch, dtype))
    return nvfp4.dequantize(qt, dtype)


def relayout(qt: QuantizedTensor, scale_layout: str) -> QuantizedTensor:
    """``qt`` with its scales in another layout; codes are shared with ``qt``, padding is written as zero."""
    _check_quantized(qt)
    check_choice("scale_layout", scale_layout, scale_layouts.SCALE_LAYOUTS)
    if gpu_arrays.runs_kernels(qt.codes):
        return gpu_quantization.relayout(qt, scale_layout)
    if is_torch(qt.codes):
        torch = sys.modules["torch"]
        moved = nvfp4.relayout(qt.with_arrays(lambda t: t.numpy()), scale_layout)
        return replace(qt, scales=torch.from_numpy(moved.scales), scale_layout=scale_layout)
    return nvfp4.relayout(qt, scale_layout)


def _check_quantized(qt: object) -> None:
    if not isinstance(qt, QuantizedTensor):
        raise TypeError(message("qt", "a QuantizedTensor", type(qt).__name__, "make one with nbfmha.quantize"))
