"""What decode calls of several splits on one cache use one after the other: counters by which the splits find out which of
them is done last, and room for their results.

A kernel leaves the counters at zero, as it finds them, and reads no result but those of its own splits. Both are kept for
as long as the cache's arrays live, since a CUDA graph may have their addresses: calls on one cache run on one stream at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from nbfmha import gpu_arrays
from nbfmha.kv_layout import CacheArrays

_LEAST = 1024
_Kept = WeakKeyDictionary[CacheArrays, list[Any]]
_tickets: _Kept = WeakKeyDictionary()
_rooms: _Kept = WeakKeyDictionary()


def tickets_of(arrays: CacheArrays, like: Any, count: int) -> Any:
    """int32 zeros, ``count`` or more, where ``like`` lies. What is made during a capture is filled in the graph, and its
    alone."""
    return _kept(_tickets, arrays, like, count, lambda n: gpu_arrays.fill(gpu_arrays.empty(like, (n,), "int32"), 0))


def room_of(arrays: CacheArrays, like: Any, count: int) -> Any:
    """float32, ``count`` or more, of any value, where ``like`` lies."""
    return _kept(_rooms, arrays, like, count, lambda n: gpu_arrays.empty(like, (n,), "float32"))


def _kept(everyones: _Kept, arrays: CacheArrays, like: Any, count: int, make: Callable[[int], Any]) -> Any:
    kept = everyones.get(arrays, [])
    if kept and kept[-1].shape[0] >= count:
        return kept[-1]
    fresh = make(max(count, _LEAST))
    if not gpu_arrays.is_capturing(like):
        everyones.setdefault(arrays, kept).append(fresh)
    return fresh
