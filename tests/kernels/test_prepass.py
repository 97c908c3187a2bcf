"""The pre-pass kernels against NumPy and the recipe's model: one body, on the emulator and on a GPU."""

from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
import pytest
from devices import EmulatedDevice, GpuDevice

from nbfmha import gpu_arrays, nvfp4
from nbfmha.emulated import Machine
from nbfmha.kernels import prepass, prepass_tables
from nbfmha.kernels.operands import stored_order
from nbfmha.kernels.prefill import rows_of_cta
from nbfmha.kernels.prepass import prepare, prepare_with_means
from nbfmha.problem import Problem
from nbfmha.recipe import PRESETS, Recipe
from nbfmha.recipe_model import pre_pass
from nbfmha.row_scales import quantize_rows
from nbfmha.tiles import View, delta_tiles, key_tiles, mean_blocks, padded_tokens, query_blocks
from nbfmha.validation import dtype_name
from ptx_inline.isa.formats import pack_nibbles

ACCURATE, SAGE3, NAIVE = PRESETS["accurate"], PRESETS["sage3"], PRESETS["naive"]
ONLY_Q = Recipe(smooth_q=64, scale_q="four_over_six", scale_k="four_over_six", scale_v="four_over_six", v_axis="tokens")
NAIVE_WINDOWS = Recipe(v_axis="tokens", sink_tokens=64)
SMOOTH_K = Recipe(v_axis="tokens", smooth_k=True)
ROWS = Recipe(scale_per="row", pv="e4m3", v_axis="tokens", smooth_k=True, smooth_q=64, sink_tokens=64)
NOTHING = Recipe(qk="f16", v_format="f16")


@dataclass(frozen=True)
class Case:
    """One call. lengths: (queries, keys) of each sequence; layout: the order of the caller's axes; mask: of ``Problem``."""

    recipe: Recipe
    dtype: str = "float16"
    head_dim: int = 64
    batch: int = 1
    heads: tuple[int, int] = (2, 1)
    lengths: tuple[tuple[int, int], ...] = ((70, 130),)
    layout: str = "bhsd"
    mask: dict = field(default_factory=dict)

    def __str__(self) -> str:
        name = next((name for name, recipe in PRESETS.items() if recipe == self.recipe), "other")
        sizes = " ".join(f"{a}x{b}" for a, b in self.lengths[:5]) + " and more" * (len(self.lengths) > 5)
        mask = "".join(f" {option}={value}" for option, value in self.mask.items())
        heads = f"h{self.heads[0]}/{self.heads[1]}"
        return f"{name} {self.dtype} d{self.head_dim} b{self.batch} {heads} {sizes} {self.layout}{mask}"

    @property
    def problem(self) -> Problem:
        queries, keys = (tuple(np.cumsum((0, *column)).tolist()) for column in zip(*self.lengths, strict=True))
        packed = {"cu_seqlens_q": queries, "cu_seqlens_k": keys} if len(self.lengths) > 1 else {}
        return Problem(self.batch, *self.heads, queries[-1], keys[-1], self.head_dim, self.dtype, **packed, **self.mask)

    def inputs(self, seed: int = 0) -> list[np.ndarray]:
        """q, k, v (batch, heads, tokens, head_dim); k has a mean."""
        rng = np.random.default_rng(seed)
        problem = self.problem
        q = rng.standard_normal((self.batch, self.heads[0], problem.seqlen_q, self.head_dim)) + 0.5
        k = rng.standard_normal((self.batch, self.heads[1], problem.seqlen_k, self.head_dim))
        k += 3 * rng.standard_normal(self.head_dim)
        v = rng.standard_normal(k.shape) * 10 ** rng.uniform(-3, 2, k.shape)
        return [x.astype(numpy_dtype(self.dtype)) for x in (q, k, v)]


#: On both devices; the first three share their kernels.
CASES = [
    Case(ACCURATE, lengths=((70, 130), (1, 0), (0, 65), (64, 64), (3, 1), (130, 330)), heads=(4, 2), mask={"causal": True}),
    Case(ACCURATE, lengths=((129, 70),), batch=2, layout="bshd"),
    Case(ONLY_Q, lengths=((65, 64),)),
    Case(ONLY_Q, lengths=((1000, 700),), heads=(5, 1), mask={"window": (100, 30)}),
    Case(NAIVE_WINDOWS, "float32", 96, lengths=((65, 67),), layout="bshd"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            Case(SAGE3, "bfloat16", 128, heads=(3, 1), lengths=((131, 65),)),
            Case(SAGE3, "float32", 96, heads=(3, 1), lengths=((131, 65),), layout="bshd"),
            Case(ACCURATE, head_dim=256, heads=(2, 1), lengths=((200, 300),), mask={"causal": True}),
        )
    ),
]
#: With one scale a row, for ``legacy`` alone.
ROW_CASES = [
    Case(PRESETS["legacy"], lengths=((70, 130), (1, 0), (0, 65), (64, 64), (3, 1)), heads=(4, 2)),
    Case(ROWS, "float32", 96, lengths=((65, 67),), layout="bshd"),
    pytest.param(Case(PRESETS["legacy"], "bfloat16", 128, batch=2, lengths=((70, 300),)), marks=pytest.mark.slow),
]


def of_every_kind(*recipes: Recipe) -> list[Case]:
    """Every kernel of every head_dim and dtype."""
    return [
        Case(recipe, dtype, head_dim, 2, (4, 2), ((257, 200),), layout)
        for head_dim in (64, 96, 128, 256)
        for dtype, layout in (("float16", "bshd"), ("bfloat16", "hbsd"), ("float32", "bhsd"))
        for recipe in recipes
    ]


#: On a GPU alone.
GPU_CASES = [
    *of_every_kind(ACCURATE, SAGE3, NAIVE),
    Case(ACCURATE, heads=(8, 1), lengths=((1000, 3000),)),
    Case(ACCURATE, head_dim=128, heads=(2, 2), lengths=tuple((17 * i % 300, 31 * i % 500) for i in range(40))),
    Case(ACCURATE, heads=(6, 2), lengths=((3000, 4000),), mask={"causal": True}),
    Case(ACCURATE, heads=(6, 2), lengths=tuple((97 * i % 900, 31 * i % 500) for i in range(40)), mask={"window": (99, 9)}),
    Case(SMOOTH_K, lengths=((3, 70000),)),
]


CODES = ("q", "sfq", "k", "sfk", "vt", "sfv")
VALUES = ("q_values", "k_values", "v_values")
QUANTIZED = (*CODES, *VALUES, "delta", "shift")


def numpy_dtype(name: str):
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    return EmulatedDevice() if request.param == "emulated" else GpuDevice(request.getfixturevalue("gpu"))


def prepare_here(*arguments):
    """Refusals do not depend on the implementation."""
    return prepare(*arguments, implementation="blockscale")


@pytest.fixture(params=["blockscale", "dequant"])
def implementation(request):
    """Whose operands: both are written by the same machine."""
    return request.param


def view_of(x: np.ndarray, case: Case, device) -> View:
    """(batch, heads, tokens, channels) on the device with the axes in the case's order."""
    axes = ["bhsd".index(axis) for axis in case.layout]
    stored = np.ascontiguousarray(x.transpose(axes))
    strides = (stored.strides[axes.index(axis)] // stored.itemsize for axis in range(3))
    return View(device.to_device(stored), tuple(strides))


def assert_close(name: str, got: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, roundings: int) -> None:
    """Sums whose terms' magnitudes add up to ``magnitude``, with at most ``roundings`` float32 roundings of each term."""
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(got[~finite], exact[~finite].astype(np.float32), err_msg=name)
    got, exact, magnitude = (np.where(finite, x, 0).astype(np.float64) for x in (got, exact, magnitude))
    error, budget = np.abs(got - exact), roundings * 2.0**-24 * magnitude
    if error.size:
        worst = np.unravel_index(np.argmax(error - budget), error.shape)
        assert np.all(error <= budget), f"{name}{list(worst)}: {got[worst]} for {exact[worst]}, allowed {budget[worst]}"


def padded_rows(x: np.ndarray, problem: Problem) -> np.ndarray:
    """(heads, seqlen_k, ...) on the padded token axis."""
    padded = np.zeros((x.shape[0], padded_tokens(problem), *x.shape[2:]), x.dtype)
    for source, count, row, _ in key_tiles(problem):
        padded[:, row : row + count] = x[:, source : source + count]
    return padded


def stored_rows(k: np.ndarray, problem: Problem) -> np.ndarray:
    """Rows of k (heads, seqlen_k, channels) as codes have them: padded, in ``stored_order``."""
    order = (np.arange(0, padded_tokens(problem), 64)[:, None] + stored_order()).reshape(-1)
    return padded_rows(k, problem)[:, order]


def padded_channels(x: np.ndarray, head_dim: int, a_channel: int) -> np.ndarray:
    """Codes (a_channel = 2) or scales (16) of rows of head_dim, with zeros up to whole k steps of 64."""
    width = -(-head_dim // 64) * 64 // a_channel
    return np.pad(x, [(0, 0), (0, 0), (0, width - x.shape[-1])])


def check(case: Case, device, implementation: str, inputs=None) -> None:
    """Everything that the pre-pass writes for one call."""
    problem, recipe, d = case.problem, case.recipe, case.head_dim
    q, k, v = case.inputs() if inputs is None else inputs
    to_host = device.to_host
    views = [view_of(x, case, device) for x in (q, k, v)]
    before = [to_host(view.array) for view in views]
    operands, q_mean, k_mean = prepare_with_means(*views, problem, recipe, implementation=implementation)
    for view, values in zip(views, before, strict=True):
        np.testing.assert_array_equal(to_host(view.array), values, err_msg="an input has changed")
    blocks = query_blocks(problem, recipe.smooth_q, rows_of_cta(implementation, d))
    np.testing.assert_array_equal(to_host(operands.blocks), blocks)

    sixteen = numpy_dtype("bfloat16" if case.dtype == "bfloat16" else "float16")
    rounded = (x.astype(sixteen).astype(np.float32) for x in (q, k, v))
    q16, k16, v16 = (x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in rounded)
    check_sixteen_bits(operands, views, (q16, k16, v16), case, to_host)
    if not recipe.is_quantized:
        for name in QUANTIZED:
            assert getattr(operands, name) is None
        return
    group = problem.qhead_per_kvhead
    sequences = list(problem.sequences())
    model = pre_pass(q, k, v, problem, recipe)

    km = np.zeros((k16.shape[0], len(sequences), d), np.float32)
    assert (k_mean is None) != recipe.smooth_k
    if recipe.smooth_k:
        km = to_host(k_mean).reshape(km.shape).astype(np.float32)
        for index, (sequence, made) in enumerate(zip(sequences, model, strict=True)):
            keys = k16[:, sequence.keys].astype(np.float64)
            exact, magnitude = made.k_mean.reshape(-1, d), np.abs(keys).sum(axis=1) / max(1, keys.shape[1])
            assert_close("km", km[:, index], exact, magnitude, 40 + keys.shape[1] // 512)
    k_smooth = np.zeros_like(k16)
    q_smooth, row_km = q16.copy(), np.zeros_like(q16)
    for index, sequence in enumerate(sequences):
        k_smooth[:, sequence.keys] = k16[:, sequence.keys] - km[:, index, None]
        row_km[:, sequence.queries] = np.repeat(km[:, index, None], group, axis=0)

    blocks = mean_blocks(problem, recipe.smooth_q)
    assert (q_mean is None) != (recipe.smooth_q is not None)
    if recipe.smooth_q is not None:
        qm = to_host(q_mean).reshape(q16.shape[0], len(blocks), d).astype(np.float32)
        assert operands.delta.shape == (q16.shape[0], 64 * delta_tiles(problem, recipe.smooth_q))
        check_delta(to_host(operands.delta), qm, k16, km, blocks, problem)
        for index, (first, stop, *_) in enumerate(blocks):
            rows = q16[:, first:stop].astype(np.float64)
            assert_close("qm", qm[:, index], rows.mean(axis=1), np.abs(rows).mean(axis=1), 16)
            q_smooth[:, first:stop] -= qm[:, index, None]
    else:
        assert operands.delta is None
    if recipe.smooth_k:
        products = q16.astype(np.float64) * row_km
        assert_close("shift", to_host(operands.shift), products.sum(-1), np.abs(products).sum(-1), 24)
    else:
        assert operands.shift is None

    there = VALUES if implementation == "dequant" else CODES
    for name in CODES + VALUES:
        assert (getattr(operands, name) is not None) == (name in there), name
    if implementation == "dequant":
        check_values(operands, q_smooth, k_smooth, v16, problem, recipe, to_host)
    elif implementation == "legacy":
        check_rows(operands, q_smooth, k_smooth, v16, problem, to_host)
    else:
        check_codes(operands, q_smooth, k_smooth, v16, problem, recipe, to_host)


def check_codes(operands, q_smooth, k_smooth, v16, problem, recipe, to_host) -> None:
    """Codes and scales of ``blockscale``."""
    d = problem.head_dim
    for name, x, scale in (("q", q_smooth, recipe.scale_q), ("k", stored_rows(k_smooth, problem), recipe.scale_k)):
        expected = nvfp4.quantize(x, scale=scale)
        codes, scales = to_host(getattr(operands, name)), to_host(getattr(operands, f"sf{name}"))
        np.testing.assert_array_equal(scales, padded_channels(expected.scales, d, 16), err_msg=f"sf{name}")
        np.testing.assert_array_equal(codes, padded_channels(expected.codes, d, 2), err_msg=name)
    expected = nvfp4.quantize(padded_rows(v16, problem), axis="tokens", scale=recipe.scale_v)
    np.testing.assert_array_equal(to_host(operands.sfv), expected.scales, err_msg="sfv")
    np.testing.assert_array_equal(to_host(operands.vt), expected.codes, err_msg="vt")


def check_rows(operands, q_smooth, k_smooth, v16, problem, to_host) -> None:
    """Codes and scales of ``legacy``: float32, of tokens of q and k, and of channels of v over each sequence."""
    for name, x in (("q", q_smooth), ("k", stored_rows(k_smooth, problem))):
        codes, scales = quantize_rows(x)
        np.testing.assert_array_equal(to_host(getattr(operands, f"sf{name}")), scales, err_msg=f"sf{name}")
        expected = padded_channels(pack_nibbles(codes), problem.head_dim, 2)
        np.testing.assert_array_equal(to_host(getattr(operands, name)), expected, err_msg=name)
    values = np.zeros((*v16.shape[:1], v16.shape[2], padded_tokens(problem)), np.uint8)
    for index, sequence in enumerate(problem.sequences()):
        codes, scales = quantize_rows(v16[:, sequence.keys].swapaxes(1, 2))
        np.testing.assert_array_equal(to_host(operands.sfv)[:, index], scales, err_msg="sfv")
        for source, count, padded, owner in key_tiles(problem):
            if owner == index:
                first = source - sequence.keys.start
                values[..., padded : padded + count] = codes[..., first : first + count]
    np.testing.assert_array_equal(to_host(operands.vt), pack_nibbles(values), err_msg="vt")


def check_values(operands, q_smooth, k_smooth, v16, problem, recipe, to_host) -> None:
    """What codes and scales stand for, of ``dequant``."""
    for name, x, scale in (("q_values", q_smooth, recipe.scale_q), ("k_values", k_smooth, recipe.scale_k)):
        assert dtype_name(getattr(operands, name)) == "float16"
        expected = nvfp4.dequantize(nvfp4.quantize(x, scale=scale))
        np.testing.assert_array_equal(to_host(getattr(operands, name)), expected, err_msg=name)
    padded = nvfp4.dequantize(nvfp4.quantize(padded_rows(v16, problem), axis="tokens", scale=recipe.scale_v))
    own = padded_rows(np.ones((1, problem.seqlen_k), bool), problem)[0]
    np.testing.assert_array_equal(to_host(operands.v_values), padded[:, own], err_msg="v_values")


def check_sixteen_bits(operands, views, expected, case, to_host) -> None:
    wanted = case.recipe.has_windows or not case.recipe.is_quantized
    for name, view, values in zip(("q16", "k16", "v16"), views, expected, strict=True):
        got = getattr(operands, name)
        if not wanted:
            assert got is None
        elif case.dtype != "float32":
            assert got is view, f"{name} is not the caller's own"
        else:
            heads, tokens, d = values.shape
            assert got.strides == (heads // case.batch * tokens * d, tokens * d, d)
            assert dtype_name(got.array) == "float16"
            np.testing.assert_array_equal(to_host(got.array).reshape(values.shape), values, err_msg=name)


def check_delta(got, qm, k16, km, blocks, problem) -> None:
    """Products of the tokens of the tiles that each block's queries see; zeros in padding."""
    group, d, tiles = problem.qhead_per_kvhead, qm.shape[-1], key_tiles(problem)
    qm, k16, km = qm.astype(np.float64), np.repeat(k16, group, axis=0), np.repeat(km, group, axis=0)
    for index, (_, _, sequence, delta_tile, begin, end) in enumerate(blocks):
        if begin == end:
            continue
        mean, mean_k = qm[:, index, :, None], km[:, sequence, None].astype(np.float64)
        keys = k16[:, tiles[begin, 0] : tiles[end - 1, 0] + tiles[end - 1, 1]].astype(np.float64)
        with np.errstate(invalid="ignore"):
            exact = ((keys - mean_k) @ mean)[..., 0]
            magnitude = ((np.abs(keys) + np.abs(mean_k)) @ np.abs(mean))[..., 0]
        values = got[:, 64 * (begin + delta_tile) : 64 * (end + delta_tile)]
        assert np.all(values[:, keys.shape[1] :] == 0), "padding"
        values, finite = values[:, : keys.shape[1]], np.isfinite(exact)
        # infinity times a part of qm that is zero is NaN, where the product as a whole is infinite; the codes of such a key
        # or query are NaN anyway
        assert not np.any(np.isfinite(values[~finite]))
        # Units of 2^-24 of the magnitudes: 4 for qm in 22 bits, 8.5 (17 before Hopper) for the 17 terms that an mma cuts at
        # 2^-25 (2^-24) of the largest, 2 for its rounding toward zero, 1 for each addition of 16 channels and the last one
        values, exact, magnitude = (np.where(finite, x, 0) for x in (values, exact, magnitude))
        assert_close("delta", values, exact, magnitude, 24 + d // 16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_numpy(device, case, implementation):
    check(case, device, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_equals_numpy_on_a_gpu(gpu, case, implementation):
    check(case, GpuDevice(gpu), implementation)


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_one_scale_a_row_equals_numpy(device, case):
    check(case, device, "legacy")


@pytest.mark.gpu
@pytest.mark.parametrize("case", of_every_kind(ROWS), ids=str)
def test_one_scale_a_row_equals_numpy_on_a_gpu(gpu, case):
    check(case, GpuDevice(gpu), "legacy")


def test_float32_that_nothing_quantises_becomes_float16(device):
    case = Case(NOTHING, "float32", batch=2, heads=(2, 1), lengths=((5, 9),), layout="bshd")
    check(case, device, device.implementation)


def test_float16_that_nothing_quantises_stays_as_it_is(device):
    check(Case(NOTHING, layout="bshd"), device, device.implementation)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_empty(device, lengths):
    check(Case(ACCURATE, heads=(4, 2), lengths=(lengths,)), device, device.implementation)


@pytest.mark.parametrize(
    ("recipe", "implementation"),
    [(ONLY_Q, "blockscale"), (ONLY_Q, "dequant"), (replace(ROWS, smooth_k=False), "legacy")],
    ids=["blockscale", "dequant", "legacy"],
)
def test_extreme_values(device, recipe, implementation):
    """Not finite, zero of both signs, subnormal, largest: where the contract of a block or row has its corners."""
    case = Case(recipe, lengths=((65, 64),))
    q, k, v = case.inputs(1)
    for x in (q, k, v):
        x[0, 0, 1, :16] = -0.0
        x[0, 0, 2, 16:32] = np.float16(6e-8)
        x[0, 0, 3, 32:48] = 65504
        x[0, 0, 4, 5] = np.inf
        x[0, 0, 5, 9] = np.nan
    q[0, 0, 4:6] = 1  # a mean that is not finite has no code to compare
    check(case, device, implementation, (q, k, v))


def test_corrections_of_small_queries_keep_their_bits(device):
    """Means far below the smallest normal float16, and beside them one channel far above."""
    case = Case(ONLY_Q, lengths=((130, 64),))
    q, k, v = case.inputs(2)
    q[:, :, :64] *= np.float16(2.0**-14)
    q[:, :, 64:] *= np.float16(2.0**-10)
    q[:, :, 64:, 3] = 100
    check(case, device, device.implementation, (q, k, v))


def test_the_same_input_gives_the_same_bits(device):
    case = CASES[0]
    views = [view_of(x, case, device) for x in case.inputs()]
    options = {"implementation": device.implementation}
    first, second = (prepare(*views, case.problem, case.recipe, **options) for _ in range(2))
    assert first.blocks is second.blocks, "tables were uploaded again"
    for name in (*(CODES if device.implementation == "blockscale" else VALUES), "delta", "shift"):
        got, again = device.to_host(getattr(first, name)), device.to_host(getattr(second, name))
        np.testing.assert_array_equal(got, again, err_msg=name)


def test_few_tables_are_kept():
    like = Machine("sm_120a").array(np.zeros(8, np.float16))
    tables_of = prepass_tables.tables_of
    tables = [tables_of(Problem(1, 1, 1, n, 8, 64), 64, 64, like) for n in range(prepass_tables.MAX_TABLES + 1)]
    assert tables_of(Problem(1, 1, 1, 0, 8, 64), 64, 64, like) is not tables[0], "the oldest is still there"
    assert tables_of(Problem(1, 1, 1, 1, 8, 64), 128, 64, like) is not tables[1]
    assert tables_of(Problem(2, 3, 3, 20, 8, 96), 64, 64, like) is tables[20], "batch and number of heads are not in them"


@pytest.mark.parametrize(
    "other",
    [
        Problem(1, 4, 2, 70, 90, 64),
        Problem(1, 4, 4, 70, 90, 64, causal=True),
        Problem(1, 4, 4, 70, 90, 64, window=(3, None)),
        Problem(1, 4, 4, 70, 90, 256),
    ],
    ids=["group", "causal", "window", "head_dim"],
)
def test_tables_depend_on_what_the_corrections_need(other):
    like = Machine("sm_120a").array(np.zeros(8, np.float16))
    tables_of, problem = prepass_tables.tables_of, Problem(1, 4, 4, 70, 90, 64)
    assert tables_of(problem, 64, 64, like) is not tables_of(other, 64, 64, like)
    assert tables_of(problem, None, 64, like) is tables_of(other, None, 64, like), "without Q smoothing there are none"


@pytest.mark.parametrize("use", ["capture", "another stream"])
def test_tables_that_may_be_read_again_later_stay(monkeypatch, use):
    like = Machine("sm_120a").array(np.zeros(8, np.float16))
    problem = Problem(1, 1, 1, 100, 100, 64)
    tables = prepass_tables.tables_of(problem, 64, 64, like)
    with monkeypatch.context() as patch:
        if use == "capture":
            patch.setattr(gpu_arrays, "is_capturing", lambda array: True)
        else:
            patch.setattr(gpu_arrays, "stream_of", lambda array: 7)
        assert prepass_tables.tables_of(problem, 64, 64, like) is tables
        if use == "capture":
            with pytest.raises(RuntimeError, match="the first call of these lengths copies tables; make it before"):
                prepass_tables.tables_of(Problem(1, 1, 1, 101, 100, 64), 64, 64, like)
    for n in range(prepass_tables.MAX_TABLES + 1):
        prepass_tables.tables_of(Problem(1, 1, 1, n, 8, 64), 64, 64, like)
    assert prepass_tables.tables_of(problem, 64, 64, like) is tables


@pytest.mark.gpu
def test_capture_in_a_graph(gpu):
    device = GpuDevice(gpu)
    to_host = device.to_host
    case = Case(ACCURATE, heads=(4, 2), lengths=((200, 300),))
    views = [view_of(x, case, device) for x in case.inputs()]
    stream = gpu.cuda.Stream()
    stream.wait_stream(gpu.cuda.current_stream())
    expected = prepare(*views, case.problem, case.recipe, implementation="blockscale")
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(graph, stream=stream):
        captured = prepare(*views, case.problem, case.recipe, implementation="blockscale")
    for n in range(prepass_tables.MAX_TABLES + 1):  # its tables stay, whatever comes after
        prepass_tables.tables_of(Problem(1, 1, 1, 1000 + n, 8, 64), 64, 64, views[0].array)
    views[0].array.mul_(2)
    graph.replay()
    gpu.cuda.synchronize()
    assert not np.array_equal(to_host(captured.shift), to_host(expected.shift))
    np.testing.assert_array_equal(to_host(captured.shift), 2 * to_host(expected.shift))
    np.testing.assert_array_equal(to_host(captured.q), to_host(expected.q))
    fresh = Case(ACCURATE, heads=(4, 2), lengths=((201, 299),))
    views = [view_of(x, fresh, device) for x in fresh.inputs()]
    with gpu.cuda.graph(gpu.cuda.CUDAGraph(), stream=stream):
        views[0].array.add(1)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="make it before the capture"):
            prepare(*views, fresh.problem, fresh.recipe, implementation="blockscale")


@pytest.mark.gpu
def test_offsets_beyond_32_bits(gpu, implementation):
    """Rows more than 2^31 elements apart."""
    tokens, pitch = 130, 1 << 25
    if gpu.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    device = GpuDevice(gpu)
    case = Case(SMOOTH_K, lengths=((tokens, tokens),), heads=(1, 1))
    memory = gpu.zeros((tokens - 1) * pitch + 64, dtype=gpu.float16, device="cuda")
    dense = view_of(case.inputs()[0], case, device)
    memory.as_strided((tokens, 64), (pitch, 1)).copy_(dense.array.reshape(tokens, 64))
    near, far = (
        prepare(*(view,) * 3, case.problem, case.recipe, implementation=implementation)
        for view in (dense, View(memory, (0, 0, pitch)))
    )
    for name in ("q", "k", "vt", "shift") if implementation == "blockscale" else (*VALUES, "shift"):
        got, expected = device.to_host(getattr(far, name)), device.to_host(getattr(near, name))
        np.testing.assert_array_equal(got, expected, err_msg=name)


def test_what_does_not_fit_is_refused():
    machine = Machine("sm_120a")

    def zeros(heads=1, dtype=np.float16, d=64):
        return View(machine.array(np.zeros((1, heads, 64, d), dtype)), (heads * 64 * d, 64 * d, d))

    problem = Problem(1, 1, 1, 64, 64, 64)
    x = zeros()
    with pytest.raises(ValueError, match="head_dim must be one of 64, 96, 128, 256, got 80; pad the last axis"):
        prepare_here(*(zeros(d=80),) * 3, Problem(1, 1, 1, 64, 64, 80), NAIVE)
    with pytest.raises(ValueError, match="dtype must be one of"):
        prepare_here(x, x, x, Problem(1, 1, 1, 64, 64, 64, "float64"), NAIVE)
    with pytest.raises(TypeError, match=r"k\.dtype must be float16, got float32"):
        prepare_here(x, zeros(dtype=np.float32), x, problem, NAIVE)
    with pytest.raises(ValueError, match=r"v\.strides must be multiples of 8 elements, got \(4096, 4096, 68\); copy it"):
        prepare_here(x, x, View(x.array, (4096, 4096, 68)), problem, NAIVE)
    wide = zeros(dtype=np.float32)
    with pytest.raises(ValueError, match=r"q\.strides must be multiples of 4 elements"):
        prepare_here(View(wide.array, (4096, 4096, 66)), wide, wide, Problem(1, 1, 1, 64, 64, 64, "float32"), NAIVE)
    with pytest.raises(ValueError, match="recipe must be in NVFP4 or in 16 bits as a whole"):
        prepare_here(x, x, x, problem, Recipe(v_format="f16"))
    with pytest.raises(ValueError, match=r"recipe must be one with v_axis='tokens', got 'head_dim'"):
        prepare_here(x, x, x, problem, Recipe())
    sinks = machine.array(np.zeros(1, np.float32))
    with pytest.raises(ValueError, match=r"sinks must be None, as problem\.has_sinks says, got an array"):
        prepare_here(x, x, x, problem, NAIVE, sinks)
    with_sinks = Problem(1, 1, 1, 64, 64, 64, has_sinks=True)
    with pytest.raises(ValueError, match="sinks must be an array"):
        prepare_here(x, x, x, with_sinks, NAIVE)
    with pytest.raises(ValueError, match=r"sinks must be of shape \(1,\), got \(2,\)"):
        prepare_here(x, x, x, with_sinks, NAIVE, machine.array(np.zeros(2, np.float32)))
    with pytest.raises(TypeError, match=r"sinks\.dtype must be float32, got float16"):
        prepare_here(x, x, x, with_sinks, NAIVE, machine.array(np.zeros(1, np.float16)))


@pytest.mark.gpu
def test_a_misaligned_array_is_refused(gpu):
    x = gpu.zeros(64 * 64 + 4, dtype=gpu.float16, device="cuda")[4:]
    view = View(x, (4096, 4096, 64))
    with pytest.raises(ValueError, match="q must be at an address that is a multiple of 16"):
        prepare_here(view, view, view, Problem(1, 1, 1, 64, 64, 64), NAIVE)


def test_more_ctas_than_a_grid_has_are_refused(monkeypatch):
    machine = Machine("sm_120a")
    view = View(machine.array(np.zeros((1, 1, 64, 64), np.float16)), (4096, 4096, 64))
    monkeypatch.setattr(prepass, "_MAX_CTAS", 0)
    with pytest.raises(ValueError, match="small enough for 0 CTAs a kernel, got 1; split the batch"):
        prepare_here(view, view, view, Problem(1, 1, 1, 64, 64, 64), NAIVE)
