"""Terminal tables: machine report, fragment layouts, instruction mix, profile of an emulated run."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text

from nbfmha.ownership import ownership

if TYPE_CHECKING:
    from nbfmha.doctor import Report

_YES, _NO = Text("yes", "green"), Text("no", "yellow")


class Block(JupyterMixin, Group):
    """Several renderables in one, shown by a terminal and by a notebook alike."""


def _plain_table(*columns: str, title: str | None = None) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.columns[0].no_wrap = True
    return table


def doctor_report(report: Report) -> Block:
    """The machine, its packages and what can run on it."""
    machine = _plain_table("", "", title="Machine")
    machine.show_header = False
    machine.add_row("system", report.system)
    machine.add_row("Python", report.python)
    machine.add_row("CUDA driver", report.driver)
    for gpu in report.gpus:
        machine.add_row("GPU", f"{gpu.describe()}, {gpu.memory_bytes / 2**30:.0f} GiB, compiled for {gpu.target}")
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
    return Block(machine, packages, toolchain, implementations)


def fragment_table(fragment) -> Block:
    """Thread and register of every element of an MMA operand, neighbours in one register together, owners counted."""
    held = ownership(fragment)
    rows, cols = held.lane.shape
    # one column of the table for each run of elements that no row breaks
    edges = sorted({start for row in range(rows) for start, _ in held.runs(row)} | {cols})
    spans = list(pairwise(edges))
    table = _plain_table(held.row_name)
    for start, stop in spans:
        name = f"{start}" if stop - start == 1 else f"{start}..{stop - 1}"
        table.add_column(f"{held.col_name} {name}" if start == 0 else name, no_wrap=True)
    for row in range(rows):
        cells = [Text(held.label(row, start, stop), style=_lane_style(int(held.lane[row, start]))) for start, stop in spans]
        table.add_row(str(row), *cells)
    counts = held.elements_of_lane.reshape(8, 4)
    lanes = "  ".join(" ".join(str(count) for count in quad) for quad in counts.tolist())
    return Block(
        Text(held.title, "bold"),
        table,
        Text("T: thread (lane), r: register, [a:b]: bits a to b-1 of it; in ascending order along the row"),
        Text(f"owners: {held.replication()}"),
        Text(f"elements held by lanes 0..31: {lanes}"),
    )


def _lane_style(lane: int) -> str:
    """A terminal colour for each group of four lanes."""
    palette = ("cyan", "green", "yellow", "magenta", "blue", "red", "bright_cyan", "bright_green")
    return palette[lane >> 2] if lane >= 0 else "dim"


def instruction_mix_table(opcodes: dict[str, int], mma: int, title: str) -> Block:
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
    return Block(table, Text(f"{total} instructions, {mma} MMA: {ratio} (static count, loops counted once)"))


def profile_table(profile, *, most: int = 12) -> Block:
    """An emulator's ``Profile``: instructions by class, and the ``most`` memory instructions that cost most beyond the
    fewest transactions possible (bank conflicts, sectors used in part)."""
    classes = _plain_table("class", "warp instructions", "share", "lanes in use", title="Executed")
    for one in profile.by_class():
        share, lanes = one.warp_instructions / profile.warp_instructions, one.lane_instructions / one.warp_instructions
        classes.add_row(one.name, f"{one.warp_instructions:,}", f"{share:.1%}", f"{lanes:.1f} of 32")
    found = profile.accesses()
    worst = sorted(found, key=lambda access: (access.ideal - access.transactions, access.space != "shared", access.line))
    worst = worst[:most]
    title = "Memory" if len(worst) == len(found) else f"Memory, {len(worst)} of {len(found)} instructions"
    accesses = _plain_table("line", "PTX", "space", "executed", "transactions", "fewest", "excess", title=title)
    accesses.columns[1].no_wrap, accesses.columns[1].overflow, accesses.columns[1].max_width = True, "ellipsis", 60
    for access in worst:
        excess = Text(f"{access.excess:.2f}x", "" if access.transactions == access.ideal else "yellow")
        numbers = (f"{number:,}" for number in (access.requests, access.transactions, access.ideal))
        accesses.add_row(str(access.line), " ".join(access.text.split()).rstrip(";"), access.space, *numbers, excess)
    for table, first in ((classes, 1), (accesses, 3)):
        for column in table.columns[first:]:
            column.justify = "right"
    summary = (
        f"{profile.warp_instructions:,} warp instructions, {profile.lane_instructions:,} counted a lane; "
        f"{profile.bank_conflicts} bank conflicts, {profile.coalescing:.2f} times the fewest sectors"
    )
    return Block(classes, accesses, Text(summary))


def resources_line(resources) -> str:
    """ptxas's report of a kernel in one line."""
    return (
        f"{resources.registers} registers, {resources.spill_store_bytes + resources.spill_load_bytes} bytes spilled, "
        f"{resources.stack_bytes} bytes of stack, {resources.shared_bytes} bytes of static shared memory"
    )


def steady_loop_line(loop) -> str:
    """A ``SteadyLoop`` in one line."""
    return (
        f"steady loop: {loop.mma} MMAs in {loop.instructions} instructions ({loop.whole} with parts seldom run), "
        f"{loop.others_per_mma:.1f} others an MMA, at most {loop.longest_span} in a row without one"
    )


def select_fragment(mma: str, operand: str, *, byte_id: int = 0, thread_id: int = 0):
    """The fragment of the one MMA whose key is, or has as dotted parts, ``mma``; D has the layout of C.

    Raises ValueError naming the choices for another MMA, operand or selector.
    """
    from ptx_inline.isa.fragments import fragment
    from ptx_inline.isa.instructions import INSTRUCTIONS

    parts = f".{mma.lower()}."
    matches = [key for key in INSTRUCTIONS if key == mma] or [key for key in INSTRUCTIONS if parts in f".{key}."]
    if len(matches) != 1:
        raise ValueError(f"MMA must name one of {', '.join(matches or INSTRUCTIONS)}, got {mma!r}")
    operand = "C" if operand.upper() == "D" else operand.upper()
    return fragment(matches[0], operand, byte_id=byte_id, thread_id=thread_id)
