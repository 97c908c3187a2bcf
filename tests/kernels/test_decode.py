"""Decode against float64 attention on what the cache stands for: one body, on the emulator and on a GPU."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
from decode_problems import Built, Call, expected, run
from devices import EmulatedDevice, GpuDevice

import nbfmha
from nbfmha import decoding, reference
from nbfmha.dispatch import Unavailable
from nbfmha.kernels import decode as kernels
from nbfmha.kernels import decode_sizes, paged_products
from nbfmha.kernels.decode import decode_kernel
from nbfmha.kernels.decode_sizes import (
    RESIDENT_WARPS,
    TEAM_WARPS,
    Memory,
    choose_splits,
    q_tiles_of,
    teams_of,
    why_not,
)
from nbfmha.kernels.softmax_columns import TOKENS
from nbfmha.kv_layout import HEAD_DIMS, CacheLayout
from nbfmha.problem import Problem
from ptx_inline.isa.shared_memory import shared_limit
from ptx_inline.toolchain import Target, instruction_mix

EDGES = (1, 15, 63, 64, 65, 300, 0, 2)

#: Few kernels, many shapes: what is compiled for one is used by the others.
CALLS = [
    Call((40,)),
    Call((300,)),
    Call(EDGES),
    Call(EDGES, q_len=3, heads=(2, 1), num_splits=3),
    Call((300, 81), num_splits=9),
    Call((700, 130, 1500), heads=(16, 2), num_splits=None),
    Call((1000, 300, 90), q_len=4, options={"window": (200, None)}, num_splits=20),
    Call((600, 100), q_len=2, options={"window": (70, 5), "softmax_scale": 0.3}, heads=(2, 2)),
    Call((600, 100), recent=16, sink_tokens=0, q_len=8),
    Call(EDGES, q_len=3, heads=(4, 1), num_splits=3),  # two query tiles
    Call((600, 100), recent=16, sink_tokens=0, q_len=16),
    Call((600, 250), recent=128, sink_tokens=80, num_splits=2),
    Call((300, 1, 500), q_len=16, heads=(4, 2), num_splits=2),  # four
    Call((300, 170), q_len=3, heads=(48, 2)),  # and more rows than a CTA has
    Call((300, 65, 500), page_size=16, num_splits=3),
    Call((300, 500), page_size=48, q_len=3, heads=(8, 2)),
    Call((300, 40), options={"softcap": 20.0}, num_splits=2, q_len=2),
    Call((300, 40), options={"softcap": 5.0, "softmax_scale": 0.3, "window": (100, 0)}),
    Call((300, 40), options={"softmax_scale": -0.2}),
    Call((300, 40), dtype="bfloat16", q_len=2, num_splits=2),
    Call((300, 700), head_dim=128, num_splits=2, heads=(4, 1)),
    Call((300, 500), head_dim=128, q_len=16, heads=(4, 2)),
    Call((300, 500), head_dim=256, q_len=3, heads=(8, 1), num_splits=2),
    Call((300, 170), head_dim=256, page_size=32),
]


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=["blockscale", "dequant", GPU])
def device(request):
    """The PTX for sm_120a or sm_90a on this CPU, or a GPU."""
    if request.param == "gpu":
        return GpuDevice(request.getfixturevalue("gpu"))
    return EmulatedDevice("sm_120a" if request.param == "blockscale" else "sm_90a")


def assert_decoded(got_out, got_lse, out, lse, dtype="float16"):
    """P is rounded to 16 bits, and so is the result: a wrong index, scale or mask is far off."""
    seen = np.isfinite(lse)
    np.testing.assert_array_equal(np.isneginf(got_lse), ~seen)
    np.testing.assert_allclose(got_lse[seen], lse[seen], rtol=0, atol=6e-6 * max(1.0, np.abs(lse[seen]).max(initial=1.0)))
    assert np.all(got_out[~seen.swapaxes(1, 2)] == 0)
    error, rounding = np.abs(got_out - out).max(-1), 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    budget = 2 * rounding * np.abs(out).max(-1) + rounding + 2.0**-12
    worst = np.unravel_index(np.argmax(error - budget), error.shape)
    assert np.all(error <= budget), f"row {worst}: off by {error[worst]:.3g}, allowed {budget[worst]:.3g}"
    relative = np.sqrt(np.sum((got_out - out) ** 2) / max(np.sum(out**2), 1e-30))
    assert relative < 5e-4 + rounding, f"relative L2 {relative:.3g}"


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_equals_attention_on_what_the_cache_stands_for(device, call):
    assert_decoded(*run(device, call), dtype=call.dtype)


def test_pages_of_several_tiles(device):
    assert_decoded(*run(device, Call((700, 130, 1500), heads=(16, 2), num_splits=None, page_size=256)))


@pytest.mark.parametrize("num_splits", [1, 3])
def test_sinks_join_the_denominator_once(device, num_splits):
    call = Call((300, 0, 20), heads=(4, 2), q_len=3, num_splits=num_splits)
    sinks = np.array([0.5, -3.0, 6.0, -np.inf])
    out, lse, expected_out, expected_lse = run(device, call, sinks=sinks)
    np.testing.assert_allclose(lse[1, :3], np.repeat(sinks[:3, None], 3, 1), rtol=1e-6)
    assert np.all(out[1] == 0)
    assert_decoded(out, lse, expected_out, expected_lse)


def test_one_hot_v_shows_each_weight(device):
    """V picks token j, of pages, in channel j - 16: every weight in its place, though K's rows are read permuted."""
    call = Call((96,), recent=16, q_len=2)
    q, k, v = call.inputs(4)
    k[0][0, :16], k[0][0, 80:], v[0][...] = 0, 0, 0
    v[0][0, 16:80] = 6 * np.eye(64)
    out, _, expected_out, _ = run(device, call, (4 * q, k, v))  # fourfold, so that some weights are large
    np.testing.assert_allclose(out, expected_out, atol=6 * 2.0**-10)
    assert expected_out.max(-1).mean() > 1, "weights too even to tell tokens apart"


@pytest.mark.parametrize("num_splits", [1, 4])
def test_a_constant_v_comes_back(device, num_splits):
    call = Call((500, 33), heads=(4, 2), num_splits=num_splits)
    q, k, v = call.inputs(3)
    out, *_ = run(device, call, (q, k, [np.full_like(x, 6) for x in v]))
    np.testing.assert_allclose(out, 6, rtol=1e-3)


def test_uniform_scores_give_the_log_of_the_count(device):
    call = Call((500, 33, 1), num_splits=2)
    q, k, v = call.inputs(5)
    _, lse, _, _ = run(device, call, (np.zeros_like(q), k, v))
    np.testing.assert_allclose(lse[:, 0, 0], np.log(call.lengths), atol=2e-6)


def test_splits_agree(device):
    """One result, however many share the work: to the rounding of P, whose maximum is another in each split."""
    call = Call((700,), heads=(2, 1), q_len=2)
    results = []
    for num_splits in (1, 2, 5, 40):
        out, lse, *_ = run(device, Call(call.lengths, call.q_len, call.heads, num_splits=num_splits))
        results.append((out, lse))
    for out, lse in results[1:]:
        np.testing.assert_allclose(out, results[0][0], atol=2.0**-10)
        np.testing.assert_allclose(lse, results[0][1], atol=4e-6)


@pytest.mark.parametrize(("max_length", "several"), [(1, False), (10**6, True)])
def test_each_sequence_is_divided_by_the_length_that_the_device_knows(device, max_length, several, monkeypatch):
    """A replayed CUDA graph has the splits of its capture, and what the host knows may be far more than there is."""
    call = Call((900, 20), heads=(2, 1))
    chosen = []

    def choose(*args, **options):
        chosen.append(choose_splits(*args, **options))
        return chosen[0]

    monkeypatch.setattr(decode_sizes, "choose_splits", choose)
    monkeypatch.setattr(decoding, "_multiprocessors", lambda place: 8)
    q, k, v = call.inputs()
    built = Built(call, k, v)
    cache = built.on(device, call)
    cache.max_length = max_length
    out, lse = nbfmha.decode(
        device.to_device(q), cache, built.slots.tolist(), impl=device.implementation, return_lse=True
    )
    assert (chosen[0].num_splits > 2) == several
    assert_decoded(device.to_host(out), device.to_host(lse), *expected(call, device.implementation, q, built))


@pytest.mark.parametrize("warps", [8, 16])
def test_teams_of_more_warps(device, warps, monkeypatch):
    monkeypatch.setattr(decode_sizes, "TEAM_WARPS", (warps,))
    assert_decoded(*run(device, Call((3000, 700, 33), heads=(2, 1), num_splits=None)))


@pytest.mark.parametrize(
    ("teams", "call"),
    [
        (2, Call((300, 1, 500), heads=(4, 2))),
        (2, Call((300, 0, 1700), heads=(4, 2), num_splits=3)),  # teams whose warps have tiles, and some that have none
        (2, Call((300, 170), q_len=3, heads=(48, 2), num_splits=2)),  # and tiles of rows
        (4, Call((300, 65, 500, 40), page_size=16)),
    ],
    ids=str,
)
def test_several_teams_of_a_cta(device, teams, call, monkeypatch):
    """They differ in sequence, head and tile of rows, and so in the length of their loops."""

    def choose(*args, **options):
        return dataclasses.replace(choose_splits(*args, **options), teams_a_cta=teams)

    monkeypatch.setattr(decode_sizes, "choose_splits", choose)
    assert_decoded(*run(device, call))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_call_that_repeats_reads_the_tensors_of_its_own(gpu, num_splits):
    """The second and later calls of a kind are prepared: other memory each time, and a CUDA graph at last."""
    device, call = GpuDevice(gpu), Call((700, 130, 1500), heads=(4, 2), q_len=2)
    built = Built(call, *call.inputs()[1:])
    cache, ids = built.on(device, call), device.to_device(built.slots.astype(np.int32))
    sinks = np.array([0.5, -3.0, 6.0, -np.inf], np.float32)
    given = {"num_splits": num_splits, "return_lse": True}
    kept = []
    for seed in range(4):
        q, own_sinks = call.inputs(seed)[0], sinks + seed
        on_device = device.to_device(q), device.to_device(own_sinks)
        out, lse = nbfmha.decode(on_device[0], cache, ids.clone(), sinks=on_device[1], **given)
        kept.append((on_device, out, lse))
        assert_decoded(device.to_host(out), device.to_host(lse), *expected(call, "dequant", q, built, own_sinks))
    graph, stream = gpu.cuda.CUDAGraph(), gpu.cuda.Stream()
    (q, on_sinks), *_ = kept[0]
    with gpu.cuda.graph(graph, stream=stream):
        out, lse = nbfmha.decode(q, cache, ids, sinks=on_sinks, **given)
    q.copy_(kept[3][0][0])
    on_sinks.copy_(kept[3][0][1])
    graph.replay()
    gpu.cuda.synchronize()
    assert gpu.equal(out, kept[3][1])
    assert gpu.equal(lse, kept[3][2])
    with pytest.raises(ValueError, match="out must be in memory of its own"):
        nbfmha.decode(q, cache, ids, sinks=on_sinks, out=q, **given)
    with pytest.raises(TypeError, match=re.escape("seq_ids.dtype must be int32, got int64")):
        nbfmha.decode(q, cache, ids.long(), sinks=on_sinks, **given)
    with pytest.raises(ValueError, match="q must be contiguous"):
        nbfmha.decode(q.transpose(0, 1).contiguous().transpose(0, 1), cache, ids, sinks=on_sinks, **given)


def test_without_sequences_nothing_is_launched(device):
    call = Call((20,))
    cache = Built(call, *call.inputs()[1:]).on(device, call)
    q = device.to_device(np.zeros((0, 1, 1, 64), np.float16))
    out, lse = nbfmha.decode(q, cache, [], return_lse=True)
    assert tuple(out.shape) == (0, 1, 1, 64)
    assert tuple(lse.shape) == (0, 1, 1)


class TestContiguous:
    """(k, v) as ``QuantizedTensor``s: every sequence is one page without 16-bit parts."""

    @staticmethod
    def inputs(batch, heads, tokens, q_len, seed=7):
        rng = np.random.default_rng(seed)
        q = (rng.standard_normal((batch, q_len, heads[0], 64)) + 0.5).astype(np.float16)
        k, v = rng.standard_normal((2, batch, heads[1], tokens, 64)).astype(np.float16)
        return q, nbfmha.quantize(k), nbfmha.quantize(v, axis="tokens")

    @pytest.mark.parametrize(
        ("tokens", "lengths", "q_len", "options"),
        [
            (640, None, 3, {}),
            (320, (320, 77, 3, 0), 5, {"num_splits": 3}),
            (320, (300, 64), 4, {"window": (70, 0), "num_splits": 1}),
            (320, (300, 64), 16, {"window": (70, 0), "num_splits": 1}),
            (80, (65, 80), 2, {}),
        ],
    )
    def test_equals_attention_on_what_they_stand_for(self, device, tokens, lengths, q_len, options):
        batch = 2 if lengths is None else len(lengths)
        q, k, v = self.inputs(batch, (2, 2), tokens, q_len)
        on_device = tuple(x.with_arrays(device.to_device) for x in (k, v))
        given = None if lengths is None else device.to_device(np.array(lengths, np.int32))
        got, got_lse = nbfmha.decode(device.to_device(q), on_device, lengths=given, return_lse=True, **options)
        rows = q.swapaxes(1, 2).astype(np.float64)
        if device.implementation == "blockscale":
            rows = nbfmha.dequantize(nbfmha.quantize(q.swapaxes(1, 2), scale="four_over_six")).astype(np.float64)
        out, lse, own = np.zeros(q.shape), np.zeros((batch, 2, q_len)), [tokens] * batch if lengths is None else lengths
        k, v = nbfmha.dequantize(k), nbfmha.dequantize(v)
        window = options.get("window")
        for i, n in enumerate(own):
            one, lse[i] = reference.attention(
                rows[i], k[i, :, :n], v[i, :, :n], causal=True, window=window, return_lse=True
            )
            out[i] = one.swapaxes(0, 1)
        assert_decoded(device.to_host(got), device.to_host(got_lse), out, lse)

    def test_refused(self):
        device = EmulatedDevice("sm_90a")
        move = device.to_device
        q, *pair = self.inputs(1, (2, 1), 80, 1)
        q, (k, v) = move(q), (x.with_arrays(move) for x in pair)
        odd_k, odd_v = (x.with_arrays(move) for x in self.inputs(1, (2, 1), 70, 1)[1:])
        two_k, two_v = (x.with_arrays(move) for x in self.inputs(2, (2, 1), 80, 1)[1:])
        for pair, options, error, expected_text in (
            ((k, k), {}, ValueError, "v must be in nvfp4, tokens, linear, no global_scale, got nvfp4, head_dim"),
            ((k, q), {}, TypeError, "cache must be a cache or two QuantizedTensors (k, v)"),
            ((k, v), {"seq_ids": [0]}, TypeError, "seq_ids must be None with (k, v)"),
            ((odd_k, odd_v), {}, ValueError, "k must be of a multiple of 16 tokens, and of a head at least"),
            ((two_k, two_v), {}, ValueError, "k and v must be of one shape (batch, num_heads_kv, tokens, head_dim), b"),
            ((k, v), {"lengths": [81]}, ValueError, "lengths must be in [0, 80], got 81"),
            ((k, v), {"lengths": [0, 1]}, ValueError, "lengths must be of shape (batch,) = (1,), got (2,)"),
        ):
            with pytest.raises(error, match=re.escape(expected_text)):
                nbfmha.decode(q, pair, **options)


class TestRefused:
    """What is wrong is said before anything is launched."""

    device = EmulatedDevice("sm_90a")

    def decode(self, q=None, seq_ids=(0,), cache=None, **options):
        call = Call((20,), heads=(4, 2))
        cache = cache or Built(call, *call.inputs()[1:]).on(self.device, call)
        q = call.inputs()[0] if q is None else q
        return nbfmha.decode(self.device.to_device(q), cache, list(seq_ids), **options)

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((1, 4, 64), "q must be of shape (batch, q_len, num_heads_q, 64), as the cache has head_dim, got (1, 4, 64)"),
            ((1, 1, 4, 128), "q must be of shape (batch, q_len, num_heads_q, 64)"),
            ((1, 17, 4, 64), "q must be of 1 to 16 tokens a sequence (axis 1), got 17; nbfmha.attention takes longer"),
            ((1, 0, 4, 64), "q must be of 1 to 16 tokens"),
            ((1, 1, 3, 64), "num_heads_q must be a multiple of the cache's num_heads_kv (2), got 3"),
        ],
    )
    def test_shapes(self, shape, expected):
        with pytest.raises(ValueError, match=re.escape(expected)):
            self.decode(np.ones(shape, np.float16))

    @pytest.mark.parametrize(
        ("options", "error", "expected"),
        [
            ({"softcap": -1.0}, ValueError, "softcap must be > 0"),
            ({"window": (-2, 0)}, ValueError, "window"),
            ({"window": [3]}, TypeError, "window"),
            ({"num_splits": 0}, ValueError, "num_splits must be an integer in [1, 65535] or None, got 0"),
            ({"impl": "fast"}, ValueError, "impl must be one of"),
            ({"seq_ids": (0, 1)}, ValueError, "seq_ids must be of shape (batch,) = (1,), got (2,)"),
            ({"seq_ids": (3,)}, ValueError, "seq_ids must be in [0, 2], got 3"),
            ({"seq_ids": (0.0,)}, TypeError, "seq_ids must be integers, got float64"),
            ({"sinks": np.zeros(4)}, TypeError, "sinks.dtype must be float32, got float64"),
            ({"sinks": np.zeros(3, np.float32)}, ValueError, "sinks must be of shape (num_heads_q,) = (4,)"),
            ({"sinks": np.full(4, np.inf, np.float32)}, ValueError, "sinks must be finite or -inf"),
        ],
    )
    def test_options(self, options, error, expected):
        with pytest.raises(error, match=re.escape(expected)):
            self.decode(**options)

    def test_more_sequences_than_a_grid_has_room_for(self, monkeypatch):
        monkeypatch.setattr(decode_sizes, "MAX_BATCH", 2)
        with pytest.raises(ValueError, match="q must be of at most 2 sequences, got 3; split the batch"):
            self.decode(np.ones((3, 1, 4, 64), np.float16), seq_ids=(0, 0, 0))

    def test_lengths_are_those_of_the_cache(self):
        with pytest.raises(TypeError, match="seq_ids and lengths must be slots and None with a cache"):
            self.decode(lengths=[3])

    def test_dtype_and_place(self):
        with pytest.raises(TypeError, match=re.escape("q.dtype must be that of the cache (float16), got float32")):
            self.decode(np.ones((1, 1, 4, 64), np.float32))
        call = Call((20,))
        built = Built(call, *call.inputs()[1:])
        cache = built.on(EmulatedDevice("sm_90a"), call)
        with pytest.raises(TypeError, match="cache must be an array of numpy, as q is, got one of emulated"):
            nbfmha.decode(call.inputs()[0], cache, [0])
        with pytest.raises(ValueError, match="cache must be on the machine of q, got another machine"):
            self.decode(call.inputs()[0], cache=cache)
        on_host = SimpleNamespace(layout=call.layout, arrays=SimpleNamespace(k_codes=built.arrays["k_codes"]), max_length=1)
        with pytest.raises(ValueError, match=r"q must be in GPU memory or on a nbfmha.emulated.Machine, got numpy"):
            nbfmha.decode(call.inputs()[0], on_host, [0])

    def test_outputs(self):
        wrong = self.device.empty((1, 1, 2, 64), "float16")
        with pytest.raises(ValueError, match=re.escape("out must be of shape (1, 1, 4, 64), as q is, got (1, 1, 2, 64)")):
            self.decode(out=wrong)
        with pytest.raises(TypeError, match=re.escape("out.dtype must be that of the cache (float16), got float32")):
            self.decode(out=self.device.empty((1, 1, 4, 64), "float32"))

    @pytest.mark.parametrize(
        ("impl", "reason"),
        [
            ("blockscale", "the block-scale MMA needs sm_120a or sm_121a, this is sm_90a"),
            ("legacy", "no decode kernel for f8f6f4"),
            ("reference", "for arrays in host memory"),
        ],
    )
    def test_implementations(self, impl, reason):
        with pytest.raises(Unavailable, match=f"{impl!r}: .*{re.escape(reason)}.*; 'dequant' can run this call"):
            self.decode(impl=impl)


def test_auto_and_emulated_take_what_the_machine_has(monkeypatch):
    taken = []
    monkeypatch.setattr(kernels, "decode", lambda *args, implementation, **options: taken.append(implementation))
    call = Call((20,))
    for arch in ("sm_120a", "sm_90a"):
        device = EmulatedDevice(arch)
        cache = Built(call, *call.inputs()[1:]).on(device, call)
        for impl in ("auto", "emulated"):
            nbfmha.decode(device.to_device(call.inputs()[0]), cache, [0], impl=impl)
    assert taken == ["blockscale", "blockscale", "dequant", "dequant"]


@pytest.mark.parametrize(
    ("batch", "length", "splits", "warps", "teams"),
    [
        (1, 32768, 16, 16, 1),
        (16, 8192, 1, 16, 1),
        (64, 4096, 1, 4, 4),
        (12, 8192, 5, 4, 4),
        (1, 2048, 9, 4, 1),
        (1, 100, 1, 8, 1),
    ],
)
def test_splits_fill_an_h100(batch, length, splits, warps, teams):
    layout = CacheLayout(8, 128, recent_tokens=64, sink_tokens=16)
    problem = Problem(batch, 32, 8, 1, 1, 128, causal=True)
    gpu = {"implementation": "dequant", "target": Target.parse("sm_90a"), "multiprocessors": 132}
    chosen = choose_splits(layout, problem, length, None, **gpu)
    assert (chosen.teams, chosen.num_splits, chosen.warps, chosen.teams_a_cta) == (8 * batch, splits, warps, teams)
    sliding = Problem(batch, 32, 8, 1, 1, 128, causal=True, window=(100, 0))
    assert choose_splits(layout, sliding, length, None, **gpu).num_splits <= 2


@pytest.mark.parametrize("resident", [1, 2, 3, 4])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_an_sm_has_no_more_teams_for_those_of_a_cta(resident, num_splits):
    found = set()
    for teams in range(1, 2000):
        count = teams_of(teams, num_splits, resident, 132)
        ctas, rest = divmod(teams * num_splits, count)
        assert not rest
        assert teams % count == 0
        assert resident % count == 0
        assert count * -(-ctas // 132) == -(-teams * num_splits // 132)
        found.add(count)
    assert found == {n for n in (1, 2, 4) if resident % n == 0}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rows", [1, 16, 17, 128])
def test_every_gpu_has_the_shared_memory(head_dim, rows):
    layout = CacheLayout(1, head_dim)
    for implementation in ("blockscale", "dequant"):
        memory = Memory(implementation, head_dim, q_tiles_of(head_dim, rows))
        assert memory.bytes(min(TEAM_WARPS)) <= shared_limit("sm_89")
        assert all(memory.bytes(warps) % 128 == 0 for warps in TEAM_WARPS), "teams lie one behind the other"
    assert why_not(layout, rows, "dequant", Target.parse("sm_86")) is None


@pytest.mark.parametrize(("head_dim", "words"), [(64, 2), (128, 4), (128, 2), (256, 4)])
def test_channels_of_q_meet_those_of_k(head_dim, words):
    """Register i of a lane's word holds channels i, i + 4; k step 2 w + s takes registers 2 s, 2 s + 1 of word w."""
    order = paged_products.channel_order(head_dim, words)
    assert sorted(order) == list(range(head_dim))
    for slab in range(head_dim // (32 * words)):
        for word in range(words):
            for step in range(2):
                first = 32 * words * slab + 32 * word + 16 * step
                for k in range(16):
                    lane, half, e = k % 8 // 2, k // 8, k % 2
                    channel = 32 * words * slab + 8 * words * lane + 8 * word + (2 * step + half) + 4 * e
                    assert order[first + k] == channel


def test_a_lane_has_the_tokens_of_its_block():
    """Columns 2 q and 2 q + 1 of the transposed scores are lane q's: rows 2 q and 2 q + 1 of every half of an m tile."""
    place, own = TOKENS["widened"]
    for q in range(4):
        tokens = [place(m, half) + own(2 * q + e) for m in range(4) for half in range(2) for e in range(2)]
        assert sorted(tokens) == list(range(16 * q, 16 * q + 16))


@pytest.mark.parametrize(
    ("implementation", "head_dim", "q_tiles", "target"),
    [
        ("blockscale", 64, 1, "sm_120a"),
        ("dequant", 64, 1, "sm_90a"),
        ("dequant", 64, 1, "sm_80"),
        ("dequant", 128, 1, "sm_90a"),
        ("dequant", 256, 1, "sm_90a"),
        ("blockscale", 128, 1, "sm_120a"),
        ("blockscale", 256, 1, "sm_120a"),
        ("dequant", 64, 4, "sm_90a"),
        ("dequant", 128, 4, "sm_90a"),
        ("blockscale", 128, 4, "sm_120a"),
    ],
)
def test_next_to_nothing_is_spilled(implementation, head_dim, q_tiles, target):
    kernel = decode_kernel(implementation, head_dim, q_tiles=q_tiles)
    resources, mix = kernel.resources(target), instruction_mix(kernel.sass(target))
    # what is used once; four query tiles of 128 channels take 255 registers, and maxima and sums of eight columns a lane
    assert resources.spill_store_bytes <= (304 if (head_dim, q_tiles) == (128, 4) else 32)
    assert resources.registers * 32 * RESIDENT_WARPS[head_dim, q_tiles] <= 65536
    opcodes = " ".join(mix.opcodes)
    assert ("OMMA.SF.16864" in opcodes) == (implementation == "blockscale")
    assert "HMMA.16816.F32" in opcodes
    if implementation == "dequant":
        # a tile's codes: 64 tokens of K and V, two elements a register and 32 lanes
        assert mix.opcodes["HMUL2"] >= 2 * head_dim


@pytest.mark.parametrize("teams", [2, 4])
def test_what_a_team_has_is_not_kept_through_the_loop(teams):
    """Where it was, 24 bytes were spilled, and most of what teams are good for was lost."""
    resources = decode_kernel("dequant", 128, "bfloat16", teams=teams).resources("sm_90a")
    assert resources.spill_store_bytes == 0
    assert resources.registers <= 128
