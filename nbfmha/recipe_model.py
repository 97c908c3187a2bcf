"""What a recipe computes, exactly: the specification that kernels are tested against.

Everything that rounds in a kernel by the recipe's decision rounds here, in the same place and by the same contract
(``nbfmha.nvfp4``, ``nbfmha.row_scales``); everything else is float64. What remains between a kernel and this model is its
float32 accumulation; what remains between this model and ``reference.attention`` is quantisation.

Pre-pass, for each sequence and head, in float32:
    16-bit operands   q16, k16, v16: the input rounded to bfloat16 where problem.dtype is that, else to float16 ("f16")
    K smoothing       km[c] = mean over the tokens of k16; k' = k16 - km  (k' = k16 without)
    Q smoothing       qm[b, c] = mean over the queries of block b of q16; q' = q16 - qm  (q' = q16 without)
    quantisation      q', k' along head_dim, v16 along ``v_axis``; tokens past the end count as zeros. A scale each 16
                      elements, or with scale_per="row" for each token of q' and k' and each channel of v16

Forward, for each block of 64 queries and tile of 64 keys (x: the score of the smoothed problem, x + q16.km the true one):
    FP4 tile          x = value(q') . value(k') + qm . k'    (value: after quantisation and back; qk="f16": itself)
    16-bit tile       x = q16 . k16 - q16 . km
    s                 = softmax_scale * x; with a softcap, softcap * tanh(softmax_scale * (x + q16.km) / softcap)
    m                 = the running row max of s: over the tiles so far (``row_max`` below)
    p                 = exp(s - m) * (448*6 when pv="nvfp4", 448 when pv="e4m3", else 1)
    P                 = p rounded to f16, to the call's 16-bit format in a 16-bit tile; in other tiles with pv="nvfp4"
                        quantised to NVFP4 along the keys, with pv="e4m3" rounded to E4M3, saturating
    row_sum, acc      += p (or P, as the recipe's ``row_sum`` says), P V; rescaled by exp(old m - new m) when m grows

    out = acc / row_sum        lse = m + log(row_sum) - log(the factor in p) + softmax_scale * q16.km
    sink of the head:          lse' = log(exp(lse) + exp(sink)), out' = exp(lse - lse') out

The scale q16.km is not added twice: with a softcap it is in s already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nbfmha.nvfp4 import dequantize, dequantize_blocks, quantize, quantize_blocks
from nbfmha.problem import Problem, Sequence
from nbfmha.quantized_tensor import block_format
from nbfmha.recipe import P_SCALE, TILE_N, Recipe, resolve_recipe
from nbfmha.reference import as_float64, check_sinks
from nbfmha.row_scales import dequantize_rows, quantize_rows
from nbfmha.validation import check_choice
from ptx_inline.isa.formats import E2M1, E4M3

ROW_MAX = ("ascending", "descending", "final")
"""Which row max P is taken from: over the tiles so far in that order, or over all."""

_BLOCK = 16
_SMALLEST_SCALE = np.float32(2.0**-9)


@dataclass(frozen=True)
class Operands:
    """What the pre-pass hands to the forward kernel, as values in float64, for one sequence.

    Queries are (batch, num_heads_kv, qhead_per_kvhead, seqlen_q, head_dim), keys and values (batch, num_heads_kv, 1,
    seqlen_k, ...): they broadcast. q_nvfp4, k_nvfp4, v_nvfp4 stand for their codes and scales, dequantised (equal to the
    16-bit operand where the recipe quantises nothing); q_mean is qm of each query's block, k_mean is km, k_smooth is k'.
    """

    q16: np.ndarray
    k16: np.ndarray
    v16: np.ndarray
    q_nvfp4: np.ndarray
    k_nvfp4: np.ndarray
    v_nvfp4: np.ndarray
    q_mean: np.ndarray
    k_mean: np.ndarray
    k_smooth: np.ndarray


def recipe_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    problem: Problem,
    recipe: str | Recipe = "accurate",
    *,
    sinks: np.ndarray | None = None,
    row_max: str = "ascending",
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of ``recipe``, float64 (..., num_heads_q, seqlen_q, head_dim of v) and (..., num_heads_q, seqlen_q).

    q, k, v: NumPy arrays (float16, ml_dtypes' bfloat16, float32, float64) that ``problem`` describes; ``sinks``
    (num_heads_q,) as ``reference.attention`` takes them. ``row_max``: the order in which the tiles of keys come, so that
    p is taken from the max over those so far, "ascending" or "descending", or "final", from the max over all. By the
    formula nothing depends on it; what differs is how P meets the grid of its rounding.

    Raises ``TypeError`` and ``ValueError`` as ``reference.attention`` and ``resolve_recipe`` do.
    """
    recipe = resolve_recipe(recipe)
    operands = pre_pass(q, k, v, problem, recipe)
    out, lse = forward(operands, problem, recipe, sinks=sinks, row_max=row_max, v_dim=v.shape[-1])
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


def pre_pass(q: np.ndarray, k: np.ndarray, v: np.ndarray, problem: Problem, recipe: Recipe) -> list[Operands]:
    """The operands of every sequence of ``problem``; arguments and errors as ``recipe_attention``.

    Means are the exact ones rounded to float32. A kernel that adds in another order may end one unit in the last place
    away, and then on another code: compare its forward pass by handing ``forward`` the operands it made.
    """
    q, k, v = (_to_16_bits(as_float64(name, x, 3), problem.dtype) for name, x in (("q", q), ("k", k), ("v", v)))
    problem.check_arrays(q, k, v)
    heads = (problem.batch, problem.num_heads_kv)
    q = q.reshape(*heads, problem.qhead_per_kvhead, *q.shape[-2:])
    k, v = (x.reshape(*heads, 1, *x.shape[-2:]) for x in (k, v))
    return [
        _prepare(q[..., sequence.queries, :], k[..., sequence.keys, :], v[..., sequence.keys, :], recipe)
        for sequence in problem.sequences()
    ]


def forward(
    operands: list[Operands],
    problem: Problem,
    recipe: Recipe,
    *,
    v_dim: int,
    sinks: np.ndarray | None = None,
    row_max: str = "ascending",
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) from the operands of every sequence, (batch, num_heads_kv, qhead_per_kvhead, seqlen_q[, v_dim])."""
    check_choice("row_max", row_max, ROW_MAX)
    sinks = check_sinks(sinks, problem).reshape(problem.num_heads_kv, problem.qhead_per_kvhead, 1)
    lse = np.full((problem.batch, problem.num_heads_kv, problem.qhead_per_kvhead, problem.seqlen_q), -np.inf)
    out = np.zeros((*lse.shape, v_dim))
    first, stop = problem.key_ranges()
    for sequence, prepared in zip(problem.sequences(), operands, strict=True):
        for start in range(sequence.queries.start, sequence.queries.stop, TILE_N):
            rows = slice(start, min(start + TILE_N, sequence.queries.stop))
            ranges = first[rows] - sequence.keys.start, stop[rows] - sequence.keys.start
            out[..., rows, :], lse[..., rows] = _query_block(prepared, problem, recipe, sequence, rows, ranges, row_max)
    with_sink = np.logaddexp(lse, sinks)
    out *= np.exp(lse - np.where(np.isneginf(with_sink), 0, with_sink))[..., None]
    return out, with_sink


def _prepare(q16: np.ndarray, k16: np.ndarray, v16: np.ndarray, recipe: Recipe) -> Operands:
    """The pre-pass of one sequence, on float32 operands that hold 16-bit values, in the five axes of ``Operands``."""
    k_mean = np.zeros((*k16.shape[:-2], 1, k16.shape[-1]), np.float32)
    if recipe.smooth_k and k16.shape[-2]:
        k_mean = k16.mean(axis=-2, keepdims=True, dtype=np.float64).astype(np.float32)
    q_mean = np.zeros_like(q16)
    if recipe.smooth_q is not None:
        for start in range(0, q16.shape[-2], recipe.smooth_q):
            block = slice(start, start + recipe.smooth_q)
            q_mean[..., block, :] = q16[..., block, :].mean(axis=-2, keepdims=True, dtype=np.float64)
    k_smooth = k16 - k_mean
    q_nvfp4, k_nvfp4, v_nvfp4 = q16, k_smooth, v16
    if recipe.scale_per == "row":
        q_nvfp4, k_nvfp4 = (dequantize_rows(*quantize_rows(x)) for x in (q16 - q_mean, k_smooth))
        v_nvfp4 = dequantize_rows(*quantize_rows(v16.swapaxes(-1, -2))).swapaxes(-1, -2)
    elif recipe.qk == "nvfp4":
        q_nvfp4 = dequantize(quantize(q16 - q_mean, scale=recipe.scale_q))
        k_nvfp4 = dequantize(quantize(k_smooth, scale=recipe.scale_k))
    if recipe.scale_per == "block" and recipe.v_format == "nvfp4":
        v_nvfp4 = dequantize(quantize(v16, axis=recipe.v_axis, scale=recipe.scale_v))
    arrays = (q16, k16, v16, q_nvfp4, k_nvfp4, v_nvfp4, q_mean, k_mean, k_smooth)
    return Operands(*(array.astype(np.float64) for array in arrays))


def keys_in_16_bits(recipe: Recipe, positions: np.ndarray, seqlen_k: int) -> np.ndarray:
    """bool (seqlen_k,): the keys that a block of queries at ``positions`` on the key axis (ascending) has in 16 bits."""
    tile = np.arange(seqlen_k) // TILE_N
    kept = np.arange(seqlen_k) < recipe.sink_tokens
    if recipe.diagonal_tiles is not None:
        kept |= (tile >= positions[0] // TILE_N - recipe.diagonal_tiles) & (
            tile <= positions[-1] // TILE_N + recipe.diagonal_tiles
        )
    return kept


def quantize_p(p: np.ndarray) -> np.ndarray:
    """p (..., keys) >= 0, already times 448*6, to NVFP4 and back: 16 keys share a scale; float64. Keys past the end: 0."""
    *lead, keys = p.shape
    padded = np.zeros((*lead, -(-keys // _BLOCK) * _BLOCK), np.float32)
    padded[..., :keys] = p
    block = block_format("nvfp4")
    codes, scales = quantize_blocks(padded.reshape(*lead, padded.shape[-1] // _BLOCK, _BLOCK), block)
    values = dequantize_blocks(codes, scales, block)
    small = scales == 0  # P has the smallest scale there, 2^-9: no kernel divides by zero
    values[small] = _SMALLEST_SCALE * E2M1.decode(E2M1.encode(padded.reshape(values.shape)[small] / _SMALLEST_SCALE))
    return values.reshape(padded.shape)[..., :keys].astype(np.float64)


def _to_16_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """``x`` rounded to float32 and then to the 16-bit format of a call of this dtype, as float32."""
    with np.errstate(over="ignore", under="ignore"):
        x = x.astype(np.float32)
        if dtype != "bfloat16":
            return x.astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)


def _query_block(
    operands: Operands,
    problem: Problem,
    recipe: Recipe,
    sequence: Sequence,
    rows: slice,
    ranges: tuple[np.ndarray, np.ndarray],
    order: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of up to 64 queries, without sinks. ``ranges``: the keys each sees, counted within the sequence."""
    first, stop = ranges
    # whole tiles, so that the running max and P's scales see the tiles that a kernel sees
    begin = int(first.min()) // TILE_N * TILE_N
    end = min(-(-int(stop.max()) // TILE_N) * TILE_N, sequence.keys.stop - sequence.keys.start)
    keys, queries = slice(begin, end), slice(rows.start - sequence.queries.start, rows.stop - sequence.queries.start)
    positions = np.arange(queries.start, queries.stop) + sequence.q_offset
    in_16_bits = keys_in_16_bits(recipe, positions, end)[keys]
    visible = (first[:, None] <= np.arange(begin, end)) & (np.arange(begin, end) < stop[:, None])

    k_row = _product(operands.q16[..., queries, :], operands.k_mean.swapaxes(-1, -2))  # q.km: one number for each row
    scores = _scores(operands, queries, keys, in_16_bits, k_row)
    if problem.softcap is None:
        scores = problem.softmax_scale * scores
    else:
        scores = problem.softcap * np.tanh(problem.softmax_scale * (scores + k_row) / problem.softcap)
    scores = np.where(visible, scores, -np.inf)

    row_max = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    max_so_far = _max_so_far(scores, order)
    shift = np.where(np.isneginf(max_so_far), 0, max_so_far)
    p_scale = P_SCALE[recipe.pv]
    p = np.exp(scores - shift) * p_scale
    rounded = _to_16_bits(p, problem.dtype if recipe.v_format == "f16" else "float16").astype(np.float64)
    if recipe.pv == "nvfp4":
        rounded = quantize_p(p)
    elif recipe.pv == "e4m3":
        rounded = E4M3.decode(E4M3.encode(p)).astype(np.float64)
    if in_16_bits.any():
        rounded = np.where(in_16_bits, _to_16_bits(p, problem.dtype), rounded)

    rescale = np.exp(max_so_far - np.where(np.isneginf(row_max), 0, row_max))
    weights = rounded * rescale
    row_sum = (weights if recipe.row_sum == "rounded" else p * rescale).sum(axis=-1, keepdims=True)
    values = np.where(in_16_bits[:, None], operands.v16[..., keys, :], operands.v_nvfp4[..., keys, :])
    out = _product(weights, values) / np.where(row_sum == 0, 1, row_sum)
    with np.errstate(divide="ignore"):
        lse = np.where(np.isneginf(row_max), 0, row_max) + np.log(row_sum) - math.log(p_scale)
    if problem.softcap is None:
        lse = lse + problem.softmax_scale * k_row
    return out, lse[..., 0]


def _max_so_far(scores: np.ndarray, order: str) -> np.ndarray:
    """(..., rows, keys): the row max over the tiles seen when each key's tile has come, in that order."""
    if order == "final" or scores.shape[-1] == 0:
        return np.broadcast_to(scores.max(axis=-1, keepdims=True, initial=-np.inf), scores.shape)
    starts = np.arange(0, scores.shape[-1], TILE_N)
    tile_max = np.maximum.reduceat(scores, starts, axis=-1)
    if order == "descending":
        running = np.maximum.accumulate(tile_max[..., ::-1], axis=-1)[..., ::-1]
    else:
        running = np.maximum.accumulate(tile_max, axis=-1)
    return running[..., np.arange(scores.shape[-1]) // TILE_N]


def _scores(operands: Operands, queries: slice, keys: slice, in_16_bits: np.ndarray, k_row: np.ndarray) -> np.ndarray:
    """q.(k - km) of each key in the precision that it has, without softmax scale."""
    scores = _product(
        np.concatenate([operands.q_nvfp4[..., queries, :], operands.q_mean[..., queries, :]], axis=-1),
        np.concatenate([operands.k_nvfp4[..., keys, :], operands.k_smooth[..., keys, :]], axis=-1).swapaxes(-1, -2),
    )
    if in_16_bits.any():
        k16 = operands.k16[..., keys, :][..., in_16_bits, :]
        scores[..., in_16_bits] = _product(operands.q16[..., queries, :], k16.swapaxes(-1, -2)) - k_row
    return scores


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x @ y of (b, h, group, rows, n) and (b, h, 1, n, m), the heads of a group as rows of one matrix product."""
    b, h, group, rows, n = x.shape
    return (x.reshape(b, h, group * rows, n) @ y[:, :, 0]).reshape(b, h, group, rows, y.shape[-1])
