"""What the kernels compute, in NumPy with float64 accumulation, written to be read.

q is (..., num_heads_q, seqlen_q, head_dim); k and v are (..., num_heads_kv, seqlen_k, head_dim). Every function takes NumPy
arrays (float16, ml_dtypes' bfloat16, float32, float64) or ``QuantizedTensor``s, which are dequantised first: comparing a
kernel with the reference *on the dequantised inputs* separates its own error from that of the format.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from nbfmha.nvfp4 import dequantize
from nbfmha.problem import DTYPES, Problem
from nbfmha.quantized_tensor import QuantizedTensor
from nbfmha.validation import check_head_dim, check_numpy, check_rank, dtype_name, message

_SCORES_AT_ONCE = 1 << 22  # 32 MiB of float64 scores


def qk(q: np.ndarray | QuantizedTensor, k: np.ndarray | QuantizedTensor) -> np.ndarray:
    """Scores q k^T, float64 (..., seqlen_q, seqlen_k); leading axes broadcast. No softmax scale.

    Raises ``TypeError`` for a dtype that is no float, ``ValueError`` for a rank below 2 or unequal head_dims.
    """
    q, k = as_float64("q", q, 2), as_float64("k", k, 2)
    _check_same_head_dim(q, k)
    with np.errstate(invalid="ignore"):  # Inf and NaN in the input propagate as IEEE says
        return q @ k.swapaxes(-1, -2)


def qk_quantized(qt_q: QuantizedTensor, qt_k: QuantizedTensor) -> np.ndarray:
    """``qk`` of what the codes and scales stand for; raises ``TypeError`` for anything but ``QuantizedTensor``s."""
    for name, value in (("qt_q", qt_q), ("qt_k", qt_k)):
        if not isinstance(value, QuantizedTensor):
            raise TypeError(message(name, "a QuantizedTensor", type(value).__name__, "use qk for arrays"))
    return qk(qt_q, qt_k)


def attention(
    q: np.ndarray | QuantizedTensor,
    k: np.ndarray | QuantizedTensor,
    v: np.ndarray | QuantizedTensor,
    problem: Problem | None = None,
    *,
    sinks: np.ndarray | None = None,
    return_lse: bool = False,
    **options: Any,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """softmax(softmax_scale * q k^T) v, float64 (..., num_heads_q, seqlen_q, head_dim of v).

    ``problem`` says what is masked, capped and scaled (``nbfmha.problem``); without one, ``options`` are fields of
    ``Problem`` from ``causal`` on. ``sinks`` (num_heads_q,): a logit for each query head that joins the denominator.
    Query head h reads key/value head h // qhead_per_kvhead. A query that sees no key gets 0 and lse = -inf (lse = its
    sink where there is one). With ``return_lse``, also the natural logarithm of the denominator, float64
    (..., num_heads_q, seqlen_q).

    Raises ``TypeError`` for a dtype that is no float, ``ValueError`` for shapes or options that do not fit together.
    """
    q, k, v = as_float64("q", q, 3), as_float64("k", k, 3), as_float64("v", v, 3)
    if problem is None:
        problem = Problem.of(q, k, v, has_sinks=sinks is not None, **options)
    elif options:
        raise TypeError(message("options", "none beside a problem", ", ".join(options), "put them into the problem"))
    problem.check_arrays(q, k, v)
    sinks = check_sinks(sinks, problem)

    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    lse = np.full(q.shape[:-1], -np.inf)
    first, stop = problem.key_ranges()
    step = max(1, _SCORES_AT_ONCE // max(1, problem.seqlen_k))
    for *batch, head in np.ndindex(q.shape[:-2]):
        index, kv_index = (*batch, head), (*batch, head // problem.qhead_per_kvhead)
        for start in range(0, problem.seqlen_q, step):
            rows = slice(start, start + step)
            keys = np.arange(first[rows].min(), stop[rows].max())
            visible = (first[rows, None] <= keys) & (keys < stop[rows, None])
            with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf in the input propagate as IEEE says
                scores = problem.softmax_scale * (q[index][rows] @ k[kv_index][keys].T)
                if problem.softcap is not None:
                    scores = problem.softcap * np.tanh(scores / problem.softcap)
                weights, lse[index][rows] = _softmax(np.where(visible, scores, -np.inf), sinks[head])
                out[index][rows] = weights @ v[kv_index][keys]
    return (out, lse) if return_lse else out


def merge_lse(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Attention over all keys from attention over disjoint pieces of them.

    ``parts`` are pairs (out (..., head_dim), lse (...)) of the same queries; returns (out, lse) in float64, with
    lse = log(sum of exp(lse_i)) and out = sum of exp(lse_i - lse) out_i. A piece with lse = -inf (no key seen) has no
    weight, whatever its ``out`` holds; where every piece is such, out = 0 and lse = -inf. A sink is a piece of its own,
    (0, sink): it belongs to one of the pieces, not to each.

    Raises ``ValueError`` for no parts or shapes that differ.
    """
    parts = [(np.asarray(out, np.float64), np.asarray(lse, np.float64)) for out, lse in parts]
    if not parts:
        raise ValueError(message("parts", "at least one (out, lse)", "none"))
    out_shape = parts[0][0].shape
    for out, lse in parts:
        if out.shape != out_shape or lse.shape != out_shape[:-1]:
            raise ValueError(
                message("parts", f"(out, lse) of shapes {out_shape}, {out_shape[:-1]}", f"{out.shape}, {lse.shape}")
            )
    weights, lse = _softmax(np.stack([lse for _, lse in parts], axis=-1))
    merged = np.zeros(out_shape)
    for i, (out, _) in enumerate(parts):
        weight = weights[..., i, None]
        merged += weight * np.where(weight == 0, 0, out)
    return merged, lse


def check_sinks(sinks: np.ndarray | None, problem: Problem) -> np.ndarray:
    """The sinks in float64, (num_heads_q,); -inf, which adds nothing, where the problem has none.

    Raises ``TypeError`` for something that is no NumPy array of floats, ``ValueError`` for another shape, a value that is
    NaN or +Inf, or sinks where the problem has none (or none where it has).
    """
    if problem.has_sinks != (sinks is not None):
        expected = "an array, as problem.has_sinks says" if problem.has_sinks else "None, as problem.has_sinks says"
        raise ValueError(message("sinks", expected, "None" if sinks is None else "an array"))
    if sinks is None:
        return np.full(problem.num_heads_q, -np.inf)
    _check_dtype("sinks", check_numpy("sinks", sinks))
    if sinks.shape != (problem.num_heads_q,):
        raise ValueError(message("sinks", f"of shape (num_heads_q,) = ({problem.num_heads_q},)", sinks.shape))
    sinks = sinks.astype(np.float64)
    if not (sinks < np.inf).all():
        raise ValueError(message("sinks", "finite or -inf", sinks.max()))
    return sinks


def as_float64(name: str, x: np.ndarray | QuantizedTensor, rank: int) -> np.ndarray:
    """The values of an array or ``QuantizedTensor`` in float64, after checking its dtype, rank and head_dim."""
    if isinstance(x, QuantizedTensor):
        x = dequantize(x)
    _check_dtype(name, check_numpy(name, x))
    axes = "(..., tokens, head_dim)" if rank == 2 else "(..., num_heads, tokens, head_dim)"
    check_head_dim(check_rank(name, x, rank, axes)[-1])
    return x.astype(np.float64)


def _check_dtype(name: str, x: np.ndarray) -> None:
    dtype = dtype_name(x)
    if dtype not in DTYPES:
        raise TypeError(message(f"{name}.dtype", "float16, bfloat16, float32 or float64", dtype, "convert it first"))


def _softmax(scores: np.ndarray, sink: float = -np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Weights over the last axis and the log of the sum of exponentials, exp(sink) included; nothing seen: 0, sink."""
    row_max = scores.max(axis=-1, keepdims=True, initial=sink)
    shift = np.where(np.isneginf(row_max), 0, row_max)
    weights = np.exp(scores - shift)
    row_sum = weights.sum(axis=-1, keepdims=True) + np.exp(sink - shift)
    with np.errstate(divide="ignore"):  # log 0 = -inf is the answer for a fully masked row
        lse = shift + np.log(row_sum)
    return weights / np.where(row_sum == 0, 1, row_sum), lse[..., 0]


def _check_same_head_dim(q: np.ndarray, k: np.ndarray) -> None:
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(message("head_dim", f"that of q ({q.shape[-1]}) in k", k.shape[-1]))
