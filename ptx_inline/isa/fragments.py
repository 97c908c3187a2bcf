"""Fragment maps: which lane, register and bit holds which element of an MMA's operand. The only home of the formulas.

With ``group_id = lane >> 2`` and ``thread_in_group = lane & 3``, elements of ``w`` bits, ``v = 32 / w`` of them in a
register, and ``i = 0 .. v - 1`` the place in the register, lowest bits first:

=======  =============================================================================================================
operand  row, column of the matrix as stored
=======  =============================================================================================================
A        (M, K): register r: ``row = group_id + 8 (r & 1)``, ``k = v thread_in_group + i + 4 v (r >> 1)``
B        (N, K), "col" in the mnemonic: register r: ``n = group_id``, ``k = v thread_in_group + i + 4 v r``
C, D     (M, N), 32 bits: register r: ``row = group_id + 8 (r >> 1)``, ``n = 2 thread_in_group + (r & 1)``
SFA      (M, K / sf_vec_size), bytes ``byte_id ...``: lanes with ``thread_in_group >> 1 == thread_id``,
         ``row = group_id + 8 (thread_in_group & 1)``
SFB      (N, K / sf_vec_size), bytes ``byte_id ...``: lanes with ``thread_in_group == thread_id``, ``n = group_id``
=======  =============================================================================================================

One formula serves the 4, 8 and 16-bit MMAs: an A or B register always covers 32 bits of k. Sources: PTX ISA, "Matrix
Fragments for mma.m16n8k64 / m16n8k32 / m16n8k16" and "Block Scaling for mma.sync"; the tests hold the maps against
:mod:`ptx_inline.isa.cute`. 8-bit containers of the f8f6f4 kinds: :func:`ptx_inline.isa.arithmetic.to_containers`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ptx_inline.isa.cute import LAYOUTS
from ptx_inline.isa.instructions import Instruction, instruction

WARP_SIZE = 32
REGISTER_BITS = 32
OPERANDS = ("A", "B", "C", "SFA", "SFB")


@dataclass(frozen=True, eq=False)
class Fragment:
    """The map of one operand; arrays are read-only.

    Attributes:
        mma: key in ``INSTRUCTIONS``.
        operand: "A", "B", "C" (and D), "SFA" or "SFB".
        shape: (rows, cols) of the matrix as stored: A (M, K), B (N, K), C (M, N), SFA (M, scales), SFB (N, scales).
        element_bits: bits of an element in a register.
        registers: 32-bit registers a lane.
        row, col: int (32, values): the element that value ``v`` of a lane is; -1 in lanes that are not read.
        register, bit: int (values,): where value ``v`` lies: register, and its lowest bit there.
    """

    mma: str
    operand: str
    shape: tuple[int, int]
    element_bits: int
    registers: int
    row: np.ndarray
    col: np.ndarray
    register: np.ndarray
    bit: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """Dtype of a matrix of codes: uint8 up to 8 bits, then uint16 and uint32."""
        return np.dtype(np.uint8 if self.element_bits <= 8 else f"u{self.element_bits // 8}")

    def pack(self, matrix: np.ndarray, *, fill: int = 0) -> np.ndarray:
        """Registers uint32 (..., 32, registers) of a matrix of codes or bit patterns (..., rows, cols).

        fill: 32-bit word found wherever no element lies (lanes and bytes of a scale register that are not read).
        Raises ``TypeError`` for a matrix that is not of integers, ``ValueError`` for another shape or a code that does
        not fit the element.
        """
        matrix = np.asarray(matrix)
        if matrix.dtype.kind not in "ui":
            raise TypeError(f"matrix must hold integer bit patterns, got {matrix.dtype}; use .view(np.uint32)")
        if matrix.shape[-2:] != self.shape:
            raise ValueError(f"matrix must have the shape (..., {self.shape[0]}, {self.shape[1]}), got {matrix.shape}")
        if matrix.size and (int(matrix.max()) >> self.element_bits or int(matrix.min()) < 0):
            raise ValueError(f"matrix must hold codes of {self.element_bits} bits, got {matrix.max()}")
        batch = matrix.shape[:-2]
        flat = matrix.reshape(*batch, self.shape[0] * self.shape[1])
        result = np.full((*batch, WARP_SIZE, self.registers), fill, np.uint32)
        lanes = np.flatnonzero(self.row[:, 0] >= 0)
        held = np.zeros(self.registers, np.uint32)
        words = np.zeros((*batch, lanes.size, self.registers), np.uint32)
        source = (self.row * self.shape[1] + self.col)[lanes]
        for value, (register, bit) in enumerate(zip(self.register, self.bit, strict=True)):
            words[..., register] |= flat[..., source[:, value]].astype(np.uint32) << np.uint32(bit)
            held[register] |= np.uint32(((1 << self.element_bits) - 1) << int(bit))
        result[..., lanes, :] = (result[..., lanes, :] & ~held) | words
        return result

    def unpack(self, registers: np.ndarray) -> np.ndarray:
        """The matrix (..., rows, cols), of :attr:`dtype`, that registers uint32 (..., 32, registers) hold.

        Raises ``TypeError`` for another dtype than uint32 and ``ValueError`` for another shape.
        """
        registers = np.asarray(registers)
        if registers.dtype != np.uint32:
            raise TypeError(f"registers must be of dtype uint32, got {registers.dtype}; use .view(np.uint32)")
        if registers.shape[-2:] != (WARP_SIZE, self.registers):
            raise ValueError(f"registers must have the shape (..., 32, {self.registers}), got {registers.shape}")
        batch = registers.shape[:-2]
        words = registers[..., self.register] >> self.bit.astype(np.uint32)
        values = (words & np.uint32((1 << self.element_bits) - 1)).astype(self.dtype)
        values = values.reshape(*batch, WARP_SIZE * self.register.size)
        return values[..., self._source].reshape(*batch, *self.shape)

    @functools.cached_property
    def _source(self) -> np.ndarray:
        """Index into the (32, values) values of each element (rows * cols)."""
        lane, value = np.nonzero(self.row >= 0)
        source = np.full(self.shape[0] * self.shape[1], -1)
        source[self.row[lane, value] * self.shape[1] + self.col[lane, value]] = lane * self.register.size + value
        return source

    def owners(self) -> np.ndarray:
        """How many lanes hold each element: int (rows, cols)."""
        count = np.zeros(self.shape, np.int64)
        held = self.row >= 0
        np.add.at(count, (self.row[held], self.col[held]), 1)
        return count


@functools.cache
def fragment(mma: str, operand: str, *, byte_id: int = 0, thread_id: int = 0) -> Fragment:
    """The fragment map of an operand.

    mma: key in ``INSTRUCTIONS``; operand: "A", "B", "C" (D is the same), "SFA" or "SFB"; byte_id, thread_id: scale
    selectors of SFA and SFB. Raises ``ValueError`` for an unknown name, for scales of an MMA without them and for a
    selector that the instruction does not take.
    """
    description = instruction(mma)
    if operand not in OPERANDS:
        raise ValueError(f"operand must be one of {', '.join(OPERANDS)}, got {operand!r}")
    lane = np.arange(WARP_SIZE)[:, None]
    group_id, thread_in_group = lane >> 2, lane & 3
    if operand in ("SFA", "SFB"):
        return _scale_fragment(description, operand, byte_id, thread_id, group_id, thread_in_group)
    if (byte_id, thread_id) != (0, 0):
        raise ValueError(f"byte_id and thread_id select scales; operand {operand} has none, got {byte_id}, {thread_id}")
    m, n, k = description.shape
    bits = REGISTER_BITS if operand == "C" else description.element_bits
    registers = description.registers[operand.lower()]
    per_register = REGISTER_BITS // bits
    register, place = np.divmod(np.arange(registers * per_register), per_register)
    if operand == "A":
        shape = (m, k)
        row = group_id + 8 * (register & 1)
        col = per_register * thread_in_group + place + 4 * per_register * (register >> 1)
    elif operand == "B":
        shape = (n, k)
        row = group_id + 0 * register
        col = per_register * thread_in_group + place + 4 * per_register * register
    else:
        shape = (m, n)
        row = group_id + 8 * (register >> 1)
        col = 2 * thread_in_group + (register & 1)
    return _make(mma, operand, shape, bits, registers, row, col, register, place * bits)


def _scale_fragment(
    description: Instruction, operand: str, byte_id: int, thread_id: int, group_id: np.ndarray, thread: np.ndarray
) -> Fragment:
    if not description.sf_vec_size:
        raise ValueError(f"operand must be one of A, B, C for {description.key}, which has no scales, got {operand!r}")
    thread_ids = description.thread_ids_a if operand == "SFA" else description.thread_ids_b
    for name, value, allowed in (("byte_id", byte_id, description.byte_ids), ("thread_id", thread_id, thread_ids)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed} for {operand} of {description.key}, got {value}")
    m, n, _ = description.shape
    scales = description.scales_per_row
    if operand == "SFA":
        rows, row, read = m, group_id + 8 * (thread & 1), (thread >> 1) == thread_id
    else:
        rows, row, read = n, group_id, thread == thread_id
    place = np.arange(scales)
    row, col = np.where(read, row, -1) + 0 * place, np.where(read, place, -1)
    return _make(description.key, operand, (rows, scales), 8, 1, row, col, 0 * place, 8 * (byte_id + place))


@functools.cache
def wrong_row_major_fragment(mma: str, operand: str) -> Fragment:
    """A counter-example: the CuTe offsets of :mod:`ptx_inline.isa.cute` read row major (offset = row * cols + col).

    The maps are bijections, so all-ones inputs still give K everywhere. But a lane's A registers of m16n8k64 then hold
    rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 with t = thread_in_group, whatever its group: each row of the product mixes
    all rows of A, each column all columns of B. :func:`ptx_inline.isa.patterns.col_indicator` becomes 112 in every
    column, which is what an RTX 5090 printed for a kernel with this packing.

    operand: "A", "B" or "C"; raises ``ValueError`` for another one or an unknown mma.
    """
    if operand not in ("A", "B", "C"):
        raise ValueError(f"operand must be one of A, B, C, got {operand!r}")
    right = fragment(mma, operand)
    row, col = np.divmod(LAYOUTS[instruction(mma).element_bits][operand].offsets(), right.shape[1])
    return _make(mma, operand, right.shape, right.element_bits, right.registers, row, col, right.register, right.bit)


def _make(mma, operand, shape, element_bits, registers, row, col, register, bit) -> Fragment:
    arrays = [np.ascontiguousarray(array, np.int64) for array in (row, col, register, bit)]
    for array in arrays:
        array.setflags(write=False)
    return Fragment(mma, operand, shape, element_bits, registers, *arrays)
