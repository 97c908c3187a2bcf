"""The attention reference against closed forms and an element-by-element loop."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from nbfmha import nvfp4, reference
from nbfmha.sample import load_sample

# every sum here has at most a few thousand float64 terms of magnitude below 100: 1e-16 * terms * magnitude at the worst
F64 = {"rtol": 1e-11, "atol": 1e-12}


def make(batch=(), heads_q=4, heads_kv=2, seqlen_q=7, seqlen_k=11, head_dim=16, v_dim=None, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((*batch, heads_q, seqlen_q, head_dim))
    k = rng.standard_normal((*batch, heads_kv, seqlen_k, head_dim))
    return q, k, rng.standard_normal((*batch, heads_kv, seqlen_k, v_dim or head_dim))


def loop_attention(q, k, v, causal, scale):
    """One query at a time, one key at a time, keys that are not seen left out."""
    (heads_q, seqlen_q, _), (heads_kv, seqlen_k, _) = q.shape, k.shape
    out, lse = np.zeros((heads_q, seqlen_q, v.shape[-1])), np.full((heads_q, seqlen_q), -np.inf)
    for h in range(heads_q):
        kv = h * heads_kv // heads_q
        for i in range(seqlen_q):
            seen = [j for j in range(seqlen_k) if not causal or seqlen_q - 1 - i <= seqlen_k - 1 - j]
            weights = [math.exp(scale * math.fsum(q[h, i] * k[kv, j])) for j in seen]
            if seen:
                lse[h, i] = math.log(math.fsum(weights))
                out[h, i] = sum(w * v[kv, j] for w, j in zip(weights, seen, strict=True)) / math.fsum(weights)
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads_q", "heads_kv"), [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (1, 9), (7, 11), (8, 8), (11, 7)])
def test_matches_a_loop(causal, heads_q, heads_kv, seqlen_q, seqlen_k):
    q, k, v = make((), heads_q, heads_kv, seqlen_q, seqlen_k, v_dim=6)
    for scale in (None, 0.3):
        out, lse = reference.attention(q, k, v, causal=causal, softmax_scale=scale, return_lse=True)
        expected, expected_lse = loop_attention(q, k, v, causal, 0.25 if scale is None else scale)
        np.testing.assert_allclose(out, expected, **F64)
        np.testing.assert_allclose(lse, expected_lse, **F64)


def test_uniform_scores_have_lse_log_of_the_length():
    q, k, v = make(seqlen_k=37)
    out, lse = reference.attention(0 * q, k, v, return_lse=True)
    np.testing.assert_allclose(lse, math.log(37), **F64)
    mean = np.repeat(v.mean(axis=-2, keepdims=True), 2, axis=0)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), **F64)
    _, lse = reference.attention(0 * q, k, v, causal=True, return_lse=True)
    np.testing.assert_allclose(lse, np.broadcast_to(np.log(np.arange(31, 38)), lse.shape), **F64)


@pytest.mark.parametrize("causal", [False, True])
def test_values_of_one_give_one(causal):
    q, k, v = make((2,), seqlen_q=9, seqlen_k=30)
    np.testing.assert_allclose(reference.attention(5 * q, k, np.ones_like(v), causal=causal), 1, **F64)


def test_grouped_heads_read_their_own_keys():
    """GQA equals repeating each key/value head; one-hot values show which head was read."""
    q, k, v = make((2,), heads_q=6, heads_kv=2)
    repeated = reference.attention(q, np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1))
    np.testing.assert_allclose(reference.attention(q, k, v), repeated, **F64)
    head_number = np.broadcast_to(np.arange(2.0)[:, None, None], v.shape)
    out = reference.attention(q, k, head_number)
    np.testing.assert_allclose(out[..., 0], np.broadcast_to([[[0]] * 3 + [[1]] * 3], out.shape[:-1]), **F64)


def test_fully_masked_rows_are_zero_with_lse_minus_infinity():
    q, k, v = make(seqlen_q=9, seqlen_k=4)
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert not out[:, :5].any()
    assert np.isneginf(lse[:, :5]).all()
    assert np.isfinite(lse[:, 5:]).all()
    out, lse = reference.attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_large_scores_do_not_overflow():
    q, k, v = make()
    out, lse = reference.attention(1e4 * q, k, v, return_lse=True)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    winner = np.argmax(q[0] @ k[0].T, axis=-1)
    np.testing.assert_allclose(out[0], v[0][winner], **F64)


def test_query_chunks_do_not_show(monkeypatch):
    q, k, v = make((2,), seqlen_q=23, seqlen_k=17)
    whole = reference.attention(q, k, v, causal=True, return_lse=True)
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 40)
    for got, expected in zip(reference.attention(q, k, v, causal=True, return_lse=True), whole, strict=True):
        np.testing.assert_allclose(got, expected, **F64)


@pytest.mark.parametrize("pieces", [[0, 17, 37], [0, 1, 2, 36, 37], [0, 0, 37], [0, 37]])
def test_merging_pieces_of_the_keys_equals_one_piece(pieces):
    q, k, v = make((2,), seqlen_k=37)
    parts = [
        reference.attention(3 * q, k[..., a:b, :], v[..., a:b, :], return_lse=True) for a, b in itertools.pairwise(pieces)
    ]
    expected = reference.attention(3 * q, k, v, return_lse=True)
    for got, want in zip(reference.merge_lse(iter(parts)), expected, strict=True):
        np.testing.assert_allclose(got, want, **F64)


def test_merge_gives_no_weight_to_what_saw_no_key():
    out, lse = np.ones((2, 4)), np.zeros(2)
    poisoned = (np.full((2, 4), np.nan), np.full(2, -np.inf))
    merged, merged_lse = reference.merge_lse([poisoned, (out, lse), poisoned])
    np.testing.assert_array_equal(merged, out)
    np.testing.assert_array_equal(merged_lse, lse)
    merged, merged_lse = reference.merge_lse([poisoned, poisoned])
    assert not merged.any()
    assert np.isneginf(merged_lse).all()


def test_merge_errors():
    with pytest.raises(ValueError, match=r"parts must be at least one \(out, lse\), got none"):
        reference.merge_lse([])
    with pytest.raises(ValueError, match=r"parts must be \(out, lse\) of shapes \(2, 4\), \(2,\), got \(2, 4\), \(3,\)"):
        reference.merge_lse([(np.ones((2, 4)), np.zeros(2)), (np.ones((2, 4)), np.zeros(3))])


def test_scores():
    q, k, _ = make(heads_q=2)
    np.testing.assert_allclose(reference.qk(q, k), np.einsum("hid,hjd->hij", q, k), **F64)
    np.testing.assert_allclose(reference.qk(q, k[0]), np.einsum("hid,jd->hij", q, k[0]), **F64)
    assert reference.qk(q[0].astype(np.float16), k[0].astype(ml_dtypes.bfloat16)).dtype == np.float64


def test_quantised_inputs_stand_for_their_dequantised_values():
    sample = load_sample()
    q, k, v = (x[:, :65] for x in sample)
    qt_q = nvfp4.quantize(q, scale="four_over_six", scale_layout="interleaved_64")
    qt_k = nvfp4.quantize(k, format="mxfp4")
    qt_v = nvfp4.quantize(v, axis="tokens", global_scale="amax")
    back_q, back_k, back_v = (nvfp4.dequantize(x) for x in (qt_q, qt_k, qt_v))
    scores = reference.qk_quantized(nvfp4.quantize(q[0]), nvfp4.quantize(k[0]))
    np.testing.assert_array_equal(
        scores, reference.qk(nvfp4.dequantize(nvfp4.quantize(q[0])), nvfp4.dequantize(nvfp4.quantize(k[0])))
    )
    np.testing.assert_array_equal(
        reference.attention(qt_q, qt_k, qt_v, causal=True), reference.attention(back_q, back_k, back_v, causal=True)
    )
    with pytest.raises(TypeError, match="qt_k must be a QuantizedTensor, got ndarray; use qk for arrays"):
        reference.qk_quantized(qt_q, k)


def test_non_finite_input_propagates_without_warnings():
    q, k, v = make()
    q[0, 0, 0], q[1, 1, 1] = np.nan, np.inf
    out = reference.attention(q, k, v)
    assert np.isnan(out[0, 0]).all()
    assert np.isfinite(out[2:]).all()
    assert np.isnan(reference.qk(q[0], k[0])[0]).all()


def test_input_is_not_changed():
    q, k, v = make()
    copies = [x.copy() for x in (q, k, v)]
    for x in (q, k, v):
        x.setflags(write=False)
    reference.attention(q, k, v, causal=True)
    for x, copy in zip((q, k, v), copies, strict=True):
        np.testing.assert_array_equal(x, copy)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": np.zeros((4, 7, 8))}, ValueError, r"head_dim must be that of q \(8\) in k, got 16"),
        ({"q": np.zeros((7, 16))}, ValueError, r"q must be an array \(\.\.\., num_heads, tokens, head_dim\) of rank >= 3"),
        ({"q": np.zeros((3, 7, 16))}, ValueError, r"num_heads_q must be a multiple of num_heads_kv \(2\), got 3"),
        ({"q": np.zeros((5, 4, 7, 16))}, ValueError, r"k must be of the batch shape of q, \(5,\), got \(\)"),
        ({"v": np.zeros((2, 10, 16))}, ValueError, r"v must be of shape \(2, 11\) \+ \(head_dim,\), as k is"),
        ({"k": np.zeros((2, 11, 15))}, ValueError, "head_dim must be even and > 0, got 15"),
        ({"k": np.zeros((0, 11, 16)), "v": np.zeros((0, 11, 16))}, ValueError, "num_heads_kv must be an integer >= 1"),
        ({"k": np.zeros((2, 11, 16), int)}, TypeError, r"k\.dtype must be float16, .*, got int64; convert it first"),
        ({"v": [1.0]}, TypeError, "v must be a NumPy array, got list"),
        ({"softmax_scale": np.inf}, ValueError, "softmax_scale must be finite, got inf"),
    ],
)
def test_attention_errors(change, error, text):
    q, k, v = make()
    arguments = {"q": q, "k": k, "v": v} | change
    with pytest.raises(error, match=text):
        reference.attention(**arguments)
