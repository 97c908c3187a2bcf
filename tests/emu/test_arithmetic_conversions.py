"""``cvt``, decoded from PTX and run in bulk, against Python integers, rational numbers and ml_dtypes."""

import numpy as np
import pytest
from conversion_cases import CASES
from elementwise import WIDTHS, apply_cases, check, emulated, grouped, inputs_of

GROUPS = grouped(CASES)
EXHAUSTIVE = [case for case in CASES if len(case.sources) == 1 and WIDTHS[case.sources[0]] == 16 and "f" in case.name]


@pytest.mark.parametrize("cases", GROUPS, ids=lambda cases: f"{cases[0].name}..{cases[-1].name}")
def test_equal_to_the_oracle(cases):
    rng = np.random.default_rng(GROUPS.index(cases))
    inputs = inputs_of(cases[0].sources, rng, 1000)
    check(cases, inputs, apply_cases(emulated, cases, inputs))


def as_f32(words, ty):
    return words.view(np.float16).astype(np.float32) if ty == "f16" else (words.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("case", [c for c in EXHAUSTIVE if c.name in ("cvt.f32.f16", "cvt.f32.bf16")], ids=lambda c: c.name)
def test_all_16_bit_floats_to_f32(case):
    words = np.arange(1 << 16, dtype=np.uint16)
    (result,) = apply_cases(emulated, [case], [words])
    with np.errstate(invalid="ignore"):
        expected = as_f32(words, case.sources[0])
    np.testing.assert_array_equal(result[~np.isnan(expected)], expected[~np.isnan(expected)].view(np.uint32))
    nan = words[np.isnan(expected)].astype(np.uint32) << 16 if case.sources == ("bf16",) else 0x7FFFFFFF
    np.testing.assert_array_equal(result[np.isnan(expected)], nan)


def test_all_16_bit_floats_come_back():
    """f16 -> f32 -> f16, and every f32 halfway between two f16 numbers, against NumPy's rounding to nearest."""
    words = np.arange(0x7C00, dtype=np.uint16)
    exact = words.view(np.float16).astype(np.float32)
    halfway = (exact[1:] + exact[:-1]) / 2  # exact: 12 bits
    x = np.concatenate([exact, halfway, np.nextafter(halfway, np.float32(0)), np.nextafter(halfway, np.float32(1e9))])
    x = np.concatenate([x, -x])
    (case,) = (case for case in CASES if case.name == "cvt.rn.f16.f32")
    (result,) = apply_cases(emulated, [case], [x.view(np.uint32)])
    np.testing.assert_array_equal(result, x.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("case", [c for c in CASES if c.sources == ("u16",) and "x2" in c.name], ids=lambda c: c.name)
def test_all_pairs_of_small_codes(case):
    words = np.arange(1 << 16 if "e2m1" not in case.name else 256, dtype=np.uint16)
    check([case], [words], apply_cases(emulated, [case], [words]))
