"""Appends that repeat: the same launches as the general ones, and the same refusals."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from fake_torch import Tensor, install

import nbfmha
from nbfmha import append_plan
from nbfmha.kernels import append as kernels
from nbfmha.page_pool import CacheFull
from nbfmha.tiles import View


@pytest.fixture
def fake(monkeypatch):
    torch, launches = install(monkeypatch)
    cache = nbfmha.PagedKVCache(
        like=Tensor((1,)), pages=20, num_heads_kv=2, head_dim=64, max_sequences=4, max_length=1000, recent_tokens=16
    )
    ids = cache.allocate(3)
    launches.clear()
    return SimpleNamespace(torch=torch, launches=launches, cache=cache, ids=ids)


def rows(count, stride=None, **options):
    return Tensor((count, 2, 64), stride=stride, **options)


def general(fake, k, v, longest):
    """What the general way launches for the table that comes last in what was launched."""
    cache, work = fake.cache, Tensor((3, 3), "torch.int32")
    views = [View(x, (0, *x.stride()[1::-1])) for x in (k, v)]
    state = {"mean_given": cache._mean_given, "tickets": cache._tickets}
    kernels.append(cache.arrays, cache.layout, *views, work, longest, **state)
    return fake.launches.take()


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 0, 64), (5, 70, 129)])
@pytest.mark.parametrize("stride", [None, (384, 64, 1)])
def test_launches_are_the_general_ones(fake, counts, stride):
    total, edges = sum(counts), [0, *np.cumsum(counts).tolist()]
    given = None if total == 3 else edges
    for _ in range(3):
        k, v = rows(total, stride), rows(total)
        fake.cache.append(k, v, fake.ids, given)
        taken = fake.launches.take(kernels.make_append, kernels.make_mean)
        assert len(taken) == 1 + (max(counts) > 64)
        assert taken == general(fake, k, v, max(counts))
        assert {launch.stream for launch in taken} == {100}
    assert fake.launches.prepared == 1 + (max(counts) > 64)
    np.testing.assert_array_equal(fake.cache.lengths_on_host(fake.ids), 3 * np.array(counts))


def test_the_host_counts_as_before(fake):
    """Pages come when they are due, whether an append is like the one before or not."""
    cache, ids = fake.cache, fake.ids
    for step in range(1, 161):
        cache.append(rows(3), rows(3), ids)
        assert cache.lengths_on_host(ids).tolist() == [step] * 3
        assert cache.stats.pages - cache.stats.free_pages == 3 * cache.layout.pages_of(step)
    cache.append(rows(2), rows(2), ids[1:])
    cache.append(rows(3), rows(3), ids[::-1])
    assert cache.lengths_on_host(ids).tolist() == [161, 162, 162]
    cache.append(rows(3), rows(3), ids, [0, 0, 2, 3])
    cache.append(rows(3), rows(3), ids)
    assert cache.lengths_on_host(ids).tolist() == [162, 165, 164]


def test_ids_that_were_freed_are_no_longer_known(fake):
    cache, ids = fake.cache, fake.ids
    for _ in range(2):
        cache.append(rows(3), rows(3), ids)
    cache.free(ids[:1])
    with pytest.raises(ValueError, match="got 0; is it freed"):
        cache.append(rows(3), rows(3), ids)
    assert cache.allocate(1) == ids[:1]
    cache.append(rows(3), rows(3), ids)
    assert cache.lengths_on_host(ids).tolist() == [1, 3, 3]


@pytest.mark.parametrize(
    ("k", "v", "error", "expected"),
    [
        (rows(3), rows(3, dtype="torch.float32"), TypeError, "v.dtype must be float16, the cache's, got float32"),
        (rows(3, device=1), rows(3), TypeError, "k must be where the cache lies"),
        (rows(3, device=-1), rows(3), TypeError, "k must be in GPU memory"),
        (rows(3), rows(3, address=4104), ValueError, "v must be at an address that is a multiple of 16"),
        (rows(3, address=4104), rows(3), ValueError, "k must be at an address that is a multiple of 16"),
        (rows(3), rows(2), ValueError, "v must be of shape (3, 2, 64), as k, got (2, 2, 64)"),
        (rows(2), rows(2), ValueError, "k must be one token for each of 3 sequences, got 2 tokens"),
        (rows(3, (136, 68, 1)), rows(3), ValueError, "k must be an array with strides that are multiples of 8"),
        (rows(3), rows(3, (256, 128, 2)), ValueError, "v must be an array whose last axis is contiguous"),
        (Tensor((3, 1, 64)), rows(3), ValueError, "k must be of shape (tokens, 2, 64), got (3, 1, 64)"),
        (np.zeros((3, 2, 64), np.float16), rows(3), TypeError, "k must be in GPU memory"),
    ],
)
def test_what_is_wrong_is_refused_after_good_calls_too(fake, k, v, error, expected):
    for _ in range(2):
        fake.cache.append(rows(3), rows(3), fake.ids)
    fake.launches.clear()
    for _ in range(2):
        with pytest.raises(error, match=re.escape(expected)):
            fake.cache.append(k, v, fake.ids)
    assert not fake.launches
    assert fake.cache.lengths_on_host(fake.ids).tolist() == [2, 2, 2]


def test_limits_are_those_of_the_pool(fake):
    cache, ids = fake.cache, fake.ids
    held = 6 * 64 + 31  # tokens for which a sequence has 6 of 20 pages and a full ring
    for _ in range(held):
        cache.append(rows(3), rows(3), ids)
    with pytest.raises(CacheFull, match="out of pages: 3 pages wanted, 2 of 20 free"):
        cache.append(rows(3), rows(3), ids)
    assert cache.lengths_on_host(ids).tolist() == [held] * 3
    cache.free(ids[1:])
    for _ in range(held, 1000):
        cache.append(rows(1), rows(1), ids[:1])
    with pytest.raises(ValueError, match=r"tokens must be within max_length = 1000, got 1000 \+ 1 of sequence 0"):
        cache.append(rows(1), rows(1), ids[:1])


def test_a_capture_changes_nothing_on_the_host(fake):
    cache, ids = fake.cache, fake.ids
    cache.append(rows(3), rows(3), ids)
    cache.reserve(ids, 5)
    fake.torch.capturing = True
    fake.launches.clear()
    cache.append(rows(3), rows(3), ids)
    assert len(fake.launches) == 1
    assert cache._pool.lengths[ids].tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="pages of captured appends must be there before"):
        cache.append(rows(180), rows(180), ids, [0, 60, 120, 180])
    fake.torch.capturing = False
    cache.append(rows(3), rows(3), ids)
    assert cache.lengths_on_host(ids).tolist() == [2, 2, 2]


def test_what_is_kept_is_not_too_much(fake, monkeypatch):
    monkeypatch.setattr(append_plan, "SIZE", 3)
    monkeypatch.setattr("nbfmha.cache._KINDS", 3)
    for width in range(128, 128 + 8 * 8, 8):
        fake.cache.append(rows(3, (width, 64, 1)), rows(3), fake.ids)
        assert len(fake.cache._appends._prepared) <= 3
        assert len(fake.cache._known_rows) <= 3
