"""Layout and NumPy model of the paged cache: what is where, what it stands for, how far attention from it ends."""

import math

import ml_dtypes
import numpy as np
import pytest

import nbfmha
from nbfmha import reference
from nbfmha.accuracy import CACHES, cache_accuracy_table
from nbfmha.cache_model import contents, decode_outputs, mean_of_keys
from nbfmha.emulated import Machine
from nbfmha.kv_layout import CacheArrays, CacheLayout
from nbfmha.nvfp4 import dequantize, quantize
from nbfmha.problem import Problem

LAYOUT = CacheLayout(2, 64, page_size=32, recent_tokens=32, sink_tokens=16)


def history(n, heads=2, seed=0, dtype=np.float16):
    """k and v (heads, n, 64); k has a mean."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((heads, n, 64)) + 3 * rng.standard_normal((heads, 1, 64))
    return k.astype(dtype), rng.standard_normal((heads, n, 64)).astype(dtype)


def test_quantized_tokens_by_counting():
    for recent in (16, 64, 80):
        layout = CacheLayout(1, 64, recent_tokens=recent)
        stored = 0
        for n in range(400):
            if n - stored == recent + 16:  # the oldest block of the ring leaves it
                stored += 16
            assert layout.quantized_tokens(n) == stored
            assert n - stored < layout.ring_tokens
            assert layout.pages_of(n) == math.ceil(stored / 64)
        lengths = np.arange(400)
        assert layout.quantized_tokens(lengths).tolist() == [layout.quantized_tokens(int(n)) for n in lengths]


def test_sizes():
    layout = CacheLayout(8, 128)
    assert layout.bytes_per_token == 2 * 8 * 128 * 4.5 / 8
    shapes = layout.shapes(pages=5, slots=3, max_length=1000)
    item = {"uint8": 1, "float16": 2, "float32": 4, "int32": 4}
    bytes_ = {name: math.prod(shape) * item[dtype] for name, (shape, dtype) in shapes.items()}
    assert sum(bytes_[f"{x}_{part}"] for x in "kv" for part in ("codes", "scales")) == 5 * layout.bytes_per_page
    beside = sum(bytes_[f"{x}_{part}"] for x in "kv" for part in ("recent", "sinks")) + bytes_["k_mean"]
    assert beside == 3 * layout.bytes_per_sequence
    assert shapes["v_codes"] == ((5, 8, 128, 32), "uint8")
    assert shapes["block_tables"] == ((3, layout.pages_of(1000)), "int32")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"head_dim": 96}, ValueError, "head_dim must be one of 64, 128, 256, got 96; pad the last axis"),
        ({"head_dim": 32}, ValueError, r"head_dim must be in \[64, 256\], got 32"),
        ({"num_heads_kv": 0}, ValueError, r"num_heads_kv must be in \[1, 65535\], got 0"),
        ({"num_heads_kv": 1.0}, TypeError, "num_heads_kv must be an integer, got float"),
        ({"page_size": 24}, ValueError, r"page_size must be a multiple of 16 in \[16, 256\], got 24"),
        ({"page_size": 512}, ValueError, "page_size must be a multiple of 16"),
        ({"recent_tokens": 0}, ValueError, r"recent_tokens must be a multiple of 16 in \[16, 4096\], got 0"),
        ({"sink_tokens": 8}, ValueError, "sink_tokens must be a multiple of 16"),
        ({"dtype": "float32"}, ValueError, "dtype must be one of 'float16', 'bfloat16', got 'float32'; convert"),
        ({"scale": "best"}, ValueError, "scale must be one of 'amax', 'four_over_six', got 'best'"),
    ],
)
def test_layouts_that_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        CacheLayout(**{"num_heads_kv": 1, "head_dim": 64} | options)


def test_arrays_are_checked():
    machine = Machine("sm_120a")
    made = {name: machine.empty(shape, dtype) for name, (shape, dtype) in LAYOUT.shapes(3, 2, 200).items()}
    CacheArrays(**made).check(LAYOUT)
    with pytest.raises(TypeError, match=r"k_scales\.dtype must be uint8, got int32"):
        CacheArrays(**made | {"k_scales": made["lengths"]}).check(LAYOUT)
    with pytest.raises(ValueError, match=r"v_codes must be of shape \(3, 2, 64, 16\), got \(3, 2, 32, 32\)"):
        CacheArrays(**made | {"v_codes": made["k_codes"]}).check(LAYOUT)


@pytest.mark.parametrize("n", [0, 1, 16, 47, 48, 63, 64, 130])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_contents_by_the_formula(n, dtype):
    layout = CacheLayout(2, 64, recent_tokens=32, sink_tokens=16, dtype=np.dtype(dtype).name)
    k, v = history(n, dtype=dtype)
    found = contents(k, v, layout, [n] if n else [])
    stop = max(0, (n - 32) // 16 * 16)
    assert found.quantized_tokens == stop
    assert np.flatnonzero(~found.in_16_bits).tolist() == list(range(16, stop))
    km = k.astype(np.float64).mean(axis=1).astype(np.float32) if stop else np.zeros((2, 64), np.float32)
    np.testing.assert_array_equal(found.k_mean, km)
    for token in range(n):
        for head in range(2):
            if 16 <= token < stop:
                shifted = (k[head, token].astype(np.float32) - km[head])[None]
                expected_k = dequantize(quantize(shifted, scale="four_over_six"))[0].astype(np.float64) + km[head]
                first = token // 16 * 16
                block = v[head, first : first + 16].astype(np.float32)
                expected_v = dequantize(quantize(block, axis="tokens", scale="four_over_six"))[token - first]
            else:
                expected_k, expected_v = k[head, token].astype(np.float64), v[head, token].astype(np.float64)
            np.testing.assert_array_equal(found.k[head, token], expected_k)
            np.testing.assert_array_equal(found.v[head, token], expected_v)


def test_the_mean_is_fixed_with_the_first_block_and_stays():
    k, v = history(200)
    early, late = contents(k, v, LAYOUT, [10, 50, 200]), contents(k, v, LAYOUT, [40, 200])
    np.testing.assert_array_equal(early.k_mean, k[:, :50].astype(np.float64).mean(axis=1).astype(np.float32))
    np.testing.assert_array_equal(late.k_mean, k.astype(np.float64).mean(axis=1).astype(np.float32))
    np.testing.assert_array_equal(early.v, late.v)
    before = contents(k[:, :100], v[:, :100], LAYOUT, [10, 50, 100])
    for part in ("codes", "scales"):  # what is in pages never changes
        np.testing.assert_array_equal(getattr(early.k_pages, part)[:, :64], getattr(before.k_pages, part))
    assert not mean_of_keys(k, LAYOUT, [10, 47]).any()
    given = np.ones((2, 64), np.float32)
    found = contents(k, v, LAYOUT, [10, 50, 200], k_mean=given)
    expected = quantize(k[:, :160].astype(np.float32) - 1, scale=LAYOUT.scale)
    np.testing.assert_array_equal(found.k_pages.codes, expected.codes)


def test_contents_are_refused():
    k, v = history(20)
    with pytest.raises(ValueError, match=r"lengths must be ascending, up to the 20 tokens of k, got \[10\]"):
        contents(k, v, LAYOUT, [10])
    with pytest.raises(ValueError, match=r"lengths must be ascending, up to the 20 tokens of k, got \[30, 20\]"):
        contents(k, v, LAYOUT, [30, 20])
    with pytest.raises(TypeError, match=r"v\.dtype must be float16, got float32; as the layout says"):
        contents(k, v.astype(np.float32), LAYOUT, [20])
    with pytest.raises(ValueError, match=r"v must be of shape \(2, n, 64\), got \(2, 19, 64\)"):
        contents(k, v[:, :19], LAYOUT, [20])
    with pytest.raises(TypeError, match="k must be a NumPy array, got list; the model computes in NumPy"):
        contents([], v, LAYOUT, [20])
    with pytest.raises(ValueError, match=r"k_mean must be float32 of shape \(2, 64\), got float64 \(2, 64\)"):
        contents(k, v, LAYOUT, [20], k_mean=np.zeros((2, 64)))
    with pytest.raises(ValueError, match=r"q must be of shape \(a multiple of 2, 20, 64\), got \(3, 20, 64\)"):
        decode_outputs(np.zeros((3, 20, 64)), k, v, LAYOUT)
    with pytest.raises(ValueError, match=r"chunk must be in \[1, 20\], got 0"):
        decode_outputs(np.zeros((2, 20, 64)), k, v, LAYOUT, chunk=0)


@pytest.mark.parametrize("v_axis", ["tokens", "head_dim"])
@pytest.mark.parametrize("chunk", [1, 16, 37])
def test_outputs_are_those_of_the_contents_at_the_time(chunk, v_axis):
    k, v = history(150)
    q = np.random.default_rng(1).standard_normal((4, 150, 64)).astype(np.float16)
    out = decode_outputs(q, k, v, LAYOUT, chunk=chunk, v_axis=v_axis)
    lengths = []
    for start in range(0, 150, chunk):
        stop = min(start + chunk, 150)
        lengths.append(stop)
        there = contents(k[:, :stop], v[:, :stop], LAYOUT, lengths, v_axis=v_axis)
        queries = q[:, start:stop]
        problem = Problem.of(queries, there.k, there.v, causal=True)
        expected = reference.attention(queries, there.k, there.v, problem)
        np.testing.assert_allclose(out[:, start:stop], expected, rtol=1e-9, atol=1e-12)


def test_without_windows_everything_is_quantised():
    k, v = history(40)
    q = np.random.default_rng(1).standard_normal((2, 40, 64))
    got = decode_outputs(q, k, v, LAYOUT, chunk=40, windows=False, smooth_k=False, v_axis="head_dim")
    values = (dequantize(quantize(x, scale=LAYOUT.scale)).astype(np.float64) for x in (k, v))
    np.testing.assert_allclose(got, reference.attention(q, *values, causal=True), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [64, 16, 1])
def test_quality_on_real_data(chunk):
    """The default loses at most a quarter of what a cache without 16-bit windows does."""
    table = cache_accuracy_table(*nbfmha.load_sample(), chunks=(chunk,))
    errors = {name: row[chunk] for name, row in table.items()}
    assert list(errors) == list(CACHES)
    assert errors["plain NVFP4"] > errors["no 16-bit windows, V along tokens"] > errors["no 16-bit windows"]
    assert errors["default"] <= errors["no 16-bit windows"] / 4, errors
