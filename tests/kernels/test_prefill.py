"""The prefill kernel against the recipe's model on the same operands: one body, on the emulator and on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
from devices import EmulatedDevice, GpuDevice
from prefill_problems import SMOOTH, Call, run

from nbfmha.kernels.operands import stored_order
from nbfmha.kernels.prefill import prefill_kernel, shared_bytes, why_not
from nbfmha.problem import Problem
from nbfmha.recipe import PRESETS, Recipe
from ptx_inline.toolchain import Target

CAUSAL = {"causal": True}
ROUNDED = Recipe(smooth_k=True, smooth_q=128, pv="nvfp4", v_axis="tokens", row_sum="rounded", diagonal_tiles=0)
SIXTEEN = Recipe(qk="f16", v_format="f16")
LEGACY = PRESETS["legacy"]
LEGACY_SMOOTH = replace(LEGACY, smooth_q=64, diagonal_tiles=0, sink_tokens=64, row_sum="rounded")

SLOW = pytest.mark.slow

#: Few kernels, many shapes: what is compiled for one is used by the others.
CALLS = [
    Call(),
    Call(lengths=(100, 130), heads=(4, 2), options=CAUSAL),
    Call(lengths=(1, 300), options=CAUSAL, recipe=SMOOTH),
    Call(lengths=(130, 70), options=CAUSAL, recipe=SMOOTH, heads=(2, 1), batch=2),
    Call(lengths=(70, 200), options={"window": (50, 20)}, recipe=SMOOTH),
    Call(lengths=(70, 200), options={"q_offset": 3, "causal": True}, recipe=SMOOTH),
    Call(lengths=(33, 1), recipe=SMOOTH),
    Call(lengths=(5, 0)),
    Call(lengths=(0, 5)),
    Call(lengths=(150, 330), heads=(4, 2), options=CAUSAL, recipe=PRESETS["accurate"]),
    Call(lengths=(100, 400), options={"window": (200, 30)}, recipe=PRESETS["accurate"]),
    Call(
        lengths=(150, 420),
        heads=(2, 1),
        options={"cu_seqlens_q": (0, 20, 20, 90, 150), "cu_seqlens_k": (0, 130, 200, 200, 420), "causal": True},
        recipe=PRESETS["accurate"],
    ),
    Call(lengths=(70, 330), options=CAUSAL, recipe=PRESETS["fast"]),
    Call(lengths=(70, 200), recipe=PRESETS["sage3"]),
    Call(lengths=(140, 200), options=CAUSAL, recipe=PRESETS["sage3"], heads=(2, 2)),
    pytest.param(Call(lengths=(70, 200), options=CAUSAL, recipe=ROUNDED), marks=SLOW),
    pytest.param(Call(lengths=(70, 200), options={"window": (50, 20)}, recipe=SIXTEEN), marks=SLOW),
    Call(lengths=(64, 190), options={"window": (30, None), "causal": True, "softcap": 20.0}, recipe=SMOOTH),
    Call(lengths=(70, 65), options={"softcap": 5.0, "softmax_scale": 0.3}, recipe=SMOOTH, heads=(3, 1)),
    Call(lengths=(20, 70), options={"softmax_scale": -0.2}, recipe=SMOOTH),
    Call(lengths=(20, 70), options={"softmax_scale": 0.0, "causal": True}, recipe=SMOOTH),
    *(
        pytest.param(call, marks=SLOW)
        for call in (
            Call(128, lengths=(70, 200), options={"window": (90, 20)}, recipe=PRESETS["accurate"], dtype="bfloat16"),
            Call(96, lengths=(65, 129), options=CAUSAL, recipe=PRESETS["fast"], dtype="float32"),
            Call(256, lengths=(65, 129), options=CAUSAL, recipe=SMOOTH),
        )
    ),
]


#: By the plain FP4 MMA, which few GPUs have.
LEGACY_CALLS = [
    Call(lengths=(100, 130), heads=(4, 2), options=CAUSAL, recipe=LEGACY),
    Call(lengths=(70, 200), options={"window": (50, 20)}, recipe=LEGACY),
    Call(lengths=(130, 70), options=CAUSAL, recipe=LEGACY, heads=(2, 1), batch=2),
    Call(lengths=(5, 0), recipe=LEGACY),
    Call(lengths=(33, 1), recipe=LEGACY),
    pytest.param(Call(128, lengths=(70, 330), heads=(2, 1), recipe=LEGACY), marks=SLOW),
    Call(lengths=(150, 330), heads=(2, 1), options=CAUSAL, recipe=LEGACY_SMOOTH),
    Call(lengths=(100, 400), options={"window": (200, 30)}, recipe=LEGACY_SMOOTH),
    Call(
        lengths=(150, 420),
        heads=(2, 1),
        options={"cu_seqlens_q": (0, 20, 20, 90, 150), "cu_seqlens_k": (0, 130, 200, 200, 420), "causal": True},
        recipe=LEGACY_SMOOTH,
    ),
    pytest.param(Call(lengths=(70, 190), options={"softcap": 5.0, "causal": True}, recipe=LEGACY), marks=SLOW),
    *(
        pytest.param(call, marks=SLOW)
        for call in (
            Call(128, lengths=(70, 400), options=CAUSAL, recipe=LEGACY_SMOOTH, dtype="bfloat16"),
            Call(96, lengths=(65, 129), options=CAUSAL, recipe=LEGACY, dtype="float32"),
            Call(256, lengths=(65, 129), options=CAUSAL, recipe=LEGACY_SMOOTH),
        )
    ),
]


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """The sm_120a PTX on this CPU, or exact dequantisation on a GPU."""
    return EmulatedDevice() if request.param == "emulated" else GpuDevice(request.getfixturevalue("gpu"))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device_with_fp4(request):
    """The sm_120a PTX on this CPU, or a GPU that has the plain FP4 MMA."""
    if request.param == "emulated":
        return EmulatedDevice()
    torch = request.getfixturevalue("gpu")
    if torch.cuda.get_device_capability() not in ((12, 0), (12, 1)):
        pytest.skip("needs compute capability 12.0 or 12.1")
    return GpuDevice(torch)


def assert_attention(got_out, got_lse, out, lse, *, call=None):
    """Rows agree to a few ulp of P's rounding: where exp2 is off by 2 ulp, a P near a tie rounds the other way."""
    seen = np.isfinite(lse)
    np.testing.assert_array_equal(np.isneginf(got_lse), ~seen)
    np.testing.assert_allclose(got_lse[seen], lse[seen], rtol=0, atol=6e-6 * max(1.0, np.abs(lse[seen]).max(initial=1.0)))
    assert np.all(got_out[~seen] == 0)
    error = np.abs(got_out - out).max(axis=-1)
    # one P in f16 is off by 2^-11 of itself at most, and few are: far below the size of a wrong index, scale or mask. A P
    # in NVFP4 near a tie is off by a quarter of itself, a weight of a few hundredths at most in these inputs
    dtype, recipe = ("float32", Recipe()) if call is None else (call.dtype, call.recipe)
    rounding = {"float32": 2.0**-18, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    # of itself; in E4M3 by an eighth
    one_p = {"f16": 2.0**-11, "nvfp4": 2.0**-5, "e4m3": 2.0**-6}[recipe.pv]
    budget = (one_p + rounding) * np.abs(out).max(axis=-1, initial=0) + rounding + 2.0**-12
    worst = np.unravel_index(np.argmax(error - budget), error.shape) if error.size else None
    assert np.all(error <= budget), f"row {worst}: off by {error[worst]:.3g}, allowed {budget[worst]:.3g}"
    # and as a whole: ties are rare
    if out.size:
        relative = np.sqrt(np.sum((got_out - out) ** 2) / max(np.sum(out**2), 1e-30))
        assert relative < (5e-4 if recipe.pv == "f16" else 2e-3) + rounding, f"relative L2 {relative:.3g}"


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_equals_the_model(device, call):
    assert_attention(*run(device, call), call=call)


@pytest.mark.parametrize("call", LEGACY_CALLS, ids=str)
def test_one_scale_a_row_equals_the_model(device_with_fp4, call):
    assert_attention(*run(device_with_fp4, call), call=call)


def test_channels_of_zeros_and_of_all_sizes(device_with_fp4):
    """V's scales are divided out where a 16-bit tile follows an FP4 one: a scale of 0 divides nothing."""
    call = Call(lengths=(150, 330), heads=(2, 1), options=CAUSAL, recipe=LEGACY_SMOOTH)
    q, k, v = call.inputs(7)
    v[..., 3] = 0
    v[..., 4] = 2.0**-24
    v[..., 5] *= 1000
    got, lse, out, expected_lse = run(device_with_fp4, call, (q, k, v))
    assert np.all(got[..., 3] == 0)
    np.testing.assert_allclose(got[..., 4], 2.0**-24, rtol=0)
    assert_attention(got[..., [5]], lse, out[..., [5]], expected_lse, call=call)
    others = np.delete(np.arange(64), 5)
    assert_attention(got[..., others], lse, out[..., others], expected_lse, call=call)


@pytest.mark.parametrize("name", ["accurate", pytest.param("sage3", marks=SLOW)])
def test_dequantised_without_a_race(name):
    """What the GPU runs, on the emulator too: it knows of every access that nothing orders."""
    call = Call(lengths=(70, 330), heads=(2, 1), options=CAUSAL, recipe=PRESETS[name])
    assert_attention(*run(EmulatedDevice("sm_90a"), call), call=call)


@pytest.mark.parametrize("recipe", [SMOOTH, PRESETS["accurate"]], ids=["smooth", "accurate"])
def test_sinks_join_the_denominator(device, recipe):
    call = Call(lengths=(33, 150), heads=(4, 2), options=CAUSAL, recipe=recipe)
    assert_attention(*run(device, call, sinks=np.array([0.5, -3.0, 6.0, -np.inf])), call=call)


def test_a_sink_alone_is_the_lse_of_a_row_without_keys(device):
    call = Call(lengths=(5, 0), heads=(2, 1), recipe=SMOOTH)
    out, lse, _, _ = run(device, call, sinks=np.array([0.25, -2.0]))
    assert np.all(out == 0)
    np.testing.assert_array_equal(lse, np.repeat([[0.25], [-2.0]], 5, axis=1))


@pytest.mark.parametrize("recipe", [SMOOTH, PRESETS["fast"]], ids=["f16", "fast"])
def test_a_constant_v_comes_back(device, recipe):
    call = Call(lengths=(70, 150), heads=(2, 1), options=CAUSAL, recipe=recipe)
    q, k, v = call.inputs(3)
    # 6, unlike 1, is a number of NVFP4 with scale amax / 6. P in NVFP4 does not add up to its exact sum: a few per cent
    out, _, expected, _ = run(device, call, (q, k, np.full_like(v, 6)))
    np.testing.assert_allclose(out, expected, atol=6 * 2.0**-10)
    np.testing.assert_allclose(out / 6, 1, atol=0.1 if recipe.pv == "nvfp4" else 6e-4)


def test_one_hot_v_shows_each_weight(device):
    """V picks key j in channel j: every weight of every row in its place, though K's rows are stored permuted."""
    call = Call(lengths=(64, 64))
    q, k, _ = call.inputs(4)
    v = 6 * np.eye(64, dtype=np.float16)[None, None]
    out, _, expected, _ = run(device, call, (4 * q, k, v))  # fourfold, so that some weights are large
    np.testing.assert_allclose(out, expected, atol=6 * 2.0**-10)
    assert expected.max(-1).mean() > 6 * 0.3, "weights too even to tell keys apart"


def test_uniform_scores_give_the_mean_and_log_of_the_count(device):
    call = Call(lengths=(64, 100))
    q, k, v = call.inputs(5)
    out, lse, expected, _ = run(device, call, (np.zeros_like(q), k, v))
    np.testing.assert_allclose(lse, np.log(100), atol=1e-6)
    np.testing.assert_allclose(out, expected, atol=2.0**-11)


@pytest.mark.parametrize("recipe", [SMOOTH, PRESETS["sage3"]], ids=["q64", "q128"])
def test_block_structured_queries_find_their_keys(device, recipe):
    """Query block b matches key block b alone: a correction or mask of another block would show."""
    call = Call(lengths=(256, 256), recipe=recipe)
    q, k = np.zeros((2, 1, 1, 256, 64), np.float16)
    for block in range(4):
        rows, channels = slice(64 * block, 64 * block + 64), slice(16 * block, 16 * block + 16)
        q[..., rows, channels] = 6
        k[..., rows, channels] = 6
    value = np.array([6.0, -6.0, 3.0, -3.0])
    v = np.repeat(value, 64)[None, None, :, None] * np.ones((1, 1, 1, 64))
    out, _, _, _ = run(device, call, (q, k, v.astype(np.float16)))
    for block in range(4):
        np.testing.assert_allclose(out[0, 64 * block : 64 * block + 64], value[block], rtol=0.05)


def test_poisoned_padding_and_masked_keys_leave_no_trace(device):
    """Keys that no query may see hold the largest values: neither weights nor sums know of them."""
    call = Call(lengths=(40, 200), options={"window": (60, 10), "q_offset": 30}, recipe=SMOOTH)
    q, k, v = call.inputs(6)
    k[..., 100:, :], v[..., 100:, :] = 100, 60000
    assert_attention(*run(device, call, (q, k, v)), call=call)


def test_the_stored_order_is_a_permutation_that_gives_each_lane_eight_tokens():
    order = stored_order()
    assert sorted(order) == list(range(64))
    for half in range(2):
        for q in range(4):
            rows = [32 * half + 8 * t + 2 * q + e for t in range(4) for e in range(2)]
            assert list(order[rows]) == list(range(32 * half + 8 * q, 32 * half + 8 * q + 8))


def test_why_not_names_the_reason():
    problem, target = Problem(1, 1, 1, 64, 64, 64), Target.parse
    accurate = PRESETS["accurate"]
    assert why_not(problem, accurate, "blockscale", target("sm_120a")) is None
    assert "needs sm_120a or sm_121a, this is sm_90a" in why_not(problem, accurate, "blockscale", target("sm_90a"))
    assert "head_dim must be one of 64, 96, 128, 256, got 80" in why_not(
        Problem(1, 1, 1, 64, 64, 80), accurate, "dequant", target("sm_90a")
    )
    assert "both in NVFP4 or both in 16 bits" in why_not(problem, Recipe(qk="f16"), "dequant", target("sm_90a"))
    assert "v_axis='head_dim'" in why_not(problem, Recipe(), "dequant", target("sm_90a"))
    wide = Problem(1, 1, 1, 64, 64, 256)
    assert "bytes of shared memory a CTA, sm_89 has 101376" in why_not(wide, accurate, "dequant", target("sm_89"))
    for name in ("sm_80", "sm_90a", "sm_100a"):
        assert why_not(wide, accurate, "dequant", target(name)) is None
    assert why_not(wide, accurate, "blockscale", target("sm_120a")) is None
    for name in ("sm_120a", "sm_121a"):
        assert why_not(problem, LEGACY, "legacy", target(name)) is None
    assert why_not(problem, LEGACY, "legacy", target("sm_90a")) == "f8f6f4 needs sm_120a or sm_121a, this is sm_90a"
    assert "such as recipe='legacy'" in why_not(problem, accurate, "legacy", target("sm_120a"))
    for name in ("blockscale", "dequant"):
        assert why_not(problem, LEGACY, name, target("sm_120a")).startswith("scale_per='row' runs by 'legacy' alone")


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_shared_memory_of_sm_120_is_enough(head_dim):
    for quantized, windows in ((True, False), (True, True), (False, True)):
        assert shared_bytes("blockscale", head_dim, quantized, windows) <= 101376
        assert shared_bytes("legacy", head_dim, quantized, windows) <= 101376


@SLOW
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pv", ["nvfp4", "f16", "e4m3"])
def test_kernels_with_windows_for_sm_120a_spill_little(head_dim, pv):
    """ptxas takes 168 registers, for three CTAs an SM, over the last few words."""
    implementation = "legacy" if pv == "e4m3" else "blockscale"
    resources = prefill_kernel(implementation, head_dim, windows=True, pv=pv, has_delta=True).resources("sm_120a")
    assert resources.spill_store_bytes <= 64
