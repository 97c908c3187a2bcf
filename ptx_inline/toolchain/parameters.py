"""Arguments of launches as the driver takes them: an array of pointers, one to each argument.

The memory that they point to is used again: one ``struct`` call writes all that a launch gives, in about 1 us for 36
arguments.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ptx_inline.types import is_pointer

_CELL = 8
_FORMATS = {"i32": "i4x", "i64": "q", "u8": "B7x", "u16": "H6x", "u32": "I4x", "u64": "Q", "f32": "f4x", "f64": "d"}
"""Of an argument in a cell of 8 bytes."""


@dataclass(frozen=True)
class Placeholder:
    """Stands for an address that each launch gives: the ``index``-th of its addresses."""

    index: int


class Memory:
    """What one launch writes, and the pointers to its arguments; the driver reads them before the launch returns."""

    def __init__(self, size: int, pointers: Sequence[tuple[bool, int]], fixed: int):
        """pointers: of each argument whether it is fixed, and its offset; fixed: address of what is."""
        self.given = ctypes.create_string_buffer(max(size, 1))
        first = ctypes.addressof(self.given)
        self._pointers = (ctypes.c_void_p * len(pointers))(
            *(offset + (fixed if is_fixed else first) for is_fixed, offset in pointers)
        )
        self.address = ctypes.addressof(self._pointers)


class Parameters:
    """The parameters of a kernel: those that are fixed, and those that each launch gives.

    Args:
        signature: argument types, see :mod:`ptx_inline.types`.
        arguments: of each parameter a number that its type holds, or a ``Placeholder`` for a pointer. None: launches give
            all arguments.
        addresses: how many a launch gives for the placeholders.

    Raises ``TypeError`` for a placeholder of a number, ``ValueError`` for one without an address.
    """

    def __init__(
        self, signature: Sequence[str], arguments: Sequence[int | float | Placeholder] | None = None, addresses: int = 0
    ):
        every = ["P" if is_pointer(kind) else _FORMATS[kind] for kind in signature]
        given, fixed = every if arguments is None else ["P"] * addresses, b""
        self._pointers = [(False, _CELL * place) for place in range(len(every))]
        if arguments is not None:
            numbers = []
            for place, (kind, argument) in enumerate(zip(signature, arguments, strict=True)):
                late = isinstance(argument, Placeholder)
                if late and not is_pointer(kind):
                    raise TypeError(f"argument {place} must be a number for {kind!r}, got a placeholder of an address")
                if late and not 0 <= argument.index < addresses:
                    raise ValueError(f"argument {place} must be one of {addresses} addresses, got {argument}")
                numbers.append(0 if late else argument)
                self._pointers[place] = not late, _CELL * (argument.index if late else place)
            fixed = struct.pack("@" + "".join(every), *numbers)
        self._fixed = ctypes.create_string_buffer(fixed, max(len(fixed), 1))
        self._struct = struct.Struct("@" + "".join(given))
        self._free: list[Memory] = []

    def write(self, values: Sequence[int | float]) -> Memory:
        """Memory that holds the arguments of one launch; nobody else's before it is given to ``release``.

        values: what launches give, each in its type's range.
        """
        try:
            memory = self._free.pop()  # by one thread alone
        except IndexError:
            memory = Memory(self._struct.size, self._pointers, ctypes.addressof(self._fixed))
        self._struct.pack_into(memory.given, 0, *values)
        return memory

    def release(self, memory: Memory) -> None:
        """The launch is queued: others may use the memory."""
        self._free.append(memory)

