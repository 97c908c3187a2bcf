"""The runner, the table, the summary and the JSON, on cases made up for the purpose."""

import json

import numpy as np
import pytest
from rich.console import Console

from nbfmha.testing import compare
from nbfmha.validate import report
from nbfmha.validate.case import Case, Context, Registry, Result
from nbfmha.validate.runner import run_cases

ENVIRONMENT = {"gpus": [], "gpu_reason": "no NVIDIA driver is installed on this machine"}


class Fake:
    name, proof, on_gpu = "reference", "a model", False


@pytest.fixture
def context():
    return Context(implementation=Fake(), target="sm_120a")


def make_registry():
    registry = Registry()

    @registry.case("formats", "good", evidence="computed")
    def good(context):
        return Result.of(compare([1.0], [1.0]), "values", scores=np.float32(3), odd=float("nan"))

    @registry.case("qk", "bad", evidence="implementation")
    def bad(context):
        return Result.of(compare([[1.0, 2.0]], [[1.0, 2.5]]), "scores")

    @registry.case("mma", "crashes [really]", evidence="model")
    def crashes(context):
        raise KeyError("no such thing")

    @registry.case("assembled", "absent", evidence="assembled")
    def absent(context):
        return Result.skipped("no toolchain")

    return registry


def run(context, cases, **options):
    console = Console(record=True, width=140, **options)
    with report.LiveReport(console, cases) as live:
        outcomes = run_cases(cases, context, before=live.before, after=live.after)
    console.print(report.summary(outcomes, context, ENVIRONMENT, 1.25), soft_wrap=True)
    return outcomes, console.export_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_every_outcome_is_in_the_table_and_the_summary(context, terminal, capsys):
    outcomes, text = run(context, make_registry().cases(), force_terminal=terminal)
    assert [outcome.result.status for outcome in outcomes] == ["pass", "fail", "fail", "skip"]
    assert "worst at [0, 1]: got 2.0, expected 2.5, |error| 0.5" in text.replace("\n", " ") or "worst at [0, 1]" in text
    assert "crashes [really]" in text
    assert "KeyError at test_runner_report.py" in text
    assert "FAILED: 2 of 4 cases, 1 skipped in 1.2 s" in text
    assert "qk/bad:" in text
    assert "mma/crashes:" in text
    assert "No kernel was assembled in this run." in text
    assert "was not run on hardware here" in text


def test_json_is_strict_and_complete(context, tmp_path):
    outcomes, _ = run(context, make_registry().cases())
    path = tmp_path / "out.json"
    report.write_json(path, report.as_json(outcomes, context, ENVIRONMENT, 1.25))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(path.read_text(), parse_constant=refuse)
    assert data["ok"] is False
    assert data["counts"] == {"pass": 1, "fail": 2, "skip": 1}
    assert [case["name"] for case in data["cases"]] == ["good", "bad", "crashes", "absent"]
    assert data["cases"][0]["details"]["scores"] == 3.0
    assert data["cases"][0]["details"]["odd"] == "nan"
    assert data["cases"][1]["implementation"] == "reference"
    assert data["environment"]["gpu_reason"]


def test_result_of_a_comparison():
    exact = Result.of(compare([1.0], [1.0]), "scores")
    assert (exact.status, exact.metric, exact.max_abs_error) == ("pass", "1 scores exact", 0.0)
    close = Result.of(compare([1.0], [1.5], 1.0), "scores")
    assert close.metric == "1 scores, worst at 50% of the budget"
    wrong = Result.of(compare([1.0], [1.5], 0.25), "scores")
    assert wrong.status == "fail"
    assert "got 1.0, expected 1.5" in wrong.reason


def test_registry_refuses_doubles_and_unknown_groups():
    registry = make_registry()
    with pytest.raises(ValueError, match="'good' twice"):
        registry.case("formats", "again", evidence="computed", name="good")(lambda context: None)
    with pytest.raises(ValueError, match="group must be one of"):
        Case("x", "nonsense", "x", "computed", lambda context: None)
    with pytest.raises(ValueError, match="evidence must be one of"):
        Case("x", "qk", "x", "hearsay", lambda context: None)


def test_random_numbers_depend_on_name_and_seed_only():
    first, second = Context(Fake(), seed=1), Context(Fake(), seed=1)
    first.rng("something else").random(100)
    assert first.rng("a").random() == second.rng("a").random()
    assert first.rng("a").random() != first.rng("b").random()
    assert first.rng("a").random() != Context(Fake(), seed=2).rng("a").random()


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0, "0"), (1.5e-7, "1.50e-07"), (float("inf"), "inf")])
def test_error_column(value, text):
    assert report.format_error(value) == text
