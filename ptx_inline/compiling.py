"""Numba's compilers, for GPUs and for the CPU, spared what takes a third of their time and changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_compilation() -> Iterator[None]:
    """While it is open, Numba compiles here alone, no garbage is collected, and no call is typed twice.

    Garbage: what Numba allocates mostly lives until it is done; walking it again and again is a waste. Calls: for each
    operator and built-in function Numba tries one implementation after the other, also where loops that are written out
    ask a hundred times with arguments of the same types.
    """
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.targetconfig import ConfigStack
    from numba.core.types.functions import BaseFunction

    get_call_type = BaseFunction.get_call_type

    def remembering(self, context, args, kws):
        flags = ConfigStack.top_or_none()
        key = id(self), context, tuple(args), tuple(kws.items()), flags and flags.summary()
        if key not in _signatures:
            _signatures[key] = self, get_call_type(self, context, args, kws)
        return _signatures[key][1]

    with global_compiler_lock, _no_garbage_collection():
        BaseFunction.get_call_type = remembering
        try:
            yield
        finally:
            BaseFunction.get_call_type = get_call_type


#: Signature by type of the function, typing context, arguments and flags. The type is kept, so that its ``id`` is its own.
_signatures: dict[tuple, tuple] = {}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
