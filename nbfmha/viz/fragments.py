"""Drawings of which thread holds which element of an MMA operand."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nbfmha.ownership import Ownership, axis_names, ownership
from nbfmha.viz import style


def draw_fragment(fragment) -> Figure:
    """Heatmap of an MMA operand: colour and text say which thread holds each element, in which register.

    Neighbours that share thread and register (the eight codes of a register) are framed together and labelled once. On
    the right stands the warp: how many elements each lane holds; grey lanes are not read.
    """
    held = ownership(fragment)
    rows, cols = held.lane.shape
    width = 17.0 if cols > 16 else max(7.0, 1.15 * cols)
    figure = style.new_figure(width + 3.0, max(3.6, 0.36 * rows + 1.8), held.title)
    main, warp = figure.subplots(1, 2, width_ratios=[width, 2.4])
    main.imshow(held.lane + 1, cmap=style.LANES, vmin=0, vmax=32, aspect="auto", interpolation="nearest")
    style.cell_grid(main, rows, cols, alpha=0.45)
    for row in range(rows):
        for start, stop in held.runs(row):
            frame = Rectangle((start - 0.5, row - 0.5), stop - start, 1, fill=False, ec=style.INK, lw=0.8, zorder=3)
            frame.set_clip_on(False)
            frame.set_in_layout(False)
            main.add_patch(frame)
            style.label_cell(main, row, (start + stop - 1) / 2, held.label(row, start, stop))
    main.set_xlabel(held.col_name)
    main.set_ylabel(held.row_name)
    main.set_xticks(range(0, cols, 8 if cols > 16 else 1))
    main.set_yticks(range(rows))
    style.title(main, held.replication())
    _draw_warp(warp, held)
    style.note(
        figure,
        "T: thread, r: register, [a:b]: bits a to b-1 of it; a frame holds neighbours in one register, lowest bits first. "
        "Colour: hue = T >> 2 (group), shade = T & 3.",
    )
    return figure


def _draw_warp(axes: Axes, held: Ownership) -> None:
    """The 32 lanes as 8 groups of 4, with the number of elements that each holds."""
    lanes = np.arange(32).reshape(8, 4)
    shown = np.where(held.elements_of_lane[lanes] > 0, lanes + 1, 0)
    axes.imshow(shown, cmap=style.LANES, vmin=0, vmax=32, aspect="auto", interpolation="nearest")
    style.cell_grid(axes, 8, 4)
    for group, quad in np.ndindex(8, 4):
        count = held.elements_of_lane[lanes[group, quad]]
        style.label_cell(axes, group, quad, str(count) if count else "-")
    axes.set_xticks(range(4))
    axes.set_yticks(range(8))
    axes.set_xlabel("thread in group")
    axes.set_ylabel("group")
    style.title(axes, "elements a lane holds")


def draw_packing(right, wrong) -> Figure:
    """What a wrong register map does to an operand: the row and the k that the hardware finds at each place.

    right, wrong: two ``Fragment``s of one operand. The matrix is packed by ``wrong`` and read by the hardware, that is by
    ``right``. With the right map both pictures of a pair would be plain ramps.
    """
    rows, cols = right.shape
    element = np.arange(rows * cols).reshape(rows, cols)
    arrives = np.full((rows, cols), -1)
    arrives[right.row, right.col] = element[wrong.row, wrong.col]
    row_name, col_name = axis_names(right.operand)
    figure = style.new_figure(13, 0.28 * rows + 3.2, f"{right.operand} packed by a row-major reading of the CuTe layout")
    panels = figure.subplots(2, 2)
    for (axes, values, limit, what), show_label in zip(
        (
            (panels[0, 0], element // cols, rows, f"{row_name} that should be there"),
            (panels[0, 1], arrives // cols, rows, f"{row_name} that is there"),
            (panels[1, 0], element % cols, cols, f"{col_name} that should be there"),
            (panels[1, 1], arrives % cols, cols, f"{col_name} that is there"),
        ),
        (True, False, True, False),
        strict=True,
    ):
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=limit - 1, aspect="auto", interpolation="nearest")
        axes.set_xlabel(f"{col_name} as the MMA reads it")
        if show_label:
            axes.set_ylabel(row_name)
        else:
            figure.colorbar(image, ax=axes, pad=0.01)
        axes.set_xticks(range(0, cols, 8))
        axes.tick_params(labelsize=8, length=2)
        style.title(axes, what)
    return figure
