"""One ``nbfmha validate`` from its options to its verdict."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nbfmha import doctor
from nbfmha.validate import implementations, report, run_cases, select_cases
from nbfmha.validate.case import Case, Context

DEFAULT_TARGET = "sm_120a"


def run(
    console: Console,
    *,
    what: str = "core",
    impl: str = "auto",
    arch: str | None = None,
    json_path: Path | None = None,
    plot_directory: Path | None = None,
    seed: int = 0,
) -> bool:
    """Run the cases of ``what``, print the tables and the summary; True when nothing failed.

    what: an entry of ``nbfmha.validate.WHAT``; impl: an entry of ``implementations.CHOICES``; arch: a target to assemble
    and emulate for, None for sm_120a where the toolchain is installed; json_path, plot_directory: where to write the
    report and the drawings. Raises ValueError for an unknown ``what``, implementation or target,
    ``implementations.Unavailable`` for an implementation that cannot run here, and OSError for a file that could not be
    written, before any case runs where that can be known.
    """
    cases = select_cases(what)
    target = check_target(arch or DEFAULT_TARGET)
    context = Context(
        implementation=implementations.choose(impl, target),
        target=target,
        target_required=arch is not None,
        seed=seed,
    )
    if json_path is not None:
        json_path.touch()
    if plot_directory is not None:
        plot_directory.mkdir(parents=True, exist_ok=True)
    if impl == "auto":
        for line in implementations.explain_auto():
            console.print(f"auto: {line}", style="dim", soft_wrap=True)
    console.print(f"implementation [bold]{context.implementation.name}[/]: {context.implementation.proof}", soft_wrap=True)
    machine = doctor.inspect()
    environment = machine.as_json()
    start = time.perf_counter()
    with report.LiveReport(console, cases) as live, _prepared(context, cases, live) as context:
        outcomes = run_cases(cases, context, before=live.before, after=live.after)
    seconds = time.perf_counter() - start
    for table in report.extra_tables(outcomes):
        console.print(table)
    console.print(report.summary(outcomes, context, environment, seconds), soft_wrap=True)
    if json_path is not None:
        report.write_json(json_path, {"what": what, **report.as_json(outcomes, context, environment, seconds)})
        console.print(f"report: {json_path}", soft_wrap=True)
    if plot_directory is not None:
        from nbfmha.validate import plots

        for path in plots.draw_all(plot_directory, context, what):
            console.print(f"plot: {path}", soft_wrap=True)
    return all(outcome.result.status != "fail" for outcome in outcomes)


@contextlib.contextmanager
def _prepared(context: Context, cases: Sequence[Case], live: report.LiveReport) -> Iterator[Context]:
    """The context; where kernels are emulated, with what they need being compiled while the first cases run."""
    if context.implementation.name != "emulated":
        yield context
        return
    from nbfmha.validate.prepare import PreparedMachine

    with PreparedMachine(context.target, cases, live.waiting) as machine:
        yield replace(context, implementation=implementations.Emulated(context.target, machine))


def check_target(name: str) -> str:
    """``name`` if it is one of the targets of this project; raises ValueError otherwise."""
    from ptx_inline.toolchain import TARGETS

    if name not in TARGETS:
        raise ValueError(f"arch must be one of {', '.join(TARGETS)}, got {name!r}")
    return name
