"""``nbfmha.attention`` through pre-pass and forward kernel: one body on the emulator and on a GPU, then what torch adds."""

import ml_dtypes
import numpy as np
import pytest
from devices import EmulatedDevice, GpuDevice

import nbfmha
from nbfmha.problem import Problem
from nbfmha.recipe import Recipe
from nbfmha.recipe_model import recipe_attention

SINKS = np.array([-2.0, 0.0, 1.0, 3.0], np.float32)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    return EmulatedDevice() if request.param == "emulated" else GpuDevice(request.getfixturevalue("gpu"))


def make(dtype=np.float16, batch=(1,), lengths=(70, 330), head_dim=64):
    rng = np.random.default_rng(0)
    (seqlen_q, seqlen_k), heads = lengths, (4, 2)
    q = rng.standard_normal((*batch, heads[0], seqlen_q, head_dim)) + 0.5
    k = rng.standard_normal((*batch, heads[1], seqlen_k, head_dim)) + rng.standard_normal(head_dim)
    v = rng.standard_normal((*batch, heads[1], seqlen_k, head_dim))
    return [x.astype(dtype) for x in (q, k, v)]


def turned(*arrays):
    return [np.ascontiguousarray(x.swapaxes(-2, -3)) for x in arrays]


def assert_close(out, lse, expected_out, expected_lse, ulp=2.0**-11):
    """Within the rounding of P and of the output to 16 bits; another recipe is a hundred times that away."""
    error = np.linalg.norm(out - expected_out) / np.linalg.norm(expected_out)
    assert error < 2 * ulp, f"relative L2 {error:.2g}"
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_as_the_model_says(device, layout):
    q, k, v = make()
    options = {"causal": True, "window": (200, None)}
    expected = recipe_attention(q, k, v, Problem.of(q, k, v, has_sinks=True, **options), sinks=SINKS)
    arrays = [device.to_device(x) for x in (turned(q, k, v) if layout == "bshd" else (q, k, v))]
    out = device.empty(arrays[0].shape, "float16")
    options |= {"layout": layout, "sinks": device.to_device(SINKS)}
    got, lse = nbfmha.attention(*arrays, **options, out=out, return_lse=True)
    assert got is out
    assert tuple(lse.shape) == (1, 4, 70)
    host = device.to_host(out)
    assert_close(host.swapaxes(-2, -3) if layout == "bshd" else host, device.to_host(lse), *expected)
    # sinks in NumPy and another float dtype, an output of its own
    again = nbfmha.attention(*arrays, **options | {"sinks": SINKS.astype(np.float64)})
    assert type(again) is type(out)
    np.testing.assert_array_equal(device.to_host(again), host)


def test_the_contract_runs_where_there_is_block_scaling(device):
    q, k, v = (device.to_device(x) for x in make())
    out = device.empty(q.shape, "float16")
    ran = nbfmha.fmha_prefill_blockscale(q, k, v, out, causal=True)
    assert ran is nbfmha.explain(q, k, v, causal=True)["blockscale"].runs
    expected = device.to_host(nbfmha.attention(q, k, v, causal=True))
    assert np.array_equal(device.to_host(out), expected) if ran else not np.isfinite(device.to_host(out)).any()


def test_the_contract_of_legacy(device):
    """It runs where the plain FP4 MMA is; "auto" takes it there, as no other runs its recipe."""
    q, k, v = make()
    arrays, out = [device.to_device(x) for x in (q, k, v)], device.empty(q.shape, "float16")
    explanation = nbfmha.explain(*arrays, causal=True, recipe="legacy")
    ran = nbfmha.fmha_prefill_legacy(*arrays, out, causal=True)
    assert ran is explanation["legacy"].runs
    assert explanation.auto == ("legacy" if ran else None)
    host = device.to_host(out)
    if not ran:
        assert not np.isfinite(host).any()
        return
    expected, _ = recipe_attention(q, k, v, Problem.of(q, k, v, causal=True), "legacy")
    assert np.linalg.norm(host - expected) < 2e-3 * np.linalg.norm(expected)
    if isinstance(device, EmulatedDevice):
        by_name = nbfmha.attention(q, k, v, causal=True, recipe="legacy", impl="emulated")
        np.testing.assert_array_equal(by_name, host)


def test_emulated_by_name_is_the_machine_of_the_tests():
    q, k, v = make()
    device = EmulatedDevice()
    options = {"causal": True, "window": (200, None), "return_lse": True}
    out, lse = nbfmha.attention(q, k, v, sinks=SINKS, impl="emulated", **options)
    arrays = [device.to_device(x) for x in (q, k, v, SINKS)]
    expected, expected_lse = nbfmha.attention(*arrays[:3], sinks=arrays[3], **options)
    assert (type(out), out.dtype) == (np.ndarray, np.float16)
    np.testing.assert_array_equal(out, expected.copy_to_host())
    np.testing.assert_array_equal(lse, expected_lse.copy_to_host())


@pytest.mark.slow
def test_emulated_bfloat16():
    q, k, v = make(ml_dtypes.bfloat16)
    recipe = Recipe(qk="f16", v_format="f16")
    expected = recipe_attention(q, k, v, Problem.of(q, k, v, causal=True), recipe)
    given = np.empty_like(turned(q)[0])
    options = {"layout": "bshd", "causal": True, "recipe": recipe, "impl": "emulated", "return_lse": True}
    out, lse = nbfmha.attention(*turned(q, k, v), **options, out=given)
    assert out is given
    assert_close(out.swapaxes(-2, -3).astype(float), lse, *expected, ulp=2.0**-8)


def test_emulated_torch_tensors(torch):
    q, k, v = make()
    options = {"causal": True, "window": (200, None), "impl": "emulated", "return_lse": True}
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    out, lse = nbfmha.attention(*tensors, sinks=torch.from_numpy(SINKS), **options)
    expected, expected_lse = nbfmha.attention(q, k, v, sinks=SINKS, **options)
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(lse.numpy(), expected_lse)
    bf16 = [x.bfloat16() for x in tensors]
    options |= {"recipe": Recipe(qk="f16", v_format="f16"), "out": torch.empty_like(bf16[0])}
    out, _ = nbfmha.attention(*bf16, **options)
    assert out is options["out"]
    expected = nbfmha.attention(*bf16, causal=True, window=(200, None), recipe=options["recipe"])
    torch.testing.assert_close(out, expected, rtol=2.0**-7, atol=1e-4)


@pytest.mark.gpu
class TestTorch:
    def run(self, gpu, q, k, v, **options):
        return nbfmha.attention(*(gpu.from_numpy(x).cuda() for x in (q, k, v)), **options)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_views_of_a_fused_projection(self, gpu, dtype):
        fused = gpu.randn(2, 70, 3, 4, 64, device="cuda").to(getattr(gpu, dtype))
        before = fused.clone()
        q, k, v = fused.unbind(2)
        out, lse = nbfmha.attention(q, k, v, layout="bshd", causal=True, return_lse=True)
        assert (out.dtype, out.device, out.shape, out.is_contiguous()) == (q.dtype, q.device, q.shape, True)
        assert gpu.equal(fused, before)
        copies = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        expected, expected_lse = nbfmha.attention(*copies, causal=True, return_lse=True)
        assert gpu.equal(out, expected.transpose(1, 2))
        assert gpu.equal(lse, expected_lse)

    def test_leading_axes_and_expanded_keys(self, gpu):
        q = gpu.randn(2, 3, 4, 70, 64, device="cuda", dtype=gpu.float16)
        k, v = (gpu.randn(1, 1, 2, 130, 64, device="cuda", dtype=gpu.float16).expand(2, 3, 2, 130, 64) for _ in range(2))
        expected = nbfmha.attention(q, k.contiguous(), v.contiguous())
        assert gpu.equal(nbfmha.attention(q, k, v), expected)

    def test_packed_sequences(self, gpu):
        q, k, v = gpu.randn(3, 200, 4, 64, device="cuda", dtype=gpu.float16)
        edges = gpu.tensor([0, 70, 70, 200], device="cuda", dtype=gpu.int32)
        options = {"layout": "bshd", "causal": True, "return_lse": True}
        out, lse = nbfmha.attention(q, k, v, cu_seqlens_q=edges, cu_seqlens_k=edges, **options)
        for first, stop in ((0, 70), (70, 200)):
            one, one_lse = nbfmha.attention(*(x[first:stop] for x in (q, k, v)), **options)
            assert gpu.equal(out[first:stop], one)
            assert gpu.equal(lse[:, first:stop], one_lse)

    def test_on_the_current_stream(self, gpu):
        """Inputs that are still being made there: nothing is read before, nothing is queued elsewhere."""
        q, k, v = make(batch=(2,), lengths=(256, 256))
        expected = self.run(gpu, q, k, v, causal=True)
        gpu.cuda.synchronize()
        with gpu.cuda.stream(gpu.cuda.Stream()):
            tensors = [gpu.zeros(x.shape, dtype=gpu.float16, device="cuda") for x in (q, k, v)]
            values = [gpu.from_numpy(x).pin_memory() for x in (q, k, v)]
            gpu.cuda._sleep(20_000_000)
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value, non_blocking=True)
            out = nbfmha.attention(*tensors, causal=True)
            gpu.cuda.current_stream().synchronize()
        assert gpu.equal(out, expected)

    def test_output_of_the_caller(self, gpu):
        q, k, v = make(batch=(2,))
        wide = gpu.full((2, 4, 70, 128), 7.0, device="cuda", dtype=gpu.float16)
        out = self.run(gpu, q, k, v, out=wide[..., 64:])
        assert out.data_ptr() == wide[..., 64:].data_ptr()
        assert gpu.equal(out, self.run(gpu, q, k, v))
        assert (wide[..., :64] == 7).all()

    def test_what_cannot_be_read_in_place(self, gpu):
        q = gpu.randn(2, 4, 70, 64, device="cuda", dtype=gpu.float16)
        with pytest.raises(
            ValueError, match=r"k must be an array whose last axis is contiguous, .*; call k.contiguous\(\)"
        ):
            nbfmha.attention(q, q.transpose(-1, -2).contiguous().transpose(-1, -2), q)
        odd = gpu.zeros(q.numel() + 1, device="cuda", dtype=gpu.float16)[1:].view(q.shape)
        with pytest.raises(ValueError, match=r"v must be at an address that is a multiple of 16, .*; call v.clone\(\)"):
            nbfmha.attention(q, q, odd)
        with pytest.raises(ValueError, match=r"k must be where q is \(torch, on GPU 0\), got torch, in host memory"):
            nbfmha.attention(q, q.cpu(), q)
        with pytest.raises(
            nbfmha.dispatch.Unavailable, match="'reference': the arrays are in GPU memory; copy them to the h"
        ):
            nbfmha.attention(q, q, q, impl="reference")

    def test_inference_with_parameters(self, gpu):
        q, k, v = (x.requires_grad_() for x in gpu.randn(3, 2, 4, 70, 64, device="cuda", dtype=gpu.float16).unbind(0))
        with pytest.raises(ValueError, match="q must be without requires_grad"):
            nbfmha.attention(q, k, v)
        sinks = gpu.nn.Parameter(gpu.zeros(4, device="cuda", dtype=gpu.bfloat16))
        with gpu.inference_mode():
            out = nbfmha.attention(q, k, v, sinks=sinks)
        assert not out.requires_grad
