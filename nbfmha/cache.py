"""``PagedKVCache``: K and V of many sequences in NVFP4 pages, their newest and first tokens in 16 bits.

What lies where: :mod:`nbfmha.kv_layout`. What it stands for: :mod:`nbfmha.cache_model`. Who owns which page:
:mod:`nbfmha.page_pool`, on the host, which keeps lengths and page lists of its own and so never waits for the GPU; the
device's are changed by kernels, in the order of the library's current stream. A cache belongs to one stream at a time,
and to one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbfmha import gpu_arrays
from nbfmha.append_plan import Appends
from nbfmha.kv_layout import CacheArrays, CacheLayout, check_int
from nbfmha.page_pool import Changes, PagePool, Stats
from nbfmha.tiles import View
from nbfmha.uploads import Uploads
from nbfmha.validation import dtype_name, message
from nbfmha.views import view_of
from ptx_inline.toolchain.arrays import is_torch

_HOST = "move it to the GPU, or to an emulated machine: nbfmha.emulated.Machine('sm_120a').array(x)"


_GRANULE = 16
"""Bytes of which addresses and strides of k and v are multiples."""
_KINDS = 256
"""Kinds of k and v that are remembered."""


class Chunks:
    """The chunks of one call: ``edges``, int64 (sequences + 1,), divide the rows of k and v."""

    def __init__(self, slots: np.ndarray, edges: np.ndarray):
        self.slots, self._edges = slots, edges
        self.tokens = np.diff(edges)
        self.longest = int(self.tokens.max()) if len(slots) else 0
        self.key = "append", slots.tobytes(), edges.tobytes()

    def work(self) -> np.ndarray:
        """int32 (sequences, 3), as ``nbfmha.kernels.append`` reads it."""
        return np.stack([self.slots, self._edges[:-1], self.tokens], axis=1).astype(np.int32)


class PagedKVCache:
    """A pool of pages for the keys and values of many sequences.

    Args:
        like: any array of the library and device where the cache is to lie: torch, CuPy or Numba in GPU memory, or an
            array of an emulated machine.
        pages: how many pages there are, of ``page_size`` tokens each.
        num_heads_kv, head_dim, page_size, dtype, recent_tokens, sink_tokens, scale: of
            :class:`~nbfmha.kv_layout.CacheLayout`. dtype is that of ``like`` where it is None.
        max_sequences: sequences at one time. max_length: tokens of a sequence at most.

    Sequence ids are small ints, as a serving engine's slots; ``arrays`` and ``layout`` are what kernels read.

    Raises ``TypeError`` for host memory or a library that we cannot allocate with, ``TypeError`` or ``ValueError`` for
    sizes out of range.
    """

    def __init__(
        self,
        *,
        like: Any,
        pages: int,
        num_heads_kv: int,
        head_dim: int,
        page_size: int = 64,
        max_sequences: int = 64,
        max_length: int = 131072,
        dtype: str | None = None,
        recent_tokens: int | None = None,
        sink_tokens: int | None = None,
        scale: str | None = None,
    ):
        _check_place("like", like)
        optional = {"recent_tokens": recent_tokens, "sink_tokens": sink_tokens, "scale": scale}
        chosen = {name: value for name, value in optional.items() if value is not None}
        dtype = dtype_name(like) if dtype is None else dtype
        self.layout = CacheLayout(num_heads_kv, head_dim, page_size, dtype, **chosen)
        self._pool = PagePool(self.layout, pages, max_sequences, max_length)
        made = {}
        for name, (shape, kind) in self.layout.shapes(pages, max_sequences, max_length).items():
            start = {"k_mean": 0, "lengths": 0, "block_tables": -1}.get(name)
            if start is None:
                made[name] = gpu_arrays.empty_for_parts(like, shape, kind)
            else:
                made[name] = gpu_arrays.fill(gpu_arrays.empty(like, shape, kind), start)
        self.arrays = CacheArrays(**made)
        self._mean_given, self._tickets = (
            gpu_arrays.fill(gpu_arrays.empty(like, (max_sequences,), "int32"), 0) for _ in range(2)
        )
        self._place = gpu_arrays.place_of(self.arrays.lengths)
        self._uploads = Uploads(self.arrays.lengths)
        self._appends = Appends(self.arrays, self.layout, self._mean_given, self._tickets)
        self._known_rows: dict[tuple, tuple] = {}
        self._last_chunks = Chunks(np.zeros(0, np.int64), np.zeros(1, np.int64))

    def allocate(self, count: int = 1, *, k_mean: Any = None) -> list[int]:
        """Ids of ``count`` new, empty sequences.

        k_mean: km of each, float32 (count, num_heads_kv, head_dim), NumPy or where the cache lies. Without it km is
        fixed when a sequence's first block is quantised, as the mean over the tokens that it has then.

        Raises ``CacheFull`` where fewer are free, ``TypeError`` or ``ValueError`` for a k_mean that does not fit.
        """
        count = check_int("count", count, 1, self._pool.max_sequences)
        if k_mean is not None:
            self._check_not_capturing()
        means = None if k_mean is None else self._check_mean(k_mean, count)
        slots = self._pool.allocate(count)
        if means is not None:
            self._clear(slots, means)
        return slots.tolist()

    def append(self, k: Any, v: Any, seq_ids: Sequence[int], cu_seqlens: Sequence[int] | None = None) -> None:
        """Append to each of the sequences one chunk of tokens, queued on the current stream: one launch, and one more
        for km where a chunk has more than 64 tokens; small ones where pages change hands.

        Args:
            k, v: (tokens, num_heads_kv, head_dim), chunks laid end to end, where the cache lies, of its dtype; strides
                are taken as they are, if channels are neighbours and the other strides multiples of 16 bytes. Read only.
            seq_ids: ints in host memory, each once.
            cu_seqlens: boundaries of the chunks, len(seq_ids) + 1 ints in host memory from 0 to tokens; None: one token
            each.

        While a CUDA graph is captured nothing may be allocated or copied from the host: ``reserve`` the pages of all
        replays and call ``append`` with the same ids and boundaries once before. Every replay appends; tell the host by
        ``advance``, before anything else is done with the sequence. A replay beyond the reserved pages leaves the
        sequence as it is.

        Raises, before anything is written or changed: ``CacheFull`` where pages are missing; ``ValueError`` beyond
        max_length, for ids that are no sequences, shapes or strides; ``TypeError`` for a wrong dtype, library or place;
        ``RuntimeError`` for what a capture has not.
        """
        slots = self._pool.slots("seq_ids", seq_ids)
        rows = self._rows(k, v)
        chunks = self._chunks_of(cu_seqlens, slots, k.shape[0])
        capturing = gpu_arrays.is_capturing(self.arrays.lengths)
        longer = self._pool.grown(slots, chunks.tokens)
        if capturing and longer is None and not self._pool.has_reserved(slots, chunks.tokens):
            raise RuntimeError("pages of captured appends must be there before the capture; call reserve first")
        work = self._uploads.get(chunks.key, chunks.work)
        if longer is None and not capturing:
            self._follow(self._pool.reserve(slots, chunks.tokens))
        if chunks.longest:
            self._appends.queue(*rows, work, chunks.longest)
        if capturing:
            return
        if longer is None:
            self._pool.advance(slots, chunks.tokens)
        else:
            self._pool.note(slots, longer)

    def reserve(self, seq_ids: Sequence[int], tokens: int | Sequence[int]) -> None:
        """Give each sequence the pages of ``tokens`` more tokens (one number, or one each), so that appending these
        changes nothing on the host. Raises as ``append``."""
        slots = self._pool.slots("seq_ids", seq_ids)
        self._check_not_capturing()
        self._follow(self._pool.reserve(slots, _tokens_each(tokens, slots)))

    def advance(self, seq_ids: Sequence[int], tokens: int | Sequence[int] = 1) -> None:
        """Tell the host that replays of a CUDA graph have appended ``tokens`` more tokens (one number, or one each).
        Raises ``ValueError`` for more than was reserved."""
        slots = self._pool.slots("seq_ids", seq_ids)
        self._pool.advance(slots, _tokens_each(tokens, slots))

    def fork(self, seq_id: int, count: int = 1) -> list[int]:
        """Ids of ``count`` sequences that continue this one. They share its pages, and copy its ring, sinks and km; a
        page that is partly filled is copied when one of them writes to it. Raises ``CacheFull`` where ids are
        missing."""
        from nbfmha.kernels import cache_moves

        slot = int(self._pool.slots("seq_id", [seq_id])[0])
        self._check_not_capturing()
        new, changes = self._pool.fork(slot, check_int("count", count, 1, self._pool.max_sequences))
        self._follow(changes)
        pairs = np.stack([np.full_like(new, slot), new], axis=1).astype(np.int32)
        cache_moves.copy_slots(self.arrays, self.layout, self._mean_given, self._upload(pairs))
        return new.tolist()

    def free(self, seq_ids: Sequence[int]) -> None:
        """Give back the sequences, and the pages that no other one shares. Raises ``ValueError`` for an id that is
        none."""
        slots = self._pool.slots("seq_ids", seq_ids)
        self._check_not_capturing()
        if len(slots):
            self._pool.free(slots)
            self._clear(slots, None)

    def lengths_on_host(self, seq_ids: Sequence[int]) -> np.ndarray:
        """int32 (len(seq_ids),): tokens of each sequence, as the host knows them."""
        return self._pool.lengths[self._pool.slots("seq_ids", seq_ids)].astype(np.int32)

    def device_ids(self, seq_ids: Sequence[int]) -> Any:
        """The ids as an int32 array where the cache lies; kept for the next call."""
        slots = self._pool.slots("seq_ids", seq_ids)
        return self._uploads.get(("ids", slots.tobytes()), lambda: slots.astype(np.int32))

    @property
    def lengths(self) -> Any:
        """int32 (max_sequences,) where the cache lies: tokens of every id, 0 for those not in use."""
        return self.arrays.lengths

    @property
    def block_tables(self) -> Any:
        """int32 (max_sequences, pages of a sequence at most) where the cache lies; -1 where there is no page."""
        return self.arrays.block_tables

    @property
    def max_length(self) -> int:
        """Tokens of a sequence at most."""
        return self._pool.max_length

    @property
    def max_sequences(self) -> int:
        """Sequences at one time."""
        return self._pool.max_sequences

    @property
    def stats(self) -> Stats:
        """What is in use now."""
        return self._pool.stats

    @property
    def bytes_per_token(self) -> float:
        """Of a token in a page: K and V, codes and scales, of all heads."""
        return self.layout.bytes_per_token

    @property
    def nbytes(self) -> int:
        """Of all arrays of the cache."""
        pages, sequences = self._pool.pages, self._pool.max_sequences
        width = self.arrays.block_tables.shape[1]
        return pages * self.layout.bytes_per_page + sequences * (self.layout.bytes_per_sequence + 4 * (width + 3))

    def _follow(self, changes: Changes) -> None:
        """Queue what the host's account has changed: copies first, which read pages that may be written to
        afterwards."""
        from nbfmha.kernels import cache_moves

        if len(changes.copies):
            cache_moves.copy_pages(self.arrays, self.layout, self._upload(changes.copies))
        if len(changes.entries):
            cache_moves.set_entries(self.arrays, self._upload(changes.entries))

    def _clear(self, slots: np.ndarray, means: Any) -> None:
        from nbfmha.kernels import cache_moves

        cache_moves.clear(self.arrays, self._mean_given, self._upload(slots.astype(np.int32)), means)

    def _upload(self, values: np.ndarray) -> Any:
        return gpu_arrays.upload(self.arrays.lengths, values)

    def _check_not_capturing(self) -> None:
        if gpu_arrays.is_capturing(self.arrays.lengths):
            raise RuntimeError("pages and sequences cannot change hands while a CUDA graph is captured; do it before")

    def _rows(self, k: Any, v: Any) -> tuple[View, View]:
        """Views of both. Tensors of torch that lie as some that have passed the checks pass them, if they are aligned."""
        key = _kind(k), _kind(v)
        strides = None if None in key else self._known_rows.get(key)
        if strides is not None and not (k.data_ptr() | v.data_ptr()) % _GRANULE:
            return View(k, strides[0]), View(v, strides[1])
        views = self._check_rows("k", k), self._check_rows("v", v)
        if v.shape[0] != k.shape[0]:
            raise ValueError(message("v", f"of shape {tuple(k.shape)}, as k", tuple(v.shape)))
        if None not in key:
            if len(self._known_rows) >= _KINDS:
                self._known_rows.clear()
            self._known_rows[key] = views[0].strides, views[1].strides
        return views

    def _chunks_of(self, cu_seqlens: Any, slots: np.ndarray, rows: int) -> Chunks:
        """The chunks of a call; those of the last one where the sequences are the same, a token each."""
        if cu_seqlens is None and self._last_chunks.slots is slots and rows == len(slots):
            return self._last_chunks
        chunks = Chunks(slots, _check_edges(cu_seqlens, len(slots), rows))
        if cu_seqlens is None:
            self._last_chunks = chunks
        return chunks

    def _check_rows(self, name: str, x: Any) -> View:
        _check_place(name, x)
        if gpu_arrays.place_of(x) != self._place:
            got = gpu_arrays.place_of(x)
            raise TypeError(message(name, f"where the cache lies ({self._place})", got, "move it there"))
        if dtype_name(x) != self.layout.dtype:
            expected = f"{self.layout.dtype}, the cache's"
            raise TypeError(message(f"{name}.dtype", expected, dtype_name(x), "convert it first"))
        shape, heads = tuple(x.shape), (self.layout.num_heads_kv, self.layout.head_dim)
        if len(shape) != 3 or shape[1:] != heads:
            raise ValueError(message(name, f"of shape (tokens, {heads[0]}, {heads[1]})", shape))
        return view_of(name, x, "bshd", self.layout.dtype, _GRANULE)

    def _check_mean(self, k_mean: Any, count: int) -> Any:
        if not isinstance(k_mean, np.ndarray):
            _check_place("k_mean", k_mean)
            if gpu_arrays.place_of(k_mean) != self._place:
                expected = f"NumPy, or where the cache lies ({self._place})"
                raise TypeError(message("k_mean", expected, gpu_arrays.place_of(k_mean)))
            gpu_arrays.check_contiguous("k_mean", k_mean)
        if dtype_name(k_mean) != "float32":
            raise TypeError(message("k_mean.dtype", "float32", dtype_name(k_mean), "convert it first"))
        expected = (count, self.layout.num_heads_kv, self.layout.head_dim)
        if tuple(k_mean.shape) != expected:
            raise ValueError(message("k_mean", f"of shape {expected}", tuple(k_mean.shape)))
        return self._upload(k_mean) if isinstance(k_mean, np.ndarray) else k_mean


def _kind(x: Any) -> tuple | None:
    """All of a torch tensor that ``_check_rows`` looks at but its address; None for another array."""
    return (x.dtype, x.shape, x.stride(), x.get_device()) if is_torch(x) else None


def _check_place(name: str, array: Any) -> None:
    if not gpu_arrays.runs_kernels(array):
        expected = "in GPU memory (torch, CuPy or Numba), or an array of an emulated machine"
        raise TypeError(message(name, expected, f"{type(array).__name__} in host memory", _HOST))


def _check_edges(cu_seqlens: Any, sequences: int, rows: int) -> np.ndarray:
    """int64 (sequences + 1,): the boundaries of the chunks."""
    if cu_seqlens is None:
        if rows != sequences:
            way_out = "pass cu_seqlens for chunks"
            raise ValueError(message("k", f"one token for each of {sequences} sequences", f"{rows} tokens", way_out))
        return np.arange(sequences + 1)
    if not isinstance(cu_seqlens, list | tuple | np.ndarray | range):
        got, way_out = type(cu_seqlens).__name__, "pages are counted on the host: pass a list of ints, or a NumPy array"
        raise TypeError(message("cu_seqlens", "integers in host memory", got, way_out))
    edges = np.asarray(cu_seqlens)
    if edges.dtype.kind not in "iu" or edges.shape != (sequences + 1,):
        raise ValueError(message("cu_seqlens", f"{sequences + 1} integers", f"{edges.dtype} of shape {edges.shape}"))
    edges = edges.astype(np.int64)
    if edges[0] != 0 or edges[-1] != rows or np.any(np.diff(edges) < 0):
        raise ValueError(message("cu_seqlens", f"ascending from 0 to the {rows} tokens of k", edges.tolist()))
    return edges


def _tokens_each(tokens: Any, slots: np.ndarray) -> np.ndarray:
    """int64 (len(slots),): how many tokens for each."""
    counts = np.asarray(tokens)
    if counts.dtype.kind not in "iu" or counts.shape not in ((), slots.shape):
        got = f"{counts.dtype} of shape {counts.shape}"
        raise ValueError(message("tokens", f"an integer, or {len(slots)} of them", got))
    if counts.size and counts.min() < 0:
        raise ValueError(message("tokens", ">= 0", int(counts.min())))
    return np.broadcast_to(counts, slots.shape).astype(np.int64)
