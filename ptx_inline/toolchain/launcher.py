"""Loads cubins through cuda-core and launches them, on the caller's device and stream.

Host time is the point of this module: nothing here imports, allocates or asks the driver twice on that path. cuda-core's
own ``launch`` would convert every argument anew, in 14 us for 36 of them; :mod:`parameters` takes 1.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

from ptx_inline.toolchain import arrays
from ptx_inline.toolchain.parameters import Parameters, Placeholder
from ptx_inline.toolchain.targets import Target
from ptx_inline.types import ctype, is_pointer

_DEFAULT_DYNAMIC_SHARED_BYTES = 48 * 1024
_LEGACY_STREAM = 1  # CU_STREAM_LEGACY
_MAX_F32 = (2 - 2.0**-23) * 2.0**127


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
        self._expected = tuple(None if is_pointer(kind) else _scalar(kind) for kind in signature)

    def read(self, arguments: Sequence, stream: int | None) -> tuple[int | None, int | None, list[int | float]]:
        """Device, stream handle and values of a launch: addresses, and numbers in the range of their types.

        The device is that of the first array, ``None`` without one; the stream, unless given, is the current one of the
        library that owns that array. Raises ``TypeError`` / ``ValueError`` naming the argument that does not fit.
        """
        if len(arguments) != len(self._expected):
            raise TypeError(f"the kernel takes {len(self._expected)} arguments, got {len(arguments)}")
        torch = sys.modules.get("torch")
        tensor_type = getattr(torch, "Tensor", ())
        device = None
        values = []
        for position, (expected, argument) in enumerate(zip(self._expected, arguments, strict=True)):
            if expected is not None:
                kind, low, high, convert = expected
                if type(argument) is not kind or not low <= argument <= high:
                    argument = convert(position, argument)
                values.append(argument)
                continue
            if isinstance(argument, tensor_type):
                owner = argument.get_device()  # -1 on the CPU
                if owner < 0:
                    raise ValueError(f"argument {position} must be in GPU memory, got a CPU tensor; use .cuda()")
                if stream is None:
                    stream = torch._C._cuda_getCurrentRawStream(owner)
                values.append(argument.data_ptr())
            elif isinstance(argument, int):
                values.append(argument)
                continue
            else:
                if stream is None:
                    stream = arrays.current_stream(argument)
                address, owner = arrays.address_and_device(argument, stream)
                values.append(address)
            if device is None:
                device = owner
            elif device != owner:
                raise ValueError(f"argument {position} must be on device {device} like those before it, got {owner}")
        return device, stream, values

    def read_fixed(self, arguments: Sequence) -> tuple[int | None, list[int | float | Placeholder]]:
        """Device and values of a launch that is prepared, some of whose pointers are ``Placeholder``s. Raises as
        ``read``."""
        late = [isinstance(argument, Placeholder) for argument in arguments]
        known = [0 if is_late else argument for is_late, argument in zip(late, arguments, strict=True)]
        device, _, values = self.read(known, 0)
        merged = zip(late, arguments, values, strict=True)
        return device, [argument if is_late else value for is_late, argument, value in merged]


class ProgrammaticLaunch:
    """``(stream, addresses of the arguments, 0)`` to an error code, as the driver's function: a launch that may begin while
    the kernel ahead of it in the stream still runs (CUDA C++ Programming Guide, "Programmatic Dependent Launch")."""

    def __init__(self, driver, function, grid: tuple, block: tuple, smem_bytes: int):
        self.args = (function, *grid, *block, smem_bytes)
        self._driver, self._config_of = driver, functools.lru_cache(maxsize=64)(self._make_config)

    def __call__(self, stream: int, addresses: int, extra: int) -> tuple:
        return self._driver.cuLaunchKernelEx(self._config_of(stream), self.args[0], addresses, extra)

    def _make_config(self, stream: int):
        driver = self._driver
        attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value = value
        config = driver.CUlaunchConfig()
        _, config.gridDimX, config.gridDimY, config.gridDimZ, *block, config.sharedMemBytes = self.args
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.hStream, config.attrs, config.numAttrs = driver.CUstream(stream), [attribute], 1
        return config


class LoadedKernel:
    """A kernel in the driver, ready for any device of its target. programmatic: launched by ``ProgrammaticLaunch``."""

    def __init__(self, cubin: bytes, name: str, signature: Sequence[str], programmatic: bool = False):
        from cuda.bindings import driver
        from cuda.core import Device, LaunchConfig, ObjectCode

        self._module = ObjectCode.from_cubin(cubin)
        self._kernel = self._module.get_kernel(name)
        function = driver.CUfunction(int(self._kernel.handle))
        self._signature, self._parameters = signature, Parameters(signature)
        self._shared_bytes: dict[int, int] = {}
        self._driver, self._device_type = driver, Device
        self._success = driver.CUresult.CUDA_SUCCESS

        @functools.lru_cache(maxsize=256)
        def call(grid: tuple, block: tuple, smem_bytes: int) -> Callable:
            """``(stream, addresses of the arguments, 0)`` to an error code."""
            config = LaunchConfig(grid=grid, block=block, shmem_size=smem_bytes)  # which checks them
            if programmatic:
                return ProgrammaticLaunch(driver, function, config.grid, config.block, smem_bytes)
            return functools.partial(driver.cuLaunchKernel, function, *config.grid, *config.block, smem_bytes)

        self._call = call

    def launch(
        self, device: int, grid: tuple, block: tuple, values: Sequence[int | float], smem_bytes: int, stream: int
    ) -> None:
        """Queue one launch on a device; ``values`` as :class:`ArgumentReader` gives them."""
        self._queue(device, self._call(grid, block, smem_bytes), self._parameters, values, stream)

    def prepare(
        self,
        device: int,
        grid: tuple,
        block: tuple,
        values: Sequence[int | float | Placeholder],
        addresses: int,
        smem_bytes: int,
    ) -> Callable[[Sequence[int], int], None]:
        """A function ``(addresses, stream)`` that queues a launch whose ``Placeholder``s stand for these addresses."""
        parameters = Parameters(self._signature, values, addresses)
        return functools.partial(self._queue, device, self._call(grid, block, smem_bytes), parameters)

    def _queue(
        self,
        device: int,
        call: functools.partial | ProgrammaticLaunch,
        parameters: Parameters,
        values: Sequence,
        stream: int,
    ) -> None:
        error, current = self._driver.cuCtxGetDevice()
        elsewhere = error != self._success or int(current) != device
        if elsewhere:
            self._device_type(device).set_current()
        try:
            smem_bytes = call.args[-1]
            if smem_bytes > self._shared_bytes.get(device, _DEFAULT_DYNAMIC_SHARED_BYTES):
                self._raise_shared_limit(device, smem_bytes)
            memory = parameters.write(values)
            (answer,) = call(stream or _LEGACY_STREAM, memory.address, 0)
            parameters.release(memory)
            if answer != self._success:
                _, *sizes = call.args
                raise RuntimeError(f"the launch was answered {answer.name} for grid, block and shared bytes {sizes}")
        finally:
            if elsewhere and error == self._success:
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


def _scalar(kind: str) -> tuple[type, float, float, Callable[[int, object], float]]:
    """What a number of this type is: the Python type and range of one that passes as it is, and a function ``(position,
    value) -> number`` for others, which refuses what the type cannot hold."""
    convert = ctype(kind)
    if kind.startswith("f"):

        def to_float(position: int, value: object) -> float:
            if not isinstance(value, int | float):
                raise TypeError(f"argument {position} must be a number for {kind!r}, got {type(value).__name__}")
            return convert(value).value  # rounded as C does it, perhaps to infinity

        high = _MAX_F32 if kind == "f32" else sys.float_info.max
        return float, -high, high, to_float
    bits = ctypes.sizeof(convert) * 8
    low, high = (0, 2**bits - 1) if kind.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def to_integer(position: int, value: object) -> int:
        if not isinstance(value, int):
            raise TypeError(f"argument {position} must be an integer for {kind!r}, got {type(value).__name__}")
        if not low <= value <= high:
            raise ValueError(f"argument {position} must be in [{low}, {high}] for {kind!r}, got {value}")
        return int(value)

    return int, low, high, to_integer
