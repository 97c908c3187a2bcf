"""What one forward attention call asks for: lengths, heads, mask, scale. No data, no choice of implementation.

Query row i of a sequence stands at position ``p = i + q_offset`` on that sequence's key axis, and sees the keys j with

    p - left <= j <= p + right          (``window``; None on a side: no bound there)
    j <= p                              (``causal``)

``q_offset`` is ``seqlen_k - seqlen_q`` when None: the last query stands on the last key (bottom right, as FlashAttention
has it since 2.1). A chunk in the middle of a prefill passes its own. What a row sees is always one range of keys, possibly
empty, so a mask is two integers a row: ``key_ranges``.

With scores ``x = softmax_scale * q.k`` and, where ``softcap`` is given, ``x = softcap * tanh(x / softcap)``:

    lse = log(sum over the keys seen of exp(x)  [+ exp(sink of the head)])        out = sum of exp(x - lse) v

A row that sees no key has out = 0 and lse = -inf (with a sink: lse = sink).

Packed sequences: ``cu_seqlens_q`` and ``cu_seqlens_k`` are the boundaries of sequences laid end to end along the token
axis of one batch entry; queries see keys of their own sequence alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from nbfmha.validation import FLOAT_DTYPES, check_choice, check_head_dim, check_rank, dtype_name, message

DTYPES = (*FLOAT_DTYPES, "float64")
"""Dtypes of the values; kernels take the first three, the references all."""
NO_LIMIT = 1 << 30
"""Stands for "no bound" where a kernel takes a number of tokens: more than any sequence has."""


class Sequence(NamedTuple):
    """One sequence: its rows of the token axes, and the position of its first query on its own key axis."""

    queries: slice
    keys: slice
    q_offset: int


@dataclass(frozen=True)
class Problem:
    """One forward attention call on q (batch, num_heads_q, seqlen_q, head_dim) and k, v (batch, num_heads_kv, seqlen_k, .).

    ``batch`` counts all leading axes together. ``seqlen_q`` and ``seqlen_k`` are the lengths of the token axes: the total
    over all sequences when packed. ``softmax_scale`` None becomes 1/sqrt(head_dim). ``has_sinks``: a logit for each query
    head joins the denominator; the logits themselves are data, as q is, and passed beside it. The module says the rest.

    Hashable, and two equal problems are the same call. Raises ``TypeError`` for a wrong type, ``ValueError`` for a value
    out of range or a combination without meaning.
    """

    batch: int
    num_heads_q: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "float16"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    softmax_scale: float | None = None
    q_offset: int | None = None
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None
    has_sinks: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "seqlen_q", "seqlen_k"):
            self._set(name, _integer(name, getattr(self, name), 0))
        for name in ("num_heads_q", "num_heads_kv"):
            self._set(name, _integer(name, getattr(self, name), 1))
        self._set("head_dim", check_head_dim(_integer("head_dim", self.head_dim)))
        if self.num_heads_q % self.num_heads_kv:
            raise ValueError(message("num_heads_q", f"a multiple of num_heads_kv ({self.num_heads_kv})", self.num_heads_q))
        check_choice("dtype", self.dtype, DTYPES, "convert it first")
        for name in ("causal", "has_sinks"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise TypeError(message(name, "True or False", repr(getattr(self, name))))
            self._set(name, bool(getattr(self, name)))
        self._set("window", _check_window(self.window))
        if self.softcap is not None:
            self._set("softcap", _real("softcap", self.softcap, "None for no cap"))
            if self.softcap <= 0:
                raise ValueError(message("softcap", "> 0", self.softcap, "None for no cap"))
        default = 1 / math.sqrt(self.head_dim)
        scale = default if self.softmax_scale is None else _real("softmax_scale", self.softmax_scale)
        self._set("softmax_scale", scale)
        self._check_packing()
        if self.q_offset is not None:
            self._set("q_offset", _integer("q_offset", self.q_offset))
        elif not self.is_packed:
            self._set("q_offset", self.seqlen_k - self.seqlen_q)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_packing(self) -> None:
        if (self.cu_seqlens_q is None) != (self.cu_seqlens_k is None):
            missing = "cu_seqlens_q" if self.cu_seqlens_q is None else "cu_seqlens_k"
            raise ValueError(message(missing, "given when the other one is", None, "pass both or neither"))
        if self.cu_seqlens_q is None:
            return
        for name, total in (("cu_seqlens_q", self.seqlen_q), ("cu_seqlens_k", self.seqlen_k)):
            self._set(name, _boundaries(name, getattr(self, name), total))
        if len(self.cu_seqlens_q) != len(self.cu_seqlens_k):
            got = f"{len(self.cu_seqlens_q)} and {len(self.cu_seqlens_k)} boundaries"
            raise ValueError(message("cu_seqlens_q and cu_seqlens_k", "of one length", got))
        if self.batch != 1:
            raise ValueError(message("batch", "1 with cu_seqlens_q", self.batch, "lay all sequences end to end"))
        if self.q_offset is not None:
            way_out = "the last query of each sequence stands on its last key"
            raise ValueError(message("q_offset", "None with cu_seqlens_q", self.q_offset, way_out))

    @classmethod
    def of(cls, q: Any, k: Any, v: Any, **options: Any) -> Problem:
        """The problem of q (..., num_heads_q, seqlen_q, head_dim) and k, v (..., num_heads_kv, seqlen_k, ...).

        Takes arrays of any library and ``QuantizedTensor``s: only shapes and the dtype of q are read ("float32" where q
        is quantised). ``options`` are the fields from ``causal`` on. Raises as the class does, and ``ValueError`` for
        shapes that do not fit together.
        """
        shapes = {}
        for name, array in (("q", q), ("k", k), ("v", v)):
            if not hasattr(array, "shape"):
                raise TypeError(message(name, "an array or a QuantizedTensor", type(array).__name__))
            shapes[name] = check_rank(name, array, 3, "(..., num_heads, tokens, head_dim)")
            check_head_dim(shapes[name][-1])
        *batch, num_heads_q, seqlen_q, head_dim = shapes["q"]
        num_heads_kv, seqlen_k, _ = shapes["k"][-3:]
        check_shapes(**shapes)
        name = dtype_name(q)
        return cls(
            math.prod(batch),
            num_heads_q,
            num_heads_kv,
            seqlen_q,
            seqlen_k,
            head_dim,
            dtype="float32" if name == "none" else name,
            **options,
        )

    def check_arrays(self, q: Any, k: Any, v: Any) -> None:
        """Raise ``ValueError`` where q, k and v are not the arrays that this problem describes (dtype apart)."""
        for name, array, heads, tokens in (
            ("q", q, self.num_heads_q, self.seqlen_q),
            ("k", k, self.num_heads_kv, self.seqlen_k),
        ):
            shape = tuple(array.shape)
            expected = (heads, tokens, self.head_dim)
            if shape[-3:] != expected or math.prod(shape[:-3]) != self.batch:
                text = f"of shape (batch, num_heads, tokens, head_dim) = {(self.batch, *expected)}, as the problem says"
                raise ValueError(message(name, text, shape))
        check_shapes(tuple(q.shape), tuple(k.shape), tuple(v.shape))

    @property
    def qhead_per_kvhead(self) -> int:
        """Query heads that read one key/value head: query head h reads key/value head h // qhead_per_kvhead."""
        return self.num_heads_q // self.num_heads_kv

    @property
    def is_packed(self) -> bool:
        """Whether several sequences lie end to end along the token axes."""
        return self.cu_seqlens_q is not None

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """How far a query sees to the left and to the right of its position, ``causal`` included; None: without bound."""
        left, right = self.window or (None, None)
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return left, right

    @property
    def limits(self) -> tuple[int, int]:
        """``bounds`` as kernels take them: at most ``NO_LIMIT``, which is none."""
        left, right = (NO_LIMIT if side is None else min(side, NO_LIMIT) for side in self.bounds)
        return left, right

    def sequences(self) -> Iterator[Sequence]:
        """The sequences in order: one of the whole token axes, unless packed."""
        if not self.is_packed:
            yield Sequence(slice(0, self.seqlen_q), slice(0, self.seqlen_k), self.q_offset)
            return
        for (q0, q1), (k0, k1) in zip(pairwise(self.cu_seqlens_q), pairwise(self.cu_seqlens_k), strict=True):
            yield Sequence(slice(q0, q1), slice(k0, k1), (k1 - k0) - (q1 - q0))

    def key_ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """(first, stop), int64 (seqlen_q,): query row i sees rows first[i] <= j < stop[i] of k, none when equal."""
        first, stop = np.zeros(self.seqlen_q, np.int64), np.zeros(self.seqlen_q, np.int64)
        left, right = self.bounds
        for queries, keys, q_offset in self.sequences():
            start, length = keys.start, keys.stop - keys.start
            position = np.arange(queries.stop - queries.start) + q_offset
            begin = np.zeros_like(position) if left is None else np.clip(position - left, 0, length)
            end = np.full_like(position, length) if right is None else np.clip(position + right + 1, 0, length)
            first[queries] = start + begin
            stop[queries] = start + np.maximum(begin, end)
        return first, stop

    def mask(self) -> np.ndarray:
        """bool (seqlen_q, seqlen_k): True where the query row sees the key row. For small problems: it is dense."""
        first, stop = self.key_ranges()
        keys = np.arange(self.seqlen_k)
        return (first[:, None] <= keys) & (keys < stop[:, None])


def check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Raise ``ValueError`` where shapes (..., num_heads, tokens, head_dim) of q, k and v do not fit together."""
    if q[-1] != k[-1]:
        raise ValueError(message("head_dim", f"that of q ({q[-1]}) in k", k[-1]))
    if v[:-1] != k[:-1]:
        raise ValueError(message("v", f"of shape {k[:-1]} + (head_dim,), as k is", v))
    if q[:-3] != k[:-3]:
        raise ValueError(message("k", f"of the batch shape of q, {q[:-3]}", k[:-3]))


def _integer(name: str, value: object, minimum: int | None = None) -> int:
    expected = "an integer" if minimum is None else f"an integer >= {minimum}"
    if isinstance(value, bool | np.bool_):
        raise TypeError(message(name, expected, repr(value)))
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(message(name, expected, repr(value))) from None
    if minimum is not None and number < minimum:
        raise ValueError(message(name, expected, number))
    return number


def _real(name: str, value: object, way_out: str | None = None) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(message(name, "a number or None", repr(value), way_out))
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(message(name, "finite", number, way_out))
    return number


def _check_window(window: object) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(message("window", "(left, right) or None", repr(window)))
    for side in window:
        if side is not None and _integer("window", side) < 0:
            way_out = "None stands for no bound (FlashAttention's -1)"
            raise ValueError(message("window", "(left, right), each >= 0 or None", tuple(window), way_out))
    left, right = (None if side is None else int(side) for side in window)
    return None if left is None and right is None else (left, right)


def _boundaries(name: str, value: Any, total: int) -> tuple[int, ...]:
    try:
        edges = tuple(_integer(name, edge) for edge in (value.tolist() if hasattr(value, "tolist") else value))
    except TypeError:
        raise TypeError(message(name, "a sequence of integers", repr(value))) from None
    rule = f"from 0 to {total}, the length of the token axis, without a step back"
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != total or any(a > b for a, b in pairwise(edges)):
        raise ValueError(message(name, rule, edges))
    return edges
