"""The validation harness: every check of ``nbfmha validate`` as a case that the command and the tests both run.

``all_cases()`` lists them in the order of the table; a ``Context`` says what they run on. Modules: ``case`` (what a case
is), ``runner``, ``report`` (table, summary, JSON), ``implementations`` (who computes), ``warp_model`` (Q·K^T of one
warp in NumPy), ``prepare`` (compiles ahead), and modules of cases.
"""

from nbfmha.validate.case import EVIDENCE, GROUPS, Case, Context, Result
from nbfmha.validate.runner import Outcome, run_case, run_cases

__all__ = [
    "EVIDENCE",
    "GROUPS",
    "Case",
    "Context",
    "Outcome",
    "Result",
    "all_cases",
    "run_case",
    "run_cases",
]


def all_cases() -> tuple[Case, ...]:
    """Every case, in the order of the table."""
    from nbfmha.validate import (
        cases_assembled,
        cases_formats,
        cases_fragments,
        cases_kernels,
        cases_mma,
        cases_qk,
        cases_quantiser,
        cases_real,
    )

    modules = (
        cases_formats,
        cases_fragments,
        cases_mma,
        cases_qk,
        cases_quantiser,
        cases_kernels,
        cases_real,
        cases_assembled,
    )
    return tuple(case for module in modules for case in module.registry.cases())
