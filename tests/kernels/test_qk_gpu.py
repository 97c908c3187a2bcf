"""Q K^T and the probes on a GPU, against float64 on the dequantised inputs."""

import numpy as np
import pytest

from nbfmha import quantization, reference
from nbfmha.kernels import probe
from nbfmha.kernels.qk import HEAD_DIMS, SCALES_IN, qk
from nbfmha.scale_layouts import SCALE_LAYOUTS
from nbfmha.testing import accumulation_budget, assert_close
from ptx_inline.toolchain.launcher import current_device, device_target

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["blockscale", "dequant"])
def implementation(gpu, request):
    if request.param == "blockscale" and not device_target(current_device()).has_block_scale_mma:
        pytest.skip(f"the block-scale MMA needs sm_120a, this GPU is {device_target(current_device())}")
    return request.param


def values_of(qt):
    """Dequantised values, float64, wherever the tensor lies."""
    values = quantization.dequantize(qt)
    return (values if isinstance(values, np.ndarray) else values.cpu().numpy()).astype(np.float64)


def budget(q, k):
    """Error that f32 accumulation in MMA steps of 16 can explain."""
    a, b = np.abs(values_of(q)), np.abs(values_of(k))
    b = np.repeat(b, int(np.prod(a.shape[:-2])) // max(1, int(np.prod(b.shape[:-2]))), axis=-3) if b.ndim > 2 else b
    magnitude = a @ np.swapaxes(b, -1, -2)
    largest = a.max(-1)[..., :, None] * b.max(-1)[..., None, :]
    return accumulation_budget(magnitude, largest, steps=-(-q.shape[-1] // 16), addends=17, fraction_bits=25)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("scale_layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("scales_in", SCALES_IN)
def test_against_float64(gpu, implementation, head_dim, scale_layout, scales_in):
    generator = gpu.Generator().manual_seed(head_dim)

    def draw(heads, tokens):
        x = gpu.randn(heads, tokens, head_dim, generator=generator)
        return (x * gpu.exp2(gpu.randint(-6, 7, (heads, tokens, 1), generator=generator))).half().cuda()

    problems = [(1, 1, 1, 1, None), (6, 2, 65, 130, None), (2, 2, 200, 7, 0.01), (1, 1, 64, 64, None)]
    for heads_q, heads_kv, m, n, g in problems:
        q, k = (
            quantization.quantize(draw(heads, tokens), scale_layout=scale_layout, global_scale=g)
            for heads, tokens in ((heads_q, m), (heads_kv, n))
        )
        scores = qk(q, k, implementation=implementation, scales_in=scales_in).cpu().numpy()
        a, b = values_of(q), values_of(k)
        expected = a @ np.repeat(b, heads_q // heads_kv, 0).swapaxes(-1, -2)
        slack = 2.0**-22 * np.abs(expected) if g else 0  # the two global scales are rounded products
        assert_close(scores, expected, budget(q, k) + slack, what=f"{heads_q}/{heads_kv} heads, {m} x {n} x {head_dim}")


def test_random_e2m1_with_unit_scales_is_exact(gpu, implementation):
    rng = np.random.default_rng(1)
    q, k = (quantization.quantize(gpu.ones(90, 128, dtype=gpu.float16, device="cuda")) for _ in range(2))
    for tensor in (q, k):
        tensor.scales.fill_(0x38)
        tensor.codes.copy_(gpu.from_numpy(rng.integers(0, 256, tuple(tensor.codes.shape)).astype(np.uint8)))
    expected = reference.qk(values_of(q), values_of(k))
    assert_close(qk(q, k, implementation=implementation).cpu().numpy(), expected, what="random E2M1")


def test_numpy_tensors_go_to_the_gpu_and_back(gpu, implementation):
    x = np.random.default_rng(2).standard_normal((70, 64)).astype(np.float16)
    q = quantization.quantize(x)
    scores = qk(q, q, implementation=implementation)
    assert isinstance(scores, np.ndarray)
    assert_close(scores, reference.qk_quantized(q, q), budget(q, q), what="numpy")


def run_probe(gpu, mma, a, b, c, sfa, sfb, **selectors):
    tiles = a.shape[0]
    words = [gpu.from_numpy(np.ascontiguousarray(t).view(np.int32)).cuda() for t in (a, b, sfa, sfb)]
    c, d = gpu.from_numpy(np.ascontiguousarray(c)).cuda(), gpu.empty(tiles, 32, 4, device="cuda")
    kernel = probe.probe_kernel(mma, **selectors)
    kernel.launch((tiles,), (32,), (words[0], words[1], c, words[2], words[3], d))
    return d.cpu().numpy()


def test_zero_a_gives_exact_zero(gpu, implementation):
    rng = np.random.default_rng(3)
    shape = (16, 32)
    b = rng.integers(0, 2**32, (*shape, 2), np.uint32)
    scales = np.full(shape, 0x38383838, np.uint32)
    zero = np.zeros((*shape, 4), np.uint32)
    d = run_probe(gpu, implementation, zero, b, zero.view(np.float32), scales, scales)
    assert (d.view(np.uint32) == 0).all()


@pytest.mark.parametrize("mma", ["f16", "bf16"])
def test_16_bit_mma_is_bit_identical_to_the_model(gpu, mma):
    """Every bit of 1e5 random tiles: the accumulation model is a claim about silicon, and this silicon can be asked."""
    from ptx_inline.isa.arithmetic import mma_registers

    if device_target(current_device()).major < 9:
        pytest.skip("the model is Hopper's; Ampere and Ada add 8 products at a time (arXiv 2511.10909)")
    rng = np.random.default_rng(4)
    tiles = 50_000

    def draw(registers, spread):
        shape = (tiles, 32, registers, 2)
        x = rng.standard_normal(shape) * np.exp2(rng.integers(-spread, spread + 1, shape))
        if mma == "f16":
            return x.astype(np.float16).view(np.uint32)[..., 0]
        return (x.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.uint32)[..., 0]

    for spread in (0, 8):
        a, b = draw(4, spread), draw(2, spread)
        c = rng.standard_normal((tiles, 32, 4)).astype(np.float32)
        unused = np.zeros((tiles, 32), np.uint32)
        got = run_probe(gpu, mma, a, b, c, unused, unused)
        expected = mma_registers(f"m16n8k16.{mma}", a, b, c, None, None)
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    # any bits at all: NaN, Inf and subnormals among them
    a, b, c = (rng.integers(0, 2**32, (tiles, 32, n), np.uint32) for n in (4, 2, 4))
    got = run_probe(gpu, mma, a, b, c.view(np.float32), unused, unused)
    expected = mma_registers(f"m16n8k16.{mma}", a, b, c.view(np.float32), None, None)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("thread_id_a", range(2))
@pytest.mark.parametrize("thread_id_b", range(4))
def test_scale_selectors(gpu, implementation, thread_id_a, thread_id_b):
    from ptx_inline.isa.arithmetic import mma_registers

    rng = np.random.default_rng(5)
    shape = (64, 32)
    a, b = (rng.integers(0, 2**32, (*shape, n), np.uint32) for n in (4, 2))
    # scales 2^0 .. 2^3: every sum is exact in f32, so both implementations must agree to the bit
    sfa, sfb = (
        (rng.integers(7, 11, (*shape, 4)).astype(np.uint8) << np.uint8(3)).view(np.uint32)[..., 0] for _ in range(2)
    )
    c = np.zeros((*shape, 4), np.float32)
    selectors = {"thread_id_a": thread_id_a, "thread_id_b": thread_id_b}
    got = run_probe(gpu, implementation, a, b, c, sfa, sfb, **selectors)
    np.testing.assert_array_equal(got, mma_registers("m16n8k64.mxf4nvf4.4x", a, b, c, sfa, sfb, **selectors))
