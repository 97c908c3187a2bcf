"""The public functions, which send a tensor to the code for the place where it lies. GPU arrays: tests/kernels."""

import numpy as np
import pytest

import nbfmha
from nbfmha import nvfp4


def test_numpy_goes_to_the_reference():
    x = np.random.default_rng(0).standard_normal((3, 40, 64)).astype(np.float16)
    options = {"axis": "tokens", "scale": "four_over_six", "scale_layout": "blocked_128x4", "global_scale": "amax"}
    qt, expected = nbfmha.quantize(x, **options), nvfp4.quantize(x, **options)
    np.testing.assert_array_equal(qt.codes, expected.codes)
    np.testing.assert_array_equal(qt.scales, expected.scales)
    np.testing.assert_array_equal(nbfmha.dequantize(qt, "float16"), nvfp4.dequantize(expected, "float16"))
    np.testing.assert_array_equal(nbfmha.relayout(qt, "linear").scales, nvfp4.relayout(expected, "linear").scales)


@pytest.mark.parametrize("not_an_array", [[[1.0, 2.0]], None, 3.0, "x"])
def test_what_is_no_array_is_named(not_an_array):
    with pytest.raises(TypeError, match="x must be a NumPy array"):
        nbfmha.quantize(not_an_array)
    with pytest.raises(TypeError, match="qt must be a QuantizedTensor"):
        nbfmha.dequantize(not_an_array)
    with pytest.raises(TypeError, match="qt must be a QuantizedTensor"):
        nbfmha.relayout(not_an_array, "linear")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("axis", ["head_dim", "tokens"])
def test_torch_tensors_on_the_cpu(torch, dtype, axis):
    x = torch.randn(2, 33, 64).to(getattr(torch, dtype))
    before = x.clone()
    qt = nbfmha.quantize(x, axis=axis, global_scale="amax")
    expected = nvfp4.quantize(x.float().numpy(), axis=axis, global_scale="amax")
    assert isinstance(qt.codes, torch.Tensor)
    np.testing.assert_array_equal(qt.codes.numpy(), expected.codes)
    moved = nbfmha.relayout(qt, "interleaved_64")
    back = nbfmha.dequantize(moved, dtype)
    assert back.dtype == x.dtype
    assert torch.equal(back, torch.from_numpy(nvfp4.dequantize(expected)).to(x.dtype))
    assert torch.equal(x, before)
