"""``PagedKVCache`` against its model: one body, on the emulator and on a GPU. Every byte of pages that anybody may read,
the rings and the sinks are compared bit for bit; pages, rings and sinks begin as poison."""

import contextlib

import ml_dtypes
import numpy as np
import pytest
from devices import EmulatedDevice, GpuDevice
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

import nbfmha
from nbfmha.emulated import Machine
from nbfmha.kernels import append as kernels
from nbfmha.page_pool import CacheFull
from nbfmha.testing import assert_close
from nbfmha.validate.cache_twin import CacheTwin
from nbfmha.views import view_of

NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    return EmulatedDevice() if request.param == "emulated" else GpuDevice(request.getfixturevalue("gpu"))


class Twin(CacheTwin):
    """A cache beside its history, with tokens of its own making."""

    def __init__(self, device, seed=0, **options):
        chosen = {"pages": 40, "num_heads_kv": 2, "head_dim": 64, "page_size": 32, "max_sequences": 4, "max_length": 700}
        chosen |= {"dtype": "float16", "recent_tokens": 16, "sink_tokens": 16} | options
        super().__init__(device.to_device, device.to_host, numpy_dtype=NUMPY[chosen["dtype"]], **chosen)
        self.device, self.rng = device, np.random.default_rng(seed)
        self.offset = 3 * self.rng.standard_normal((self.layout.num_heads_kv, self.layout.head_dim))

    def rows(self, count):
        """k and v (count, heads_kv, head_dim): k has a mean, v's magnitudes differ."""
        shape = (count, *self.offset.shape)
        k = self.rng.standard_normal(shape) + self.offset
        v = self.rng.standard_normal(shape) * 10 ** self.rng.uniform(-3, 2, shape)
        return (x.astype(NUMPY[self.layout.dtype]) for x in (k, v))

    def append(self, chunks):
        """chunks: sequence -> tokens; without ``cu_seqlens`` where that is one for each."""
        super().append(chunks, *self.rows(sum(chunks.values())))

    def check(self, ids=None):
        """All sequences, or those of ``ids``, bit for bit."""
        assert not self.to_host(self.cache._tickets).any()
        for part in self.parts(ids):
            assert_close(part.got, part.expected, part.budget, what=part.name)


def test_one_token_at_a_time(device):
    """Two sequences 5 tokens apart, over window crossings and the borders of pages; a third one joins late."""
    twin = Twin(device)
    a, b, c = twin.allocate(3)
    twin.append({a: 5})
    for step in range(75):
        chunks = {a: 1, b: 1} if step < 40 else {c: 1, b: 1, a: 1}
        twin.append(chunks)
        if step % 3 == 0 or step > 60:
            twin.check()
    assert twin.cache.stats.pages - twin.cache.stats.free_pages == sum(map(twin.layout.pages_of, (80, 75, 35)))


@pytest.mark.parametrize("first", [1, 15, 16, 31, 32, 33, 47, 64, 65, 200, 513])
def test_a_chunk_and_what_follows(device, first):
    twin = Twin(device)
    (a,) = twin.allocate()
    twin.append({a: first})
    twin.check()
    for count in (1, 16, 30, 65, 3):
        twin.append({a: count})
        twin.check()


def test_chunks_of_many_sequences_in_one_call(device):
    twin = Twin(device, page_size=16, pages=80)
    ids = twin.allocate(4)
    for counts in ((3, 0, 130, 70), (0, 40, 1, 64), (65, 31, 0, 1), (16, 16, 16, 16)):
        twin.append(dict(zip(reversed(ids), counts, strict=True)))
        twin.check()


@pytest.mark.parametrize(("recent", "sinks", "page_size"), [(64, 0, 256), (32, 64, 48), (16, 32, 16)])
def test_windows_and_pages_of_other_sizes(device, recent, sinks, page_size):
    twin = Twin(device, recent_tokens=recent, sink_tokens=sinks, page_size=page_size)
    ids = twin.allocate(2)
    for counts in ((1, 50), (20, 1), (100, 1), (1, 150), (63, 64)):
        twin.append(dict(zip(ids, counts, strict=True)))
        twin.check()


@pytest.mark.parametrize(("dtype", "head_dim", "scale"), [("bfloat16", 128, "four_over_six"), ("float16", 256, "amax")])
def test_other_kernels(device, dtype, head_dim, scale):
    twin = Twin(device, dtype=dtype, head_dim=head_dim, scale=scale)
    ids = twin.allocate(2)
    for counts in ((10, 50), (40, 1), (1, 100), (1, 1)):
        twin.append(dict(zip(ids, counts, strict=True)))
        twin.check()
    twin.fork(ids[0])
    twin.append({ids[0]: 20})
    twin.check()


def test_mean_that_is_given(device):
    twin = Twin(device)
    given = np.random.default_rng(1).standard_normal((2, 2, 64)).astype(np.float32)
    a, b = twin.allocate(2, k_mean=given)
    (c,) = twin.allocate()
    twin.append({a: 40, b: 100, c: 40})
    twin.check()
    (d,) = twin.fork(a)
    twin.append({d: 30})
    twin.free([a, b])
    (again,) = twin.allocate()
    twin.append({again: 50})
    twin.check()


@pytest.mark.parametrize("length", [10, 31, 48, 79, 80])
def test_forks_go_their_own_ways(device, length):
    twin = Twin(device)
    (a,) = twin.allocate()
    twin.append({a: length})
    b, c = twin.fork(a, 2)
    twin.check()
    pages = twin.cache.stats.free_pages
    twin.append({b: 1, a: 20})
    twin.check()
    twin.append({c: 33})
    twin.check()
    (d,) = twin.fork(b)
    twin.append({b: 40, d: 17})
    twin.check()
    assert twin.cache.stats.free_pages < pages
    twin.free([a])
    twin.append({c: 16, b: 1, d: 16})
    twin.check()
    twin.free([b, c, d])
    assert twin.cache.stats == (0, 4, 0, 40, 40, 0)
    twin.check()


def test_freed_pages_are_used_again(device):
    twin = Twin(device, pages=4, max_length=150)
    for round_ in range(4):
        a, b = twin.allocate(2)
        twin.append({a: 70, b: 60})
        twin.append({a: 10 + round_, b: 1})
        twin.check()
        twin.free([b, a] if round_ % 2 else [a, b])


def test_out_of_pages_changes_nothing(device):
    twin = Twin(device, pages=3)
    a, b = twin.allocate(2)
    twin.append({a: 50, b: 17})
    before, stats = {name: twin.device.to_host(x) for name, x in vars(twin.cache.arrays).items()}, twin.cache.stats
    k, v = map(device.to_device, twin.rows(112))
    with pytest.raises(CacheFull, match="out of pages: 4 pages wanted, 2 of 3 free"):
        twin.cache.append(k, v, [a, b], cu_seqlens=[0, 80, 112])
    assert twin.cache.stats == stats
    for name, x in vars(twin.cache.arrays).items():
        np.testing.assert_array_equal(twin.device.to_host(x), before[name], err_msg=name)
    twin.append({a: 30, b: 1})
    twin.check()


@pytest.mark.gpu
def test_strides_of_a_fused_projection(gpu):
    twin = Twin(GpuDevice(gpu))
    (a,) = twin.allocate()
    k, v = twin.rows(90)
    fused = gpu.zeros(90, 6, 64, dtype=gpu.float16, device="cuda")
    fused[:, 1:3], fused[:, 4:6] = map(twin.device.to_device, (k, v))
    twin.cache.append(fused[:, 1:3], fused[:, 4:6], [a], [0, 90])
    twin.note([a], [0, 90], k, v)
    twin.check()


def test_a_replay_appends_and_one_beyond_the_reserved_pages_does_not(device):
    """What a CUDA graph does: the same launch again and again, while the host looks on."""
    twin = Twin(device, pages=2)
    a, b = twin.allocate(2)
    twin.append({a: 20, b: 28})
    cache = twin.cache
    cache.reserve([a, b], [40, 20])
    k, v = twin.rows(2)
    views = [view_of("x", device.to_device(x), "bshd", "float16", 16) for x in (k, v)]
    work = device.to_device(np.array([[a, 0, 1], [b, 1, 1]], np.int32))
    state = {"mean_given": cache._mean_given, "tickets": cache._tickets}
    for step in range(1, 46):
        kernels.append(cache.arrays, cache.layout, *views, work, 1, **state)
        if step <= 43:  # pages hold 32 tokens: a grows to 63, b as far, with 16 recent ones
            twin.note([a], [0, 1], k[:1], v[:1])
        if step <= 35:
            twin.note([b], [0, 1], k[1:], v[1:])
    cache.advance([a, b], [43, 35])
    twin.check()
    with pytest.raises(ValueError, match="tokens must be what was reserved, got more, of sequence"):
        cache.advance([a])


@pytest.mark.gpu
def test_append_in_a_cuda_graph(gpu):
    twin = Twin(GpuDevice(gpu))
    cache, (a, b) = twin.cache, twin.allocate(2)
    twin.append({a: 20, b: 28})
    cache.reserve([a, b], 200)
    k, v = twin.rows(2)
    inputs = [twin.device.to_device(x) for x in (k, v)]
    stream = gpu.cuda.Stream()
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(gpu.cuda.CUDAGraph(), stream=stream):
        inputs[0].add(1)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="make it before the capture"):
            cache.append(*inputs, [b, a])
        with pytest.raises(RuntimeError, match="cannot change hands while a CUDA graph is captured"):
            cache.reserve([a], 1)
        with pytest.raises(RuntimeError, match="cannot change hands while a CUDA graph is captured"):
            cache.fork(a)
    cache.append(*inputs, [a, b])
    twin.note([a, b], [0, 1, 2], k, v)
    gpu.cuda.synchronize()
    with gpu.cuda.graph(graph, stream=stream):
        cache.append(*inputs, [a, b])
    twin.check()
    for _ in range(100):
        k, v = twin.rows(2)
        for x, new in zip(inputs, (k, v), strict=True):
            x.copy_(twin.device.to_device(new))
        graph.replay()
        twin.note([a, b], [0, 1, 2], k, v)
    cache.advance([a, b], 100)
    twin.check()
    chunks = [x.repeat(150, 1, 1) for x in inputs]
    with gpu.cuda.graph(gpu.cuda.CUDAGraph(), stream=stream):
        inputs[0].add(1)
        with pytest.raises(RuntimeError, match="call reserve first"):
            cache.append(*chunks, [a, b], [0, 150, 300])


class AnyOrder(RuleBasedStateMachine):
    """Any operations in any order, few pages, all read after each."""

    def __init__(self):
        super().__init__()
        self.twin = Twin(EmulatedDevice(), pages=10, max_length=150)

    @rule(count=st.integers(1, 2))
    def allocate(self, count):
        if len(self.twin.sequences) + count <= 4:
            self.twin.allocate(count)

    @precondition(lambda self: self.twin.sequences)
    @rule(data=st.data(), counts=st.lists(st.sampled_from([0, 1, 1, 1, 7, 16, 33, 70]), min_size=1, max_size=4))
    def append(self, data, counts):
        some = st.sampled_from(sorted(self.twin.sequences))
        ids = data.draw(st.lists(some, min_size=1, max_size=len(counts), unique=True))
        chunks = dict(zip(ids, counts, strict=False))
        if any(len(self.twin.sequences[seq]) + count > 150 for seq, count in chunks.items()):
            with pytest.raises(ValueError, match="max_length = 150"):
                self.twin.append(chunks)
        else:
            with contextlib.suppress(CacheFull):
                self.twin.append(chunks)
        self.twin.check()

    @precondition(lambda self: 0 < len(self.twin.sequences) < 4)
    @rule(data=st.data())
    def fork(self, data):
        self.twin.fork(data.draw(st.sampled_from(sorted(self.twin.sequences))))
        self.twin.check()

    @precondition(lambda self: self.twin.sequences)
    @rule(data=st.data())
    def free(self, data):
        self.twin.free([data.draw(st.sampled_from(sorted(self.twin.sequences)))])
        self.twin.check()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=20, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_sizes(device):
    cache = Twin(device).cache
    assert cache.bytes_per_token == 2 * 2 * 64 * 4.5 / 8 == 144
    sizes = {"uint8": 1, "float16": 2, "float32": 4, "int32": 4}
    arrays = [getattr(cache.arrays, name) for name in type(cache.arrays).__dataclass_fields__]
    arrays += [cache._mean_given, cache._tickets]
    assert cache.nbytes == sum(np.prod(x.shape) * sizes[nbfmha.validation.dtype_name(x)] for x in arrays)
    cache.arrays.check(cache.layout)
    assert cache.lengths is cache.arrays.lengths
    assert cache.block_tables is cache.arrays.block_tables
    assert cache.max_length == 700
    (a,) = cache.allocate()
    assert cache.device_ids([a]) is cache.device_ids([a])
    np.testing.assert_array_equal(device.to_host(cache.device_ids([a])), [a])


def test_what_does_not_fit_is_refused():
    machine = Machine("sm_120a")
    twin = Twin(EmulatedDevice())
    cache, (a, b) = twin.cache, twin.allocate(2)
    on = twin.device.to_device
    k = np.ones((2, 2, 64), np.float16)
    with pytest.raises(TypeError, match=r"like must be in GPU memory .* got ndarray in host memory; move it to"):
        nbfmha.PagedKVCache(like=k, pages=1, num_heads_kv=1, head_dim=64)
    with pytest.raises(TypeError, match=r"k must be in GPU memory .* got ndarray in host memory"):
        cache.append(k, k, [a, b])
    with pytest.raises(TypeError, match="v must be where the cache lies"):
        cache.append(on(k), machine.array(k), [a, b])
    with pytest.raises(TypeError, match=r"v\.dtype must be float16, the cache's, got float32; convert it first"):
        cache.append(on(k), on(k.astype(np.float32)), [a, b])
    with pytest.raises(ValueError, match=r"k must be of shape \(tokens, 2, 64\), got \(2, 1, 64\)"):
        cache.append(on(k[:, :1]), on(k), [a, b])
    with pytest.raises(ValueError, match=r"v must be of shape \(2, 2, 64\), as k, got \(1, 2, 64\)"):
        cache.append(on(k), on(k[:1]), [a, b])
    with pytest.raises(ValueError, match="k must be one token for each of 1 sequences, got 2 tokens; pass cu_seqlens"):
        cache.append(on(k), on(k), [a])
    with pytest.raises(TypeError, match="cu_seqlens must be integers in host memory, got EmulatedArray"):
        cache.append(on(k), on(k), [a], on(np.array([0, 2])))
    with pytest.raises(ValueError, match="cu_seqlens must be 2 integers, got int64 of shape"):
        cache.append(on(k), on(k), [a], [0, 1, 2])
    with pytest.raises(ValueError, match=r"cu_seqlens must be ascending from 0 to the 2 tokens of k, got \[0, 3, 2\]"):
        cache.append(on(k), on(k), [a, b], [0, 3, 2])
    with pytest.raises(ValueError, match="seq_ids must be sequences that allocate or fork gave, got 3"):
        cache.append(on(k), on(k), [a, 3])
    with pytest.raises(ValueError, match="tokens must be an integer, or 2 of them, got int64 of shape"):
        cache.reserve([a, b], [1, 2, 3])
    with pytest.raises(ValueError, match="tokens must be >= 0, got -1"):
        cache.reserve([a, b], -1)
    with pytest.raises(ValueError, match=r"tokens must be within max_length = 700, got 0 \+ 701 of sequence 0"):
        cache.reserve([a], 701)
    with pytest.raises(CacheFull, match="out of sequences: 3 asked, 2 of 4 free"):
        cache.allocate(3)
    with pytest.raises(TypeError, match=r"k_mean\.dtype must be float32, got float64"):
        cache.allocate(k_mean=np.zeros((1, 2, 64)))
    with pytest.raises(ValueError, match=r"k_mean must be of shape \(1, 2, 64\), got \(2, 64\)"):
        cache.allocate(k_mean=np.zeros((2, 64), np.float32))
    with pytest.raises(TypeError, match="k_mean must be NumPy, or where the cache lies"):
        cache.allocate(k_mean=machine.array(np.zeros((1, 2, 64), np.float32)))
    assert cache.stats.sequences == 2
    assert cache.lengths_on_host([a, b]).tolist() == [0, 0]


def test_more_ctas_than_a_grid_has_are_refused(monkeypatch):
    twin = Twin(EmulatedDevice())
    (a,) = twin.allocate()
    k, v = map(twin.device.to_device, twin.rows(1))
    monkeypatch.setattr(kernels, "_MAX_CTAS", 1)
    with pytest.raises(ValueError, match="k, v must be small enough for 1 CTAs, got 2; append fewer sequences at once"):
        twin.cache.append(k, v, [a])
