"""The decorators of the compiled core's functions.

Numba makes two wrappers for each function, and compiles it anew for every constant that it is called with; without both,
the core compiles in half the time. A function without wrappers cannot be called from Python: doing so raises.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit, types


def compiled(function: Callable, *, forceinline: bool = False) -> Callable:
    """A function of the compiled core, to be called from compiled code only."""
    dispatcher = njit(
        nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=forceinline
    )(function)
    template = dispatcher.get_call_template

    def get_call_template(args, kws):
        return template(tuple(types.unliteral(arg) for arg in args), kws)

    def refuse(*args, **kws):
        raise TypeError(f"{function.__name__} can be called from compiled code only; call it from an njit function")

    dispatcher.get_call_template = get_call_template
    # what Python calls: a compiled version would be inserted for it here, and asked for there
    dispatcher._insert = lambda *args, **kws: None
    dispatcher._compile_for_args = refuse
    return dispatcher


def inlined(function: Callable) -> Callable:
    """The same, put into its callers."""
    return compiled(function, forceinline=True)
