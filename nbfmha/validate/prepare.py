"""Compiles what an emulated validation is going to need in processes beside it, so that a first run uses every core.

The jobs are the emulator's core and the kernels that the cases launch, in the order in which they do. Those are found by
running the cases on a :class:`Recorder`, a machine that computes nothing: there is no list of kernels to keep in step
with the cases. Results go through the caches; where those cannot be written to, or a job fails, the validation compiles
for itself: slower, with the same results.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager

import numpy as np

from nbfmha.emulated import Machine
from nbfmha.validate.case import Case, Context
from ptx_inline.toolchain import Kernel, cache_directory

_MOST_PROCESSES = 4  # of 0.3 GB each
_MOMENT = 2.0  # seconds that one may wait without being told what for

#: Shows, for as long as it is entered, what is being waited for.
Waiting = Callable[[str], AbstractContextManager]


class Recorder(Machine):
    """A machine that runs nothing and leaves zeros; ``kernels`` are those that were launched, in order."""

    def __init__(self, arch: str):
        super().__init__(arch)
        self.kernels: dict[Kernel, None] = {}

    def _run(self, kernel, grid, block, arguments, arrays, smem_bytes):
        self.kernels.setdefault(kernel)
        for array in arrays.values():
            array.write(np.zeros(array.shape, array.host_dtype))
        return {}


class PreparedMachine(Machine):
    """A machine with its core and the kernels of some cases compiled ahead; use it as a context manager.

    A launch waits for the core and its kernel; ``waiting`` is told when that takes more than a moment.
    """

    def __init__(self, arch: str, cases: Sequence[Case], waiting: Waiting):
        super().__init__(arch)
        self._cases, self._waiting = cases, waiting
        self._pool = ProcessPoolExecutor(
            min(os.cpu_count() or 1, _MOST_PROCESSES), multiprocessing.get_context("spawn")
        )
        self._core: Future | None = None
        self._jobs: dict[Kernel, Future] = {}

    def __enter__(self) -> PreparedMachine:
        if any(case.evidence == "implementation" for case in self._cases):
            self._core = self._pool.submit(_compile_core)  # the longest job first
            if _can_write_kernels():
                assembled = _assembled(self.arch)
                for kernel in launched_kernels(self.arch, self._cases):
                    self._jobs[kernel] = self._pool.submit(_compile, kernel, self.arch, kernel in assembled)
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _run(self, kernel, grid, block, arguments, arrays, smem_bytes):
        self._wait_for(self._core, "compiling the emulator, once (about 20 s of one core)")
        self._wait_for(self._jobs.get(kernel), "compiling kernels, once")
        return super()._run(kernel, grid, block, arguments, arrays, smem_bytes)

    def _wait_for(self, job: Future | None, what: str) -> None:
        if job is not None and wait([job], _MOMENT).not_done:
            with self._waiting(what):
                wait([job])


def launched_kernels(target: str, cases: Sequence[Case]) -> tuple[Kernel, ...]:
    """The kernels that the cases launch with implementation ``emulated``, in order."""
    from nbfmha.validate.implementations import Emulated
    from nbfmha.validate.runner import run_case

    recorder = Recorder(target)
    context = Context(Emulated(target, recorder), target=target)
    for case in cases:
        if case.evidence == "implementation":
            run_case(case, context)
    return tuple(recorder.kernels)


def _assembled(target: str) -> set[Kernel]:
    """The kernels whose machine code the cases read."""
    from nbfmha.kernels import catalogue
    from nbfmha.validate.cases_assembled import KERNELS

    return {catalogue.kernel(name, target) for name in KERNELS}


def _compile(kernel: Kernel, target: str, also_machine_code: bool) -> None:
    """A job: PTX, and machine code where that is read too, into the kernel cache."""
    kernel.ptx(target)
    if also_machine_code:
        kernel.cubin(target)


def _compile_core() -> None:
    """A job: the emulator's core into Numba's cache."""
    from ptx_inline.emu.prepare import prepare

    prepare()


def _can_write_kernels() -> bool:
    directory = cache_directory()
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return os.access(directory, os.W_OK)
