"""The attention reference with every option, against one query and one key at a time, and against torch."""

import math

import numpy as np
import pytest

from nbfmha import reference
from nbfmha.problem import Problem

# sums of at most a few hundred float64 terms of magnitude below 100
F64 = {"rtol": 1e-11, "atol": 1e-12}


def make(heads_q=4, heads_kv=2, seqlen_q=7, seqlen_k=11, head_dim=16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (heads_q, seqlen_q, head_dim), (heads_kv, seqlen_k, head_dim), (heads_kv, seqlen_k, 6)
    return tuple(rng.standard_normal(shape) for shape in shapes)


def loop(q, k, v, *, scale, causal=False, window=(None, None), softcap=None, q_offset=None, sinks=None):
    """No mask and no vector: only the keys that a query sees, each exponential on its own."""
    (heads_q, seqlen_q, _), (heads_kv, seqlen_k, _) = q.shape, k.shape
    left, right = window
    shift = seqlen_k - seqlen_q if q_offset is None else q_offset
    out, lse = np.zeros((heads_q, seqlen_q, v.shape[-1])), np.full((heads_q, seqlen_q), -np.inf)
    for h in range(heads_q):
        kv = h // (heads_q // heads_kv)
        for i in range(seqlen_q):
            terms = []
            for j in range(seqlen_k):
                behind = i + shift - j
                if (
                    (causal and behind < 0)
                    or (left is not None and behind > left)
                    or (right is not None and -behind > right)
                ):
                    continue
                x = scale * math.fsum(q[h, i] * k[kv, j])
                terms.append((math.exp(x if softcap is None else softcap * math.tanh(x / softcap)), v[kv, j]))
            total = math.fsum([weight for weight, _ in terms] + ([] if sinks is None else [math.exp(sinks[h])]))
            if total:
                lse[h, i] = math.log(total)
                out[h, i] = sum((weight * value for weight, value in terms), np.zeros(v.shape[-1])) / total
    return out, lse


OPTIONS = {
    "plain": {},
    "window": {"window": (3, 1)},
    "left window, causal": {"window": (2, None), "causal": True},
    "right bound beyond causal": {"window": (None, 4), "causal": True},
    "softcap": {"softcap": 0.7},
    "chunk": {"q_offset": 2, "causal": True},
    "chunk before the first key": {"q_offset": -3, "causal": True},
    "chunk past the last key": {"q_offset": 40, "window": (3, 3)},
    "everything": {"causal": True, "window": (5, 2), "softcap": 2.0, "q_offset": 1},
}


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(7, 11), (11, 7), (1, 9), (6, 1), (0, 5), (5, 0)])
def test_matches_a_loop(seqlen_q, seqlen_k, options, with_sinks):
    q, k, v = make(6, 2, seqlen_q, seqlen_k)
    sinks = np.linspace(-2, 2, 6) if with_sinks else None
    out, lse = reference.attention(q, k, v, softmax_scale=0.4, sinks=sinks, return_lse=True, **options)
    expected, expected_lse = loop(q, k, v, scale=0.4, sinks=sinks, **options)
    np.testing.assert_allclose(out, expected, **F64)
    np.testing.assert_allclose(lse, expected_lse, **F64)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 1), "softcap": 1.5}], ids=str)
def test_packed_sequences_equal_each_alone(options):
    lengths_q, lengths_k = (3, 0, 1, 6, 4), (5, 4, 1, 2, 0)
    cu_q, cu_k = np.cumsum((0, *lengths_q)), np.cumsum((0, *lengths_k))
    q, k, v = make(4, 2, sum(lengths_q), sum(lengths_k))
    out, lse = reference.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options)
    for s in range(len(lengths_q)):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        expected, expected_lse = loop(q[:, rows], k[:, keys], v[:, keys], scale=0.25, **options)
        np.testing.assert_allclose(out[:, rows], expected, **F64)
        np.testing.assert_allclose(lse[:, rows], expected_lse, **F64)


def test_query_chunks_do_not_show(monkeypatch):
    q, k, v = make(seqlen_q=23, seqlen_k=17)
    options = {"causal": True, "window": (5, None), "sinks": np.zeros(4), "return_lse": True}
    whole = reference.attention(q, k, v, **options)
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 40)
    for got, expected in zip(reference.attention(q, k, v, **options), whole, strict=True):
        np.testing.assert_allclose(got, expected, **F64)


def test_a_sink_is_a_key_whose_value_is_zero():
    q, k, v = make(2, 2)
    sinks = np.array([0.5, -1.0])
    # q[..., 0] = 1 makes the score of an added key softmax_scale * its first channel
    q[..., 0] = 1
    key = np.zeros((2, 1, 16))
    key[:, 0, 0] = sinks / 0.25
    with_key = reference.attention(
        q, np.concatenate([key, k], axis=1), np.concatenate([np.zeros((2, 1, 6)), v], axis=1), return_lse=True
    )
    for got, expected in zip(reference.attention(q, k, v, sinks=sinks, return_lse=True), with_key, strict=True):
        np.testing.assert_allclose(got, expected, **F64)
    none = reference.attention(q, k, v, sinks=np.full(2, -np.inf))
    np.testing.assert_array_equal(none, reference.attention(q, k, v))


def test_a_row_that_sees_nothing_has_the_lse_of_its_sink():
    q, k, v = make(2, 2, seqlen_q=9, seqlen_k=4)
    out, lse = reference.attention(q, k, v, causal=True, sinks=np.array([1.5, -np.inf]), return_lse=True)
    assert not out[:, :5].any()
    np.testing.assert_array_equal(lse[:, :5], [[1.5] * 5, [-np.inf] * 5])


def test_a_sink_is_a_piece_when_pieces_are_merged():
    q, k, v = make()
    sinks = np.array([0.3, -2.0, 4.0, 0.0])
    parts = [reference.attention(q, k[:, keys], v[:, keys], return_lse=True) for keys in (slice(0, 4), slice(4, None))]
    parts.append((np.zeros((4, 7, 6)), np.repeat(sinks[:, None], 7, axis=1)))
    expected = reference.attention(q, k, v, sinks=sinks, return_lse=True)
    for got, want in zip(reference.merge_lse(parts), expected, strict=True):
        np.testing.assert_allclose(got, want, **F64)


def test_a_problem_stands_for_its_options():
    q, k, v = make()
    problem = Problem.of(q, k, v, causal=True, softcap=3.0)
    np.testing.assert_array_equal(
        reference.attention(q, k, v, problem), reference.attention(q, k, v, causal=True, softcap=3.0)
    )
    with pytest.raises(TypeError, match="options must be none beside a problem, got causal; put them into the problem"):
        reference.attention(q, k, v, problem, causal=True)
    with pytest.raises(ValueError, match=r"q must be of shape .*, as the problem says"):
        reference.attention(q[:, :3], k, v, problem)


@pytest.mark.parametrize(
    ("sinks", "error", "text"),
    [
        (None, ValueError, "sinks must be an array, as problem.has_sinks says, got None"),
        ([0.0] * 4, TypeError, "sinks must be a NumPy array, got list"),
        (np.zeros(4, int), TypeError, "sinks.dtype must be float16, .*, got int64"),
        (np.zeros(2), ValueError, r"sinks must be of shape \(num_heads_q,\) = \(4,\), got \(2,\)"),
        (np.full(4, np.inf), ValueError, "sinks must be finite or -inf, got inf"),
        (np.full(4, np.nan), ValueError, "sinks must be finite or -inf, got nan"),
    ],
)
def test_sinks_that_are_refused(sinks, error, text):
    q, k, v = make()
    problem = Problem.of(q, k, v, has_sinks=True)
    with pytest.raises(error, match=text):
        reference.attention(q, k, v, problem, sinks=sinks)
    with pytest.raises(ValueError, match=r"sinks must be None, as problem\.has_sinks says, got an array"):
        reference.attention(q, k, v, Problem.of(q, k, v), sinks=np.zeros(4))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 2)}], ids=str)
def test_agrees_with_torch(torch, options):
    q, k, v = make(6, 2, 8, 8)
    problem = Problem.of(q, k, v, **options)
    tensors = [torch.from_numpy(np.repeat(x, 6 // len(x), axis=0)) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=torch.from_numpy(problem.mask()))
    np.testing.assert_allclose(reference.attention(q, k, v, problem), expected.numpy(), rtol=1e-10, atol=1e-12)
