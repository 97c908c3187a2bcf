"""How a caller's arrays lie in memory: as views of (batch, head, token) for kernels, and which bytes they take up."""

from __future__ import annotations

import math
from typing import Any

from nbfmha.emulated import EmulatedArray
from nbfmha.tiles import View
from nbfmha.validation import message
from ptx_inline.toolchain.arrays import is_torch

LAYOUTS = {"bhsd": (-3, -2), "bshd": (-2, -3)}
"""Layout -> the axes of heads and of tokens; head_dim is the last axis, all before these three count as the batch."""

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def strides_in_elements(array: Any) -> tuple[int, ...]:
    """Elements from one index to the next along each axis."""
    if is_torch(array):
        return array.stride()
    if isinstance(array, EmulatedArray):
        return tuple(math.prod(array.shape[axis + 1 :]) for axis in range(len(array.shape)))
    return tuple(stride // array.dtype.itemsize for stride in array.strides)


def view_of(name: str, array: Any, layout: str, dtype: str, granule: int) -> View:
    """The view of an array of rank >= 3 in ``layout`` that a kernel reads or writes where it lies, without a copy.

    dtype: the array's, by name. granule: bytes of which the address and the three strides must be multiples. Strides of
    axes without a second index are 0.

    Raises ``ValueError`` for channels that are not neighbours, leading axes that are not one batch axis, or an address or
    stride off the granule.
    """
    shape, strides = array.shape, strides_in_elements(array)
    heads, tokens = LAYOUTS[layout]
    if strides[-1] != 1 and shape[-1] > 1:
        raise _wrong_strides(name, "an array whose last axis is contiguous", array)
    batch = _batch_stride(shape[:-3], strides[:-3])
    if batch is None:
        raise _wrong_strides(name, "an array whose leading axes are evenly spaced, as one batch axis", array)
    chosen = (batch, strides[heads] if shape[heads] > 1 else 0, strides[tokens] if shape[tokens] > 1 else 0)
    if 0 in shape:
        return View(array, chosen)
    elements = granule // ITEM_BYTES[dtype]
    if chosen[0] % elements or chosen[1] % elements or chosen[2] % elements:
        raise _wrong_strides(name, f"an array with strides that are multiples of {elements}", array)
    if address_of(array) % granule:
        way_out = f"call {name}.clone()" if is_torch(array) else "copy it first"
        raise ValueError(message(name, f"at an address that is a multiple of {granule}", "another", way_out))
    return View(array, chosen)


def address_of(array: Any) -> int:
    """Address of the first element; 0 on an emulated machine, whose arrays are all aligned."""
    if is_torch(array):
        return array.data_ptr()
    if isinstance(array, EmulatedArray):
        return 0
    interface = getattr(array, "__array_interface__", None) or array.__cuda_array_interface__
    return interface["data"][0]


def overlap(x: Any, y: Any) -> bool:
    """Whether the bytes from the first to the last of two arrays of one place meet."""
    if isinstance(x, EmulatedArray):
        return x is y
    (x_first, x_stop), (y_first, y_stop) = _extent(x), _extent(y)
    return max(x_first, y_first) < min(x_stop, y_stop)


def repeats_itself(array: Any) -> bool:
    """Whether two indices of the array may be one element, as in an expanded tensor."""
    reach = 0
    axes = zip(array.shape, strides_in_elements(array), strict=True)
    for stride, length in sorted((abs(stride), length) for length, stride in axes if length > 1):
        if stride <= reach:
            return 0 not in array.shape
        reach += stride * (length - 1)
    return False


def _extent(array: Any) -> tuple[int, int]:
    """Address of the first byte and of the one past the last; equal for an array without elements."""
    first = stop = address_of(array)
    if 0 in array.shape:
        return first, stop
    item = array.element_size() if is_torch(array) else array.dtype.itemsize
    for length, stride in zip(array.shape, strides_in_elements(array), strict=True):
        reach = (length - 1) * stride * item
        first, stop = first + min(reach, 0), stop + max(reach, 0)
    return first, stop + item


def _batch_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The one stride that steps through all leading axes in C order, or None."""
    if len(shape) == 1:
        return strides[0] if shape[0] > 1 else 0
    batch = expected = None
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length == 1:
            continue
        if batch is None:
            batch, expected = stride, stride * length
        elif stride != expected:
            return None
        else:
            expected *= length
    return batch or 0


def _wrong_strides(name: str, expected: str, array: Any) -> ValueError:
    if is_torch(array):
        way_out = f"call {name}.contiguous()"
    else:
        is_cupy = type(array).__module__.partition(".")[0] == "cupy"
        way_out = f"call cupy.ascontiguousarray({name})" if is_cupy else "copy it first"
    got = f"shape {tuple(array.shape)} with strides {tuple(strides_in_elements(array))} in elements"
    return ValueError(message(name, expected, got, way_out))
