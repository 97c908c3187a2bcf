"""What the driver reads of a launch: a pointer to each argument, in memory that is used again."""

import ctypes

import pytest

from ptx_inline.toolchain.parameters import Parameters, Placeholder
from ptx_inline.types import ctype

EVERY = ("u8*", "i32", "i64", "u8", "u16", "u32", "u64", "f32", "f64", "f32*")
VALUES = (2**47 + 16, -5, -(2**40), 200, 65535, 2**32 - 1, 2**64 - 1, 1.5, 0.1, 0)


def read(memory, signature):
    pointers = (ctypes.c_void_p * len(signature)).from_address(memory.address)
    return tuple(ctype(kind).from_address(at).value for at, kind in zip(pointers, signature, strict=True))


def test_every_type_keeps_its_value():
    parameters = Parameters(EVERY)
    for values in (VALUES, tuple(reversed(range(10)))):
        memory = parameters.write(values)
        assert read(memory, EVERY) == values
        parameters.release(memory)


def test_fixed_values_stay_and_addresses_take_their_places():
    signature = ("u8*", "i32", "f32*", "u8*", "f64", "u8*")
    fixed = (Placeholder(2), -7, 4096, Placeholder(0), 0.1, Placeholder(2))
    parameters = Parameters(signature, fixed, addresses=4)
    for first in (1 << 40, 1 << 41):
        memory = parameters.write((first, 1, first + 2, 3))
        assert read(memory, signature) == (first + 2, -7, 4096, first, 0.1, first + 2)
        parameters.release(memory)
    parameters = Parameters(signature, (1, 2, 3, 4, 5.0, 6))
    assert read(parameters.write(()), signature) == (1, 2, 3, 4, 5.0, 6)
    parameters = Parameters(())
    assert read(parameters.write(()), ()) == ()


def test_memory_is_used_again_and_never_by_two():
    parameters = Parameters(("i32",))
    first = parameters.write((1,))
    second = parameters.write((2,))
    assert second is not first
    assert (read(first, ("i32",)), read(second, ("i32",))) == ((1,), (2,))
    parameters.release(first)
    assert parameters.write((3,)) is first
    assert read(second, ("i32",)) == (2,)


def test_placeholders_that_stand_for_nothing_are_refused():
    with pytest.raises(TypeError, match="argument 1 must be a number for 'i32', got a placeholder of an address"):
        Parameters(("u8*", "i32"), (Placeholder(0), Placeholder(1)), addresses=2)
    with pytest.raises(ValueError, match=r"argument 0 must be one of 2 addresses, got Placeholder\(index=2\)"):
        Parameters(("u8*",), (Placeholder(2),), addresses=2)
