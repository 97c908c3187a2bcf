"""Drawings of score matrices and of their errors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from nbfmha.testing import compare
from nbfmha.viz import style


def draw_scores(got: np.ndarray, expected: np.ndarray, budget: np.ndarray | float = 0.0, *, title: str) -> Figure:
    """Scores (M, N), and their error against `expected`: as it is, and as a share of the budget.

    A budget of 0 asks for exact scores; the third panel then marks the elements that are not.
    """
    comparison = compare(got, expected, budget)
    error = np.asarray(got, np.float64) - expected
    if np.all(np.asarray(budget) == 0):
        share, share_title, share_limit = (error != 0).astype(float), "wrong elements", 1.0
    else:
        share, share_title, share_limit = (
            np.abs(error) / np.maximum(budget, np.finfo(float).tiny),
            "share of the error budget",
            1.0,
        )
    verdict = "exact" if comparison.exact else f"max |error| {comparison.max_abs_error:.3g}"
    figure = style.new_figure(14, 4.4, f"{title}: {verdict}")
    panels = figure.subplots(1, 3)
    limit = float(np.abs(expected).max()) or 1.0
    error_limit = comparison.max_abs_error if 0 < comparison.max_abs_error < np.inf else 1.0
    for axes, matrix, cmap, low, high, what in (
        (panels[0], got, style.DIVERGING, -limit, limit, "scores"),
        (panels[1], error, style.DIVERGING, -error_limit, error_limit, "error"),
        (panels[2], share, style.SEQUENTIAL, 0.0, share_limit, share_title),
    ):
        image = axes.imshow(matrix, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, pad=0.02)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        axes.tick_params(labelsize=8, length=2)
        style.title(axes, what)
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
