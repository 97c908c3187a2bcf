"""A kernel ready to run: variables placed, blocks in order, instructions as rows of numbers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ptx_inline.emu import encoding as enc

# the decoders register themselves
from ptx_inline.emu import opcodes_arithmetic, opcodes_memory, opcodes_warp  # noqa: F401
from ptx_inline.emu.decode import MODULE_BASE, Decoder, Place
from ptx_inline.emu.errors import UnsupportedPTX
from ptx_inline.emu.flow import weak_topological_order
from ptx_inline.emu.parse import Entry, Instruction, Module, Register, Symbol, Variable, parse

_SPACES = {"global": enc.GLOBAL, "const": enc.GLOBAL, "shared": enc.SHARED, "local": enc.LOCAL, "param": enc.PARAM}
_ENDS = ("ret", "exit", "trap")


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter: its name and type, where it lies in parameter space and how many bytes it has."""

    name: str
    type: int
    offset: int
    size: int
    is_pointer: bool = False


@dataclass(frozen=True, eq=False)
class Program:
    """One kernel for the compiled core.

    Attributes:
        name: the entry's. lines: the PTX text. target: e.g. "sm_120a".
        code: int64 (rows, ``encoding.COLUMNS``). lists: int64, rows of vector operands and targets of indexed branches.
        registers: by name, those of the kernel's outermost scope winning over inner ones of the same name.
        rows: of the register file. presets: uint64 (rows), constants in their places. specials: int64 (n, 2): row, code.
        parameters, parameter_bytes: of the kernel. module_bytes: first content of global buffer 0.
        shared_bytes, dynamic_shared: static shared memory, and where the dynamic part begins. local_bytes: of a thread.
        mmas: (key, A, B, scale format) by index.
        shares_global: has atomics or ordered accesses to global memory, through which CTAs may talk to each other.
    """

    name: str
    target: str
    lines: list[str]
    code: np.ndarray
    lists: np.ndarray
    registers: dict[str, Register]
    rows: int
    presets: np.ndarray
    specials: np.ndarray
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    module_bytes: bytes
    shared_bytes: int
    dynamic_shared: int
    local_bytes: int
    mmas: tuple[tuple, ...]
    shares_global: bool

    def text(self, line: int) -> str:
        """The PTX text of a line, from 1."""
        return self.lines[line - 1].strip() if 0 < line <= len(self.lines) else ""


@functools.lru_cache(64)
def load(ptx: str, entry: str | None = None) -> Program:
    """The program of a PTX text's kernel; ``entry`` names it where there are several.

    Raises ``UnsupportedPTX`` for an instruction, directive or operand that the emulator does not know, ``ValueError`` for
    an entry that the text does not have.
    """
    module = parse(ptx)
    names = [found.name for found in module.entries]
    if entry is None and len(names) == 1:
        entry = names[0]
    if entry not in names:
        raise ValueError(f"entry must be one of {', '.join(names) or 'no kernels'}, got {entry!r}")
    return _program(module, module.entries[names.index(entry)])


def _program(module: Module, entry: Entry) -> Program:
    places, sizes, content, dynamic = _place(module.variables, entry)
    blocks, successors = _blocks(entry, module.lines)
    order = weak_topological_order(successors)
    labels, positions = _layout(entry, blocks, successors, order)
    decode = Decoder(
        lines=module.lines, places=places, rows=len(entry.registers), labels=labels, tables=entry.tables
    )
    for number, block in enumerate(order):
        first, end = blocks[block]
        for instruction in entry.instructions[first:end]:
            decode.decode(instruction)
        target = _jump(entry, blocks, successors, order, number)
        if target is not None:
            decode.emit(enc.JUMP, aux=positions[target], guard=enc.NO_ROW)
    presets = np.zeros(decode.rows, np.uint64)
    for row, value in decode.presets.items():
        presets[row] = value
    code = np.array(decode.code, np.int64).reshape(-1, enc.COLUMNS)
    registers: dict[str, Register] = {}
    for register in entry.registers:
        registers.setdefault(register.name, register)
    kinds, spaces, flags = code[:, enc.KIND], code[:, enc.SPACE], code[:, enc.FLAGS]
    memory = np.isin(kinds, (enc.LOAD, enc.STORE, enc.ATOMIC)) & (spaces != enc.SHARED)
    return Program(
        name=entry.name,
        target=module.target,
        lines=module.lines,
        code=code,
        lists=np.array([*decode.lists, 0], np.int64),
        registers=registers,
        rows=decode.rows,
        presets=presets,
        specials=np.array(sorted(decode.specials.items()), np.int64).reshape(-1, 2),
        parameters=tuple(
            Parameter(each.name, each.type, places[each.name].address, each.size, each.is_pointer)
            for each in entry.parameters
        ),
        parameter_bytes=sizes[enc.PARAM],
        module_bytes=content,
        shared_bytes=sizes[enc.SHARED],
        dynamic_shared=dynamic,
        local_bytes=sizes[enc.LOCAL],
        mmas=tuple(decode.mmas),
        shares_global=bool(np.any(memory & (flags & enc.STRONG != 0))),
    )


def _place(module_variables: list[Variable], entry: Entry) -> tuple[dict[str, Place], dict[int, int], bytes, int]:
    """Every variable's place, the bytes of each space, the module's content, and where dynamic shared memory begins."""
    places: dict[str, Place] = {}
    sizes = dict.fromkeys((enc.GLOBAL, enc.SHARED, enc.LOCAL, enc.PARAM), 0)
    content = bytearray()
    unsized = []
    for variable in (*module_variables, *entry.parameters, *entry.variables):
        space = _SPACES[variable.space]
        if space == enc.SHARED and variable.size == 0:
            unsized.append(variable)
            continue
        offset = -(-sizes[space] // variable.alignment) * variable.alignment
        sizes[space] = offset + variable.size
        base = MODULE_BASE if space == enc.GLOBAL else 0
        places[variable.name] = Place(space, base + offset, variable.size)
        if space == enc.GLOBAL:
            content += bytes(offset - len(content)) + (variable.content or bytes(variable.size))
    alignment = max((variable.alignment for variable in unsized), default=16)
    dynamic = -(-sizes[enc.SHARED] // alignment) * alignment
    for variable in unsized:  # all of them begin at the same place
        places[variable.name] = Place(enc.SHARED, dynamic, 0)
    return places, sizes, bytes(content), dynamic


def _base(instruction: Instruction) -> str:
    return instruction.opcode.partition(".")[0]


def _blocks(entry: Entry, lines: list[str]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Basic blocks as (first, end) instruction, and the blocks that each may go to."""
    instructions = entry.instructions
    starts = {0, *entry.labels.values()}
    for number, instruction in enumerate(instructions):
        if _base(instruction) in ("bra", "brx", *_ENDS):
            starts.add(number + 1)
    first = sorted(start for start in starts if start < len(instructions))
    if not first:
        raise UnsupportedPTX(f"kernel {entry.name} has no instructions")
    blocks = list(zip(first, [*first[1:], len(instructions)], strict=True))
    index = {start: number for number, (start, _) in enumerate(blocks)}

    def target(label: str, line: int) -> int:
        position = entry.labels.get(label)
        if position not in index:
            raise UnsupportedPTX(f"line {line}: unknown label {label}: {lines[line - 1].strip()}")
        return index[position]

    successors = []
    for _, end in blocks:
        last = instructions[end - 1]
        base = _base(last)
        following = [index[end]] if end in index and (base not in ("bra", "brx", *_ENDS) or last.guard) else []
        if base == "bra" and isinstance(last.operands[0], Symbol):
            following.append(target(last.operands[0].name, last.line))
        elif base == "brx":
            following += [target(label, last.line) for label in entry.tables.get(last.operands[1].name, ())]
        if end not in index and (last.guard is not None or base not in ("bra", "brx", *_ENDS)):
            raise UnsupportedPTX(f"line {last.line}: runs past the end of the kernel: {lines[last.line - 1].strip()}")
        successors.append(following)
    return blocks, successors


def _falls_through(entry: Entry, blocks: list, successors: list, block: int) -> int | None:
    """The block that follows without a branch, or None."""
    end = blocks[block][1]
    last = entry.instructions[end - 1]
    if _base(last) in ("bra", "brx", *_ENDS) and last.guard is None:
        return None
    return next((found for found in successors[block] if blocks[found][0] == end), None)


def _jump(entry: Entry, blocks: list, successors: list, order: list[int], number: int) -> int | None:
    """The block to jump to after the ``number``-th in order, where the one it falls into does not come next."""
    following = _falls_through(entry, blocks, successors, order[number])
    if following is None or (number + 1 < len(order) and order[number + 1] == following):
        return None
    return following


def _layout(entry: Entry, blocks: list, successors: list, order: list[int]) -> tuple[dict[str, int], dict[int, int]]:
    """Row of each label and of each block's first instruction."""
    positions: dict[int, int] = {}
    row = 0
    for number, block in enumerate(order):
        positions[block] = row
        row += blocks[block][1] - blocks[block][0] + (_jump(entry, blocks, successors, order, number) is not None)
    index = {start: block for block, (start, _) in enumerate(blocks)}
    labels = {
        label: positions[index[position]]
        for label, position in entry.labels.items()
        if position in index and index[position] in positions
    }
    return labels, positions
