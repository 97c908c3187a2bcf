"""Names of scalar and pointer types in kernel and device-function signatures, without importing Numba.

A signature is written in C-like short names: ``"u8*"``, ``"f32*"``, ``"i64"``, ``"f32"``. Sixteen-bit floats travel as
``u16`` bit patterns: arithmetic on them goes through the conversions of :mod:`ptx_inline.device`.
"""

from __future__ import annotations

import ctypes
import functools

_SCALARS = {
    "i32": ("int32", ctypes.c_int32),
    "i64": ("int64", ctypes.c_int64),
    "u8": ("uint8", ctypes.c_uint8),
    "u16": ("uint16", ctypes.c_uint16),
    "u32": ("uint32", ctypes.c_uint32),
    "u64": ("uint64", ctypes.c_uint64),
    "f32": ("float32", ctypes.c_float),
    "f64": ("float64", ctypes.c_double),
}


def check_type(name: str) -> str:
    """Return ``name`` if it is a scalar or pointer type of this module; raise ``ValueError`` otherwise."""
    if not isinstance(name, str) or name.removesuffix("*") not in _SCALARS:
        raise ValueError(f"type must be one of {', '.join(_SCALARS)}, or one of them with '*', got {name!r}")
    return name


def is_pointer(name: str) -> bool:
    """True for ``"u8*"`` and its like."""
    return name.endswith("*")


def ctype(name: str) -> type:
    """The ctypes type by which a kernel argument of this type is passed; pointers are 64-bit addresses."""
    return ctypes.c_uint64 if is_pointer(name) else _SCALARS[name][1]


@functools.cache
def numba_type(name: str):
    """The Numba type of this name; ``"void"`` is allowed for results."""
    from numba.core import types

    if name == "void":
        return types.void
    check_type(name)
    scalar = getattr(types, _SCALARS[name.removesuffix("*")][0])
    return types.CPointer(scalar) if is_pointer(name) else scalar
