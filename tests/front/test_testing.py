"""The comparison helpers themselves: they must catch what they exist to catch."""

import numpy as np
import pytest

from nbfmha.testing import (
    Guarded,
    accumulation_budget,
    assert_close,
    compare,
    poison,
    poison_outside,
    relative_rmse,
    relative_rmse_standard_error,
)


def test_exact_comparison_names_the_worst_element_and_both_values():
    got, expected = np.zeros((3, 4)), np.zeros((3, 4))
    got[1, 2], got[2, 3] = 0.5, -2.0
    comparison = compare(got, expected)
    assert not comparison.ok
    assert comparison.mismatches == 2
    assert comparison.max_abs_error == 2.0
    assert comparison.got in (0.5, -2.0)
    with pytest.raises(AssertionError, match=r"scores: 2 of 12 elements .* worst at \[\d, \d\]: got .*, expected 0\.0"):
        assert_close(got, expected, what="scores")


def test_worst_element_is_the_one_with_the_largest_share_of_its_budget():
    comparison = compare([1.0, 100.5], [0.0, 100.0], [2.0, 0.25])
    assert comparison.index == (1,)
    assert comparison.max_budget_share == 2.0
    assert comparison.max_abs_error == 1.0
    assert comparison.mismatches == 1


def test_error_equal_to_the_budget_is_allowed():
    assert compare([1.0], [0.75], 0.25).ok


@pytest.mark.parametrize(
    ("got", "expected", "ok"),
    [
        (np.nan, np.nan, True),
        (np.inf, np.inf, True),
        (-0.0, 0.0, True),
        (np.nan, 0.0, False),
        (0.0, np.nan, False),
        (np.inf, -np.inf, False),
        (1.0, np.inf, False),
    ],
)
def test_not_finite(got, expected, ok):
    assert compare([got], [expected], 1e30).ok is ok
    assert compare([got], [expected]).ok is ok


def test_empty_arrays_agree():
    comparison = compare(np.zeros((0, 8)), np.zeros((0, 8)))
    assert comparison.ok
    assert comparison.describe() == "no elements"


def test_bad_comparisons_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        compare(np.zeros(3), np.zeros(4))
    for budget in (-1.0, np.nan):
        with pytest.raises(ValueError, match="budget must be >= 0"):
            compare([0.0], [0.0], budget)


def test_relative_rmse_and_its_standard_error():
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((4096, 16))
    got = expected + 0.1 * rng.standard_normal(expected.shape)
    rmse = relative_rmse(got, expected)
    error = relative_rmse_standard_error(got, expected, group=16)
    # 0.1 is the true ratio; the standard error of a ratio of standard deviations of n samples is about R / sqrt(n)
    assert error == pytest.approx(0.1 / np.sqrt(expected.size), rel=0.1)
    assert abs(rmse - 0.1) < 5 * error
    with pytest.raises(ValueError, match="group must divide"):
        relative_rmse_standard_error(got, expected, group=17)


def test_relative_rmse_of_nothing():
    assert relative_rmse([0.0, 0.0], [0.0, 0.0]) == 0
    assert relative_rmse([0.0, 1.0], [0.0, 0.0]) == float("inf")


def test_accumulation_budget_covers_truncation_in_every_step():
    """The worst chain that the docstring describes: each step loses almost a unit of every addend and of the result."""
    fraction_bits, steps = 25, 16
    rng = np.random.default_rng(1)
    terms = rng.uniform(0.5, 1.0, (200, steps, 16))
    exact = terms.sum(axis=(1, 2))
    total = np.zeros(200)
    for step in range(steps):
        addends = np.concatenate([terms[:, step], total[:, None]], axis=1)
        unit = 2.0 ** (np.floor(np.log2(addends.max(axis=1))) - fraction_bits)
        aligned = np.floor(addends / unit[:, None]) * unit[:, None]
        result = aligned.sum(axis=1)
        ulp = 2.0 ** (np.floor(np.log2(result)) - 23)
        total = np.floor(result / ulp) * ulp
    budget = accumulation_budget(exact, 0.0, steps=steps, addends=17, fraction_bits=fraction_bits)
    assert np.all(total < exact)
    assert_close(total, exact, budget)
    # and it is no blank cheque: within two orders of magnitude of what happened
    assert np.all(exact - total > budget / 100)


def test_guard_bands_catch_a_write_on_either_side():
    buffer = Guarded(10, np.float32)
    buffer.body[:] = 1.0
    buffer.check()
    buffer.raw[buffer.band - 1] = 0
    with pytest.raises(AssertionError, match="before the buffer was written at byte 255 of 256"):
        buffer.check()
    buffer = Guarded(10, np.float32)
    buffer.raw[-256] = 1
    with pytest.raises(AssertionError, match="after the buffer was written at byte 0"):
        buffer.check()
    with pytest.raises(ValueError, match="band must be a multiple"):
        Guarded(1, np.float64, band=100)


def test_poison_is_loud():
    assert np.isnan(poison((2, 3), np.float32)).all()
    assert np.isnan(poison(4, np.float16)).all()
    matrix = poison_outside(np.zeros((2, 4, 4), np.uint8), 3, 2)
    assert np.all(matrix[:, :3, :2] == 0)
    assert np.count_nonzero(matrix == 0xFF) == 2 * (16 - 6)
