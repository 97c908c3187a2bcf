"""Attention of a few new tokens against a paged NVFP4 cache, where the cache lies."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np

from nbfmha import decode_plan, gpu_arrays
from nbfmha.call import Place, check_gradients, check_place, place_of
from nbfmha.decode_scratch import tickets_of
from nbfmha.dispatch import GATE, IMPLS, Unavailable, gate
from nbfmha.kernels import decode as kernels
from nbfmha.kernels import decode_sizes as sizes
from nbfmha.kernels.decode_sizes import Layout
from nbfmha.kv_layout import BLOCK, DTYPES, HEAD_DIMS, CacheArrays, CacheLayout
from nbfmha.problem import Problem
from nbfmha.quantized_operands import check_memory
from nbfmha.quantized_tensor import QuantizedTensor
from nbfmha.validation import check_choice, dtype_name, message
from nbfmha.views import overlap
from ptx_inline.toolchain import Target
from ptx_inline.toolchain.launcher import multiprocessors

EMULATED_MULTIPROCESSORS = 8
"""Of an emulated machine, which has none: enough for several splits, few enough to run."""


class Cache(Protocol):
    """What ``decode`` needs of a cache, whose arrays stay where they are in memory."""

    layout: CacheLayout
    arrays: CacheArrays
    max_length: int
    """What no sequence is longer than: it bounds the number of splits, and may be far more than there is."""


def decode(
    q: Any,
    cache: Cache | tuple[QuantizedTensor, QuantizedTensor],
    seq_ids: Any = None,
    *,
    lengths: Any = None,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    impl: str = "auto",
    return_lse: bool = False,
    out: Any = None,
    num_splits: int | None = None,
) -> Any:
    """softmax(softmax_scale * q K^T) V over the tokens that a cache has of each sequence, the newest ones those of q.

    Query i of a sequence of n tokens stands at position n - q_len + i and sees the tokens up to it. Query head h reads head
    h // (num_heads_q / num_heads_kv) of K and V. K and V are what the cache stands for: NVFP4 for tokens in pages, 16 bits
    for the first ``sink_tokens`` and the recent ones. The block-scale MMA also takes q in NVFP4 for tokens in pages
    (four_over_six, per 16 channels); ``dequant`` takes it as it is, bfloat16 rounded to float16 there.

    Args:
        q: (batch, q_len, num_heads_q, head_dim), q_len 1 to 16, of the cache's dtype, library and place; contiguous, at a
            16-byte aligned address.
        cache: a ``PagedKVCache``, or anything with its ``layout``, ``arrays`` and ``max_length``. Or (k, v), two
            ``QuantizedTensor``s where q lies, of shape (batch, num_heads_kv, tokens, head_dim): NVFP4, k blocked along
            head_dim and v along tokens, linear scales, tokens a multiple of 16; contiguous, without global scale.
        seq_ids: (batch,) slots of the cache: an int32 array where q lies, or a list or NumPy array, which is checked and
            copied there first. Those of an array are not checked. None with (k, v).
        lengths: with (k, v) alone: (batch,) how many of the tokens each sequence has, given as ``seq_ids`` are; None: all.
            The last 16 of v share a scale: those past the length must be finite.
        softmax_scale, window, softcap: as in :func:`nbfmha.attention`, of a causal call.
        sinks: (num_heads_q,) float32 logits that join each head's denominator: an array where q lies, or of NumPy.
        impl: "auto", "blockscale", "dequant"; "emulated" on a :class:`nbfmha.emulated.Machine`. One asked for by name
            never falls back.
        return_lse: also return the LSE, float32 (batch, num_heads_q, q_len), natural logarithms.
        out: an array like q to write to, in memory of its own.
        num_splits: parts into which the tokens of each sequence and head are divided, read at once; None: as many as are
            fastest by a model of the time.

    A query that sees no token gets 0 and an LSE of -inf (its sink where there is one). The work is queued on the library's
    current stream; nothing waits for the GPU, but for the copy of a list or of NumPy's ``sinks``.

    Returns ``out``, or ``(out, lse)`` with ``return_lse``.

    Raises ``TypeError`` for a wrong type, dtype or mixed libraries; ``ValueError`` for shapes, places or options that do
    not fit together; :class:`nbfmha.dispatch.Unavailable` where no implementation, or not the one named, can run the call.
    All of them before anything is launched.
    """
    window = tuple(window) if isinstance(window, list) else window
    key = plan = None
    if lengths is None:
        flags = bool(return_lse), sinks is not None
        key = decode_plan.key_of(q, cache, impl, softmax_scale, window, softcap, num_splits, *flags)
        plan = decode_plan.find(cache, key)
        result = None if plan is None else plan.run(q, seq_ids, sinks, out)
        if result is not None:
            return result
    check_choice("impl", impl, IMPLS)
    place = place_of("q", q)
    if isinstance(cache, tuple):
        layout, arrays, max_length = _contiguous(cache, q, seq_ids, lengths, place)
    elif lengths is not None or seq_ids is None:
        raise TypeError(message("seq_ids and lengths", "slots and None with a cache", f"{seq_ids} and {lengths}"))
    else:
        layout, arrays, max_length = cache.layout, cache.arrays, cache.max_length
        check_place("cache", place_of("cache", arrays.k_codes), place)
    if place.kind == "host":
        raise ValueError(message("q", "in GPU memory or on a nbfmha.emulated.Machine", place, "build the cache there"))
    if place.library == "torch":
        check_gradients({"q": q, "sinks": sinks, "out": out})
    _check_array("q", q, layout.dtype)
    shape = tuple(q.shape)
    problem = _problem(shape, layout, softmax_scale, window, softcap, sinks is not None)
    name = _implementation(impl, layout, problem.seqlen_q * problem.qhead_per_kvhead, place)
    if num_splits is not None and (type(num_splits) is not int or not 1 <= num_splits <= 65535):
        raise ValueError(message("num_splits", "an integer in [1, 65535] or None", repr(num_splits)))
    splits = sizes.choose_splits(
        layout, problem, max_length, num_splits, implementation=name, target=place.target,
        multiprocessors=_multiprocessors(place),
        # an emulated machine has no time to win, and each number of warps and teams is a kernel to compile
        team_warps=sizes.TEAM_WARPS[:1] if place.kind == "emulated" else sizes.TEAM_WARPS,
        teams_a_cta=(1,) if place.kind == "emulated" else sizes.TEAMS,
    )  # fmt: skip
    if problem.batch > sizes.MAX_BATCH:
        raise ValueError(message("q", f"of at most {sizes.MAX_BATCH} sequences", problem.batch, "split the batch"))
    if seq_ids is not None:
        seq_ids = _integers("seq_ids", seq_ids, q, shape[0], arrays.lengths.shape[0] - 1, place)
    if sinks is not None:
        sinks = _check_sinks(sinks, q, shape[2], place)
    if out is None:
        out = gpu_arrays.empty(q, shape, layout.dtype)
    else:
        check_place("out", place_of("out", out), place)
        _check_array("out", out, layout.dtype)
        if tuple(out.shape) != shape:
            raise ValueError(message("out", f"of shape {shape}, as q is", tuple(out.shape)))
        if overlap(out, q):
            raise ValueError(message("out", "in memory of its own", "memory that it shares with q"))
    lse = gpu_arrays.empty(q, (shape[0], shape[2], shape[1]), "float32") if return_lse else None
    tickets = tickets_of(arrays, q, splits.teams) if splits.num_splits > 1 else None
    kernels.decode(
        q, layout, arrays, seq_ids, problem, splits, implementation=name, out=out, tickets=tickets, lse=lse, sinks=sinks
    )
    if key is not None and plan is None:
        decode_plan.keep(key, q, layout, arrays, problem, splits, name, *flags)
    return (out, lse) if return_lse else out


def _check_array(name: str, array: Any, dtype: str) -> None:
    if dtype_name(array) != dtype:
        raise TypeError(message(f"{name}.dtype", f"that of the cache ({dtype})", dtype_name(array), "convert it first"))
    gpu_arrays.check_contiguous(name, array)
    if not gpu_arrays.is_aligned(array, 16):
        raise ValueError(message(name, "at an address that is a multiple of 16", "another", "copy it first"))


def _problem(shape: tuple[int, ...], layout: Layout, *options: Any) -> Problem:
    """The problem of a call; the same one for the same call, since checking one takes longer than finding it again."""
    try:
        hash(options)
    except TypeError:
        return _make_problem.__wrapped__(shape, layout, *options)  # which says what is wrong with it
    return _make_problem(shape, layout, *options)


@functools.lru_cache(maxsize=256, typed=True)
def _make_problem(
    shape: tuple[int, ...], layout: Layout, softmax_scale: Any, window: Any, softcap: Any, has_sinks: bool
) -> Problem:
    if len(shape) != 4 or shape[3] != layout.head_dim:
        expected = f"of shape (batch, q_len, num_heads_q, {layout.head_dim}), as the cache has head_dim"
        raise ValueError(message("q", expected, shape))
    if not 1 <= shape[1] <= kernels.MAX_QUERIES:
        expected = f"of 1 to {kernels.MAX_QUERIES} tokens a sequence (axis 1)"
        raise ValueError(message("q", expected, shape[1], "nbfmha.attention takes longer chunks"))
    if not shape[2] or shape[2] % layout.num_heads_kv:
        expected = f"a multiple of the cache's num_heads_kv ({layout.num_heads_kv})"
        raise ValueError(message("num_heads_q", expected, shape[2]))
    # positions are counted on the device, from each sequence's length
    return Problem(
        batch=shape[0],
        num_heads_q=shape[2],
        num_heads_kv=layout.num_heads_kv,
        seqlen_q=shape[1],
        seqlen_k=shape[1],
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        causal=True,
        window=window,
        softcap=softcap,
        softmax_scale=softmax_scale,
        has_sinks=has_sinks,
    )


def _implementation(impl: str, layout: Layout, rows: int, place: Place) -> str:
    """The kernels that run ``impl``. Raises ``Unavailable`` where none does."""
    reasons = _reasons(layout, rows, place.target, gate())
    runs = next((name for name, reason in reasons.items() if reason is None), None)
    if impl in ("auto", "emulated") and runs is None:
        every = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise Unavailable(message("the call", "one that an implementation decodes", f"none ({every})"))
    reason = reasons.get(impl)
    if impl == "legacy":
        reason = "there is no decode kernel for f8f6f4"
    elif impl == "reference":
        reason = "it is for arrays in host memory; nbfmha.reference.attention takes what the cache stands for"
    elif impl == "emulated" and place.kind != "emulated":
        reason = "the arrays are in GPU memory; build the cache on a nbfmha.emulated.Machine"
    if reason is not None:
        way_out = f"{runs!r} can run this call" if runs else "no other can run this call either"
        raise Unavailable(message("impl", "an implementation that decodes this call", f"{impl!r}: {reason}", way_out))
    return runs if impl in ("auto", "emulated") else impl


@functools.lru_cache(maxsize=256)
def _reasons(layout: Layout, rows: int, target: Target, blockscale: bool) -> dict[str, str | None]:
    """Why each implementation cannot run a call, in the order in which "auto" asks; None for one that can."""
    reasons = {name: sizes.why_not(layout, rows, name, target) for name in kernels.IMPLEMENTATIONS}
    if not blockscale:
        reasons["blockscale"] = f"switched off by {GATE}=0"
    return reasons


def _multiprocessors(place: Place) -> int:
    return EMULATED_MULTIPROCESSORS if place.kind == "emulated" else multiprocessors(place.device)


def _integers(name: str, given: Any, q: Any, batch: int, largest: int, place: Place) -> Any:
    """Slots or lengths as an int32 array where q lies; those on the host are checked to be in [0, largest]."""
    if isinstance(given, list | tuple | np.ndarray):
        values = np.asarray(given)
        if values.dtype.kind not in "iu" and values.size:
            raise TypeError(message(name, "integers", values.dtype.name))
        if values.shape != (batch,):
            raise ValueError(message(name, f"of shape (batch,) = ({batch},)", values.shape))
        wrong = values[(values < 0) | (values > largest)]
        if wrong.size:
            raise ValueError(message(name, f"in [0, {largest}]", int(wrong[0])))
        return gpu_arrays.from_host(q, values.astype(np.int32))
    check_place(name, place_of(name, given), place)
    if dtype_name(given) != "int32":
        raise TypeError(message(f"{name}.dtype", "int32", dtype_name(given), "convert it first"))
    if tuple(given.shape) != (batch,):
        raise ValueError(message(name, f"of shape (batch,) = ({batch},)", tuple(given.shape)))
    gpu_arrays.check_contiguous(name, given)
    return given


def _contiguous(
    pair: tuple[Any, ...], q: Any, seq_ids: Any, lengths: Any, place: Place
) -> tuple[sizes.ContiguousLayout, CacheArrays, int]:
    """(k, v) as a cache in which every sequence is one page, and its longest sequence."""
    if len(pair) != 2 or not all(isinstance(x, QuantizedTensor) for x in pair):
        got = ", ".join(type(x).__name__ for x in pair)
        raise TypeError(message("cache", "a cache or two QuantizedTensors (k, v)", f"({got})"))
    if seq_ids is not None:
        raise TypeError(message("seq_ids", "None with (k, v)", type(seq_ids).__name__, "sequence i is batch entry i"))
    k, v = pair
    for name, x, axis in (("k", k, "head_dim"), ("v", v, "tokens")):
        check_place(f"{name}.codes", place_of(f"{name}.codes", x.codes), place)
        got = (x.format, x.axis, x.scale_layout, "no global_scale" if x.global_scale is None else "a global_scale")
        expected = ("nvfp4", axis, "linear", "no global_scale")
        if got != expected:
            raise ValueError(message(name, f"in {', '.join(expected)}", ", ".join(got), "nbfmha.quantize makes it so"))
        check_memory(name, x)
    batch = q.shape[0] if len(q.shape) else 0
    if len(k.shape) != 4 or k.shape[0] != batch or k.shape != v.shape:
        expected = f"of one shape (batch, num_heads_kv, tokens, head_dim), batch {batch} as q has"
        raise ValueError(message("k and v", expected, f"{tuple(k.shape)} and {tuple(v.shape)}"))
    heads, tokens, head_dim = k.shape[1:]
    if tokens % BLOCK or not heads:
        expected = "of a multiple of 16 tokens, and of a head at least"
        raise ValueError(message("k", expected, f"shape {tuple(k.shape)}", "pad the tokens and pass lengths"))
    if head_dim not in HEAD_DIMS:
        raise ValueError(message("head_dim", f"one of {', '.join(map(str, HEAD_DIMS))}", head_dim, "pad the last axis"))
    dtype = check_choice("q.dtype", dtype_name(q), DTYPES, "convert it first")
    if lengths is not None:
        lengths = _integers("lengths", lengths, q, batch, tokens, place)
    layout = sizes.ContiguousLayout(heads, head_dim, tokens, dtype)
    arrays = CacheArrays(k.codes, k.scales, v.codes, v.scales, None, None, None, None, None, lengths, None)
    return layout, arrays, tokens


def _check_sinks(sinks: Any, q: Any, num_heads_q: int, place: Place) -> Any:
    """Sinks as a float32 array where q lies."""
    on_host = isinstance(sinks, np.ndarray)
    if not on_host:
        check_place("sinks", place_of("sinks", sinks), place)
    if dtype_name(sinks) != "float32":
        raise TypeError(message("sinks.dtype", "float32", dtype_name(sinks), "convert it first"))
    if tuple(sinks.shape) != (num_heads_q,):
        raise ValueError(message("sinks", f"of shape (num_heads_q,) = ({num_heads_q},)", tuple(sinks.shape)))
    if on_host and not (sinks < np.inf).all():
        raise ValueError(message("sinks", "finite or -inf", sinks.max()))
    if not on_host:
        gpu_arrays.check_contiguous("sinks", sinks)
    return gpu_arrays.from_host(q, sinks) if on_host else sinks
