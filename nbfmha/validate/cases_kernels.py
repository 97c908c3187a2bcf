"""The kernels around the multiplication, run by the implementation under test: the same bits as NumPy's ``nbfmha.nvfp4``.

Each kernel (flat, rows, tokens) meets each input type, format, scale rule, scale layout, and a global scale; every
combination of them is run by ``pytest -m gpu``.
"""

from __future__ import annotations

import itertools

import numpy as np

from nbfmha.testing import compare
from nbfmha.validate.case import Context, Registry, Result

registry = Registry()

#: Shape, element type and options: three tensors for each of the kernels flat, rows, tokens.
RECIPES = (
    ((2, 65, 64), "float16", {}),
    ((3, 40, 32), "bfloat16", {"scale": "four_over_six", "global_scale": "amax"}),
    ((64, 64), "float32", {"format": "mxfp4"}),
    ((2, 70, 96), "float16", {"scale_layout": "blocked_128x4", "global_scale": 0.37}),
    ((130, 18), "bfloat16", {"scale": "four_over_six", "scale_layout": "interleaved_64"}),
    ((33, 50), "float32", {"format": "mxfp4", "scale_layout": "blocked_128x4"}),
    ((2, 70, 66), "float16", {"axis": "tokens"}),
    ((100, 64), "bfloat16", {"axis": "tokens", "scale": "four_over_six", "scale_layout": "blocked_128x4",
                             "global_scale": 0.37}),
    ((40, 34), "float32", {"axis": "tokens", "format": "mxfp4", "scale_layout": "interleaved_64"}),
)  # fmt: skip
_SKIPPED = "needs a GPU or the emulator: NumPy would be compared with itself"


def _recipes(context: Context):
    """``RECIPES`` with their values; bfloat16 becomes float16 where the implementation's arrays have no bfloat16."""
    for number, (shape, dtype, options) in enumerate(RECIPES):
        values = _values(context.rng(f"kernels {number}"), shape)
        yield values, dtype if dtype in context.implementation.dtypes else "float16", options


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """float32 in blocks of many magnitudes (subnormal and saturated scales among them), some zeros of either sign and
    exact ties, a NaN and an infinity."""
    count = int(np.prod(shape))
    x = rng.standard_normal(count).astype(np.float32)
    x *= np.exp2(np.repeat(rng.integers(-20, 13, -(-count // 48)), 48)[:count]).astype(np.float32)
    x = np.where(rng.random(count) < 0.2, rng.integers(-12, 13, count).astype(np.float32) / 4, x)
    x[rng.random(count) < 0.02] = 0
    x[rng.random(count) < 0.02] = -0.0
    x[rng.choice(count, 2, replace=False)] = np.nan, -np.inf
    return x.reshape(shape)


def _narrow(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 values cut to a dtype, as NumPy's quantiser takes them and as they lie in memory."""
    if dtype == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32), bits
    with np.errstate(over="ignore"):
        values = values.astype(dtype)
    return values, values


def _bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bit patterns, every NaN as the same one."""
    if dtype == "bfloat16":
        return np.where(values & 0x7FFF > 0x7F80, 0x7FFF, values)
    bits = values.view(f"u{values.itemsize}")
    return np.where(np.isnan(values), np.iinfo(bits.dtype).max, bits)


def _compare(got: list[np.ndarray], expected: list[np.ndarray], what: str) -> Result:
    got, expected = (np.concatenate([array.ravel() for array in arrays]) for arrays in (got, expected))
    return Result.of(compare(got, expected), what)


@registry.case("quantiser", "quantise kernels give NumPy's bits", evidence="implementation")
def quantise_kernels(context: Context) -> Result:
    import nbfmha
    from nbfmha import nvfp4

    if not context.implementation.runs_kernels:
        return Result.skipped(_SKIPPED)
    got, expected = [], []
    for values, dtype, options in _recipes(context):
        numpy_values, memory = _narrow(values, dtype)
        here = nvfp4.quantize(numpy_values, **options)
        there = nbfmha.quantize(context.implementation.to_device(memory, dtype), **options)
        got += [there.codes.copy_to_host(), there.scales.copy_to_host()]
        expected += [here.codes, here.scales]
        if here.global_scale is not None:
            got.append(there.global_scale.copy_to_host().view(np.uint32))
            expected.append(np.atleast_1d(here.global_scale).view(np.uint32))
    return _compare(got, expected, f"bytes of codes and scales, {len(RECIPES)} kernels")


@registry.case("quantiser", "dequantise kernels give NumPy's bits", evidence="implementation")
def dequantise_kernels(context: Context) -> Result:
    import nbfmha
    from nbfmha import nvfp4

    if not context.implementation.runs_kernels:
        return Result.skipped(_SKIPPED)
    got, expected = [], []
    for values, dtype, options in _recipes(context):
        qt = nvfp4.quantize(_narrow(values, dtype)[0], **options)
        there = qt.with_arrays(lambda array: context.implementation.to_device(np.atleast_1d(array)))
        got.append(_bits(nbfmha.dequantize(there, dtype).copy_to_host(), dtype))
        expected.append(_bits(nvfp4.dequantize(qt, dtype), dtype))
    return _compare(got, expected, f"bit patterns, {len(RECIPES)} kernels")


@registry.case("quantiser", "relayout kernels give NumPy's bytes, padding zero", evidence="implementation")
def relayout_kernels(context: Context) -> Result:
    import nbfmha
    from nbfmha import nvfp4, scale_layouts

    if not context.implementation.runs_kernels:
        return Result.skipped(_SKIPPED)
    values = context.rng("relayout_kernels").standard_normal((2, 130, 80)).astype(np.float32)
    got, expected = [], []
    for source, destination in itertools.product(scale_layouts.SCALE_LAYOUTS, repeat=2):
        qt = nvfp4.quantize(values, scale_layout=source)
        moved = nbfmha.relayout(qt.with_arrays(context.implementation.to_device), destination)
        got.append(moved.scales.copy_to_host())
        expected.append(nvfp4.relayout(qt, destination).scales)
    return _compare(got, expected, f"scale bytes, {len(got)} kernels")
