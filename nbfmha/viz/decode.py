"""Drawings of decode: what a KV cache takes, how fast it is read, and what its 16-bit windows are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from nbfmha.bench.decode import CACHES, OUR_BITS, PEER_BITS, Row
from nbfmha.kv_layout import CacheLayout
from nbfmha.viz import style

#: Arrays of ``CacheLayout.shapes`` (k's name; v's is alike) -> what they are called here.
PARTS = {"codes": "codes", "scales": "scales", "recent": "ring, 16 bits", "sinks": "first tokens, 16 bits", "mean": "km"}
_PART_COLOURS = (style.BLUE, "#9fc1d8", style.ORANGE, "#eeb983", style.GREEN)
_LINE_COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.RED)
_PEER_COLOURS = ("#9fc1d8", style.BLUE, style.FAINT, style.GREEN)
_OUR_COLOURS = (style.ORANGE, "#eeb983")


def sequence_bytes(layout: CacheLayout, length: int) -> dict[str, int]:
    """Bytes of each of ``PARTS`` that one sequence of ``length`` tokens takes, K and V of all heads, in whole pages."""
    taken = dict.fromkeys(PARTS.values(), 0)
    for name, (shape, dtype) in layout.shapes(layout.pages_of(length), 1, length).items():
        part = PARTS.get(name.partition("_")[2])
        if part:  # lengths and tables, 4 bytes a page, are left out
            taken[part] += int(np.prod(shape)) * np.dtype(dtype.replace("bfloat", "float")).itemsize
    return taken


def _in_16_bits(layout: CacheLayout) -> int:
    """Bytes of a token, all of it in 16 bits."""
    return 4 * layout.num_heads_kv * layout.head_dim


def draw_sequence_bytes(layout: CacheLayout, lengths: Sequence[int]) -> Figure:
    """Bytes that a token takes in sequences of these lengths (at least 1), by part, beside 16 bits and NVFP4 alone."""
    title = f"bytes a token: {layout.num_heads_kv} heads of K and V, head_dim {layout.head_dim}"
    figure = style.new_figure(10, 4, title)
    axes = figure.subplots()
    places, bottom = np.arange(len(lengths)), np.zeros(len(lengths))
    taken = [sequence_bytes(layout, length) for length in lengths]
    for part, colour in zip(PARTS.values(), _PART_COLOURS, strict=True):
        heights = np.array([own[part] / length for own, length in zip(taken, lengths, strict=True)])
        axes.bar(places, heights, bottom=bottom, color=colour, label=part)
        bottom += heights
    full = _in_16_bits(layout)
    for place, height in zip(places, bottom, strict=True):
        axes.text(place, height, f"{full / height:.2f}x", ha="center", va="bottom", fontsize=8, color=style.INK)
    axes.axhline(full, color=style.RED, linestyle="--", linewidth=1, label="16 bits")
    axes.axhline(layout.bytes_per_token, color=style.INK, linestyle="--", linewidth=1, label="a token in a page")
    axes.set_xticks(places, [str(length) for length in lengths])
    axes.set_xlabel("tokens of the sequence")
    axes.set_ylabel("bytes a token")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    style.plain(axes)
    style.note(figure, "over each bar: how many times less than 16 bits")
    return figure


def draw_cache_bytes(layouts: Mapping[str, CacheLayout], lengths: Sequence[int]) -> Figure:
    """Bytes of a sequence against its length, and how many times less than 16 bits that is; a line a layout.

    layouts: name -> layout, heads and head_dim alike; lengths: ascending, at least 1.
    """
    layouts, lengths = dict(layouts), np.asarray(lengths)
    first = next(iter(layouts.values()))
    full = _in_16_bits(first) * lengths
    figure = style.new_figure(14, 4.2, f"a sequence: {first.num_heads_kv} heads of K and V, head_dim {first.head_dim}")
    left, right = figure.subplots(1, 2)
    left.plot(lengths, full / 2**20, color=style.INK, linestyle="--", label="all in 16 bits")
    for number, (name, layout) in enumerate(layouts.items()):
        taken = np.array([sum(sequence_bytes(layout, int(length)).values()) for length in lengths])
        colour = _LINE_COLOURS[number % len(_LINE_COLOURS)]
        left.plot(lengths, taken / 2**20, color=colour, label=name)
        right.plot(lengths, full / taken, color=colour, label=name)
    left.set_yscale("log")
    style.title(left, "MiB")
    limit = _in_16_bits(first) / first.bytes_per_token
    right.axhline(limit, color=style.INK, linestyle=":", label=f"NVFP4 alone: {limit:.2f}")
    right.axhline(1, color=style.INK, linestyle="--", linewidth=0.8)
    right.set_ylim(0, 1.08 * limit)
    style.title(right, "times less than in 16 bits")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of the sequence")
        axes.legend(fontsize=8, frameon=False)
        axes.grid(axis="y", color=style.EMPTY)
        style.plain(axes)
    return figure


def draw_decode_rows(rows: Sequence[Row], gpu: str) -> Figure:
    """Rows of ``nbfmha bench decode``: time, bandwidth, its share of the copy's, and speed beside the fastest peer's.

    A group a shape, a bar a run, replayed as a CUDA graph. The line in the last panel is what bytes alone allow: 16 bits
    over 4.5.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    shapes = list(dict.fromkeys(row.shape for row in rows))
    peers = [name for name in names if name not in CACHES]
    colours = {name: _PEER_COLOURS[i % len(_PEER_COLOURS)] for i, name in enumerate(peers)}
    colours |= dict(zip(CACHES, _OUR_COLOURS, strict=True))
    figure = style.new_figure(15, 1.4 + 0.8 * len(shapes), f"decode, one query token a sequence, on {gpu}")
    panels = (
        ("microseconds", "graph_us", "{:.0f}"),
        ("TB/s of K and V", "tb_s", "{:.2f}"),
        ("share of the copy's bandwidth", "share_of_copy", "{:.0%}"),
        ("times the fastest peer's speed", "times_peer", "{:.2f}"),
    )
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, figure_of, pattern) in zip(all_axes, panels, strict=True):
        for name in names:
            own = [row for row in rows if row.name == name]
            offset = (names.index(name) - (len(names) - 1) / 2) * 0.84 / len(names)
            places = [shapes.index(row.shape) + offset for row in own]
            values = [getattr(row, figure_of) for row in own]
            axes.barh(places, values, 0.8 / len(names), color=colours[name], label=name)
            for place, value in zip(places, values, strict=True):
                axes.annotate(
                    pattern.format(value), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7,
                    color=style.INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
                )  # fmt: skip
        axes.margins(x=0.16)
        style.title(axes, title)
        style.plain(axes)
    first, _, share, times = all_axes
    for axes in (share, times):
        axes.axvline(1, color=style.INK, linewidth=0.8)
    times.axvline(PEER_BITS / OUR_BITS, color=style.INK, linestyle=":", linewidth=1.2)
    first.set_yticks(range(len(shapes)), [shape.title for shape in shapes])
    first.set_ylabel("batch, heads, length, head_dim", fontsize=8)
    first.invert_yaxis()
    where = {"loc": "outside lower left", "ncols": len(names), "fontsize": 8, "frameon": False}
    figure.legend(*first.get_legend_handles_labels(), **where)
    return figure


def draw_window_errors(errors: Mapping[tuple[int, int], float], default: CacheLayout, without: float) -> Figure:
    """Relative L2 against ``recent_tokens``, a line for each of ``sink_tokens``.

    errors: (recent_tokens, sink_tokens) -> relative L2, the default layout's windows among them (``KeyError`` if not);
    without: that of a cache without 16-bit windows.
    """
    figure = style.new_figure(10, 4.2, "what is lost, by the tokens that stay in 16 bits")
    axes = figure.subplots()
    axes.axhline(without, color=style.INK, linestyle="--", linewidth=1, label="none in 16 bits")
    for number, sinks in enumerate(sorted({sinks for _, sinks in errors})):
        points = sorted((recent, error) for (recent, own), error in errors.items() if own == sinks)
        colour = _LINE_COLOURS[number % len(_LINE_COLOURS)]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=f"first {sinks} tokens")
    chosen = (default.recent_tokens, default.sink_tokens)
    axes.plot(chosen[0], errors[chosen], "o", markersize=13, fillstyle="none", color=style.INK, label="default")
    below = {"xytext": (0, -18), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    axes.annotate(f"{errors[chosen]:.3f}", (chosen[0], errors[chosen]), **below)
    recents = sorted({recent for recent, _ in errors})
    axes.set_xscale("log", base=2)
    axes.set_xticks(recents, [str(recent) for recent in recents])
    axes.set_ylim(0)
    axes.set_xlabel("recent_tokens")
    axes.set_ylabel("relative L2")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(axis="y", color=style.EMPTY)
    style.plain(axes)
    return figure
