"""Terminal tables of the commands: machine report, fragment layouts, instruction mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from nbfmha.doctor import Report

_YES, _NO = Text("yes", "green"), Text("no", "yellow")


def _plain_table(*columns: str, title: str) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.columns[0].no_wrap = True
    return table


def doctor_report(report: Report) -> RenderableType:
    """The machine, its packages and what can run on it."""
    machine = _plain_table("", "", title="Machine")
    machine.show_header = False
    machine.add_row("system", report.system)
    machine.add_row("Python", report.python)
    machine.add_row("CUDA driver", report.driver)
    for gpu in report.gpus:
        machine.add_row(f"GPU {gpu.ordinal}", f"{gpu.describe()}, {gpu.memory_bytes / 2**30:.0f} GiB")
    if not report.gpus:
        machine.add_row("GPU", f"none: {report.gpu_reason}")
    machine.add_row("kernel cache", f"{report.cache_directory} ({report.cache_entries} entries)")

    packages = _plain_table("package", "version", title="Packages")
    for part in (*report.packages, *report.optional):
        packages.add_row(part.name, Text(part.version, "" if part.found else "red"))

    toolchain = _plain_table("part", "version or place", title="Toolchain (compiles and assembles without a GPU)")
    for part in report.toolchain:
        toolchain.add_row(part.name, Text(part.version, "" if part.found else "yellow"))

    implementations = _plain_table("implementation", "runs here", "on what, or why not", title="Implementations")
    for part in report.implementations:
        implementations.add_row(part.name, _YES if part.available else _NO, part.reason)
    return Group(machine, packages, toolchain, implementations)


def instruction_mix_table(opcodes: dict[str, int], mma: int, title: str) -> RenderableType:
    """Counts by opcode class, the share of each, and how many other instructions stand beside each MMA."""
    total = sum(opcodes.values())
    classes: dict[str, list[tuple[str, int]]] = {}
    for opcode, count in opcodes.items():
        classes.setdefault(opcode.split(".")[0], []).append((opcode, count))
    table = _plain_table("opcode", "count", "share", "forms", title=title)
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, forms in sorted(classes.items(), key=lambda item: (-sum(count for _, count in item[1]), item[0])):
        count = sum(number for _, number in forms)
        listed = ", ".join(opcode if number == count else f"{opcode} {number}" for opcode, number in sorted(forms))
        table.add_row(name, str(count), f"{count / total:.1%}", "" if listed == name else listed)
    ratio = f"{(total - mma) / mma:.1f} other instructions for each" if mma else "no matrix instruction"
    return Group(table, Text(f"{total} instructions, {mma} MMA: {ratio} (static count, loops counted once)"))


def resources_line(resources) -> str:
    """ptxas's report of a kernel in one line."""
    return (
        f"{resources.registers} registers, {resources.spill_store_bytes + resources.spill_load_bytes} bytes spilled, "
        f"{resources.stack_bytes} bytes of stack, {resources.shared_bytes} bytes of static shared memory"
    )


def select_fragment(mma: str, operand: str, *, byte_id: int = 0, thread_id: int = 0):
    """The fragment of the one MMA whose key contains `mma`; raises ValueError naming the choices otherwise."""
    from ptx_inline.isa.fragments import fragment
    from ptx_inline.isa.instructions import INSTRUCTIONS

    matches = [key for key in INSTRUCTIONS if key == mma] or [key for key in INSTRUCTIONS if mma.lower() in key]
    if len(matches) != 1:
        names: Sequence[str] = matches or list(INSTRUCTIONS)
        raise ValueError(f"MMA must name one of {', '.join(names)}, got {mma!r}")
    return fragment(matches[0], operand.upper(), byte_id=byte_id, thread_id=thread_id)
