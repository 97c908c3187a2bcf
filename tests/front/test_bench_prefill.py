"""The forward benchmark: operations counted, the table, what it refuses; inputs on which a wrong kernel cannot pass."""

import numpy as np
import pytest
from typer.testing import CliRunner

from nbfmha.bench import compare, measure, prefill
from nbfmha.cli import app


def no_gpu():
    raise RuntimeError("no GPU in this test")


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_shapes_and_their_operations():
    assert len(set(prefill.SHAPES)) == 12
    for shape in prefill.SHAPES:
        assert shape.heads * shape.head_dim == prefill.WIDTH
        assert shape.batch * shape.length == prefill.TOKENS
        # two products of length x length x head_dim, 2 operations a term, or the half of them
        terms = shape.batch * shape.heads * shape.length**2 * shape.head_dim
        assert shape.flops == 2 * 2 * terms // (1 + shape.causal)


def row(shape, name, milliseconds, cudnn_ms=4.0, relative_l2=0.07):
    return prefill.Row(shape, name, milliseconds, 8.0, cudnn_ms, 700.0, relative_l2)


def test_a_row_compares():
    one = row(prefill.Shape(1, 16, 16384, 128, False), "x", 10.0)
    assert one.tflop_s == pytest.approx(4 * 16 * 16384**2 * 128 / 0.01 / 1e12)
    assert (one.times_flash, one.times_cudnn) == (0.8, 0.4)
    assert one.share_of_ceiling == pytest.approx(one.tflop_s / 700)
    assert row(one.shape, "x", 10.0, cudnn_ms=None).times_cudnn is None


def test_the_table_has_a_section_a_shape():
    first, second = prefill.SHAPES[:2]
    rows = [
        row(first, "FlashAttention-2", 8.0, relative_l2=None),
        row(first, "accurate, end to end", 16.0),
        row(second, "FlashAttention-2", 8.0, cudnn_ms=None, relative_l2=None),
    ]
    console = measure.console()
    with console.capture() as capture:
        console.print(prefill.table(rows, {"accurate": "dequant", "fast": "dequant"}, "some GPU"))
    text = capture.get()
    assert "on some GPU" in text
    assert "ours: accurate by dequant, fast by dequant; matrix product 700 to 700 TFLOP/s" in text
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert [line[0] for line in lines] == ["64, 1024, no", "", "64, 1024, yes"]
    assert lines[0][1:3] == ["FlashAttention-2", "8.000"]
    assert (lines[0][-1], lines[2][5]) == ("-", "-")
    assert lines[1][1:] == ["accurate, end to end", "16.000", f"{rows[1].tflop_s:.0f}", "0.50", "0.25", "1%", "0.0700"]


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(measure, "require_gpu", no_gpu)
    result = run("prefill")
    assert (result.exit_code, result.stderr.strip()) == (2, "error: no GPU in this test")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prefill", "--recipes", "accurate,quick"), "recipes must be one of 'naive', 'sage3', 'fast', 'accurate'"),
        (("launch", "--recipes", "fast"), "--recipes belongs to the benchmark prefill, got 'launch'"),
    ],
)
def test_what_it_refuses(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize("causal", [False, True])
def test_the_bound_parts_right_from_wrong(torch, causal):
    from nbfmha import reference
    from nbfmha.problem import Problem
    from nbfmha.recipe import PRESETS
    from nbfmha.recipe_model import recipe_attention

    shape = prefill.Shape(1, 2, 320, 64, causal)
    q, k, v = (x.numpy() for x in prefill.make_inputs(torch, shape, "cpu"))
    problem = Problem.of(q, k, v, causal=causal)
    expected = torch.from_numpy(reference.attention(q, k, v, problem))

    def distance(out):
        return compare.worst_head(torch, torch.from_numpy(np.ascontiguousarray(out)), expected)

    for recipe in PRESETS:
        assert distance(recipe_attention(q, k, v, problem, recipe)[0]) < prefill.RELATIVE_L2_BOUND
    wrong = {
        "heads exchanged": expected.numpy()[:, ::-1],
        "queries one late": np.roll(expected.numpy(), 1, axis=2),
        "values one late": reference.attention(q, k, np.roll(v, 1, axis=2), problem),
        "keys one late": reference.attention(q, np.roll(k, 1, axis=2), v, problem),
        "weights uniform": reference.attention(0 * q, k, v, problem),
        "mask": reference.attention(q, k, v, Problem.of(q, k, v, causal=not causal)),
        "first tile lost": reference.attention(q, k, 0 * v + v * (np.arange(320) >= 64)[:, None], problem),
    }
    for name, out in wrong.items():
        assert distance(out) > 2 * prefill.RELATIVE_L2_BOUND, name
    assert not distance(np.full(expected.shape, np.nan)) < prefill.RELATIVE_L2_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu_a_small_shape_is_checked_and_timed(gpu, monkeypatch, head_dim, causal):
    # cuBLAS refuses to work while the fixture asks for deterministic algorithms
    monkeypatch.setattr(prefill, "_product", lambda torch: lambda: torch.zeros(256, device="cuda"))
    shape = prefill.Shape(2, 3, 448, head_dim, causal)
    rows, implementations = prefill.time_shape(gpu, shape, prefill.RECIPES, rounds=1)
    ours = [f"{recipe}, {what}" for recipe in prefill.RECIPES for what in ("kernel alone", "end to end")]
    assert [row.name for row in rows if row.name not in (compare.FLASH, compare.CUDNN)] == ours
    assert set(implementations) == set(prefill.RECIPES)
    assert all(0 < row.relative_l2 < prefill.RELATIVE_L2_BOUND for row in rows if row.name in ours)
    assert all(row.tflop_s > 0 for row in rows)
    assert gpu.are_deterministic_algorithms_enabled(), "the fixture's setting is left as it was"


@pytest.mark.gpu
def test_on_a_gpu_a_wrong_output_stops_it(gpu, monkeypatch):
    import nbfmha

    right = nbfmha.attention
    monkeypatch.setattr(nbfmha, "attention", lambda q, *rest, **options: right(q, *rest, **options).roll(1, dims=2))
    with pytest.raises(AssertionError, match=r"accurate, end to end.*must be below 0\.15"):
        prefill.check(gpu, prefill.Shape(1, 2, 256, 64, False), ("accurate",))
