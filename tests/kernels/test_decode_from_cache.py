"""``nbfmha.decode`` from a ``PagedKVCache`` that grows: both against the cache's model, on the emulator and on a GPU."""

import numpy as np
import pytest
from devices import EmulatedDevice, GpuDevice

import nbfmha
from nbfmha.validate.cache_twin import CacheTwin
from nbfmha.validate.decode_problems import attention_from, parts_of_keys, queries, rows


@pytest.fixture(params=["blockscale", "dequant", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "gpu":
        return GpuDevice(request.getfixturevalue("gpu"))
    return EmulatedDevice("sm_120a" if request.param == "blockscale" else "sm_90a")


def test_sequences_that_grow_part_and_end(device):
    rng = np.random.default_rng(0)
    twin = CacheTwin(
        device.to_device, device.to_host, pages=24, num_heads_kv=2, head_dim=64, page_size=32, max_sequences=4,
        max_length=400, recent_tokens=32, sink_tokens=16,
    )  # fmt: skip

    def append(chunks):
        twin.append(chunks, *rows(rng, twin, sum(chunks.values())))

    def check(sequences, q_len):
        q = queries(rng, twin, len(sequences), q_len, 2)
        out, ids = device.empty(q.shape, "float16"), device.to_device(np.array(sequences, np.int32))
        nbfmha.decode(device.to_device(q), twin.cache, ids, impl=device.implementation, out=out)
        quantize_q = device.implementation == "blockscale"
        held = [parts_of_keys(twin.held(seq)) for seq in sequences]
        expected = [attention_from(q[i], *parts, quantize_q=quantize_q).out for i, parts in enumerate(held)]
        # half an ulp of the output, and P rounded to f16; a wrong token, scale or mean is a hundred times that away
        got = device.to_host(out).swapaxes(1, 2)
        np.testing.assert_allclose(got, np.stack(expected), rtol=2.0**-10, atol=2.0**-10)

    first, second = twin.allocate(2)
    append({first: 150, second: 20})  # one has tokens in pages, the other none yet
    check([second, first], 2)
    for _ in range(30):  # and one after the other: blocks leave the ring, pages fill
        append({first: 1, second: 1})
    check([first, second], 1)
    (third,) = twin.fork(first)
    append({first: 40, third: 70})  # from here on they differ, in a page that they shared
    check([third, first, second], 3)
    twin.free([first])
    (fourth,) = twin.allocate()
    append({fourth: 200, second: 5})  # on pages that were freed
    check([fourth, third, second], 1)
