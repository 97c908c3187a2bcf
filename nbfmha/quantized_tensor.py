"""The container of a tensor of 4-bit codes and block scales, and the two block formats.

========  ==========  ====================  ==============================  =====================================
format    block size  scale format          value of an element             source
========  ==========  ====================  ==============================  =====================================
nvfp4     16          UE4M3                 E2M1 * UE4M3 * global scale     PTX ISA, mxf4nvf4 with scale_vec::4X
mxfp4     32          UE8M0                 E2M1 * UE8M0                    OCP Microscaling Formats 1.0, MXFP4
========  ==========  ====================  ==============================  =====================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nbfmha import scale_layouts
from nbfmha.validation import check_choice, check_head_dim, dtype_name, message
from ptx_inline.isa.formats import UE4M3, UE8M0, Format

AXES = ("head_dim", "tokens")
"""Along which axis of (..., tokens, head_dim) the elements of a block lie."""


@dataclass(frozen=True)
class BlockFormat:
    """A 4-bit block format: E2M1 codes, one scale for ``block_size`` neighbours along the blocked axis."""

    name: str
    block_size: int
    scale_format: Format
    has_global_scale: bool


BLOCK_FORMATS = {
    "nvfp4": BlockFormat("nvfp4", 16, UE4M3, has_global_scale=True),
    "mxfp4": BlockFormat("mxfp4", 32, UE8M0, has_global_scale=False),
}


def block_format(name: str) -> BlockFormat:
    """The format of this name; ``ValueError`` for an unknown one."""
    return BLOCK_FORMATS[check_choice("format", name, BLOCK_FORMATS)]


def storage_shapes(
    shape: tuple[int, ...], *, format: str = "nvfp4", axis: str = "head_dim", scale_layout: str = "linear"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``codes`` and ``scales`` (uint8 both) of a tensor of logical shape (..., tokens, head_dim).

    With L the blocked length and R the other one (stored as the rows), block size b and cols = ceil(L/b):
    codes (..., R, cols*b/2) and scales ``(..., *scale_layouts.array_shape(scale_layout, R, cols))``.
    Raises ``ValueError`` for an unknown name, a rank below 2 or a head_dim that is odd or 0.
    """
    block = block_format(format)
    check_choice("axis", axis, AXES)
    if len(shape) < 2:
        raise ValueError(message("shape", "(..., tokens, head_dim)", shape))
    *lead, tokens, head_dim = shape
    check_head_dim(head_dim)
    rows, length = (tokens, head_dim) if axis == "head_dim" else (head_dim, tokens)
    cols = -(-length // block.block_size)
    codes = (*lead, rows, cols * block.block_size // 2)
    return codes, (*lead, *scale_layouts.array_shape(scale_layout, rows, cols))


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Packed codes and scales of a tensor of logical ``shape`` (..., tokens, head_dim), in NVFP4 or MXFP4.

    Arrays may belong to any library (NumPy, torch, CuPy, ...), but all to the same one.

    codes         uint8, two E2M1 codes a byte, low nibble the even index. ``axis="head_dim"``: (..., tokens, P/2);
                  ``axis="tokens"``: the tensor is stored transposed, (..., head_dim, P/2). P is the blocked length rounded
                  up to the block size; codes in the padding are 0.
    scales        uint8 (UE4M3 or UE8M0) as ``nbfmha.scale_layouts`` says; padding is 0.
    global_scale  None, or one float32 (shape () or (1,)) by which every dequantised value is multiplied (decode direction).

    Raises ``TypeError`` for a wrong dtype or mixed array libraries, ``ValueError`` for a wrong name, shape or combination.
    """

    codes: Any
    scales: Any
    format: str
    axis: str
    scale_layout: str
    global_scale: Any
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(length) for length in self.shape))
        codes_shape, scales_shape = storage_shapes(
            self.shape, format=self.format, axis=self.axis, scale_layout=self.scale_layout
        )
        self._check_array("codes", self.codes, "uint8", (codes_shape,))
        self._check_array("scales", self.scales, "uint8", (scales_shape,))
        if self.global_scale is not None:
            if not block_format(self.format).has_global_scale:
                raise ValueError(message("global_scale", f"None for {self.format!r}", "an array"))
            self._check_array("global_scale", self.global_scale, "float32", ((), (1,)))

    def _check_array(self, name: str, array: Any, dtype: str, shapes: tuple[tuple[int, ...], ...]) -> None:
        if not hasattr(array, "shape") or dtype_name(array) != dtype:
            got = f"{type(array).__name__} of dtype {dtype_name(array)}"
            raise TypeError(message(name, f"an array of dtype {dtype}", got))
        if tuple(array.shape) not in shapes:
            layout = f"{self.format}, axis={self.axis!r}, scale_layout={self.scale_layout!r}"
            expected = f"of shape {' or '.join(map(str, shapes))} for a tensor of shape {self.shape} ({layout})"
            raise ValueError(message(name, expected, tuple(array.shape)))
        if _library(array) != _library(self.codes):
            raise TypeError(message(name, f"an array of {_library(self.codes)}, as codes is", _library(array)))

    def with_arrays(self, convert: Callable[[Any], Any]) -> QuantizedTensor:
        """The same tensor with ``convert(array)`` in place of each array, say to move it to another library."""
        g = None if self.global_scale is None else convert(self.global_scale)
        return replace(self, codes=convert(self.codes), scales=convert(self.scales), global_scale=g)

    @property
    def block_format(self) -> BlockFormat:
        """The descriptor of ``format``."""
        return block_format(self.format)

    @property
    def block_size(self) -> int:
        """Elements that share a scale: 16 or 32."""
        return self.block_format.block_size

    @property
    def scale_format(self) -> Format:
        """UE4M3 or UE8M0."""
        return self.block_format.scale_format

    @property
    def rows(self) -> int:
        """Rows of the stored matrix: tokens when blocks lie along head_dim, head_dim when along tokens."""
        return self.shape[-2] if self.axis == "head_dim" else self.shape[-1]

    @property
    def blocked_length(self) -> int:
        """Logical length of the axis along which blocks lie."""
        return self.shape[-1] if self.axis == "head_dim" else self.shape[-2]

    @property
    def cols(self) -> int:
        """Scale columns: blocks in a row, the last of them possibly padded."""
        return -(-self.blocked_length // self.block_size)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and global scale, padding included."""
        return math.prod(self.codes.shape) + math.prod(self.scales.shape) + 4 * (self.global_scale is not None)

    @property
    def bits_per_element(self) -> float:
        """Stored bits for each logical element, padding included: 4.5 for NVFP4 without padding; 0 for no elements."""
        elements = math.prod(self.shape)
        return 8 * self.nbytes / elements if elements else 0.0


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]
