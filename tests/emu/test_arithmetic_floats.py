"""Float operations, decoded from PTX and run in bulk, against exact rational numbers; approximations against float64."""

import numpy as np
import pytest
from elementwise import apply_cases, check, emulated, grouped, inputs_of
from float_cases import APPROXIMATIONS, CASES, INF, NAN, SPECIAL_VALUES

GROUPS = grouped(CASES)


@pytest.mark.parametrize("cases", GROUPS, ids=lambda cases: f"{cases[0].name}..{cases[-1].name}")
def test_equal_to_rational_numbers(cases):
    rng = np.random.default_rng(GROUPS.index(cases))
    inputs = inputs_of(cases[0].sources, rng, 1200)
    check(cases, inputs, apply_cases(emulated, cases, inputs))


@pytest.mark.parametrize("found", APPROXIMATIONS, ids=lambda found: f"{found.ptx}-{found.high:g}")
def test_approximations_are_within_the_documented_bound(found):
    arguments = found.arguments(np.random.default_rng(3), 20000)
    (result,) = apply_cases(emulated, [found.case], arguments)
    errors = found.errors(arguments, result)
    assert errors["share"] <= 1, errors
    # results of float64 rounded once: a unit in the last place would show a mistake
    assert errors["ulp"] <= 0.51


@pytest.mark.parametrize("ptx", SPECIAL_VALUES)
def test_special_values_of_the_approximations(ptx):
    found = next(approximation.case for approximation in APPROXIMATIONS if approximation.ptx == ptx)
    x, expected = (np.array(values, np.float32).view(np.uint32) for values in zip(*SPECIAL_VALUES[ptx], strict=True))
    (result,) = apply_cases(emulated, [found], [x])
    expected = np.where(np.isnan(expected.view(np.float32)), np.uint32(0x7FFFFFFF), expected)
    np.testing.assert_array_equal(result, expected)


def test_approximate_quotients_beyond_the_documented_range():
    (found,) = (approximation.case for approximation in APPROXIMATIONS if approximation.ptx == "div.approx.f32")
    x, y, expected = (
        np.array(values, np.float32).view(np.uint32)
        for values in zip(
            (1e30, 2.0**126, 2.0**126 / 2.0**126), (1e30, 1.5 * 2.0**126, 0.0), (-1e30, 2.0**127, -0.0),
            (INF, 2.0**127, NAN), (1.0, INF, 0.0), (INF, 2.0, INF), (0.0, 0.0, NAN), strict=True,
        )
    )  # fmt: skip
    expected[0] = np.float32(np.float64(np.float32(1e30)) / 2.0**126).view(np.uint32)
    (result,) = apply_cases(emulated, [found], [x, y])
    expected = np.where(np.isnan(expected.view(np.float32)), np.uint32(0x7FFFFFFF), expected)
    np.testing.assert_array_equal(result, expected)
