"""Checks of what a caller passed, with messages that name the argument, what was expected, what came and the way out.

Nothing here imports an array library other than NumPy: dtypes of torch, CuPy or ml_dtypes arrays are known by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

FLOAT_DTYPES = ("float16", "bfloat16", "float32")
"""Dtypes that are quantised; all of them widen exactly to float32."""

GLOBAL_SCALE_MIN = 2.0**-64
GLOBAL_SCALE_MAX = 2.0**64


def message(argument: str, expected: str, got: object, way_out: str | None = None) -> str:
    """``"head_dim must be even and > 0, got 7; pad the last axis"``."""
    text = f"{argument} must be {expected}, got {got}"
    return f"{text}; {way_out}" if way_out else text


def dtype_name(array: object) -> str:
    """Name of the dtype of any array: ``"float16"``, ``"bfloat16"``, ``"uint8"``, ...; ``"none"`` if it has no dtype."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        return "none"
    return getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")


def check_choice(argument: str, value: object, allowed: Iterable[str], way_out: str | None = None) -> str:
    """Return ``value`` if it is one of ``allowed``; raise ``ValueError`` otherwise."""
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        names = ", ".join(repr(name) for name in allowed)
        raise ValueError(message(argument, f"one of {names}" if len(allowed) > 1 else names, repr(value), way_out))
    return value


def check_numpy(argument: str, array: object, way_out: str | None = None) -> np.ndarray:
    """Return ``array`` if it is a NumPy array; raise ``TypeError`` otherwise."""
    if not isinstance(array, np.ndarray):
        raise TypeError(message(argument, "a NumPy array", type(array).__name__, way_out))
    return array


def check_float_dtype(argument: str, array: object) -> str:
    """Name of the dtype if it is one of ``FLOAT_DTYPES``; raise ``TypeError`` otherwise."""
    name = dtype_name(array)
    if name not in FLOAT_DTYPES:
        raise TypeError(message(f"{argument}.dtype", "float16, bfloat16 or float32", name, "convert it first"))
    return name


def check_rank(argument: str, array: object, minimum: int, axes: str) -> tuple[int, ...]:
    """Shape of an array that has at least ``minimum`` axes, described by ``axes``; raise ``ValueError`` otherwise."""
    shape = tuple(array.shape)
    if len(shape) < minimum:
        raise ValueError(message(argument, f"an array {axes} of rank >= {minimum}", f"shape {shape}"))
    return shape


def check_head_dim(head_dim: int) -> int:
    """Return ``head_dim`` if it is even and positive; raise ``ValueError`` otherwise."""
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(message("head_dim", "even and > 0", head_dim, "pad the last axis"))
    return head_dim


def check_global_scale(value: object) -> np.float32:
    """A decode-direction global scale as float32.

    Takes a real number or an array of one float. Raises ``TypeError`` for anything else and ``ValueError`` for a
    number that is not finite or lies outside [2^-64, 2^64], where a block's scale would leave the float32 range.
    """
    expected = "a finite number in [2^-64, 2^64], 'amax' or None"
    way_out = "it is the decode direction (amax/2688), not its reciprocal"
    if isinstance(value, np.ndarray | np.generic):
        if value.size != 1 or value.dtype.kind not in "fiu":
            got = f"an array of shape {value.shape} and dtype {value.dtype}"
            raise TypeError(message("global_scale", expected, got, way_out))
        number = float(value.reshape(()))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    else:
        raise TypeError(message("global_scale", expected, type(value).__name__, way_out))
    if not GLOBAL_SCALE_MIN <= number <= GLOBAL_SCALE_MAX:
        raise ValueError(message("global_scale", expected, number, way_out))
    return np.float32(number)
