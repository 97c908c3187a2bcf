"""What the numbers are worth: exact round trips, errors, zero and subnormal blocks, global scale, four over six."""

import block_oracle as oracle
import ml_dtypes
import numpy as np
import pytest

from nbfmha import nvfp4
from nbfmha.sample import load_sample
from nbfmha.testing import relative_rmse, relative_rmse_standard_error


def representable(rng, scales):
    """Blocks with +-6 somewhere, so that their scale is the one they were made with."""
    codes = rng.integers(0, 16, (len(scales), 16), dtype=np.uint8)
    codes[np.arange(len(scales)), rng.integers(0, 16, len(scales))] = rng.choice([7, 15], len(scales))
    return oracle.e2m1_value(codes) * scales[:, None], codes


@pytest.mark.parametrize("scale", ["amax", "four_over_six"])
def test_representable_values_come_back_exactly(scale):
    every_scale = np.arange(1, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for seed, g in enumerate((None, 2.0**-20, 0.75, 2.0**30)):
        x, codes = representable(np.random.default_rng(seed), np.tile(every_scale, 4))
        x = x * np.float32(1 if g is None else g)
        qt = nvfp4.quantize(x, scale=scale, global_scale=g)
        np.testing.assert_array_equal(nvfp4.dequantize(qt), x)
        np.testing.assert_array_equal(oracle.nibbles(qt.codes), codes)  # -0 included
        if g is None:
            np.testing.assert_array_equal(nvfp4.dequantize(nvfp4.quantize(x.astype(np.float16)), "float16"), x)
            bf16 = nvfp4.dequantize(nvfp4.quantize(x.astype(ml_dtypes.bfloat16)), "bfloat16")
            np.testing.assert_array_equal(bf16.view(ml_dtypes.bfloat16).astype(np.float32), x)


@pytest.mark.parametrize("scale", ["amax", "four_over_six"])
def test_quantising_again_changes_nothing(scale):
    """Values with the scale of amax come back; under four over six too, since their error with it is 0."""
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    once = nvfp4.dequantize(nvfp4.quantize(x))
    np.testing.assert_array_equal(nvfp4.dequantize(nvfp4.quantize(once, scale=scale)), once)


def test_gaussian_error_is_that_of_the_decoded_scale():
    """0.0950 is published for division by the decoded scale, 0.0976 for division by the one before rounding."""
    x = np.random.default_rng(0).standard_normal((1 << 13, 64)).astype(np.float16)
    back = nvfp4.dequantize(nvfp4.quantize(x), "float16")

    blocks = x.astype(np.float32).reshape(-1, 16)
    unrounded = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(6)
    rounded = unrounded.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.clip(blocks / unrounded, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    wrong = codes.astype(np.float32) * rounded

    sampling = 4 * relative_rmse_standard_error(back, x, group=16)
    last_digit = 0.00005
    assert abs(relative_rmse(back, x) - 0.0950) <= last_digit + sampling
    assert abs(relative_rmse(wrong, blocks) - 0.0976) <= last_digit + sampling


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_blocks_are_zero_bytes_and_stay_zero(format, zero):
    x = np.full((3, 96), 6, np.float32)
    x[1, 32:64] = zero
    qt = nvfp4.quantize(x, format=format)
    size = qt.block_size
    assert not qt.scales[1, 32 // size : 64 // size].any()
    assert not qt.codes[1, 16:32].any()
    back = nvfp4.dequantize(qt)
    assert not np.signbit(back).any()
    np.testing.assert_array_equal(back, np.abs(x))


def test_subnormal_scales_are_kept_down_to_the_smallest():
    steps = np.arange(1, 8, dtype=np.float32)
    x = np.repeat(6 * steps * 2.0**-9, 16).reshape(7, 16).astype(np.float32)
    qt = nvfp4.quantize(x)
    np.testing.assert_array_equal(qt.scales[:, 0], steps)
    np.testing.assert_array_equal(nvfp4.dequantize(qt), x)
    half_a_step = np.full((1, 16), 6 * 2.0**-10, np.float32)
    assert nvfp4.quantize(half_a_step).scales[0, 0] == 0  # a tie, to the even byte
    assert not nvfp4.quantize(half_a_step).codes.any()
    assert nvfp4.quantize(np.nextafter(half_a_step, np.float32(1))).scales[0, 0] == 1


def test_negative_zero_and_small_negatives_keep_their_sign():
    x = np.array([[-0.0, 0.0, -0.1, 0.1, -6.0] + [1.0] * 11], np.float32)
    assert oracle.nibbles(nvfp4.quantize(x).codes)[0, :5].tolist() == [8, 0, 8, 0, 15]


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("format", "size", "nan_byte"), [("nvfp4", 16, 0x7F), ("mxfp4", 32, 0xFF)])
def test_what_is_not_finite_takes_its_block_and_no_other(special, format, size, nan_byte):
    x = np.random.default_rng(0).standard_normal((4, 96)).astype(np.float32)
    clean = nvfp4.quantize(x, format=format)
    x[2, size + 5] = special
    qt = nvfp4.quantize(x, format=format)
    back, expected = nvfp4.dequantize(qt), nvfp4.dequantize(clean)
    expected[2, size : 2 * size] = np.nan
    np.testing.assert_array_equal(back, expected)
    assert qt.scales[2, 1] == nan_byte
    assert not qt.codes[2, size // 2 : size].any()


def test_global_scale_multiplies_on_decoding():
    """Powers of two move exponents only: quantize(x * g, g) has the bytes of quantize(x), and values g times as large."""
    x = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    plain = nvfp4.quantize(x)
    for g in (2.0**-40, 0.5, 2.0**20):
        scaled = nvfp4.quantize(x * np.float32(g), global_scale=g)
        np.testing.assert_array_equal(scaled.codes, plain.codes)
        np.testing.assert_array_equal(scaled.scales, plain.scales)
        np.testing.assert_array_equal(nvfp4.dequantize(scaled), nvfp4.dequantize(plain) * np.float32(g))


def test_amax_global_scale_fills_the_scale_range():
    x = np.random.default_rng(0).standard_normal((3, 50, 64)).astype(np.float32) * np.float32(1e-6)
    qt = nvfp4.quantize(x, global_scale="amax")
    amax = np.abs(x).max()
    assert qt.global_scale == amax / np.float32(2688)  # decode direction: below 1 for small data
    assert qt.global_scale.shape == ()
    assert qt.scales.max() == 0x7E
    # with the reciprocal, or without any global scale, data this small is lost
    assert relative_rmse(nvfp4.dequantize(qt), x) < 0.1
    assert relative_rmse(nvfp4.dequantize(nvfp4.quantize(x)), x) == 1


def test_amax_global_scale_ignores_what_is_not_finite_and_stays_in_range():
    x = np.ones((2, 32), np.float32)
    x[0, 0], x[1, 0] = np.inf, np.nan
    assert nvfp4.quantize(x, global_scale="amax").global_scale == np.float32(1) / np.float32(2688)
    for value, expected in [(0.0, 1.0), (1e-30, 2.0**-64), (3e38, 2.0**64), (np.nan, 1.0)]:
        qt = nvfp4.quantize(np.full((2, 32), value, np.float32), global_scale="amax")
        assert qt.global_scale == expected
    for empty in [(0, 16), (0, 4, 16)]:
        assert nvfp4.quantize(np.ones(empty, np.float32), global_scale="amax").global_scale == 1


def test_amax_global_scale_is_one_for_the_tensor_whatever_the_tiles():
    x = np.zeros((5000, 96), np.float32)
    for row, col in [(0, 0), (4999, 95), (2500, 17)]:
        y = x.copy()
        y[row, col] = -2688
        assert nvfp4.quantize(y, global_scale="amax").global_scale == 1
        assert nvfp4.quantize(y[:, ::-1].T.copy(), global_scale="amax", axis="tokens").global_scale == 1


@pytest.mark.parametrize("make", ["gaussian", "uniform", "heavy", "sample"])
def test_four_over_six_is_never_worse_than_amax(make):
    rng = np.random.default_rng(0)
    x = {
        "gaussian": lambda: rng.standard_normal((512, 64)),
        "uniform": lambda: rng.uniform(-1, 1, (512, 64)),
        "heavy": lambda: rng.standard_t(2, (512, 64)),
        "sample": lambda: load_sample().k[0],
    }[make]().astype(np.float32)
    errors = {}
    for scale in ("amax", "four_over_six"):
        back = nvfp4.dequantize(nvfp4.quantize(x, scale=scale)).astype(np.float64)
        errors[scale] = ((back - x) ** 2).reshape(-1, 16).sum(axis=1)
    # the choice is made on float32 sums: a difference, a square and four additions, half an ulp each, on either side
    slack = 1 + 2 * 7 * 2.0**-24
    assert np.all(errors["four_over_six"] <= errors["amax"] * slack)
    assert errors["four_over_six"].sum() < 0.95 * errors["amax"].sum()


def test_four_over_six_uses_every_divisor_and_prefers_six_on_ties():
    x = np.random.default_rng(0).standard_normal((4096, 16)).astype(np.float32)
    amax = np.abs(x).max(axis=1)
    chosen = nvfp4.quantize(x, scale="four_over_six").scales[:, 0]
    candidates = {d: (amax / np.float32(d)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8) for d in (6, 5, 4)}
    matches = {d: np.count_nonzero(chosen == byte) for d, byte in candidates.items()}
    # amax/5 puts the maximum halfway between the codes 4 and 6: it wins only where rounding of the scale moves it away
    assert matches[6] > matches[4] > 1000
    assert matches[5] > 0
    assert np.all((chosen == candidates[6]) | (chosen == candidates[5]) | (chosen == candidates[4]))
    # amax 6: 6/6 and 6/4 are scales, and {6, 3, 1.5, 0} is exact with both
    tie = np.array([[6.0, -3.0, 1.5, 0.0] * 4], np.float32)
    qt = nvfp4.quantize(tie, scale="four_over_six")
    assert qt.scales[0, 0] == 0x38
    np.testing.assert_array_equal(nvfp4.dequantize(qt), tie)


def test_real_queries_and_keys():
    """Post-RoPE q and k of a model: the error of the format is what Gaussian data says, within its spread."""
    for x in load_sample():
        amax, best = (relative_rmse(nvfp4.dequantize(nvfp4.quantize(x, scale=s)), x) for s in nvfp4.SCALE_RULES)
        assert best < amax < 0.125  # half a step of E2M1 between 4 and 6 is an eighth of 4: no element errs by more
