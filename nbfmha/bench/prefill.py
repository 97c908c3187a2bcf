"""``nbfmha bench prefill``: forward attention beside torch's FlashAttention-2 and cuDNN, in turn in one process.

f16, 2048 = heads x head_dim, 16384 tokens in all. Each recipe has two rows: the forward kernel alone, on operands that the
pre-pass made before, and the whole of ``nbfmha.attention``, quantisation included. Operations are those of the two matrix
products, 4 length^2 head_dim a head and half of them when causal; the ceiling is torch's f16 product of two 8192 x 8192
matrices, timed in the same rounds.

Before anything is timed, every output is compared with FlashAttention-2's, head by head; memory that the kernels must write
holds NaN before. The queries of the inputs look for one key among all: losing or mixing up keys costs far more than the
quantisation error that is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nbfmha.bench import measure
from nbfmha.bench.compare import CUDNN, FLASH, PEER_BOUND, check_below, poisoned, runs_here, worst_head
from nbfmha.recipe import PRESETS
from nbfmha.validation import check_choice

WIDTH, TOKENS = 2048, 16384
RECIPES = ("accurate", "fast")
PRODUCT = "matrix product"
PRODUCT_SIZE = 8192
RELATIVE_L2_BOUND = 0.15
"""Of each head against FlashAttention-2: the presets' model is at 0.06 to 0.13 on these inputs, uniform weights at 0.8."""


@dataclass(frozen=True)
class Shape:
    """One self-attention call: ``batch`` sequences of ``length`` tokens."""

    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool

    @property
    def flops(self) -> int:
        """Operations of Q K^T and P V; half when causal."""
        every = 4 * self.batch * self.heads * self.length**2 * self.head_dim
        return every // 2 if self.causal else every

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.head_dim}, {self.length}, {'yes' if self.causal else 'no'}"


SHAPES = tuple(
    Shape(TOKENS // length, WIDTH // head_dim, length, head_dim, causal)
    for head_dim in (64, 128)
    for length in (1024, 4096, 16384)
    for causal in (False, True)
)


@dataclass(frozen=True)
class Row:
    """One timed run of a shape, the peers' times in the same rounds, its worst head's distance from FlashAttention-2."""

    shape: Shape
    name: str
    milliseconds: float
    flash_ms: float
    cudnn_ms: float | None
    ceiling_tflop_s: float
    relative_l2: float | None

    @property
    def tflop_s(self) -> float:
        return self.shape.flops / self.milliseconds / 1e9

    @property
    def times_flash(self) -> float:
        """Speed as a multiple of FlashAttention-2's."""
        return self.flash_ms / self.milliseconds

    @property
    def times_cudnn(self) -> float | None:
        """Speed as a multiple of cuDNN's; None where cuDNN does not run."""
        return None if self.cudnn_ms is None else self.cudnn_ms / self.milliseconds

    @property
    def share_of_ceiling(self) -> float:
        return self.tflop_s / self.ceiling_tflop_s


@dataclass(frozen=True)
class Checked:
    """What can be timed for a shape: name -> run, name -> relative L2 of the worst head; recipe -> implementation."""

    runs: dict[str, Callable[[], Any]]
    errors: dict[str, float]
    implementations: dict[str, str]


def main(json_path: Path | str | None = None, recipes: Sequence[str] = RECIPES) -> None:
    """Check, time and print.

    Raises ``ValueError`` for an unknown recipe; ``RuntimeError`` without a GPU, or where torch has no FlashAttention for it
    or no implementation of ours runs on it; ``AssertionError`` if a result is wrong.
    """
    for recipe in recipes:
        check_choice("recipes", recipe, PRESETS)
    torch = measure.require_gpu()
    console = measure.console()
    rows, implementations = [], {}
    for shape in SHAPES:
        found, used = time_shape(torch, shape, recipes)
        rows += found
        implementations |= used
    console.print(table(rows, implementations, measure.machine()["gpu"]))
    derived = ("tflop_s", "times_flash", "times_cudnn", "share_of_ceiling")
    report = {
        "machine": measure.machine(),
        "implementations": implementations,
        "relative_l2_bound": RELATIVE_L2_BOUND,
        "rows": [asdict(row) | {name: getattr(row, name) for name in derived} for row in rows],
    }
    measure.write_json(json_path, report)


def time_shape(torch, shape: Shape, recipes: Sequence[str], *, rounds: int = 11) -> tuple[list[Row], dict[str, str]]:
    """Check and time every run of a shape, all in turn: rows, and the implementation that ran each recipe."""
    checked = check(torch, shape, recipes)
    runs = {**checked.runs, PRODUCT: _product(torch)}
    quick = measure.median_ms(runs, rounds=1, warmup=1, repeats=1)
    repeats = min(10, max(3, math.ceil(3 / min(quick.values()))))  # 3 ms, so that a first call's host time is lost in it
    times = measure.median_ms(runs, rounds=rounds, repeats=repeats)
    ceiling = 2 * PRODUCT_SIZE**3 / times[PRODUCT] / 1e9
    rows = [
        Row(shape, name, times[name], times[FLASH], times.get(CUDNN), ceiling, checked.errors.get(name))
        for name in checked.runs
    ]
    return rows, checked.implementations


def make_inputs(torch, shape: Shape, device: str = "cuda", seed: int = 0) -> tuple[Any, Any, Any]:
    """q, k, v, f16 (batch, heads, length, head_dim). Each query looks for one key, in random order, which has about half of
    its weight (where a causal mask leaves it); keys and values have a mean over the tokens, queries one that changes every
    64, as those of trained models do."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.heads, shape.length, shape.head_dim)

    def normal(*changes: int):
        return torch.randn([*size[:2], *changes, size[3]], generator=generator, device=device)

    key = normal(shape.length)
    sought = key[:, :, torch.randperm(shape.length, generator=generator, device=device)]
    blocks = normal(-(-shape.length // 64)).repeat_interleave(64, dim=2)[:, :, : shape.length]
    # a score of log(length) + 1 over those of the other keys, which are about 0
    focus = (math.log(shape.length) + 1) / math.sqrt(shape.head_dim)
    q = focus * sought + 0.3 * normal(shape.length) + 0.5 * blocks
    k = key + 2 * normal(1)
    v = normal(shape.length) + 0.5 * normal(1)
    return q.half(), k.half(), v.half()


def check(torch, shape: Shape, recipes: Sequence[str]) -> Checked:
    """Everything that is timed for a shape, each output compared first. ``AssertionError`` names what is wrong."""
    import nbfmha
    from nbfmha import dispatch
    from nbfmha.kernels.prefill import prefill
    from nbfmha.kernels.prepass import prepare
    from nbfmha.problem import Problem
    from nbfmha.tiles import View

    q, k, v = make_inputs(torch, shape)
    flash, cudnn = _peers(torch, q, k, v, shape.causal)
    expected = flash()
    runs, errors, implementations = {FLASH: flash}, {}, {}

    def add(name: str, run: Callable[[], Any], bound: float) -> None:
        errors[name] = worst_head(torch, run(), expected)
        check_below(errors[name], bound, f"{name}, head_dim, length, causal = {shape.title}")
        runs[name] = run

    if cudnn is not None:
        add(CUDNN, cudnn, PEER_BOUND)
    problem = Problem.of(q, k, v, causal=shape.causal)
    views = [View(x, x.stride()[:3]) for x in (q, k, v)]
    with poisoned(torch):
        for name in recipes:
            explanation = dispatch.explain(q, k, v, causal=shape.causal, recipe=name)
            implementation = implementations[name] = explanation.auto
            if implementation is None:
                raise RuntimeError(str(explanation))
            recipe, out = PRESETS[name], torch.full_like(q, float("nan"))
            operands = prepare(*views, problem, recipe, implementation=implementation)
            view = View(out, out.stride()[:3])

            def kernel_alone(operands=operands, recipe=recipe, implementation=implementation, view=view):
                prefill(operands, problem, recipe, implementation=implementation, out=view)
                return view.array

            def end_to_end(name=name):
                return nbfmha.attention(q, k, v, causal=shape.causal, recipe=name)

            add(f"{name}, kernel alone", kernel_alone, RELATIVE_L2_BOUND)
            add(f"{name}, end to end", end_to_end, RELATIVE_L2_BOUND)
    return Checked(runs, errors, implementations)


def _peers(torch, q, k, v, causal: bool) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """FlashAttention-2, and cuDNN where this torch and this GPU have it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def peer(backend):
        def run():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return run

    flash, cudnn = peer(SDPBackend.FLASH_ATTENTION), peer(SDPBackend.CUDNN_ATTENTION)
    return flash, cudnn if runs_here(cudnn) else None


def _product(torch) -> Callable[[], Any]:
    """torch's f16 matrix product, the ceiling."""
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda").half() for _ in range(2))
    c = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=c)


def table(rows: list[Row], implementations: dict[str, str], gpu: str):
    """Sections a shape, a line a run."""
    ours = ", ".join(f"{recipe} by {name}" for recipe, name in implementations.items())
    ceilings = [row.ceiling_tflop_s for row in rows]
    ceiling = f"{min(ceilings):,.0f} to {max(ceilings):,.0f} TFLOP/s"
    title = f"forward attention, f16, {WIDTH} = heads x head_dim, {TOKENS} tokens in all, on {gpu}\n"
    headings = ("head_dim, length, causal", "", "ms", "TFLOP/s", "x FA-2", "x cuDNN", "of product", "rel. L2")
    lines = (
        (
            row.shape.title,
            row.name,
            f"{row.milliseconds:.3f}",
            f"{row.tflop_s:.0f}",
            f"{row.times_flash:.2f}",
            "-" if row.times_cudnn is None else f"{row.times_cudnn:.2f}",
            f"{row.share_of_ceiling:.0%}",
            "-" if row.relative_l2 is None else f"{row.relative_l2:.4f}",
        )
        for row in rows
    )
    return measure.sections_table(f"{title}ours: {ours}; matrix product {ceiling}", headings, lines)
