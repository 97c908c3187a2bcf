"""``nbfmha.PagedKVCache`` and ``nbfmha.decode`` by the implementation under test, against float64 attention on what the
cache stands for; and what such a cache costs on real data."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from nbfmha.validate import decode_problems as problems
from nbfmha.validate.attention_problems import F16, Attention
from nbfmha.validate.case import Context, Registry, Result

registry = Registry()

QUALITY = "decode_quality"
"""The case whose details hold the table of caches."""
MOST_OF_NO_WINDOWS = 1 / 4
"""What the relative L2 of the default cache may be at most, as a share of that without 16-bit windows."""
CHUNKS = (16, 64)


def _needs_kernels(run: Callable[[Context], Result]) -> Callable[[Context], Result]:
    """Skips where nothing but NumPy computes."""

    @functools.wraps(run)
    def checked(context: Context) -> Result:
        if not context.implementation.runs_kernels:
            return Result.skipped("needs a GPU or the emulator: the cache's model would be compared with itself")
        return run(context)

    return checked


@registry.case("decode", "append: codes, scales, rings, sinks of the model", evidence="implementation")
@_needs_kernels
def decode_append(context: Context) -> Result:
    rng = context.rng("decode_append")
    twin = problems.make_twin(context, page_size=32)
    a, b = twin.allocate(2)
    for chunks in ({a: 150, b: 20}, *[{b: 1, a: 1}] * 20, {b: 70}, {a: 16, b: 33}):
        twin.append(chunks, *problems.rows(rng, twin, sum(chunks.values())))
    return problems.judge_parts(twin, appends=len(twin.sequences[b].lengths))


@registry.case("decode", "real data, 4 new tokens", evidence="implementation")
@_needs_kernels
def decode_real(context: Context) -> Result:
    q, k, v = (x.swapaxes(0, 1) for x in context.sample)
    twin = problems.make_twin(context, num_heads_kv=k.shape[1], recent_tokens=128, sink_tokens=32)
    (seq,) = twin.allocate()
    for start, stop in ((0, 300), (300, len(k) - 4), (len(k) - 4, len(k))):
        twin.append({seq: stop - start}, *(np.ascontiguousarray(x[start:stop]) for x in (k, v)))
    return problems.verdict(problems.decode(context, twin, np.ascontiguousarray(q[None, -4:]), [seq]))


@registry.case("decode", "sequences of 300, 20, 0, 97 and 1 tokens at once", evidence="implementation")
@_needs_kernels
def decode_lengths(context: Context) -> Result:
    rng = context.rng("decode_lengths")
    lengths = (300, 20, 0, 97, 1)
    twin, ids = problems.grown(context, rng, lengths)
    call = problems.decode(context, twin, problems.queries(rng, twin, len(ids), 1, 4), ids)
    return problems.verdict(call, lengths=lengths)


@registry.case("decode", "4 new tokens, causal among them", evidence="implementation")
@_needs_kernels
def decode_speculative(context: Context) -> Result:
    rng = context.rng("decode_speculative")
    twin, ids = problems.grown(context, rng, (150, 3, 47))
    got, expected, budget = problems.decode(context, twin, problems.queries(rng, twin, 3, 4, 2), ids)
    masked = int(np.count_nonzero(np.isneginf(expected.lse)))  # the second sequence is shorter than its queries
    return problems.verdict((got, expected, budget), masked_rows=masked)


@registry.case("decode", "1, 3 and 9 splits: one result", evidence="implementation")
@_needs_kernels
def decode_splits(context: Context) -> Result:
    rng = context.rng("decode_splits")
    twin, ids = problems.grown(context, rng, (400, 40))
    q, splits = problems.queries(rng, twin, 2, 2, 2), (1, 3, 9)
    calls = [problems.decode(context, twin, q, ids, num_splits=count) for count in splits]
    one, _, budget = calls[0]
    return problems.verdict(*calls, *((got, one, budget) for got, *_ in calls[1:]), num_splits=splits)


@registry.case("decode", "windows", evidence="implementation")
@_needs_kernels
def decode_windows(context: Context) -> Result:
    rng = context.rng("decode_windows")
    twin, ids = problems.grown(context, rng, (300, 60))
    q = problems.queries(rng, twin, 2, 3, 2)
    calls = [problems.decode(context, twin, q, ids, window=window) for window in ((100, None), (20, 5), (0, 0))]
    return problems.verdict(*calls)


@registry.case("decode", "softcap, scale < 0; pages of 16 tokens", evidence="implementation")
@_needs_kernels
def decode_softcap(context: Context) -> Result:
    rng = context.rng("decode_softcap")
    twin, ids = problems.grown(context, rng, (200, 90), page_size=16)
    q = problems.queries(rng, twin, 2, 2, 2)
    options = ({"softcap": 5.0, "softmax_scale": 0.3}, {"softmax_scale": -0.2})
    return problems.verdict(*(problems.decode(context, twin, q, ids, **chosen) for chosen in options))


@registry.case("decode", "sinks join the denominator, once", evidence="implementation")
@_needs_kernels
def decode_sinks(context: Context) -> Result:
    rng = context.rng("decode_sinks")
    twin, ids = problems.grown(context, rng, (200, 0, 20))
    q, logits = problems.queries(rng, twin, 3, 2, 2), np.array([0.5, -3.0, 6.0, -np.inf], np.float32)
    calls = [problems.decode(context, twin, q, ids, sinks=logits, num_splits=count) for count in (1, 3)]
    return problems.verdict(*calls)


@registry.case("decode", "edges of pages, pages in any order", evidence="implementation")
@_needs_kernels
def decode_pages(context: Context) -> Result:
    rng = context.rng("decode_pages")
    twin = problems.make_twin(context, pages=12)

    def append(**chunks):
        own = {ids[name]: count for name, count in chunks.items()}
        twin.append(own, *problems.rows(rng, twin, sum(chunks.values())))

    ids = dict(zip("abc", twin.allocate(3), strict=True))
    append(a=95, b=96, c=97)  # 48 tokens in pages, 64 and 64: a page holds 64
    append(a=130, c=64, b=65)
    twin.free([ids.pop("a"), ids.pop("c")])
    ids |= zip("de", twin.allocate(2), strict=True)
    append(d=161, b=128, e=160)  # on pages that were freed, between those of b
    append(d=128, e=48)
    live = [ids[name] for name in "dbe"]
    tables = [[int(page) for page in row if page >= 0] for row in twin.on_host()["block_tables"][live]]
    call = problems.decode(context, twin, problems.queries(rng, twin, 3, 1, 2), live)
    lengths = [len(twin.sequences[seq]) for seq in live]
    return problems.verdict(call, block_tables=tables, lengths=lengths)


@registry.case("decode", "forks part in a page that they share", evidence="implementation")
@_needs_kernels
def decode_forks(context: Context) -> Result:
    rng = context.rng("decode_forks")
    twin, (first,) = problems.grown(context, rng, (150,))
    ids = [first, *twin.fork(first, 2)]
    shared = twin.cache.stats.shared_pages
    for chunks in ({ids[1]: 20, ids[0]: 40}, {ids[2]: 70}, dict.fromkeys(ids, 1)):
        twin.append(chunks, *problems.rows(rng, twin, sum(chunks.values())))
    call = problems.decode(context, twin, problems.queries(rng, twin, 3, 2, 2), ids)
    stored = problems.judge_parts(twin)
    return stored if stored.status == "fail" else problems.verdict(call, shared_pages=shared)


@registry.case("decode", "free pages and slots leave no trace", evidence="implementation")
@_needs_kernels
def decode_poison(context: Context) -> Result:
    rng = context.rng("decode_poison")
    twin, ids = problems.grown(context, rng, (200, 300, 100))
    twin.free([ids.pop(1)])
    q = problems.queries(rng, twin, 2, 2, 2)
    call = problems.decode(context, twin, q, ids)
    calls = [call]
    for byte, number in ((0xFF, np.nan), (0x77, 100.0)):  # NaN everywhere, then numbers as large as others
        other = problems.frozen(twin, problems.poisoned_where_unused(twin, byte, number))
        got, *_ = problems.decode(context, twin, q, ids, cache=other)
        calls.append((got, call[0], Attention(np.zeros_like(call[0].out), np.zeros_like(call[0].lse))))
    return problems.verdict(*calls)


@registry.case("decode", "equal scores: the mean, LSE = ln n", evidence="implementation")
@_needs_kernels
def decode_uniform(context: Context) -> Result:
    rng = context.rng("decode_uniform")
    lengths = (300, 33, 1)
    twin, ids = problems.grown(context, rng, lengths)
    q = np.zeros_like(problems.queries(rng, twin, 3, 1, 2))
    calls = []
    for count in (1, 2):
        got, expected, _ = problems.decode(context, twin, q, ids, num_splits=count)
        logs = np.broadcast_to(np.log(np.array(lengths))[:, None, None], expected.lse.shape)
        # every P is 1: no rounding but the output's and float32's
        allowed = Attention(F16 * np.abs(expected.out) + 2.0**-18, np.full(logs.shape, 2e-6))
        calls.append((got, Attention(expected.out, logs), allowed))
    return problems.verdict(*calls)


@registry.case("decode", "V of ones comes back", evidence="implementation")
@_needs_kernels
def decode_constant_v(context: Context) -> Result:
    rng = context.rng("decode_constant_v")
    twin = problems.make_twin(context)
    ids = twin.allocate(2)
    k, v = problems.rows(rng, twin, 333)
    twin.append({ids[0]: 300, ids[1]: 33}, k, np.ones_like(v))
    q = problems.queries(rng, twin, 2, 1, 2)
    calls = [problems.decode(context, twin, q, ids, num_splits=count) for count in (1, 4)]
    return problems.verdict(*((got, Attention(np.ones_like(got.out), lse), most) for got, (_, lse), most in calls))


@registry.case("decode", "needles: each query finds its token", evidence="implementation")
@_needs_kernels
def decode_needles(context: Context) -> Result:
    rng = context.rng("decode_needles")
    twin = problems.make_twin(context)
    (seq,) = twin.allocate()
    needles = np.array([5, 16, 79, 80, 150, 170, 199])  # in sinks; at edges of pages and of tiles; in pages; in the ring
    k, v = problems.rows(rng, twin, 200)
    k = rng.choice(np.array([-1, 1], np.float16), k.shape)
    v[:] = 6 * np.eye(problems.HEAD_DIM, dtype=np.float16)[np.arange(len(v)) % problems.HEAD_DIM][:, None]
    twin.append({seq: len(k)}, k, v)
    q = 4 * np.ascontiguousarray(k[needles].swapaxes(0, 1).reshape(1, 1, -1, problems.HEAD_DIM))  # scores of 32
    got, expected, budget = problems.decode(context, twin, q, [seq])
    found = np.tile(v[needles, 0].astype(np.float64), (problems.HEADS_KV, 1))[None, :, None]
    loose = Attention(np.full(found.shape, 0.3), budget.lse)  # of 6: what the other tokens weigh
    return problems.verdict((got, expected, budget), (got, Attention(found, expected.lse), loose), needles=needles.tolist())


@registry.case("decode", "head_dim 128, 32 rows of q a head of K", evidence="implementation")
@_needs_kernels
def decode_wide(context: Context) -> Result:
    rng = context.rng("decode_wide")
    twin = problems.make_twin(context, head_dim=128)
    ids = twin.allocate(2)
    for chunks in ({ids[0]: 60}, *[{ids[0]: 60, ids[1]: 4}] * 3):
        twin.append(chunks, *problems.rows(rng, twin, sum(chunks.values())))
    call = problems.decode(context, twin, problems.queries(rng, twin, 2, 4, 8), ids, num_splits=1)
    return problems.verdict(call)


@functools.cache
def cache_errors() -> dict[str, dict[int, float]]:
    """``nbfmha.accuracy.cache_accuracy_table`` of the whole sample, tokens appended by ``CHUNKS``. Not to be changed."""
    from nbfmha.accuracy import cache_accuracy_table
    from nbfmha.sample import load_sample

    return cache_accuracy_table(*load_sample(), chunks=CHUNKS)


@registry.case("decode", "16-bit windows: a quarter of the error at most", evidence="computed", name=QUALITY)
def decode_quality(context: Context) -> Result:
    table = cache_errors()
    ratios = [table["default"][chunk] / table["no 16-bit windows"][chunk] for chunk in CHUNKS]
    metric = f"{max(ratios):.3f} of the relative L2 without them, allowed {MOST_OF_NO_WINDOWS:.3f}"
    details = {"ratios": ratios, "ratio_allowed": MOST_OF_NO_WINDOWS, "caches": table}
    if not max(ratios) <= MOST_OF_NO_WINDOWS:
        return Result.failed(metric, "the default windows must leave a quarter of the error at most", **details)
    return Result.passed(metric, **details)
