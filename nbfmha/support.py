"""Which implementation supports what, as a table, by asking the code that decides. A leaf, for the README and its test.

``python -m nbfmha.support`` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from nbfmha.dispatch import IMPLEMENTATIONS, decide
from nbfmha.problem import DTYPES, Problem
from nbfmha.quantized_operands import Storage, Stored
from nbfmha.recipe import PRESETS, Recipe
from ptx_inline.toolchain import TARGETS, Target

HEADER = ("", *(f"`{name}`" for name in IMPLEMENTATIONS))
_NONE, _ALL = "none", "all"


class Variant(NamedTuple):
    """One thing that an implementation may support: its name in the table, and the calls that show it. recipe: "its own" is
    "legacy" for ``legacy``, "accurate" for the others; None is for ``QuantizedTensor``s, which ``stored`` describes."""

    name: str
    problems: tuple[Problem, ...]
    recipe: Recipe | str | None = "its own"
    stored: Stored | None = None


def support_rows() -> list[tuple[str, ...]]:
    """Rows of the table, ``HEADER`` apart: what it is about, then a cell for each of ``IMPLEMENTATIONS``."""
    rows = [("runs on", *(_places(name) for name in IMPLEMENTATIONS))]
    for title, variants, enumerate_all in _sections():
        rows.append((title, *(_cell(name, variants, enumerate_all) for name in IMPLEMENTATIONS)))
    return rows


def support_table() -> str:
    """The table in Markdown, without a newline at its end."""
    rows = [HEADER, ("---",) * len(HEADER), *support_rows()]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def _problem(**changed) -> Problem:
    fields = {
        "batch": 2,
        "num_heads_q": 8,
        "num_heads_kv": 8,
        "seqlen_q": 256,
        "seqlen_k": 256,
        "head_dim": 128,
    }
    return Problem(**(fields | changed))


def _sections() -> Iterable[tuple[str, list[Variant], bool]]:
    """(title, variants, whether to name them all even where all run) of each row."""
    head_dims = [Variant(str(d), (_problem(head_dim=d),)) for d in (64, 96, 128, 256)]
    head_dims.append(Variant("other even", tuple(_problem(head_dim=d) for d in (2, 32, 80, 192, 512))))
    yield "head_dim", head_dims, True
    yield "dtype", [Variant(name, (_problem(dtype=name),)) for name in DTYPES if name != "float64"], True
    yield "recipe", [Variant(name, (_problem(),), recipe) for name, recipe in PRESETS.items()], True
    yield from (
        (title, [Variant("yes", (_problem(),), recipe)], True)
        for title, recipe in (
            ("everything in 16 bits", Recipe(qk="f16", v_format="f16")),
            ("Q·K^T or V alone in 16 bits", Recipe(v_format="f16")),
            ("V's scales along head_dim", Recipe()),
        )
    )
    yield from _quantized()
    edges = (0, 100, 100, 256)
    options = {
        "causal": _problem(causal=True),
        "window": _problem(window=(64, 0)),
        "q_offset": _problem(q_offset=7),
        "softcap": _problem(softcap=30.0),
        "sinks": _problem(has_sinks=True),
        "packed sequences": _problem(batch=1, cu_seqlens_q=edges, cu_seqlens_k=edges),
        "GQA": _problem(num_heads_kv=2),
        "MQA": _problem(num_heads_kv=1),
    }
    yield ", ".join(options), [Variant(name, (problem,)) for name, problem in options.items()], False
    lengths = tuple(_problem(seqlen_q=q, seqlen_k=k) for q, k in ((0, 5), (5, 0), (1, 1), (1, 300), (300, 77)))
    yield "any seqlen_q and seqlen_k, 0 and 1 too", [Variant("yes", lengths)], True


def _quantized() -> Iterable[tuple[str, list[Variant], bool]]:
    """Rows of calls with ``QuantizedTensor``s."""
    rows, tokens = Storage("nvfp4", "head_dim", False), Storage("nvfp4", "tokens", False)
    mxfp4, scaled = Storage("mxfp4", "head_dim", False), Storage("nvfp4", "head_dim", True)
    f16, bf16, f32 = (_problem(dtype=dtype) for dtype in ("float16", "bfloat16", "float32"))
    title = "`QuantizedTensor`s: "
    yield f"{title}q, k and v, V's scales along tokens", [Variant("yes", (f32,), None, (rows, rows, tokens))], True
    some = {"q": (rows, None, None), "k and v": (None, rows, tokens), "v along head_dim": (None, None, rows)}
    others = [Variant(name, (f16, bf16, f32), None, stored) for name, stored in some.items()]
    others.append(Variant("all three, v along head_dim", (f32,), None, (rows, rows, rows)))
    yield f"{title}some of them, or V's scales along head_dim", others, False
    in_mxfp4 = [Variant("beside bfloat16", (bf16,), None, (None, mxfp4, mxfp4))]
    in_mxfp4.append(Variant("others", (f16, f32), None, (None, mxfp4, mxfp4)))
    yield f"{title}mxfp4", in_mxfp4, False
    yield f"{title}a global scale", [Variant("yes", (f32,), None, (scaled, scaled, scaled))], True


def _cell(name: str, variants: list[Variant], enumerate_all: bool) -> str:
    """What ``name`` runs of the variants; in brackets the targets on which it does not run one."""
    places = _where(name)
    words, whole = [], True
    for variant in variants:
        recipe, stored = variant.recipe, variant.stored
        missing = [place for place in places if not all(_runs(name, p, recipe, place, stored) for p in variant.problems)]
        whole &= not missing
        if not missing and places:
            words.append(variant.name)
        elif len(missing) < len(places):
            words.append(f"{variant.name} (not {', '.join(map(str, missing))})")
    if whole and places and not enumerate_all:
        return _ALL
    return ", ".join(words) or _NONE


def _where(name: str) -> list[Target | None]:
    """The targets on which an implementation runs something; [None] for one that runs on a CPU."""
    return [place for place in (None, *map(Target.parse, TARGETS)) if _runs(name, _problem(), "its own", place)]


def _places(name: str) -> str:
    places = _where(name)
    if not places:
        return "nothing yet"
    return "any CPU" if None in places else ", ".join(map(str, places))


def _runs(
    name: str, problem: Problem, recipe: Recipe | str | None, target: Target | None, stored: Stored | None = None
) -> bool:
    if recipe == "its own":
        recipe = PRESETS["legacy" if name == "legacy" else "accurate"]
    found = decide(problem, recipe, "host" if target is None else "gpu", target, True, stored)
    return found[IMPLEMENTATIONS.index(name)].runs


if __name__ == "__main__":
    print(support_table())
