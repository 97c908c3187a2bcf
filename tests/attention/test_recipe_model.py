"""The model of a recipe against a loop of tiles written apart from it, and against what must come out of special input."""

from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from nbfmha import nvfp4, reference
from nbfmha.problem import Problem
from nbfmha.recipe import PRESETS, Recipe
from nbfmha.recipe_model import ROW_MAX, forward, keys_in_16_bits, pre_pass, recipe_attention

FP4_PV = {"pv": "nvfp4", "v_axis": "tokens"}
ROWS = {"scale_per": "row", "pv": "e4m3", "v_axis": "tokens"}
BARE = {
    "K smoothing": Recipe(smooth_k=True),
    "Q smoothing": Recipe(smooth_q=64),
    "scales of Q": Recipe(scale_q="four_over_six"),
    "scales of K": Recipe(scale_k="four_over_six"),
    "scales of V": Recipe(scale_v="four_over_six"),
    "QK alone": Recipe(v_format="f16"),
    "V alone": Recipe(qk="f16", v_axis="tokens"),
    "P.V alone": Recipe(qk="f16", **FP4_PV),
    "rounded sum": Recipe(**FP4_PV, row_sum="rounded"),
    "diagonal": Recipe(diagonal_tiles=0),
    "sink tokens": Recipe(**FP4_PV, sink_tokens=64),
    "rows": Recipe(**ROWS),
    "rows and windows": Recipe(**ROWS, smooth_k=True, smooth_q=64, diagonal_tiles=0, sink_tokens=64, row_sum="rounded"),
}
RECIPES = PRESETS | BARE


def make(heads_q=4, heads_kv=2, seqlen_q=70, seqlen_k=150, head_dim=32, batch=(), seed=0, dtype=np.float16):
    """Input with what real input has: a mean of K, a drift of Q, an outlier channel, values far from zero mean."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((*batch, heads_q, seqlen_q, head_dim)) + 1.5 * np.sin(np.arange(seqlen_q) / 40)[:, None]
    k = rng.standard_normal((*batch, heads_kv, seqlen_k, head_dim)) + 2 * rng.standard_normal(head_dim)
    v = rng.standard_normal((*batch, heads_kv, seqlen_k, head_dim)) + 0.5
    q[..., 3] *= 4
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def to_nvfp4(x, rule):
    """Blocks of 16 along the last axis, by ml_dtypes; float64. ``four_over_six`` by the library (tested elsewhere)."""
    rows, length = x.shape
    padded = np.zeros((rows, -(-length // 16) * 16), np.float32)
    padded[:, :length] = x
    if rule != "amax":
        return nvfp4.dequantize(nvfp4.quantize(padded, scale=rule)).astype(float)[:, :length] if length else padded
    blocks = padded.reshape(rows, -(-length // 16), 16)
    scale = (np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(6)).clip(max=448)
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = (blocks / np.where(scale == 0, np.inf, scale)).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    return (codes.astype(float) * scale).reshape(padded.shape)[:, :length]


def to_rows(x):
    """One float32 scale a row, by ml_dtypes; float64."""
    scale = np.abs(x).max(axis=-1, keepdims=True, initial=0).astype(np.float32) / np.float32(6)
    codes = (x.astype(np.float32) / np.where(scale == 0, np.inf, scale)).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    return codes.astype(float) * scale


def tile_loop(q, k, v, recipe, *, causal=False, window=(None, None), softcap=None, q_offset=None, sinks=None,
              order="ascending", dtype=np.float16):  # fmt: skip
    """One head, one block of 64 queries and one tile of 64 keys at a time, with running max, sum and accumulator."""
    (heads_q, seqlen_q, head_dim), (heads_kv, seqlen_k, _) = q.shape, k.shape
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    scale, p_scale = 1 / np.sqrt(head_dim), {"f16": 1, "nvfp4": 2688, "e4m3": 448}[recipe.pv]
    left, right = window
    out, lse = np.zeros((heads_q, seqlen_q, v.shape[-1])), np.full((heads_q, seqlen_q), -np.inf)
    for h in range(heads_q):
        qh, kh, vh = (x.astype(dtype).astype(float) for x in (q[h], k[h * heads_kv // heads_q], v[h * heads_kv // heads_q]))
        km = kh.mean(axis=0).astype(np.float32) if recipe.smooth_k and seqlen_k else np.zeros(head_dim)
        ks = (kh - km).astype(np.float32).astype(float)
        kq, vq = ks, vh
        if recipe.qk == "nvfp4":
            kq = to_nvfp4(ks, recipe.scale_k)
        if recipe.v_format == "nvfp4" and recipe.v_axis == "tokens":
            vq = to_nvfp4(vh.T, recipe.scale_v).T
        elif recipe.v_format == "nvfp4":
            vq = to_nvfp4(vh, recipe.scale_v)
        if recipe.scale_per == "row":
            kq, vq = to_rows(ks), to_rows(vh.T).T
        for i in range(0, seqlen_q, 64):
            rows = np.arange(i, min(i + 64, seqlen_q))
            qm = np.zeros((1, head_dim), np.float32)
            if recipe.smooth_q:
                start = i // recipe.smooth_q * recipe.smooth_q
                qm = qh[start : start + recipe.smooth_q].mean(axis=0, keepdims=True).astype(np.float32)
            qs = (qh[rows] - qm).astype(np.float32)
            if recipe.scale_per == "row":
                qs = to_rows(qs)
            else:
                qs = to_nvfp4(qs, recipe.scale_q) if recipe.qk == "nvfp4" else qs.astype(float)
            m, total, acc = np.full(len(rows), -np.inf), np.zeros(len(rows)), np.zeros((len(rows), v.shape[-1]))
            tiles = range(0, seqlen_k, 64)
            for j in tiles if order == "ascending" else reversed(tiles):
                keys = np.arange(j, min(j + 64, seqlen_k))
                near = recipe.diagonal_tiles is not None and (
                    (rows[0] + offset) // 64 - recipe.diagonal_tiles
                    <= j // 64
                    <= (rows[-1] + offset) // 64 + recipe.diagonal_tiles
                )
                exact = near or j < recipe.sink_tokens
                x = qs @ kq[keys].T + qm.astype(float) @ ks[keys].T
                if exact:
                    x = qh[rows] @ kh[keys].T - (qh[rows] @ km)[:, None]
                s = scale * x
                if softcap is not None:
                    s = softcap * np.tanh(scale * (x + (qh[rows] @ km)[:, None]) / softcap)
                behind = rows[:, None] + offset - keys
                hidden = np.zeros(behind.shape, bool) if not causal else behind < 0
                if left is not None:
                    hidden |= behind > left
                if right is not None:
                    hidden |= -behind > right
                s[hidden] = -np.inf
                new = np.maximum(m, s.max(axis=1))
                base = np.where(np.isneginf(new), 0, new)
                p = p_scale * np.exp(s - base[:, None])
                rounded = p.astype(np.float32).astype(dtype).astype(float)
                if recipe.pv == "nvfp4" and not exact:
                    rounded = to_nvfp4(p, "amax")
                if recipe.pv == "e4m3" and not exact:
                    rounded = p.astype(np.float32).clip(max=448).astype(ml_dtypes.float8_e4m3fn).astype(float)
                decay = np.exp(m - base)
                total = total * decay + (rounded if recipe.row_sum == "rounded" else p).sum(axis=1)
                acc = acc * decay[:, None] + rounded @ (vh if exact else vq)[keys]
                m = new
            some = total > 0
            row_lse = np.full(len(rows), -np.inf)
            row_lse[some] = m[some] + np.log(total[some] / p_scale)
            if softcap is None:
                row_lse += scale * qh[rows] @ km
            out[h, rows[some]] = acc[some] / total[some, None]
            if sinks is not None:
                with_sink = np.logaddexp(row_lse, sinks[h])
                out[h, rows] *= np.exp(row_lse - with_sink)[:, None]
                row_lse = with_sink
            lse[h, rows] = row_lse
    return out, lse


# float64 on both sides. What can differ is the side to which P at a rounding boundary falls: seldom, and by less than this
LOOP = {"rtol": 0, "atol": 1e-6}


def assert_equals_loop(q, k, v, recipe, *, order="ascending", **options):
    problem = Problem.of(q, k, v, has_sinks="sinks" in options, **{n: o for n, o in options.items() if n != "sinks"})
    out, lse = recipe_attention(q, k, v, problem, recipe, sinks=options.get("sinks"), row_max=order)
    expected, expected_lse = tile_loop(q, k, v, recipe, order=order, **options)
    np.testing.assert_allclose(lse, expected_lse, **LOOP)
    np.testing.assert_allclose(out, expected, **LOOP)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_matches_a_loop_of_tiles(recipe, options):
    assert_equals_loop(*make(seqlen_q=150, seqlen_k=201), recipe, **options)


@pytest.mark.parametrize("name", ["sage3", "fast", "accurate", "legacy"])
@pytest.mark.parametrize(
    "options",
    [
        {"window": (70, 3)},
        {"softcap": 2.0},
        {"causal": True, "q_offset": 70},
        {"causal": True, "q_offset": -20},
        {"sinks": np.array([0.5, -3.0, 4.0, -np.inf])},
        {"causal": True, "window": (65, None), "softcap": 5.0, "q_offset": 33, "sinks": np.zeros(4)},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_matches_a_loop_of_tiles(name, options):
    assert_equals_loop(*make(), PRESETS[name], **options)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_tiles_in_either_order(order):
    assert_equals_loop(*make(seqlen_k=200), PRESETS["sage3"], order=order, causal=True)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (1, 203), (3, 129), (129, 3), (65, 65), (0, 4), (4, 0)])
def test_lengths(name, seqlen_q, seqlen_k):
    assert_equals_loop(*make(2, 1, seqlen_q, seqlen_k), PRESETS[name], causal=True)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("row_max", ROW_MAX)
def test_constant_values_come_out(name, row_max):
    """1.5 = 6 * 0.25 is one that NVFP4 holds (one itself is not, by amax/6); P's weights must add up to one."""
    q, k, v = make()
    q = 2 * q
    problem, recipe = Problem.of(q, k, v, causal=True), PRESETS[name]
    ones = np.full_like(v, 1.5)
    out, _ = recipe_attention(q, k, ones, problem, recipe, row_max=row_max)
    if recipe.pv == "f16":  # P in f16: half a unit of 11 bits, and below 2^-14 half of 2^-24 for each of the keys
        np.testing.assert_allclose(out, 1.5, rtol=2**-11 + 150 * 2**-25)
        return
    np.testing.assert_allclose(out, 1.5, rtol=0.1)  # the sum of P before rounding; E2M1 rounds by up to a quarter
    out, _ = recipe_attention(q, k, ones, problem, replace(recipe, row_sum="rounded"), row_max=row_max)
    np.testing.assert_allclose(out, 1.5, rtol=1e-13)


@pytest.mark.parametrize("name", PRESETS)
def test_one_hot_values_show_the_weight_of_every_key(name):
    """64 keys and 64 channels, 6 on the diagonal: the output is 6 P, and no key stands in another one's place."""
    q, k, _ = make(heads_q=2, heads_kv=1, seqlen_q=64, seqlen_k=64, head_dim=64)
    v = 6 * np.eye(64, dtype=np.float16)[None]
    problem, recipe = Problem.of(q, k, v, q_offset=1000), replace(PRESETS[name], sink_tokens=0)  # far from the diagonal
    out, _ = recipe_attention(q, k, v, problem, recipe)
    operands = pre_pass(q, k, v, problem, recipe)[0]
    scores = operands.q_nvfp4 @ operands.k_nvfp4.swapaxes(-1, -2) + operands.q_mean @ operands.k_smooth.swapaxes(-1, -2)
    p = np.exp((scores - scores.max(axis=-1, keepdims=True)) / 8)
    expected = (p / p.sum(axis=-1, keepdims=True))[0, 0]
    # f16: as above. nvfp4: E2M1's largest gap, 4 to 6, leaves 1/6 of the block's largest, and its scale 1/16 more
    block_max = np.repeat(expected.reshape(2, 64, 4, 16).max(axis=-1), 16, axis=-1)
    budget = expected * 2**-11 + 2**-24 if recipe.pv == "f16" else block_max * (1 / 6 + 1 / 16) + 1e-5
    if recipe.pv == "e4m3":  # half a unit of four significant bits; subnormal below 2^-6 of 448
        budget = expected * 2**-4 + 2**-10 / 448
    assert (np.abs(out / 6 - expected) <= budget).all()


def test_q_constant_in_its_blocks_has_exact_scores():
    """Nothing of q is left to quantise, so the f32 correction is the whole score: added to a wrong block, it shows."""
    _, k, v = make(seqlen_q=1, seqlen_k=300)
    rng = np.random.default_rng(1)
    for block in (64, 128):
        q = np.repeat(rng.integers(-3, 4, (4, 4, 32)), block, axis=1)[:, :290].astype(np.float16)
        problem = Problem.of(q, k, v, causal=True)
        for smooth_k in (False, True):
            recipe = Recipe(smooth_k=smooth_k, smooth_q=block, v_format="f16")
            out, lse = recipe_attention(q, k, v, problem, recipe)
            expected, expected_lse = reference.attention(q, k, v, problem, return_lse=True)
            np.testing.assert_allclose(lse, expected_lse, atol=1e-5)  # km, k - km: float32
            np.testing.assert_allclose(out, expected, atol=3 * 2**-10)  # P: f16


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_uniform_scores_have_lse_log_of_the_length(recipe):
    q, k, v = make()
    q[:] = 0
    problem = Problem.of(q, k, v, causal=True)
    out, lse = recipe_attention(q, k, v, problem, recipe)
    np.testing.assert_allclose(lse, np.broadcast_to(np.log(np.arange(81, 151)), lse.shape), rtol=1e-12)
    operands = pre_pass(q, k, v, problem, recipe)[0]
    if not recipe.has_windows:
        mean = operands.v_nvfp4[0, :, 0].cumsum(axis=1)[:, 80:] / np.arange(81, 151)[:, None]
        np.testing.assert_allclose(out, np.repeat(mean, 2, axis=0), rtol=1e-12)


@pytest.mark.parametrize("name", ["sage3", "fast", "accurate"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_lse_is_that_of_the_unsmoothed_scores(name, softcap):
    """Equal keys: k - km is 0, quantisation has nothing to round, and q.km alone makes the LSE."""
    q, k, v = make()
    k[:] = np.random.default_rng(2).integers(-8, 9, 32) / 4
    problem = Problem.of(q, k, v, softcap=softcap)
    _, lse = recipe_attention(q, k, v, problem, PRESETS[name])
    _, expected = reference.attention(q, k, v, problem, return_lse=True)
    assert np.abs(expected - np.log(150)).max() > 2
    np.testing.assert_allclose(lse, expected, rtol=1e-12)


def test_no_smoothing_is_attention_on_the_dequantised_input():
    q, k, v = make(batch=(2,))
    problem = Problem.of(q, k, v, causal=True)
    for rule in ("amax", "four_over_six"):
        for axis in ("head_dim", "tokens"):
            recipe = Recipe(scale_q=rule, scale_k=rule, scale_v=rule, v_axis=axis)
            qt = [nvfp4.quantize(q, scale=rule), nvfp4.quantize(k, scale=rule), nvfp4.quantize(v, scale=rule, axis=axis)]
            expected, expected_lse = reference.attention(*qt, problem, return_lse=True)
            out, lse = recipe_attention(q, k, v, problem, recipe)
            np.testing.assert_allclose(lse, expected_lse, rtol=1e-12)
            np.testing.assert_allclose(out, expected, atol=2**-11 * np.abs(v).max())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("recipe", [Recipe(qk="f16", v_format="f16"), replace(PRESETS["fast"], diagonal_tiles=9)], ids=str)
def test_sixteen_bits_everywhere_is_attention(recipe, dtype):
    q, k, v = make(dtype=dtype)
    problem = Problem.of(q, k, v, causal=True)
    out, lse = recipe_attention(q, k, v, problem, recipe)
    expected, expected_lse = reference.attention(q, k, v, problem, return_lse=True)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-6)
    half_unit = 2**-11 if dtype is np.float16 else 2**-8
    np.testing.assert_allclose(out, expected, atol=half_unit * float(np.abs(v).max()))
    if dtype is not np.float16:  # P in bfloat16 is coarser, and is what the model rounds to
        assert np.abs(out - expected).max() > 2**-11


def test_float32_input_is_rounded_to_the_format_of_the_call():
    q, k, v = (x.astype(np.float32) for x in make(dtype=np.float64))
    for name, dtype in (("float32", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        problem = replace(Problem.of(q, k, v), dtype=name)
        narrow = [x.astype(dtype) for x in (q, k, v)]
        for got, expected in zip(recipe_attention(q, k, v, problem), recipe_attention(*narrow, problem), strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", PRESETS)
def test_zero_blocks_and_tiny_values(name):
    """Zero blocks are zeros, not NaN; values whose UE4M3 scale is subnormal keep a value, smaller ones become zeros (but
    float32 scales hold them)."""
    q, k, v = make(seqlen_q=70, seqlen_k=200)
    k[:, 64:96], v[:, 100:164], q[:, :16], q[..., 16:] = 0, 0, 0, 0
    problem, recipe = Problem.of(q, k, v), replace(PRESETS[name], diagonal_tiles=None, sink_tokens=0)
    assert_equals_loop(q, k, v, recipe)
    for exponent, survives in ((-8, True), (-14, False)):
        tiny = (v * 2.0**exponent).astype(np.float16)
        operands = pre_pass(q, k, tiny, problem, recipe)[0]
        out, _ = recipe_attention(q, k, tiny, problem, recipe)
        assert np.isfinite(out).all()
        assert out.any() == operands.v_nvfp4.any() == (survives or recipe.scale_per == "row")
        assert_equals_loop(q, k, tiny, recipe)


def test_packed_sequences_equal_each_alone():
    lengths_q, lengths_k = (70, 0, 1, 65), (70, 3, 130, 64)
    cu_q, cu_k = np.cumsum((0, *lengths_q)), np.cumsum((0, *lengths_k))
    q, k, v = make(seqlen_q=sum(lengths_q), seqlen_k=sum(lengths_k))
    problem = Problem.of(q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for name in PRESETS:
        out, lse = recipe_attention(q, k, v, problem, name)
        for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
            alone = q[:, q0:q1], k[:, k0:k1], v[:, k0:k1]
            expected, expected_lse = recipe_attention(*alone, Problem.of(*alone, causal=True), name)
            np.testing.assert_allclose(out[:, q0:q1], expected, **LOOP)
            np.testing.assert_allclose(lse[:, q0:q1], expected_lse, **LOOP)


def test_grouped_heads_and_batches_equal_each_alone():
    q, k, v = make(heads_q=6, heads_kv=2, batch=(2, 1))
    out, lse = recipe_attention(q, k, v, Problem.of(q, k, v, causal=True))
    assert out.shape == q.shape
    for b in range(2):
        for h in range(6):
            alone = q[b, :, h : h + 1], k[b, :, h // 3, None], v[b, :, h // 3, None]
            expected, expected_lse = recipe_attention(*alone, Problem.of(*alone, causal=True))
            np.testing.assert_allclose(out[b, :, h : h + 1], expected, **LOOP)
            np.testing.assert_allclose(lse[b, :, h : h + 1], expected_lse, **LOOP)


def test_order_of_the_tiles_is_rounding_alone():
    q, k, v = make(seqlen_k=400)
    problem = Problem.of(q, k, v)
    for name, tolerance in (("accurate", 2**-10), ("sage3", 0.05)):
        results = [recipe_attention(q, k, v, problem, name, row_max=row_max) for row_max in ROW_MAX]
        for out, lse in results[1:]:
            np.testing.assert_allclose(lse, results[0][1], rtol=1e-12)  # the sum is that of P before its rounding
            np.testing.assert_allclose(out, results[0][0], atol=tolerance * np.abs(v).max())


def test_keys_in_16_bits():
    def kept(recipe, positions, seqlen_k=320):
        return np.flatnonzero(keys_in_16_bits(recipe, np.arange(*positions), seqlen_k)[::64]).tolist()

    assert kept(Recipe(), (128, 192)) == []
    assert kept(Recipe(sink_tokens=64), (128, 192)) == [0]
    assert kept(Recipe(diagonal_tiles=0), (128, 192)) == [2]
    assert kept(Recipe(diagonal_tiles=0), (130, 194)) == [2, 3]  # positions that straddle two tiles
    assert kept(Recipe(diagonal_tiles=1, sink_tokens=128), (256, 300)) == [0, 1, 3, 4]
    assert kept(Recipe(diagonal_tiles=1), (-64, 0)) == [0]
    assert kept(Recipe(diagonal_tiles=0), (-64, 0)) == []


def test_forward_takes_operands_from_elsewhere():
    """As a kernel's own codes: the pre-pass of one recipe with the forward pass of another."""
    q, k, v = make()
    problem = Problem.of(q, k, v)
    operands = pre_pass(q, k, v, problem, Recipe())
    out, lse = forward(operands, problem, Recipe(**FP4_PV), v_dim=32)
    assert out.shape == (1, 2, 2, 70, 32)
    _, expected = recipe_attention(q, k, v, problem, Recipe(**FP4_PV))
    np.testing.assert_allclose(lse.reshape(4, 70), expected, rtol=1e-13)
    with pytest.raises(ValueError, match="row_max must be one of 'ascending', 'descending', 'final', got 'online'"):
        forward(operands, problem, Recipe(), v_dim=32, row_max="online")
    with pytest.raises(ValueError, match=r"q must be of shape .*, as the problem says"):
        recipe_attention(q[:, :3], k, v, problem)


def test_input_is_not_changed():
    arrays = make()
    copies = [x.copy() for x in arrays]
    for x in arrays:
        x.setflags(write=False)
    for name in PRESETS:
        recipe_attention(*arrays, Problem.of(*arrays), name)
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
