"""Operands of the prefill kernel, laid out in NumPy from a recipe's pre-pass, and what the kernel must make of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from nbfmha import nvfp4, tiles
from nbfmha.kernels.operands import Operands, stored_order
from nbfmha.kernels.prefill import prefill, rows_of_cta
from nbfmha.problem import Problem
from nbfmha.recipe import TILE_N, Recipe
from nbfmha.recipe_model import forward, pre_pass
from nbfmha.row_scales import quantize_rows
from nbfmha.tiles import View
from ptx_inline.isa.formats import pack_nibbles

PLAIN = Recipe(v_axis="tokens")
SMOOTH = Recipe(smooth_k=True, smooth_q=64, v_axis="tokens")


@dataclass(frozen=True)
class Call:
    """One call: shapes, the options of ``Problem``, and its recipe."""

    head_dim: int = 64
    heads: tuple[int, int] = (1, 1)
    lengths: tuple[int, int] = (64, 64)
    options: dict = field(default_factory=dict)
    recipe: Recipe = SMOOTH
    dtype: str = "float16"
    batch: int = 1

    def __str__(self) -> str:
        changed = [
            f"{name}={getattr(self.recipe, name)}"
            for name in self.recipe.__dataclass_fields__
            if getattr(self.recipe, name) != getattr(PLAIN, name)
        ]
        options = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join([f"{self.dtype} d{self.head_dim} {self.heads} {self.lengths}", *options, *changed])

    def inputs(self, seed: int = 0):
        """q, k, v; keys have a mean that smoothing takes away."""
        rng = np.random.default_rng(seed)
        (heads_q, heads_kv), (seqlen_q, seqlen_k) = self.heads, self.lengths
        q = rng.standard_normal((self.batch, heads_q, seqlen_q, self.head_dim)) + 0.5
        k = rng.standard_normal((self.batch, heads_kv, seqlen_k, self.head_dim)) + rng.standard_normal(self.head_dim)
        v = rng.standard_normal((self.batch, heads_kv, seqlen_k, self.head_dim))
        dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
        return [x.astype(dtype) for x in (q, k, v)]


def as_view(array, x: np.ndarray) -> View:
    """The view of a contiguous array of x's shape (batch, heads, tokens, channels)."""
    _, heads, tokens, channels = x.shape
    return View(array, (heads * tokens * channels, tokens * channels, channels))


def lay_out(q, k, v, problem: Problem, recipe: Recipe, made, sinks, device, implementation) -> Operands:
    """``Operands`` for ``implementation`` of what the model's pre-pass made, sequence after sequence."""
    batch, d = problem.batch, problem.head_dim
    heads_q, heads_kv = batch * problem.num_heads_q, batch * problem.num_heads_kv
    padded, code_dim, mean_size = tiles.padded_tokens(problem), -(-d // 64) * 64, recipe.smooth_q or 64
    blocks = tiles.query_blocks(problem, mean_size, rows_of_cta(implementation, d))
    group, to_device = problem.qhead_per_kvhead, device.to_device
    delta = np.full((heads_q, tiles.delta_tiles(problem, mean_size) * TILE_N), np.nan, np.float32)  # where no query sees
    means = tiles.mean_blocks(problem, mean_size)
    q_rest = np.zeros((heads_q, problem.seqlen_q, code_dim), np.float32)
    k_rest = np.zeros((heads_kv, padded, code_dim), np.float32)
    v_padded = np.zeros((heads_kv, padded, d), np.float32)
    shift = np.zeros((heads_q, problem.seqlen_q), np.float32)
    flat = lambda array, heads: array.reshape(heads, *array.shape[-2:])  # noqa: E731
    flat_inputs = flat(q, heads_q), flat(k, heads_kv), flat(v, heads_kv)
    at = 0
    for index, ((queries, keys, _), x) in enumerate(zip(problem.sequences(), made, strict=True)):
        length = keys.stop - keys.start
        q16, q_mean = flat(x.q16, heads_q), flat(x.q_mean, heads_q)
        k_smooth = flat(x.k_smooth, heads_kv)
        q_rest[:, queries, :d] = q16 - q_mean
        k_rest[:, at : at + length, :d] = k_smooth
        v_padded[:, at : at + length] = flat(x.v16, heads_kv)
        shift[:, queries] = np.sum(q16 * np.repeat(flat(x.k_mean, heads_kv), group, axis=0), axis=-1)
        k_tiles = np.pad(k_smooth, [(0, 0), (0, -length % TILE_N), (0, 0)])
        for first, _, sequence, delta_tile, begin, end in means:
            if sequence == index:
                mean, seen = q_mean[:, first - queries.start], slice(begin * TILE_N, end * TILE_N)
                own = k_tiles[:, max(seen.start - at, 0) : max(seen.stop - at, 0)]
                place = slice(seen.start + delta_tile * TILE_N, seen.stop + delta_tile * TILE_N)
                delta[:, place] = np.einsum("hc,htc->ht", mean, np.repeat(own, group, axis=0))
        at += -(-length // TILE_N) * TILE_N
    order = (np.arange(0, padded, TILE_N)[:, None] + stored_order()).reshape(-1)
    codes = {}
    if recipe.scale_per == "row":
        codes = lay_out_rows(q_rest, k_rest[:, order], v_padded, problem)
    elif recipe.is_quantized and implementation == "dequant":
        q_values, k_values, v_values = (np.empty(x.shape, np.float16) for x in flat_inputs)
        for (queries, keys, _), x in zip(problem.sequences(), made, strict=True):
            q_values[:, queries], k_values[:, keys] = flat(x.q_nvfp4, heads_q), flat(x.k_nvfp4, heads_kv)
            v_values[:, keys] = flat(x.v_nvfp4, heads_kv)
        codes = {"q_values": q_values, "k_values": k_values, "v_values": v_values}
    elif recipe.is_quantized:
        q_codes = nvfp4.quantize(q_rest, scale=recipe.scale_q)
        k_codes = nvfp4.quantize(np.ascontiguousarray(k_rest[:, order]), scale=recipe.scale_k)
        v_codes = nvfp4.quantize(v_padded, axis="tokens", scale=recipe.scale_v)
        codes = {"q": q_codes.codes, "sfq": q_codes.scales, "k": k_codes.codes, "sfk": k_codes.scales}
        codes |= {"vt": v_codes.codes, "sfv": v_codes.scales}
    sixteen = {}
    if recipe.has_windows or not recipe.is_quantized:
        kind = ml_dtypes.bfloat16 if problem.dtype == "bfloat16" else np.float16
        for name, x in (("q16", q), ("k16", k), ("v16", v)):
            sixteen[name] = as_view(to_device(x.astype(kind)), x)
    present = {"delta": recipe.smooth_q, "shift": recipe.smooth_k, "sinks": sinks is not None}
    extra = {"delta": delta, "shift": shift, "sinks": sinks}
    names = ("q", "sfq", "k", "sfk", "vt", "sfv", "q_values", "k_values", "v_values")
    return Operands(
        **{name: to_device(codes[name]) if name in codes else None for name in names},
        **{name: sixteen.get(name) for name in ("q16", "k16", "v16")},
        **{name: to_device(extra[name].astype(np.float32)) if present[name] else None for name in extra},
        blocks=to_device(blocks),
    )


def lay_out_rows(q_rest, k_stored, v_padded, problem: Problem) -> dict[str, np.ndarray]:
    """Codes and float32 scales, one a token of q and k and one a channel of v over each sequence."""
    (q, sfq), (k, sfk) = quantize_rows(q_rest), quantize_rows(k_stored)
    v, scales = [], []
    at = 0
    for sequence in problem.sequences():
        tokens = -(-(sequence.keys.stop - sequence.keys.start) // TILE_N) * TILE_N
        channels = np.ascontiguousarray(v_padded[:, at : at + tokens].swapaxes(1, 2))
        for made, part in zip((v, scales), quantize_rows(channels), strict=True):
            made.append(part)
        at += tokens
    codes = {"q": q, "k": k, "vt": np.concatenate(v, axis=-1)}
    return {name: pack_nibbles(x) for name, x in codes.items()} | {"sfq": sfq, "sfk": sfk, "sfv": np.stack(scales, axis=1)}


def run(device, call: Call, inputs=None, *, sinks=None):
    """(out, lse) of the kernel and (out, lse) of the model on the same operands: float64, (heads_q, seqlen_q[, d])."""
    q, k, v = call.inputs() if inputs is None else inputs
    problem = Problem.of(q, k, v, has_sinks=sinks is not None, **call.options)
    made = pre_pass(q, k, v, problem, call.recipe)
    expected_out, expected_lse = forward(made, problem, call.recipe, v_dim=call.head_dim, sinks=sinks)
    implementation = "legacy" if call.recipe.scale_per == "row" else device.implementation
    operands = lay_out(q, k, v, problem, call.recipe, made, sinks, device, implementation)
    out = device.empty(q.shape, call.dtype)
    heads_q = problem.batch * problem.num_heads_q
    lse = device.empty((heads_q, problem.seqlen_q), "float32")
    prefill(operands, problem, call.recipe, implementation=implementation, out=as_view(out, q), lse=lse)
    shape = (heads_q, problem.seqlen_q)
    got = device.to_host(out).reshape(*shape, call.head_dim), device.to_host(lse).reshape(shape)
    return *got, expected_out.reshape(*shape, call.head_dim), expected_lse.reshape(shape)
