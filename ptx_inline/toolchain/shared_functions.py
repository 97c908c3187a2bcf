"""Device functions that are the same, compiled once a process; it changes no instruction.

A factory makes its device functions anew for every kernel. Those of the same code that close over the same share what was
compiled for one of them, and its LLVM IR is kept as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

from numba.core.types import Type
from numba.cuda.codegen import CUDACodeLibrary
from numba.cuda.compiler import ExternFunction
from numba.cuda.dispatcher import CUDADispatcher
from numba.cuda.typing import cffi_utils


@contextmanager
def shared_functions() -> Iterator[None]:
    """While a kernel is compiled; one at a time."""
    compile_device = CUDADispatcher.compile_device

    def compile_shared(self, args, return_type=None):
        _share(self)
        return compile_device(self, args, return_type)

    CUDADispatcher.compile_device = compile_shared
    try:
        yield
    finally:
        CUDADispatcher.compile_device = compile_device


class _Overloads(dict):
    """Compiled versions of all device functions that are the same, by types of arguments; stands for them in keys.

    Numba's own dictionary would not do: what it holds is taken out of the compiler when the function is deleted."""

    __eq__, __hash__ = object.__eq__, object.__hash__


_overloads: dict[tuple, _Overloads] = {}


def _share(function: CUDADispatcher) -> object:
    """Give a device function the compiled versions of those that are the same; returns what stands for it in a key."""
    if isinstance(function.overloads, _Overloads):
        return function.overloads
    if function.overloads or "shared" in _names(function.py_func.__code__):
        return object()  # compiled by somebody else; or has shared memory, of its own even if another is the same
    key = _same_function(function.py_func), repr(sorted(function.targetoptions.items()))
    function.overloads = _overloads.setdefault(key, _Overloads())
    return function.overloads


def _same_function(function: FunctionType) -> tuple:
    """Equal for functions of the same code with the same values of all names in it."""
    names = sorted(set(_names(function.__code__)) & function.__globals__.keys())
    return (
        function.__code__,
        _same((function.__defaults__, *(function.__kwdefaults__ or {}).items())),
        *(_same(cell.cell_contents) for cell in function.__closure__ or ()),
        *((name, _same(function.__globals__[name])) for name in names),
    )


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _same(value: object) -> object:
    """Equal for values for which Numba compiles the same."""
    if isinstance(value, CUDADispatcher):
        return _share(value)
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), repr(value)
    if isinstance(value, tuple):
        return type(value), *map(_same, value)
    if isinstance(value, _NEVER_CHANGE) or cffi_utils.is_ffi_instance(value):
        return _Itself(value)
    return object()  # an array, say, is compiled as what it holds now


_NEVER_CHANGE = (BuiltinFunctionType, ExternFunction, FunctionType, ModuleType, Type, type)


class _Itself:
    """Equal for one object alone, whatever the object takes for equal."""

    def __init__(self, value: object):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


class _Text:
    """A module of LLVM IR that is done: Numba prints it."""

    functions = ()

    def __init__(self, text: str):
        self._text = text

    def __str__(self) -> str:
        return self._text


def llvm_modules(library: CUDACodeLibrary) -> tuple[str, ...]:
    """The LLVM IR of a kernel and of each function that it calls, once each, callers first: libNVVM drops a function that
    nobody has called yet.

    Of the called functions it stays as text, in a tenth of the memory and without printing it again.
    """
    done: dict[CUDACodeLibrary, None] = {}

    def visit(caller: CUDACodeLibrary) -> None:
        for called in caller._linking_libraries:
            if isinstance(called, CUDACodeLibrary) and called not in done:
                visit(called)
                if not isinstance(called._module, _Text):
                    called._module = _Text(str(called._module))
        done[caller] = None

    visit(library)
    return tuple(str(each._module) for each in reversed(done))
