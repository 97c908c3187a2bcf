"""The public function: options, layouts and kinds of array against the references, and what it refuses."""

import ml_dtypes
import numpy as np
import pytest

import nbfmha
from nbfmha import reference
from nbfmha.emulated import Machine
from nbfmha.problem import Problem
from nbfmha.recipe import PRESETS, Recipe
from nbfmha.recipe_model import recipe_attention

SIXTEEN_BITS = Recipe(qk="f16", v_format="f16")
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SINKS = np.array([-1.0, 0.0, 2.0, 30.0])
EDGES = {"cu_seqlens_q": (0, 3, 3, 70), "cu_seqlens_k": (0, 60, 81, 150)}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.3},
    "window": {"window": [20, 5]},
    "left window": {"window": (7, None), "causal": True},
    "softcap": {"softcap": 2.0, "causal": True},
    "q_offset": {"q_offset": 30, "causal": True},
    "nothing seen": {"q_offset": -40, "causal": True},
    "sinks": {"sinks": SINKS, "causal": True},
    "packed": {**EDGES, "causal": True},
    "all": {**EDGES, "causal": True, "window": (30, 0), "softcap": 5.0, "softmax_scale": 0.2, "sinks": SINKS},
}


def make(batch=(), heads=(4, 2), lengths=(70, 150), head_dim=32, dtype=np.float16, seed=0):
    rng = np.random.default_rng(seed)
    (heads_q, heads_kv), (seqlen_q, seqlen_k) = heads, lengths
    q = rng.standard_normal((*batch, heads_q, seqlen_q, head_dim))
    k = rng.standard_normal((*batch, heads_kv, seqlen_k, head_dim)) + rng.standard_normal(head_dim)
    v = rng.standard_normal((*batch, heads_kv, seqlen_k, head_dim)) + 0.5
    return [x.astype(dtype) for x in (q, k, v)]


def in_layout(layout, *arrays):
    return [np.ascontiguousarray(x.swapaxes(-2, -3)) if layout == "bshd" else x for x in arrays]


def relative_l2(x, expected):
    return np.linalg.norm(np.asarray(x, float) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_mean_what_the_reference_says(options, layout):
    q, k, v = make((1,) if "cu_seqlens_q" in options else (2,))
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    arrays = in_layout(layout, q, k, v)
    before = [x.copy() for x in arrays]
    out, lse = nbfmha.attention(*arrays, layout=layout, recipe=SIXTEEN_BITS, return_lse=True, **options)
    assert (out.dtype, out.shape, out.flags.c_contiguous) == (np.float16, arrays[0].shape, True)
    assert (lse.dtype, lse.shape) == (np.float32, expected_lse.shape)
    (out,) = in_layout(layout, out)
    np.testing.assert_allclose(out, expected, atol=2e-3)  # P and the output in float16
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("recipe", PRESETS)
def test_recipes_and_dtypes(recipe, dtype):
    q, k, v = make((2,), head_dim=64, dtype=dtype)
    out, lse = nbfmha.attention(q, k, v, causal=True, recipe=recipe, return_lse=True)
    assert out.dtype == dtype
    expected, expected_lse = recipe_attention(q, k, v, Problem.of(q, k, v, causal=True), recipe)
    ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[np.dtype(dtype).name]
    np.testing.assert_allclose(out.astype(float), expected, rtol=ulp, atol=1e-7)  # one rounding
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


def test_the_default_recipe_is_accurate():
    q, k, v = make(lengths=(200, 400), head_dim=64)
    expected = reference.attention(q, k, v, causal=True)
    errors = {recipe: relative_l2(nbfmha.attention(q, k, v, causal=True, recipe=recipe), expected) for recipe in PRESETS}
    assert relative_l2(nbfmha.attention(q, k, v, causal=True), expected) == errors["accurate"] < errors["sage3"] / 2


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 2)], ids=str)
def test_any_number_of_leading_axes(batch, layout):
    q, k, v = make(batch, lengths=(9, 20), head_dim=6)
    expected = reference.attention(q, k, v, causal=True)
    out, lse = nbfmha.attention(
        *in_layout(layout, q, k, v), causal=True, layout=layout, recipe=SIXTEEN_BITS, return_lse=True
    )
    np.testing.assert_allclose(*in_layout(layout, out), expected, atol=2e-3)
    assert lse.shape == (*batch, 4, 9)


@pytest.mark.parametrize("recipe", [*PRESETS, SIXTEEN_BITS], ids=[*PRESETS, "16 bits"])
@pytest.mark.parametrize(
    ("batch", "lengths"), [((2,), (0, 5)), ((2,), (5, 0)), ((0,), (5, 5)), ((2,), (1, 1)), ((), (0, 0))], ids=str
)
def test_nothing_to_do_is_no_error(batch, lengths, recipe):
    q, k, v = make(batch, lengths=lengths)
    out, lse = nbfmha.attention(*in_layout("bshd", q, k, v), layout="bshd", recipe=recipe, sinks=SINKS, return_lse=True)
    assert out.shape == (*batch, lengths[0], 4, 32)
    assert lse.shape == q.shape[:-1]
    if not lengths[1]:
        assert not out.any()
        np.testing.assert_array_equal(lse, np.broadcast_to(SINKS[:, None], lse.shape))


def test_numpy_views_of_any_strides():
    q, k, v = make((2,))
    fused = np.stack([np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)], axis=3)[:, :, ::-1]
    expected = nbfmha.attention(q, k[:, :, ::-1], v[:, :, ::-1])
    np.testing.assert_array_equal(nbfmha.attention(q, fused[:, ::2, :, 0], fused[:, ::2, :, 1]), expected)
    big_endian = [x.astype(">f2") for x in (q, k, v)]
    np.testing.assert_array_equal(nbfmha.attention(*big_endian), nbfmha.attention(q, k, v))


def double_rounding(dtype):
    """Four keys of equal weight whose mean is 1 + 2^-8 + 2^-41: a float32 in between would end on the even side."""
    q, k = np.zeros((1, 1, 2), dtype), np.zeros((1, 4, 2), dtype)
    v = np.array([4, 2**-6, 2**-39, 0])[None, :, None].repeat(2, axis=-1).astype(dtype)
    return q, k, v


def test_bfloat16_is_rounded_once():
    out = nbfmha.attention(*double_rounding(ml_dtypes.bfloat16), recipe=SIXTEEN_BITS)
    np.testing.assert_array_equal(out.astype(float), 1 + 2**-7)


def test_values_that_are_not_finite_propagate():
    q, k, v = make(lengths=(3, 40))
    v[0, 30, 5], v[0, 10, 6] = np.nan, np.inf
    out = nbfmha.attention(q, k, v, recipe=SIXTEEN_BITS)
    assert np.isnan(out[:2, :, 5]).all()
    assert np.isposinf(out[:2, :, 6]).all()
    assert np.isfinite(out[2:]).all()
    q[0, 1] = np.inf
    assert np.isnan(nbfmha.attention(q, k, v)[0, 1]).all()


class TestOut:
    def test_is_written_and_returned(self):
        q, k, v = make((2,))
        out = np.full_like(q, np.nan)
        assert nbfmha.attention(q, k, v, out=out) is out
        np.testing.assert_array_equal(out, nbfmha.attention(q, k, v))

    def test_may_have_strides(self):
        q, k, v = in_layout("bshd", *make((2,)))
        wide = np.full((2, 70, 4, 64), np.nan, np.float16)
        result, lse = nbfmha.attention(q, k, v, layout="bshd", out=wide[..., 32:], return_lse=True)
        assert result.base is wide
        assert lse.shape == (2, 4, 70)
        np.testing.assert_array_equal(wide[..., 32:], nbfmha.attention(q, k, v, layout="bshd"))
        assert np.isnan(wide[..., :32]).all()

    @pytest.mark.parametrize(
        ("out", "error", "text"),
        [
            (lambda q: q.tolist(), TypeError, "out must be an array of NumPy, torch, CuPy or Numba"),
            (lambda q: nbfmha.quantize(q), TypeError, "out must be an array of numpy, got QuantizedTensor"),
            (lambda q: q.astype(np.float32), TypeError, r"out.dtype must be float16, got float32"),
            (lambda q: q[:1].copy(), ValueError, r"out must be of shape \(4, 70, 32\), as q is, got \(1, 70, 32\)"),
            (lambda q: q, ValueError, "out must be in memory of its own, got memory that it shares with q"),
            (lambda q: q[:, ::-1], ValueError, "out must be in memory of its own, got memory that it shares with q"),
            (
                lambda q: Machine("sm_120a").array(q),
                TypeError,
                "out must be an array of numpy, as q is, got one of emulated",
            ),
        ],
        ids=["list", "quantised", "dtype", "shape", "q", "reversed q", "elsewhere"],
    )
    def test_is_checked_first(self, out, error, text):
        q, k, v = make()
        before = q.copy()
        with pytest.raises(error, match=text):
            nbfmha.attention(q, k, v, out=out(q))
        np.testing.assert_array_equal(q, before)

    def test_must_be_writeable_element_by_element(self):
        q, k, v = make()
        out = np.empty_like(q)
        out.flags.writeable = False
        with pytest.raises(ValueError, match="out must be writeable, got a read-only array"):
            nbfmha.attention(q, k, v, out=out)
        repeated = np.lib.stride_tricks.as_strided(np.empty(32, np.float16), q.shape, (0, 0, 2))
        with pytest.raises(ValueError, match="out must be without an element that stands at two indices"):
            nbfmha.attention(q, k, v, out=repeated)


class TestQuantizedTensors:
    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_are_what_they_stand_for(self, impl):
        q, k, v = make((2,), head_dim=64)
        qt = [nbfmha.quantize(q), nbfmha.quantize(k, global_scale="amax"), nbfmha.quantize(v, axis="tokens")]
        expected, expected_lse = reference.attention(*qt, causal=True, sinks=SINKS, return_lse=True)
        out, lse = nbfmha.attention(*qt, causal=True, sinks=SINKS, return_lse=True, impl=impl)
        assert out.dtype == np.float32
        np.testing.assert_array_equal(out, expected.astype(np.float32))
        np.testing.assert_array_equal(lse, expected_lse.astype(np.float32))

    def test_beside_arrays(self):
        q, k, v = make(head_dim=64, dtype=ml_dtypes.bfloat16)
        kq, vq = nbfmha.quantize(k.astype(np.float32)), nbfmha.quantize(v.astype(np.float32), format="mxfp4")
        out = nbfmha.attention(q, kq, vq, recipe=None)
        assert out.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(out.astype(float), reference.attention(q, kq, vq), rtol=2.0**-8)
        assert nbfmha.attention(nbfmha.quantize(q.astype(np.float32)), k, v).dtype == ml_dtypes.bfloat16

    def test_in_the_other_layout(self):
        q, k, v = make((2,), head_dim=64)
        qt = [nbfmha.quantize(x) for x in in_layout("bshd", q, k, v)]
        expected = reference.attention(*(nbfmha.quantize(x) for x in (q, k, v)))
        out = nbfmha.attention(*qt, layout="bshd")
        np.testing.assert_array_equal(*in_layout("bshd", out), expected.astype(np.float32))

    def test_take_no_recipe(self):
        qt = [nbfmha.quantize(x) for x in make(head_dim=64)]
        nbfmha.attention(*qt, recipe="accurate")
        with pytest.raises(ValueError, match="recipe must be left at its default with QuantizedTensors, got 'sage3'; what"):
            nbfmha.attention(*qt, recipe="sage3")


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            (
                {"impl": "fast"},
                ValueError,
                "impl must be one of 'auto', 'blockscale', 'legacy', 'dequant', 'emulated', 'ref",
            ),
            ({"layout": "sbhd"}, ValueError, "layout must be one of 'bhsd', 'bshd', got 'sbhd'"),
            ({"recipe": "best"}, ValueError, "recipe must be one of 'naive', .*'accurate', 'legacy', got 'best'"),
            ({"recipe": None}, TypeError, "recipe must be a Recipe or the name of a preset, got NoneType"),
            ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
            ({"window": (-1, -1)}, ValueError, r"window must be \(left, right\), each >= 0 or None, .*FlashAttention's -1"),
            ({"window": [[1], 2]}, TypeError, r"window must be an integer, got \[1\]"),
            ({"window": 5}, TypeError, r"window must be \(left, right\) or None, got 5"),
            ({"softcap": 0}, ValueError, "softcap must be > 0, got 0.0; None for no cap"),
            ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number or None, got '1'"),
            ({"q_offset": 1.5}, TypeError, "q_offset must be an integer, got 1.5"),
            ({"cu_seqlens_q": [0, 70]}, ValueError, "cu_seqlens_k must be given when the other one is"),
            ({"cu_seqlens_q": [0, 71], "cu_seqlens_k": [0, 150]}, ValueError, "cu_seqlens_q must be from 0 to 70"),
            (
                {"cu_seqlens_q": [[0], 70], "cu_seqlens_k": [0, 150]},
                TypeError,
                "cu_seqlens_q must be a sequence of integers",
            ),
            ({"cu_seqlens_q": 70, "cu_seqlens_k": 150}, TypeError, "cu_seqlens_q must be a sequence of integers, got 70"),
            ({"sinks": [1.0] * 4}, TypeError, r"sinks must be an array of numpy or NumPy, got list; np.array\(sinks\)"),
            ({"sinks": np.zeros(3)}, ValueError, r"sinks must be of shape \(num_heads_q,\) = \(4,\), got \(3,\)"),
            ({"sinks": np.zeros(4, int)}, TypeError, "sinks.dtype must be one of float16, bfloat16, float32, float64"),
            ({"sinks": np.array([0, 0, 0, np.nan])}, ValueError, "sinks must be finite or -inf, got nan"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_options(self, options, error, text):
        q, k, v = make()
        nbfmha.attention(q, k, v, causal=True)  # the same problem but for a type, kept by then
        with pytest.raises(error, match=text):
            nbfmha.attention(q, k, v, **options)

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            (lambda q, k, v: ([1.0], k, v), TypeError, "q must be an array of NumPy, torch, CuPy or Numba, or on an em"),
            (lambda q, k, v: (q, None, v), TypeError, r"k must be an array of NumPy, .* got builtins\.NoneType"),
            (lambda q, k, v: (q.astype(float), k, v), TypeError, r"q\.dtype must be float16, bfloat16 or float32, got fl"),
            (lambda q, k, v: (q.view(np.uint16), k, v), TypeError, r"q\.dtype .* uint16; .*\.view\(ml_dtypes.bfloat16\)"),
            (lambda q, k, v: (q, k.astype("f4"), v), TypeError, r"k\.dtype must be that of q \(float16\), got float32"),
            (lambda q, k, v: (q[0], k, v), ValueError, r"q must be an array \(..., num_heads, tokens, head_dim\) of rank"),
            (lambda q, k, v: (q, k[None], v), ValueError, r"k must be of shape \(num_heads_kv, seqlen_k, 32\) for q of"),
            (lambda q, k, v: (q[None], k, v), ValueError, r"k must be of shape \(1, num_heads_kv, seqlen_k, 32\) for q"),
            (lambda q, k, v: (q, k[..., :30], v), ValueError, r"k must be of shape \(num_heads_kv, seqlen_k, 32\) for q"),
            (lambda q, k, v: (q, k, v[:, 1:]), ValueError, r"v must be of shape \(2, 150, 32\), as k is, got \(2, 149,"),
            (lambda q, k, v: (q[:3], k, v), ValueError, r"num_heads_q must be a multiple of num_heads_kv \(2\), got 3"),
            (lambda q, k, v: (q[..., :7], k[..., :7], v[..., :7]), ValueError, "head_dim must be even and > 0, got 7"),
            (lambda q, k, v: (q, Machine("sm_80").array(k), v), TypeError, "k must be an array of numpy, as q is, got one"),
        ],
        ids=["list", "None", "float64", "uint16", "mixed dtypes", "rank 2", "rank of k", "rank of q", "head_dims",
             "shape of v", "heads", "odd", "mixed libraries"],
    )  # fmt: skip
    def test_arrays(self, change, error, text):
        with pytest.raises(error, match=text):
            nbfmha.attention(*change(*make()))

    def test_shapes_in_the_other_layout(self):
        q, k, v = make()
        with pytest.raises(
            ValueError, match=r"k must be of shape \(seqlen_k, num_heads_kv, 32\) for q of shape \(4, 70, 32\)"
        ):
            nbfmha.attention(q, k[..., :30], v, layout="bshd")
        with pytest.raises(ValueError, match=r"q must be an array \(..., tokens, num_heads, head_dim\) of rank >= 3"):
            nbfmha.attention(q[0], k, v, layout="bshd")

    def test_packed_sequences_have_no_batch(self):
        with pytest.raises(ValueError, match="batch must be 1 with cu_seqlens_q, got 2; lay all sequences end to end"):
            nbfmha.attention(*make((2,)), **EDGES)

    def test_arrays_of_two_machines(self):
        q, k, v = make()
        one, other = Machine("sm_120a"), Machine("sm_120a")
        with pytest.raises(ValueError, match="k must be on the machine of q, got another machine"):
            nbfmha.attention(one.array(q), other.array(k), one.array(v))


class TestTorch:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["bhsd", "bshd"])
    def test_gives_what_numpy_gives(self, torch, dtype, layout):
        arrays = in_layout(layout, *make((2,), dtype=DTYPES[dtype]))
        tensors = [torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)) for x in arrays]
        options = {"causal": True, "layout": layout, "return_lse": True}
        out, lse = nbfmha.attention(*tensors, sinks=torch.from_numpy(SINKS).bfloat16(), **options)
        expected, expected_lse = nbfmha.attention(*arrays, sinks=SINKS, **options)
        assert (out.dtype, out.device.type, out.is_contiguous()) == (tensors[0].dtype, "cpu", True)
        assert lse.dtype == torch.float32
        np.testing.assert_array_equal(out.float().numpy(), expected.astype(np.float32))
        np.testing.assert_array_equal(lse.numpy(), expected_lse)
        given = torch.empty(out.shape[::-1], dtype=out.dtype).permute(*reversed(range(out.dim())))
        assert nbfmha.attention(*tensors, sinks=SINKS, out=given, **options)[0] is given
        assert torch.equal(given, out)

    def test_bfloat16_is_rounded_once(self, torch):
        q, k, v = (torch.from_numpy(x).bfloat16() for x in double_rounding(np.float32))
        assert (nbfmha.attention(q, k, v, recipe=SIXTEEN_BITS) == 1 + 2**-7).all()

    def test_boundaries_and_views(self, torch):
        q, k, v = make(heads=(2, 2), lengths=(70, 70))
        fused = torch.from_numpy(np.stack([q, k, v])).permute(2, 0, 1, 3)  # (tokens, 3, heads, head_dim)
        edges = torch.tensor([0, 30, 70], dtype=torch.int32)
        options = {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "causal": True}
        out = nbfmha.attention(*fused.unbind(1), layout="bshd", **options)
        expected = nbfmha.attention(q, k, v, cu_seqlens_q=[0, 30, 70], cu_seqlens_k=np.array([0, 30, 70]), causal=True)
        np.testing.assert_array_equal(out.numpy(), expected.swapaxes(0, 1))

    def test_quantised(self, torch):
        q, k, v = make(head_dim=64)
        qt = [nbfmha.quantize(torch.from_numpy(x)) for x in (q, k, v)]
        out = nbfmha.attention(*qt)
        assert out.dtype == torch.float32
        np.testing.assert_array_equal(out.numpy(), nbfmha.attention(*(nbfmha.quantize(x) for x in (q, k, v))))

    @pytest.mark.parametrize("name", ["q", "k", "v", "sinks", "out"])
    def test_no_gradient_is_lost_silently(self, torch, name):
        q, k, v = (torch.from_numpy(x) for x in make())
        arguments = {"q": q, "k": k, "v": v, "sinks": torch.zeros(4), "out": torch.empty_like(q)}
        arguments[name].requires_grad_()
        with pytest.raises(ValueError, match=f"{name} must be without requires_grad, .* torch.no_grad"):
            nbfmha.attention(**arguments)
        with torch.no_grad():
            out = nbfmha.attention(**arguments)
        arguments[name] = arguments[name].detach()
        assert torch.equal(out, nbfmha.attention(**(arguments | {"out": None})))

    def test_refusals(self, torch):
        q, k, v = make()
        tensor = torch.from_numpy
        with pytest.raises(TypeError, match="k must be an array of torch, as q is, got one of numpy"):
            nbfmha.attention(tensor(q), k, v)
        with pytest.raises(TypeError, match="q must be on the CPU or a CUDA GPU, got a torch tensor on 'meta'"):
            nbfmha.attention(tensor(q).to("meta"), tensor(k), tensor(v))
        expanded = torch.empty(1, 70, 32, dtype=torch.float16).expand(4, 70, 32)
        with pytest.raises(ValueError, match="out must be without an element that stands at two indices"):
            nbfmha.attention(tensor(q), tensor(k), tensor(v), out=expanded)
        with pytest.raises(TypeError, match=r"q\.dtype must be float16, bfloat16 or float32, got float64"):
            nbfmha.attention(*(tensor(x).double() for x in (q, k, v)))
