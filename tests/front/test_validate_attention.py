"""``nbfmha validate --what attention``: its cases, what they notice, its table, JSON and plots, and what is in drawings."""

import json
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

from nbfmha import doctor, viz
from nbfmha.cli import app
from nbfmha.problem import Problem
from nbfmha.recipe import PRESETS, Recipe
from nbfmha.validate import Context, cases_attention, prepare, run_case, select_cases
from nbfmha.validate import attention_problems as problems
from nbfmha.validate.attention_problems import Attention
from nbfmha.validate.implementations import Emulated, Reference, Unavailable, choose
from nbfmha.viz.attention import KINDS, online_softmax, tile_kinds

CASES = select_cases("attention")
ON_IMPLEMENTATION = [case for case in CASES if case.evidence == "implementation"]
NEED_KERNELS = ("real_naive", "real_sage3", "real_fast", "real_accurate", "real_legacy")
CAUSAL = Problem(1, 1, 1, 512, 512, 64, causal=True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: doctor.Gpus((), "no NVIDIA driver is installed on this machine"))


def case_named(name):
    return next(case for case in CASES if case.name == name)


def validate(*arguments):
    return CliRunner().invoke(app, ["validate", *map(str, arguments)])


class TestWhat:
    def test_core_is_the_default_and_all_is_all_of_them(self):
        assert select_cases() == select_cases("core")
        assert select_cases("all") == (*select_cases("core"), *CASES, *select_cases("decode"))
        assert not {case.group for case in select_cases("core")} & {"attention"}
        assert {case.group for case in CASES} == {"attention"}
        names = [case.name for case in select_cases("all")]
        assert len(set(names)) == len(names)

    def test_refusals(self, no_gpu):
        with pytest.raises(ValueError, match="what must be one of 'core', 'attention', 'decode', 'all', got 'qk'"):
            select_cases("qk")
        for arguments, text in (
            (("--what", "qk"), "what must be one of 'core', 'attention', 'decode', 'all', got 'qk'"),
            (("--what", "attention", "--impl", "dequant"), "'dequant' cannot run here"),
            (("--what", "attention", "--json", "no/such/folder/x.json"), "cannot write no/such/folder/x.json"),
        ):
            result = validate(*arguments)
            assert result.exit_code == 2
            assert text in result.stderr.replace("\n", " ")
            assert result.stdout == ""


class TestCases:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_on_this_cpu(self, case):
        outcome = run_case(case, Context(Reference()))
        assert outcome.result.status == ("skip" if case.name in NEED_KERNELS else "pass"), outcome.result.reason

    @pytest.mark.parametrize("seed", [1, 2])
    @pytest.mark.parametrize("case", ON_IMPLEMENTATION, ids=lambda case: case.name)
    def test_other_seeds(self, case, seed):
        outcome = run_case(case, Context(Reference(), seed=seed))
        assert outcome.result.status != "fail", outcome.result.reason

    def test_legacy_on_the_emulator(self):
        outcome = run_case(case_named("real_legacy"), Context(Emulated("sm_120a")))
        assert outcome.result.status == "pass", outcome.result.reason
        assert 0 < outcome.result.details["relative_l2"] < 1e-3

    @pytest.mark.parametrize("name", ["real_accurate", "packed"])
    def test_on_the_emulator(self, name):
        """One recipe, so one set of kernels."""
        outcome = run_case(case_named(name), Context(Emulated("sm_120a")))
        assert outcome.result.status == "pass", outcome.result.reason
        assert outcome.subject == "emulated"
        assert 0 < outcome.result.details["relative_l2"] < 5e-4
        assert outcome.result.details["largest_budget"] > outcome.result.max_abs_error > 0

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", ["dequant", "blockscale"])
    @pytest.mark.parametrize("case", ON_IMPLEMENTATION, ids=lambda case: case.name)
    def test_on_this_gpu(self, case, name):
        try:
            implementation = choose(name)
        except Unavailable as reason:
            pytest.skip(str(reason))
        outcome = run_case(case, Context(implementation))
        assert outcome.result.status == "pass", outcome.result.reason

    def test_few_kernels_are_compiled(self):
        """A forward kernel for each recipe; the pre-pass has one of each kind, and more where scales or blocks differ."""
        names = [kernel.name for kernel in prepare.launched_kernels("sm_120a", CASES)]
        assert len([name for name in names if "make_prefill" in name]) <= 5
        assert len(names) <= 20, names

    def test_legacy_is_skipped_where_its_mma_is_not(self):
        class Older(OffBy):
            recipes = tuple(recipe for recipe in PRESETS.values() if recipe.scale_per == "block")

        outcome = run_case(case_named("real_legacy"), Context(Older(lambda out, lse: None)))
        assert (outcome.result.status, "needs sm_120a" in outcome.result.reason) == ("skip", True)


class OffBy(Reference):
    """The recipes' models, with something wrong in the last call's results."""

    runs_kernels = True

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def attention(self, q, k, v, **options):
        out, lse = super().attention(q, k, v, **options)
        self.spoil(out, lse)
        return out, lse


def one_output(out, lse):
    out[-1, -1, -1] += 0.05 + 0.2 * abs(out[-1, -1, -1])


def one_lse(out, lse):
    lse[-1, -1] += 1e-3


def spoilt_everywhere(out, lse):
    out *= 1 + 3e-3


class TestWhatFails:
    @pytest.mark.parametrize("case", ON_IMPLEMENTATION, ids=lambda case: case.name)
    @pytest.mark.parametrize("spoil", [one_output, one_lse])
    def test_one_wrong_number(self, case, spoil):
        result = run_case(case, Context(OffBy(spoil))).result
        assert result.status == "fail"
        assert "raised" not in result.metric, result.reason

    @pytest.mark.parametrize("name", ["real_naive", "real_sage3", "real_fast"])
    def test_a_small_error_of_all_outputs(self, name):
        result = run_case(case_named(name), Context(OffBy(spoilt_everywhere))).result
        assert result.status == "fail"
        assert result.reason.startswith("relative L2 0.0029")

    @pytest.mark.parametrize("name", NEED_KERNELS)
    def test_another_recipe(self, name):
        class Wrong(OffBy):
            def attention(self, q, k, v, *, recipe, **options):
                other = {"real_naive": "sage3"}.get(name, "naive")
                return super().attention(q, k, v, recipe=other, **options)

        result = run_case(case_named(name), Context(Wrong(lambda out, lse: None))).result
        assert result.status == "fail"

    def test_masked_rows_must_be_exact(self):
        def spoil(out, lse):
            out[0, 0, 0] = 1e-7

        result = run_case(case_named("masked_rows"), Context(OffBy(spoil))).result
        assert result.reason.startswith("1 of 33800 elements outside their budget")

    def test_a_wrong_shape(self):
        class Turned(Reference):
            def attention(self, q, k, v, **options):
                out, lse = super().attention(q, k, v, **options)
                return out.swapaxes(-1, -2), lse

        result = run_case(case_named("exact_inputs"), Context(Turned())).result
        assert (result.status, result.metric) == ("fail", "wrong kind of result")

    def test_accurate_without_its_windows(self, monkeypatch):
        expected, outputs = cases_attention.sample_outputs()
        monkeypatch.setattr(cases_attention, "sample_outputs", lambda: (expected, outputs | {"accurate": outputs["sage3"]}))
        result = run_case(case_named(cases_attention.ACCURACY), Context(Reference())).result
        assert result.status == "fail"
        assert "1.000, allowed 0.333" in result.metric


class TestInputs:
    @pytest.mark.parametrize("name", PRESETS)
    def test_exact_inputs_are_exact(self, name):
        """Quantised and smoothed by every recipe, they are what they were."""
        from nbfmha.recipe_model import pre_pass

        q, k, v = problems.exact_inputs(np.random.default_rng(0), 101, 85)
        (made,) = pre_pass(q, k, v, Problem.of(q, k, v), PRESETS[name])
        for before, after in ((q, made.q_nvfp4), (k, made.k_nvfp4), (v, made.v_nvfp4)):
            np.testing.assert_array_equal(after.reshape(before.shape), before)
        assert not made.q_mean.any()
        assert not made.k_mean.any()
        assert set(np.unique(q)) == set(problems.NUMBERS)

    def test_real_inputs_meet_tiles_of_every_kind(self):
        q, k, v = problems.real_inputs(Context(Reference()).sample)
        problem = Problem.of(q, k, v, causal=True)
        assert set(np.unique(tile_kinds(problem, PRESETS["accurate"]))) == {0, 1, 3, 4}

    def test_budget_of_the_lse(self):
        budget = problems.lse_budget(np.array([0.5, -np.inf, -20.0]))
        np.testing.assert_allclose(budget, [1.2e-4, 0, 1.2e-4])
        np.testing.assert_array_equal(problems.lse_budget(np.full(2, -np.inf)), [0, 0])

    def test_judge_of_one_call_and_of_several(self):
        one = Attention(np.ones((1, 2, 4)), np.zeros((1, 2)))
        off = Attention(one.out + 0.25, one.lse)
        budget = Attention(np.full((1, 2, 4), 0.5), np.zeros((1, 2)))
        result = problems.judge(off, one, budget, note="x")
        assert result.status == "pass"
        assert result.metric == "10 outputs and LSEs (allowed up to 5.0e-01), worst at 50% of the budget"
        assert result.details["relative_l2"] == pytest.approx(0.25)
        assert result.details["note"] == "x"
        assert problems.judge([one, off], [one, one], [budget, budget]).details["elements"] == 20
        assert problems.judge(off, one, budget, relative_l2=0.2).status == "fail"


def test_command_with_json_and_plots(tmp_path, no_gpu):
    path, plots = tmp_path / "out.json", tmp_path / "plots"
    result = validate("--what", "attention", "--impl", "reference", "--json", path, "--plot", plots)
    assert result.exit_code == 0
    assert "passed: 9 of 14 cases, 5 skipped" in result.stdout
    assert "7 cases with implementation 'reference'" in result.stdout
    (line,) = (line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["accurate"])
    report = json.loads(path.read_text())
    assert (report["what"], report["ok"], report["implementation"]) == ("attention", True, "reference")
    assert [case["name"] for case in report["cases"]] == [case.name for case in CASES]
    details = report["cases"][-1]["details"]
    assert list(details["recipes"]) == list(PRESETS)
    accurate = details["recipes"]["accurate"]
    assert set(accurate) == {"cosine", "relative_l2", "worst_row", "lse_error"}
    assert line[1:] == [f"{accurate['cosine']:.5f}", *(f"{accurate[key]:.4f}" for key in list(accurate)[1:])]
    assert details["ratio"] < 1 / 3
    assert {file.name for file in plots.iterdir()} == {"attention_accuracy.png", "attention_error_map.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in plots.iterdir())


class TestDrawings:
    def kinds(self, problem, recipe):
        return [[KINDS[kind] for kind in row] for row in tile_kinds(problem, recipe)]

    def test_tiles_of_a_causal_problem(self):
        kinds = self.kinds(CAUSAL, PRESETS["accurate"])
        assert kinds[0] == ["16 bits, masked in part", *["skipped"] * 7]
        assert kinds[5] == ["16 bits", *["NVFP4"] * 3, "16 bits", "16 bits, masked in part", "skipped", "skipped"]
        kinds = self.kinds(CAUSAL, PRESETS["sage3"])
        assert kinds[7] == [*["NVFP4"] * 7, "NVFP4, masked in part"]
        assert self.kinds(CAUSAL, Recipe(qk="f16", v_format="f16"))[7] == [*["16 bits"] * 7, "16 bits, masked in part"]

    def test_tiles_of_a_chunk_with_a_window_and_no_whole_blocks(self):
        problem = Problem(1, 1, 1, 70, 300, 64, causal=True, q_offset=200, window=(100, None))
        kinds = tile_kinds(problem, PRESETS["naive"])
        assert kinds.shape == (2, 5)
        # queries 200..263 see keys 100..263, 264..269 keys 164..269
        np.testing.assert_array_equal(kinds, [[0, 2, 2, 2, 2], [0, 0, 2, 1, 2]])

    def test_packed_sequences_are_refused(self):
        problem = Problem(1, 1, 1, 8, 8, 64, cu_seqlens_q=(0, 4, 8), cu_seqlens_k=(0, 4, 8))
        with pytest.raises(ValueError, match="problem must be one sequence, got packed ones"):
            viz.draw_tiles_of(problem, PRESETS)

    def test_tiles_are_counted(self):
        figure = viz.draw_tiles_of(CAUSAL, {name: PRESETS[name] for name in ("sage3", "accurate")})
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert titles == ["sage3: 100% of 36 tiles in NVFP4", "accurate: 42% of 36 tiles in NVFP4"]

    def test_online_softmax_ends_at_the_softmax(self):
        rng = np.random.default_rng(0)
        scores, values = 3 * rng.standard_normal(150), rng.standard_normal((150, 8))
        steps = list(online_softmax(scores, values))
        weights = np.exp(scores - scores.max())
        assert len(steps) == 3
        assert steps[-1].row_max == scores.max()
        assert steps[-1].row_sum == pytest.approx(weights.sum())
        np.testing.assert_allclose(steps[-1].out, weights @ values / weights.sum())
        assert steps[0].rescale == 0
        for before, after in pairwise(steps):
            assert after.rescale == np.exp(before.row_max - after.row_max) <= 1
        figure = viz.draw_online_softmax(scores, values, title="t")
        assert len(figure.axes) == 4
        assert [len(axes.patches) for axes in figure.axes[1:]] == [3, 3, 3]

    def test_errors_are_labelled(self):
        rng = np.random.default_rng(0)
        expected = rng.standard_normal((3, 64, 8))
        outs = {"a": expected * 1.5, "b": expected * 1.25}
        figure = viz.draw_accuracy(outs, expected, title="t")
        bars, curves = figure.axes
        assert [text.get_text() for text in bars.texts] == [" 0.5000", " 0.2500"]
        assert [line.get_label() for line in curves.lines] == ["a", "b"]
        np.testing.assert_allclose(curves.lines[1].get_ydata(), 0.25)
        (only,) = viz.draw_relative_l2({"x": 0.125}, title="t").axes
        assert [text.get_text() for text in only.texts] == [" 0.1250"]
        maps = [axes for axes in viz.draw_error_map(outs, expected, title="t").axes if axes.images]
        np.testing.assert_allclose(10 ** maps[0].images[0].get_array(), 0.5)
