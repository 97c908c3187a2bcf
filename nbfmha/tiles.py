"""Where the tiles of a problem lie: the one list that pre-pass and forward kernel share.

Keys go in tiles of 64, queries in blocks of 64, both counted from the beginning of each sequence. In memory that the
pre-pass writes, every sequence of keys begins on a whole tile: its last tile is padded with zeros, so that a tile never
holds keys of two sequences. Rows of the caller's tensors are not moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nbfmha.problem import Problem, Sequence
from nbfmha.recipe import TILE_N

TILE_M = 64
"""Queries of a block of the 16-bit windows; a CTA of the forward kernel has one block or two."""


class View(NamedTuple):
    """An array of (batch, heads, tokens, channels) in any order of the first three axes; channels are neighbours.

    strides: elements from one batch entry, head and token to the next.
    """

    array: Any
    strides: tuple[int, int, int]


class KeyTile(NamedTuple):
    """64 keys: the first one's row in the caller's k, how many there are, the first one's padded row, the sequence."""

    source: int
    count: int
    padded: int
    sequence: int


class MeanBlock(NamedTuple):
    """Queries that share the mean which Q smoothing takes away: rows [first, stop) of q, and their sequence."""

    first: int
    stop: int
    sequence: int


class QueryBlock(NamedTuple):
    """Queries of a CTA of the forward kernel: rows [first, stop) of q; the position of the first one on its sequence's keys
    (may be negative); the sequence's first row of k, its first padded row, its seqlen_k; the mean block of the first one;
    the sequence."""

    first: int
    stop: int
    position: int
    k_source: int
    k_padded: int
    seqlen_k: int
    mean_block: int
    sequence: int


def padded_tokens(problem: Problem) -> int:
    """Rows of the padded token axis of all sequences."""
    return sum(_tiles(sequence) * TILE_N for sequence in problem.sequences())


def key_tiles(problem: Problem) -> np.ndarray:
    """int32 (tiles, 4): a ``KeyTile`` a row, in the order of padded rows: tile i has padded rows from 64 i on."""
    rows = []
    for index, sequence, padded in _placed(problem):
        for tile in range(_tiles(sequence)):
            source = sequence.keys.start + tile * TILE_N
            rows.append(KeyTile(source, min(TILE_N, sequence.keys.stop - source), padded + tile * TILE_N, index))
    return _table(rows, KeyTile)


def mean_blocks(problem: Problem, size: int) -> np.ndarray:
    """int32 (blocks, 3): a ``MeanBlock`` of up to ``size`` queries a row, in order."""
    rows = [
        MeanBlock(first, min(first + size, sequence.queries.stop), index)
        for index, sequence, _ in _placed(problem)
        for first in range(sequence.queries.start, sequence.queries.stop, size)
    ]
    return _table(rows, MeanBlock)


def query_blocks(problem: Problem, mean_size: int, size: int = TILE_M) -> np.ndarray:
    """int32 (blocks, 8): a ``QueryBlock`` of up to ``size`` queries (64 or 128) a row; ``mean_size`` (64 or 128) is that of
    ``mean_blocks``."""
    rows, mean_block = [], 0
    for index, (queries, keys, q_offset), padded in _placed(problem):
        for first in range(queries.start, queries.stop, size):
            inside = first - queries.start
            row = (first, min(first + size, queries.stop), inside + q_offset, keys.start, padded, keys.stop - keys.start)
            rows.append(QueryBlock(*row, mean_block + inside // mean_size, index))
        mean_block += -(-(queries.stop - queries.start) // mean_size)
    return _table(rows, QueryBlock)


def _placed(problem: Problem) -> Iterator[tuple[int, Sequence, int]]:
    """(index, sequence, its first padded row)."""
    padded = 0
    for index, sequence in enumerate(problem.sequences()):
        yield index, sequence, padded
        padded += _tiles(sequence) * TILE_N


def _tiles(sequence: Sequence) -> int:
    return -(-(sequence.keys.stop - sequence.keys.start) // TILE_N)


def _table(rows: list, kind: type) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, len(kind._fields))
