"""Drawings of number formats and of what quantisation does to data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from nbfmha import nvfp4
from nbfmha.testing import relative_rmse
from nbfmha.viz import style
from ptx_inline.isa.formats import E2M1, FORMATS, UE4M3


def _magnitudes(name: str) -> np.ndarray:
    """Every non-negative finite number of a format, ascending."""
    values = FORMATS[name].decode(np.arange(2 ** FORMATS[name].bits, dtype=np.uint8))
    return np.unique(np.abs(values[np.isfinite(values)]))


def draw_number_lines(names: Sequence[str] = ("e2m1", "e2m3", "e3m2", "ue4m3", "e5m2")) -> Figure:
    """The non-negative numbers of each format on one logarithmic axis, zero at the left; subnormals in orange."""
    figure = style.new_figure(13, 0.62 * len(names) + 1.3, "every non-negative number of the small formats")
    axes = figure.subplots()
    for height, name in enumerate(reversed(names)):
        form = FORMATS[name]
        values = _magnitudes(name)
        smallest_normal = 2.0 ** (1 - form.bias)
        for part, colour in (
            (values[(values > 0) & (values < smallest_normal)], style.ORANGE),
            (values[values >= smallest_normal], style.BLUE),
        ):
            axes.vlines(part, height - 0.3, height + 0.3, color=colour, lw=1.1)
        axes.text(values.max() * 1.15, height, f"max {values.max():g}", va="center", fontsize=8, color=style.FAINT)
    axes.set_yticks(range(len(names)), [f"{name}  ({_magnitudes(name).size} values)" for name in reversed(names)])
    axes.set_xscale("log", base=2)
    axes.set_xlabel("magnitude (orange: subnormal)")
    style.plain(axes)
    return figure


def draw_rounding(name: str = "e2m1", limit: float = 8.0) -> Figure:
    """The rounding staircase of a format: nearest even, saturating. Circles are ties, on the side they go to."""
    form = FORMATS[name]
    values = _magnitudes(name)
    values = values[values <= limit]
    inputs = np.linspace(0, limit, 4001)
    ties = (values[1:] + values[:-1]) / 2
    figure = style.new_figure(9, 4.4, f"rounding to {name}: nearest, ties to the even code, saturating")
    axes = figure.subplots()
    axes.plot(inputs, inputs, color=style.FAINT, lw=0.8, ls="--", label="exact")
    axes.plot(inputs, form.decode(form.encode(inputs)), color=style.BLUE, lw=1.6, label="rounded")
    axes.plot(ties, form.decode(form.encode(ties)), "o", color=style.ORANGE, ms=6, label="tie")
    for value in values:
        axes.axhline(value, color=style.EMPTY, lw=0.8, zorder=0)
    axes.set_xlabel("input")
    axes.set_ylabel("value of the code")
    axes.set_yticks(values, [f"{value:g}  code {code}" for value, code in zip(values, form.encode(values), strict=True)])
    axes.legend(frameon=False, fontsize=9)
    style.plain(axes)
    return figure


def draw_block(values: np.ndarray, *, format: str = "nvfp4") -> Figure:
    """One block: its values, the 15 levels that its scale offers, and the level that each value gets.

    values: (16,) for "nvfp4", (32,) for "mxfp4", float16 or float32.
    """
    quantized = nvfp4.quantize(values[None, :], format=format)
    back = nvfp4.dequantize(quantized)[0]
    scale = float(quantized.scale_format.decode(quantized.scales)[0, 0])
    levels = np.unique(E2M1.decode(np.arange(16, dtype=np.uint8))) * scale
    byte = int(quantized.scales[0, 0])
    error = relative_rmse(back, values)
    title = f"one {format} block: scale byte 0x{byte:02x} = {scale:g}, relative RMSE {error:.3f}"
    figure = style.new_figure(11, 4.4, title)
    axes = figure.subplots()
    place = np.arange(len(values))
    axes.hlines(levels, -0.6, len(values) - 0.4, color=style.FAINT, lw=0.5)
    axes.vlines(place, values, back, color=style.RED, lw=1.4, label="rounding error")
    axes.plot(place, values, "o", color=style.BLUE, ms=6, label="value")
    axes.plot(place, back, "_", color=style.ORANGE, ms=18, mew=3, label="dequantised")
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_xticks(place)
    axes.set_xlabel("element of the block (grey lines: the levels scale x E2M1)")
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.12))
    style.plain(axes)
    return figure


def draw_error_by_magnitude(exponents: Sequence[int] = range(-14, 14), *, seed: int = 0) -> Figure:
    """Relative RMSE of Gaussian data against its standard deviation, for NVFP4 with and without a global scale, and
    MXFP4.

    Left of about 2^-5 the NVFP4 scale becomes an E4M3 subnormal and at last zero, right of 2^9 it saturates: that is
    what the global scale is for.
    """
    data = np.random.default_rng(seed).standard_normal((256, 64)).astype(np.float32)
    recipes = {
        "NVFP4": ({}, style.BLUE),
        "NVFP4, global scale": ({"global_scale": "amax"}, style.GREEN),
        "NVFP4, four over six, global scale": ({"global_scale": "amax", "scale": "four_over_six"}, style.RED),
        "MXFP4": ({"format": "mxfp4"}, style.ORANGE),
    }
    figure = style.new_figure(10, 4.6, "relative RMSE of Gaussian data, by its standard deviation")
    axes = figure.subplots()
    for label, (options, colour) in recipes.items():
        errors = []
        for exponent in exponents:
            scaled = data * np.float32(2.0**exponent)
            errors.append(relative_rmse(nvfp4.dequantize(nvfp4.quantize(scaled, **options)), scaled))
        axes.plot([2.0**exponent for exponent in exponents], errors, color=colour, marker="o", ms=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 0.3)
    axes.set_xlabel("standard deviation of the data")
    axes.set_ylabel("relative RMSE")
    axes.legend(frameon=False, fontsize=9)
    style.plain(axes)
    return figure


def draw_quantized_matrix(values: np.ndarray, *, title: str, **options) -> Figure:
    """A matrix (tokens, head_dim), what comes back from ``nvfp4.quantize(values, **options)``, and the error."""
    back = nvfp4.dequantize(nvfp4.quantize(values, **options)).astype(np.float64)
    exact = values.astype(np.float64)
    limit = float(np.quantile(np.abs(exact), 0.998))
    error_limit = float(np.quantile(np.abs(back - exact), 0.998))
    figure = style.new_figure(14, 4.6, f"{title}: relative RMSE {relative_rmse(back, exact):.4f}")
    panels = (("values", exact, limit), ("dequantised", back, limit), ("error", back - exact, error_limit))
    style.matrix_panels(figure, panels, row_name="token", col_name="head_dim")
    return figure


def draw_scale_use(tensors: Mapping[str, np.ndarray]) -> Figure:
    """Which UE4M3 scales real tensors use: a histogram of their scale bytes by exponent. tensors: name -> array."""
    figure = style.new_figure(11, 3.6, "scales of the blocks, by power of two")
    edges = np.arange(-10, 10)
    for axes, (name, values) in zip(
        figure.subplots(1, len(tensors), sharey=True, squeeze=False)[0], tensors.items(), strict=True
    ):
        scales = UE4M3.decode(nvfp4.quantize(values).scales)
        nonzero = np.log2(scales[scales > 0])
        axes.hist(nonzero, bins=edges, color=style.BLUE, weights=np.full(nonzero.size, 100 / scales.size))
        axes.axvspan(-10, -6, color=style.EMPTY, zorder=0)
        style.title(axes, f"{name}: {np.count_nonzero(scales == 0)} zero scales")
        axes.set_xticks(range(-10, 10, 2))
        axes.set_xlabel("log2 of the scale (grey: subnormal)")
        style.plain(axes)
    figure.axes[0].set_ylabel("% of blocks")
    return figure
