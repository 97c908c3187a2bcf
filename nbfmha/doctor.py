"""What this machine has, and which implementations can run on it.

Nothing here needs a GPU or a driver; what is missing is reported as a fact with its reason.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata

from nbfmha import __version__

#: Packages whose versions decide what the kernels become.
PACKAGES = ("numpy", "numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "matplotlib")
#: Parts of the CUDA toolchain: what it does, and the wheels that carry it (CUDA 13 name first).
TOOLCHAIN = {
    "libNVVM (Numba's compiler)": ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"),
    "NVRTC (inline PTX functions)": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    "nvJitLink (link-time optimiser, assembler)": ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12"),
}
#: Libraries that share GPU arrays with this one; none is needed.
OPTIONAL = ("torch", "cupy-cuda13x", "cupy-cuda12x", "jax", "ml_dtypes")

#: Implementations, in the order in which ``auto`` prefers them.
IMPLEMENTATIONS = ("blockscale", "legacy", "dequant", "emulated", "reference")
_BLOCK_SCALE_CAPABILITIES = ((12, 0), (12, 1))


@dataclass(frozen=True)
class Gpu:
    """One device as the driver reports it."""

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int
    target: str

    def describe(self) -> str:
        major, minor = self.compute_capability
        return f"GPU {self.ordinal}: {self.name} (compute capability {major}.{minor}, {self.multiprocessors} SMs)"


@dataclass(frozen=True)
class Gpus:
    """The devices found, or the reason why there are none."""

    devices: tuple[Gpu, ...]
    reason: str
    driver: str = ""


@dataclass(frozen=True)
class Availability:
    """Whether an implementation can run here; ``reason`` says on what, or why not; ``gpu`` is the one that it would use."""

    name: str
    available: bool
    reason: str
    gpu: Gpu | None = None


@dataclass(frozen=True)
class Component:
    """A package or tool: its version or place, or why it is not there."""

    name: str
    found: bool
    version: str


@dataclass(frozen=True)
class Report:
    """Everything that ``nbfmha doctor`` prints."""

    system: str
    python: str
    packages: tuple[Component, ...]
    toolchain: tuple[Component, ...]
    optional: tuple[Component, ...]
    driver: str
    gpus: tuple[Gpu, ...]
    gpu_reason: str
    implementations: tuple[Availability, ...]
    cache_directory: str
    cache_entries: int

    @property
    def can_assemble(self) -> bool:
        return all(part.found for part in self.toolchain)

    def as_json(self) -> dict:
        return {**asdict(self), "can_assemble": self.can_assemble}


def find_gpus() -> Gpus:
    """Devices of this machine through cuda-core; never raises for a missing driver or library."""
    try:
        from cuda.bindings import driver
        from cuda.core import Device
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError as error:
        return Gpus((), f"cuda-core cannot be imported: {error}")
    # A driver that is there but broken raises errors which cuda-core does not export: an answer here, not a crash.
    try:
        (error,) = driver.cuInit(0)
        if error != driver.CUresult.CUDA_SUCCESS:
            return Gpus((), f"the CUDA driver answers {error.name}")
        error, version = driver.cuDriverGetVersion()
        driver_version = f"CUDA {version // 1000}.{version % 1000 // 10}" if version else ""
        error, count = driver.cuDeviceGetCount()
        if error != driver.CUresult.CUDA_SUCCESS or count == 0:
            return Gpus((), "the CUDA driver is installed but finds no GPU", driver_version)
        return Gpus(tuple(_describe(Device(ordinal)) for ordinal in range(count)), "", driver_version)
    except DynamicLibNotFoundError:
        return Gpus((), "no NVIDIA driver is installed on this machine")
    except Exception as error:
        return Gpus((), f"the CUDA driver does not work: {type(error).__name__}: {error}")


def _describe(device) -> Gpu:
    from ptx_inline.toolchain import Target

    capability = device.compute_capability
    pair = (capability.major, capability.minor)
    try:
        target = Target.of_compute_capability(*pair).name
    except ValueError:
        target = "not supported"
    return Gpu(
        ordinal=device.device_id,
        name=device.name,
        compute_capability=pair,
        memory_bytes=_memory_bytes(device.device_id),
        multiprocessors=device.properties.multiprocessor_count,
        target=target,
    )


def _memory_bytes(ordinal: int) -> int:
    from cuda.bindings import driver

    error, total = driver.cuDeviceTotalMem(ordinal)
    return int(total) if error == driver.CUresult.CUDA_SUCCESS else 0


def availability(gpus: Gpus | None = None) -> dict[str, Availability]:
    """Which implementations can run here, by name, in the order in which ``auto`` prefers them."""
    gpus = find_gpus() if gpus is None else gpus
    found = {name: _needs_gpu(name, gpus) for name in ("blockscale", "legacy", "dequant")}
    found["emulated"] = _emulated()
    found["reference"] = Availability("reference", True, "NumPy model of the block-scale MMA; runs on any CPU")
    return found


def _needs_gpu(name: str, gpus: Gpus) -> Availability:
    if name == "dequant":
        need = "compute capability 8.0 or higher (sm_80)"
        fits = [gpu for gpu in gpus.devices if gpu.compute_capability >= (8, 0)]
    else:
        need = "compute capability 12.0 or 12.1 (sm_120a/sm_121a)"
        fits = [gpu for gpu in gpus.devices if gpu.compute_capability in _BLOCK_SCALE_CAPABILITIES]
    if fits:
        if missing := _missing_toolchain():
            return Availability(name, False, missing)
        return Availability(name, True, fits[0].describe(), fits[0])
    if gpus.devices:
        have = ", ".join(f"{gpu.name} ({'.'.join(map(str, gpu.compute_capability))})" for gpu in gpus.devices)
        return Availability(name, False, f"needs {need}; this machine has {have}")
    return Availability(name, False, f"needs a GPU of {need}; {gpus.reason}")


def _emulated() -> Availability:
    if missing := _missing_toolchain():
        return Availability("emulated", False, f"needs the compiler, not a GPU; {missing}")
    return Availability("emulated", True, "the kernels' PTX, run on this CPU by ptx_inline.emu; needs no GPU")


def _missing_toolchain() -> str:
    """What the compiler lacks and the way out; empty where it is complete."""
    missing = [part.name for part in toolchain() if not part.found]
    return f"toolchain incomplete: {', '.join(missing)}; install nbfmha[cu13]" if missing else ""


def toolchain() -> tuple[Component, ...]:
    """Compiler, inline-PTX compiler, linker and disassembler, as found on this machine."""
    return tuple(_component(name, wheels) for name, wheels in TOOLCHAIN.items())


def disassembler() -> Component:
    """nvdisasm, which ``nbfmha sass`` and the machine-code cases need."""
    from ptx_inline.toolchain.disasm import find_nvdisasm

    path = find_nvdisasm()
    if path is None:
        return Component("nvdisasm (disassembler)", False, "not found; install the PyPI package nvidia-cuda-nvdisasm")
    return Component("nvdisasm (disassembler)", True, _version("nvidia-cuda-nvdisasm") or str(path))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Component:
    version = _version(name)
    return Component(name, version is not None, version or "missing")


def _component(name: str, distributions: tuple[str, ...]) -> Component:
    for distribution in distributions:
        if version := _version(distribution):
            return Component(name, True, f"{version} ({distribution})")
    library = {"libNVVM": "nvvm", "NVRTC": "nvrtc", "nvJitLink": "nvJitLink"}[name.split()[0]]
    if path := _system_library(library):
        return Component(name, True, path)
    return Component(name, False, f"no wheel {' or '.join(distributions)} and no system copy; install nbfmha[cu13]")


def _system_library(name: str) -> str | None:
    """Where cuda-pathfinder finds a library of an installed CUDA toolkit."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return load_nvidia_dynamic_lib(name).abs_path
    except (ImportError, RuntimeError):
        return None


def inspect() -> Report:
    """Look at this machine."""
    from ptx_inline.toolchain import cache_directory

    gpus = find_gpus()
    cache = cache_directory()
    return Report(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        packages=(Component("nbfmha", True, __version__), *(_package(name) for name in PACKAGES)),
        toolchain=(*toolchain(), disassembler()),
        optional=tuple(Component(name, True, version) for name in OPTIONAL if (version := _version(name))),
        driver=gpus.driver or "none",
        gpus=gpus.devices,
        gpu_reason=gpus.reason,
        implementations=tuple(availability(gpus).values()),
        cache_directory=str(cache),
        cache_entries=sum(1 for path in cache.iterdir() if path.suffix in (".cubin", ".ptx")) if cache.is_dir() else 0,
    )
