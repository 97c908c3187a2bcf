"""A launch on the CPU: memory laid out, CTAs spread over cores, errors turned into exceptions."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ptx_inline.emu.faults import exception
from ptx_inline.emu.memory_image import MemoryImage, lay_out
from ptx_inline.emu.profile import Profile
from ptx_inline.emu.program import Program
from ptx_inline.emu.simt import core
from ptx_inline.emu.simt import state as s
from ptx_inline.emu.simt.handle import table
from ptx_inline.emu.simt.mma import mma_table, stack_tables
from ptx_inline.isa.shared_memory import shared_limit

MAX_THREADS = 1024


class Machine:
    """One launch of a program.

    Attributes:
        program, image, launch: what runs, its memory, and the arrays of the compiled core.
        ctas: how many CTAs the grid has.
    """

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[object],
        *,
        smem_bytes: int = 0,
        max_instructions: int = 100_000_000,
    ):
        grid, block = _dimensions("grid", grid), _dimensions("block", block)
        threads, self.ctas = math.prod(block), math.prod(grid)
        if threads > MAX_THREADS:
            raise ValueError(f"block must have at most {MAX_THREADS} threads, got {block}")
        if self.ctas >= s.HOST_CTA:
            raise ValueError(f"grid must have fewer than {s.HOST_CTA} CTAs, got {grid}")
        _check_count("smem_bytes", smem_bytes, 0)
        _check_count("max_instructions", max_instructions, 1)
        shared = (program.dynamic_shared if smem_bytes else program.shared_bytes) + smem_bytes
        limit = shared_limit(program.target)
        if shared > limit:
            raise ValueError(f"shared memory must be at most {limit} bytes on {program.target}, got {shared}")
        self.program = program
        self.image: MemoryImage = lay_out(program, arguments)
        numbers = np.zeros(s.NUMBERS, np.int64)
        numbers[s.GRID_X : s.GRID_Z + 1], numbers[s.BLOCK_X : s.BLOCK_Z + 1] = grid, block
        numbers[s.THREADS], numbers[s.WARPS], numbers[s.ROWS] = threads, -(-threads // 32), program.rows
        numbers[s.SHARED_BYTES], numbers[s.STATIC_SHARED] = shared, shared - smem_bytes
        numbers[s.LOCAL_BYTES], numbers[s.LOCAL_STRIDE] = program.local_bytes, -(-program.local_bytes // 16) * 16
        numbers[s.PARAM_START], numbers[s.PARAM_BYTES] = self.image.parameters, program.parameter_bytes
        numbers[s.LIMIT], numbers[s.SHARES_GLOBAL] = max_instructions, program.shares_global
        size = self.image.written.size
        self.launch = s.Launch(
            program.code,
            program.lists,
            program.presets,
            program.specials,
            numbers,
            *self.image.memory,
            self.image.segments,
            self.image.written,
            np.zeros(size, np.uint64),
            np.zeros(size, np.uint64),
            np.zeros((self.ctas if program.shares_global else 1, s.RELEASED_CLOCK + s.CLOCKS), np.int64),
            np.zeros(len(program.code), np.uint8),
            *stack_tables([mma_table(*mma, program.target) for mma in program.mmas]),
        )

    def run(self, workers: int | None = None) -> Profile:
        """Run every CTA, on ``workers`` threads (``None``: as many as there are cores).

        CTAs that talk to each other through global memory run one after the other, in order.
        """
        if workers is not None:
            _check_count("workers", workers, 1)
        if self.program.shares_global:
            workers = 1
        workers = max(1, min(workers or os.cpu_count() or 1, self.ctas))
        run, launch = compiled_core(), table(self.launch)
        counts = np.zeros((len(self.program.code), s.IDEAL + 1), np.int64)
        chunk = max(1, self.ctas // (8 * workers))
        pending = iter(range(0, self.ctas, chunk))
        lock = threading.Lock()
        failed: list[np.ndarray] = []
        start = time.perf_counter()

        def work() -> None:
            worker = s.make_worker(self.launch)
            arrays = table(worker)
            while not failed:
                with lock:
                    first = next(pending, None)
                if first is None:
                    break
                worker.control[s.NEXT_CTA] = first
                if run(launch, arrays, min(first + chunk, self.ctas), False) == s.FAILED:
                    failed.append(worker.error)
            with lock:
                np.add(counts, worker.counts, out=counts)

        if workers == 1:
            work()
        else:
            with ThreadPoolExecutor(workers) as pool:
                for job in [pool.submit(work) for _ in range(workers)]:
                    job.result()
        if failed:
            raise self.error(min(failed, key=lambda error: error[s.ERROR_CTA]))
        return Profile(self.program, counts, self.ctas, time.perf_counter() - start)

    def error(self, recorded: np.ndarray) -> Exception:
        """The exception for an error that a worker recorded."""
        return exception(self.program, self.image, self.launch, recorded)


@functools.cache
def compiled_core():
    """The interpreter, compiled once a process, or read from Numba's cache beside the source."""
    emu = Path(core.__file__).parents[1]
    sources = [*(emu / "simt").glob("*.py"), *(emu.parent / "isa").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted([*sources, emu / "encoding.py", emu / "scalar_types.py"]):
        digest.update(path.read_bytes())
    number = int.from_bytes(digest.digest()[:7], "little")
    try:
        return core.make_run(number, cache=True)
    except RuntimeError:  # Numba finds no folder that it may write to: compiled anew in every process
        return core.make_run(number, cache=False)


def _dimensions(name: str, value: Sequence[int]) -> tuple[int, int, int]:
    if not isinstance(value, tuple | list) or not 1 <= len(value) <= 3:
        raise TypeError(f"{name} must be a tuple of one to three sizes, got {value!r}")
    for size in value:
        _check_count(name, size, 1)
    return (*map(int, value), *(1,) * (3 - len(value)))


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
