"""The tables of a problem's tiles on its device, uploaded once and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbfmha import gpu_arrays
from nbfmha.problem import Problem
from nbfmha.tiles import key_tiles, mean_blocks, query_blocks

MAX_TABLES = 64
"""Tables that are kept; those that a CUDA graph may read again do not count."""


@dataclass(frozen=True)
class Tables:
    """int32 arrays of :mod:`nbfmha.tiles` on a device. sequences: (sequences, 3), first tile of keys, the one after the
    last, and number of keys. stream: the one that was current when they were uploaded."""

    key_tiles: Any
    mean_blocks: Any
    query_blocks: Any
    sequences: Any
    stream: int


_lock = threading.Lock()
_recent: OrderedDict[Hashable, Tables] = OrderedDict()
_pinned: dict[Hashable, Tables] = {}


def tables_of(problem: Problem, mean_size: int, query_size: int, like: Any) -> Tables:
    """The tables of ``problem`` where ``like`` lies, by mean blocks of ``mean_size`` queries and query blocks of
    ``query_size``.

    The library that owns them frees memory in the order of the stream on which it was allocated. So tables that a graph
    or another stream has used stay for good: a replay after their end would read other data.

    Raises ``RuntimeError`` for a problem that is new while a CUDA graph is captured, for which nothing can be uploaded.
    """
    capturing, stream = gpu_arrays.is_capturing(like), gpu_arrays.stream_of(like)
    lengths = problem.seqlen_q, problem.seqlen_k, problem.q_offset, problem.cu_seqlens_q, problem.cu_seqlens_k
    key = (gpu_arrays.place_of(like), mean_size, query_size, *lengths)
    with _lock:
        tables = _pinned.get(key)
        if tables is None:
            tables = _recent.get(key)
            if tables is None:
                if capturing:
                    raise RuntimeError("the first call of these lengths copies tables; make it before the capture")
                tables = _recent[key] = _upload(problem, mean_size, query_size, like, stream)
                if len(_recent) > MAX_TABLES:
                    _recent.popitem(last=False)
            elif capturing or stream != tables.stream:
                _pinned[key] = _recent.pop(key)
            else:
                _recent.move_to_end(key)
    return tables


def _upload(problem: Problem, mean_size: int, query_size: int, like: Any, stream: int) -> Tables:
    tiles = key_tiles(problem)
    counts = np.array([s.keys.stop - s.keys.start for s in problem.sequences()])
    edges = np.searchsorted(tiles[:, 3], np.arange(len(counts) + 1))
    sequences = np.stack([edges[:-1], edges[1:], counts], axis=1).astype(np.int32)
    arrays = (tiles, mean_blocks(problem, mean_size), query_blocks(problem, mean_size, query_size), sequences)
    return Tables(*(gpu_arrays.from_host(like, array) for array in arrays), stream)
