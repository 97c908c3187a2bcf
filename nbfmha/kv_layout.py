"""How a paged NVFP4 KV cache lies in memory: what stands where, and how many bytes a token takes. No data, no kernels.

Of a sequence of n tokens

    [0, quantized_tokens(n))    are in pages, in NVFP4: 16 tokens at a time, when they leave the recent window
    [quantized_tokens(n), n)    are in the ring, in 16 bits: token t at place t mod (recent_tokens + 16)
    [0, sink_tokens)            are kept in 16 bits for good, and read from there, in pages or not

K in pages is quantised along head_dim after km, a mean over tokens, is taken away: k' = k - km. km of a sequence is fixed when its
first block is quantised, as the mean over all tokens that the sequence has then (or given with the sequence), and stays. K
in the ring and the sinks is as it came. V is quantised as it came, along tokens: a page holds it transposed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbfmha.nvfp4 import SCALE_RULES
from nbfmha.validation import check_choice, dtype_name, message

BLOCK = 16
"""Tokens that are quantised at once, and elements that share a scale."""

HEAD_DIMS = (64, 128, 256)
DTYPES = ("float16", "bfloat16")
MAX_TOKENS = 2**31 - 1


def check_int(name: str, value: object, low: int, high: int, multiple: int = 1) -> int:
    """``value`` as an int if it is an integer in [low, high] and a multiple of ``multiple``. Raises ``TypeError`` and
    ``ValueError`` otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(message(name, "an integer", type(value).__name__)) from None
    if not low <= number <= high or number % multiple:
        every = f"a multiple of {multiple} in" if multiple > 1 else "in"
        raise ValueError(message(name, f"{every} [{low}, {high}]", number))
    return number


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of a cache; of all its sequences alike.

    num_heads_kv   heads of k and v
    head_dim       64, 128 or 256
    page_size      tokens of a page, a multiple of 16 in [16, 256]
    dtype          "float16" or "bfloat16": of q, k, v and of what the cache keeps in 16 bits
    recent_tokens  the newest tokens of a sequence that are surely in 16 bits, a multiple of 16, at least 16
    sink_tokens    the first ones, a multiple of 16, or 0
    scale          the rule by which blocks choose their scale: "four_over_six" or "amax"

    Raises ``TypeError`` or ``ValueError`` for anything else.
    """

    num_heads_kv: int
    head_dim: int
    page_size: int = 64
    dtype: str = "float16"
    recent_tokens: int = 64
    sink_tokens: int = 16
    scale: str = "four_over_six"

    def __post_init__(self) -> None:
        checked = {
            "num_heads_kv": check_int("num_heads_kv", self.num_heads_kv, 1, 65535),
            "page_size": check_int("page_size", self.page_size, BLOCK, 256, BLOCK),
            "recent_tokens": check_int("recent_tokens", self.recent_tokens, BLOCK, 4096, BLOCK),
            "sink_tokens": check_int("sink_tokens", self.sink_tokens, 0, 4096, BLOCK),
            "head_dim": check_int("head_dim", self.head_dim, HEAD_DIMS[0], HEAD_DIMS[-1]),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.head_dim not in HEAD_DIMS:
            expected = f"one of {', '.join(map(str, HEAD_DIMS))}"
            raise ValueError(message("head_dim", expected, self.head_dim, "pad the last axis"))
        check_choice("dtype", self.dtype, DTYPES, "convert k and v first")
        check_choice("scale", self.scale, SCALE_RULES)

    @property
    def ring_tokens(self) -> int:
        """Places of the ring."""
        return self.recent_tokens + BLOCK

    def quantized_tokens(self, length: Any) -> Any:
        """How many of the first tokens of a sequence of ``length`` (an int, or an array of them) are in pages."""
        whole = (length - self.recent_tokens) // BLOCK * BLOCK
        return np.maximum(whole, 0) if isinstance(length, np.ndarray) else max(whole, 0)

    def pages_of(self, length: Any) -> Any:
        """Pages that a sequence of ``length`` (an int, or an array of them) takes."""
        return -(-self.quantized_tokens(length) // self.page_size)

    @property
    def bytes_per_token(self) -> float:
        """Of a token in a page, K and V of all heads: 4.5 bits an element."""
        return 2 * self.num_heads_kv * self.head_dim * (0.5 + 1 / BLOCK)

    @property
    def bytes_per_page(self) -> int:
        """Of a page, K and V of all heads."""
        return int(self.page_size * self.bytes_per_token)

    @property
    def bytes_per_sequence(self) -> int:
        """Of what a sequence has beside its pages: ring, sinks and km."""
        row = self.num_heads_kv * self.head_dim
        return 4 * row * (self.ring_tokens + max(self.sink_tokens, 1)) + 4 * row

    def shapes(self, pages: int, slots: int, max_length: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each of ``CacheArrays``, for ``slots`` sequences of up to ``max_length`` tokens."""
        heads, size, dim = self.num_heads_kv, self.page_size, self.head_dim
        recent, sinks = (slots, heads, self.ring_tokens, dim), (slots, heads, max(self.sink_tokens, 1), dim)
        return {
            "k_codes": ((pages, heads, size, dim // 2), "uint8"),
            "k_scales": ((pages, heads, size, dim // BLOCK), "uint8"),
            "v_codes": ((pages, heads, dim, size // 2), "uint8"),
            "v_scales": ((pages, heads, dim, size // BLOCK), "uint8"),
            "k_recent": (recent, self.dtype),
            "v_recent": (recent, self.dtype),
            "k_sinks": (sinks, self.dtype),
            "v_sinks": (sinks, self.dtype),
            "k_mean": ((slots, heads, dim), "float32"),
            "lengths": ((slots,), "int32"),
            "block_tables": ((slots, max(self.pages_of(max_length), 1)), "int32"),
        }


@dataclass(frozen=True, eq=False)
class CacheArrays:
    """The arrays of one pool, C-contiguous, of one library and place. A sequence is known by its slot.

    k_codes, k_scales    uint8 (pages, heads_kv, page_size, head_dim/2 and head_dim/16): rows in token order
    v_codes, v_scales    uint8 (pages, heads_kv, head_dim, page_size/2 and page_size/16): transposed, blocks along tokens
    k_recent, v_recent   16-bit (slots, heads_kv, recent_tokens + 16, head_dim): the rings
    k_sinks, v_sinks     16-bit (slots, heads_kv, max(sink_tokens, 1), head_dim)
    k_mean               float32 (slots, heads_kv, head_dim): km; finite numbers without a meaning (zeros at first) until it
                         is fixed
    lengths              int32 (slots,): tokens of each sequence
    block_tables         int32 (slots, pages of a sequence at most): page of tokens [i page_size, (i + 1) page_size); -1
                         where there is none
    """

    k_codes: Any
    k_scales: Any
    v_codes: Any
    v_scales: Any
    k_recent: Any
    v_recent: Any
    k_sinks: Any
    v_sinks: Any
    k_mean: Any
    lengths: Any
    block_tables: Any

    def check(self, layout: CacheLayout) -> None:
        """Raise ``TypeError`` or ``ValueError`` where an array has another dtype or shape than ``layout`` asks for."""
        pages, (slots, width) = self.k_codes.shape[0], self.block_tables.shape
        max_length = width * layout.page_size + layout.ring_tokens - 1
        for name, (shape, dtype) in layout.shapes(pages, slots, max_length).items():
            array = getattr(self, name)
            if dtype_name(array) != dtype:
                raise TypeError(message(f"{name}.dtype", dtype, dtype_name(array)))
            if tuple(array.shape) != shape:
                raise ValueError(message(name, f"of shape {shape}", tuple(array.shape)))
