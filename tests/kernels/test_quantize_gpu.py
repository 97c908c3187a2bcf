"""The quantise, dequantise and relayout kernels against the NumPy reference: the same bits."""

import itertools

import numpy as np
import pytest

from nbfmha import nvfp4, quantization
from nbfmha.scale_layouts import SCALE_LAYOUTS

pytestmark = pytest.mark.gpu

SHAPES = [(1, 2), (1, 16), (3, 7, 66), (2, 100, 128), (130, 64), (2, 3, 129, 96), (5, 256, 256), (33, 6), (4, 1, 64)]
RECIPES = [
    ("nvfp4", "amax", None),
    ("nvfp4", "amax", 0.37),
    ("nvfp4", "amax", "amax"),
    ("nvfp4", "four_over_six", None),
    ("nvfp4", "four_over_six", "amax"),
    ("mxfp4", "amax", None),
]


def special_values(count, rng):
    """f32 values that make every kind of block: ordinary, tiny, huge, zero, subnormal scales, a NaN or Inf now and then,
    and exact ties of codes and of scales."""
    x = rng.standard_normal(count).astype(np.float32)
    x *= np.exp2(np.repeat(rng.integers(-20, 13, -(-count // 48)), 48)[:count]).astype(np.float32)
    x[rng.random(count) < 0.02] = 0
    x[rng.random(count) < 0.02] = -0.0
    ties = rng.integers(-12, 13, count).astype(np.float32) / 4
    x = np.where(rng.random(count) < 0.2, ties, x)
    x[np.repeat(rng.random(-(-count // 64)) < 0.1, 64)[:count]] = 0
    for value in (np.nan, np.inf, -np.inf):
        x[rng.random(count) < 3e-4] = value
    return x


def make(shape, dtype, torch, seed=0):
    x = special_values(int(np.prod(shape)), np.random.default_rng(seed)).reshape(shape)
    return torch.from_numpy(x).to(getattr(torch, dtype))


def to_numpy(tensor):
    return tensor.cpu().numpy()


def assert_same_quantized(gpu_result, reference):
    np.testing.assert_array_equal(to_numpy(gpu_result.scales), np.asarray(reference.scales), "scale bytes")
    np.testing.assert_array_equal(to_numpy(gpu_result.codes), np.asarray(reference.codes), "codes")
    if reference.global_scale is not None:
        assert to_numpy(gpu_result.global_scale).item() == np.asarray(reference.global_scale).item()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("axis", ["head_dim", "tokens"])
@pytest.mark.parametrize(("format", "scale", "global_scale"), RECIPES)
@pytest.mark.parametrize("scale_layout", SCALE_LAYOUTS)
def test_same_bits_as_numpy(gpu, dtype, axis, format, scale, global_scale, scale_layout):
    for seed, shape in enumerate(SHAPES):
        x = make(shape, dtype, gpu, seed)
        options = {"format": format, "axis": axis, "scale": scale, "scale_layout": scale_layout}
        options["global_scale"] = global_scale
        reference = quantization.quantize(x, **options)
        on_gpu = x.cuda()
        before = on_gpu.clone()
        result = quantization.quantize(on_gpu, **options)
        assert_same_quantized(result, reference)
        assert gpu.equal(on_gpu.view(gpu.uint8), before.view(gpu.uint8)), "the input was changed"
        for out in ("float16", "bfloat16", "float32"):
            values = quantization.dequantize(result, out)
            expected = quantization.dequantize(reference, out)
            assert values.dtype == expected.dtype
            nan = expected.isnan()
            assert gpu.equal(values.cpu().isnan(), nan)
            integer = gpu.int16 if expected.element_size() == 2 else gpu.int32
            assert gpu.equal(values.cpu().view(integer)[~nan], expected.view(integer)[~nan])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_value_in_a_block_of_its_own(gpu, dtype):
    """All 65,536 inputs, each beside elements that set the scale to various fractions of it."""
    bits = np.arange(65536, dtype=np.uint16)
    values = gpu.from_numpy(bits.astype(np.int32)).to(gpu.int16).view(getattr(gpu, dtype))
    x = values[:, None].expand(-1, 16).clone()
    x[:, 1:] *= gpu.linspace(0, 0.99, 15).to(x.dtype)
    assert_same_quantized(quantization.quantize(x.cuda()), quantization.quantize(x))


def test_random_f32_bit_patterns(gpu):
    bits = np.random.default_rng(3).integers(0, 2**32, (1 << 14, 64), np.uint32)
    narrow = bits.copy()
    narrow[:, 1:] = (narrow[:, 1:] & 0x807FFFFF) | (narrow[:, :1] & 0x7F800000)  # one exponent a row
    for pattern, global_scale in itertools.product((bits, narrow), (None, 3.3e-5, "amax")):
        x = gpu.from_numpy(pattern.view(np.float32))
        options = {"global_scale": global_scale}
        assert_same_quantized(quantization.quantize(x.cuda(), **options), quantization.quantize(x, **options))


def test_relayout_and_poisoned_padding(gpu):
    for shape, source, destination in itertools.product([(2, 130, 96), (70, 64)], SCALE_LAYOUTS, SCALE_LAYOUTS):
        reference = quantization.quantize(make(shape, "float16", gpu), scale_layout=source)
        on_gpu = quantization.quantize(make(shape, "float16", gpu).cuda(), scale_layout=source)
        moved = quantization.relayout(on_gpu, destination)
        assert_same_quantized(moved, quantization.relayout(reference, destination))


def test_more_matrices_than_a_grid_counts(gpu):
    """65,535 is the largest grid along z: one launch more is needed."""
    x = make((65537, 1, 6), "float16", gpu)
    for axis in ("head_dim", "tokens"):
        reference = quantization.quantize(x, axis=axis)
        result = quantization.quantize(x.cuda(), axis=axis)
        assert_same_quantized(result, reference)
        values, expected = (quantization.dequantize(qt).cpu().nan_to_num() for qt in (result, reference))
        assert gpu.equal(values, expected)


def test_unaligned_input(gpu):
    storage = make((1, 129 * 64 + 1), "float16", gpu).cuda().reshape(-1)
    x = storage[1:].view(129, 64)
    assert x.data_ptr() % 16
    assert_same_quantized(quantization.quantize(x), quantization.quantize(x.cpu()))
    with pytest.raises(ValueError, match="x must be at an address that is a multiple of 16"):
        quantization.quantize(x, axis="tokens")


def test_cupy_and_numba_arrays(gpu):
    from numba import cuda

    x = np.random.default_rng(0).standard_normal((3, 40, 64)).astype(np.float16)
    reference = nvfp4.quantize(x, global_scale="amax")
    result = quantization.quantize(cuda.to_device(x), global_scale="amax")
    np.testing.assert_array_equal(result.codes.copy_to_host(), reference.codes)
    np.testing.assert_array_equal(quantization.dequantize(result).copy_to_host(), nvfp4.dequantize(reference))
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed; it is no dependency of this package")
    result = quantization.quantize(cupy.asarray(x), global_scale="amax")
    assert isinstance(result.codes, cupy.ndarray)
    np.testing.assert_array_equal(result.codes.get(), reference.codes)


def test_wrong_input_is_refused_before_a_launch(gpu):
    x = gpu.zeros(4, 32, 64, dtype=gpu.float16, device="cuda")
    with pytest.raises(ValueError, match="x must be contiguous"):
        quantization.quantize(x.transpose(0, 1))
    with pytest.raises(TypeError, match="float64"):
        quantization.quantize(x.double())
    with pytest.raises(ValueError, match="head_dim must be even"):
        quantization.quantize(x[..., :3].contiguous())
    with pytest.raises(ValueError, match="rank >= 2"):
        quantization.quantize(x[0, 0])
    with pytest.raises(ValueError, match="global_scale"):
        quantization.quantize(x, global_scale=float("nan"))
    with pytest.raises(ValueError, match="global_scale must be None for 'mxfp4'"):
        quantization.quantize(x, format="mxfp4", global_scale=1.0)


def test_empty_input_gives_an_empty_result(gpu):
    for shape in [(0, 64), (2, 0, 64), (0, 5, 64)]:
        for axis in ("head_dim", "tokens"):
            qt = quantization.quantize(gpu.empty(shape, dtype=gpu.float16, device="cuda"), axis=axis)
            assert qt.shape == shape
            assert quantization.dequantize(qt).shape == shape
