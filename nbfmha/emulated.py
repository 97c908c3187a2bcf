"""Arrays of a GPU that this machine has not got: the same host code launches the same kernels, their PTX runs on the CPU.

A :class:`Machine` is the device, an :class:`EmulatedArray` lies in its memory. Whatever takes an array in GPU memory
(``nbfmha.quantize``, ``nbfmha.kernels.qk.qk``) takes one of these; :mod:`nbfmha.gpu_arrays` is where the two meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx_inline.toolchain import Kernel, Target


class EmulatedArray:
    """An array in the memory of a ``Machine``, C-contiguous and aligned. ``copy_to_host`` gives its content.

    dtype: by name, as NumPy spells it, or "bfloat16", whose bits the host has as uint16.
    """

    def __init__(self, machine: Machine, shape: tuple[int, ...], dtype: str, content: np.ndarray | None):
        self.machine, self.shape, self.dtype = machine, shape, dtype
        self._content = content  # None: memory that nobody has written

    @property
    def host_dtype(self) -> np.dtype:
        """The NumPy dtype of the content."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def content(self) -> np.ndarray | None:
        """The array itself, not a copy; ``None`` while nothing has been written to it."""
        return self._content

    def write(self, content: np.ndarray) -> None:
        """Replace the content by an array of the same shape and host dtype."""
        if content.shape != self.shape or content.dtype != self.host_dtype:
            expected, got = f"{self.host_dtype} {self.shape}", f"{content.dtype} {content.shape}"
            raise ValueError(f"content must be {expected}, got {got}")
        self._content = content

    def fill(self, value: float) -> None:
        """Set every element."""
        self.write(np.full(self.shape, value, self.host_dtype))

    def copy_to_host(self) -> np.ndarray:
        """A copy of the content. Raises ``RuntimeError`` where nothing has been written."""
        if self._content is None:
            if math.prod(self.shape):
                raise RuntimeError(f"the array of shape {self.shape} was never written: no kernel has filled it")
            return np.empty(self.shape, self.host_dtype)
        return self._content.copy()


class Machine:
    """A device of one architecture, such as ``"sm_120a"``, made of :mod:`ptx_inline.emu`."""

    def __init__(self, arch: str):
        self.arch = Target.parse(arch).name

    def array(self, values: np.ndarray, dtype: str | None = None) -> EmulatedArray:
        """A copy of a NumPy array in this machine's memory. ``dtype="bfloat16"``: ``values`` are uint16 bit patterns."""
        array = EmulatedArray(self, values.shape, dtype or values.dtype.name, None)
        array.write(np.array(values, order="C"))
        return array

    def empty(self, shape: tuple[int, ...], dtype: str) -> EmulatedArray:
        """Memory that nobody has written: a kernel that reads it fails, and so does a launch that leaves part of it so."""
        return EmulatedArray(self, tuple(shape), dtype, None)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[Any],
        smem_bytes: int = 0,
    ) -> None:
        """Run a kernel to its end, with ``smem_bytes`` of dynamic shared memory; arrays are changed in place.

        Raises what :func:`ptx_inline.emu.emulate` raises, ``ValueError`` for an array of another machine, and
        ``RuntimeError`` where an array that was empty before has bytes that the kernel did not write.
        """
        arrays = self._check(arguments)
        left = self._run(kernel, grid, block, arguments, arrays, smem_bytes)
        for position, count in left.items():
            if count:
                raise RuntimeError(f"{kernel.name} left {count} bytes of argument {position} unwritten")

    def _check(self, arguments: Sequence[Any]) -> dict[int, EmulatedArray]:
        arrays = {i: argument for i, argument in enumerate(arguments) if isinstance(argument, EmulatedArray)}
        for position, array in arrays.items():
            if array.machine is not self:
                raise ValueError(f"argument {position} must lie on the machine of those before it, got another machine")
        return arrays

    def _run(self, kernel, grid, block, arguments, arrays: dict[int, EmulatedArray], smem_bytes: int) -> dict[int, int]:
        """Emulate; bytes that were left unwritten of each argument that was empty."""
        from ptx_inline.emu import Output, emulate

        # one object for each array, so that an array passed twice is one buffer
        memory = {
            id(array): Output(array.shape, array.host_dtype) if array.content is None else array.content
            for array in arrays.values()
        }
        passed = [memory[id(item)] if i in arrays else item for i, item in enumerate(arguments)]
        emulation = emulate(kernel, grid, block, passed, self.arch, smem_bytes=smem_bytes)
        for position, array in arrays.items():
            array.write(emulation.outputs[position])
        return emulation.unwritten
