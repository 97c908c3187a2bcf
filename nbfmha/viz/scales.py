"""Drawings of where block scales lie in memory."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from nbfmha import scale_layouts
from nbfmha.viz import style

_LINE = 16  # bytes in a drawn line of memory: one row of a 128x4 block's 32 x 16 bytes


def draw_scale_layout(layout: str, rows: int = 128, cols: int = 6, *, lines: int = 32) -> Figure:
    """Where the scale of (row, scale column) lies: left the matrix, coloured by byte offset; right the memory.

    The right picture shows the first ``lines`` lines of 16 bytes, each byte labelled with its row and scale column and
    coloured by row; grey bytes are padding, which must be zero. layout: an entry of ``scale_layouts.SCALE_LAYOUTS``.
    """
    padded_rows, padded_cols = scale_layouts.padded_shape(layout, rows, cols)
    row, col = np.meshgrid(np.arange(padded_rows), np.arange(padded_cols), indexing="ij")
    offset = scale_layouts.offset(layout, row, col, rows, cols)
    size = scale_layouts.size(layout, rows, cols)
    inside = (row < rows) & (col < cols)

    figure = style.new_figure(15, 8.2, f"scale layout '{layout}': {rows} x {cols} scales in {size} bytes")
    matrix, memory = figure.subplots(1, 2, width_ratios=[3, 11])
    image = matrix.imshow(
        np.ma.masked_where(~inside, offset),
        cmap="viridis",
        vmin=0,
        vmax=size - 1,
        aspect="auto",
        interpolation="nearest",
    )
    matrix.set_facecolor(style.EMPTY)
    matrix.set_xticks(range(padded_cols))
    matrix.set_xlabel("scale column (block of 16)")
    matrix.set_ylabel("row (token)")
    matrix.tick_params(labelsize=8, length=2)
    figure.colorbar(image, ax=matrix, location="left", label="byte offset", pad=0.02)
    style.title(matrix, "matrix, coloured by offset")

    shown = min(lines, -(-size // _LINE))
    rows_at = np.full(shown * _LINE, -1)
    labels = np.full(shown * _LINE, "", dtype=object)
    visible = offset < shown * _LINE
    rows_at[offset[visible & inside]] = row[visible & inside]
    for place, r, c in zip(offset[visible & inside], row[visible & inside], col[visible & inside], strict=True):
        labels[place] = f"{r},{c}"
    grid = np.ma.masked_less(rows_at.reshape(shown, _LINE), 0)
    memory.imshow(grid, cmap="viridis", vmin=0, vmax=rows - 1, alpha=0.55, aspect="auto", interpolation="nearest")
    memory.set_facecolor(style.EMPTY)
    style.cell_grid(memory, shown, _LINE)
    for line, byte in np.ndindex(shown, _LINE):
        text = labels[line * _LINE + byte]
        style.label_cell(memory, line, byte, text or "pad", size=7, colour=style.INK if text else style.FAINT)
    memory.set_xticks(range(_LINE))
    memory.set_yticks(range(0, shown, 4), [str(16 * line) for line in range(0, shown, 4)])
    memory.set_xlabel("byte in the line")
    memory.set_ylabel("offset of the line")
    style.title(memory, f"memory, first {shown * _LINE} of {size} bytes: row,column of each scale (coloured by row)")
    return figure
