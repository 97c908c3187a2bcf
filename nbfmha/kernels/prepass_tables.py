"""The tables of a problem's tiles on its device, uploaded once and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbfmha import gpu_arrays
from nbfmha.kernels.prepass_delta import rows_of, work_list
from nbfmha.problem import Problem
from nbfmha.tiles import delta_tiles, key_tiles, mean_blocks, query_blocks

MAX_TABLES = 64
"""Tables that are kept; those that a CUDA graph may read again do not count."""


@dataclass(frozen=True)
class Tables:
    """int32 arrays of :mod:`nbfmha.tiles` on a device. sequences: (sequences, 3), first tile of keys, the one after the
    last, and number of keys. delta_work: ``prepass_delta.work_list``. delta_tiles: tiles of 64 corrections of a head, 0
    without Q smoothing. stream: the one that was current when they were uploaded."""

    key_tiles: Any
    mean_blocks: Any
    query_blocks: Any
    sequences: Any
    delta_work: Any
    delta_tiles: int
    stream: int


_lock = threading.Lock()
_recent: OrderedDict[Hashable, Tables] = OrderedDict()
_pinned: dict[Hashable, Tables] = {}


def tables_of(problem: Problem, mean_size: int | None, query_size: int, like: Any) -> Tables:
    """The tables of ``problem`` where ``like`` lies, by mean blocks of ``mean_size`` queries (None: no Q smoothing) and
    query blocks of ``query_size``.

    The library that owns them frees memory in the order of the stream on which it was allocated. So tables that a graph
    or another stream has used stay for good: a replay after their end would read other data.

    Raises ``ValueError`` for more corrections than ``tiles.delta_tiles`` takes, ``RuntimeError`` for a problem that is new
    while a CUDA graph is captured, for which nothing can be uploaded.
    """
    capturing, stream = gpu_arrays.is_capturing(like), gpu_arrays.stream_of(like)
    lengths = problem.seqlen_q, problem.seqlen_k, problem.q_offset, problem.cu_seqlens_q, problem.cu_seqlens_k
    masks = () if mean_size is None else (problem.bounds, problem.qhead_per_kvhead, rows_of(problem.head_dim))
    key = (gpu_arrays.place_of(like), mean_size, query_size, *lengths, *masks)
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


def _upload(problem: Problem, mean_size: int | None, query_size: int, like: Any, stream: int) -> Tables:
    tiles = key_tiles(problem)
    counts = np.array([s.keys.stop - s.keys.start for s in problem.sequences()])
    edges = np.searchsorted(tiles[:, 3], np.arange(len(counts) + 1))
    sequences = np.stack([edges[:-1], edges[1:], counts], axis=1).astype(np.int32)
    places = 0 if mean_size is None else delta_tiles(problem, mean_size)
    blocks, work = mean_blocks(problem, mean_size), np.zeros((0, 3), np.int32)
    if mean_size is not None:
        work = work_list(blocks, problem.qhead_per_kvhead, rows_of(problem.head_dim))
    arrays = (tiles, blocks, query_blocks(problem, mean_size, query_size), sequences, work)
    return Tables(*(gpu_arrays.from_host(like, array) for array in arrays), places, stream)
