"""Runs cases one after the other and keeps their results."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbfmha.validate.case import Case, Context, Result


@dataclass(frozen=True)
class Outcome:
    """A case, what it ran on, its result and the seconds it took."""

    case: Case
    subject: str
    result: Result
    seconds: float

    def as_json(self) -> dict:
        return {
            "name": self.case.name,
            "group": self.case.group,
            "title": self.case.title,
            "evidence": self.case.evidence,
            "implementation": self.subject,
            "status": self.result.status,
            "metric": self.result.metric,
            "max_abs_error": self.result.max_abs_error,
            "reason": self.result.reason,
            "seconds": round(self.seconds, 4),
            "details": dict(self.result.details),
        }


def run_case(case: Case, context: Context) -> Outcome:
    """Run one case; an exception is a failure whose reason names it and the line that raised it."""
    start = time.perf_counter()
    try:
        result = case.run(context)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        result = Result.failed("raised an exception", f"{type(error).__name__} at {place}: {error}")
    return Outcome(case, case.subject(context), result, time.perf_counter() - start)


def run_cases(
    cases: Sequence[Case], context: Context, *, before: Callable[[Case], None], after: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run every case, calling ``before`` and ``after`` around each (progress and table rows)."""
    outcomes = []
    for case in cases:
        before(case)
        outcomes.append(run_case(case, context))
        after(outcomes[-1])
    return outcomes
