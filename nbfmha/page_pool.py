"""Who owns which page: the host's account of a paged KV cache. No arrays of a GPU, nothing waits.

A slot is a sequence's place in the rings and the row of its block table. Pages are counted by how many sequences share
them; a page that is partly filled and shared is replaced by a copy before anything is written to it (copy on write), a
full page is never written again. Every method either does all it was asked, or raises before it has changed anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nbfmha.kv_layout import BLOCK, MAX_TOKENS, CacheLayout, check_int
from nbfmha.validation import message


class CacheFull(RuntimeError):
    """No page or no slot is left for what was asked; nothing has changed."""


class Stats(NamedTuple):
    """What a cache holds.

    sequences, free_sequences    slots in use and not
    tokens                       of all sequences, as the host knows them
    pages, free_pages            of the pool, and those that nobody owns
    shared_pages                 that more than one sequence owns
    """

    sequences: int
    free_sequences: int
    tokens: int
    pages: int
    free_pages: int
    shared_pages: int


@dataclass(frozen=True)
class Changes:
    """What a call changed, for the device to follow. entries: int32 (n, 3), slot, column and page of the block tables.
    copies: int32 (n, 2), pages to be copied, from and to; before anything is written."""

    entries: np.ndarray
    copies: np.ndarray


class PagePool:
    """Slots, lengths and pages of a cache of ``pages`` pages, ``max_sequences`` slots and ``max_length`` tokens each.

    Raises ``TypeError`` or ``ValueError`` for a number out of range.
    """

    def __init__(self, layout: CacheLayout, pages: int, max_sequences: int, max_length: int):
        self.layout = layout
        self.pages = check_int("pages", pages, 1, MAX_TOKENS)
        self.max_sequences = check_int("max_sequences", max_sequences, 1, MAX_TOKENS)
        self.max_length = check_int("max_length", max_length, 1, MAX_TOKENS - BLOCK)
        self.lengths = np.zeros(max_sequences, np.int64)
        width = max(layout.pages_of(self.max_length), 1)
        self.tables = np.full((max_sequences, width), -1, np.int32)
        self._owned = np.zeros(max_sequences, np.int64)  # pages of each slot
        self._live = np.zeros(max_sequences, bool)
        self._room = np.zeros(max_sequences, np.int64)  # lengths up to which a slot surely needs nothing
        self._known: tuple[tuple, np.ndarray] = (), np.zeros(0, np.int64)  # the ids that came last, and their slots
        self._owners = np.zeros(pages, np.int64)  # sequences of each page
        self._free_pages = list(range(pages - 1, -1, -1))
        self._free_slots = list(range(max_sequences - 1, -1, -1))

    @property
    def stats(self) -> Stats:
        """What is in use now."""
        free, shared = len(self._free_pages), int(np.count_nonzero(self._owners > 1))
        sequences = int(self._live.sum())
        return Stats(sequences, len(self._free_slots), int(self.lengths.sum()), self.pages, free, shared)

    def slots(self, name: str, seq_ids: object) -> np.ndarray:
        """Sequence ids as int64 slots. Raises ``TypeError`` for anything but integers in host memory, ``ValueError`` for
        one that is no sequence now, or comes twice."""
        if isinstance(seq_ids, list) and seq_ids and tuple(seq_ids) == self._known[0]:
            return self._known[1]
        way_out = "pass a list of ints, or a NumPy array"
        if not isinstance(seq_ids, list | tuple | np.ndarray | range):
            raise TypeError(message(name, "integers in host memory", type(seq_ids).__name__, way_out))
        slots = np.asarray(seq_ids)
        if slots.ndim != 1 or (slots.size and slots.dtype.kind not in "iu"):
            got = f"an array of {slots.dtype} and shape {slots.shape}"
            raise TypeError(message(name, "one-dimensional, of integers", got, way_out))
        slots = slots.astype(np.int64)
        inside = (slots >= 0) & (slots < self.max_sequences)
        unknown = slots[~(inside & self._live[np.where(inside, slots, 0)])]
        if unknown.size:
            raise ValueError(message(name, "sequences that allocate or fork gave", int(unknown[0]), "is it freed?"))
        if len(np.unique(slots)) < len(slots):
            raise ValueError(message(name, "each sequence once", slots.tolist(), "append one chunk of each"))
        self._known = tuple(slots.tolist()), slots
        return slots

    def allocate(self, count: int) -> np.ndarray:
        """Slots of ``count`` new, empty sequences. Raises ``CacheFull`` where there are fewer."""
        if count > len(self._free_slots):
            free = f"{len(self._free_slots)} of {self.max_sequences} free"
            raise CacheFull(f"out of sequences: {count} asked, {free}; free some")
        slots = np.array([self._free_slots.pop() for _ in range(count)], np.int64)
        self._live[slots] = True
        self._room[slots] = self._room_of(slots)
        return slots

    def grown(self, slots: np.ndarray, tokens: np.ndarray) -> np.ndarray | None:
        """int64 (slots,): lengths with ``tokens`` more tokens a slot, where ``reserve`` surely has nothing to do for them;
        None elsewhere."""
        longer = self.lengths[slots] + tokens
        return None if np.count_nonzero(longer > self._room[slots]) else longer

    def note(self, slots: np.ndarray, longer: np.ndarray) -> None:
        """``advance`` to the lengths that ``grown`` gave."""
        self.lengths[slots] = longer

    def reserve(self, slots: np.ndarray, tokens: np.ndarray) -> Changes:
        """Own the pages of ``tokens`` more tokens a slot, and alone those that they will be written to.

        Raises ``ValueError`` beyond max_length, ``CacheFull`` where pages are missing.
        """
        if self.grown(slots, tokens) is not None:
            return _NOTHING
        missing, columns, shared = self._wanted(slots, tokens)
        writes_to = self.tables[slots, columns]
        self._check_free(int(missing.sum()) + self._copies(writes_to[shared]))
        entries, copies = [], []
        for i in np.flatnonzero(shared):
            # a sequence before this one may have left the page to this one alone
            if self._owners[writes_to[i]] > 1:
                column = int(columns[i])
                copies.append((writes_to[i], self._take(slots[i], column)))
                self._owners[writes_to[i]] -= 1
                entries.append((slots[i], column, self.tables[slots[i], column]))
        for i in np.flatnonzero(missing):
            for column in range(self._owned[slots[i]], self._owned[slots[i]] + missing[i]):
                entries.append((slots[i], column, self._take(slots[i], column)))
            self._owned[slots[i]] += missing[i]
        self._room[slots] = self._room_of(slots)
        return Changes(_int32(entries, 3), _int32(copies, 2))

    def advance(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Note that ``tokens`` more tokens a slot have been appended. Raises ``ValueError`` where their pages are
        missing."""
        longer = self.grown(slots, tokens)
        if longer is not None:
            self.note(slots, longer)
            return
        longer = self.lengths[slots] + tokens
        short = (longer > self.max_length) | (self.layout.pages_of(longer) > self._owned[slots])
        if short.any():
            worst = slots[np.flatnonzero(short)[0]]
            got = f"more, of sequence {int(worst)}"
            raise ValueError(message("tokens", "what was reserved", got, "reserve more before"))
        self.lengths[slots] = longer

    def fork(self, slot: int, count: int) -> tuple[np.ndarray, Changes]:
        """Slots of ``count`` copies of a sequence that share all its pages that hold something, and the changes."""
        slots = self.allocate(count)
        pages = self.layout.pages_of(int(self.lengths[slot]))
        row = self.tables[slot, :pages]
        self.tables[slots, :pages] = row
        self.lengths[slots], self._owned[slots] = self.lengths[slot], pages
        self._owners[row] += count
        self._room[slots] = self._room_of(slots)
        self._room[slot] = self._room_of(np.array([slot]))[0]
        entries = [(new, column, page) for new in slots for column, page in enumerate(row)]
        return slots, Changes(_int32(entries, 3), _int32([], 2))

    def free(self, slots: np.ndarray) -> None:
        """Give the slots back, and the pages that nobody else has."""
        for slot in slots:
            for page in self.tables[slot, : self._owned[slot]]:
                self._owners[page] -= 1
                if not self._owners[page]:
                    self._free_pages.append(int(page))
            self._free_slots.append(int(slot))
        self.tables[slots], self.lengths[slots], self._owned[slots], self._live[slots] = -1, 0, 0, False
        self._known = (), slots[:0]

    def pages_in_use(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each sequence's slot and its pages, in the order of their tokens."""
        for slot in np.flatnonzero(self._live):
            yield int(slot), self.tables[slot, : self._owned[slot]].copy()

    def has_reserved(self, slots: np.ndarray, tokens: np.ndarray) -> bool:
        """Whether ``reserve`` would change nothing. Raises ``ValueError`` beyond max_length."""
        if self.grown(slots, tokens) is not None:
            return True
        missing, _, shared = self._wanted(slots, tokens)
        return not missing.any() and not shared.any()

    def _room_of(self, slots: np.ndarray) -> np.ndarray:
        """Lengths up to which ``slots`` write to no page but those that they own alone. Others may give up a page that is
        shared, so that it is more, but only a fork of the slot itself makes it less."""
        stored = self.layout.quantized_tokens(self.lengths[slots])
        first = self.tables[slots, np.minimum(stored // self.layout.page_size, self.tables.shape[1] - 1)]
        shared = (stored % self.layout.page_size != 0) & (self._owners[first] > 1)
        last = np.where(shared, stored, self._owned[slots] * self.layout.page_size)
        return np.minimum(last + self.layout.ring_tokens - 1, self.max_length)

    def _wanted(self, slots: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For ``tokens`` more tokens a slot: pages that are missing; the column of the page that is written to first;
        and whether this one is shared and holds something already."""
        length, longer = self.lengths[slots], self.lengths[slots] + tokens
        if longer.size and longer.max() > self.max_length:
            worst = int(np.argmax(longer))
            got = f"{int(length[worst])} + {int(tokens[worst])} of sequence {int(slots[worst])}"
            raise ValueError(message("tokens", f"within max_length = {self.max_length}", got, "make the cache longer"))
        size = self.layout.page_size
        first, stop = self.layout.quantized_tokens(length), self.layout.quantized_tokens(longer)
        missing = np.maximum(-(-stop // size) - self._owned[slots], 0)
        columns = np.minimum(first // size, self.tables.shape[1] - 1)
        shared = (stop > first) & (first % size != 0) & (self._owners[self.tables[slots, columns]] > 1)
        return missing, columns, shared

    def _copies(self, shared: np.ndarray) -> int:
        """Copies of pages that as many sequences as named in ``shared`` are about to write to: all but the last
        owner's."""
        pages, writers = np.unique(shared, return_counts=True)
        return int(np.minimum(writers, self._owners[pages] - 1).sum())

    def _check_free(self, wanted: int) -> None:
        if wanted > len(self._free_pages):
            got = f"{wanted} pages wanted, {len(self._free_pages)} of {self.pages} free"
            raise CacheFull(f"out of pages: {got}; free sequences, or make the cache with more pages")

    def _take(self, slot: int, column: int) -> int:
        page = self._free_pages.pop()
        self._owners[page] = 1
        self.tables[slot, column] = page
        return page


def _int32(rows: list[tuple], columns: int) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, columns)


_NOTHING = Changes(_int32([], 3), _int32([], 2))
