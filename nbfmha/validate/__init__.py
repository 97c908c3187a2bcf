"""The validation harness: every check of ``nbfmha validate`` as a case that the command and the tests both run.

``select_cases(what)`` lists them in the order of the table; a ``Context`` says what they run on. Modules: ``case`` (what
a case is), ``runner``, ``report`` (tables, summary, JSON), ``implementations`` (who computes), ``warp_model`` (Q·K^T of
one warp in NumPy), ``prepare`` (compiles ahead), ``problems``, ``attention_problems`` and ``decode_problems`` (inputs and
budgets), ``cache_twin`` (a KV cache and its history), and modules of cases.
"""

from nbfmha.validate.case import EVIDENCE, GROUPS, Case, Context, Result
from nbfmha.validate.runner import Outcome, run_case, run_cases
from nbfmha.validation import check_choice

__all__ = [
    "EVIDENCE",
    "GROUPS",
    "WHAT",
    "Case",
    "Context",
    "Outcome",
    "Result",
    "run_case",
    "run_cases",
    "select_cases",
]

WHAT = ("core", "attention", "decode", "all")
"""What ``nbfmha validate --what`` can run: formats to Q·K^T and quantisers, attention, decode and its KV cache, or all."""


def select_cases(what: str = "core") -> tuple[Case, ...]:
    """The cases of an entry of ``WHAT``, in the order of the table. Raises ValueError for another name."""
    from nbfmha.validate import (
        cases_assembled,
        cases_attention,
        cases_decode,
        cases_formats,
        cases_fragments,
        cases_kernels,
        cases_mma,
        cases_qk,
        cases_quantiser,
        cases_real,
    )

    core = (
        cases_formats,
        cases_fragments,
        cases_mma,
        cases_qk,
        cases_quantiser,
        cases_kernels,
        cases_real,
        cases_assembled,
    )
    modules = {"core": core, "attention": (cases_attention,), "decode": (cases_decode,)}
    modules["all"] = tuple(module for part in modules.values() for module in part)
    return tuple(case for module in modules[check_choice("what", what, WHAT)] for case in module.registry.cases())
