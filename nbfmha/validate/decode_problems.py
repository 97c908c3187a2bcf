"""Caches and queries of the decode cases, what must come out, and how far a kernel may be from it.

Expected is float64 attention on what the cache stands for (``nbfmha.cache_model``): the distance is the kernel's own, not
that of the format.
"""

from __future__ import annotations

from operator import methodcaller
from types import SimpleNamespace
from typing import Any

import numpy as np

from nbfmha import nvfp4, reference
from nbfmha.cache_model import Contents
from nbfmha.kv_layout import CacheArrays
from nbfmha.recipe import Recipe
from nbfmha.testing import compare
from nbfmha.validate.attention_problems import Attention, judge, model_budget, model_relative_l2
from nbfmha.validate.cache_twin import CacheTwin
from nbfmha.validate.case import Context, Result

LIKE_DECODE = Recipe(pv="f16")
"""Rounds as decode does: P to f16, then the output."""
HEADS_KV, HEAD_DIM = 2, 64
SIZES = {
    "pages": 24, "num_heads_kv": HEADS_KV, "head_dim": HEAD_DIM, "page_size": 64, "max_sequences": 6, "max_length": 600,
    "recent_tokens": 32, "sink_tokens": 16,
}  # fmt: skip
"""Options of the cases' caches: small windows, so that short sequences have tokens of every kind."""


def make_twin(context: Context, **options: Any) -> CacheTwin:
    """A cache of ``SIZES``, but for ``options``, where the implementation computes."""
    return CacheTwin(context.implementation.to_device, methodcaller("copy_to_host"), **SIZES | options)


def rows(rng: np.random.Generator, twin: CacheTwin, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """k, v float16 (tokens, num_heads_kv, head_dim); the channels of k have means."""
    shape = (tokens, twin.layout.num_heads_kv, twin.layout.head_dim)
    k = rng.standard_normal(shape) + np.linspace(-2, 2, shape[-1])
    return k.astype(np.float16), rng.standard_normal(shape).astype(np.float16)


def queries(rng: np.random.Generator, twin: CacheTwin, batch: int, q_len: int, group: int) -> np.ndarray:
    """q float16 (batch, q_len, ``group`` heads for each one of k, head_dim), with a mean."""
    shape = (batch, q_len, group * twin.layout.num_heads_kv, twin.layout.head_dim)
    return (rng.standard_normal(shape) + 0.5).astype(np.float16)


def grown(
    context: Context, rng: np.random.Generator, lengths: tuple[int, ...], **options: Any
) -> tuple[CacheTwin, list[int]]:
    """A cache with a sequence of each length, appended in two calls, and their ids in that order, not the slots' order."""
    twin = make_twin(context, **options)
    ids = twin.allocate(len(lengths))[::-1]
    first = {seq: length // 3 for seq, length in zip(ids, lengths, strict=True)}
    rest = {seq: length - length // 3 for seq, length in zip(ids, lengths, strict=True)}
    for chunks in (first, rest):
        twin.append(chunks, *rows(rng, twin, sum(chunks.values())))
    return twin, ids


def attention_from(
    q: np.ndarray,
    plain: np.ndarray,
    codes: np.ndarray,
    values: np.ndarray,
    *,
    quantize_q: bool,
    sinks: np.ndarray | None = None,
    **options: Any,
) -> Attention:
    """float64 attention of q (q_len, num_heads_q, head_dim), the newest tokens of a sequence of n, as a cache has it.

    plain, codes: (num_heads_kv, n, head_dim), whose sum is K: what meets q as it is (tokens in 16 bits; km for those in
    pages), and what meets it in NVFP4 where ``quantize_q`` (tokens in pages, less km). values: V, in that shape. options:
    of ``nbfmha.decode``: softmax_scale, window, softcap.
    """
    heads_first = q.swapaxes(0, 1)
    whole = heads_first.astype(np.float64)
    quantized = whole
    if quantize_q:
        quantized = nvfp4.dequantize(nvfp4.quantize(heads_first, scale="four_over_six")).astype(np.float64)
    # q . plain + quantized . codes, as one product of twice the length
    both = np.concatenate([whole, quantized], -1), np.concatenate([plain, codes], -1)
    options = {"softmax_scale": q.shape[-1] ** -0.5} | options
    return Attention(*reference.attention(*both, values, causal=True, sinks=sinks, return_lse=True, **options))


def parts_of_keys(held: Contents) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``plain``, ``codes`` and ``values`` of ``attention_from``."""
    mean = held.k_mean[:, None].astype(np.float64)
    plain = np.where(held.in_16_bits[:, None], held.k, mean)
    return plain, held.k - plain, held.v


def frozen(twin: CacheTwin, host: dict[str, np.ndarray]) -> SimpleNamespace:
    """A cache of these arrays, as ``nbfmha.decode`` takes it."""
    arrays = CacheArrays(**{name: twin.to_device(x) for name, x in host.items()})
    return SimpleNamespace(layout=twin.layout, arrays=arrays, max_length=twin.cache.max_length)


def poisoned_where_unused(twin: CacheTwin, byte: int, number: float) -> dict[str, np.ndarray]:
    """The cache's arrays with other content wherever no sequence of now has anything: ``byte`` in pages that nobody owns,
    ``number`` in rings, sinks and km of slots that are free, and no length for these."""
    host, live = twin.on_host(), sorted(twin.sequences)
    owned = [host["block_tables"][seq][: twin.layout.pages_of(len(twin.sequences[seq]))] for seq in live]
    unused = {"page": np.ones(len(host["k_codes"]), bool), "slot": np.ones(len(host["lengths"]), bool)}
    unused["page"][np.concatenate([*owned, []]).astype(int)] = False
    unused["slot"][live] = False
    for name, x in host.items():
        if name.endswith(("codes", "scales")):
            x[unused["page"]] = byte
        elif name not in ("lengths", "block_tables"):
            x[unused["slot"]] = number
    return host


def decode(
    context: Context,
    twin: CacheTwin,
    q: np.ndarray,
    ids: list[int],
    *,
    cache: Any = None,
    num_splits: int | None = None,
    sinks: np.ndarray | None = None,
    **options: Any,
) -> tuple[Attention, Attention, Attention]:
    """(got, expected, budget) of one call on the twin's cache, or on ``cache`` with the same sequences; (batch, heads,
    q_len, ...)."""
    implementation = context.implementation
    slots = twin.cache.device_ids(ids) if cache is None else ids
    out, lse = implementation.decode(q, cache or twin.cache, slots, num_splits=num_splits, sinks=sinks, **options)
    quantize_q = implementation.kernels == "blockscale"
    each = [
        attention_from(one, *parts_of_keys(twin.held(seq)), quantize_q=quantize_q, sinks=sinks, **options)
        for one, seq in zip(q, ids, strict=True)
    ]
    expected = Attention(*(np.stack(part) for part in zip(*each, strict=True)))
    return Attention(out.swapaxes(1, 2), lse), expected, model_budget(expected, LIKE_DECODE)


def verdict(*calls: tuple[Attention, Attention, Attention], **details: Any) -> Result:
    """``judge`` of calls of ``decode`` together."""
    return judge(*zip(*calls, strict=True), relative_l2=model_relative_l2(LIKE_DECODE), **details)


def judge_parts(twin: CacheTwin, **details: Any) -> Result:
    """Verdict on all that the cache holds."""
    found = {part.name: compare(*part[1:]) for part in twin.parts()}
    elements = sum(comparison.elements for comparison in found.values())
    wrong = [f"{name}: {comparison.describe()}" for name, comparison in found.items() if not comparison.ok]
    if wrong:
        return Result.failed(f"{len(wrong)} of {len(found)} parts of the cache wrong", wrong[0], wrong=wrong, **details)
    largest = max(comparison.max_abs_error for comparison in found.values())
    metric = f"{elements} elements of {len(found)} parts exact, k_mean within its rounding"
    return Result.passed(metric, max_abs_error=largest, elements=elements, **details)
