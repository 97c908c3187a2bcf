"""The same operand layouts as CUTLASS's CuTe writes them: a second, independent description to hold ours against.

A CuTe layout is a pair of nested tuples, shape and stride. An index is split over the shape first mode first ("column
major"), and the offset is the sum of coordinates times strides. Shapes below are (thread, value); the offset names an
element of the operand as **column major too: offset = col * rows + row**, with rows = M for A and C and rows = N for B.
Reading it row major compiles, runs and gives wrong products: see
:func:`ptx_inline.isa.fragments.wrong_row_major_fragment`.

Source: CUTLASS, include/cute/atom/mma_traits_sm120.hpp (8-bit and block-scaled), mma_traits_sm80.hpp (16-bit, C).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CuteLayout:
    """A (thread, value) layout; ``shape`` and ``stride`` are nested tuples of the same structure."""

    shape: tuple
    stride: tuple

    def offsets(self) -> np.ndarray:
        """Offset of every (thread, value): int64 (threads, values)."""
        threads = mode_offsets(self.shape[0], self.stride[0])
        values = mode_offsets(self.shape[1], self.stride[1])
        return threads[:, None] + values[None, :]


def mode_offsets(shape, stride) -> np.ndarray:
    """Offsets of all indices of one mode, in order: the first part of a nested mode runs fastest."""
    if isinstance(shape, int):
        return np.arange(shape) * stride
    result = np.zeros(1, np.int64)
    for part_shape, part_stride in zip(shape, stride, strict=True):
        part = mode_offsets(part_shape, part_stride)
        result = (part[:, None] + result[None, :]).reshape(-1)
    return result


_C = CuteLayout(((4, 8), (2, 2)), ((32, 1), (16, 8)))
_BITS_4 = {
    "A": CuteLayout(((4, 8), (8, 2, 2)), ((128, 1), (16, 8, 512))),
    "B": CuteLayout(((4, 8), (8, 2)), ((64, 1), (8, 256))),
    "C": _C,
}
_BITS_8 = {
    "A": CuteLayout(((4, 8), (4, 2, 2)), ((64, 1), (16, 8, 256))),
    "B": CuteLayout(((4, 8), (4, 2)), ((32, 1), (8, 128))),
    "C": _C,
}
_BITS_16 = {
    "A": CuteLayout(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
    "B": CuteLayout(((4, 8), (2, 2)), ((16, 1), (8, 64))),
    "C": _C,
}
#: Layouts of A, B and C by the bits of an element of A and B.
LAYOUTS = {4: _BITS_4, 8: _BITS_8, 16: _BITS_16}


def scale_layouts(k: int) -> dict[str, CuteLayout]:
    """Layouts of SFA and SFB for an MMA of depth ``k``.

    Each lane has one value for each *element* of k (those of a block are the same byte), and lanes that differ in a
    mode of stride 0 hold copies, of which the thread selector picks one.
    """
    return {
        "SFA": CuteLayout(((2, 2, 8), k), ((8, 0, 1), 16)),
        "SFB": CuteLayout(((4, 8), k), ((0, 1), 8)),
    }
