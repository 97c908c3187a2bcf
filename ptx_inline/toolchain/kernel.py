"""``Kernel``: one Numba CUDA Python function with fixed constants, for every target; ``PtxKernel``: one PTX text."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from ptx_inline.toolchain import cache as disk
from ptx_inline.toolchain.compiler import Program, Resources, entry_name, link_cubin, link_ptx, to_llvm, to_ltoir
from ptx_inline.toolchain.disasm import disassemble
from ptx_inline.toolchain.launcher import ArgumentReader, LoadedKernel, current_device, device_target
from ptx_inline.toolchain.targets import Target
from ptx_inline.types import check_type

_COMPILER = Path(__file__).parent
_PACKAGE = _COMPILER.parent


class CompiledKernel(ABC):
    """What kernels of every source share: compiled at first use for each target, kept on disk, launched.

    signature: argument types, e.g. ``("u16*", "f32*", "i64")``; see :mod:`ptx_inline.types`.
    """

    programmatic = False

    def __init__(self, signature: Sequence[str]):
        self.signature = tuple(map(check_type, signature))
        self._cubins: dict[Target, tuple[bytes, str, Resources]] = {}
        self._loaded: dict[int, LoadedKernel] = {}
        self._reader = ArgumentReader(self.signature)

    @abstractmethod
    def ptx(self, target: str | Target) -> str:
        """The final PTX."""

    @abstractmethod
    def _source(self, target: Target) -> list[bytes] | str:
        """What is linked: LTO-IR or a PTX text."""

    @abstractmethod
    def _identity(self) -> tuple:
        """All that decides the machine code but the target, as numbers, strings and tuples of them."""

    def cubin(self, target: str | Target) -> bytes:
        """Machine code, from the disk cache if it is there."""
        return self._compiled(Target.parse(target))[0]

    def resources(self, target: str | Target) -> Resources:
        """Registers, spills and shared memory as ptxas reported them."""
        return self._compiled(Target.parse(target))[2]

    def sass(self, target: str | Target) -> str:
        """Disassembly of the machine code."""
        return disassemble(self.cubin(target))

    def launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence,
        *,
        smem_bytes: int = 0,
        stream: int | None = None,
    ) -> None:
        """Queue one launch; safe while a CUDA graph is captured on the stream, once a first launch has loaded the code.

        Args:
            grid: CTAs in x, y, z. block: threads in x, y, z.
            arguments: one a type of the signature: for a pointer an address or an array in GPU memory (torch, or
                anything with DLPack or ``__cuda_array_interface__``), else a number in the type's range.
            smem_bytes: dynamic shared memory, up to the device's opt-in limit.
            stream: a CUDA stream handle; the current stream of the first array's library if ``None``.

        Raises ``TypeError`` or ``ValueError`` for arguments that do not fit, before anything is queued; ``RuntimeError``
        for what the driver refuses.
        """
        device, handle, values = self._reader.read(arguments, stream)
        if device is None:
            device = current_device()
        self.load(device).launch(device, grid, block, values, smem_bytes, handle or 0)

    def prepare(
        self,
        device: int,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence,
        addresses: int,
        *,
        smem_bytes: int = 0,
    ) -> Callable[[Sequence[int], int], None]:
        """A launch that is queued many times, as a function ``(addresses, stream)``: what stays is checked once, here.

        Args:
            device: ordinal of the device on which to launch.
            arguments: as for ``launch``, but a :class:`~ptx_inline.toolchain.parameters.Placeholder` may stand for a
                pointer that changes. Of arrays the addresses are kept, not the memory.
            addresses: how many the function takes.

        Raises as ``launch``, and as :class:`~ptx_inline.toolchain.parameters.Parameters`. The function checks nothing: its
        ``addresses`` are ints, in memory of that device, and its ``stream`` is a handle.
        """
        owner, values = self._reader.read_fixed(arguments)
        if owner not in (None, device):
            raise ValueError(f"arguments must be on device {device}, got arrays on device {owner}")
        return self.load(device).prepare(device, grid, block, values, addresses, smem_bytes)

    def load(self, device: int | None = None) -> LoadedKernel:
        """Compile (or read from the cache) and load for a device, the current one if ``None``."""
        if device is None:
            device = current_device()
        loaded = self._loaded.get(device)
        if loaded is None:
            target = device_target(device)
            cubin, name, _ = self._compiled(target)
            programmatic = self.programmatic and target.compute_capability >= (9, 0)
            loaded = self._loaded[device] = LoadedKernel(cubin, name, self.signature, programmatic)
        return loaded

    def _compiled(self, target: Target) -> tuple[bytes, str, Resources]:
        compiled = self._cubins.get(target)
        if compiled is None:
            key = self._cache_key(target, "cubin")
            compiled = disk.load(key)
            if compiled is None:
                cubin, resources = link_cubin(self._source(target), target)
                compiled = cubin, entry_name(cubin), resources
                disk.store(key, *compiled)
            self._cubins[target] = compiled
        return compiled

    def _cache_key(self, target: Target, output: str) -> str:
        return disk.key(output, *self._identity(), target.name)


class Kernel(CompiledKernel):
    """A GPU kernel, compiled at first use for each target and kept on disk.

    ``factory(**constants)`` returns the Python function to compile; what it closes over is a compile-time constant. It
    imports ``numba.cuda`` inside, so that a process that finds its cubin or PTX in the cache never imports Numba.

    Args:
        factory: module-level function, or one defined in a notebook.
        signature: argument types, e.g. ``("u16*", "f32*", "i64")``; see :mod:`ptx_inline.types`.
        constants: keyword arguments of the factory; numbers, strings, booleans or tuples of them.
        launch_bounds: ``(max_threads,)`` or ``(max_threads, min_ctas_per_sm)``, as CUDA's ``__launch_bounds__``.
        programmatic: the kernel may begin while the one ahead of it in its stream still runs (programmatic dependent
            launch, compute capability 9.0 and newer): it calls ``device.griddepcontrol_wait`` before it reads or writes
            memory.

    Raises ``TypeError`` or ``ValueError`` for a constant or a type that is none of these.
    """

    def __init__(
        self,
        factory: Callable[..., Callable],
        signature: Sequence[str],
        constants: Mapping[str, object] | None = None,
        launch_bounds: tuple[int, ...] | None = None,
        programmatic: bool = False,
    ):
        super().__init__(signature)
        self.factory = factory
        self.constants = dict(constants or {})
        self.launch_bounds = launch_bounds
        self.programmatic = programmatic
        for name, value in self.constants.items():
            _check_constant(name, value)
        self._program: Program | None = None
        self._ltoir: dict[Target, list[bytes]] = {}
        self._ptx: dict[Target, str] = {}

    def __reduce__(self):
        """Another process gets what the kernel is made of, and compiles or reads the cache for itself."""
        return Kernel, (self.factory, self.signature, self.constants, self.launch_bounds, self.programmatic)

    def _made_of(self) -> tuple:
        constants = repr(sorted(self.constants.items()))
        return self.factory, self.signature, constants, self.launch_bounds, self.programmatic

    def __eq__(self, other: object) -> bool:
        """Equal kernels are made of the same and compile to the same code."""
        return self._made_of() == other._made_of() if isinstance(other, Kernel) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._made_of())

    @property
    def name(self) -> str:
        """Factory and constants, for messages."""
        constants = ", ".join(f"{name}={value!r}" for name, value in self.constants.items())
        return f"{self.factory.__module__}.{self.factory.__qualname__}({constants})"

    def ltoir(self, target: str | Target) -> list[bytes]:
        """LTO-IR of the kernel and of each snippet that it uses; kept, since PTX and machine code are made of the same."""
        target = Target.parse(target)
        code = self._ltoir.get(target)
        if code is None:
            if self._program is None:
                self._program = to_llvm(self.factory(**self.constants), self.signature, self.launch_bounds)
            code = self._ltoir[target] = to_ltoir(self._program, target)
        return code

    def ptx(self, target: str | Target) -> str:
        """The final PTX, with every snippet inlined; from the disk cache if it is there."""
        target = Target.parse(target)
        text = self._ptx.get(target)
        if text is None:
            key = self._cache_key(target, "ptx")
            text = disk.load_ptx(key)
            if text is None:
                text = link_ptx(self.ltoir(target), target)
                disk.store_ptx(key, text)
            self._ptx[target] = text
        return text

    def _source(self, target: Target) -> list[bytes]:
        return self.ltoir(target)

    def _identity(self) -> tuple:
        return (
            _source_digest(self.factory),
            self.factory.__qualname__,
            sorted(self.constants.items()),
            self.signature,
            self.launch_bounds,
        )


class PtxKernel(CompiledKernel):
    """A GPU kernel given as PTX text, which holds one kernel and names its own ``.version`` and ``.target``.

    Args:
        text: the PTX; assembled for each target at first use and kept on disk.
        signature: argument types, as for :class:`Kernel`.

    Raises ``TypeError`` for a text that is no string. What the assembler objects to is a ``RuntimeError`` with its words.
    """

    def __init__(self, text: str, signature: Sequence[str]):
        super().__init__(signature)
        if not isinstance(text, str):
            raise TypeError(f"text must be PTX, got {type(text).__name__}")
        self.text = text

    def ptx(self, target: str | Target) -> str:
        """The text as it was given, for every target."""
        return self.text

    def _source(self, target: Target) -> str:
        return self.text

    def _identity(self) -> tuple:
        return (self.text,)


def _check_constant(name: str, value: object) -> None:
    if isinstance(value, tuple):
        for item in value:
            _check_constant(name, item)
    elif not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"constant {name} must be a number, string, boolean or tuple of them, got {type(value).__name__}"
        )


@cache
def _source_digest(factory: Callable) -> str:
    """Hash of all source that may reach the kernel: snippets, compiler, and the factory's package, file or cell."""
    digest = hashlib.sha256(inspect.getsource(factory).encode())
    sources = [_PACKAGE / name for name in ("compiling.py", "device.py", "types.py", "unroll.py")]
    sources += [*_PACKAGE.glob("snippets/*.cu"), *_COMPILER.glob("*.py")]
    file = Path(inspect.getsourcefile(factory) or "")
    package = file.parent
    if (package / "__init__.py").is_file():
        while (package.parent / "__init__.py").is_file():
            package = package.parent
        sources += package.rglob("*.py")
    elif file.is_file():
        sources.append(file)
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()
