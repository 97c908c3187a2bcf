"""Operands of the prefill kernel, laid out in NumPy from a recipe's pre-pass, and what the kernel must make of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nbfmha import nvfp4
from nbfmha.kernels.prefill import TILE_M, TILE_N, Operands, prefill, stored_order
from nbfmha.problem import Problem
from nbfmha.recipe import Recipe
from nbfmha.recipe_model import forward, pre_pass


@dataclass(frozen=True)
class Call:
    """One call: shapes, the options of ``Problem``, and which corrections the recipe makes."""

    head_dim: int = 64
    heads: tuple[int, int] = (1, 1)
    lengths: tuple[int, int] = (64, 64)
    options: tuple = ()
    smooth_k: bool = False
    smooth_q: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("smooth_k", "smooth_q", "sinks") if getattr(self, name)]
        return " ".join([f"d{self.head_dim} {self.heads} {self.lengths}", *map(str, self.options), *flags])

    def inputs(self, seed: int = 0):
        """q, k, v float16 of one batch; keys have a mean that smoothing takes away."""
        rng = np.random.default_rng(seed)
        (heads_q, heads_kv), (seqlen_q, seqlen_k) = self.heads, self.lengths
        q = rng.standard_normal((1, heads_q, seqlen_q, self.head_dim)) + 0.5
        k = rng.standard_normal((1, heads_kv, seqlen_k, self.head_dim)) + rng.standard_normal(self.head_dim)
        v = rng.standard_normal((1, heads_kv, seqlen_k, self.head_dim))
        return [x.astype(np.float16) for x in (q, k, v)]

    @property
    def recipe(self) -> Recipe:
        return Recipe(smooth_k=self.smooth_k, smooth_q=TILE_M if self.smooth_q else None, pv="f16", v_axis="tokens")


def padded(x: np.ndarray, tokens: int) -> np.ndarray:
    """(heads, tokens, channels) with zeros behind the last token."""
    return np.pad(x, [(0, 0), (0, tokens - x.shape[1]), (0, 0)])


def lay_out(made, v: np.ndarray, call: Call, sinks) -> dict[str, np.ndarray | None]:
    """The fields of ``Operands`` as NumPy arrays, of what the pre-pass made (one batch)."""
    (heads_q, heads_kv), (seqlen_q, seqlen_k) = call.heads, call.lengths
    tokens = -(-seqlen_k // TILE_N) * TILE_N
    d = call.head_dim
    q16, q_mean = (x.reshape(heads_q, seqlen_q, d) for x in (made.q16, made.q_mean))
    k_smooth = padded(made.k_smooth.reshape(heads_kv, seqlen_k, d), tokens)
    order = (np.arange(0, tokens, TILE_N)[:, None] + stored_order()).reshape(-1)
    q = nvfp4.quantize((q16 - q_mean).astype(np.float32))
    k = nvfp4.quantize(k_smooth.astype(np.float32)[:, order])
    v = nvfp4.quantize(padded(v.reshape(heads_kv, seqlen_k, d), tokens), axis="tokens")
    group = heads_q // heads_kv
    delta = q_mean[:, ::TILE_M] @ np.repeat(k_smooth, group, axis=0).swapaxes(-1, -2) if call.smooth_q else None
    k_mean = np.repeat(made.k_mean.reshape(heads_kv, 1, d), group, axis=0)
    shift = np.sum(q16 * k_mean, axis=-1) if call.smooth_k else None
    arrays = {"delta": delta, "shift": shift, "sinks": sinks}
    arrays = {name: None if x is None else np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
    return {"q": q.codes, "sfq": q.scales, "k": k.codes, "sfk": k.scales, "vt": v.codes, "sfv": v.scales, **arrays}


def run(to_device, to_host, implementation: str, call: Call, inputs=None, *, out_dtype="float32", sinks=None):
    """(out, lse) of the kernel and (out, lse) of the model on the same operands: float64, (heads_q, seqlen_q[, d])."""
    q, k, v = call.inputs() if inputs is None else inputs
    problem = Problem.of(q, k, v, has_sinks=call.sinks, **dict(call.options))
    if call.sinks and sinks is None:
        sinks = np.random.default_rng(9).standard_normal(call.heads[0]).astype(np.float32)
    (made,) = prepared = pre_pass(q, k, v, problem, call.recipe)
    expected_out, expected_lse = forward(prepared, problem, call.recipe, v_dim=call.head_dim, sinks=sinks)
    arrays = lay_out(made, v, call, sinks)
    operands = Operands(**{name: None if x is None else to_device(x) for name, x in arrays.items()})
    out, lse = prefill(operands, problem, implementation=implementation, out_dtype=out_dtype)
    shape = (call.heads[0], call.lengths[0])
    got = to_host(out, out_dtype).reshape(*shape, call.head_dim), to_host(lse, "float32").reshape(shape)
    return *got, expected_out.reshape(*shape, call.head_dim), expected_lse.reshape(shape)
