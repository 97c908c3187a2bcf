"""Loads cubins and launches them through cuda-core, on the caller's device and stream.

Host time is the point of this module: a launch with six torch tensors costs a few microseconds more than cuda-core's own
``launch``, so nothing here imports, allocates or asks the driver twice on that path.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence

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


@functools.cache
def multiprocessors(ordinal: int) -> int:
    """SMs of a device. Raises ``RuntimeError`` where there is no driver or no such device."""
    from cuda.core import Device

    return Device(ordinal).properties.multiprocessor_count


def current_device() -> int:
    """Ordinal of the calling thread's current device, 0 where none is current yet."""
    from cuda.bindings import driver

    error, ordinal = driver.cuCtxGetDevice()
    return int(ordinal) if error == driver.CUresult.CUDA_SUCCESS else 0


class ArgumentReader:
    """Turns a caller's arguments into what the driver takes, by the kernel's signature."""

    def __init__(self, signature: Sequence[str]):
        self._signature = tuple(signature)
        self._checks = tuple(None if is_pointer(kind) else _scalar_check(kind) for kind in signature)

    def read(self, arguments: Sequence, stream: int | None) -> tuple[int | None, int | None, list]:
        """Device, stream handle and raw arguments of a launch.

        The device is that of the first array, ``None`` without one; the stream, unless given, is the current one of the
        library that owns that array. Raises ``TypeError`` / ``ValueError`` naming the argument that does not fit.
        """
        if len(arguments) != len(self._checks):
            raise TypeError(f"the kernel takes {len(self._checks)} arguments, got {len(arguments)}")
        torch = sys.modules.get("torch")
        tensor_type = getattr(torch, "Tensor", ())
        device = None
        raw = []
        for position, (check, argument) in enumerate(zip(self._checks, arguments, strict=True)):
            if check is not None:
                raw.append(check(position, argument))
                continue
            if isinstance(argument, tensor_type):
                owner = argument.get_device()  # -1 on the CPU
                if owner < 0:
                    raise ValueError(f"argument {position} must be in GPU memory, got a CPU tensor; use .cuda()")
                if stream is None:
                    stream = torch._C._cuda_getCurrentRawStream(owner)
                raw.append(argument.data_ptr())
            elif isinstance(argument, int):
                raw.append(argument)
                continue
            else:
                if stream is None:
                    stream = arrays.current_stream(argument)
                address, owner = arrays.address_and_device(argument, stream)
                raw.append(address)
            if device is None:
                device = owner
            elif device != owner:
                raise ValueError(f"argument {position} must be on device {device} like those before it, got {owner}")
        return device, stream, raw


class LoadedKernel:
    """A kernel in the driver, ready for any device of its target."""

    def __init__(self, cubin: bytes, name: str):
        from cuda.bindings import driver
        from cuda.core import LEGACY_DEFAULT_STREAM, Device, LaunchConfig, ObjectCode, Stream, launch

        self._module = ObjectCode.from_cubin(cubin)
        self._kernel = self._module.get_kernel(name)
        self._shared_bytes: dict[int, int] = {}
        self._driver, self._device_type, self._launch = driver, Device, launch
        self._success = driver.CUresult.CUDA_SUCCESS
        self._config = functools.lru_cache(maxsize=256)(
            lambda grid, block, smem_bytes: LaunchConfig(grid=grid, block=block, shmem_size=smem_bytes)
        )
        self._stream = functools.lru_cache(maxsize=64)(
            lambda handle: Stream.from_handle(handle) if handle else LEGACY_DEFAULT_STREAM
        )

    def launch(self, device: int, grid: tuple, block: tuple, raw: list, smem_bytes: int, stream: int) -> None:
        """Queue one launch on a device; ``raw`` as :class:`ArgumentReader` gives it."""
        error, current = self._driver.cuCtxGetDevice()
        if error != self._success or int(current) != device:
            self._device_type(device).set_current()
        try:
            if smem_bytes > self._shared_bytes.get(device, _DEFAULT_DYNAMIC_SHARED_BYTES):
                self._raise_shared_limit(device, smem_bytes)
            self._launch(self._stream(stream), self._config(grid, block, smem_bytes), self._kernel, *raw)
        finally:
            if error == self._success and int(current) != device:
                self._device_type(int(current)).set_current()

    def _raise_shared_limit(self, device: int, smem_bytes: int) -> None:
        limit = self._device_type(device).properties.max_shared_memory_per_block_optin
        if smem_bytes > limit:
            raise ValueError(f"smem_bytes must be at most {limit} on device {device}, got {smem_bytes}")
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        # the handle is a CUkernel: cuFuncSetAttribute would refuse it
        (error,) = self._driver.cuKernelSetAttribute(attribute, smem_bytes, int(self._kernel.handle), device)
        if error != self._success:
            raise RuntimeError(f"cuKernelSetAttribute answered {error.name} for {smem_bytes} bytes of shared memory")
        self._shared_bytes[device] = smem_bytes


def _scalar_check(kind: str):
    """A function ``(position, value) -> ctypes value`` that refuses what the type cannot hold."""
    convert = ctype(kind)
    if kind.startswith("f"):

        def check_float(position: int, value: object):
            if not isinstance(value, int | float):
                raise TypeError(f"argument {position} must be a number for {kind!r}, got {type(value).__name__}")
            return convert(value)

        return check_float
    bits = ctypes.sizeof(convert) * 8
    low, high = (0, 2**bits - 1) if kind.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def check_integer(position: int, value: object):
        if not isinstance(value, int):
            raise TypeError(f"argument {position} must be an integer for {kind!r}, got {type(value).__name__}")
        if not low <= value <= high:
            raise ValueError(f"argument {position} must be in [{low}, {high}] for {kind!r}, got {value}")
        return convert(value)

    return check_integer
