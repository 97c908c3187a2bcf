"""What a paged NVFP4 KV cache stands for, exactly: the specification that its kernels are tested against.

The whole 16-bit history of a sequence and the lengths it had after each append decide everything (``nbfmha.kv_layout``):
blocks of 16 tokens are quantised once, in order, and never again. The lengths matter for km alone: it is the mean over
the tokens that are there when the first block is quantised.

    token in 16 bits    K = k                                   V = v
    token in a page     K = value(NVFP4(k - km)) + km           V = value(NVFP4(v))

k - km is one float32 subtraction; the block contract is ``nbfmha.nvfp4``'s; everything else is float64.

``decode_outputs`` is attention from such a cache as it grows, by which its quality is measured; there V's blocks may
also run along head_dim, and all tokens be quantised, which kernels do not offer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nbfmha.kv_layout import BLOCK, CacheLayout, check_int
from nbfmha.nvfp4 import dequantize, quantize
from nbfmha.quantized_tensor import AXES, QuantizedTensor
from nbfmha.validation import check_choice, check_numpy, dtype_name, message


@dataclass(frozen=True)
class Contents:
    """What a cache holds of a sequence of n tokens.

    k, v              float64 (heads_kv, n, head_dim): what attention reads, km included
    k_mean            float32 (heads_kv, head_dim): km; zeros while it is not fixed
    quantized_tokens  how many of the first tokens are in pages
    k_pages, v_pages  these, quantised: k' = k - km along head_dim, v along ``v_axis``
    in_16_bits        bool (n,): tokens that are read from the ring or the sinks
    """

    k: np.ndarray
    v: np.ndarray
    k_mean: np.ndarray
    quantized_tokens: int
    k_pages: QuantizedTensor
    v_pages: QuantizedTensor
    in_16_bits: np.ndarray


def contents(
    k: np.ndarray,
    v: np.ndarray,
    layout: CacheLayout,
    lengths: Iterable[int],
    *,
    k_mean: np.ndarray | None = None,
    v_axis: str = "tokens",
) -> Contents:
    """What the cache holds of the sequence with keys and values ``k``, ``v`` (heads_kv, n, head_dim), of ``layout``'s
    dtype.

    lengths: of the sequence after each append, ascending, the last one n. k_mean: km, where it was given with the
    sequence: float32 (heads_kv, head_dim).

    Raises ``TypeError`` for another dtype, ``ValueError`` for shapes or lengths that do not fit together.
    """
    check_choice("v_axis", v_axis, AXES)
    n, lengths = _check(k, v, layout), list(lengths)
    if lengths != sorted(lengths) or (lengths[-1] if lengths else 0) != n:
        raise ValueError(message("lengths", f"ascending, up to the {n} tokens of k", lengths))
    if k_mean is None:
        k_mean = mean_of_keys(k, layout, lengths)
    elif k_mean.shape != (k.shape[0], k.shape[2]) or k_mean.dtype != np.float32:
        got = f"{k_mean.dtype} {k_mean.shape}"
        raise ValueError(message("k_mean", f"float32 of shape {(k.shape[0], k.shape[2])}", got))
    stop = layout.quantized_tokens(n)
    k_pages = quantize(k[:, :stop].astype(np.float32) - k_mean[:, None], scale=layout.scale)
    v_pages = quantize(v[:, :stop], axis=v_axis, scale=layout.scale)
    token = np.arange(n)
    in_16_bits = (token >= stop) | (token < layout.sink_tokens)
    values = []
    for whole, pages, shift in ((k, k_pages, k_mean[:, None]), (v, v_pages, np.float32(0))):
        value = whole.astype(np.float64)
        stored = dequantize(pages).astype(np.float64) + shift
        value[:, :stop] = np.where(in_16_bits[:stop, None], value[:, :stop], stored)
        values.append(value)
    return Contents(*values, k_mean, stop, k_pages, v_pages, in_16_bits)


def mean_of_keys(k: np.ndarray, layout: CacheLayout, lengths: Iterable[int]) -> np.ndarray:
    """km, float32 (heads_kv, head_dim), of keys (heads_kv, n, head_dim): the exact mean, rounded once. Zeros where none
    of the ``lengths`` has a quantised token."""
    for length in lengths:
        if layout.quantized_tokens(length):
            return k[:, :length].mean(axis=1, dtype=np.float64).astype(np.float32)
    return np.zeros((k.shape[0], k.shape[2]), np.float32)


def decode_outputs(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    layout: CacheLayout,
    *,
    chunk: int = 1,
    windows: bool = True,
    smooth_k: bool = True,
    v_axis: str = "tokens",
) -> np.ndarray:
    """float64 (num_heads_q, n, head_dim): attention of every token, read from the cache at the time of that token.

    ``chunk`` tokens are appended, then their queries run, causal among them, against the cache as it is then; and so on.
    q: (num_heads_q, n, head_dim), any float; k and v as ``contents`` takes them. softmax_scale is 1 / sqrt(head_dim).
    Nothing but the cache is quantised. ``windows=False``: a cache that quantises each token as it comes, none in 16
    bits, with the same km; with blocks of V along tokens it would quantise what is not there yet, which is granted to
    it. ``smooth_k=False``: km = 0.

    Raises as ``contents``, and ``ValueError`` for heads of q that are no multiple of those of k.
    """
    check_choice("v_axis", v_axis, AXES)
    n, chunk = _check(k, v, layout), check_int("chunk", chunk, 1, max(1, k.shape[1]))
    group, rest = divmod(q.shape[0], layout.num_heads_kv)
    if rest or not group or q.shape[1:] != k.shape[1:]:
        expected = f"(a multiple of {layout.num_heads_kv}, {', '.join(map(str, k.shape[1:]))})"
        raise ValueError(message("q", f"of shape {expected}", q.shape))
    edges = [*range(chunk, n, chunk), n]
    k_mean = mean_of_keys(k, layout, edges if smooth_k else [])
    padded = -n % BLOCK
    k_values = dequantize(quantize(k.astype(np.float32) - k_mean[:, None], scale=layout.scale)).astype(np.float64)
    k_values += k_mean[:, None]
    # whole blocks of 16 tokens; what is padded is in 16 bits at all times
    v_values = dequantize(quantize(np.pad(v, ((0, 0), (0, padded), (0, 0))), axis=v_axis, scale=layout.scale))[:, :n]
    out, start = np.empty(q.shape), 0
    for stop in edges:
        token, stored = np.arange(stop), layout.quantized_tokens(stop) if windows else stop
        quantized = (token < stored) & (token >= (layout.sink_tokens if windows else 0))
        visible = token <= np.arange(start, stop)[:, None]
        for head in range(layout.num_heads_kv):
            keys, values = (
                np.where(quantized[:, None], x[head, :stop], y[head, :stop].astype(np.float64))
                for x, y in ((k_values, k), (v_values, v))
            )
            rows = slice(head * group, (head + 1) * group)
            scores = q[rows, start:stop].astype(np.float64) @ keys.T / np.sqrt(layout.head_dim)
            weights = np.exp(np.where(visible, scores - scores.max(axis=-1, keepdims=True), -np.inf))
            out[rows, start:stop] = weights @ values / weights.sum(axis=-1, keepdims=True)
        start = stop
    return out


def _check(k: np.ndarray, v: np.ndarray, layout: CacheLayout) -> int:
    for name, x in (("k", k), ("v", v)):
        check_numpy(name, x, "the model computes in NumPy")
        if dtype_name(x) != layout.dtype:
            raise TypeError(message(f"{name}.dtype", layout.dtype, dtype_name(x), "as the layout says"))
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (layout.num_heads_kv, layout.head_dim) or x.shape != k.shape:
            raise ValueError(message(name, f"of shape ({layout.num_heads_kv}, n, {layout.head_dim})", x.shape))
    return k.shape[1]
