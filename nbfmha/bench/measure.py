"""Timing on a GPU with CUDA events, and the ceiling that a result is divided by."""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

UNTIMED_MS = 0.4
"""One call of 0.08 ms after torch's copy of 1 GiB was too few: the next five took 4 % longer than after five or twenty."""


def require_gpu():
    """torch with a GPU. Raises ``RuntimeError`` with the reason where there is none: a benchmark has no fallback."""
    try:
        import torch
    except ImportError:
        raise RuntimeError("this benchmark needs torch (it allocates, times and runs the peers); install it") from None
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs an NVIDIA GPU; torch.cuda.is_available() is false here")
    return torch


def median_ms(
    runs: dict[str, Callable[[], Any]], *, rounds: int = 11, warmup: int = 2, repeats: int = 10
) -> dict[str, float]:
    """Median milliseconds of each run on the GPU, all runs in turn in every round, so that drift hits all alike.

    ``repeats`` calls lie between two events, so that the host is ahead of the GPU and its own time does not count (for
    runs that take longer on the GPU than on the host). Calls of ``UNTIMED_MS`` before them, one at least, are not timed:
    address translation and clocks are then as this run leaves them, not as the one before it did.
    """
    torch = require_gpu()
    times: dict[str, list[float]] = {name: [] for name in runs}
    untimed = dict.fromkeys(runs, 1)
    for number in range(warmup + rounds):
        for name, run in runs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(untimed[name]):
                run()
            start.record()
            for _ in range(repeats):
                run()
            stop.record()
            stop.synchronize()
            took = start.elapsed_time(stop) / repeats
            untimed[name] = max(1, math.ceil(UNTIMED_MS / took))
            if number >= warmup:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def host_us(run: Callable[[], Any], *, launches: int = 200, rounds: int = 25) -> float:
    """Microseconds of host time of a call: median over rounds of their mean, the queue drained between rounds."""
    torch = require_gpu()
    run()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(launches):
            run()
        times.append((time.perf_counter() - start) / launches)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    torch = require_gpu()
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "l2_mib": f"{properties.L2_cache_size / 2**20:.0f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path | str | None, report: dict) -> None:
    """Write the report where the user asked for it."""
    if path is not None:
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


def sections_table(title: str, headings: Sequence[str], lines: Iterable[Sequence[str]]):
    """A rich table whose first column names a section, shown once; the second names a run, the others are figures."""
    from rich.table import Table

    result = Table(title=title)
    for place, heading in enumerate(headings):
        result.add_column(heading, justify="left" if place < 2 else "right")
    previous = None
    for section, *cells in lines:
        if section != previous:
            result.add_section()
        result.add_row("" if section == previous else section, *cells)
        previous = section
    return result


def console():
    """A rich console on standard output; a pipe or log gets 120 columns, enough for every table."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    return console if console.is_terminal else Console(file=sys.stdout, width=120)
