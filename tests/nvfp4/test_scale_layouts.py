"""The three scale layouts against brute-force loops over the published formulas."""

import itertools

import numpy as np
import pytest

from nbfmha import scale_layouts

SHAPES = [(1, 1), (1, 4), (3, 5), (16, 4), (32, 8), (63, 3), (64, 4), (65, 6), (127, 4), (128, 4), (129, 1), (200, 13)]


def loop_offset(layout, r, c, cols):
    """cuBLAS's 128x4 blocks, and SageAttention3's 64-token interleave, as published (// is C's integer division)."""
    col_blocks = (cols + 3) // 4
    if layout == "linear":
        return r * cols + c
    if layout == "blocked_128x4":
        return (r // 128) * col_blocks * 512 + (c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    in_64_tokens = (c // 4) * 256 + c % 4 + ((r % 64) // 16) * 4 + (r % 16) * 16
    return (r // 64) * (64 * col_blocks * 4) + in_64_tokens


def loop_size(layout, rows, cols):
    pad_rows = {"linear": 1, "blocked_128x4": 128, "interleaved_64": 64}[layout]
    pad_cols = 1 if layout == "linear" else 4
    while rows % pad_rows:
        rows += 1
    while cols % pad_cols:
        cols += 1
    return rows * cols


@pytest.mark.parametrize("layout", scale_layouts.SCALE_LAYOUTS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_formula_and_bytes(layout, rows, cols):
    rng = np.random.default_rng(rows * 100 + cols)
    linear = rng.integers(1, 256, (2, 3, rows, cols), dtype=np.uint8)
    size = scale_layouts.size(layout, rows, cols)
    assert size == loop_size(layout, rows, cols)

    expected = np.zeros((2, 3, size), np.uint8)
    for r in range(rows):
        for c in range(cols):
            place = loop_offset(layout, r, c, cols)
            assert scale_layouts.offset(layout, r, c, rows, cols) == place
            expected[..., place] = linear[..., r, c]

    stored = scale_layouts.apply(layout, linear)
    assert stored.shape == (2, 3, *scale_layouts.array_shape(layout, rows, cols))
    np.testing.assert_array_equal(stored.reshape(2, 3, size), expected)
    np.testing.assert_array_equal(scale_layouts.undo(layout, stored, rows, cols), linear)


@pytest.mark.parametrize("layout", scale_layouts.SCALE_LAYOUTS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_addresses_fill_the_padded_matrix(layout, rows, cols):
    """One-to-one over the padded matrix: every byte belongs to exactly one (row, column)."""
    padded_rows, padded_cols = scale_layouts.padded_shape(layout, rows, cols)
    places = scale_layouts.offset(layout, np.arange(padded_rows)[:, None], np.arange(padded_cols), rows, cols)
    np.testing.assert_array_equal(np.sort(places, axis=None), np.arange(scale_layouts.size(layout, rows, cols)))


def test_chains_of_layouts_round_trip():
    linear = np.random.default_rng(0).integers(0, 256, (70, 9), dtype=np.uint8)
    for chain in itertools.permutations(scale_layouts.SCALE_LAYOUTS):
        moved = linear
        for layout in chain:
            moved = scale_layouts.undo(layout, scale_layouts.apply(layout, moved), 70, 9)
        np.testing.assert_array_equal(moved, linear)


def test_results_are_new_arrays():
    linear = np.ones((4, 4), np.uint8)
    for layout in scale_layouts.SCALE_LAYOUTS:
        stored = scale_layouts.apply(layout, linear)
        scale_layouts.undo(layout, stored, 4, 4)[...] = 7
        stored[...] = 9
    np.testing.assert_array_equal(linear, 1)


@pytest.mark.parametrize("layout", scale_layouts.SCALE_LAYOUTS)
@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (5, 0), (0, 0)])
def test_empty(layout, rows, cols):
    assert scale_layouts.size(layout, rows, cols) == 0
    stored = scale_layouts.apply(layout, np.zeros((2, rows, cols), np.uint8))
    assert scale_layouts.undo(layout, stored, rows, cols).shape == (2, rows, cols)


def test_errors():
    for call in (
        lambda: scale_layouts.size("128x4", 1, 1),
        lambda: scale_layouts.apply("128x4", np.zeros((1, 1), np.uint8)),
    ):
        with pytest.raises(ValueError, match="scale_layout must be one of 'linear', 'blocked_128x4', "):
            call()
    with pytest.raises(ValueError, match=r"rows and cols must be >= 0, got \(-1, 4\)"):
        scale_layouts.size("linear", -1, 4)
    with pytest.raises(ValueError, match=r"row must be in \[0, 64\), got 64\.\.64"):
        scale_layouts.offset("interleaved_64", 64, 0, 3, 4)
    with pytest.raises(ValueError, match=r"col must be in \[0, 5\), got -1\.\.2"):
        scale_layouts.offset("linear", 0, [-1, 2], 3, 5)
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 512\) for 3 x 4 scales as 'blocked_128x4', got \(256,\)"):
        scale_layouts.undo("blocked_128x4", np.zeros(256, np.uint8), 3, 4)
    with pytest.raises(ValueError, match=r"scales\.shape must be \(\.\.\., 3, 4\)"):
        scale_layouts.undo("linear", np.zeros(12, np.uint8), 3, 4)
