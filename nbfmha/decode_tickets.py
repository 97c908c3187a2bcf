"""Counters by which the splits of a decode call find out which of them is done last.

A kernel leaves them at zero, as it finds them, so that they are filled once and serve every call on a cache: calls on one
cache run on one stream at a time.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from nbfmha import gpu_arrays
from nbfmha.kv_layout import CacheArrays

_LEAST = 1024
_kept: WeakKeyDictionary[CacheArrays, list[Any]] = WeakKeyDictionary()


def tickets_of(arrays: CacheArrays, like: Any, count: int) -> Any:
    """int32 zeros, ``count`` or more, where ``like`` lies; for as long as the cache's arrays live, since a CUDA graph may
    have their address. What is made during a capture is filled in the graph, and its alone."""
    kept = _kept.get(arrays, [])
    if kept and kept[-1].shape[0] >= count:
        return kept[-1]
    fresh = gpu_arrays.fill(gpu_arrays.empty(like, (max(count, _LEAST),), "int32"), 0)
    if not gpu_arrays.is_capturing(like):
        _kept.setdefault(arrays, kept).append(fresh)
    return fresh
