"""A validation case, what it returns, and the registry that the command and the tests both read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nbfmha.testing import Comparison
    from nbfmha.validate.implementations import Implementation

#: What a case's verdict rests on; the summary of a run is written from these.
EVIDENCE = {
    "computed": "computed on this CPU by NumPy, no hardware model involved",
    "implementation": "computed by the implementation under test, in the way that implementation_proof says",
    "model": "computed by the bit-exact NumPy model of the MMA",
    "assembled": "compiled, assembled and disassembled, not run",
}

GROUPS = {
    "formats": "number formats",
    "fragments": "thread-to-element layouts",
    "mma": "one MMA tile",
    "qk": "tiled Q·K^T",
    "quantiser": "quantisers and scale layouts",
    "real": "real attention data",
    "assembled": "machine code",
    "attention": "attention, recipe by recipe",
    "decode": "decode from a paged NVFP4 KV cache",
}


@dataclass(frozen=True)
class Result:
    """Verdict of a case.

    status: "pass", "fail" or "skip"; metric: the one-line finding; max_abs_error: the largest absolute error where the
    case compares numbers; reason: why a case failed or was skipped (empty when it passed); details: JSON-ready
    figures.
    """

    status: str
    metric: str
    max_abs_error: float | None = None
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def passed(cls, metric: str, *, max_abs_error: float | None = None, **details) -> Result:
        return cls("pass", metric, max_abs_error, "", details)

    @classmethod
    def failed(cls, metric: str, reason: str, *, max_abs_error: float | None = None, **details) -> Result:
        return cls("fail", metric, max_abs_error, reason, details)

    @classmethod
    def skipped(cls, reason: str) -> Result:
        return cls("skip", "not run", None, reason)

    @classmethod
    def of(cls, comparison: Comparison, what: str, **details) -> Result:
        """Verdict of a comparison of numbers; ``what`` names the elements, e.g. "128 x 256 scores"."""
        details = {
            "elements": comparison.elements,
            "max_abs_error": comparison.max_abs_error,
            "max_budget_share": comparison.max_budget_share,
            "mismatches": comparison.mismatches,
            "worst_index": list(comparison.index),
            **details,
        }
        if not comparison.ok:
            metric = f"{comparison.mismatches} of {comparison.elements} {what} wrong"
            return cls("fail", metric, comparison.max_abs_error, comparison.describe(), details)
        if comparison.exact:
            metric = f"{comparison.elements} {what} exact"
        else:
            metric = f"{comparison.elements} {what}, worst at {comparison.max_budget_share:.0%} of the budget"
        return cls("pass", metric, comparison.max_abs_error, "", details)


@dataclass(frozen=True)
class Context:
    """What a case may use: the implementation under test, the assembly target, random numbers, the shipped sample.

    target_required: the target was asked for by name, so a missing toolchain is a failure and not a skip.
    """

    implementation: Implementation
    target: str = "sm_120a"
    target_required: bool = False
    seed: int = 0

    def rng(self, name: str) -> np.random.Generator:
        """Random numbers that depend on the seed and the name alone, not on which cases ran before."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    @cached_property
    def sample(self):
        from nbfmha.sample import load_sample

        return load_sample()


@dataclass(frozen=True)
class Case:
    """One line of the table. ``run(context)`` returns a ``Result`` or raises (which counts as a failure)."""

    name: str
    group: str
    title: str
    evidence: str
    run: Callable[[Context], Result]

    def __post_init__(self):
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {self.group!r}")
        if self.evidence not in EVIDENCE:
            raise ValueError(f"evidence must be one of {', '.join(EVIDENCE)}, got {self.evidence!r}")

    def subject(self, context: Context) -> str:
        """The table's "implementation" column."""
        match self.evidence:
            case "implementation":
                return context.implementation.name
            case "model":
                return "reference"
            case "assembled":
                return context.target
        return "numpy"


class Registry:
    """Cases in the order of definition; ``case`` is the decorator that adds one."""

    def __init__(self):
        self._cases: dict[str, Case] = {}

    def case(self, group: str, title: str, *, evidence: str, name: str | None = None):
        def add(run: Callable[[Context], Result]):
            key = name or run.__name__
            if key in self._cases:
                raise ValueError(f"case names must differ, got {key!r} twice")
            self._cases[key] = Case(key, group, title, evidence, run)
            return run

        return add

    def cases(self) -> tuple[Case, ...]:
        return tuple(self._cases.values())
