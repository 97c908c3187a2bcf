"""Drawings of attention: the tiles of a problem, the online softmax, and how far outputs are from what was expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nbfmha.problem import Problem
from nbfmha.recipe import TILE_N, Recipe
from nbfmha.recipe_model import keys_in_16_bits
from nbfmha.testing import relative_rmse
from nbfmha.tiles import TILE_M
from nbfmha.viz import style

#: What becomes of 64 queries times 64 keys.
KINDS = ("skipped", "NVFP4", "NVFP4, masked in part", "16 bits", "16 bits, masked in part")
_KIND_COLOURS = (style.EMPTY, "#9fc1d8", style.BLUE, "#eeb983", style.ORANGE)
_RECIPE_COLOURS = (style.RED, style.ORANGE, style.BLUE, style.GREEN)
_POOLED = 16  # queries that share a point of the error curve


def tile_kinds(problem: Problem, recipe: Recipe) -> np.ndarray:
    """Index into ``KINDS``, uint8 (blocks of 64 queries, tiles of 64 keys), of one sequence.

    Raises ``ValueError`` for packed sequences, whose tiles are those of each one.
    """
    if problem.is_packed:
        raise ValueError("problem must be one sequence, got packed ones; draw one of them")
    mask = problem.mask()
    blocks, tiles = -(-problem.seqlen_q // TILE_M), -(-problem.seqlen_k // TILE_N)
    kinds = np.zeros((blocks, tiles), np.uint8)
    for block, tile in np.ndindex(blocks, tiles):
        rows = slice(block * TILE_M, min((block + 1) * TILE_M, problem.seqlen_q))
        seen = mask[rows, tile * TILE_N : (tile + 1) * TILE_N]
        positions = np.arange(rows.start, rows.stop) + problem.q_offset
        in_16_bits = not recipe.is_quantized or keys_in_16_bits(recipe, positions, problem.seqlen_k)[tile * TILE_N]
        if seen.any():
            kinds[block, tile] = 1 + 2 * in_16_bits + (not seen.all())
    return kinds


def draw_tiles_of(problem: Problem, recipes: Mapping[str, Recipe]) -> Figure:
    """Which tiles each recipe has in 16 bits, in NVFP4, and which nobody computes; one panel a recipe.

    problem: one sequence, not packed (ValueError); recipes: title -> recipe.
    """
    title = f"tiles of {TILE_M} queries and {TILE_N} keys: {problem.seqlen_q} queries, {problem.seqlen_k} keys"
    figure = style.new_figure(0.4 + 4.4 * len(recipes), 5, title)
    colours = ListedColormap(_KIND_COLOURS)
    for axes, (name, recipe) in zip(figure.subplots(1, len(recipes), squeeze=False)[0], recipes.items(), strict=True):
        kinds = tile_kinds(problem, recipe)
        axes.imshow(kinds, cmap=colours, vmin=-0.5, vmax=len(KINDS) - 0.5, aspect="auto", interpolation="nearest")
        style.cell_grid(axes, *kinds.shape)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        computed = kinds > 0
        share = np.count_nonzero((kinds == 1) | (kinds == 2)) / max(1, np.count_nonzero(computed))
        style.title(axes, f"{name}: {share:.0%} of {np.count_nonzero(computed)} tiles in NVFP4")
        axes.set_xlabel("tile of keys")
        axes.set_ylabel("block of queries")
    handles = [Patch(color=colour, label=kind) for colour, kind in zip(_KIND_COLOURS, KINDS, strict=True)]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(KINDS), fontsize=8, frameon=False)
    return figure


class SoftmaxStep(NamedTuple):
    """One row after a tile: its running max and sum, the factor that rescaled what came before, and the output so far."""

    row_max: float
    row_sum: float
    rescale: float
    out: np.ndarray


def online_softmax(scores: np.ndarray, values: np.ndarray, tile: int = TILE_N) -> Iterator[SoftmaxStep]:
    """The online softmax of one row, a step a tile of keys: scores (keys,), values (keys, head_dim), in float64."""
    row_max, row_sum, acc = -np.inf, 0.0, np.zeros(values.shape[-1])
    for start in range(0, len(scores), tile):
        part = scores[start : start + tile]
        new_max = max(row_max, part.max())
        rescale = np.exp(row_max - new_max)
        p = np.exp(part - new_max)
        row_sum = row_sum * rescale + p.sum()
        acc = acc * rescale + p @ values[start : start + tile]
        row_max = new_max
        yield SoftmaxStep(row_max, row_sum, rescale, acc / row_sum)


def draw_online_softmax(scores: np.ndarray, values: np.ndarray, *, title: str, tile: int = TILE_N) -> Figure:
    """One row's scores with the running max, the running sum, and how far the output so far is from the last one.

    scores: (keys,), those that the row sees; values: (keys, head_dim). Computed in float64.
    """
    scores, values = np.asarray(scores, np.float64), np.asarray(values, np.float64)
    steps = list(online_softmax(scores, values, tile))
    edges = np.minimum(np.arange(0, len(steps) + 1) * tile, len(scores))
    number = np.arange(1, len(steps) + 1)
    figure = style.new_figure(14, 6.4, title)
    top, *below = (figure.add_subplot(2, 3, place) for place in ((1, 3), 4, 5, 6))
    top.plot(scores, ".", color=style.BLUE, markersize=3, label="score")
    top.stairs([step.row_max for step in steps], edges, baseline=None, color=style.ORANGE, linewidth=2, label="running max")
    for edge in edges[1:-1]:
        top.axvline(edge - 0.5, color=style.FAINT, linewidth=0.5)
    top.legend(fontsize=8, frameon=False)
    top.set_xlabel(f"key (lines: tiles of {tile})")
    style.title(top, "scores that come, and the max over the tiles so far")
    total = steps[-1].row_max + np.log(steps[-1].row_sum)
    distance = [relative_rmse(step.out, steps[-1].out) for step in steps]
    series = (
        ("factor on what came before: exp(old max - new max)", [step.rescale for step in steps]),
        ("share of the softmax's sum seen so far", [np.exp(s.row_max + np.log(s.row_sum) - total) for s in steps]),
        ("relative distance of the output so far from the last", distance),
    )
    for axes, (name, heights), colour in zip(below, series, (style.ORANGE, style.BLUE, style.GREEN), strict=True):
        axes.bar(number, heights, color=colour)
        axes.set_xlabel("tiles so far")
        axes.set_xticks(number)
        style.title(axes, name)
    for axes in (top, *below):
        style.plain(axes)
    return figure


def draw_relative_l2(errors: Mapping[str, float], *, title: str) -> Figure:
    """Relative L2 errors as bars, the first on top. errors: name -> relative L2."""
    figure = style.new_figure(10, 0.9 + 0.34 * len(errors), title)
    _bars(figure.subplots(), errors, [style.BLUE] * len(errors))
    return figure


def draw_accuracy(outputs: Mapping[str, np.ndarray], expected: np.ndarray, *, title: str) -> Figure:
    """Relative L2 of each output, and by the position of the query.

    outputs: name -> (heads, queries, head_dim); expected: the same shape. A point of the curves is the relative L2 over 16
    neighbouring queries of all heads.
    """
    expected = np.asarray(expected, np.float64)
    colours = [_RECIPE_COLOURS[i % len(_RECIPE_COLOURS)] for i in range(len(outputs))]
    figure = style.new_figure(14, 3.8, title)
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    _bars(left, {name: relative_rmse(out, expected) for name, out in outputs.items()}, colours)
    starts = range(0, expected.shape[1], _POOLED)
    for colour, (name, out) in zip(colours, outputs.items(), strict=True):
        pieces = ((out[:, i : i + _POOLED], expected[:, i : i + _POOLED]) for i in starts)
        right.plot([i + _POOLED / 2 for i in starts], [relative_rmse(*piece) for piece in pieces], color=colour, label=name)
    right.set_yscale("log")
    right.set_xlabel("position of the query")
    right.legend(fontsize=8, frameon=False, ncols=len(outputs))
    right.grid(axis="y", color=style.EMPTY)
    style.title(right, f"relative L2 by query, {_POOLED} neighbours of all heads together")
    style.plain(right)
    return figure


def draw_error_map(outputs: Mapping[str, np.ndarray], expected: np.ndarray, *, title: str) -> Figure:
    """Relative L2 of each row (query position and head) of each output, on one logarithmic scale.

    outputs: name -> (heads, queries, head_dim); expected: the same shape, no row of it zero.
    """
    expected = np.asarray(expected, np.float64)
    size = np.linalg.norm(expected, axis=-1)
    errors = {name: np.linalg.norm(out - expected, axis=-1) / size for name, out in outputs.items()}
    maps = {name: np.log10(np.maximum(error, 1e-6)) for name, error in errors.items()}
    low, high = np.quantile(np.stack(list(maps.values())), (0.02, 0.998))
    figure = style.new_figure(14, 0.6 + 1.5 * len(maps), title)
    panels = figure.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(rows, cmap="magma", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(rows.shape[0]))
        axes.tick_params(labelsize=7, length=2)
        axes.set_ylabel("head")
        style.title(axes, name)
    panels[-1].set_xlabel("position of the query")
    bar = figure.colorbar(image, ax=list(panels), pad=0.01, label="relative L2 of the row")
    ticks = np.arange(np.ceil(low), np.floor(high) + 1)
    bar.set_ticks(ticks, labels=[f"{10.0**tick:g}" for tick in ticks])
    return figure


def _bars(axes, errors: Mapping[str, float], colours) -> None:
    names, values = list(errors), list(errors.values())
    axes.barh(names, values, color=colours)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(values, default=0) or 1.0)
    for row, value in enumerate(values):
        axes.text(value, row, f" {value:.4f}", va="center", fontsize=8, color=style.INK)
    axes.set_xlabel("relative L2")
    style.plain(axes)
