"""QuantizedTensor checks itself; its derived sizes."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from nbfmha import nvfp4
from nbfmha.quantized_tensor import BLOCK_FORMATS, QuantizedTensor, storage_shapes


@pytest.fixture(scope="module")
def qt():
    return nvfp4.quantize(np.ones((2, 20, 48), np.float32), global_scale=2.0, scale_layout="blocked_128x4")


class OtherArray:
    """An array of another library, with a dtype that is spelt like torch's."""

    def __init__(self, shape, dtype="torch.uint8"):
        self.shape, self.dtype = shape, dtype


OtherArray.__module__ = "otherlib.array"


@pytest.mark.parametrize(
    ("shape", "options", "codes", "scales"),
    [
        ((20, 48), {}, (20, 24), (20, 3)),
        ((20, 34), {}, (20, 24), (20, 3)),
        ((20, 34), {"format": "mxfp4"}, (20, 32), (20, 2)),
        ((20, 34), {"axis": "tokens"}, (34, 16), (34, 2)),
        ((2, 3, 20, 34), {"axis": "tokens", "format": "mxfp4"}, (2, 3, 34, 16), (2, 3, 34, 1)),
        ((2, 130, 80), {"scale_layout": "blocked_128x4"}, (2, 130, 40), (2, 256 * 8)),
        ((2, 130, 80), {"scale_layout": "interleaved_64"}, (2, 130, 40), (2, 192 * 8)),
        ((0, 64), {"scale_layout": "blocked_128x4"}, (0, 32), (0,)),
        ((0, 64), {"scale_layout": "blocked_128x4", "axis": "tokens"}, (64, 0), (0,)),
    ],
)
def test_storage_shapes(shape, options, codes, scales):
    assert storage_shapes(shape, **options) == (codes, scales)
    made = nvfp4.quantize(np.ones(shape, np.float16), **options)
    assert (made.codes.shape, made.scales.shape) == (codes, scales)


def test_properties(qt):
    assert (qt.block_size, qt.rows, qt.cols, qt.blocked_length) == (16, 20, 3, 48)
    assert qt.block_format is BLOCK_FORMATS["nvfp4"]
    assert qt.scale_format.name == "ue4m3"
    assert qt.nbytes == 2 * 20 * 24 + 2 * 128 * 4 + 4
    assert qt.bits_per_element == 8 * qt.nbytes / (2 * 20 * 48)
    tokens = nvfp4.quantize(np.ones((2, 20, 48), np.float32), axis="tokens", format="mxfp4")
    assert (tokens.block_size, tokens.rows, tokens.cols, tokens.blocked_length) == (32, 48, 1, 20)
    assert tokens.scale_format.name == "ue8m0"


@pytest.mark.parametrize(("format", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25)])
def test_bits_per_element_without_padding(format, bits):
    assert nvfp4.quantize(np.ones((64, 128), np.float32), format=format).bits_per_element == bits


def test_is_frozen_and_compares_by_identity(qt):
    with pytest.raises(FrozenInstanceError):
        qt.axis = "tokens"
    assert qt == qt
    assert qt != replace(qt)
    assert len({qt, replace(qt)}) == 2


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"format": "fp4"}, ValueError, "format must be one of"),
        ({"axis": "rows"}, ValueError, "axis must be one of"),
        ({"scale_layout": "x"}, ValueError, "scale_layout must be one of"),
        ({"scale_layout": "linear"}, ValueError, r"scales must be of shape \(2, 20, 3\) for a tensor of shape"),
        ({"axis": "tokens"}, ValueError, r"codes must be of shape \(2, 48, 16\) for .*axis='tokens'.*, got \(2, 20, 24\)"),
        ({"format": "mxfp4"}, ValueError, r"codes must be of shape \(2, 20, 32\)"),
        ({"shape": (2, 20, 47)}, ValueError, "head_dim must be even and > 0, got 47"),
        ({"shape": (2, 20, 50)}, ValueError, r"codes must be of shape \(2, 20, 32\)"),
        ({"shape": (20, 48)}, ValueError, r"codes must be of shape \(20, 24\)"),
        ({"shape": (48,)}, ValueError, r"shape must be \(\.\.\., tokens, head_dim\), got \(48,\)"),
        (
            {"codes": np.zeros((2, 20, 24), np.int8)},
            TypeError,
            "codes must be an array of dtype uint8, got ndarray of dtype int8",
        ),
        ({"codes": None}, TypeError, "codes must be an array of dtype uint8, got NoneType of dtype none"),
        ({"scales": np.zeros((2, 512), np.float32)}, TypeError, "scales must be an array of dtype uint8"),
        ({"scales": np.zeros((2, 511), np.uint8)}, ValueError, r"scales must be of shape \(2, 512\)"),
        ({"scales": OtherArray((2, 512))}, TypeError, "scales must be an array of numpy, as codes is, got otherlib"),
        ({"global_scale": 2.0}, TypeError, "global_scale must be an array of dtype float32, got float of dtype none"),
        (
            {"global_scale": np.ones(())},
            TypeError,
            "global_scale must be an array of dtype float32, got ndarray of dtype float64",
        ),
        ({"global_scale": np.ones(2, np.float32)}, ValueError, r"global_scale must be of shape \(\) or \(1,\)"),
    ],
)
def test_validates_itself(qt, change, error, text):
    with pytest.raises(error, match=text):
        replace(qt, **change)


def test_mxfp4_has_no_global_scale():
    made = nvfp4.quantize(np.ones((2, 32), np.float32), format="mxfp4")
    with pytest.raises(ValueError, match="global_scale must be None for 'mxfp4', got an array"):
        replace(made, global_scale=np.ones((), np.float32))


def test_arrays_of_another_library():
    """Shapes and dtype names are all that is asked of an array."""
    other = QuantizedTensor(
        codes=OtherArray((20, 24)),
        scales=OtherArray((20, 3)),
        format="nvfp4",
        axis="head_dim",
        scale_layout="linear",
        global_scale=OtherArray((1,), "torch.float32"),
        shape=[np.int64(20), 48],
    )
    assert other.shape == (20, 48)
    assert other.nbytes == 20 * 24 + 20 * 3 + 4
    for function in (nvfp4.dequantize, lambda x: nvfp4.relayout(x, "linear")):
        with pytest.raises(TypeError, match=r"qt\.codes must be a NumPy array, got OtherArray; copy the arrays to NumPy"):
            function(other)
