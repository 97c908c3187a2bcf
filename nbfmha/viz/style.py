"""Colours and helpers that all drawings share."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure

INK = "#1f2328"
FAINT = "#8c959f"
BLUE, ORANGE, GREEN, RED = "#33658a", "#d9731a", "#4f8a4c", "#b3332e"
EMPTY = "#eceff1"

SEQUENTIAL = LinearSegmentedColormap.from_list("nbfmha", ["#f4f7fa", "#9fc1d8", "#33658a", "#132f45"])
DIVERGING = "RdBu_r"


def lane_colour(lane: int) -> tuple[float, float, float]:
    """Hue by group_id = lane >> 2, lightness by thread_in_group = lane & 3."""
    return colorsys.hls_to_rgb((lane >> 2) / 8, 0.66 + 0.065 * (lane & 3), 0.65)


#: Index 0: held by no lane; index 1 + lane.
LANES = ListedColormap([EMPTY, *(lane_colour(lane) for lane in range(32))])


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """A figure with constrained layout, independent of pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def title(axes: Axes, text: str) -> None:
    """The title of one plot, at its left edge."""
    axes.set_title(text, loc="left", fontsize=10, color=INK)


def note(figure: Figure, text: str) -> None:
    """A line under the figure that says how to read it."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color=FAINT)


def matrix_panels(figure: Figure, panels: Sequence[tuple[str, np.ndarray, float]], *, row_name: str, col_name: str) -> None:
    """Matrices side by side with one colour bar each, around zero. panels: (title, matrix, bound of the colours)."""
    for axes, (text, matrix, bound) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        image = axes.imshow(matrix, cmap=DIVERGING, vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, pad=0.02)
        axes.set_xlabel(col_name)
        axes.tick_params(labelsize=8, length=2)
        title(axes, text)
    figure.axes[0].set_ylabel(row_name)


def label_cell(axes: Axes, row: float, col: float, text: str, *, size: float = 8, colour: str = INK) -> None:
    """Text centred in a cell of an image; kept out of the layout, which would measure every one of them."""
    label = axes.text(col, row, text, ha="center", va="center", size=size, color=colour, zorder=4)
    label.set_in_layout(False)


def cell_grid(axes: Axes, rows: int, cols: int, *, alpha: float = 1.0) -> None:
    """Thin white lines between the cells of an image."""
    axes.set_xticks([x - 0.5 for x in range(1, cols)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6, alpha=alpha, zorder=2)
    axes.tick_params(which="both", length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)


def plain(axes: Axes) -> None:
    """Leave the left and bottom spines only."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def save(figure: Figure, path: Path | str, *, dpi: int = 130) -> Path:
    """Write the figure; the suffix of ``path`` chooses the format. ValueError for one that matplotlib cannot write."""
    path = Path(path)
    figure.savefig(path, dpi=dpi, facecolor="white")
    return path
