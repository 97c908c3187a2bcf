"""Decode calls that repeat: the same launches as the first time, and the same refusals."""

import gc
import inspect
import re
import weakref
from types import SimpleNamespace

import pytest
from fake_torch import Tensor, install

import nbfmha
from nbfmha import decode_plan
from nbfmha.decode_scratch import room_of, tickets_of
from nbfmha.dispatch import GATE, Unavailable, gate
from nbfmha.kernels.decode_device import make_decode
from nbfmha.kv_layout import CacheArrays, CacheLayout
from ptx_inline.toolchain import Target

LAYOUT = CacheLayout(2, 64)
SHAPE = (3, 2, 4, 64)


@pytest.fixture
def fake(monkeypatch):
    torch, launches = install(monkeypatch)
    return SimpleNamespace(torch=torch, launches=launches)


def make_cache(layout=LAYOUT, device=0):
    shapes = layout.shapes(9, 5, 4000)
    arrays = CacheArrays(**{name: Tensor(shape, f"torch.{dtype}", device) for name, (shape, dtype) in shapes.items()})
    return SimpleNamespace(layout=layout, arrays=arrays, max_length=4000)


def ids(device=0):
    return Tensor((3,), "torch.int32", device)


CALLS = [
    {},
    {"num_splits": 1},
    {"num_splits": 4},
    {"num_splits": 4, "return_lse": True},
    {"num_splits": 1, "return_lse": True, "window": (40, None)},
    {"sinks": Tensor((4,), "torch.float32")},
    {"softcap": 5.0, "softmax_scale": 0.25, "sinks": Tensor((4,), "torch.float32"), "num_splits": 2},
    {"out": Tensor(SHAPE)},
    {"window": [40, 0]},
]


@pytest.mark.parametrize("options", CALLS, ids=lambda options: ",".join(options) or "plain")
def test_a_repeated_call_launches_what_the_first_one_did(fake, options):
    cache = make_cache()
    results, launched, prepared = [], [], []
    for _ in range(3):
        results.append(nbfmha.decode(Tensor(SHAPE), cache, ids(), **options))
        launched.append(fake.launches.take())
        prepared.append(fake.launches.prepared)
    assert len(launched[0]) == 1
    assert launched[1] == launched[0]
    assert launched[2] == launched[0]
    assert prepared == [len(launched[0])] * 3, "one plan"
    for result in results:
        out = result[0] if options.get("return_lse") else result
        assert (out.shape, out.dtype, out.is_contiguous()) == (SHAPE, "torch.float16", True)
        assert out is options.get("out", out)
        if options.get("return_lse"):
            assert (result[1].shape, result[1].dtype) == ((3, 4, 2), "torch.float32")


def test_addresses_are_those_of_each_call(fake):
    cache, kernel = make_cache(), make_decode("dequant", 64, "float16", 1, False, "tile", 4, 1)
    names = tuple(inspect.signature(kernel).parameters)
    for _ in range(2):
        q, slots, out, sinks = Tensor(SHAPE), ids(), Tensor(SHAPE), Tensor((4,), "torch.float32")
        nbfmha.decode(q, cache, slots, out=out, sinks=sinks, num_splits=3)
        (values,) = (launch.values for launch in fake.launches)
        fake.launches.clear()
        given = dict(zip(names, values, strict=True))
        assert abs(given["part_lse"] - given["part"]) >= 4 * 3 * 24 * 64
        assert (given["out"], given["lse"], given["q"]) == (out.data_ptr(), 0, q.data_ptr())
        assert (given["seq_ids"], given["sinks"]) == (slots.data_ptr(), sinks.data_ptr())
        assert given["k_codes"] == cache.arrays.k_codes.data_ptr()


def test_the_stream_is_the_current_one(fake):
    cache = make_cache()
    for fake.torch.stream in (100, 200, 300):
        nbfmha.decode(Tensor(SHAPE), cache, ids())
        assert {launch.stream for launch in fake.launches} == {fake.torch.stream}
        fake.launches.clear()


def test_calls_that_differ_have_plans_of_their_own(fake):
    cache, other = make_cache(), make_cache()
    plans = set()
    for options, shape, own in (
        ({}, SHAPE, cache),
        ({}, SHAPE, other),
        ({}, (3, 1, 4, 64), cache),
        ({"num_splits": 2}, SHAPE, cache),
        ({"return_lse": True}, SHAPE, cache),
        ({"softmax_scale": 0.5}, SHAPE, cache),
        ({"softcap": 3.0}, SHAPE, cache),
        ({"window": (3, 0)}, SHAPE, cache),
        ({"impl": "dequant"}, SHAPE, cache),
        ({"sinks": Tensor((4,), "torch.float32")}, SHAPE, cache),
    ):
        nbfmha.decode(Tensor(shape), own, ids(), **options)
        values = {"impl": "auto", "softmax_scale": None, "window": None, "softcap": None, "num_splits": None, **options}
        flags = values.pop("return_lse", False), values.pop("sinks", None) is not None
        key = decode_plan.key_of(Tensor(shape), own, *values.values(), *flags)
        plan = decode_plan.find(own, key)
        assert plan is not None
        assert plan is decode_plan.find(own, key)
        plans.add(plan)
    assert len(plans) == 10


def test_max_length_and_layout_are_looked_at(fake):
    cache = make_cache()
    nbfmha.decode(Tensor(SHAPE), cache, ids())
    cache.max_length = 100
    nbfmha.decode(Tensor(SHAPE), cache, ids())
    assert fake.launches[0].grid > fake.launches[1].grid, "CTAs: fewer splits"
    cache.layout = CacheLayout(2, 64, recent_tokens=64)
    fake.launches.clear()
    nbfmha.decode(Tensor(SHAPE), cache, ids())
    assert 64 in fake.launches[0].values


WRONG = [
    (lambda: {"q": Tensor(SHAPE, "torch.float32")}, TypeError, "q.dtype must be that of the cache (float16), got float32"),
    (lambda: {"q": Tensor((3, 2, 3, 64))}, ValueError, "num_heads_q must be a multiple of the cache's num_heads_kv (2)"),
    (lambda: {"q": Tensor(SHAPE, device=-1)}, ValueError, "cache must be where q is (torch, in host memory)"),
    (lambda: {"q": Tensor(SHAPE, device=1)}, ValueError, "cache must be where q is (torch, on GPU 1), got torch, on GPU 0"),
    (lambda: {"q": Tensor(SHAPE, stride=(1024, 512, 128, 2))}, ValueError, "q must be contiguous"),
    (lambda: {"q": Tensor(SHAPE, address=4104)}, ValueError, "q must be at an address that is a multiple of 16"),
    (lambda: {"q": Tensor(SHAPE, requires_grad=True)}, ValueError, "q must be without requires_grad"),
    (lambda: {"seq_ids": None}, TypeError, "seq_ids and lengths must be slots and None with a cache"),
    (lambda: {"lengths": ids()}, TypeError, "seq_ids and lengths must be slots and None with a cache"),
    (lambda: {"seq_ids": Tensor((3,), "torch.int64")}, TypeError, "seq_ids.dtype must be int32, got int64"),
    (lambda: {"seq_ids": Tensor((4,), "torch.int32")}, ValueError, "seq_ids must be of shape (batch,) = (3,), got (4,)"),
    (lambda: {"seq_ids": ids(1)}, ValueError, "seq_ids must be where q is (torch, on GPU 0), got torch, on GPU 1"),
    (lambda: {"seq_ids": ids(-1)}, ValueError, "seq_ids must be where q is (torch, on GPU 0), got torch, in host memory"),
    (lambda: {"seq_ids": Tensor((3,), "torch.int32", stride=(2,))}, ValueError, "seq_ids must be contiguous"),
    (lambda: {"seq_ids": [0, 1, 7]}, ValueError, "seq_ids must be in [0, 4], got 7"),
    (lambda: {"sinks": Tensor((3,), "torch.float32")}, ValueError, "sinks must be of shape (num_heads_q,) = (4,)"),
    (lambda: {"sinks": Tensor((4,), "torch.float16")}, TypeError, "sinks.dtype must be float32, got float16"),
    (lambda: {"sinks": Tensor((4,), "torch.float32", 1)}, ValueError, "sinks must be where q is"),
    (lambda: {"sinks": Tensor((4,), "torch.float32", requires_grad=True)}, ValueError, "sinks must be without requires"),
    (lambda: {"out": Tensor((3, 2, 2, 64))}, ValueError, "out must be of shape (3, 2, 4, 64), as q is"),
    (lambda: {"out": Tensor(SHAPE, "torch.bfloat16")}, TypeError, "out.dtype must be that of the cache"),
    (lambda: {"out": Tensor(SHAPE, device=1)}, ValueError, "out must be where q is"),
    (lambda: {"out": Tensor(SHAPE, address=4104)}, ValueError, "out must be at an address that is a multiple of 16"),
    (lambda: {"q": Tensor(SHAPE, address=4096), "out": Tensor(SHAPE, address=4112)}, ValueError, "memory of its own"),
    (lambda: {"num_splits": True}, ValueError, "num_splits must be an integer in [1, 65535] or None, got True"),
    (lambda: {"softcap": True}, TypeError, "softcap must be a number or None, got True"),
    (lambda: {"window": {}}, TypeError, "window must be (left, right) or None, got {}"),
    (lambda: {"impl": "fast"}, ValueError, "impl must be one of"),
    (lambda: {"impl": ["auto"]}, ValueError, "impl must be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "expected"), WRONG, ids=[text for *_, text in WRONG])
def test_what_is_wrong_is_refused_after_good_calls_too(fake, wrong, error, expected):
    cache = make_cache()
    good = {"q": Tensor(SHAPE), "seq_ids": ids(), "sinks": Tensor((4,), "torch.float32"), "out": Tensor(SHAPE)}
    for options in ({}, {"num_splits": 1}, {"softcap": 1.0}, {"softcap": 1}):
        for _ in range(2):
            nbfmha.decode(cache=cache, **good, **options)
    fake.launches.clear()
    with pytest.raises(error, match=re.escape(expected)):
        nbfmha.decode(cache=cache, **{**good, **wrong()})
    assert not fake.launches


def test_gradients_are_refused_where_they_are_recorded_alone(fake):
    cache, q = make_cache(), Tensor(SHAPE, requires_grad=True)
    fake.torch.grad = False
    for _ in range(2):
        nbfmha.decode(q, cache, ids())
    assert fake.launches.prepared == 1
    fake.torch.grad = True
    with pytest.raises(ValueError, match="q must be without requires_grad"):
        nbfmha.decode(q, cache, ids())


def test_ids_of_the_host_are_copied_each_time(fake):
    cache = make_cache()
    for _ in range(2):
        nbfmha.decode(Tensor(SHAPE), cache, ids())
        nbfmha.decode(Tensor(SHAPE), cache, [0, 1, 2])
    taken = fake.launches.take()
    assert len(taken) == 4
    assert {launch.kernel for launch in taken} == {taken[0].kernel}


@pytest.mark.parametrize("scratch_of", [tickets_of, room_of])
def test_scratch_serves_every_call_on_a_cache(fake, scratch_of):
    """A graph may have its address for as long as the cache lives."""
    cache = make_cache()
    first = scratch_of(cache.arrays, Tensor(SHAPE), 30)
    assert first.shape == (1024,)
    assert scratch_of(cache.arrays, Tensor(SHAPE), 1024) is first
    more = scratch_of(cache.arrays, Tensor(SHAPE), 1025)
    assert more.shape == (1025,)
    assert scratch_of(cache.arrays, Tensor(SHAPE), 30) is more
    assert scratch_of(make_cache().arrays, Tensor(SHAPE), 30) is not more
    kept = weakref.ref(first)
    del first
    gc.collect()
    assert kept() is not None


def test_calls_that_repeat_have_their_splits_results_in_one_place(fake):
    cache, kernel = make_cache(), make_decode("dequant", 64, "float16", 1, False, "tile", 4, 1)
    names = tuple(inspect.signature(kernel).parameters)
    for _ in range(3):
        nbfmha.decode(Tensor(SHAPE), cache, ids(), num_splits=3)
    values = [dict(zip(names, launch.values, strict=True)) for launch in fake.launches]
    room = room_of(cache.arrays, Tensor(SHAPE), 3 * 24 * 65)
    assert [own["part"] for own in values[1:]] == [room.data_ptr()] * 2
    assert [own["part_lse"] for own in values[1:]] == [room.data_ptr() + 4 * 3 * 24 * 64] * 2
    assert [own["tickets"] for own in values] == [tickets_of(cache.arrays, Tensor(SHAPE), 6).data_ptr()] * 3
    nbfmha.decode(Tensor(SHAPE), cache, ids(), num_splits=1)
    nbfmha.decode(Tensor(SHAPE), cache, ids(), num_splits=1)
    assert dict(zip(names, fake.launches[-1].values, strict=True))["part"] == 0


def test_tickets_of_a_capture_are_the_graphs_own(fake):
    cache = make_cache()
    fake.torch.capturing = True
    captured = tickets_of(cache.arrays, Tensor(SHAPE), 30)
    nbfmha.decode(Tensor(SHAPE), cache, ids(), num_splits=3)
    assert fake.launches.prepared == 0, "no plan has them"
    fake.torch.capturing = False
    assert tickets_of(cache.arrays, Tensor(SHAPE), 30) is not captured
    nbfmha.decode(Tensor(SHAPE), cache, ids(), num_splits=3)
    assert fake.launches.prepared == 1


def test_the_gate_is_respected(fake, monkeypatch):
    monkeypatch.setattr("nbfmha.call.device_target", lambda ordinal: Target.parse("sm_120a"))
    cache = make_cache()
    try:
        for value, name in (("1", "blockscale"), ("0", "dequant"), ("1", "blockscale")):
            monkeypatch.setenv(GATE, value)
            gate.cache_clear()
            for _ in range(2):
                nbfmha.decode(Tensor(SHAPE), cache, ids())
                assert fake.launches[0].kernel.constants["implementation"] == name
                fake.launches.clear()
        nbfmha.decode(Tensor(SHAPE), cache, ids(), impl="blockscale")
        monkeypatch.setenv(GATE, "0")
        gate.cache_clear()
        with pytest.raises(Unavailable, match=f"switched off by {GATE}=0"):
            nbfmha.decode(Tensor(SHAPE), cache, ids(), impl="blockscale")
    finally:
        monkeypatch.undo()
        gate.cache_clear()


def test_plans_go_with_the_arrays_and_are_not_too_many(fake, monkeypatch):
    monkeypatch.setattr(decode_plan, "SIZE", 3)
    cache = make_cache()
    for scale in range(1, 8):
        nbfmha.decode(Tensor(SHAPE), cache, ids(), softmax_scale=scale)
        assert len(decode_plan._plans[cache.arrays]) <= 3
    arrays = weakref.ref(cache.arrays)
    fake.launches.clear()
    del cache
    gc.collect()
    assert arrays() is None, "a plan keeps the memory of a cache that nobody has"


def test_without_sequences_nothing_is_launched(fake):
    for _ in range(2):
        out = nbfmha.decode(Tensor((0, 1, 4, 64)), make_cache(), Tensor((0,), "torch.int32"))
        assert out.shape == (0, 1, 4, 64)
    assert not fake.launches
