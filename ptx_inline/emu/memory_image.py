"""Arguments of a launch: arrays laid into the emulator's global memory, scalars into parameter space, results back out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptx_inline.emu.decode import MODULE_BASE
from ptx_inline.emu.program import Parameter, Program
from ptx_inline.emu.scalar_types import BITS, F32, F64
from ptx_inline.emu.simt.state import HOST_RECORD, views

_ALIGNMENT = 256  # of each buffer, as cudaMalloc has it
_WINDOW = MODULE_BASE  # buffer i begins at (i + 1) of these, and buffer 0 is the module's


@dataclass(frozen=True)
class Output:
    """An argument that the kernel is to fill: memory that nobody has written, so that reading it is an error.

    shape, dtype: of the array that comes back; what the kernel leaves unwritten holds the byte 0xCD.
    """

    shape: tuple[int, ...]
    dtype: object

    def array(self) -> np.ndarray:
        """The poisoned array."""
        array = np.empty(self.shape, self.dtype)
        array.reshape(-1).view(np.uint8)[:] = 0xCD
        return array


@dataclass(eq=False)
class MemoryImage:
    """Global memory of a launch.

    memory: uint8, uint16, uint32 and uint64 views of it. segments: int64 (buffers, 2), start and size of each buffer;
    buffer i has addresses from ``(i + 1) 2^32`` on. written: shadow records, see ``simt.state``. parameters: where the
    parameters' bytes begin in memory. owners: for each buffer the argument's position, -1 for the module's variables.
    """

    memory: tuple[np.ndarray, ...]
    segments: np.ndarray
    written: np.ndarray
    parameters: int
    owners: list[int]
    _arguments: list[object]
    _buffers: list[int | None]

    def results(self) -> tuple[object, ...]:
        """The arguments as the kernel left them: a copy of each array, scalars as they came."""
        found = []
        for argument, buffer in zip(self._arguments, self._buffers, strict=True):
            if buffer is None:
                found.append(argument)
                continue
            start, size = self.segments[buffer]
            content = self.memory[0][start : start + size].copy()
            array = argument.array() if isinstance(argument, Output) else argument
            found.append(content.view(array.dtype).reshape(array.shape))
        return tuple(found)

    def unwritten(self) -> dict[int, int]:
        """Bytes of each ``Output``, by its position among the arguments, that nobody wrote."""
        found = {}
        for position, (argument, buffer) in enumerate(zip(self._arguments, self._buffers, strict=True)):
            if isinstance(argument, Output):
                start, size = self.segments[buffer]
                found[position] = int(np.count_nonzero(self.written[start : start + size] == 0))
        return found


def lay_out(program: Program, arguments: Sequence[object]) -> MemoryImage:
    """Memory with the module's variables, the parameters and a copy of every array.

    Raises ``TypeError`` and ``ValueError`` for arguments that do not fit the kernel's parameters.
    """
    if len(arguments) != len(program.parameters):
        raise ValueError(f"arguments must be {len(program.parameters)} for {program.name}, got {len(arguments)}")
    chunks: list[np.ndarray] = [np.frombuffer(program.module_bytes, np.uint8)]
    owners = [-1]
    buffers: list[int | None] = []
    known: dict[int, int] = {}
    parameter_bytes = np.zeros(max(program.parameter_bytes, 1), np.uint8)
    for position, (parameter, argument) in enumerate(zip(program.parameters, arguments, strict=True)):
        buffer = None
        if isinstance(argument, np.ndarray | Output):
            if parameter.size != 8 or parameter.type in (F32, F64):
                raise TypeError(f"argument {position} must be a number, as the kernel declares it, got an array")
            if id(argument) not in known:
                known[id(argument)] = len(chunks)
                chunks.append(_bytes(position, argument, arguments[:position]))
                owners.append(position)
            buffer = known[id(argument)]
            value = np.array((buffer + 1) * _WINDOW, np.uint64)
        else:
            value = _scalar(position, parameter, argument)
        raw = np.frombuffer(value.tobytes(), np.uint8)
        parameter_bytes[parameter.offset : parameter.offset + parameter.size] = raw
        buffers.append(buffer)
    starts, total = [], 0
    for chunk in (*chunks, parameter_bytes):
        starts.append(total)
        total += -(-max(chunk.size, 1) // _ALIGNMENT) * _ALIGNMENT
    memory = views(total)
    written = np.zeros(total, np.uint64)
    for number, (chunk, start) in enumerate(zip((*chunks, parameter_bytes), starts, strict=True)):
        memory[0][start : start + chunk.size] = chunk
        if number >= len(owners) or owners[number] < 0 or not isinstance(arguments[owners[number]], Output):
            written[start : start + chunk.size] = HOST_RECORD
    segments = np.array([(start, chunk.size) for chunk, start in zip(chunks, starts, strict=False)], np.int64)
    return MemoryImage(memory, segments, written, starts[-1], owners, list(arguments), buffers)


def describe_global(image: MemoryImage, index: int) -> tuple[int, str]:
    """Address and plain words for an index into global memory."""
    for buffer, (start, size) in enumerate(image.segments):
        if start <= index < start + size:
            return int((buffer + 1) * _WINDOW + index - start), describe_buffer(image, buffer, int(index - start))
    return int(index), "outside all buffers"


def describe_buffer(image: MemoryImage, buffer: int, offset: int) -> str:
    """``byte 12 of the 64 bytes of argument 3``."""
    owner = image.owners[buffer]
    whose = "the module's variables" if owner < 0 else f"argument {owner}"
    return f"byte {offset} of the {image.segments[buffer, 1]} bytes of {whose}"


def _bytes(position: int, argument: np.ndarray | Output, before: Sequence[object]) -> np.ndarray:
    if isinstance(argument, Output):
        argument = argument.array()
    if argument.dtype.hasobject:
        raise TypeError(f"argument {position} must be an array of numbers, got dtype {argument.dtype}")
    if not argument.flags.c_contiguous:
        raise ValueError(f"argument {position} must be C-contiguous, got strides {argument.strides}; copy it first")
    for other, array in enumerate(before):
        if isinstance(array, np.ndarray) and array is not argument and np.shares_memory(array, argument):
            raise ValueError(
                f"argument {position} must be the same array as argument {other} or share no memory with it; pass one array"
            )
    if argument.nbytes >= _WINDOW:
        raise ValueError(f"argument {position} must be smaller than 4 GiB, got {argument.nbytes} bytes")
    return argument.reshape(-1).view(np.uint8)


def _scalar(position: int, parameter: Parameter, argument: object) -> np.ndarray:
    """A number in the parameter's bytes."""
    bits = BITS[parameter.type]
    if parameter.size * 8 != bits:
        raise TypeError(f"argument {position}: parameters that are structures or arrays are not supported")
    if isinstance(argument, np.generic):
        argument = argument.item()
    if parameter.type in (F32, F64) or (isinstance(argument, float) and bits >= 32 and not parameter.is_pointer):
        if not isinstance(argument, int | float):
            raise TypeError(f"argument {position} must be a number, got {type(argument).__name__}")
        return np.array(argument, np.float32 if bits == 32 else np.float64)
    if not isinstance(argument, int):
        expected = "an integer, a NumPy array or an Output" if bits == 64 else "an integer"
        raise TypeError(f"argument {position} must be {expected}, got {type(argument).__name__}")
    if not -(1 << (bits - 1)) <= argument < 1 << bits:
        raise ValueError(f"argument {position} must fit {bits} bits, got {argument}")
    return np.array(argument % (1 << bits), f"u{bits // 8}")

