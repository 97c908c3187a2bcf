"""Which implementation runs an attention call, and why not the others.

==============  ===============================================================================================
blockscale      kernels with the block-scale MMA, on GPUs of compute capability 12.0 and 12.1
legacy          the plain FP4 MMA, ``f8f6f4``, there too: for recipes with one scale a row, which it alone runs
dequant         the kernels of ``blockscale`` by exact dequantisation to f16, on GPUs from compute capability 8.0
emulated        the PTX of ``blockscale`` (``dequant`` on a machine without block scaling; ``legacy`` where the recipe is
                for it), run on this CPU
reference       NumPy's model of the recipe, for arrays in host memory
==============  ===============================================================================================

``auto`` takes the first that runs where the arrays lie: ``blockscale``, ``legacy``, ``dequant`` for arrays in GPU memory or
of an emulated machine, ``reference`` for arrays in host memory. ``emulated`` is run by name alone: it checks, and takes
seconds. Asking for one by name never falls back.

``NBFMHA_BLOCKSCALE`` in the environment, read once in a process: "0" switches ``blockscale`` (no other) off, by name too;
"1", or no such variable, leaves it on.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import Any

from nbfmha import quantized_operands, runners
from nbfmha.call import DEFAULT_RECIPE, Call, make_call
from nbfmha.problem import Problem
from nbfmha.quantized_operands import Stored
from nbfmha.quantized_tensor import QuantizedTensor
from nbfmha.recipe import PRESETS, Recipe, resolve_recipe
from nbfmha.validation import check_choice, message
from ptx_inline.toolchain import Target

IMPLEMENTATIONS = ("blockscale", "legacy", "dequant", "emulated", "reference")
IMPLS = ("auto", *IMPLEMENTATIONS)
"""Values of ``impl``."""
GATE = "NBFMHA_BLOCKSCALE"

_log = logging.getLogger("nbfmha")


class Unavailable(ValueError):
    """The implementation asked for cannot run this call, or none can; the message says why."""


@dataclass(frozen=True)
class Choice:
    """One implementation: whether it runs the call, and how, or why not."""

    name: str
    runs: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Every implementation of a call, in the order of ``IMPLEMENTATIONS``; ``str`` makes a table of it.

    call      the call in words
    choices   a ``Choice`` for each implementation; also ``explanation["dequant"]``
    auto      the name of the one that ``impl="auto"`` takes; None where none runs
    """

    call: str
    choices: tuple[Choice, ...]
    auto: str | None

    def __getitem__(self, name: str) -> Choice:
        return self.choices[IMPLEMENTATIONS.index(check_choice("name", name, IMPLEMENTATIONS))]

    def __str__(self) -> str:
        width = max(map(len, IMPLEMENTATIONS))
        lines = [f"  {c.name:<{width}}  {'yes' if c.runs else 'no ':<3}  {c.reason}" for c in self.choices]
        last = f"auto takes {self.auto}" if self.auto else "auto finds none that runs"
        return "\n".join([self.call, *lines, last])


def explain(q: Any, k: Any = None, v: Any = None, *, target: str | Target | None = None, **options: Any) -> Explanation:
    """Who runs ``nbfmha.attention(q, k, v, **options)``, and why not the others. Nothing is computed.

    ``options`` are those of :func:`nbfmha.attention` but ``impl``. In place of q, k and v a ``Problem`` will do, with
    ``recipe`` as its only option and ``target``, e.g. ``"sm_120a"``: the GPU that the arrays would lie on (None: host
    memory). Raises what the call itself raises for arguments that do not fit together.
    """
    if isinstance(q, Problem):
        if k is not None or v is not None:
            raise TypeError(message("k and v", "None beside a Problem", "arrays"))
        recipe = resolve_recipe(options.pop("recipe", DEFAULT_RECIPE))
        if options:
            raise TypeError(message("options", "recipe alone beside a Problem", ", ".join(options), "the Problem has them"))
        target = None if target is None else Target.parse(target)
        place = "in host memory" if target is None else f"on a GPU, {target}"
        return _explanation(q, recipe, place, decide(q, recipe, "host" if target is None else "gpu", target, gate()))
    if target is not None:
        raise TypeError(message("target", "None beside arrays", repr(target), "it is where the arrays lie"))
    options.pop("return_lse", None)
    call = make_call(q, k, v, **options)
    place = f"{call.place}, {call.place.target}" if call.place.kind == "gpu" else str(call.place)
    return _explanation(call.problem, call.recipe, place, choices(call))


def choices(call: Call) -> tuple[Choice, ...]:
    """Every implementation of a call, in order."""
    stored = quantized_operands.stored(call)
    return decide(call.problem, call.recipe, call.place.kind, call.place.target, gate(), stored)


def run(call: Call, impl: str, *, with_lse: bool = False) -> tuple[Any, Any]:
    """(out, lse or None) of a call by the implementation named ``impl``, or the one that "auto" takes.

    Raises :class:`Unavailable` where it cannot run the call: with its reason, or for "auto" with those of all.
    """
    found = choices(call)
    name = impl if impl != "auto" else _auto(found)
    chosen = None if name is None else found[IMPLEMENTATIONS.index(name)]
    if chosen is None or not chosen.runs:
        raise Unavailable(_refusal(impl, found))
    kernels = name
    if name == "emulated":
        stored = quantized_operands.stored(call)
        kernels = _kernels_on(call.place.target or _EMULATED, gate(), call.problem, call.recipe, stored)
    return runners.run(call, name, kernels, with_lse=with_lse)


def fmha_prefill_blockscale(q: Any, k: Any, v: Any, out: Any, **options: Any) -> bool:
    """Attention by the block-scale MMA into ``out``: True when it ran; False, with nothing written, when it cannot run
    this call here, for a caller that falls back. The reason is logged (logger "nbfmha", INFO).

    q, k, v, out and ``options`` are those of :func:`nbfmha.attention` but ``impl`` and ``return_lse``. Arguments that do
    not fit together raise as there: no implementation would take them.
    """
    return _run_or_decline("blockscale", q, k, v, out, options)


def fmha_prefill_legacy(q: Any, k: Any, v: Any, out: Any, **options: Any) -> bool:
    """As :func:`fmha_prefill_blockscale`, by ``f8f6f4`` MMAs with a scale per row: its recipe is "legacy", unless given."""
    if not any(isinstance(array, QuantizedTensor) for array in (q, k, v)):
        options.setdefault("recipe", "legacy")
    return _run_or_decline("legacy", q, k, v, out, options)


@functools.cache
def gate() -> bool:
    """Whether ``blockscale`` may run, by ``NBFMHA_BLOCKSCALE``: read and logged once in a process.

    Raises ``ValueError`` for a value that is neither "0" nor "1".
    """
    value = os.environ.get(GATE)
    if value not in (None, "0", "1"):
        raise ValueError(message(GATE, "'0' or '1' or not set", repr(value), "'0' switches blockscale off"))
    on = value != "0"
    _log.info("%s is %s: blockscale is %s", GATE, "not set" if value is None else value, "on" if on else "off")
    return on


_EMULATED = Target.parse(runners.EMULATED_ARCH)


def _run_or_decline(name: str, q: Any, k: Any, v: Any, out: Any, options: dict[str, Any]) -> bool:
    if out is None:
        raise TypeError(message("out", "an array to write to", None))
    call = make_call(q, k, v, out=out, **options)
    choice = choices(call)[IMPLEMENTATIONS.index(name)]
    if not choice.runs:
        _log.info("fmha_prefill_%s declines: %s", name, choice.reason)
        return False
    run(call, name)
    return True


def _kernels_on(
    target: Target, blockscale: bool, problem: Problem, recipe: Recipe | None, stored: Stored | None
) -> str:
    """What "emulated" runs: those kernels which "auto" would take on such a GPU."""
    if recipe is not None and recipe.scale_per == "row":
        return "legacy"
    if not blockscale or not target.has_block_scale_mma:
        return "dequant"
    if stored is not None and quantized_operands.why_not(problem, stored, "blockscale"):
        return "dequant"
    return "blockscale"


@functools.lru_cache(maxsize=256)
def decide(
    problem: Problem,
    recipe: Recipe | None,
    kind: str,
    target: Target | None,
    blockscale: bool,
    stored: Stored | None = None,
) -> tuple[Choice, ...]:
    """Every implementation of a problem, in order.

    kind: where the arrays lie, as ``Place`` has it. target: of the GPU or emulated machine, None for the host. blockscale:
    the gate. stored: how the operands are stored where one is a ``QuantizedTensor``, with None for the recipe.
    """
    off = None if blockscale else f"switched off by {GATE}=0"
    found = {
        "blockscale": off or _why_not_kernels(problem, recipe, kind, "blockscale", target, stored),
        "legacy": _why_not_kernels(problem, recipe, kind, "legacy", target, stored),
        "dequant": _why_not_kernels(problem, recipe, kind, "dequant", target, stored),
        "emulated": "the arrays are in GPU memory; copy them to the host, or into a nbfmha.emulated.Machine",
        "reference": None if kind == "host" else f"the arrays are {_WHERE[kind]}",
    }
    arch = target or _EMULATED
    inner = _kernels_on(arch, blockscale, problem, recipe, stored)
    if kind != "gpu":
        found["emulated"] = _why_not_kernels(problem, recipe, "emulated", inner, arch, stored)
    on_cpu = ", its PTX run on this CPU" if kind == "emulated" else ""
    how = {
        "blockscale": f"block-scale MMA on {target}{on_cpu}",
        "legacy": f"f8f6f4 MMA, a scale per row, on {target}{on_cpu}",
        "dequant": f"exact dequantisation to 16 bits, mma.sync on {target}{on_cpu}",
        "emulated": f"the PTX of {inner} for {arch}, run on this CPU; by name alone, it takes its time",
        "reference": "NumPy, float64: "
        + ("the recipe's model" if recipe else "attention on what the quantised tensors stand for"),
    }
    return tuple(Choice(name, found[name] is None, found[name] or how[name]) for name in IMPLEMENTATIONS)


_WHERE = {
    "gpu": "in GPU memory; copy them to the host",
    "emulated": "on an emulated machine; take them off with copy_to_host()",
}


def _why_not_kernels(
    problem: Problem, recipe: Recipe | None, kind: str, implementation: str, target: Target | None, stored: Stored | None
) -> str | None:
    if kind == "host":
        return "the arrays are in host memory; move them to a GPU, or ask for 'emulated'"
    from nbfmha.kernels.prefill import why_not

    if recipe is not None:
        return why_not(problem, recipe, implementation, target)
    own = quantized_operands.RECIPES.get(implementation)
    general = None if own is None else why_not(problem, own, implementation, target)
    return general or quantized_operands.why_not(problem, stored, implementation)


def _auto(found: tuple[Choice, ...]) -> str | None:
    return next((choice.name for choice in found if choice.runs and choice.name != "emulated"), None)


def _refusal(impl: str, found: tuple[Choice, ...]) -> str:
    if impl == "auto":
        reasons = "; ".join(f"{choice.name}: {choice.reason}" for choice in found if not choice.runs)
        others = [choice.name for choice in found if choice.runs]
        way_out = f"by name {', '.join(others)} runs" if others else None
        return message("the call", "one that an implementation runs", f"none for impl='auto' ({reasons})", way_out)
    able = [repr(choice.name) for choice in found if choice.runs]
    way_out = f"{' and '.join(able)} can run this call" if able else "no other can run this call either"
    reason = found[IMPLEMENTATIONS.index(impl)].reason
    return message("impl", "an implementation that runs this call", f"{impl!r}: {reason}", way_out)


def _explanation(problem: Problem, recipe: Recipe | None, place: str, found: tuple[Choice, ...]) -> Explanation:
    return Explanation(f"attention, {_describe(problem)}, {_recipe_name(recipe)}; {place}", found, _auto(found))


def _describe(problem: Problem) -> str:
    words = [
        problem.dtype,
        f"batch {problem.batch}",
        f"{problem.num_heads_q} heads on {problem.num_heads_kv}",
        f"{problem.seqlen_q} x {problem.seqlen_k} tokens",
        f"head_dim {problem.head_dim}",
    ]
    if problem.causal:
        words.append("causal")
    for name in ("window", "softcap"):
        if getattr(problem, name) is not None:
            words.append(f"{name} {getattr(problem, name)}")
    if problem.is_packed:
        words.append(f"{len(problem.cu_seqlens_q) - 1} sequences packed")
    elif problem.q_offset != problem.seqlen_k - problem.seqlen_q:
        words.append(f"q_offset {problem.q_offset}")
    if problem.has_sinks:
        words.append("sinks")
    return ", ".join(words)


def _recipe_name(recipe: Recipe | None) -> str:
    if recipe is None:
        return "quantised already"
    return next((f"recipe {name}" for name, preset in PRESETS.items() if preset == recipe), str(recipe))
