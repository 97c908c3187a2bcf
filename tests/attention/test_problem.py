"""Problem: what a row sees, against the definition key by key; every refusal by its words."""

from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbfmha import nvfp4
from nbfmha.problem import Problem

PLAIN = Problem(2, 6, 2, 5, 9, 64)
PACKED = Problem(1, 2, 1, 5, 9, 64, cu_seqlens_q=(0, 2, 5), cu_seqlens_k=(0, 7, 9))


def seen(problem, i, j):
    """Whether query row i sees key row j, from the definition."""
    row, key = i, j
    position_of_row = problem.q_offset
    if problem.is_packed:
        s = max(n for n, edge in enumerate(problem.cu_seqlens_q[:-1]) if edge <= i < problem.cu_seqlens_q[n + 1])
        q0, q1, k0, k1 = *problem.cu_seqlens_q[s : s + 2], *problem.cu_seqlens_k[s : s + 2]
        if not k0 <= j < k1:
            return False
        row, key, position_of_row = i - q0, j - k0, (k1 - k0) - (q1 - q0)
    position = row + position_of_row
    left, right = problem.window or (None, None)
    return (
        (left is None or key >= position - left)
        and (right is None or key <= position + right)
        and (not problem.causal or key <= position)
    )


def assert_mask_is_the_definition(problem):
    expected = np.array([[seen(problem, i, j) for j in range(problem.seqlen_k)] for i in range(problem.seqlen_q)], bool)
    expected = expected.reshape(problem.seqlen_q, problem.seqlen_k)
    mask = problem.mask()
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)
    first, stop = problem.key_ranges()
    assert first.shape == stop.shape == (problem.seqlen_q,)
    assert (first >= 0).all()
    assert (first <= stop).all()
    assert (stop <= problem.seqlen_k).all()
    np.testing.assert_array_equal(stop - first, expected.sum(axis=1))


sides = st.none() | st.integers(0, 12)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 9), st.integers(0, 9), st.booleans(), st.tuples(sides, sides), st.none() | st.integers(-12, 12))
def test_mask_is_the_definition(seqlen_q, seqlen_k, causal, window, q_offset):
    assert_mask_is_the_definition(Problem(1, 1, 1, seqlen_q, seqlen_k, 64, causal=causal, window=window, q_offset=q_offset))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4), st.booleans(), sides, sides)
def test_mask_of_packed_sequences_is_the_definition(lengths, causal, left, right):
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(side)]) for side in zip(*lengths, strict=True))
    problem = Problem(
        1, 1, 1, int(cu_q[-1]), int(cu_k[-1]), 64, causal=causal, window=(left, right), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
    )
    assert_mask_is_the_definition(problem)
    assert [(s.queries.stop - s.queries.start, s.keys.stop - s.keys.start) for s in problem.sequences()] == lengths


def test_causal_aligns_bottom_right():
    np.testing.assert_array_equal(Problem(1, 1, 1, 2, 4, 64, causal=True).mask(), [[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(Problem(1, 1, 1, 3, 1, 64, causal=True).mask(), [[0], [0], [1]])


def test_a_chunk_of_a_prefill_is_rows_of_the_whole():
    whole = Problem(1, 1, 1, 12, 12, 64, causal=True, window=(4, None))
    chunk = replace(whole, seqlen_q=5, q_offset=3)
    np.testing.assert_array_equal(chunk.mask(), whole.mask()[3:8])


def test_defaults_and_derived_values():
    assert PLAIN.softmax_scale == 0.125
    assert PLAIN.q_offset == 4
    assert PLAIN.qhead_per_kvhead == 3
    assert PLAIN.bounds == (None, None)
    assert replace(PLAIN, causal=True).bounds == (None, 0)
    assert replace(PLAIN, causal=True, window=[3, 7]).bounds == (3, 0)
    assert replace(PLAIN, window=(None, None)) == PLAIN
    assert list(PLAIN.sequences()) == [(slice(0, 5), slice(0, 9), 4)]
    assert PACKED.q_offset is None
    assert list(PACKED.sequences()) == [(slice(0, 2), slice(0, 7), 5), (slice(2, 5), slice(7, 9), -1)]


def test_equal_problems_are_one_key():
    other = replace(
        PACKED, cu_seqlens_q=np.array([0, 2, 5], np.int32), cu_seqlens_k=[0, 7, 9], batch=np.int64(1), causal=np.False_
    )
    assert other == PACKED
    assert {PACKED: "found"}[other] == "found"
    with pytest.raises(FrozenInstanceError):
        PLAIN.causal = True


def test_of_reads_shapes_of_any_array():
    q, k, v = (np.zeros(shape, np.float16) for shape in ((2, 3, 6, 5, 64), (2, 3, 2, 9, 64), (2, 3, 2, 9, 32)))
    assert Problem.of(q, k, v, causal=True) == Problem(6, 6, 2, 5, 9, 64, causal=True)
    foreign = SimpleNamespace(shape=(6, 5, 64), dtype="torch.bfloat16")  # as a torch tensor prints its dtype
    keys = SimpleNamespace(shape=(2, 9, 64))
    assert Problem.of(foreign, keys, keys).dtype == "bfloat16"
    assert Problem.of(nvfp4.quantize(q), nvfp4.quantize(k), v) == Problem(6, 6, 2, 5, 9, 64, dtype="float32")
    PLAIN.check_arrays(np.zeros((2, 6, 5, 64)), np.zeros((2, 2, 9, 64)), np.zeros((2, 2, 9, 32)))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"batch": -1}, ValueError, "batch must be an integer >= 0, got -1"),
        ({"seqlen_q": 2.5}, TypeError, "seqlen_q must be an integer >= 0, got 2.5"),
        ({"seqlen_k": True}, TypeError, "seqlen_k must be an integer >= 0, got True"),
        ({"num_heads_q": 0}, ValueError, "num_heads_q must be an integer >= 1, got 0"),
        ({"num_heads_q": 5}, ValueError, r"num_heads_q must be a multiple of num_heads_kv \(2\), got 5"),
        ({"head_dim": 63}, ValueError, "head_dim must be even and > 0, got 63; pad the last axis"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of 'float16', .*, got 'int8'; convert it first"),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
        ({"has_sinks": None}, TypeError, "has_sinks must be True or False, got None"),
        ({"window": 128}, TypeError, r"window must be \(left, right\) or None, got 128"),
        ({"window": (1, 2, 3)}, TypeError, r"window must be \(left, right\) or None, got \(1, 2, 3\)"),
        ({"window": (-1, 0)}, ValueError, r"each >= 0 or None, got \(-1, 0\); None stands for no bound"),
        ({"window": (1.0, 0)}, TypeError, "window must be an integer, got 1.0"),
        ({"softcap": 0}, ValueError, "softcap must be > 0, got 0.0; None for no cap"),
        ({"softcap": np.inf}, ValueError, "softcap must be finite, got inf"),
        ({"softcap": "30"}, TypeError, "softcap must be a number or None, got '30'"),
        ({"softmax_scale": np.nan}, ValueError, "softmax_scale must be finite, got nan"),
        ({"q_offset": 0.5}, TypeError, "q_offset must be an integer, got 0.5"),
        ({"cu_seqlens_q": (0, 5)}, ValueError, "cu_seqlens_k must be given when the other one is, .* both or neither"),
        ({"cu_seqlens_q": (0, 5), "cu_seqlens_k": (0, 9)}, ValueError, "batch must be 1 with cu_seqlens_q, got 2"),
    ],
)
def test_refusals(change, error, text):
    with pytest.raises(error, match=text):
        replace(PLAIN, **change)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"cu_seqlens_q": (0, 2)}, ValueError, r"cu_seqlens_q must be from 0 to 5, .*, got \(0, 2\)"),
        ({"cu_seqlens_q": (0, 4, 2, 5)}, ValueError, "cu_seqlens_q must be from 0 to 5, .* without a step back"),
        ({"cu_seqlens_k": (1, 9)}, ValueError, r"cu_seqlens_k must be from 0 to 9, .*, got \(1, 9\)"),
        (
            {"cu_seqlens_k": (0, 9)},
            ValueError,
            "cu_seqlens_q and cu_seqlens_k must be of one length, got 3 and 2 boundaries",
        ),
        ({"cu_seqlens_k": 9}, TypeError, "cu_seqlens_k must be a sequence of integers, got 9"),
        ({"cu_seqlens_k": (0, 6.5, 9)}, TypeError, "cu_seqlens_k must be a sequence of integers"),
        ({"q_offset": 0}, ValueError, "q_offset must be None with cu_seqlens_q, got 0; the last query of each"),
    ],
)
def test_packed_refusals(change, error, text):
    with pytest.raises(error, match=text):
        replace(PACKED, **change)


def test_arrays_that_do_not_fit():
    q, k = np.zeros((2, 6, 5, 64)), np.zeros((2, 2, 9, 64))
    with pytest.raises(TypeError, match="k must be an array or a QuantizedTensor, got list"):
        Problem.of(q, [1], k)
    with pytest.raises(
        ValueError, match=r"q must be of shape .* = \(2, 6, 5, 64\), as the problem says, got \(2, 6, 4, 64\)"
    ):
        PLAIN.check_arrays(q[:, :, :4], k, k)
    with pytest.raises(ValueError, match=r"k must be of shape .* = \(2, 2, 9, 64\), as the problem says"):
        PLAIN.check_arrays(q, k[:1], k)
    with pytest.raises(ValueError, match=r"v must be of shape \(2, 2, 9\) \+ \(head_dim,\), as k is"):
        PLAIN.check_arrays(q, k, k[:, :, :8])
