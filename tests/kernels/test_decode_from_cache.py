"""``nbfmha.decode`` from a ``PagedKVCache`` that grows: both against the cache's model, on the emulator and on a GPU."""

import numpy as np
import pytest
from devices import EmulatedDevice, GpuDevice

import nbfmha
from nbfmha import nvfp4, reference
from nbfmha.cache_model import contents

HEADS_Q, HEADS_KV, HEAD_DIM = 4, 2, 64


@pytest.fixture(
    params=["blockscale", pytest.param("dequant", marks=pytest.mark.slow), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def device(request):
    if request.param == "gpu":
        return GpuDevice(request.getfixturevalue("gpu"))
    return EmulatedDevice("sm_120a" if request.param == "blockscale" else "sm_90a")


class Sequence:
    """The whole history of a sequence, and its length after each append."""

    def __init__(self, slot: int, k=None, v=None, lengths=()):
        empty = np.zeros((HEADS_KV, 0, HEAD_DIM), np.float16)
        self.slot, self.lengths = slot, list(lengths)
        self.k, self.v = (empty if k is None else k), (empty if v is None else v)

    def grow(self, rng, tokens: int):
        """New tokens (tokens, heads_kv, head_dim) of k and v, added to the history."""
        k = (rng.standard_normal((HEADS_KV, tokens, HEAD_DIM)) + np.linspace(-2, 2, HEAD_DIM)).astype(np.float16)
        v = rng.standard_normal(k.shape).astype(np.float16)
        self.k, self.v = np.concatenate([self.k, k], 1), np.concatenate([self.v, v], 1)
        self.lengths.append(self.k.shape[1])
        return k.swapaxes(0, 1), v.swapaxes(0, 1)

    def attention(self, q, layout, quantise_q: bool):
        """float64 (q_len, heads_q, head_dim) of q in that shape."""
        held = contents(self.k, self.v, layout, self.lengths)
        rows = q.swapaxes(0, 1).astype(np.float64)
        in_pages = nvfp4.dequantize(nvfp4.quantize(q.swapaxes(0, 1), scale="four_over_six")) if quantise_q else rows
        mean = held.k_mean[:, None].astype(np.float64)
        plain = np.where(held.in_16_bits[:, None], held.k, mean)  # meets q as it is, the rest q in NVFP4
        both = np.concatenate([rows, in_pages], -1), np.concatenate([plain, held.k - plain], -1)
        return reference.attention(*both, held.v, causal=True, softmax_scale=HEAD_DIM**-0.5).swapaxes(0, 1)


def test_sequences_that_grow_part_and_end(device):
    rng = np.random.default_rng(0)
    like = device.to_device(np.zeros(8, np.float16))
    cache = nbfmha.PagedKVCache(
        like=like, pages=24, num_heads_kv=HEADS_KV, head_dim=HEAD_DIM, page_size=32, max_sequences=4, max_length=400,
        recent_tokens=32, sink_tokens=16,
    )  # fmt: skip

    def append(sequences, tokens):
        new = [x.grow(rng, n) for x, n in zip(sequences, tokens, strict=True)]
        k, v = (device.to_device(np.ascontiguousarray(np.concatenate(part))) for part in zip(*new, strict=True))
        cache.append(k, v, [x.slot for x in sequences], np.cumsum([0, *tokens]).tolist())

    def check(sequences, q_len):
        q = (rng.standard_normal((len(sequences), q_len, HEADS_Q, HEAD_DIM)) + 0.5).astype(np.float16)
        out = device.empty(q.shape, "float16")
        ids = device.to_device(np.array([x.slot for x in sequences], np.int32))
        nbfmha.decode(device.to_device(q), cache, ids, impl=device.implementation, out=out)
        expected = [x.attention(q[i], cache.layout, device.implementation == "blockscale") for i, x in enumerate(sequences)]
        # half an ulp of the output, and P rounded to f16; a wrong token, scale or mean is a hundred times that away
        np.testing.assert_allclose(device.to_host(out), np.stack(expected), rtol=2.0**-10, atol=2.0**-10)

    first, second = (Sequence(slot) for slot in cache.allocate(2))
    append([first, second], [150, 20])  # one has tokens in pages, the other none yet
    check([second, first], 2)
    for _ in range(30):  # and one after the other: blocks leave the ring, pages fill
        append([first, second], [1, 1])
    check([first, second], 1)
    (slot,) = cache.fork(first.slot)
    third = Sequence(slot, first.k, first.v, first.lengths)
    append([first, third], [40, 70])  # from here on they differ, in a page that they shared
    check([third, first, second], 3)
    cache.free([first.slot])
    fourth = Sequence(*cache.allocate(1))
    append([fourth, second], [200, 5])  # on pages that were freed
    check([fourth, third, second], 1)
