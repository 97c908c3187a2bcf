"""Drawings of a warp in the emulator: the operands of the MMA it stands at, an accumulator as it grows, a run's profile.

They take a ``ptx_inline.emu.Stop`` or ``Profile`` and read it through its public methods; nothing is run here.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nbfmha.ownership import axis_names
from nbfmha.viz import style

_SCALES = {"A": "SFA", "B": "SFB"}


def draw_mma(stop, *, lane: int | None = None) -> Figure:
    """The MMA that a warp is about to execute: A, B and their scales, the accumulator before, and what it is after.

    Values are those in the registers, put in their places by the fragment maps; "after" is computed in float64 from
    them. lane: frame the elements that this lane holds. Raises ``ValueError`` where the stop is at no MMA and for a lane
    outside 0..31.
    """
    if lane is not None and lane not in range(32):
        raise ValueError(f"lane must be in 0..31, got {lane}")
    operands = {name: stop.matrix(name) for name in ("A", "B", "C")}
    if stop.instruction.sf_vec_size:
        operands |= {name: stop.matrix(name) for name in _SCALES.values()}
    after = operands["C"] + _dequantised(operands, "A") @ _dequantised(operands, "B").T
    title = f"MMA {stop.mma} of warp {stop.warp}, CTA {stop.cta}, PTX line {stop.line}: {stop.instruction.key}"
    figure = style.new_figure(19 if stop.instruction.shape[2] > 16 else 13, 7.2, title)
    left, right = figure.subfigures(1, 2, width_ratios=[3.4, 1])
    _draw_factors(left, stop, operands, lane)
    limit = float(max(np.abs(operands["C"]).max(), np.abs(after).max())) or 1.0
    top, bottom = right.subplots(2, 1)
    for axes, text, values in ((top, "accumulator C, before", operands["C"]), (bottom, "D, after (float64)", after)):
        _draw_values(axes, values, limit, style.DIVERGING, size=6.5)
        style.title(axes, text)
        axes.set_xlabel("column n")
        axes.set_ylabel("row m")
        if lane is not None:
            _frame(axes, stop.fragment("C"), lane)
    reading = "k runs to the right in A and in B, which is drawn as stored, a row for each column n. "
    framed = "" if lane is None else f"Green frames: what lane {lane} holds. "
    style.note(figure, reading + framed + "Scales and values as the MMA reads them, by the selectors of this instruction.")
    return figure


def draw_accumulation(stops: Iterable, final: np.ndarray, expected: np.ndarray) -> Figure:
    """An accumulator on its way: C before each of the MMAs in ``stops``, then ``final``; below, what is still missing.

    stops: ``ptx_inline.emu.stops`` at MMAs that add to one accumulator, driven here to its end. final, expected: its tile
    of the kernel's output and of the true scores, (M, N).
    """
    expected = np.asarray(expected, np.float64)
    steps = [(f"before MMA {stop.mma}", stop.matrix("C")) for stop in stops]
    steps.append(("at the end", np.asarray(final, np.float64)))
    largest = float(np.abs(expected).max()) or 1.0
    error = float(np.abs(steps[-1][1] - expected).max())
    outcome = "exactly what float64 gives" if error == 0 else f"largest |error| at the end {error:.3g}"
    figure = style.new_figure(3.1 * len(steps), 7.6, f"an accumulator growing, {len(steps) - 1} MMAs: {outcome}")
    panels = figure.subplots(2, len(steps), squeeze=False)
    for (above, below), (name, values) in zip(panels.T, steps, strict=True):
        missing = expected - values
        for axes, shown, text in (
            (above, values, name),
            (below, missing, f"missing: at most {np.abs(missing).max():.3g}"),
        ):
            _draw_values(axes, shown, largest, style.DIVERGING, size=6.5 if axes is above else None)
            style.title(axes, text)
            axes.set_xlabel("column n")
    for axes in panels[:, 0]:
        axes.set_ylabel("row m")
    return figure


def draw_profile(profile, *, most: int = 16) -> Figure:
    """What a run executed: warp instructions by class; and for shared and for global memory the instructions that cost
    most beyond the fewest transactions that their bytes allow: bank conflicts, or half-used sectors.

    most: how many memory instructions of each kind to show, in the order of the PTX.
    """
    classes, accesses = profile.by_class(), profile.accesses()
    shared = [access for access in accesses if access.space == "shared"]
    others = [access for access in accesses if access.space != "shared"]
    rows = max(len(classes), min(max(len(shared), len(others)), most))
    title = f"{profile.warp_instructions:,} warp instructions, {profile.lane_instructions:,} counted a lane"
    figure = style.new_figure(17, max(3.0, 0.25 * rows + 1.5), title)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.3, 1.3])
    _draw_bars(left, [one.name for one in classes], [one.warp_instructions for one in classes], style.BLUE)
    left.bar_label(left.containers[0], [f" {one.warp_instructions:,}" for one in classes], fontsize=8, color=style.FAINT)
    left.margins(x=0.18)
    style.title(left, "warp instructions by class")
    _draw_accesses(middle, shared, most, "shared memory: passes over the banks")
    _draw_accesses(right, others, most, "global memory: 32-byte sectors")
    style.note(
        figure,
        "Line and text of the PTX. Green: the fewest transactions that the bytes allow; red: bank conflicts, or sectors "
        "used in part. Number: transactions over the fewest, and how often a warp executed the line.",
    )
    return figure


def _draw_accesses(axes: Axes, accesses: list, most: int, text: str) -> None:
    """Bars of the ``most`` accesses with the largest excess: fewest transactions, and the excess."""
    total = len(accesses)
    accesses = sorted(accesses, key=lambda access: (access.ideal - access.transactions, -access.transactions))[:most]
    accesses.sort(key=lambda access: access.line)
    ideal = [access.ideal for access in accesses]
    _draw_bars(axes, [f"{access.line}  {_shortened(access.text)}" for access in accesses], ideal, style.GREEN)
    excess = [access.transactions - access.ideal for access in accesses]
    bars = axes.barh(range(len(accesses)), excess, left=ideal, color=style.RED, height=0.7)
    labels = [f" {access.excess:.3g}x, {access.requests}" for access in accesses]
    axes.bar_label(bars, labels, fontsize=7, color=style.FAINT)
    axes.margins(x=0.2)
    style.title(axes, f"{text} ({len(accesses)} of {total} lines)" if len(accesses) < total else text)


def _dequantised(operands: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A or B times its scales, where it has any."""
    values = operands[name]
    scales = operands.get(_SCALES[name])
    return values if scales is None else values * np.repeat(scales, values.shape[1] // scales.shape[1], axis=1)


def _draw_factors(figure, stop, operands: dict[str, np.ndarray], lane: int | None) -> None:
    """A above B, each with its scales beside it."""
    scaled = "SFA" in operands
    (m, n, k), widths = stop.instruction.shape, [12, 2] if scaled else [12]
    panels = figure.subplots(2, len(widths), squeeze=False, width_ratios=widths, height_ratios=[m + 4, n + 4])
    limit = float(max(np.abs(operands[name]).max() for name in ("A", "B"))) or 1.0
    for row, (name, scales) in zip(panels, _SCALES.items(), strict=True):
        fragment = stop.fragment(name)
        _draw_values(row[0], operands[name], limit, style.DIVERGING, size=5.5 if k > 16 else 7)
        row[0].set_xticks(range(0, k, 8 if k > 16 else 1))
        style.title(row[0], f"{name}: {fragment.shape[0]} x {fragment.shape[1]}")
        shown = [(row[0], name, fragment)]
        if scaled:
            high = float(operands[scales].max()) or 1.0
            _draw_values(row[1], operands[scales], high, style.SEQUENTIAL, size=6.5)
            style.title(row[1], f"{scales}, one for {stop.instruction.sf_vec_size}")
            shown.append((row[1], scales, stop.fragment(scales)))
        for axes, operand, held in shown:
            row_name, col_name = axis_names(operand)
            axes.set_xlabel(col_name)
            axes.set_ylabel(row_name)
            if lane is not None:
                _frame(axes, held, lane)


def _draw_values(axes: Axes, values: np.ndarray, limit: float, colours, *, size: float | None) -> None:
    """A matrix as a heatmap, with its numbers in letters of ``size`` unless None; sequential colours begin at zero."""
    rows, cols = values.shape
    low = -limit if colours == style.DIVERGING else 0.0
    axes.imshow(values, cmap=colours, vmin=low, vmax=limit, aspect="auto", interpolation="nearest")
    style.cell_grid(axes, rows, cols)
    axes.set_yticks(range(rows))
    axes.set_xticks(range(cols))
    for row, col in np.ndindex(rows, cols) if size is not None else ():
        dark = abs(values[row, col]) > 0.62 * limit
        style.label_cell(axes, row, col, f"{values[row, col]:.3g}", size=size, colour="white" if dark else style.INK)


def _frame(axes: Axes, fragment, lane: int) -> None:
    """Green frames around the runs of neighbours that a lane holds."""
    held = fragment.row[lane] >= 0
    places = sorted(zip(fragment.row[lane][held].tolist(), fragment.col[lane][held].tolist(), strict=True))
    start = 0
    for end in range(1, len(places) + 1):
        row, col = places[end - 1]
        if end < len(places) and places[end] == (row, col + 1):
            continue
        first = places[start][1]
        frame = Rectangle((first - 0.5, row - 0.5), col - first + 1, 1, fill=False, ec=style.GREEN, lw=2.6, zorder=5)
        frame.set_clip_on(False)
        frame.set_in_layout(False)
        axes.add_patch(frame)
        start = end


def _draw_bars(axes: Axes, names: list[str], values: list[int], colour: str) -> None:
    """Horizontal bars, the first on top."""
    axes.barh(range(len(names)), values, color=colour, height=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    style.plain(axes)


def _shortened(text: str, length: int = 44) -> str:
    text = " ".join(text.split()).rstrip(";")
    return text if len(text) <= length else text[: length - 1] + "…"
