"""``QuantizedTensor``s in place of q, k and v: kernels against float64 attention on what they stand for, one body for the
emulator and a GPU. Whoever runs a call, nothing is lost but the rounding of P and of the output."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from devices import EmulatedDevice, GpuDevice

import nbfmha
from nbfmha import gpu_arrays, reference
from nbfmha.dispatch import Unavailable
from nbfmha.quantized_tensor import QuantizedTensor

SINKS = np.array([-2.0, 0.0, 1.0, 3.0], np.float32)
KEYS = {"k": {}, "v": {"axis": "tokens"}}
ALL = {"q": {}, **KEYS}
ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-11}  # of P, in float16 where the output is float32


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    return EmulatedDevice() if request.param == "emulated" else GpuDevice(request.getfixturevalue("gpu"))


def make(dtype=np.float16, batch=(1,), lengths=(70, 330), head_dim=64, layout="bhsd"):
    """q, k, v of 4 heads on 2, by name."""
    rng = np.random.default_rng(0)
    (seqlen_q, seqlen_k), mean = lengths, rng.standard_normal(head_dim)
    arrays = {
        "q": rng.standard_normal((*batch, 4, seqlen_q, head_dim)) + 0.5,
        "k": rng.standard_normal((*batch, 2, seqlen_k, head_dim)) + mean,
        "v": rng.standard_normal((*batch, 2, seqlen_k, head_dim)) + 0.25,
    }
    swapped = {name: x.swapaxes(-2, -3) if layout == "bshd" else x for name, x in arrays.items()}
    return {name: np.ascontiguousarray(x).astype(dtype) for name, x in swapped.items()}


def quantized(arrays, **chosen):
    """The operands, those of ``chosen`` quantised with its options; MXFP4 of values that leave float16's range."""
    operands = dict(arrays)
    for name, options in chosen.items():
        operands[name] = nbfmha.quantize(arrays[name].astype(np.float32), **options)
    return list(operands.values())


def values(operands, layout="bhsd"):
    """What they stand for, in float64 and "bhsd"."""
    found = [nbfmha.dequantize(x) if isinstance(x, QuantizedTensor) else x for x in operands]
    return [(x.swapaxes(-2, -3) if layout == "bshd" else x).astype(np.float64) for x in found]


def on(device, operands):
    return [x.with_arrays(device.to_device) if isinstance(x, QuantizedTensor) else device.to_device(x) for x in operands]


def check(device, operands, *, dtype="float32", impl="auto", layout="bhsd", sinks=None, **options):
    """Runs ``operands`` on the device into a poisoned output; compares with float64 on what they stand for."""
    options |= {} if sinks is None else {"sinks": sinks}
    expected, expected_lse = reference.attention(*values(operands, layout), **options, return_lse=True)
    moved = on(device, operands)
    out = device.empty(operands[0].shape, dtype)
    got, lse = nbfmha.attention(*moved, **options, impl=impl, layout=layout, out=out, return_lse=True)
    assert got is out
    host = device.to_host(out)
    host, lse = host.swapaxes(-2, -3) if layout == "bshd" else host, device.to_host(lse)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    error = np.linalg.norm(host - expected) / np.linalg.norm(expected)
    assert error < 2 * ULP[dtype], f"relative L2 {error:.2g}"
    # row by row too: each key may be off by half an ulp of the largest weight, each output by half an ulp
    bound = 2 * ULP[dtype] * np.abs(values(operands, layout)[2]).max()
    assert np.abs(host - expected).max() < bound
    return host


class TestAllThree:
    """The codes themselves go to the block-scale MMA where there is one."""

    @pytest.mark.parametrize(
        ("options", "lengths"),
        [
            ({"causal": True}, (70, 330)),
            ({"window": (90, 20), "sinks": SINKS}, (150, 128)),
            ({"cu_seqlens_q": (0, 10, 10, 75, 90), "cu_seqlens_k": (0, 48, 144, 144, 301), "causal": True}, (90, 301)),
            ({}, (3, 1)),
        ],
        ids=["causal", "whole tiles", "packed", "one key"],
    )
    def test_stand_for_their_values(self, device, options, lengths):
        operands = quantized(make(lengths=lengths), **ALL)
        assert nbfmha.explain(*on(device, operands), **options).auto == device.implementation
        check(device, operands, **options)

    @pytest.mark.parametrize("scale_layout", ["blocked_128x4", "interleaved_64"])
    def test_scales_in_other_layouts(self, device, scale_layout):
        operands = quantized(make(batch=(2,)), **ALL)
        moved = [nbfmha.relayout(x, scale_layout) for x in operands]
        np.testing.assert_array_equal(check(device, moved, causal=True), check(device, operands, causal=True))

    def test_four_over_six_and_scales_of_every_size(self, device):
        arrays = make(lengths=(65, 200))
        arrays["v"] *= np.float16(2.0) ** np.arange(-12, 4)[np.arange(64) % 16]  # down to subnormal scales
        operands = quantized(arrays, q={"scale": "four_over_six"}, k={}, v={"axis": "tokens", "scale": "four_over_six"})
        check(device, operands, softmax_scale=0.05)

    def test_no_keys(self, device):
        q, k, v = on(device, quantized(make(lengths=(70, 0)), **ALL))
        out, lse = nbfmha.attention(q, k, v, return_lse=True)
        assert (device.to_host(out) == 0).all()
        assert np.isneginf(device.to_host(lse)).all()

    def test_a_nan_reaches_the_rows_that_see_it(self, device):
        operands = quantized(make(), **ALL)
        operands[1].scales[0, 0, 290, 2] = 0x7F
        q, k, v = on(device, operands)
        out = device.to_host(nbfmha.attention(q, k, v, causal=True))
        seen = np.arange(70) + 260 >= 290
        assert np.isnan(out[:, :2, seen]).all()
        assert np.isfinite(out[:, :2, ~seen]).all()
        assert np.isfinite(out[:, 2:]).all()

    def test_inputs_are_not_changed(self, device):
        operands = quantized(make(lengths=(70, 128)), **ALL)
        moved = on(device, operands)
        nbfmha.attention(*moved)
        for before, after in zip(operands, moved, strict=True):
            np.testing.assert_array_equal(device.to_host(after.codes), before.codes)
            np.testing.assert_array_equal(device.to_host(after.scales), before.scales)

    def test_scales_that_the_kernel_cannot_read_in_place(self, monkeypatch):
        """Q and V at odd addresses: they are moved, though their shapes would do as they are."""
        device, operands = EmulatedDevice(), quantized(make(lengths=(70, 128)), **ALL)
        expected = check(device, operands)
        launches, launch = [], gpu_arrays.launch
        monkeypatch.setattr(gpu_arrays, "launch", lambda *args: launches.append(launch(*args)))
        np.testing.assert_array_equal(check(device, operands), expected)
        assert len(launches) == 2  # K, prefill
        monkeypatch.setattr(gpu_arrays, "is_aligned", lambda array, multiple: multiple == 8)
        np.testing.assert_array_equal(check(device, operands), expected)
        assert len(launches) == 2 + 4

    @pytest.mark.slow
    @pytest.mark.parametrize("head_dim", [96, 128])
    @pytest.mark.parametrize("impl", ["auto", "dequant"])
    def test_head_dims(self, device, head_dim, impl):
        operands = quantized(make(lengths=(70, 150), head_dim=head_dim), **ALL)
        check(device, operands, impl=impl, causal=True)


class TestDequantised:
    @pytest.mark.parametrize("chosen", [KEYS, {"q": {}}, {"k": {}, "v": {}}], ids=["k and v", "q", "v along head_dim"])
    def test_beside_float16(self, device, chosen):
        check(device, quantized(make(), **chosen), dtype="float16", causal=True, sinks=SINKS)

    def test_packed_anywhere(self, device):
        """Sequences that begin inside a block of 16 tokens."""
        edges = {"cu_seqlens_q": (0, 30, 70), "cu_seqlens_k": (0, 130, 330)}
        check(device, quantized(make(), **ALL), **edges)

    def test_alone_by_name(self, device):
        operands = quantized(make(batch=(2,)), **ALL)
        exact = check(device, operands, impl="dequant", causal=True)
        # both ways multiply the same numbers
        np.testing.assert_allclose(check(device, operands, causal=True), exact, atol=2.0**-10)

    def test_tokens_before_heads(self, device):
        chosen = ALL | {"k": {"scale_layout": "blocked_128x4"}}
        operands = quantized(make(layout="bshd", batch=(2,)), **chosen)
        check(device, operands, layout="bshd", causal=True)

    def test_beside_float32(self, device):
        arrays = make(np.float32)
        arrays["q"] = arrays["q"].astype(np.float16).astype(np.float32)  # float32 is rounded to float16 first
        check(device, quantized(arrays, **KEYS), causal=True)

    @pytest.mark.slow
    def test_beside_bfloat16(self, device):
        arrays = make(ml_dtypes.bfloat16)
        wide = arrays | {"k": arrays["k"].astype(np.float32) * 2.0**20}
        options = {"dtype": "bfloat16", "causal": True}
        check(device, quantized(wide, k={"format": "mxfp4"}, v={}), softmax_scale=2.0**-23, **options)
        # float16 would have made infinities, and zeros of these
        small = arrays | {"v": arrays["v"].astype(np.float32) * 2.0**-30}
        check(device, quantized(small, k={}, v={"format": "mxfp4", "axis": "tokens"}), **options)


class TestInHostMemory:
    """``impl="emulated"`` copies them to a machine for sm_120a."""

    def test_numpy(self):
        operands = quantized(make(), **ALL)
        out, lse = nbfmha.attention(*operands, causal=True, impl="emulated", return_lse=True)
        machine = EmulatedDevice()
        expected, expected_lse = nbfmha.attention(*on(machine, operands), causal=True, return_lse=True)
        assert (type(out), out.dtype) == (np.ndarray, np.float32)
        np.testing.assert_array_equal(out, expected.copy_to_host())
        np.testing.assert_array_equal(lse, expected_lse.copy_to_host())

    def test_torch(self, torch):
        arrays = make()
        q, *keys = quantized(arrays, **KEYS)
        tensors = [torch.from_numpy(q), *(x.with_arrays(torch.from_numpy) for x in keys)]
        out = nbfmha.attention(*tensors, causal=True, impl="emulated")
        assert out.dtype == torch.float16
        np.testing.assert_array_equal(out.numpy(), nbfmha.attention(q, *keys, causal=True, impl="emulated"))


AXES = "the block-scale MMA takes scales along head_dim of q and k and along tokens of v (layout 'bhsd')"


class TestWhoRunsThem:
    def explain(self, arch="sm_120a", layout="bhsd", dtype=np.float16, options=None, **chosen):
        operands = quantized(make(dtype, layout=layout), **chosen)
        return nbfmha.explain(*on(EmulatedDevice(arch), operands), layout=layout, **(options or {}))

    @pytest.mark.parametrize(
        ("call", "reason"),
        [
            (KEYS, "the block-scale MMA reads codes of q, k and v alike, but q came as an array"),
            ({"k": {}}, "the block-scale MMA reads codes of q, k and v alike, but q and v came as an array"),
            (
                {"q": {}, "k": {}, "v": {}},
                f"{AXES}, but they lie along head_dim, head_dim, head_dim",
            ),
            (
                ALL | {"layout": "bshd"},
                f"{AXES}, but they lie along head_dim, head_dim, heads",
            ),
            (
                ALL | {"options": {"cu_seqlens_q": [0, 30, 70], "cu_seqlens_k": [0, 100, 330]}},
                "V's blocks of 16 tokens must not reach over two sequences, but cu_seqlens_k has one begin at 100",
            ),
            (
                ALL | {"arch": "sm_90a"},
                "the block-scale MMA needs sm_120a or sm_121a, this is sm_90a",
            ),
        ],
        ids=["beside q", "k alone", "v along head_dim", "bshd", "packed", "sm_90a"],
    )
    def test_dequant_where_the_mma_cannot_read_the_codes(self, call, reason):
        explanation = self.explain(**call)
        assert explanation["blockscale"].reason == reason
        assert explanation.auto == "dequant"
        assert explanation["emulated"].reason.startswith("the PTX of dequant for sm_")

    def test_the_mma_where_it_can(self):
        for options in ({}, {"cu_seqlens_q": [0, 30, 70, 70], "cu_seqlens_k": [0, 112, 330, 330]}):
            explanation = self.explain(**ALL, options=options)
            assert explanation.auto == "blockscale"
            assert explanation["emulated"].reason.startswith("the PTX of blockscale for sm_120a")
            assert ", quantised already; an emulated sm_120a" in explanation.call

    def test_what_no_kernel_takes(self):
        scaled = self.explain(q={}, k={"global_scale": "amax"}, v={"axis": "tokens", "global_scale": 2.0})
        reason = (
            "k and v came with a global_scale, whose products 16 bits do not hold; pass them without it, multiply "
            "softmax_scale by those of q and k, and the output by that of v"
        )
        wide = self.explain(k={"format": "mxfp4"})
        assert wide["dequant"].reason == (
            "k came in mxfp4, whose range float16 has not; nbfmha.dequantize makes arrays of them, and beside bfloat16 "
            "arrays they are taken"
        )
        assert [scaled[name].reason for name in ("blockscale", "dequant", "emulated")] == [reason] * 3
        assert (scaled.auto, wide.auto) == (None, None)
        assert self.explain(k={"format": "mxfp4"}, dtype=ml_dtypes.bfloat16).auto == "dequant"
        odd = self.explain(q={"format": "mxfp4"}, k={"format": "mxfp4"}, v={"format": "mxfp4", "axis": "tokens"})
        assert odd["blockscale"].reason == "the kernels' block-scale MMA is that of nvfp4, but q and k and v came in mxfp4"

    def test_legacy_takes_none(self):
        reason = "f8f6f4 has one scale a row, QuantizedTensors one for 16 or 32 elements; nbfmha.dequantize makes arrays"
        assert [self.explain(**chosen)["legacy"].reason for chosen in (ALL, KEYS)] == [reason] * 2
        q, k, v = on(EmulatedDevice(), quantized(make(), **ALL))
        out = q.codes.machine.empty(q.shape, "float32")
        assert nbfmha.fmha_prefill_legacy(q, k, v, out) is False
        assert out.content is None

    def test_problems_are_still_the_kernels(self):
        operands = on(EmulatedDevice(), quantized(make(head_dim=80), **ALL))
        for name in ("blockscale", "dequant"):
            assert nbfmha.explain(*operands)[name].reason.startswith("head_dim must be one of 64, 96, 128, 256, got 80")

    def test_never_falls_back_by_name(self):
        q, k, v = on(EmulatedDevice(), quantized(make(), **KEYS))
        with pytest.raises(Unavailable, match=r"'blockscale': .* but q came as an array; 'dequant' and 'emulated' can run"):
            nbfmha.attention(q, k, v, impl="blockscale")
        out = q.machine.empty(q.shape, "float16")
        assert nbfmha.fmha_prefill_blockscale(q, k, v, out) is False
        assert out.content is None


class TestRefusals:
    def test_arrays_of_one_place(self):
        operands = quantized(make(), **ALL)
        q, k, v = on(EmulatedDevice(), operands)
        elsewhere = on(EmulatedDevice(), operands)
        with pytest.raises(ValueError, match=r"k\.codes must be on the machine of q, got another machine"):
            nbfmha.attention(q, elsewhere[1], v)
        object.__setattr__(v, "scales", elsewhere[2].scales)
        with pytest.raises(ValueError, match=r"v\.scales must be on the machine of q, got another machine"):
            nbfmha.attention(q, k, v)
        with pytest.raises(TypeError, match=r"v\.codes must be an array of numpy, as q is, got one of emulated"):
            nbfmha.attention(*operands[:2], v)

    def test_output_in_memory_of_its_own(self):
        q = np.zeros((1, 4, 32, 64), np.float32)
        qt = nbfmha.quantize(q)
        out = np.zeros(q.shape, np.float32)
        shared = replace(qt, codes=out.view(np.uint8).reshape(-1)[: qt.codes.size].reshape(qt.codes.shape))
        k, v = (nbfmha.quantize(np.ones((1, 2, 4, 64), np.float32)) for _ in range(2))
        with pytest.raises(ValueError, match="out must be in memory of its own, got memory that it shares with q"):
            nbfmha.attention(shared, k, v, out=out)

    @pytest.mark.gpu
    def test_what_cannot_be_read_in_place(self, gpu):
        operands = on(GpuDevice(gpu), quantized(make(), **ALL))
        q, k, v = operands
        spread = gpu.stack([k.codes, k.codes], dim=-1)[..., 0]
        with pytest.raises(ValueError, match=r"k\.codes must be contiguous, .*; copy it first"):
            nbfmha.attention(q, k.with_arrays(lambda x: spread if x is k.codes else x), v)
        odd = gpu.zeros(v.codes.numel() + 1, dtype=gpu.uint8, device="cuda")[1:].view(v.codes.shape)
        with pytest.raises(ValueError, match=r"v\.codes must be at an address that is a multiple of 8, got another; copy"):
            nbfmha.attention(q, k, v.with_arrays(lambda x: odd if x is v.codes else x))
