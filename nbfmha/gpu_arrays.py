"""Allocation, layout checks and launches for GPU arrays in the caller's own library (torch, CuPy, Numba), known by name
only, and for arrays of an emulated machine (:mod:`nbfmha.emulated`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from nbfmha.emulated import EmulatedArray
from nbfmha.validation import message
from ptx_inline.toolchain import Kernel
from ptx_inline.toolchain.arrays import address_and_device, current_stream, is_gpu_array, is_torch

_LIBRARIES = "torch, CuPy or Numba"


def runs_kernels(array: object) -> bool:
    """True for an array that kernels can reach: in GPU memory, or of an emulated machine."""
    return isinstance(array, EmulatedArray) or is_gpu_array(array)


def launch(
    kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple, smem_bytes: int = 0
) -> None:
    """Queue a launch on the GPU, or run the kernel on the emulated machine: wherever the arrays among the arguments lie.
    ``smem_bytes``: dynamic shared memory."""
    emulated = next((argument for argument in arguments if isinstance(argument, EmulatedArray)), None)
    if emulated is not None:
        emulated.machine.launch(kernel, grid, block, arguments, smem_bytes)
    else:
        kernel.launch(grid, block, arguments, smem_bytes=smem_bytes)


class Launch(NamedTuple):
    """One launch, as ``launch`` takes it."""

    kernel: Kernel
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple
    smem_bytes: int = 0

    def prepare(self, device: int, addresses: int) -> Callable[[Sequence[int], int], None]:
        """As :meth:`~ptx_inline.toolchain.kernel.CompiledKernel.prepare`."""
        grid, block, arguments, smem_bytes = self[1:]
        return self.kernel.prepare(device, grid, block, arguments, addresses, smem_bytes=smem_bytes)


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An uninitialised array of ``like``'s library on its device. Raises ``TypeError`` for a library that we cannot
    allocate with (JAX arrays, say, are immutable)."""
    if isinstance(like, EmulatedArray):
        return like.machine.empty(shape, dtype)
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    library = type(like).__module__.partition(".")[0]
    if library == "cupy" and dtype != "bfloat16":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(like.device.id):
            return cupy.empty(shape, dtype)
    if library == "numba" and dtype != "bfloat16":
        return sys.modules["numba.cuda"].device_array(shape, dtype)
    got = f"{dtype} in an array of {library}"
    raise TypeError(message("array", f"of {_LIBRARIES} (bfloat16: torch)", got, "convert it with torch.from_dlpack"))


def empty_for_parts(like: Any, shape: tuple[int, ...], dtype: str = "float32") -> Any:
    """``empty`` for kernels that write what is read later, not all. On an emulated machine the rest is NaN, in integers
    255."""
    array = empty(like, shape, dtype)
    if isinstance(array, EmulatedArray):
        array.fill({"bfloat16": 0x7FFF, "uint8": 0xFF}.get(dtype, math.nan))
    return array


def upload(like: Any, values: np.ndarray) -> Any:
    """As ``from_host``, queued on the library's current stream, to be used there; without waiting for the GPU (Numba
    waits).

    ``values`` may change afterwards: the driver copies pageable memory before it returns.
    """
    if is_torch(like):
        return sys.modules["torch"].from_numpy(np.ascontiguousarray(values)).to(like.device, non_blocking=True)
    if type(like).__module__.startswith("cupy"):
        array = empty(like, values.shape, values.dtype.name)
        array.set(np.ascontiguousarray(values), stream=sys.modules["cupy"].cuda.get_current_stream())
        return array
    return from_host(like, values)


def from_host(like: Any, values: np.ndarray) -> Any:
    """A copy of a NumPy array in ``like``'s library on its device; complete when this returns, on whichever stream it is
    used. Raises ``TypeError`` as ``empty``."""
    if isinstance(like, EmulatedArray):
        return like.machine.array(values)
    if is_torch(like):
        return sys.modules["torch"].from_numpy(np.ascontiguousarray(values)).to(like.device)
    array = empty(like, values.shape, values.dtype.name)
    if type(like).__module__.startswith("cupy"):
        array.set(values)
        sys.modules["cupy"].cuda.get_current_stream().synchronize()
    else:
        array.copy_to_device(np.ascontiguousarray(values))
    return array


def place_of(array: Any) -> Hashable:
    """Library and device, or emulated machine, of an array: equal places can share arrays that are only read."""
    if isinstance(array, EmulatedArray):
        return array.machine
    if is_torch(array):
        return array.device
    return type(array).__module__.partition(".")[0], address_and_device(array, 0)[1]


def stream_of(array: Any) -> int:
    """Handle of the stream on which the array's library would launch now; 0 for an emulated machine."""
    return 0 if isinstance(array, EmulatedArray) else current_stream(array)


def is_capturing(array: Any) -> bool:
    """True while what ``array``'s library launches is recorded in a CUDA graph instead of run."""
    if is_torch(array):
        return sys.modules["torch"].cuda.is_current_stream_capturing()
    if type(array).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"].cuda.get_current_stream().is_capturing()
    return False


def fill(array: Any, value: float) -> Any:
    """Set all elements, on the library's current stream; returns ``array``."""
    if type(array).__module__.startswith("numba"):
        array.copy_to_device(np.full(array.shape, value, array.dtype))  # array[:] would compile a kernel of Numba's
    else:
        array.fill_(value) if is_torch(array) else array.fill(value)
    return array


def is_contiguous(array: Any) -> bool:
    """True when the elements lie in C order without gaps."""
    if isinstance(array, EmulatedArray):
        return True
    if is_torch(array):
        return array.is_contiguous()
    strides = array.__cuda_array_interface__.get("strides")
    if strides is None:
        return True
    expected = array.dtype.itemsize
    for length, stride in zip(reversed(array.shape), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True


def check_contiguous(argument: str, array: Any) -> None:
    """Raise ``ValueError`` unless the array is C-contiguous."""
    if not is_contiguous(array):
        raise ValueError(
            message(argument, "contiguous", f"strides that skip, shape {tuple(array.shape)}", "copy it first")
        )


def is_aligned(array: Any, bytes_: int, stream: int = 0) -> bool:
    """True when the first element's address is a multiple of ``bytes_``."""
    return isinstance(array, EmulatedArray) or address_and_device(array, stream)[0] % bytes_ == 0
