"""Strides of callers' arrays, as kernels take them. NumPy arrays stand for those in GPU memory: only strides are read."""

import numpy as np
import pytest

from nbfmha.emulated import Machine
from nbfmha.views import overlap, repeats_itself, strides_in_elements, view_of


def aligned(shape, dtype=np.float16, offset=0):
    """An array whose first byte lies ``offset`` after a multiple of 16."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 32, np.uint8)
    start = -memory.ctypes.data % 16 + offset
    return memory[start : start + size].view(dtype).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "layout", "strides"),
    [
        ((4, 70, 64), "bhsd", (0, 4480, 64)),
        ((70, 4, 64), "bshd", (0, 64, 256)),
        ((2, 4, 70, 64), "bhsd", (17920, 4480, 64)),
        ((2, 70, 4, 64), "bshd", (17920, 64, 256)),
        ((2, 3, 4, 70, 64), "bhsd", (17920, 4480, 64)),
        ((1, 1, 1, 70, 64), "bhsd", (0, 0, 64)),
        ((2, 1, 4, 1, 64), "bshd", (256, 0, 64)),
        ((0, 4, 70, 64), "bhsd", (0, 4480, 64)),
    ],
    ids=str,
)
def test_contiguous(shape, layout, strides):
    x = aligned(shape)
    view = view_of("q", x, layout, "float16", 16)
    assert view.array is x
    assert view.strides == strides
    assert view_of("q", Machine("sm_80").array(x), layout, "float16", 16).strides == strides


def test_strides_reach_the_elements():
    batch, tokens, heads, head_dim = 2, 5, 3, 8
    fused = aligned((batch, tokens, 3, heads, head_dim))
    fused[...] = np.arange(fused.size).reshape(fused.shape)
    for part in range(3):
        x = fused[:, :, part]
        view = view_of("q", x, "bshd", "float16", 16)
        for index in np.ndindex(batch, heads, tokens, head_dim):
            at = sum(i * stride for i, stride in zip(index, (*view.strides, 1), strict=True))
            b, h, t, c = index
            assert fused.reshape(-1)[part * heads * head_dim + at] == x[b, t, h, c]


def test_what_is_read_where_it_lies():
    x = aligned((2, 6, 4, 70, 64))
    assert view_of("q", x[:, ::2], "bhsd", "float16", 16).strides == (35840, 4480, 64)  # every other of 12
    assert view_of("q", x[0, :, ::2, ::-1], "bhsd", "float16", 16).strides == (17920, 8960, -64)
    shared = np.broadcast_to(x[0, :1], (5, 7, 4, 70, 64))
    assert view_of("k", shared, "bhsd", "float16", 16).strides == (0, 4480, 64)
    assert view_of("k", x[..., 8:16], "bhsd", "float16", 16).strides == (17920, 4480, 64)
    assert view_of("q", aligned((3, 70, 4), np.float32), "bhsd", "float32", 16).strides == (0, 280, 4)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (aligned((4, 64, 70)).swapaxes(1, 2), "q must be an array whose last axis is contiguous, got shape (4, 70, 64) "
                                              "with strides (4480, 1, 70) in elements; copy it first"),
        (aligned((2, 4, 3, 5, 64))[:, :2], "q must be an array whose leading axes are evenly spaced, as one batch axis"),
        (aligned((4, 70, 68))[..., :64], "q must be an array with strides that are multiples of 8, got shape"),
        (aligned((4, 70, 64), offset=2), "q must be at an address that is a multiple of 16, got another; copy it first"),
    ],
    ids=["transposed", "batch", "pitch", "address"],
)  # fmt: skip
def test_what_needs_a_copy(x, text):
    with pytest.raises(ValueError, match="q must be") as error:
        view_of("q", x, "bhsd", "float16", 16)
    assert str(error.value).startswith(text)


def test_outputs_need_less():
    assert view_of("out", aligned((4, 70, 68), offset=4)[..., :64], "bhsd", "float16", 4).strides == (0, 4760, 68)
    with pytest.raises(ValueError, match="out must be an array with strides that are multiples of 2"):
        view_of("out", aligned((4, 70, 65))[..., :64], "bhsd", "float16", 4)


def test_torch_tensors(torch):
    x = torch.zeros(2, 70, 3, 4, 64, dtype=torch.bfloat16)
    q = x[:, :, 1]
    view = view_of("q", q, "bshd", "bfloat16", 16)
    assert (view.array is q, view.strides) == (True, (53760, 64, 768))
    with pytest.raises(ValueError, match=r"last axis is contiguous, got .*; call q.contiguous\(\)"):
        view_of("q", q.transpose(-1, -2), "bhsd", "bfloat16", 16)
    odd = torch.zeros(4 * 70 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 70, 64)
    with pytest.raises(
        ValueError, match=r"q must be at an address that is a multiple of 16, got another; call q.clone\(\)"
    ):
        view_of("q", odd, "bhsd", "bfloat16", 16)


def test_overlap():
    x = np.zeros((4, 6, 8), np.float16)
    assert overlap(x, x[3])
    assert overlap(x[::-1], x[0])
    assert not overlap(x[0], x[1])
    assert not overlap(x[:0], x)
    assert not overlap(x, x.copy())
    machine = Machine("sm_80")
    one, other = machine.array(x), machine.array(x)
    assert overlap(one, one)
    assert not overlap(one, other)


@pytest.mark.parametrize(
    ("x", "repeats"),
    [
        (np.zeros((2, 3, 4)), False),
        (np.zeros((2, 3, 4))[::-1].T, False),
        (np.broadcast_to(np.zeros((1, 3, 4)), (2, 3, 4)), True),
        (np.broadcast_to(np.zeros((1, 3, 4)), (1, 3, 4)), False),
        (np.broadcast_to(np.zeros((1, 0, 4)), (2, 0, 4)), False),
        (np.lib.stride_tricks.sliding_window_view(np.zeros(9), 4), True),
    ],
    ids=["contiguous", "transposed", "expanded", "not expanded", "empty", "sliding"],
)
def test_repeats_itself(x, repeats):
    assert repeats_itself(x) is repeats


def test_strides_in_elements():
    assert strides_in_elements(np.zeros((3, 4, 6), np.float32)[:, ::2]) == (24, 12, 1)
    assert strides_in_elements(Machine("sm_80").array(np.zeros((3, 4, 6), np.float32))) == (24, 6, 1)
