"""Messages and the helpers that other modules use directly."""

import ml_dtypes
import numpy as np
import pytest

from nbfmha import validation


def test_message():
    assert validation.message("head_dim", "64 or 128", 96) == "head_dim must be 64 or 128, got 96"
    assert validation.message("x", "a", "b", "do c") == "x must be a, got b; do c"


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (np.zeros(1, np.float16), "float16"),
        (np.zeros(1, ">f4"), "float32"),
        (np.zeros(1, ml_dtypes.bfloat16), "bfloat16"),
        ([1.0], "none"),
    ],
)
def test_dtype_name(array, name):
    assert validation.dtype_name(array) == name


def test_dtype_name_of_torch():
    class Tensor:
        dtype = type("dtype", (), {"__str__": lambda self: "torch.bfloat16"})()

    assert validation.dtype_name(Tensor()) == "bfloat16"


def test_check_choice_with_one_choice():
    assert validation.check_choice("a", "x", ["x"]) == "x"
    with pytest.raises(ValueError, match=r"^a must be 'x', got 'y'; use x$"):
        validation.check_choice("a", "y", ["x"], "use x")


def test_bounds_of_the_global_scale_are_inside():
    assert validation.check_global_scale(validation.GLOBAL_SCALE_MIN) == np.float32(2.0**-64)
    assert validation.check_global_scale(validation.GLOBAL_SCALE_MAX) == np.float32(2.0**64)
    assert validation.check_global_scale(0.1).dtype == np.float32
