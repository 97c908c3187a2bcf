"""Drawings: each is made, has what it promises, and leaves pyplot's global state alone."""

import sys

import numpy as np
import pytest

from nbfmha import load_sample, scale_layouts, viz
from ptx_inline.isa.fragments import fragment, wrong_row_major_fragment

MMA = "m16n8k64.mxf4nvf4.4x"


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("operand", ["A", "B", "C", "SFA", "SFB"])
def test_fragment_labels_every_frame_and_counts_every_lane(operand):
    figure = viz.draw_fragment(fragment(MMA, operand))
    main, warp = figure.axes
    labels = [text.get_text() for text in main.texts]
    assert len(labels) == len(set(labels)) == {"A": 128, "B": 64, "C": 128, "SFA": 16, "SFB": 8}[operand]
    counts = [text.get_text() for text in warp.texts]
    assert len(counts) == 32
    assert counts.count("-") == {"SFA": 16, "SFB": 24}.get(operand, 0)


@pytest.mark.parametrize("layout", scale_layouts.SCALE_LAYOUTS)
def test_scale_layout_labels_every_byte_shown(layout):
    labels = texts(viz.draw_scale_layout(layout, rows=40, cols=6))
    size = scale_layouts.size(layout, 40, 6)
    assert len(labels) == min(512, -(-size // 16) * 16)
    assert "0,0" in labels
    assert ("pad" in labels) is (layout != "linear")


def test_packing_draws_right_and_wrong():
    figure = viz.draw_packing(fragment(MMA, "A"), wrong_row_major_fragment(MMA, "A"))
    there = figure.axes[1].images[0].get_array()
    assert np.all(there == there[0]), "every row that the MMA reads holds the same mixture"
    assert sorted(set(there[0].tolist())) == list(range(16))


def test_scores_say_exact_or_how_much_of_the_budget():
    expected = np.arange(12.0).reshape(3, 4)
    assert viz.draw_scores(expected, expected, 0.0, title="t")._suptitle.get_text() == "t: exact"
    off = expected.copy()
    off[1, 2] += 0.25
    assert "largest |error| 0.25, 50% of its budget" in viz.draw_scores(off, expected, 0.5, title="t")._suptitle.get_text()
    assert viz.draw_scores(off, expected, title="t")._suptitle.get_text() == "t: largest |error| 0.25"


def test_tiles_show_every_number():
    assert texts(viz.draw_tiles({"a": np.array([[1.0, 2.5]]), "b": np.zeros((1, 2))}, title="t")) == ["1", "2.5", "0", "0"]


@pytest.mark.parametrize(
    "draw",
    [
        viz.draw_number_lines,
        viz.draw_rounding,
        lambda: viz.draw_rounding("e3m2", 28.0),
        lambda: viz.draw_error_by_magnitude(range(-2, 2)),
        lambda: viz.draw_block(load_sample().k[0, 5, :16]),
        lambda: viz.draw_block(np.zeros(32, np.float32), format="mxfp4"),
        lambda: viz.draw_quantized_matrix(load_sample().v[0, :32], title="v", axis="tokens"),
        lambda: viz.draw_scale_use({"zero": np.zeros((4, 16), np.float32), "one": np.ones((4, 16), np.float32)}),
    ],
)
def test_pictures_are_written_without_pyplot(draw, tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    path = viz.save(draw(), tmp_path / "x.png", dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) is loaded
