"""``nbfmha bench launch``: host microseconds of one launch with six torch tensors, and seconds to a process's first one."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from nbfmha.bench import measure
from ptx_inline.toolchain import Kernel

GRID = 512  # Numba warns of fewer CTAs

_FIRST_LAUNCH = """
import time
start = time.perf_counter()
from cuda.bindings import driver
from cuda.core import Device
device = Device(0)
device.set_current()
error, buffer = driver.cuMemAlloc(256)
context = time.perf_counter()
from nbfmha.bench.launch import six_pointers
six_pointers().launch((1,), (32,), [int(buffer)] * 6)
device.sync()
print(context - start, time.perf_counter() - context)
"""


def make_six():
    """Kernel ``six(a, b, c, d, e, f)`` that writes one word: its time is the launch's."""
    from numba import cuda

    def six(a, b, c, d, e, f):
        if cuda.threadIdx.x == 0:
            f[0] = a[0]

    return six


def six_pointers() -> Kernel:
    """The kernel that is launched here."""
    return Kernel(make_six, ("u32*",) * 6)


def main(json_path: Path | str | None = None) -> None:
    """Time and print. Raises ``RuntimeError`` without a GPU."""
    torch = measure.require_gpu()
    from rich.table import Table

    tensors = [torch.ones(64, dtype=torch.int32, device="cuda") for _ in range(6)]
    kernel = six_pointers()
    runs = {
        "Kernel.launch, six torch tensors": lambda: kernel.launch((GRID,), (32,), tensors),
        "Kernel.launch, six addresses": _addresses(kernel, tensors),
        "numba.cuda dispatcher, six torch tensors": _numba(tensors),
        "torch: one small kernel (x.add_)": lambda: tensors[0].add_(1),
    }
    report = {name: measure.host_us(run) for name, run in runs.items()}
    table = Table(title=f"host time of a launch, {measure.machine()['gpu']}")
    table.add_column("launch")
    table.add_column("us, median", justify="right")
    for name, microseconds in report.items():
        table.add_row(name, f"{microseconds:.1f}")
    starts = [_first_launch() for _ in range(5)]
    total, context, ours = (statistics.median(column) for column in zip(*starts, strict=True))
    table.add_section()
    table.add_row("process start to the first launch, warm kernel cache", f"{total * 1e6:,.0f}")
    table.add_row("  of which CUDA context (any library pays it)", f"{context * 1e6:,.0f}")
    table.add_row("  of which import, cache and launch", f"{ours * 1e6:,.0f}")
    measure.console().print(table)
    seconds = {"process": total, "context": context, "import_and_launch": ours}
    measure.write_json(json_path, {"machine": measure.machine(), "host_us": report, "first_launch_s": seconds})


def _addresses(kernel: Kernel, tensors: list):
    addresses = [tensor.data_ptr() for tensor in tensors]
    return lambda: kernel.launch((GRID,), (32,), addresses, stream=0)


def _numba(tensors: list):
    from numba import cuda

    dispatcher = cuda.jit(make_six())
    return lambda: dispatcher[GRID, 32](*tensors)


def _first_launch() -> tuple[float, float, float]:
    """Seconds of a whole fresh process, of its CUDA context, and of our import and first launch."""
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", _FIRST_LAUNCH], stdout=subprocess.PIPE, text=True, check=True)
    context, ours = map(float, run.stdout.split())
    return time.perf_counter() - start, context, ours
