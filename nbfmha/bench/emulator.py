"""``nbfmha bench emulator``: how fast ``ptx_inline.emu`` runs PTX on this machine's CPU; needs neither GPU nor torch.

A lane-instruction is one instruction executed by one lane; lanes whose guard is false do not count. Times are of the
whole ``emulate`` call: memory laid out, CTAs run, outputs copied back.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nbfmha.bench import measure
from nbfmha.bench.emulator_workloads import Workload, all_workloads, integers

_START = """
import time
start = time.perf_counter()
from nbfmha.bench.emulator_workloads import integers
workload = integers(1, 1)
from ptx_inline.emu import emulate
imported = time.perf_counter()
workload.run(1)
first = time.perf_counter()
workload.run(1)
print(imported - start, first - imported, time.perf_counter() - first)
"""


@dataclass(frozen=True)
class Row:
    """One workload: what it executed, and median seconds on one core and on all."""

    name: str
    lane_instructions: int
    warp_instructions: int
    one_core_s: float
    all_cores_s: float

    @property
    def per_second(self) -> float:
        """Lane-instructions a second on one core."""
        return self.lane_instructions / self.one_core_s

    @property
    def per_second_all(self) -> float:
        """Lane-instructions a second on all cores."""
        return self.lane_instructions / self.all_cores_s

    @property
    def ns_per_warp_instruction(self) -> float:
        """Nanoseconds of a warp instruction on one core."""
        return self.one_core_s / self.warp_instructions * 1e9


def main(json_path: Path | str | None = None) -> None:
    """Check, time and print. Raises ``AssertionError`` if an output is wrong."""
    console = measure.console()
    cores = os.cpu_count() or 1
    integers(1, 1).run(1)  # compiles the core where it is not in the cache
    rows = list(_rows(1.0, cores, rounds=5))
    starts = [_start() for _ in range(3)]
    imports, first, launch = (statistics.median(column) for column in zip(*starts, strict=True))
    console.print(_table(rows, cores))
    console.print(
        f"fresh process: {imports:.2f} s imports, {first:.2f} s core from its cache and first launch; "
        f"a further launch of one CTA {launch * 1e3:.2f} ms"
    )
    report = [asdict(row) | {"per_second": row.per_second, "per_second_all": row.per_second_all} for row in rows]
    start = {"imports_s": imports, "first_launch_s": first, "small_launch_s": launch}
    machine = {"processor": processor(), "cores": cores, "python": platform.python_version()}
    measure.write_json(json_path, {"machine": machine, "rows": report, "start": start})


def time_workload(workload: Workload, cores: int, *, rounds: int) -> Row:
    """Check the outputs of a workload, then time it on one core and on all, in turn."""
    emulation = workload.run(1)
    workload.check(emulation.outputs)
    workload.check(workload.run(cores).outputs)
    times: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(rounds):
        for workers, found in times.items():
            start = time.perf_counter()
            workload.run(workers)
            found.append(time.perf_counter() - start)
    one, every = (statistics.median(times[workers]) for workers in (1, cores))
    profile = emulation.profile
    return Row(workload.name, profile.lane_instructions, profile.warp_instructions, one, every)


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _rows(size: float, cores: int, *, rounds: int) -> Iterator[Row]:
    for make in all_workloads(size):
        yield time_workload(make(), cores, rounds=rounds)


def _start() -> tuple[float, ...]:
    """Seconds of a fresh process: imports, the first launch, the second."""
    run = subprocess.run([sys.executable, "-c", _START], stdout=subprocess.PIPE, text=True, check=True)
    return tuple(map(float, run.stdout.split()))


def _table(rows: list[Row], cores: int):
    from rich.table import Table

    table = Table(title=f"emulated lane-instructions a second, {processor()}")
    columns = ("kernel", "lane-instr.", "one core, M/s", f"{cores} cores, M/s", "ns a warp instr.")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.lane_instructions / 1e6:.2f} M",
            f"{row.per_second / 1e6:.1f}",
            f"{row.per_second_all / 1e6:.1f}",
            f"{row.ns_per_warp_instruction:,.0f}",
        )
    return table
