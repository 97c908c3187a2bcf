"""Integer and bit operations, decoded from PTX and run in bulk, against Python integers."""

import numpy as np
import pytest
from elementwise import Case, apply_cases, check, emulated, grouped, inputs_of
from integer_cases import CASES

GROUPS = grouped(CASES)


@pytest.mark.parametrize("cases", GROUPS, ids=lambda cases: f"{cases[0].name}..{cases[-1].name}")
def test_equal_to_python_integers(cases):
    rng = np.random.default_rng(GROUPS.index(cases))
    inputs = inputs_of(cases[0].sources, rng, 2000)
    check(cases, inputs, apply_cases(emulated, cases, inputs))


@pytest.mark.parametrize("ty", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_division_by_zero_is_what_the_documentation_says(ty):
    kind = f"u{ty[1:]}"
    cases = [Case(f"{name}.{ty}", f"{name}.{ty} %d, %a, %b;", (kind, kind), kind, None) for name in ("div", "rem")]
    x = inputs_of((kind,), np.random.default_rng(1), 500)[0]
    quotient, remainder = apply_cases(emulated, cases, (x, np.zeros_like(x)))
    np.testing.assert_array_equal(quotient, np.iinfo(x.dtype).max)
    np.testing.assert_array_equal(remainder, np.iinfo(x.dtype).max)


def test_a_wrong_result_is_named():
    case = Case("add.u32", "sub.u32 %d, %a, %b;", ("u32", "u32"), "u32", lambda x, y: (x + y) % 2**32)
    inputs = [np.array([7], np.uint32), np.array([2], np.uint32)]
    with pytest.raises(AssertionError, match=r"add.u32 of \['0x7', '0x2'\]: 0x5, expected 0x9"):
        check([case], inputs, apply_cases(emulated, [case], inputs))
