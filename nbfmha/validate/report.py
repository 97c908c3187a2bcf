"""The tables, the summary and the JSON of a validation run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nbfmha.tables import Block
from nbfmha.validate.case import EVIDENCE, GROUPS, Case, Context
from nbfmha.validate.runner import Outcome

_VERDICT = {"pass": Text("pass", "green"), "fail": Text("FAIL", "bold red"), "skip": Text("skip", "yellow")}


def format_error(value: float | None) -> str:
    """The table's "worst error" column: "0" for exact, "-" where no numbers are compared."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.2e}"


class OutcomeTable:
    """The rich table of outcomes, grown row by row; ``.table`` is what to print (a notebook displays it too)."""

    def __init__(self, outcomes: Sequence[Outcome] = ()):
        self.table = Table(box=box.SIMPLE_HEAD, expand=False, pad_edge=False)
        self.table.add_column("case")
        self.table.add_column("on", no_wrap=True)
        self.table.add_column("finding")
        self.table.add_column("worst error", justify="right", no_wrap=True)
        self.table.add_column("", no_wrap=True)
        self._group = None
        for outcome in outcomes:
            self.add(outcome)

    def add(self, outcome: Outcome) -> None:
        """Append a row, under a heading where a new group begins."""
        case, result = outcome.case, outcome.result
        if case.group != self._group:
            if self._group is not None:
                self.table.add_section()
            self._group = case.group
            self.table.add_row(Text(GROUPS[case.group], "bold"), "", "", "", "")
        finding = Text(result.metric)
        if result.reason:
            finding.append(f"\n{result.reason}", "red" if result.status == "fail" else "yellow")
        error = format_error(result.max_abs_error)
        self.table.add_row("  " + escape(case.title), escape(outcome.subject), finding, error, _VERDICT[result.status])


class LiveReport:
    """A context manager around ``run_cases(..., before=, after=)``: the latest rows and a progress bar while cases run on
    a terminal, and the whole table at the end, on a terminal or in a log."""

    def __init__(self, console: Console, cases: Sequence[Case]):
        self._console = console
        self._outcomes: list[Outcome] = []
        self._said: set[str] = set()
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._progress.add_task("starting", total=len(cases))
        self._live = Live(self._progress, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> LiveReport:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        self._live.stop()
        self._console.print(OutcomeTable(self._outcomes).table)

    def before(self, case: Case) -> None:
        self._progress.update(self._task, description=escape(f"{case.group}: {case.title}"))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While entered, the progress bar says what the case is waiting for; a log says it once."""
        task = self._progress.tasks[0]
        before = task.description
        self._progress.update(self._task, description=escape(what))
        if not self._console.is_terminal and what not in self._said:
            self._said.add(what)
            self._console.print(f"{what} ...", style="dim", soft_wrap=True)
        yield
        self._progress.update(self._task, description=before)

    def after(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._progress.advance(self._task)
        if self._live.is_started:
            # a row may take several lines, and Live cuts off what is taller than the terminal
            latest = self._outcomes[-max(1, self._console.height // 4) :]
            self._live.update(Group(OutcomeTable(latest).table, self._progress))


def extra_tables(outcomes: Sequence[Outcome]) -> list[Block]:
    """What cases found beyond one line each: the accuracy of the recipes, and of the KV caches."""
    from nbfmha.validate.cases_attention import ACCURACY
    from nbfmha.validate.cases_decode import QUALITY

    tables = {ACCURACY: ("recipes", accuracy_table), QUALITY: ("caches", quality_table)}
    found = [(*tables[outcome.case.name], outcome.result.details) for outcome in outcomes if outcome.case.name in tables]
    return [make(details[key]) for key, make, details in found if key in details]


def accuracy_table(recipes: Mapping[str, Mapping[str, float]]) -> Block:
    """A row for each recipe, of the fields of ``nbfmha.accuracy.Accuracy``."""
    title = "Real attention (layer 9 of SmolLM2-135M, 512 tokens, 9 heads, causal) against float64, inputs not quantised"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for name in ("cosine", "relative L2", "worst row", "largest LSE error"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in recipes.items():
        figures = (one["cosine"], one["relative_l2"], one["worst_row"], one["lse_error"])
        table.add_row(escape(name), f"{figures[0]:.5f}", *(f"{figure:.4f}" for figure in figures[1:]))
    return Block(Text(title, "bold"), table)


def quality_table(caches: Mapping[str, Mapping[int, float]]) -> Block:
    """A row for each KV cache: tokens that are appended at a time -> relative L2, as ``nbfmha.accuracy`` has them."""
    title = "Real attention (layer 9 of SmolLM2-135M) from a KV cache: relative L2 against float64, nothing quantised"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", no_wrap=True)
    for chunk in next(iter(caches.values())):
        table.add_column(f"{chunk} tokens at a time", justify="right", no_wrap=True)
    for name, errors in caches.items():
        table.add_row(escape(name), *(f"{error:.4f}" for error in errors.values()))
    return Block(Text(title, "bold"), table)


def summary(outcomes: Sequence[Outcome], context: Context, environment: dict, seconds: float) -> Text:
    """What was proved, how, and what was not."""
    count = Counter(outcome.result.status for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.result.status == "fail"]
    text = Text()
    if failed:
        text.append(f"FAILED: {count['fail']} of {len(outcomes)} cases", "bold red")
    else:
        text.append(f"passed: {count['pass']} of {len(outcomes)} cases", "bold green")
    skipped = f", {count['skip']} skipped" if count["skip"] else ""
    text.append(f"{skipped} in {seconds:.1f} s\n")
    for outcome in failed:
        text.append(f"  {outcome.case.group}/{outcome.case.name}: {outcome.result.reason}\n", "red")
    text.append("What this shows\n", "bold")
    for line in statements(outcomes, context, environment):
        text.append(f"  {line}\n")
    return text


def statements(outcomes: Sequence[Outcome], context: Context, environment: dict) -> list[str]:
    """One sentence for each kind of evidence that passed, and one for each that is missing."""
    passed: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.result.status == "pass":
            passed.setdefault(outcome.case.evidence, []).append(outcome)
    lines = []
    if some := passed.get("computed"):
        lines.append(f"{_cases(some)} computed in NumPy on this CPU: {_groups(some)}.")
    if "model" in passed:
        lines.append(
            "The NumPy model of the MMA gives every result that a third party read from an RTX PRO 6000 (sm_120); the "
            "published 35 fraction bits of its sums are beyond what those results can show."
        )
    if some := passed.get("implementation"):
        chosen = context.implementation
        lines.append(f"{_cases(some)} with implementation '{chosen.name}', {chosen.proof}: {_groups(some)}.")
    if some := passed.get("assembled"):
        lines.append(f"{_cases(some)} assembled for {context.target}, their machine code read and not run.")
    else:
        lines.append("No kernel was assembled in this run.")
    if context.implementation.name != "blockscale":
        lines.append("The block-scale MMA itself was not run on hardware here: that needs a GPU of sm_120a or sm_121a.")
    if not context.implementation.on_gpu:
        lines.append(f"No GPU was used: {environment['gpu_reason'] or 'the implementation runs on the CPU'}.")
    return lines


def _cases(outcomes: Sequence[Outcome]) -> str:
    return "1 case" if len(outcomes) == 1 else f"{len(outcomes)} cases"


def _groups(outcomes: Sequence[Outcome]) -> str:
    return "; ".join(dict.fromkeys(GROUPS[outcome.case.group] for outcome in outcomes))


def as_json(outcomes: Sequence[Outcome], context: Context, environment: dict, seconds: float) -> dict:
    """The whole run as JSON-ready data."""
    count = Counter(outcome.result.status for outcome in outcomes)
    return {
        "implementation": context.implementation.name,
        "implementation_proof": context.implementation.proof,
        "target": context.target,
        "seed": context.seed,
        "seconds": round(seconds, 3),
        "ok": count["fail"] == 0,
        "counts": {status: count[status] for status in ("pass", "fail", "skip")},
        "statements": statements(outcomes, context, environment),
        "evidence": EVIDENCE,
        "environment": environment,
        "cases": [outcome.as_json() for outcome in outcomes],
    }


def write_json(path: Path, report: dict) -> None:
    """Write the report; NaN and infinities become strings, so that the file is strict JSON."""
    path.write_text(json.dumps(_strict(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _strict(value):
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
