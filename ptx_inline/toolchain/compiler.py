"""Python function -> LTO-IR -> PTX or cubin, or PTX -> cubin, by numba-cuda, NVRTC and nvJitLink; none of it needs a GPU
or a driver."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

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


def to_ltoir(
    function: Callable, signature: tuple[str, ...], target: Target, launch_bounds: tuple | None
) -> list[bytes]:
    """LTO-IR of the kernel and of every snippet that it calls."""
    from numba import cuda
    from numba.core import types

    with _lock, _no_garbage_collection(), _numba_compiles_for(target):
        objects, _ = cuda.compile_all(
            function,
            types.void(*map(numba_type, signature)),
            device=False,
            abi="numba",
            cc=target.compute_capability,
            output="ltoir",
            launch_bounds=launch_bounds,
        )
    return [item if isinstance(item, bytes) else bytes(item.code) for item in objects]


@contextmanager
def _numba_compiles_for(target: Target):
    """Numba asks the current GPU for its architecture when a kernel calls a ``cuda.jit(device=True)`` function, which
    fails without a driver and is the wrong architecture on another GPU; answer with the target meanwhile. It also has
    NVRTC compile the same snippet files for every kernel, 20 to 30 ms each; let it do so once a target."""
    from numba.cuda import dispatcher
    from numba.cuda.cudadrv import nvrtc

    ask_driver, compile_source = dispatcher.get_current_device, nvrtc.compile
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=target.compute_capability)
    nvrtc.compile = _remembering(compile_source)
    try:
        yield
    finally:
        dispatcher.get_current_device, nvrtc.compile = ask_driver, compile_source


#: ``functools.cache`` of a function: the same one, with the results so far, each time.
_remembering = cache(cache)


@contextmanager
def _no_garbage_collection():
    """What Numba allocates mostly lives until the kernel is done; walking it again and again takes about a tenth of the
    compilation."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
