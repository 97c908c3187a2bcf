"""Every length, both axes, padding, strides, empty tensors, and the errors for everything else."""

import itertools

import block_oracle as oracle
import ml_dtypes
import numpy as np
import pytest

from nbfmha import nvfp4, quantized_tensor, scale_layouts

LAYOUTS = scale_layouts.SCALE_LAYOUTS


def data(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture
def poisoned_allocation(monkeypatch):
    """Memory that NumPy does not promise to clear is full of 0xFF."""
    original, original_like = np.empty, np.empty_like

    def poison(array):
        if array.dtype.kind in "iufb" and array.flags.c_contiguous:
            array.reshape(-1).view(np.uint8)[:] = 0xFF
        return array

    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: poison(original(*args, **kwargs)))
    monkeypatch.setattr(np, "empty_like", lambda *args, **kwargs: poison(original_like(*args, **kwargs)))


@pytest.mark.usefixtures("poisoned_allocation")
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("axis", ["head_dim", "tokens"])
def test_every_length_is_the_padded_tensor_cut(format, axis):
    """1..200 tokens: bytes equal those of the tensor padded with zeros; padding holds zeros; values come back."""
    whole = data((200, 34))
    for tokens in range(1, 201):
        x = whole[:tokens]
        qt = nvfp4.quantize(x, format=format, axis=axis)
        block = qt.block_size
        rows, length = (tokens, 34) if axis == "head_dim" else (34, tokens)
        cols = -(-length // block)
        assert qt.codes.shape == (rows, cols * block // 2)
        assert qt.scales.shape == (rows, cols)

        padded = np.zeros((rows, cols * block), np.float32)
        padded[:, :length] = x if axis == "head_dim" else x.T
        full = nvfp4.quantize(padded, format=format)
        np.testing.assert_array_equal(qt.codes, full.codes)
        np.testing.assert_array_equal(qt.scales, full.scales)
        assert not oracle.nibbles(qt.codes)[:, length:].any()
        expected = nvfp4.dequantize(full)[:, :length]
        np.testing.assert_array_equal(nvfp4.dequantize(qt), expected if axis == "head_dim" else expected.T)


@pytest.mark.usefixtures("poisoned_allocation")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", ["head_dim", "tokens"])
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 2), (17, 64), (65, 96), (130, 80), (200, 256)])
def test_scale_padding_is_zero(layout, axis, tokens, head_dim):
    qt = nvfp4.quantize(data((2, tokens, head_dim)) + 10, axis=axis, scale_layout=layout)
    logical = 2 * qt.rows * qt.cols  # no scale of this data is 0
    assert np.count_nonzero(qt.scales) == logical
    linear = nvfp4.quantize(data((2, tokens, head_dim)) + 10, axis=axis)
    np.testing.assert_array_equal(nvfp4.dequantize(qt), nvfp4.dequantize(linear))


def test_tokens_axis_is_the_transpose():
    x = data((2, 3, 48, 64))
    along, across = nvfp4.quantize(x, axis="tokens"), nvfp4.quantize(x.swapaxes(-1, -2))
    np.testing.assert_array_equal(along.codes, across.codes)
    np.testing.assert_array_equal(along.scales, across.scales)
    np.testing.assert_array_equal(nvfp4.dequantize(along), nvfp4.dequantize(across).swapaxes(-1, -2))
    square = data((64, 64))  # the wrong axis must not pass unnoticed on a square
    assert not np.array_equal(nvfp4.quantize(square, axis="tokens").codes, nvfp4.quantize(square).codes)


@pytest.mark.parametrize("axis", ["head_dim", "tokens"])
def test_batch_axes_are_independent(axis):
    x = data((2, 3, 20, 34))
    qt = nvfp4.quantize(x, axis=axis, scale_layout="blocked_128x4")
    for index in np.ndindex(2, 3):
        one = nvfp4.quantize(x[index], axis=axis, scale_layout="blocked_128x4")
        np.testing.assert_array_equal(qt.codes[index], one.codes)
        np.testing.assert_array_equal(qt.scales[index], one.scales)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("axis", ["head_dim", "tokens"])
def test_strides_do_not_matter_and_input_is_not_changed(dtype, axis):
    base = data((3, 40, 4, 128), dtype=dtype)
    views = {
        "transposed heads": base.transpose(0, 2, 1, 3),
        "every other": base[:, ::2, :, ::2],
        "reversed": base[::-1, ::-1, :, ::-1],
        "transposed": base.swapaxes(-1, -2)[..., :66, :],
        "broadcast": np.broadcast_to(base[:1, :, :1], (3, 40, 2, 128)),
    }
    before = base.copy()
    base.setflags(write=False)
    for view in views.values():
        qt = nvfp4.quantize(view, axis=axis, scale="four_over_six", global_scale="amax")
        copy = nvfp4.quantize(np.ascontiguousarray(view), axis=axis, scale="four_over_six", global_scale="amax")
        np.testing.assert_array_equal(qt.codes, copy.codes)
        np.testing.assert_array_equal(qt.scales, copy.scales)
        assert qt.shape == view.shape
    np.testing.assert_array_equal(base, before)


def test_big_endian_input():
    x = data((4, 32))
    np.testing.assert_array_equal(nvfp4.quantize(x.astype(">f4")).codes, nvfp4.quantize(x).codes)


def test_tiles_of_the_work_do_not_show(monkeypatch):
    """The same bytes whatever the size of a working tile; rows longer than a tile are split."""
    x = data((3, 700, 66), dtype=np.float16)
    expected = [nvfp4.quantize(x, axis=axis, global_scale="amax") for axis in quantized_tensor.AXES]
    values = [nvfp4.dequantize(qt) for qt in expected]
    monkeypatch.setattr(nvfp4, "_TILE_ELEMS", 64)
    for axis, qt, value in zip(quantized_tensor.AXES, expected, values, strict=True):
        small = nvfp4.quantize(x, axis=axis, global_scale="amax")
        np.testing.assert_array_equal(small.codes, qt.codes)
        np.testing.assert_array_equal(small.scales, qt.scales)
        assert small.global_scale == qt.global_scale
        np.testing.assert_array_equal(nvfp4.dequantize(small), value)


@pytest.mark.parametrize("shape", [(0, 64), (0, 5, 64), (2, 0, 64), (2, 0, 5, 64)])
@pytest.mark.parametrize("axis", ["head_dim", "tokens"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_tensors(shape, axis, layout):
    for recipe in ({}, {"scale": "four_over_six", "global_scale": "amax"}, {"format": "mxfp4"}):
        qt = nvfp4.quantize(np.ones(shape, np.float16), axis=axis, scale_layout=layout, **recipe)
        back = nvfp4.dequantize(qt, "float16")
        assert back.shape == shape
        assert qt.codes.size == 0
        assert not qt.scales.any()
        assert qt.bits_per_element == 0
        assert nvfp4.relayout(qt, "linear").scales.size == 0


@pytest.mark.parametrize("head_dim", [0, 1, 7, 63])
@pytest.mark.parametrize("axis", ["head_dim", "tokens"])
def test_head_dim_must_be_even_and_positive(head_dim, axis):
    with pytest.raises(ValueError, match=rf"^head_dim must be even and > 0, got {head_dim}; pad the last axis$"):
        nvfp4.quantize(np.zeros((4, head_dim), np.float32), axis=axis)


@pytest.mark.parametrize("shape", [(), (16,)])
def test_rank_below_two(shape):
    with pytest.raises(ValueError, match=r"x must be an array \(\.\.\., tokens, head_dim\) of rank >= 2, got shape"):
        nvfp4.quantize(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64, bool, complex, ml_dtypes.float8_e4m3fn, object])
def test_other_dtypes(dtype):
    with pytest.raises(TypeError, match=r"x\.dtype must be float16, bfloat16 or float32, got "):
        nvfp4.quantize(np.zeros((2, 16)).astype(dtype))


@pytest.mark.parametrize("x", [[[1.0] * 16], None, np.float32(1), "x"])
def test_not_an_array(x):
    with pytest.raises(TypeError, match="x must be a NumPy array, got "):
        nvfp4.quantize(x)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"format": "fp4"}, "format must be one of 'nvfp4', 'mxfp4', got 'fp4'"),
        ({"format": None}, "format must be one of .*, got None"),
        ({"axis": "rows"}, "axis must be one of 'head_dim', 'tokens', got 'rows'"),
        ({"axis": -1}, "axis must be one of .*, got -1"),
        ({"scale": "max"}, "scale must be one of 'amax', 'four_over_six', got 'max'"),
        ({"scale_layout": "swizzled"}, "scale_layout must be one of 'linear', .*, got 'swizzled'"),
        ({"format": "mxfp4", "scale": "four_over_six"}, "scale must be 'amax' for 'mxfp4', got 'four_over_six'"),
        ({"format": "mxfp4", "global_scale": 1.0}, "global_scale must be None for 'mxfp4', got 1.0"),
        ({"format": "mxfp4", "global_scale": "amax"}, "global_scale must be None for 'mxfp4', got 'amax'"),
        ({"global_scale": "max"}, "global_scale must be 'amax', got 'max'; give a number or None"),
        *(
            ({"global_scale": g}, "global_scale must be a finite number in .*, got ")
            for g in (0.0, -1.0, np.nan, np.inf, -np.inf, 2.0**-65, 2.0**64 * 1.001, 1e300, 10**400, np.float64(0))
        ),
    ],
)
def test_bad_values(arguments, text):
    with pytest.raises(ValueError, match=text):
        nvfp4.quantize(np.ones((2, 32), np.float32), **arguments)


@pytest.mark.parametrize("global_scale", [True, [1.0], np.ones(2, np.float32), np.array(1j), np.bool_(True), 1j])
def test_global_scale_of_a_wrong_type(global_scale):
    with pytest.raises(TypeError, match="global_scale must be a finite number in "):
        nvfp4.quantize(np.ones((2, 32), np.float32), global_scale=global_scale)


@pytest.mark.parametrize("global_scale", [2, 2.0, np.float32(2), np.float64(2), np.array(2.0), np.array([2.0], np.float32)])
def test_global_scale_of_any_real_type(global_scale):
    qt = nvfp4.quantize(np.ones((2, 32), np.float32), global_scale=global_scale)
    assert isinstance(qt.global_scale, np.ndarray)
    assert qt.global_scale.dtype == np.float32
    assert qt.global_scale == 2


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("axis", ["head_dim", "tokens"])
def test_relayout_round_trips(format, axis):
    for tokens, head_dim in [(1, 2), (63, 64), (64, 96), (129, 34), (257, 128)]:
        x = data((2, tokens, head_dim))
        made = {layout: nvfp4.quantize(x, format=format, axis=axis, scale_layout=layout) for layout in LAYOUTS}
        for source, target in itertools.product(LAYOUTS, LAYOUTS):
            moved = nvfp4.relayout(made[source], target)
            np.testing.assert_array_equal(moved.scales, made[target].scales)
            assert moved.scale_layout == target
            assert moved.codes is made[source].codes


def test_dequantize_and_relayout_errors():
    qt = nvfp4.quantize(np.ones((2, 32), np.float32), global_scale=1.0)
    with pytest.raises(ValueError, match="dtype must be one of 'float32', 'float16', 'bfloat16', got 'float64'"):
        nvfp4.dequantize(qt, "float64")
    with pytest.raises(ValueError, match=r"scale_layout must be one of .*, got 'other'"):
        nvfp4.relayout(qt, "other")
    for function in (nvfp4.dequantize, lambda x: nvfp4.relayout(x, "linear")):
        with pytest.raises(TypeError, match="qt must be a QuantizedTensor, got ndarray"):
            function(np.ones((2, 32), np.float32))
    qt.global_scale[...] = -1
    with pytest.raises(ValueError, match="global_scale must be a finite number"):
        nvfp4.dequantize(qt)
