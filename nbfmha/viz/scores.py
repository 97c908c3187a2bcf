"""Drawings of score matrices and of their errors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from nbfmha.testing import compare
from nbfmha.viz import style


def draw_scores(got: np.ndarray, expected: np.ndarray, budget: np.ndarray | float | None = None, *, title: str) -> Figure:
    """Scores (M, N), the scores expected, and the error: in the scores' units, or as a share of its budget.

    got, expected: (M, N); budget: (M, N) or a number, the largest error allowed; None draws the error as it is. Colours
    saturate beyond the 99th percentile of the magnitudes.
    """
    expected = np.asarray(expected, np.float64)
    error = np.asarray(got, np.float64) - expected
    worst = float(np.abs(error).max())
    comparison = compare(got, expected, np.inf if budget is None else budget)
    verdict = "exact" if comparison.exact else f"largest |error| {worst:.3g}"
    if budget is not None and not comparison.exact:
        verdict += f", {comparison.max_budget_share:.0%} of its budget at worst"
    shown = error if budget is None else error / np.maximum(budget, np.finfo(float).tiny)
    limit = float(np.quantile(np.abs(expected), 0.99)) or 1.0
    error_limit = 1.0 if budget is not None else worst or 1.0
    figure = style.new_figure(14, 4.4, f"{title}: {verdict}")
    error_title = "error" if budget is None else "error as a share of its budget"
    panels = (("scores", got, limit), ("float64", expected, limit), (error_title, shown, error_limit))
    style.matrix_panels(figure, panels, row_name="query", col_name="key")
    if comparison.exact:
        rows, cols = expected.shape
        style.label_cell(figure.axes[2], (rows - 1) / 2, (cols - 1) / 2, "no error anywhere", size=11, colour=style.FAINT)
    return figure


def draw_tiles(tiles: Mapping[str, np.ndarray], *, title: str, limit: float | None = None) -> Figure:
    """Small non-negative matrices side by side with the number in every cell, on one colour scale from 0 to ``limit``.

    tiles: title -> (M, N); limit: the largest number of the tiles when None.
    """
    rows, cols = next(iter(tiles.values())).shape
    high = limit or max(float(tile.max()) for tile in tiles.values()) or 1.0
    figure = style.new_figure(0.62 * cols * len(tiles) + 1, 0.28 * rows + 1.4, title)
    for axes, (name, tile) in zip(figure.subplots(1, len(tiles), squeeze=False)[0], tiles.items(), strict=True):
        axes.imshow(tile, cmap=style.SEQUENTIAL, vmin=0, vmax=high, aspect="auto", interpolation="nearest")
        style.cell_grid(axes, rows, cols)
        for row, col in np.ndindex(rows, cols):
            colour = "white" if tile[row, col] > 0.55 * high else style.INK
            style.label_cell(axes, row, col, f"{tile[row, col]:g}", colour=colour)
        axes.set_xticks(range(cols))
        axes.set_yticks(range(rows))
        axes.set_xlabel("key (column n)")
        axes.set_ylabel("query (row m)")
        style.title(axes, name)
    return figure
