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
from nbfmha.validation import message

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
    """Queries that share the mean which Q smoothing takes away: rows [first, stop) of q; their sequence; where their
    corrections lie: those of key tile t (of ``key_tiles``) are tile ``delta_tile + t`` of a head's delta (it may be
    negative); the key tiles [begin, end) that the forward kernel visits for them, none when equal. Both ascend."""

    first: int
    stop: int
    sequence: int
    delta_tile: int
    begin: int
    end: int


class QueryBlock(NamedTuple):
    """Queries of a CTA of the forward kernel: rows [first, stop) of q; the position of the first one on its sequence's keys
    (may be negative); the sequence's first row of k, its first padded row, its seqlen_k; ``delta_tile`` of the first one's
    mean block; the sequence."""

    first: int
    stop: int
    position: int
    k_source: int
    k_padded: int
    seqlen_k: int
    delta_tile: int
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


def delta_tiles(problem: Problem, mean_size: int) -> int:
    """Tiles of 64 corrections of a query head: each mean block has those of its own sequence's key tiles.

    Raises ``ValueError`` for 2^31 or more."""
    total = sum(-(-(s.queries.stop - s.queries.start) // mean_size) * _tiles(s) for s in problem.sequences())
    if total >= 2**31:
        got = f"{total} tiles of 64 corrections a head"
        raise ValueError(message("q, k", "short enough for 2^31 - 1", got, "call without Q smoothing, or in parts"))
    return total


def mean_blocks(problem: Problem, mean_size: int | None) -> np.ndarray:
    """int32 (blocks, 6): a ``MeanBlock`` of up to ``mean_size`` (64 or 128) queries a row, in order. None: no Q smoothing;
    blocks of 64, ``delta_tile`` 0."""
    rows, size = [], mean_size or TILE_M
    for (index, sequence, padded), place in zip(_placed(problem), _delta_places(problem, mean_size), strict=True):
        queries, first_tile = sequence.queries, padded // TILE_N
        for block, first in enumerate(range(queries.start, queries.stop, size)):
            stop = min(first + size, queries.stop)
            begin, end = _seen_tiles(problem, sequence, first, stop)
            delta_tile = 0 if mean_size is None else place + block * _tiles(sequence) - first_tile
            rows.append(MeanBlock(first, stop, index, delta_tile, first_tile + begin, first_tile + end))
    return _table(rows, MeanBlock)


def query_blocks(problem: Problem, mean_size: int | None, size: int = TILE_M) -> np.ndarray:
    """int32 (blocks, 8): a ``QueryBlock`` of up to ``size`` queries (64 or 128) a row; ``mean_size`` is that of
    ``mean_blocks``."""
    rows, means = [], mean_blocks(problem, mean_size)
    places, starts = means[:, MeanBlock._fields.index("delta_tile")], means[:, MeanBlock._fields.index("first")]
    for index, (queries, keys, q_offset), padded in _placed(problem):
        for first in range(queries.start, queries.stop, size):
            position = first - queries.start + q_offset
            row = (first, min(first + size, queries.stop), position, keys.start, padded, keys.stop - keys.start)
            rows.append(QueryBlock(*row, places[np.searchsorted(starts, first, "right") - 1], index))
    return _table(rows, QueryBlock)


def _delta_places(problem: Problem, mean_size: int | None) -> Iterator[int]:
    """The tile of a head's delta with which each sequence begins."""
    place = 0
    for sequence in problem.sequences():
        yield place
        if mean_size is not None:
            place += -(-(sequence.queries.stop - sequence.queries.start) // mean_size) * _tiles(sequence)


def _seen_tiles(problem: Problem, sequence: Sequence, first: int, stop: int) -> tuple[int, int]:
    """[begin, end) of the sequence's key tiles that the forward kernel visits for rows [first, stop) of q: from the first
    that one of them sees to the last; two equal ones where there are none."""
    left, right = problem.bounds
    seqlen_k = sequence.keys.stop - sequence.keys.start
    position = first - sequence.queries.start + sequence.q_offset
    last = position + stop - 1 - first
    begin = 0 if left is None else max(position - left, 0) // TILE_N
    seen = seqlen_k if right is None else min(last + right + 1, seqlen_k)
    end = -(-seen // TILE_N)
    begin = min(begin, _tiles(sequence))
    return begin, max(begin, end)


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
