"""What the kernels compute, in NumPy with float64 accumulation, written to be read.

q is (..., num_heads_q, seqlen_q, head_dim); k and v are (..., num_heads_kv, seqlen_k, head_dim). Every function takes NumPy
arrays (float16, ml_dtypes' bfloat16, float32, float64) or ``QuantizedTensor``s, which are dequantised first: comparing a
kernel with the reference *on the dequantised inputs* separates its own error from that of the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from nbfmha.nvfp4 import dequantize
from nbfmha.quantized_tensor import QuantizedTensor
from nbfmha.validation import FLOAT_DTYPES, check_head_dim, check_numpy, check_rank, dtype_name, message

_SCORES_AT_ONCE = 1 << 22  # 32 MiB of float64 scores


def qk(q: np.ndarray | QuantizedTensor, k: np.ndarray | QuantizedTensor) -> np.ndarray:
    """Scores q k^T, float64 (..., seqlen_q, seqlen_k); leading axes broadcast. No softmax scale.

    Raises ``TypeError`` for a dtype that is no float, ``ValueError`` for a rank below 2 or unequal head_dims.
    """
    q, k = _as_float64("q", q, 2), _as_float64("k", k, 2)
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
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """softmax(softmax_scale * q k^T) v, float64 (..., num_heads_q, seqlen_q, head_dim of v).

    Query head h reads key/value head h / (num_heads_q / num_heads_kv). ``causal`` aligns the last query with the last
    key: query i sees the keys j <= i + seqlen_k - seqlen_q. A query that sees none gets 0 and lse = -inf.
    ``softmax_scale`` is 1/sqrt(head_dim) when None. With ``return_lse``, also the natural logarithm of the sum of
    exp(scaled scores), float64 (..., num_heads_q, seqlen_q).

    Raises ``TypeError`` for a dtype that is no float, ``ValueError`` for shapes that do not fit together or a
    ``softmax_scale`` that is not finite.
    """
    q, k, v = _as_float64("q", q, 3), _as_float64("k", k, 3), _as_float64("v", v, 3)
    qhead_per_kvhead = _check_attention_shapes(q, k, v)
    head_dim, seqlen_q, seqlen_k = q.shape[-1], q.shape[-2], k.shape[-2]
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(head_dim)
    if not math.isfinite(softmax_scale):
        raise ValueError(message("softmax_scale", "finite", softmax_scale))

    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    lse = np.full(q.shape[:-1], -np.inf)
    step = max(1, _SCORES_AT_ONCE // max(1, seqlen_k))
    for *batch, head in np.ndindex(q.shape[:-2]):
        index, kv_index = (*batch, head), (*batch, head // qhead_per_kvhead)
        for start in range(0, seqlen_q, step):
            queries = np.arange(start, min(start + step, seqlen_q))
            with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf in the input propagate as IEEE says
                scores = softmax_scale * (q[index][queries] @ k[kv_index].T)
                if causal:
                    visible = np.arange(seqlen_k) <= queries[:, None] + (seqlen_k - seqlen_q)
                    scores = np.where(visible, scores, -np.inf)
                weights, lse[index][queries] = _softmax(scores)
                out[index][queries] = weights @ v[kv_index]
    return (out, lse) if return_lse else out


def merge_lse(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Attention over all keys from attention over disjoint pieces of them.

    ``parts`` are pairs (out (..., head_dim), lse (...)) of the same queries; returns (out, lse) in float64, with
    lse = log(sum of exp(lse_i)) and out = sum of exp(lse_i - lse) out_i. A piece with lse = -inf (no key seen) has no
    weight, whatever its ``out`` holds; where every piece is such, out = 0 and lse = -inf.

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


def _softmax(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights over the last axis and the log of the sum of exponentials; a row of -inf (or no keys) gives 0, -inf."""
    row_max = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isneginf(row_max), 0, row_max)
    weights = np.exp(scores - shift)
    row_sum = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):  # log 0 = -inf is the answer for a fully masked row
        lse = shift + np.log(row_sum)
    return weights / np.where(row_sum == 0, 1, row_sum), lse[..., 0]


def _as_float64(name: str, x: np.ndarray | QuantizedTensor, rank: int) -> np.ndarray:
    if isinstance(x, QuantizedTensor):
        x = dequantize(x)
    check_numpy(name, x)
    dtype = dtype_name(x)
    if dtype not in (*FLOAT_DTYPES, "float64"):
        raise TypeError(message(f"{name}.dtype", "float16, bfloat16, float32 or float64", dtype, "convert it first"))
    axes = "(..., tokens, head_dim)" if rank == 2 else "(..., num_heads, tokens, head_dim)"
    check_head_dim(check_rank(name, x, rank, axes)[-1])
    return x.astype(np.float64)


def _check_same_head_dim(q: np.ndarray, k: np.ndarray) -> None:
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(message("head_dim", f"that of q ({q.shape[-1]}) in k", k.shape[-1]))


def _check_attention_shapes(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> int:
    """Query heads for each key/value head."""
    _check_same_head_dim(q, k)
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(message("v", f"of shape {k.shape[:-1]} + (head_dim,), as k is", v.shape))
    if q.shape[:-3] != k.shape[:-3]:
        raise ValueError(message("k", f"of the batch shape of q, {q.shape[:-3]}", k.shape[:-3]))
    heads_q, heads_kv = q.shape[-3], k.shape[-3]
    if heads_kv == 0 or heads_q % heads_kv:
        raise ValueError(message("num_heads_q", f"a multiple of num_heads_kv ({heads_kv})", heads_q))
    return heads_q // heads_kv
