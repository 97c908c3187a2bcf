"""The NumPy warp model of tiled Q·K^T: shapes, heads, layouts, bad input."""

import itertools

import numpy as np
import pytest

from nbfmha import nvfp4, reference
from nbfmha.testing import assert_close
from nbfmha.validate import problems, warp_model
from nbfmha.validate.implementations import Reference


@pytest.mark.parametrize(
    ("rows", "cols", "head_dim"),
    [*itertools.product((1, 16, 17), (1, 8, 33), (64, 128)), (5, 9, 2), (20, 40, 96), (7, 70, 256), (0, 5, 64), (5, 0, 64)],
)
def test_any_length(rows, cols, head_dim):
    rng = np.random.default_rng(rows * 1000 + cols)
    q, k = (problems.random_tensor(rng, tokens, head_dim) for tokens in (rows, cols))
    scores = warp_model.qk_quantized(q, k)
    assert scores.shape == (rows, cols)
    assert scores.dtype == np.float32
    if scores.size:
        assert_close(scores, problems.exact_scores(q, k), problems.score_budget(q, k, Reference()))


def test_batches_of_grouped_heads():
    rng = np.random.default_rng(0)
    q = nvfp4.quantize(rng.standard_normal((2, 4, 20, 64)).astype(np.float32))
    k = nvfp4.quantize(rng.standard_normal((2, 2, 30, 64)).astype(np.float32))
    scores = warp_model.qk_quantized(q, k)
    values_q, values_k = nvfp4.dequantize(q), nvfp4.dequantize(k)
    for batch, head in np.ndindex(2, 4):
        expected = reference.qk(values_q[batch, head], values_k[batch, head // 2])
        assert_close(scores[batch, head], expected, problems.score_budget(q, k, Reference())[batch, head])


def test_scale_layouts_are_read_where_they_lie():
    rng = np.random.default_rng(0)
    q, k = (nvfp4.quantize(rng.standard_normal((tokens, 96)).astype(np.float32)) for tokens in (130, 40))
    plain = warp_model.qk_quantized(q, k)
    for layout in ("blocked_128x4", "interleaved_64"):
        np.testing.assert_array_equal(warp_model.qk_quantized(nvfp4.relayout(q, layout), nvfp4.relayout(k, layout)), plain)


def quantized(*shape, **options):
    return nvfp4.quantize(np.ones(shape, np.float32), **options)


@pytest.mark.parametrize(
    ("q", "k", "expected"),
    [
        (quantized(8, 64, format="mxfp4"), quantized(8, 64), "q.format must be 'nvfp4', got 'mxfp4'"),
        (quantized(8, 64), quantized(8, 64, axis="tokens"), "k.axis must be 'head_dim', got 'tokens'"),
        (quantized(8, 64), quantized(8, 96), r"k.shape must be \(..., a divisor of 1 heads, tokens, 64\)"),
        (quantized(3, 8, 64), quantized(2, 8, 64), "a divisor of 3 heads"),
        (quantized(2, 3, 8, 64), quantized(3, 3, 8, 64), "k.shape must be"),
        (quantized(8, 64), quantized(1, 8, 64), "k.shape must be"),
        (quantized(8, 64, global_scale=2.0), quantized(8, 64), "global_scale must be given for q and k or for neither"),
    ],
)
def test_bad_input(q, k, expected):
    with pytest.raises(ValueError, match=expected):
        warp_model.qk_quantized(q, k)


def test_row_major_packing_differs_in_a_and_b_only():
    right, wrong = warp_model.Packing.right(), warp_model.Packing.row_major()
    assert wrong.a is not right.a
    assert wrong.b is not right.b
    assert (wrong.c, wrong.sfa, wrong.sfb) == (right.c, right.sfa, right.sfb)
