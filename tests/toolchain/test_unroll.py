"""Loops written out by ``unrolled`` do what the loops over ``range`` do."""

import inspect

import pytest

from ptx_inline.unroll import unroll, unrolled

STEPS = 3


def test_nested_loops_with_bounds_of_outer_variables():
    inner = 2

    def plain(items):
        for i in unroll(STEPS):
            for j in unroll(i, inner + i):
                items.append((i, j, 10 * i + j))
        for k in unroll(8, 0, -3):
            items.append(k)
        return items

    assert unrolled(plain)([]) == plain([])
    assert unrolled(plain)([])[0] == (0, 0, 0)


def test_the_variable_is_a_literal_and_the_loop_is_gone():
    def loop(values):
        for i in unroll(2):
            values[i] = i

    names = unrolled(loop).__code__.co_names + unrolled(loop).__code__.co_varnames
    assert "i" not in names
    assert "unroll" not in names


def test_closure_defaults_name_and_docstring_are_kept():
    offset = 5

    def named(x, scale=2):
        """What it does."""
        total = 0
        for i in unroll(2):
            total += scale * (x + i + offset)
        return total

    made = unrolled(named)
    assert made(1) == named(1)
    assert made(1, scale=3) == named(1, scale=3)
    assert (made.__name__, made.__doc__) == ("named", "What it does.")
    assert made.__code__.co_filename == __file__
    assert made.__code__.co_firstlineno == named.__code__.co_firstlineno


def test_empty_loop_and_ordinary_loops():
    def mixed(items):
        for _ in unroll(0):
            items.append("never")
        for i in range(2):
            for j in unroll(2):
                items.append((i, j))
        return items

    assert unrolled(mixed)([]) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_decorators_below_others():
    calls = []

    def outer(function):
        calls.append(function.__name__)
        return function

    @outer
    @unrolled
    def decorated():
        total = 0
        for i in unroll(3):
            total += i
        return total

    assert decorated() == 3
    assert calls == ["decorated"]


def with_break(n):
    for i in unroll(2):
        if i == n:
            break


def with_else(n):
    for _ in unroll(2):
        n += 1
    else:
        n = 0
    return n


def with_tuple(n):
    for a, b in unroll(2):
        n += a + b


def with_argument(n):
    for i in unroll(n):
        n += i


@pytest.mark.parametrize("function", [with_break, with_else, with_tuple])
def test_loops_that_cannot_be_written_out(function):
    line = inspect.getsourcelines(function)[1] + 1
    with pytest.raises(ValueError, match=rf"line {line}: a loop over unroll\(\) takes one name and no break"):
        unrolled(function)


def test_bounds_must_be_constants():
    with pytest.raises(ValueError, match=r"bounds of unroll\(\) must be compile-time constants"):
        unrolled(with_argument)


def test_outside_a_kernel_it_is_range():
    assert list(unroll(1, 7, 2)) == [1, 3, 5]
