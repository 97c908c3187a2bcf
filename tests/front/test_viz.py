"""Drawings: each is made, has what it promises, and leaves pyplot's global state alone."""

import io
import re
import sys

import numpy as np
import pytest
from rich.console import Console

from nbfmha import load_sample, scale_layouts, tables, viz
from ptx_inline.emu.profile import Access, ClassCount
from ptx_inline.isa.fragments import fragment, wrong_row_major_fragment
from ptx_inline.isa.instructions import INSTRUCTIONS

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


# warps of the emulator, without running it: what the drawings ask of a stop and of a profile


class FakeStop:
    """A warp at an MMA: A[m, k] = m + 1 in column k = m, B[n, k] = 1, C = -1."""

    line, text, cta, warp, mma = 12, "mma.sync", (3, 0, 0), 1, 5

    def __init__(self, key=MMA):
        self.instruction = INSTRUCTIONS[key]

    def fragment(self, operand):
        return fragment(self.instruction.key, operand)

    def matrix(self, operand):
        shape = self.fragment(operand).shape
        if operand == "A":
            return np.eye(*shape) * np.arange(1, shape[0] + 1)[:, None]
        return np.full(shape, {"B": 1.0, "C": -1.0, "SFA": 2.0, "SFB": 0.5}[operand])


def panel(figure, name):
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(name)]
    return found


def test_mma_shows_operands_scales_and_what_comes_out():
    figure = viz.draw_mma(FakeStop(), lane=5)
    assert figure._suptitle.get_text() == f"MMA 5 of warp 1, CTA (3, 0, 0), PTX line 12: {MMA}"
    after = panel(figure, "D, after").images[0].get_array()
    np.testing.assert_array_equal(after, np.repeat(np.arange(16.0)[:, None], 8, axis=1))
    assert [text.get_text() for text in panel(figure, "accumulator").texts] == ["-1"] * 128
    np.testing.assert_array_equal(panel(figure, "SFA").images[0].get_array(), np.full((16, 4), 2.0))
    assert len(panel(figure, "A:").texts) == 16 * 64


@pytest.mark.parametrize(
    ("lane", "frames"),
    [(5, {"A:": [(8, 1), (8, 9), (40, 1), (40, 9)], "accumulator": [(2, 1), (2, 9)], "SFA": [(0, 9)], "SFB": []}),
     (8, {"B:": [(0, 2), (32, 2)], "SFA": [(0, 2)], "SFB": [(0, 2)]}), (7, {"SFA": [], "SFB": []})],
)  # fmt: skip
def test_mma_frames_what_a_lane_holds(lane, frames):
    figure = viz.draw_mma(FakeStop(), lane=lane)
    for name, corners in frames.items():
        found = [(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in panel(figure, name).patches]
        assert sorted(found) == corners, name


@pytest.mark.parametrize("key", ["m16n8k16.f16", "m16n8k32.f8f6f4"])
def test_mma_without_scales(key):
    figure = viz.draw_mma(FakeStop(key))
    assert [axes.get_title(loc="left")[:2] for axes in figure.axes] == ["A:", "B:", "ac", "D,"]
    assert panel(figure, "D, after").images[0].get_array()[15, 0] == 15.0


def test_mma_refuses_a_lane_that_no_warp_has():
    with pytest.raises(ValueError, match=r"lane must be in 0\.\.31, got 32"):
        viz.draw_mma(FakeStop(), lane=32)


def test_accumulation_shows_each_step_and_what_is_missing():
    stops = [FakeStop(), FakeStop()]
    exact = np.full((16, 8), 3.0)
    figure = viz.draw_accumulation(iter(stops), exact, exact)
    assert figure._suptitle.get_text() == "an accumulator growing, 2 MMAs: exactly what float64 gives"
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["before MMA 5", "before MMA 5", "at the end"] + ["missing: at most 4"] * 2 + ["missing: at most 0"]
    off = viz.draw_accumulation(iter(stops), exact + 0.25, exact)
    assert off._suptitle.get_text().endswith("largest |error| at the end 0.25")


class FakeProfile:
    """30 stores to global memory, one of them bad, and a conflicting load from shared memory."""

    warp_instructions, lane_instructions, ctas, bank_conflicts, coalescing = 1234, 30000, 2, 28, 1.1

    def by_class(self):
        return [ClassCount("integer", 1000, 24000), ClassCount("store", 234, 6000)]

    def accesses(self):
        stores = [Access(line, f"st.global.b32\t[%rd{line}], %r1;", "global", 2, 8, 8) for line in range(10, 39)]
        bad = Access(50, "st.global.b32 [%rd9], %r1;", "global", 2, 64, 8)
        return [Access(5, "ld.shared.b32 %r1, [%r2];", "shared", 4, 32, 4), *stores, bad]


def test_profile_shows_the_worst_lines_of_each_memory():
    figure = viz.draw_profile(FakeProfile(), most=4)
    classes, shared, others = figure.axes
    assert [tick.get_text() for tick in classes.get_yticklabels()] == ["integer", "store"]
    assert [tick.get_text() for tick in shared.get_yticklabels()] == ["5  ld.shared.b32 %r1, [%r2]"]
    assert [text.get_text() for text in shared.texts] == [" 8x, 4"]
    lines = [tick.get_text().split()[0] for tick in others.get_yticklabels()]
    assert len(lines) == 4
    assert lines == sorted(lines)
    assert lines[-1] == "50", "the line with the largest excess is among them"
    assert others.get_title(loc="left") == "global memory: 32-byte sectors (4 of 30 lines)"


def test_profile_table_shows_the_worst_lines():
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(tables.profile_table(FakeProfile(), most=3))
    text = console.export_text()
    assert re.search(r"integer +1,000 +81\.0% +24\.0 of 32", text)
    assert re.search(r"5 +ld\.shared\.b32 %r1, \[%r2\] +shared +4 +32 +4 +8\.00x", text)
    assert re.search(r"50 +st\.global\.b32 \[%rd9\], %r1 +global +2 +64 +8 +8\.00x", text)
    assert "Memory, 3 of 31 instructions" in text
    assert "1,234 warp instructions, 30,000 counted a lane; 28 bank conflicts, 1.10 times the fewest sectors" in text


@pytest.mark.parametrize("draw", [lambda: viz.draw_mma(FakeStop(), lane=3), lambda: viz.draw_profile(FakeProfile())])
def test_warp_pictures_are_written(draw, tmp_path):
    assert viz.save(draw(), tmp_path / "x.png", dpi=40).read_bytes().startswith(b"\x89PNG")
