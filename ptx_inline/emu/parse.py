"""PTX text to data: variables, registers and instructions of every entry, names resolved, nothing interpreted.

Source: PTX ISA, "Syntax", "State Spaces, Types, and Variables", "Instruction Operands".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from ptx_inline.emu.errors import UnsupportedPTX
from ptx_inline.emu.scalar_types import BITS, F32, TYPES

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|//[^\n]*|/\*.*?\*/)|(?P<newline>\n)|(?P<string>"[^"]*")
    |(?P<float>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)
    |(?P<int>(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?)
    |(?P<directive>\.[A-Za-z_]\w*(?:::\w+)*)
    |(?P<word>[%$_A-Za-z][\w$]*(?:(?:\.|::)[\w$]+)*)
    |(?P<mark>[{}\[\](),;:@!|+\-=<>])""",
    re.VERBOSE | re.DOTALL,
)
_SPECIALS = re.compile(
    r"%(?:n?tid|n?ctaid)\.[xyz]$|%(?:laneid|warpid|nwarpid|lanemask_(?:eq|lt|le|gt|ge)"
    r"|total_smem_size|dynamic_smem_size|clock|clock64|smid|gridid|globaltimer)$|WARP_SZ$"
)
# directives whose arguments matter to ptxas or a debugger only, and not to what is computed
_HINTS = {".maxntid", ".reqntid", ".minnctapersm", ".maxnreg", ".noreturn", ".pragma", ".maxclusterrank",
    ".blocksareclusters", ".explicitcluster", ".reqnctapercluster", ".abi_preserve", ".abi_preserve_control"}  # fmt: skip


@dataclass(frozen=True)
class Register:
    """A register operand: its row, the same for every use of one declaration; ``negated`` is ``!p``."""

    row: int
    name: str
    type: int
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or with ``kind`` ``"f"`` or ``"d"`` the bits of a float32 or float64."""

    value: int
    kind: str = "i"


@dataclass(frozen=True)
class Special:
    """A special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The name of a variable or a label, plus a constant."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Sink:
    """``_``: a result nobody wants."""


Operand = Register | Immediate | Special | Symbol | Address | Sink | tuple


@dataclass(frozen=True)
class Variable:
    """A declared variable or parameter: where it lives, its size in bytes (0 for ``[]``) and first content, if any.

    is_pointer: a parameter that says so (``.ptr``), which no floating-point number can be.
    """

    name: str
    space: str
    type: int
    size: int
    alignment: int
    content: bytes | None = None
    is_pointer: bool = False


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands;``; a vector operand or ``p|q`` is a tuple. ``line`` counts from 1."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    line: int


@dataclass
class Entry:
    """A kernel: parameters in order, its own variables, registers by row, instructions, where labels point, and the
    labels of each ``.branchtargets`` list."""

    name: str
    parameters: list[Variable]
    variables: list[Variable] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Module:
    """A PTX file: its target, its global, constant and external shared variables, its kernels, and its lines of text."""

    target: str
    variables: list[Variable]
    entries: list[Entry]
    lines: list[str]


def parse(text: str) -> Module:
    """Parse a PTX file. Raises ``UnsupportedPTX`` with the line for anything this module does not know."""
    return _Parser(text).module()


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise UnsupportedPTX(f"line {line}: cannot read {text[position : position + 20]!r}")
        kind, token, position = match.lastgroup, match.group(), match.end()
        if kind not in ("space", "newline"):
            yield kind, token, line
        line += token.count("\n")
    yield "end", "", line


class _Parser:
    def __init__(self, text: str):
        self.lines = text.splitlines()
        self.tokens = list(_tokens(text))
        self.at = 0
        self.scopes: list[dict[str, Register | str]] = []

    # tokens

    @property
    def token(self) -> str:
        return self.tokens[self.at][1]

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    @property
    def line(self) -> int:
        return self.tokens[self.at][2]

    def next(self) -> str:
        token = self.token
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        if self.token == token and self.kind != "end":
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.unknown(f"expected {token!r}, got {self.token!r}")

    def unknown(self, what: str) -> UnsupportedPTX:
        text = self.lines[self.line - 1].strip() if self.line <= len(self.lines) else "end of file"
        return UnsupportedPTX(f"line {self.line}: {what}: {text}")

    # module

    def module(self) -> Module:
        target, variables, entries = "", [], []
        while self.kind != "end":
            while self.token in (".visible", ".extern", ".weak", ".common"):
                self.next()
            if self.accept(".target"):
                target = self.next()
                while self.accept(","):
                    self.next()
            elif self.token in (".version", ".address_size"):
                self.next()
                self.next()
            elif self.accept(".entry"):
                entries.append(self.entry())
            elif self.token in (".global", ".const", ".shared"):
                variables += self.variable()
            elif self.token in (".file", ".section"):
                self.skip_debug()
            elif self.token in _HINTS:
                self.skip_hint()
            else:
                raise self.unknown("unsupported directive")
        return Module(target, variables, entries, self.lines)

    def skip_debug(self) -> None:
        if self.next() == ".file":
            line = self.line
            while self.line == line and self.kind != "end":
                self.next()
            return
        while self.next() != "{":
            pass
        while self.next() != "}":
            pass

    def skip_hint(self) -> None:
        self.next()
        while self.kind in ("int", "string") or self.token == ",":
            self.next()
        self.accept(";")

    def entry(self) -> Entry:
        entry = Entry(self.next(), [])
        if self.accept("("):
            while not self.accept(")"):
                entry.parameters += self.declaration()
                self.accept(",")
        while self.token in _HINTS:
            self.skip_hint()
        self.body(entry)
        return entry

    # declarations

    def variable(self) -> list[Variable]:
        variables = self.declaration()
        self.expect(";")
        return variables

    def declaration(self) -> list[Variable]:
        """``.space .align n .type name[n] = {...}, ...`` up to what ends it."""
        space = self.next().removeprefix(".").partition("::")[0]
        alignment, type, vector, is_pointer = 0, None, 1, False
        while self.kind == "directive":
            word = self.next()
            if word == ".align":
                alignment = int(self.next(), 0)
            elif word in (".v2", ".v4"):
                vector = int(word[2])
            elif word.removeprefix(".") in TYPES:
                type = TYPES[word.removeprefix(".")]
            elif word == ".ptr":
                is_pointer = True
            elif word not in (".global", ".shared", ".const", ".local"):
                raise self.unknown(f"unsupported {word} in a declaration")
        if type is None:
            raise self.unknown("declaration without a type")
        variables = []
        while True:
            name, count = self.next(), vector
            while self.accept("["):
                count = 0 if self.token == "]" else count * self.integer()
                self.expect("]")
            element = BITS[type] // 8
            content = self.initialiser(type, count * element) if self.accept("=") else None
            if is_pointer:  # .align is of what it points to
                alignment = 0
            alignment = max(alignment, element * vector)
            variables.append(Variable(name, space, type, count * element, alignment, content, is_pointer))
            if space == "param" or not self.accept(","):
                return variables

    def initialiser(self, type: int, size: int) -> bytes:
        values = []
        depth = 0
        while True:
            if self.accept("{"):
                depth += 1
            elif self.accept("}"):
                depth -= 1
            elif not (depth and self.accept(",")):
                operand = self.operand()
                if not isinstance(operand, Immediate):
                    raise self.unknown("unsupported initialiser")
                values.append(operand)
            if depth == 0:
                break
        width = BITS[type] // 8
        bits = [float32_bits(value.value) if value.kind == "d" and type == F32 else value.value for value in values]
        content = b"".join((value % (1 << 8 * width)).to_bytes(width, "little") for value in bits)
        return content.ljust(size, b"\0")

    def registers(self, entry: Entry) -> None:
        type = TYPES.get(self.next().removeprefix("."))
        if type is None:
            raise self.unknown("unsupported register type")
        while True:
            name = self.next()
            names = [name]
            if self.accept("<"):
                names = [f"{name}{number}" for number in range(self.integer())]
                self.expect(">")
            for each in names:
                register = Register(len(entry.registers), each, type)
                entry.registers.append(register)
                self.scopes[-1][each] = register
            if not self.accept(","):
                break
        self.expect(";")

    # code

    def body(self, entry: Entry) -> None:
        self.expect("{")
        self.scopes = [{}]
        while self.scopes:
            if self.accept("{"):
                self.scopes.append(self.inner_labels())
            elif self.accept("}"):
                self.scopes.pop()
            elif self.accept(".reg"):
                self.registers(entry)
            elif self.token in (".shared", ".local", ".param") or self.token.startswith(".shared::"):
                entry.variables += self.variable()
            elif self.accept(".loc"):
                line = self.tokens[self.at - 1][2]
                while self.line == line:
                    self.next()
            elif self.token in _HINTS:
                self.skip_hint()
            elif self.kind == "word" and self.tokens[self.at + 1][1] == ":":
                name = self.next()
                label = self.scopes[-1].get(name, name)
                entry.labels[label] = len(entry.instructions)
                self.expect(":")
                if self.accept(".branchtargets"):
                    entry.tables[label] = [self.target()]
                    while self.accept(","):
                        entry.tables[label].append(self.target())
                    self.expect(";")
            elif self.kind == "word" or self.token == "@":
                entry.instructions.append(self.instruction())
            elif not self.accept(";"):
                raise self.unknown("unsupported statement")

    def inner_labels(self) -> dict[str, Register | str]:
        """The labels of the scope that begins here, which branches before them may name already, each made unique."""
        labels, depth, at = {}, 1, self.at
        while depth and at + 1 < len(self.tokens):
            (kind, token, line), following = self.tokens[at], self.tokens[at + 1][1]
            depth += (token == "{") - (token == "}")
            if depth == 1 and kind == "word" and following == ":":
                labels[token] = f"{token}@{line}"
            at += 1
        return labels

    def target(self) -> str:
        """The label that a name means here."""
        found = self.name(self.next())
        if not isinstance(found, Symbol):
            raise self.unknown("expected a label")
        return found.name

    def instruction(self) -> Instruction:
        line, guard = self.line, None
        if self.accept("@"):
            negated = self.accept("!")
            found = self.name(self.next())
            if not isinstance(found, Register):
                raise self.unknown("guard is not a predicate")
            guard = Register(found.row, found.name, found.type, negated)
        opcode, operands = self.next(), []
        while not self.accept(";"):
            operands.append(self.operand())
            if self.accept("|"):
                operands[-1] = (operands[-1], self.operand())
            if not self.accept(",") and self.token != ";":
                raise self.unknown(f"cannot read {self.token!r}")
        return Instruction(opcode, tuple(operands), guard, line)

    def operand(self) -> Operand:
        if self.accept("{"):
            parts = []
            while not self.accept("}"):
                parts.append(self.operand())
                self.accept(",")
            return tuple(parts)
        if self.accept("["):
            base = self.operand()
            offset = self.integer() if self.token in ("+", "-") else 0
            self.expect("]")
            if isinstance(base, Symbol):
                return Address(Symbol(base.name, base.offset + offset), 0)
            return Address(base, offset)
        if self.accept("!"):
            found = self.name(self.next())
            if not isinstance(found, Register):
                raise self.unknown("expected a predicate after '!'")
            return Register(found.row, found.name, found.type, True)
        if self.kind in ("int", "float") or self.token == "-":
            return self.number()
        if self.kind == "word":
            found = self.name(self.next())
            if isinstance(found, Symbol) and self.token in ("+", "-") and self.tokens[self.at + 1][0] == "int":
                return Symbol(found.name, self.integer())
            return found
        raise self.unknown(f"cannot read {self.token!r}")

    def number(self) -> Immediate:
        negative = self.accept("-")
        kind, token = self.kind, self.next()
        if kind == "int":
            value = _integer(token)
            return Immediate(-value if negative else value)
        if kind != "float":
            raise self.unknown(f"expected a number, got {token!r}")
        if token[:2].lower() in ("0f", "0d"):
            value, letter = int(token[2:], 16), token[1].lower()
        else:
            value, letter = struct.unpack("<Q", struct.pack("<d", float(token)))[0], "d"
        return Immediate(value ^ (1 << (31 if letter == "f" else 63)) if negative else value, letter)

    def integer(self) -> int:
        """A signed integer; ``+`` may come before it."""
        self.accept("+")
        number = self.number()
        if number.kind != "i":
            raise self.unknown("expected an integer")
        return number.value

    def name(self, name: str) -> Operand:
        for scope in reversed(self.scopes):
            if name in scope:
                found = scope[name]
                return Symbol(found) if isinstance(found, str) else found
        if name == "_":
            return Sink()
        if _SPECIALS.match(name):
            return Special(name)
        if name.startswith("%"):
            raise self.unknown(f"unknown register {name}")
        return Symbol(name)


def float32_bits(bits: int) -> int:
    """Bits of the float32 nearest to a float64 that is given by its bits."""
    return struct.unpack("<I", struct.pack("<f", struct.unpack("<d", struct.pack("<Q", bits))[0]))[0]


def _integer(token: str) -> int:
    token = token.removesuffix("U")
    if len(token) > 1 and token[0] == "0" and token.isdigit():
        return int(token, 8)
    return int(token, 0)
