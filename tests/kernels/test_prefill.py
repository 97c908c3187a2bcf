"""The prefill kernel against the recipe's model on the same operands: one body, on the emulator and on a GPU."""

import numpy as np
import pytest
from prefill_problems import Call, run

from nbfmha.emulated import Machine
from nbfmha.kernels.prefill import Operands, prefill, prefill_kernel, stored_order
from nbfmha.problem import Problem

#: Shapes and options; the emulator runs each with the block-scale MMA, a GPU by dequantisation.
CALLS = [
    Call(),
    Call(lengths=(100, 130), heads=(4, 2), options=(("causal", True),)),
    Call(lengths=(1, 300), options=(("causal", True),), smooth_k=True),
    Call(lengths=(130, 70), options=(("causal", True),), sinks=True),
    Call(head_dim=128, lengths=(70, 200), options=(("window", (50, 20)),), smooth_k=True, smooth_q=True),
    Call(lengths=(64, 190), options=(("window", (30, None)), ("causal", True), ("softcap", 20.0)), smooth_k=True),
    Call(lengths=(70, 65), options=(("softcap", 5.0), ("softmax_scale", 0.3)), smooth_k=True, sinks=True, heads=(3, 1)),
    Call(head_dim=128, lengths=(65, 129), options=(("q_offset", 3), ("causal", True)), smooth_q=True),
    Call(lengths=(33, 1), smooth_k=True, smooth_q=True, sinks=True),
    Call(lengths=(5, 0), sinks=True),
    Call(lengths=(5, 0)),
]


def as_values(bits, dtype):
    """float64 of bit patterns, or of values where they are that already."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """to_device, to_host and the implementation: the sm_120a PTX on this CPU, or exact dequantisation on a GPU."""
    if request.param == "emulated":
        machine = Machine("sm_120a")
        return machine.array, lambda x, dtype: as_values(x.copy_to_host(), dtype), "blockscale"
    torch = request.getfixturevalue("gpu")
    return (
        lambda x: torch.from_numpy(np.ascontiguousarray(x)).cuda(),
        lambda x, dtype: x.double().cpu().numpy(),
        "dequant",
    )


def assert_attention(got_out, got_lse, out, lse, *, rounding=2.0**-18):
    """Rows agree to a few ulp of P's f16 rounding: where exp2 is off by 2 ulp, a P near a tie rounds the other way."""
    seen = np.isfinite(lse)
    np.testing.assert_array_equal(np.isneginf(got_lse), ~seen)
    np.testing.assert_allclose(got_lse[seen], lse[seen], rtol=0, atol=4e-6 * max(1.0, np.abs(lse[seen]).max(initial=1.0)))
    assert np.all(got_out[~np.isfinite(lse)] == 0)
    error = np.abs(got_out - out).max(axis=-1)
    # one P in f16 is off by 2^-11 of itself at most, and few are: far below the size of a wrong index, scale or mask
    budget = 2.0**-11 * np.abs(out).max(axis=-1) + rounding * np.abs(out).max(initial=1.0) + 2.0**-12
    worst = np.unravel_index(np.argmax(error - budget), error.shape) if error.size else None
    assert np.all(error <= budget), f"row {worst}: off by {error[worst]:.3g}, allowed {budget[worst]:.3g}"


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_equals_the_model(device, call):
    assert_attention(*run(*device, call))


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
def test_output_dtypes(device, out_dtype):
    call = Call(lengths=(40, 100), options=(("causal", True),))
    assert_attention(*run(*device, call, out_dtype=out_dtype), rounding=2.0**-8 if out_dtype == "bfloat16" else 2.0**-11)


def test_a_constant_v_comes_back(device):
    call = Call(lengths=(70, 150), heads=(2, 1), options=(("causal", True),))
    q, k, v = call.inputs(3)
    out, _, _, _ = run(*device, call, (q, k, np.full_like(v, 6)))  # 6, unlike 1, is a number of NVFP4 with scale amax / 6
    np.testing.assert_allclose(out / 6, 1, atol=3e-4)


def test_one_hot_v_shows_each_weight(device):
    """V picks key j in channel j: every weight of every row in its place, though K's rows are stored permuted."""
    call = Call(lengths=(64, 64))
    q, k, _ = call.inputs(4)
    v = 6 * np.eye(64, dtype=np.float16)[None, None]
    out, _, expected, _ = run(*device, call, (4 * q, k, v))  # fourfold, so that some weights are large
    np.testing.assert_allclose(out, expected, atol=6 * 2.0**-11)
    assert expected.max(-1).mean() > 6 * 0.3, "weights too even to tell keys apart"


def test_uniform_scores_give_the_mean_and_log_of_the_count(device):
    call = Call(lengths=(64, 100))
    q, k, v = call.inputs(5)
    out, lse, expected, _ = run(*device, call, (np.zeros_like(q), k, v))
    np.testing.assert_allclose(lse, np.log(100), atol=1e-6)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_block_structured_queries_find_their_keys(device):
    """Query block b matches key block b alone: a correction or mask of another block would show."""
    call = Call(lengths=(128, 128), smooth_q=True)
    q, k = np.zeros((2, 1, 1, 128, 64), np.float16)
    for block in range(2):
        rows = slice(64 * block, 64 * block + 64)
        q[..., rows, 32 * block : 32 * block + 32] = 4
        k[..., rows, 32 * block : 32 * block + 32] = 4
    v = np.repeat([6.0, -6.0], 64)[None, None, :, None] * np.ones((1, 1, 1, 64))
    out, _, _, _ = run(*device, call, (q, k, v.astype(np.float16)))
    np.testing.assert_allclose(out[0, :64], 6, atol=6e-3)
    np.testing.assert_allclose(out[0, 64:], -6, atol=6e-3)


def test_the_stored_order_is_a_permutation_that_gives_each_lane_eight_tokens():
    order = stored_order()
    assert sorted(order) == list(range(64))
    for half in range(2):
        for q in range(4):
            rows = [32 * half + 8 * t + 2 * q + e for t in range(4) for e in range(2)]
            assert list(order[rows]) == list(range(32 * half + 8 * q, 32 * half + 8 * q + 8))


def test_what_does_not_fit_is_refused():
    machine = Machine("sm_120a")
    problem = Problem(1, 1, 1, 64, 64, 64)
    zeros = {"q": (1, 64, 32), "sfq": (1, 64, 4), "k": (1, 64, 32), "sfk": (1, 64, 4), "vt": (1, 64, 32), "sfv": (1, 64, 4)}
    operands = {name: machine.array(np.zeros(shape, np.uint8)) for name, shape in zeros.items()}
    with pytest.raises(ValueError, match=r"operands.k must be of shape \(1, 64, 32\), got \(1, 64, 4\)"):
        prefill(Operands(**operands | {"k": operands["sfk"]}), problem, implementation="blockscale")
    sinks = machine.array(np.zeros(1, np.float32))
    with pytest.raises(ValueError, match=r"operands\.sinks must be None, as problem\.has_sinks says, got an array"):
        prefill(Operands(**operands, sinks=sinks), problem, implementation="blockscale")
    packed = Problem(1, 1, 1, 64, 64, 64, cu_seqlens_q=(0, 64), cu_seqlens_k=(0, 64))
    with pytest.raises(ValueError, match="problem must be not packed"):
        prefill(Operands(**operands), packed, implementation="blockscale")
    with pytest.raises(ValueError, match="head_dim must be one of 64, 128, got 96"):
        prefill_kernel("blockscale", 96)
    with pytest.raises(ValueError, match="out_dtype must be"):
        prefill_kernel("blockscale", 64, "float64")
