"""Drawings of decode: every part of a cache is counted once, every figure of a row is there, the default marked."""

import io
from dataclasses import replace

import numpy as np
import pytest

from nbfmha import viz
from nbfmha.bench import decode
from nbfmha.kv_layout import CacheLayout
from nbfmha.viz.decode import PARTS, sequence_bytes

LAYOUT = CacheLayout(3, 64)
SMALL_WINDOWS = CacheLayout(8, 128, page_size=16, dtype="bfloat16", recent_tokens=16, sink_tokens=0)


@pytest.mark.parametrize("layout", [LAYOUT, SMALL_WINDOWS], ids=["default", "small windows"])
@pytest.mark.parametrize("length", [1, 159, 1000])
def test_parts_are_all_that_a_sequence_takes(layout, length):
    parts = sequence_bytes(layout, length)
    assert tuple(parts) == tuple(PARTS.values())
    assert sum(parts.values()) == layout.bytes_per_sequence + layout.pages_of(length) * layout.bytes_per_page
    assert parts["codes"] == 8 * parts["scales"]


def written(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=40)
    return buffer.getvalue().startswith(b"\x89PNG")


def test_bytes_a_token():
    figure = viz.draw_sequence_bytes(LAYOUT, [256, 65536])
    (axes,) = figure.axes
    heights = np.array([patch.get_height() for patch in axes.patches]).reshape(len(PARTS), 2).sum(axis=0)
    np.testing.assert_allclose(heights, [sum(sequence_bytes(LAYOUT, n).values()) / n for n in (256, 65536)])
    assert [text.get_text() for text in axes.texts] == [f"{4 * 3 * 64 / height:.2f}x" for height in heights]
    assert [line.get_ydata()[0] for line in axes.lines] == [4 * 3 * 64, LAYOUT.bytes_per_token]
    assert written(figure)


def test_bytes_against_length():
    layouts = {"default": LAYOUT, "wide": CacheLayout(3, 64, recent_tokens=1024)}
    figure = viz.draw_cache_bytes(layouts, [64, 2**20])
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["all in 16 bits", "default", "wide"]
    full, *taken = (line.get_ydata() for line in left.lines)
    np.testing.assert_allclose(full * 2**20, [4 * 3 * 64 * 64, 4 * 3 * 64 * 2**20])
    for own, line in zip(taken, right.lines, strict=False):
        np.testing.assert_allclose(line.get_ydata(), full / own)
        assert line.get_ydata()[0] < 1 < 3.5 < line.get_ydata()[1] < 16 / 4.5
    assert right.lines[2].get_label() == "NVFP4 alone: 3.56"
    assert written(figure)


def test_every_figure_of_the_rows_is_there():
    shape = decode.SHAPES[0]
    ours = decode.Row(shape, decode.OURS, 8, 20.0, 22.0, 90.0, decode.OUR_BITS, 3.0, 50.0, 0.1, 80.0)
    peer = replace(ours, name=decode.FLASH, graph_us=50.0, bits=decode.PEER_BITS, host_us=None)
    other = replace(ours, shape=decode.SHAPES[4], graph_us=400.0, fastest_peer_us=1000.0)
    figure = viz.draw_decode_rows([ours, peer, other], "some GPU")
    assert figure._suptitle.get_text().endswith("on some GPU")
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts[0] == ["20", "400", "50"]  # a run after the other
    assert texts[1] == [f"{row.tb_s:.2f}" for row in (ours, other, peer)]
    assert texts[2] == [f"{row.share_of_copy:.0%}" for row in (ours, other, peer)]
    assert texts[3] == ["2.50", "2.50", "1.00"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [shape.title, decode.SHAPES[4].title]
    assert [line.get_xdata()[0] for line in figure.axes[3].lines] == [1, 16 / 4.5]
    assert written(figure)


def test_the_default_windows_are_marked():
    errors = {(recent, sinks): 1 / (recent + sinks) for recent in (16, 128) for sinks in (0, 32)}
    figure = viz.draw_window_errors(errors, LAYOUT, 0.5)
    (axes,) = figure.axes
    none, first, second, mark = axes.lines
    assert none.get_ydata()[0] == 0.5
    assert [line.get_label() for line in (first, second)] == ["first 0 tokens", "first 32 tokens"]
    np.testing.assert_allclose(second.get_ydata(), [1 / 48, 1 / 160])
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (128, 1 / 160)
    assert [text.get_text() for text in axes.texts] == ["0.006"]
    assert written(figure)
    with pytest.raises(KeyError):
        viz.draw_window_errors(errors, CacheLayout(3, 64, recent_tokens=64), 0.5)
