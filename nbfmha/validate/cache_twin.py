"""A paged KV cache beside the history of its sequences, from which ``nbfmha.cache_model`` says what must be in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nbfmha import gpu_arrays
from nbfmha.cache import PagedKVCache
from nbfmha.cache_model import Contents, contents, mean_of_keys
from nbfmha.emulated import EmulatedArray
from nbfmha.testing import POISON_BYTE
from nbfmha.validation import dtype_name

#: Arrays of a cache that begin without content.
_EMPTY_AT_FIRST = (
    "k_codes", "k_scales", "v_codes", "v_scales", "k_recent", "v_recent", "k_sinks", "v_sinks"
)  # fmt: skip


class Part(NamedTuple):
    """Something that a cache holds: what it is, as the device has it and as the model does, and how far these may be
    apart (0: not at all)."""

    name: str
    got: np.ndarray
    expected: np.ndarray
    budget: np.ndarray | float = 0.0


@dataclass
class History:
    """k, v (tokens, num_heads_kv, head_dim) of a sequence as they came, its length after each append, and km float32
    (num_heads_kv, head_dim) where it was given."""

    k: np.ndarray
    v: np.ndarray
    lengths: list[int]
    k_mean: np.ndarray | None

    def __len__(self) -> int:
        return len(self.k)


class CacheTwin:
    """A ``PagedKVCache`` and the history of each of its ``sequences``. Pages, rings and sinks begin as poison: codes of -6,
    scales of NaN, NaN in 16 bits.

    to_device: NumPy array -> a copy where the cache is to lie; to_host: such an array -> its numbers in NumPy;
    numpy_dtype: of k and v; options: of ``PagedKVCache``.
    """

    def __init__(
        self,
        to_device: Callable[[np.ndarray], Any],
        to_host: Callable[[Any], np.ndarray],
        *,
        numpy_dtype: Any = np.float16,
        **options: Any,
    ):
        self.to_device, self.to_host, self._numpy_dtype = to_device, to_host, numpy_dtype
        self.cache = PagedKVCache(like=to_device(np.zeros(8, np.float16)), **options)
        self.layout = self.cache.layout
        self.sequences: dict[int, History] = {}
        for array in (getattr(self.cache.arrays, name) for name in _EMPTY_AT_FIRST):
            if not isinstance(array, EmulatedArray):  # where they are poison already
                gpu_arrays.fill(array, POISON_BYTE if dtype_name(array) == "uint8" else np.nan)

    def allocate(self, count: int = 1, k_mean: np.ndarray | None = None) -> list[int]:
        """Ids of new sequences, as ``PagedKVCache.allocate`` gives them."""
        ids = self.cache.allocate(count, k_mean=k_mean)
        empty = np.zeros((0, self.layout.num_heads_kv, self.layout.head_dim), self._numpy_dtype)
        for i, seq in enumerate(ids):
            self.sequences[seq] = History(empty, empty, [], None if k_mean is None else k_mean[i])
        return ids

    def append(self, chunks: Mapping[int, int], k: np.ndarray, v: np.ndarray) -> None:
        """Append k and v (tokens, num_heads_kv, head_dim): to each sequence its count of ``chunks``, in that order."""
        edges = np.cumsum([0, *chunks.values()])
        single = all(count == 1 for count in chunks.values())
        boundaries = None if single else edges.tolist()
        self.cache.append(self.to_device(k), self.to_device(v), list(chunks), boundaries)
        self.note(list(chunks), edges, k, v)

    def note(self, ids: Iterable[int], edges: Iterable[int], k: np.ndarray, v: np.ndarray) -> None:
        """Add rows to histories, after they were appended by other means."""
        edges = list(edges)
        for i, seq in enumerate(ids):
            old, rows = self.sequences[seq], slice(edges[i], edges[i + 1])
            old.k, old.v = np.concatenate([old.k, k[rows]]), np.concatenate([old.v, v[rows]])
            old.lengths.append(len(old))

    def fork(self, seq: int, count: int = 1) -> list[int]:
        """Ids of sequences that continue this one."""
        ids = self.cache.fork(seq, count)
        for new in ids:
            self.sequences[new] = replace(self.sequences[seq], lengths=list(self.sequences[seq].lengths))
        return ids

    def free(self, ids: list[int]) -> None:
        """Give sequences back, and forget them."""
        self.cache.free(ids)
        for seq in ids:
            del self.sequences[seq]

    def on_host(self) -> dict[str, np.ndarray]:
        """Every array of the cache, by name."""
        return {name: self.to_host(x) for name, x in vars(self.cache.arrays).items()}

    def held(self, seq: int) -> Contents:
        """What the cache stands for, with km as it has it: a kernel adds in an order of its own, see ``parts``."""
        return self._held(seq, self.to_host(self.cache.arrays.k_mean))

    def _held(self, seq: int, k_means: np.ndarray) -> Contents:
        own = self.sequences[seq]
        k, v = own.k.swapaxes(0, 1), own.v.swapaxes(0, 1)
        return contents(k, v, self.layout, own.lengths, k_mean=k_means[seq].astype(np.float32))

    def parts(self, ids: Iterable[int] | None = None) -> Iterator[Part]:
        """Lengths, km, and every byte of pages, rings and sinks that anybody may read, of all sequences or those of
        ``ids``; bit for bit but for km."""
        host, own = self.on_host(), self.sequences
        lengths = [len(own[slot]) if slot in own else 0 for slot in range(self.cache.max_sequences)]
        yield Part("lengths", host["lengths"], np.array(lengths))
        for seq in own if ids is None else ids:
            yield Part(f"length of {seq} on the host", self.cache.lengths_on_host([seq]), np.array([len(own[seq])]))
            yield self._mean(seq, host["k_mean"][seq])
            yield from self._tokens_in_16_bits(seq, host)
            yield from self._pages(seq, host)

    def _mean(self, seq: int, got: np.ndarray) -> Part:
        own = self.sequences[seq]
        if own.k_mean is not None:
            return Part(f"k_mean of {seq}", got, own.k_mean)
        k = own.k.swapaxes(0, 1)
        tokens = next((n for n in own.lengths if self.layout.quantized_tokens(n)), 0)
        # every term is rounded at most once for each one that is added after it, and their sum is divided
        magnitude = np.abs(k[:, :tokens].astype(np.float64)).mean(axis=1) if tokens else 0.0
        return Part(f"k_mean of {seq}", got, mean_of_keys(k, self.layout, own.lengths), (tokens + 2) * 2.0**-24 * magnitude)

    def _tokens_in_16_bits(self, seq: int, host: Mapping[str, np.ndarray]) -> Iterator[Part]:
        own = self.sequences[seq]
        stop, sinks = self.layout.quantized_tokens(len(own)), min(len(own), self.layout.sink_tokens)
        places = np.arange(stop, len(own)) % self.layout.ring_tokens
        for name, x in (("k", own.k.swapaxes(0, 1)), ("v", own.v.swapaxes(0, 1))):
            yield Part(f"{name}_recent of {seq}", host[f"{name}_recent"][seq][:, places], x[:, stop:].astype(np.float64))
            yield Part(f"{name}_sinks of {seq}", host[f"{name}_sinks"][seq][:, :sinks], x[:, :sinks].astype(np.float64))

    def _pages(self, seq: int, host: Mapping[str, np.ndarray]) -> Iterator[Part]:
        model = self._held(seq, host["k_mean"])
        stop = model.quantized_tokens
        pages = host["block_tables"][seq].astype(int)[: self.layout.pages_of(len(self.sequences[seq]))]
        yield Part(f"pages of {seq}, if they are there", pages >= 0, np.ones(len(pages), bool))
        if not stop:
            return
        for name, axis, expected in (("k", 1, model.k_pages), ("v", 2, model.v_pages)):
            for part, tokens_an_entry in (("codes", 2), ("scales", 16)):
                got = np.concatenate(list(host[f"{name}_{part}"][pages]), axis=axis)  # of (heads, ...) a page
                got = got[:, :stop] if name == "k" else got[..., : stop // tokens_an_entry]
                yield Part(f"{name}_{part} of {seq}", got, getattr(expected, part))
