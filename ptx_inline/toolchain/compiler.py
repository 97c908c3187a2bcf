"""Python function -> LLVM IR -> LTO-IR -> PTX or cubin, or PTX -> cubin, by numba-cuda, libNVVM, NVRTC and nvJitLink;
none of it needs a GPU or a driver."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

from ptx_inline.compiling import quick_compilation
from ptx_inline.toolchain.targets import Target
from ptx_inline.types import numba_type

# Numba's compiler keeps global state.
_lock = threading.Lock()

# Products and sums are fused only where a kernel writes fma: what one reads is what runs, on every target.
_LTO_OPTIONS = ("-lto", "-fma=0", "-no-cache")
_PTX_OPTIONS = ("-Xptxas=-fmad=false", "-no-cache")


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel: registers a thread; bytes a thread of stack, spill stores and spill loads; bytes
    a CTA of static shared memory."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Program:
    """What Numba makes of a kernel, the same for every target: LLVM IR of the kernel and of each function that it calls,
    and the snippet files that they need."""

    modules: tuple[str, ...]
    files: tuple


# Of what Numba writes, nothing that kernels use depends on the GPU from here on.
_OLDEST = Target(8, 0)


def to_llvm(function: Callable, signature: tuple[str, ...], launch_bounds: tuple | None) -> Program:
    """Numba's part, which takes most of the time."""
    from numba.core import types
    from numba.cuda import compiler
    from numba.cuda.cudadrv.linkable_code import LinkableCode

    from ptx_inline.toolchain.shared_functions import llvm_modules, shared_functions

    with _lock, quick_compilation(), _without_a_gpu(), shared_functions():
        # what cuda.compile_all does, up to where it needs to know the target
        library, _ = compiler._compile_pyfunc_with_fixup(
            function,
            types.void(*map(numba_type, signature)),
            device=False,
            abi="numba",
            cc=_OLDEST.compute_capability,
            launch_bounds=launch_bounds,
            lto=True,
        )
        files = map(LinkableCode.from_path_or_obj, library._linking_files)
        return Program(llvm_modules(library), tuple(sorted(files, key=lambda file: file.name)))


def to_ltoir(program: Program, target: Target) -> list[bytes]:
    """LTO-IR of the kernel with the functions that it calls, and of each snippet file."""
    from numba.cuda.cudadrv import nvrtc, nvvm

    arch = nvrtc.get_arch_option(*target.compute_capability)
    with _lock:
        code = nvvm.compile_ir(list(program.modules), arch=arch, opt=3, **{"gen-lto": None})
        return [code, *(_snippets_to_ltoir(file.data, file.name, target) for file in program.files)]


@cache
def _snippets_to_ltoir(source: str, name: str, target: Target) -> bytes:
    from numba.cuda.cudadrv import nvrtc

    code, _ = nvrtc.compile(source, name, target.compute_capability, ltoir=True)
    return bytes(code.code)


@contextmanager
def _without_a_gpu():
    """Numba asks the current GPU for its architecture when a kernel calls a ``cuda.jit(device=True)`` function, which
    fails without a driver; answer meanwhile."""
    from numba.cuda import dispatcher

    ask_driver = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=_OLDEST.compute_capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = ask_driver


def link_ptx(ltoir: list[bytes], target: Target) -> str:
    """The final PTX, after link-time optimisation has inlined every snippet."""
    from cuda.bindings import nvjitlink

    def read(handle) -> bytes:
        text = bytearray(nvjitlink.get_linked_ptx_size(handle))
        nvjitlink.get_linked_ptx(handle, text)
        return bytes(text)

    ptx, _ = _link(ltoir, target, ("-ptx",), read)
    return ptx.rstrip(b"\0").decode()


def link_cubin(parts: list[bytes] | str, target: Target) -> tuple[bytes, Resources]:
    """Machine code and ptxas's resource report, of LTO-IR or of a PTX text."""
    from cuda.bindings import nvjitlink

    def read(handle) -> bytes:
        code = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
        return bytes(code)

    cubin, log = _link(parts, target, ("-Xptxas=-v", "-verbose"), read)
    return cubin, _parse_resources(log)


def entry_name(cubin: bytes) -> str:
    """The mangled name of the only kernel in a cubin, read off the section of its parameters.

    A ``.text.`` section is no sign of a kernel: 64-bit division, for one, brings a function that has its own.
    """
    names = set(re.findall(rb"\0\.nv\.constant0\.([\w$]+)(?=\0)", cubin))
    if len(names) != 1:
        raise ValueError(f"cubin must hold exactly one kernel, got {len(names)}")
    return names.pop().decode()


def _link(parts: list[bytes] | str, target: Target, extra: tuple[str, ...], read: Callable) -> tuple[bytes, str]:
    from cuda.bindings import nvjitlink

    if isinstance(parts, str):
        kind, options, parts = nvjitlink.InputType.PTX, _PTX_OPTIONS, [parts.encode() + b"\0"]
    else:
        kind, options = nvjitlink.InputType.LTOIR, _LTO_OPTIONS
    options = [f"-arch={target.name}", *options, *extra]
    handle = nvjitlink.create(len(options), options)
    try:
        try:
            for number, code in enumerate(parts):
                nvjitlink.add_data(handle, kind, code, len(code), f"part{number}")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            raise RuntimeError(f"linking for {target} failed: {log.rstrip(bytes(1)).decode()}") from error
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
        return read(handle), log.decode(errors="replace")
    finally:
        nvjitlink.destroy(handle)


def _parse_resources(log: str) -> Resources:
    def number(pattern: str, *, required: bool) -> int:
        found = re.search(pattern, log)
        if found is None and required:
            raise RuntimeError(f"ptxas reported no {pattern!r}; its log was: {log}")
        return int(found[1]) if found else 0

    return Resources(
        registers=number(r"Used (\d+) registers", required=True),
        stack_bytes=number(r"(\d+) bytes stack frame", required=True),
        spill_store_bytes=number(r"(\d+) bytes spill stores", required=True),
        spill_load_bytes=number(r"(\d+) bytes spill loads", required=True),
        shared_bytes=number(r"(\d+) bytes smem", required=False),
    )
