"""Instructions to rows of numbers: what an opcode's modifiers mean, checked to the last one, is decided here, once.

Each family of opcodes has a module of decoders (``opcodes_arithmetic``, ``opcodes_memory``, ``opcodes_warp``); this one
holds what they share. A modifier that nobody took is an ``UnsupportedPTX``, never ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from ptx_inline.emu import encoding as enc
from ptx_inline.emu.errors import UnsupportedPTX
from ptx_inline.emu.parse import Address, Immediate, Instruction, Operand, Register, Sink, Special, Symbol, float32_bits
from ptx_inline.emu.scalar_types import BITS, F32, PRED, TYPES

MODULE_BASE = 1 << 32  # of global buffer 0, which holds the module's variables


class Modifiers:
    """The parts of an opcode after the first; each decoder takes what it knows."""

    def __init__(self, opcode: str):
        self.base, *self.rest = opcode.split(".")

    def take(self, *options: str, default: str | None = None) -> str | None:
        """Remove and return the first part that is one of ``options``."""
        for number, part in enumerate(self.rest):
            if part in options:
                return self.rest.pop(number)
        return default

    def drop(self, *options: str) -> None:
        """Remove all parts that are one of ``options``: they do not change what is computed."""
        self.rest = [part for part in self.rest if part not in options]

    def type(self) -> int | None:
        """Remove and return the first part that names a type."""
        name = self.take(*TYPES)
        return None if name is None else TYPES[name]


@dataclass(frozen=True)
class Place:
    """Where a variable lies: its state space, its address there and its size."""

    space: int
    address: int
    size: int


@dataclass
class Decoder:
    """One kernel's rows in the making.

    Attributes:
        places: variables by name.
        rows: the register file: registers first, then constants and special registers.
        presets, specials: value of each constant row, code of each special row.
        code, lists: the instructions, and the operand rows of vector operands.
        mmas: (key, A, B, scale format) of each MMA in use, in the order of its index.
    """

    lines: list[str]
    places: dict[str, Place]
    rows: int
    presets: dict[int, int] = field(default_factory=dict)
    specials: dict[int, int] = field(default_factory=dict)
    code: list[list[int]] = field(default_factory=list)
    lists: list[int] = field(default_factory=list)
    mmas: list[tuple] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    _known: dict[tuple, int] = field(default_factory=dict)
    _instruction: Instruction | None = None

    def decode(self, instruction: Instruction) -> None:
        """Append the row of one instruction. Raises ``UnsupportedPTX`` naming it and its line."""
        self._instruction = instruction
        modifiers = Modifiers(instruction.opcode)
        decoder = DECODERS.get(modifiers.base)
        if decoder is None:
            raise self.unsupported("unknown instruction")
        try:
            inspect.signature(decoder).bind(self, modifiers, *instruction.operands)
        except TypeError:
            raise self.unsupported("wrong number of operands") from None
        rows = len(self.code)
        decoder(self, modifiers, *instruction.operands)
        if modifiers.rest:
            raise self.unsupported(f"unknown modifier .{modifiers.rest[0]}")
        if len(self.code) != rows + 1:
            raise self.unsupported("operands do not fit")

    def unsupported(self, what: str) -> UnsupportedPTX:
        """The error for the instruction at hand."""
        line = self._instruction.line
        return UnsupportedPTX(f"line {line}: {what}: {self.lines[line - 1].strip()}")

    def emit(self, kind: int, **columns: int) -> None:
        """Append a row: columns by their names in :mod:`ptx_inline.emu.encoding`, in lower case; rows default to none."""
        row = [0] * enc.COLUMNS
        for column in (enc.GUARD, enc.DST, enc.DST2, enc.A, enc.B, enc.C, enc.D):
            row[column] = enc.NO_ROW
        row[enc.KIND], row[enc.LINE] = kind, self._instruction.line
        guard = self._instruction.guard
        if guard is not None:
            row[enc.GUARD], row[enc.GUARD_NEGATED] = guard.row, int(guard.negated)
        for name, value in columns.items():
            row[getattr(enc, name.upper())] = value
        self.code.append(row)

    @property
    def opcode(self) -> str:
        """The full opcode of the instruction at hand."""
        return self._instruction.opcode

    # operands

    def destination(self, operand: Operand) -> int:
        """Row of a result; none for ``_``."""
        if isinstance(operand, Sink):
            return enc.NO_ROW
        if not isinstance(operand, Register):
            raise self.unsupported("destination is not a register")
        return operand.row

    def pair(self, operand: Operand) -> tuple[int, int]:
        """Rows of ``d`` or ``d|p``."""
        if isinstance(operand, tuple):
            return self.destination(operand[0]), self.destination(operand[1])
        return self.destination(operand), enc.NO_ROW

    def register(self, operand: Operand, bits: int) -> int:
        """Row of an operand that must be a register of so many bits."""
        if not isinstance(operand, Register) or BITS[operand.type] != bits:
            raise self.unsupported(f"expected a register of {bits} bits")
        return operand.row

    def source(self, operand: Operand, type: int) -> int:
        """Row of a value of ``type``: register, constant, special register or a variable's address."""
        if isinstance(operand, Register):
            if operand.negated:
                raise self.unsupported("unexpected '!'")
            return operand.row
        if isinstance(operand, Immediate):
            return self.constant(self.immediate(operand, type))
        if isinstance(operand, Special):
            if operand.name in enc.CLOCKS:
                raise self.unsupported("a clock can only be moved to a register")
            return self._row(("special", operand.name), self.specials, enc.SPECIALS[operand.name])
        if isinstance(operand, Symbol):
            return self.constant(self.place(operand).address + operand.offset)
        raise self.unsupported("unsupported operand")

    def predicate(self, operand: Operand) -> tuple[int, int]:
        """Row of a predicate, and whether it is negated."""
        if isinstance(operand, Register):
            return operand.row, int(operand.negated)
        if isinstance(operand, Immediate):
            return self.constant(int(operand.value != 0)), 0
        raise self.unsupported("expected a predicate")

    def immediate(self, operand: Immediate, type: int) -> int:
        """Bits of a constant in ``type``."""
        value = operand.value
        if type == F32 and operand.kind == "d":
            value = float32_bits(value)
        if type == PRED:
            return int(value != 0)
        return value % (1 << BITS[type])

    def literal(self, operand: Operand) -> int:
        """An operand that must be an integer constant."""
        if not isinstance(operand, Immediate) or operand.kind != "i":
            raise self.unsupported("expected an integer constant")
        return operand.value

    def constant(self, bits: int) -> int:
        """Row that holds ``bits``."""
        return self._row(("constant", bits), self.presets, bits)

    def vector(self, operand: Operand, type: int, *, destination: bool = False) -> tuple[int, int]:
        """Where a vector operand's rows begin in the lists, and how many they are; a scalar is a vector of one."""
        parts = operand if isinstance(operand, tuple) else (operand,)
        start = len(self.lists)
        self.lists += [self.destination(part) if destination else self.source(part, type) for part in parts]
        return start, len(parts)

    def place(self, symbol: Symbol) -> Place:
        """The variable of this name."""
        if symbol.name not in self.places:
            raise self.unsupported(f"unknown name {symbol.name}")
        return self.places[symbol.name]

    def address(self, operand: Operand, space: int) -> dict[str, int]:
        """Columns of ``[base + offset]`` in a state space."""
        if not isinstance(operand, Address):
            raise self.unsupported("expected an address")
        base = operand.base
        if isinstance(base, Register):
            return {"a": base.row, "offset": operand.offset, "space": space}
        if isinstance(base, Symbol):
            place = self.place(base)
            if enc.GENERIC not in (space, place.space) and place.space != space:
                raise self.unsupported(f"{base.name} is not in this state space")
            return {"a": self.constant(0), "offset": place.address + base.offset + operand.offset, "space": place.space}
        if isinstance(base, Immediate):
            return {"a": self.constant(0), "offset": base.value + operand.offset, "space": space}
        raise self.unsupported("unsupported address")

    def shared_address(self, operand: Operand) -> dict[str, int]:
        """Columns of an address that must be in shared memory."""
        columns = self.address(operand, enc.SHARED)
        if columns["space"] != enc.SHARED:
            raise self.unsupported("expected an address in shared memory")
        return columns

    def target(self, operand: Operand) -> int:
        """Index of the instruction that a label names."""
        if not isinstance(operand, Symbol) or operand.name not in self.labels:
            raise self.unsupported("unknown label")
        return self.labels[operand.name]

    def _row(self, key: tuple, table: dict[int, int], value: int) -> int:
        if key not in self._known:
            self._known[key] = self.rows
            table[self.rows] = value
            self.rows += 1
        return self._known[key]


#: First part of an opcode -> function of the decoder, the other parts and the operands.
DECODERS: dict[str, Callable] = {}


def decoder(*names: str):
    """Register a decoder for opcodes that begin with one of ``names``."""

    def add(function: Callable) -> Callable:
        for name in names:
            DECODERS[name] = function
        return function

    return add


SPACE_NAMES = {
    "global": enc.GLOBAL, "const": enc.GLOBAL, "shared": enc.SHARED, "shared::cta": enc.SHARED, "local": enc.LOCAL,
    "param": enc.PARAM, "param::entry": enc.PARAM,
}  # fmt: skip


def space_of(modifiers: Modifiers) -> int:
    """The state space that an opcode names, else generic."""
    name = modifiers.take(*SPACE_NAMES)
    return enc.GENERIC if name is None else SPACE_NAMES[name]

