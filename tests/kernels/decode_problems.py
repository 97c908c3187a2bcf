"""Caches built in NumPy, what they stand for, and decode calls on them: of any device."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import ml_dtypes
import numpy as np

import nbfmha
from nbfmha import nvfp4
from nbfmha.kv_layout import BLOCK, CacheArrays, CacheLayout
from nbfmha.validate.decode_problems import attention_from


@dataclass(frozen=True)
class Call:
    """One call: a sequence of each of ``lengths``; options are those of ``nbfmha.decode``."""

    lengths: tuple[int, ...] = (300,)
    q_len: int = 1
    heads: tuple[int, int] = (1, 1)
    head_dim: int = 64
    page_size: int = 64
    num_splits: int | None = 1
    dtype: str = "float16"
    recent: int = 64
    sink_tokens: int = 16
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        default = Call()
        changed = [n for n in self.__dataclass_fields__ if getattr(self, n) != getattr(default, n) and n != "lengths"]
        return " ".join([str(self.lengths), *(f"{name}={getattr(self, name)}" for name in changed)])

    @property
    def layout(self) -> CacheLayout:
        sizes = {"recent_tokens": self.recent, "sink_tokens": self.sink_tokens}
        return CacheLayout(self.heads[1], self.head_dim, self.page_size, self.dtype, **sizes)

    @property
    def numpy_dtype(self):
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    def inputs(self, seed: int = 0):
        """q (batch, q_len, heads, head_dim), and k, v (heads_kv, length, head_dim) of each sequence; keys have a mean."""
        rng = np.random.default_rng(seed)
        q = rng.standard_normal((len(self.lengths), self.q_len, self.heads[0], self.head_dim)) + 0.5
        shapes = [(self.heads[1], length, self.head_dim) for length in self.lengths]
        k = [rng.standard_normal(shape) + rng.standard_normal(self.head_dim) for shape in shapes]
        v = [rng.standard_normal(shape) for shape in shapes]
        return q.astype(self.numpy_dtype), *([x.astype(self.numpy_dtype) for x in xs] for xs in (k, v))


class Built:
    """A cache of ``call``'s sequences, in NumPy. All that no token uses is poison: scales of NaN, codes of -6, NaN in ring
    and sinks, page -1; so are the pages' places of sinks. ``slots``: of the sequences, in an order of their own."""

    def __init__(self, call: Call, k, v, seed: int = 1):
        rng = np.random.default_rng(seed)
        layout = call.layout
        pages = sum(layout.pages_of(length) for length in call.lengths) + 3
        free, self.slots = list(rng.permutation(pages)), rng.permutation(len(call.lengths) + 2)[: len(call.lengths)]
        shapes = layout.shapes(pages, len(call.lengths) + 2, max(call.lengths) + 100)
        self.arrays = {}
        for name, (shape, dtype) in shapes.items():
            poison = {"uint8": 0xFF, "int32": -1, "float32": np.nan}.get(dtype, np.nan)
            self.arrays[name] = np.full(shape, poison, call.numpy_dtype if dtype == call.dtype else dtype)
        self.k_parts, self.v_values = [], []  # of each sequence: what multiplies q, what multiplies q in NVFP4; V
        for slot, length, own_k, own_v in zip(self.slots, call.lengths, k, v, strict=True):
            self._fill(layout, slot, length, own_k, own_v, free, rng)

    def _fill(self, layout, slot, length, k, v, free, rng):
        arrays, quantised = self.arrays, layout.quantized_tokens(length)
        mean = (k.astype(np.float32).mean(1) if length else np.zeros(k[:, 0:1].shape[::2])).astype(np.float32)
        mean = mean + rng.standard_normal(mean.shape).astype(np.float32) / 8  # of other tokens: any will do
        arrays["k_mean"][slot], arrays["lengths"][slot] = mean, length
        tokens = np.arange(length)
        sinks, ring = tokens[: layout.sink_tokens], tokens[quantised:]
        for name, x in (("k", k), ("v", v)):
            arrays[f"{name}_sinks"][slot][:, sinks] = x[:, sinks]
            arrays[f"{name}_recent"][slot][:, ring % layout.ring_tokens] = x[:, ring]
        plain, codes = k.astype(np.float64), np.zeros(k.shape)
        values = v.astype(np.float64)
        if quantised:
            qk = nvfp4.quantize(k[:, :quantised].astype(np.float32) - mean[:, None], scale=layout.scale)
            qv = nvfp4.quantize(np.ascontiguousarray(v[:, :quantised]), axis="tokens", scale=layout.scale)
            here = slice(layout.sink_tokens, quantised)
            plain[:, here] = mean[:, None]
            codes[:, here], values[:, here] = nvfp4.dequantize(qk)[:, here], nvfp4.dequantize(qv)[:, here]
            for page in range(layout.pages_of(length)):
                arrays["block_tables"][slot, page] = free.pop()
            for block in range(layout.sink_tokens // BLOCK, quantised // BLOCK):
                first = BLOCK * block
                page, at = arrays["block_tables"][slot, first // layout.page_size], first % layout.page_size
                arrays["k_codes"][page][:, at : at + BLOCK] = qk.codes[:, first : first + BLOCK]
                arrays["k_scales"][page][:, at : at + BLOCK] = qk.scales[:, first : first + BLOCK]
                arrays["v_codes"][page][..., at // 2 : at // 2 + 8] = qv.codes[..., first // 2 : first // 2 + 8]
                arrays["v_scales"][page][..., at // BLOCK] = qv.scales[..., block]
        self.k_parts.append((plain, codes))
        self.v_values.append(values)

    def on(self, device, call: Call):
        """As ``nbfmha.decode`` takes it."""
        arrays = CacheArrays(**{name: device.to_device(x) for name, x in self.arrays.items()})
        arrays.check(call.layout)
        return SimpleNamespace(layout=call.layout, arrays=arrays, max_length=max(call.lengths))


def expected(call: Call, implementation: str, q, built: Built, sinks=None):
    """(out, lse) in float64: attention on what the cache stands for, as ``implementation`` takes q for it."""
    out = np.zeros(q.shape)
    lse = np.zeros((q.shape[0], q.shape[2], q.shape[1]))
    options = {"quantize_q": implementation == "blockscale", "sinks": sinks} | call.options
    for i, (keys, values) in enumerate(zip(built.k_parts, built.v_values, strict=True)):
        own, lse[i] = attention_from(q[i], *keys, values, **options)
        out[i] = own.swapaxes(0, 1)
    return out, lse


def run(device, call: Call, inputs=None, *, sinks=None):
    """(out, lse) of ``nbfmha.decode`` and (out, lse) of the model; float64."""
    q, k, v = call.inputs() if inputs is None else inputs
    built = Built(call, k, v)
    cache = built.on(device, call)
    out = device.empty(q.shape, call.dtype)
    device_sinks = None if sinks is None else device.to_device(np.asarray(sinks, np.float32))
    got, lse = nbfmha.decode(
        device.to_device(q), cache, device.to_device(built.slots.astype(np.int32)), num_splits=call.num_splits, out=out,
        return_lse=True, impl=device.implementation, sinks=device_sinks, **call.options,
    )  # fmt: skip
    assert got is out
    return device.to_host(out), device.to_host(lse), *expected(call, device.implementation, q, built, sinks)
