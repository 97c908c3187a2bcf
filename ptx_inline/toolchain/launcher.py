"""Loads cubins and launches them through cuda-core, on the caller's device and stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from contextlib import contextmanager

from ptx_inline.toolchain import arrays
from ptx_inline.toolchain.targets import Target
from ptx_inline.types import ctype, is_pointer

_DEFAULT_DYNAMIC_SHARED_BYTES = 48 * 1024


@functools.cache
def device_target(ordinal: int) -> Target:
    """The compilation target of a device. Raises ``RuntimeError`` where there is no driver or no such device."""
    from cuda.core import Device

    capability = Device(ordinal).compute_capability
    return Target.of_compute_capability(capability.major, capability.minor)


def current_device() -> int:
    """Ordinal of the calling thread's current device, 0 where none is current yet."""
    from cuda.bindings import driver

    error, ordinal = driver.cuCtxGetDevice()
    return int(ordinal) if error == driver.CUresult.CUDA_SUCCESS else 0


class LoadedKernel:
    """A kernel in the driver, ready for any device of its target."""

    def __init__(self, cubin: bytes, name: str, signature: Sequence[str]):
        from cuda.core import ObjectCode

        self._module = ObjectCode.from_cubin(cubin)
        self._kernel = self._module.get_kernel(name)
        self._pointers = tuple(map(is_pointer, signature))
        self._ctypes = tuple(map(ctype, signature))
        self._shared_bytes: dict[int, int] = {}

    def launch(self, device: int, grid: tuple, block: tuple, arguments: Sequence, smem_bytes: int, stream: int) -> None:
        """Queue one launch. ``arguments`` are addresses and numbers, already of the right count."""
        from cuda.core import launch

        with _on_device(device):
            if smem_bytes > self._shared_bytes.get(device, _DEFAULT_DYNAMIC_SHARED_BYTES):
                self._raise_shared_limit(device, smem_bytes)
            values = [
                value if pointer else kind(value)
                for value, pointer, kind in zip(arguments, self._pointers, self._ctypes, strict=True)
            ]
            launch(_stream(stream), _config(grid, block, smem_bytes), self._kernel, *values)

    def _raise_shared_limit(self, device: int, smem_bytes: int) -> None:
        from cuda.bindings import driver
        from cuda.core import Device

        limit = Device(device).properties.max_shared_memory_per_block_optin
        if smem_bytes > limit:
            raise ValueError(f"smem_bytes must be at most {limit} on device {device}, got {smem_bytes}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        # the handle is a CUkernel: cuFuncSetAttribute would refuse it
        (error,) = driver.cuKernelSetAttribute(attribute, smem_bytes, int(self._kernel.handle), device)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuKernelSetAttribute answered {error.name} for {smem_bytes} bytes of shared memory")
        self._shared_bytes[device] = smem_bytes


def resolve(signature: Sequence[str], arguments: Sequence, stream: int | None) -> tuple[int, int, list]:
    """Device, stream handle and raw arguments of a launch.

    The device is that of the first array, else the current one; the stream, unless given, is the current one of the
    library that owns the first array. Raises ``TypeError`` / ``ValueError`` naming the argument that does not fit.
    """
    if len(arguments) != len(signature):
        raise TypeError(f"the kernel takes {len(signature)} arguments, got {len(arguments)}")
    device = None
    raw = []
    for position, (kind, argument) in enumerate(zip(signature, arguments, strict=True)):
        if is_pointer(kind):
            if not isinstance(argument, int):
                if stream is None:
                    stream = arrays.current_stream(argument) if arrays.is_gpu_array(argument) else 0
                argument, owner = arrays.address_and_device(argument, stream)
                if device is None:
                    device = owner
                elif device != owner:
                    raise ValueError(
                        f"argument {position} must be on device {device} like those before it, got {owner}"
                    )
        elif not isinstance(argument, int | float):
            raise TypeError(f"argument {position} must be a number for {kind!r}, got {type(argument).__name__}")
        elif issubclass(_integer_range(kind)[0], int):
            low, high = _integer_range(kind)[1:]
            if not isinstance(argument, int) or not low <= argument <= high:
                raise ValueError(
                    f"argument {position} must be an integer in [{low}, {high}] for {kind!r}, got {argument}"
                )
        raw.append(argument)
    return (current_device() if device is None else device), stream or 0, raw


@functools.cache
def _integer_range(kind: str) -> tuple[type, float, float]:
    if kind.startswith("f"):
        return float, -float("inf"), float("inf")
    bits = ctypes.sizeof(ctype(kind)) * 8
    return (int, 0, 2**bits - 1) if kind.startswith("u") else (int, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@contextmanager
def _on_device(ordinal: int):
    """Make the device current for the launch and put the caller's device back."""
    from cuda.bindings import driver
    from cuda.core import Device

    error, current = driver.cuCtxGetDevice()
    if error == driver.CUresult.CUDA_SUCCESS and int(current) == ordinal:
        yield
        return
    Device(ordinal).set_current()
    try:
        yield
    finally:
        if error == driver.CUresult.CUDA_SUCCESS:
            Device(int(current)).set_current()


@functools.lru_cache(maxsize=256)
def _config(grid: tuple, block: tuple, smem_bytes: int):
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=block, shmem_size=smem_bytes)


@functools.lru_cache(maxsize=64)
def _stream(handle: int):
    from cuda.core import LEGACY_DEFAULT_STREAM, Stream

    return Stream.from_handle(handle) if handle else LEGACY_DEFAULT_STREAM
