"""The drawings of ``nbfmha validate --plot``: layouts, the wrong packing, scores, attention and KV caches with their
errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nbfmha import nvfp4, scale_layouts, viz
from nbfmha.validate import cases_attention, cases_decode, cases_mma, problems
from nbfmha.validate.case import Context
from nbfmha.validate.warp_model import MMA, Packing
from ptx_inline.isa.fragments import fragment, wrong_row_major_fragment


def draw_all(directory: Path, context: Context, what: str = "core") -> Iterator[Path]:
    """Write every drawing of an entry of ``nbfmha.validate.WHAT`` into ``directory`` (PNG) and yield its path as soon as it
    is there."""
    if what in ("core", "all"):
        yield from _draw_core(directory, context)
    if what in ("attention", "all"):
        yield from _draw_attention(directory)
    if what in ("decode", "all"):
        yield from _draw_decode(directory)


def _draw_core(directory: Path, context: Context) -> Iterator[Path]:
    for operand in ("A", "B", "C", "SFA", "SFB"):
        yield viz.save(viz.draw_fragment(fragment(MMA, operand)), directory / f"fragment_{operand}.png")
    for layout in scale_layouts.SCALE_LAYOUTS:
        yield viz.save(viz.draw_scale_layout(layout, rows=100, cols=6), directory / f"scales_{layout}.png")
    for operand in ("A", "B"):
        figure = viz.draw_packing(fragment(MMA, operand), wrong_row_major_fragment(MMA, operand))
        yield viz.save(figure, directory / f"row_major_packing_{operand}.png")
    name = context.implementation.name
    for packing, title in ((Packing.right(), "right packing"), (Packing.row_major(), "row-major packing")):
        figure = viz.draw_tiles(cases_mma.indicator_tiles(context, packing), title=f"{title}, {name}", limit=256)
        yield viz.save(figure, directory / f"indicators_{title.replace(' ', '_').replace('-', '_')}.png")
    yield viz.save(draw_real_scores(context), directory / "real_scores.png")


def _draw_attention(directory: Path) -> Iterator[Path]:
    """The recipes' models on the whole sample: how far each is from float64 attention, and for which queries."""
    expected, outputs = cases_attention.sample_outputs()
    outs = {name: output.out for name, output in outputs.items()}
    title = "each recipe against float64 attention, layer 9 of SmolLM2-135M, causal"
    yield viz.save(viz.draw_accuracy(outs, expected.out, title=title), directory / "attention_accuracy.png")
    yield viz.save(viz.draw_error_map(outs, expected.out, title=title), directory / "attention_error_map.png")


def _draw_decode(directory: Path) -> Iterator[Path]:
    """How far attention from each kind of KV cache is from float64 attention on the whole sample."""
    table = cases_decode.cache_errors().items()
    errors = {f"{name}, {chunk} at a time": error for name, row in table for chunk, error in row.items()}
    title = "relative L2 of attention from each KV cache, n tokens appended at a time, layer 9 of SmolLM2-135M"
    yield viz.save(viz.draw_relative_l2(errors, title=title), directory / "decode_quality.png")


def draw_real_scores(context: Context, *, head: int = 0, queries: int = 192):
    """Scores of one head of the sample (its first tokens) by the implementation, and their error in units of the budget."""
    sample = context.sample
    q = nvfp4.quantize(sample.q[head, :queries])
    k = nvfp4.quantize(sample.k[head * sample.k.shape[0] // sample.q.shape[0], :queries])
    got = context.implementation.qk(q, k, scales_in=context.implementation.scale_sources[0])
    return viz.draw_scores(
        got,
        problems.exact_scores(q, k),
        problems.score_budget(q, k, context.implementation),
        title=f"real Q and K, head {head}, {context.implementation.name}",
    )
