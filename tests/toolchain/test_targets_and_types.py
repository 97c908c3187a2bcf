"""Names of targets and of signature types."""

import ctypes

import pytest

from ptx_inline.toolchain import TARGETS, Kernel, Target
from ptx_inline.types import check_type, ctype, is_pointer, numba_type


@pytest.mark.parametrize("name", [*TARGETS, "sm_121a", "sm_120", "sm_120f", "sm_87"])
def test_targets_round_trip(name):
    target = Target.parse(name)
    assert target.name == str(target) == name
    assert Target.parse(target) is target


def test_compute_capability_as_numba_takes_it():
    assert Target.parse("sm_120a").compute_capability == (12, 0, "a")
    assert Target.parse("sm_86").compute_capability == (8, 6)
    assert Target.of_compute_capability(9, 0).name == "sm_90a"
    assert Target.of_compute_capability(8, 9).name == "sm_89"


def test_block_scale_mma_needs_the_architecture_specific_target():
    has = {name: Target.parse(name).has_block_scale_mma for name in (*TARGETS, "sm_120", "sm_121a")}
    assert [name for name, value in has.items() if value] == ["sm_120a", "sm_121a"]


@pytest.mark.parametrize("name", ["sm_75", "90a", "sm_9", "sm_120b", "", None, 90])
def test_wrong_targets_are_named(name):
    with pytest.raises(ValueError, match="arch must be sm_80 or newer, written as one of sm_80"):
        Target.parse(name)
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or higher, got 7\.5"):
        Target.of_compute_capability(7, 5)


def test_types():
    assert is_pointer("u8*")
    assert not is_pointer("f32")
    assert ctype("f32*") is ctypes.c_uint64
    assert ctype("u16") is ctypes.c_uint16
    assert str(numba_type("f32*")) == "float32*"
    assert numba_type("void").name == "none"
    for wrong in ("f16", "u8**", "float", "", 3):
        with pytest.raises(ValueError, match="type must be one of i32"):
            check_type(wrong)


def test_constants_must_say_all_about_themselves():
    def factory(**constants):
        return lambda: None

    Kernel(factory, (), {"a": 1, "b": ("x", 2.0, (True,))})
    with pytest.raises(TypeError, match="constant a must be a number, string, boolean or tuple of them, got list"):
        Kernel(factory, (), {"a": [1]})
    with pytest.raises(TypeError, match="constant a must be a number"):
        Kernel(factory, (), {"a": (object(),)})
    with pytest.raises(ValueError, match="type must be one of i32"):
        Kernel(factory, ("half*",))
