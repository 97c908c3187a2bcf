"""The ``nbfmha`` command. Heavy imports stand inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="nbfmha",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="NVFP4 attention in Numba CUDA: check it, look inside it, measure it. Works without a GPU.",
)

DEFAULT_ARCH = "sm_120a"
Arch = Annotated[
    str, typer.Option("--arch", help="Target to assemble for: sm_80, sm_86, sm_89, sm_90a, sm_100a or sm_120a.")
]
KernelName = Annotated[str, typer.Argument(metavar="KERNEL", help="A kernel of nbfmha.kernels, e.g. qk or quantize.")]
MixOnly = Annotated[bool, typer.Option("--mix", help="Print the instruction mix and the resources alone.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results to FILE as JSON.")]


def main() -> None:
    """Entry point of the console script."""
    app()


def _console():
    """A console for stdout; a pipe or log gets 120 columns, enough for every table."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def _stop(message: str) -> Any:
    """End the command with exit code 2 and one line on stderr."""
    typer.secho(f"error: {message}", err=True, fg="red")
    raise typer.Exit(2)


def _write_json(path: Path, report: dict) -> None:
    from nbfmha.validate.report import write_json

    try:
        write_json(path, report)
    except OSError as error:
        _stop(f"cannot write {path}: {error.strerror}")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False):
    if version:
        from nbfmha import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def doctor(json_path: Json = None):
    """What this machine has, and which implementations can run here."""
    from nbfmha import doctor as checks
    from nbfmha import tables

    report = checks.inspect()
    _console().print(tables.doctor_report(report))
    if json_path:
        _write_json(json_path, report.as_json())


@app.command()
def validate(
    what: Annotated[
        str,
        typer.Option(
            "--what",
            help="core: formats, layouts, the MMA, Q·K^T, the quantisers, the machine code. attention: nbfmha.attention, "
            "recipe by recipe, and what each recipe costs on real data. decode: nbfmha.PagedKVCache and nbfmha.decode, and "
            "what the cache costs. all: all of them.",
        ),
    ] = "core",
    impl: Annotated[
        str,
        typer.Option(
            "--impl",
            help="Who multiplies and quantises: auto, blockscale or dequant (on a GPU), emulated (the kernels' PTX on this "
            "CPU) or reference (NumPy). Never falls back.",
        ),
    ] = "auto",
    arch: Annotated[
        str | None, typer.Option("--arch", help="Target to assemble and emulate the kernels for (default sm_120a).")
    ] = None,
    json_path: Json = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="DIR", help="Draw layouts and results into DIR.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the random cases.")] = 0,
):
    """Check formats, layouts, the MMA, Q·K^T, quantisers, machine code; or attention; or decode. Exit code 1 where a check
    fails."""
    from nbfmha.validate import session

    try:
        ok = session.run(_console(), what=what, impl=impl, arch=arch, json_path=json_path, plot_directory=plot, seed=seed)
    except (ValueError, RuntimeError) as error:
        _stop(str(error))
    except OSError as error:
        _stop(f"cannot write {error.filename}: {error.strerror}")
    raise typer.Exit(0 if ok else 1)


@app.command()
def layout(
    mma: Annotated[str, typer.Argument(help="An MMA, e.g. m16n8k64.mxf4nvf4.4x (a unique part of the name will do).")],
    operand: Annotated[str, typer.Argument(help="A, B, C, SFA or SFB.")],
    byte_id: Annotated[int, typer.Option("--byte-id", help="Scale selector byte-id.")] = 0,
    thread_id: Annotated[int, typer.Option("--thread-id", help="Scale selector thread-id.")] = 0,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw a heatmap instead of a table.")] = None,
):
    """Which thread holds which element of an MMA operand, in which register."""
    from nbfmha import tables

    try:
        fragment = tables.select_fragment(mma, operand, byte_id=byte_id, thread_id=thread_id)
    except ValueError as error:
        _stop(str(error))
    if png is None:
        _console().print(tables.fragment_table(fragment))
        return
    from nbfmha import viz

    try:
        viz.save(viz.draw_fragment(fragment), png)
    except (ValueError, OSError) as error:
        _stop(f"cannot write {png}: {error}")
    typer.echo(str(png))


@app.command()
def sass(kernel: KernelName, arch: Arch = DEFAULT_ARCH, mix: MixOnly = False):
    """Disassembly of a kernel, its registers and spills, and its instruction mix."""
    _list_kernel("sass", kernel, arch, mix_only=mix)


@app.command()
def ptx(kernel: KernelName, arch: Arch = DEFAULT_ARCH, mix: MixOnly = False):
    """Final PTX of a kernel, every inline instruction in place, and its instruction mix."""
    _list_kernel("ptx", kernel, arch, mix_only=mix)


def _list_kernel(kind: str, name: str, arch: str, *, mix_only: bool) -> None:
    from nbfmha import listing, tables
    from nbfmha.kernels import catalogue
    from nbfmha.validate.session import check_target

    try:
        kernel = catalogue.kernel(name, check_target(arch))
        shown = getattr(listing, kind)(kernel, arch)
        resources = kernel.resources(arch)
    except (ValueError, RuntimeError) as error:
        _stop(str(error))
    if not mix_only:
        typer.echo(shown.text)
    console = _console()
    title = f"{shown.name}, {kind.upper()} for {arch}"
    console.print(tables.instruction_mix_table(shown.opcodes, shown.mma, title))
    console.print(tables.resources_line(resources), soft_wrap=True)
    if kind == "sass":
        from nbfmha.steady_loop import steady_loop

        loop = steady_loop(shown.text)
        if loop is not None:
            console.print(tables.steady_loop_line(loop), soft_wrap=True)


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(help="emulator (no GPU needed), launch, quantize, mma (counts without one), prefill or decode.")
    ],
    json_path: Json = None,
    recipes: Annotated[
        str | None, typer.Option("--recipes", help="prefill alone: the recipes to run, e.g. accurate,fast (the default).")
    ] = None,
):
    """Measure on this machine: kernels and launches on its GPU beside the peers, the emulator on its CPU."""
    from importlib import import_module

    from nbfmha.bench import BENCHMARKS

    if name not in BENCHMARKS:
        _stop(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}")
    if recipes is not None and name != "prefill":
        _stop(f"--recipes belongs to the benchmark prefill, got {name!r}")
    options = {} if recipes is None else {"recipes": recipes.split(",")}
    try:
        import_module(f"nbfmha.bench.{name}").main(json_path, **options)
    except (ValueError, RuntimeError, OSError) as error:
        _stop(str(error))
