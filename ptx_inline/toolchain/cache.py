"""Cubins and PTX on disk, one file a kernel and kind, named by a hash of all that decides its content.

Numba's own cache refuses kernels with linked files. Entries are written to a temporary file and moved into place, so
that concurrent processes see a whole entry or none; a digest in the header makes a damaged entry a miss.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path

from ptx_inline.toolchain.compiler import Resources

_log = logging.getLogger("ptx_inline")

# Everything that turns source into PTX and machine code.
_TOOLS = ("numba", "numba-cuda", "llvmlite", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12", "nvidia-cuda-nvrtc",
          "nvidia-cuda-nvrtc-cu12", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12")  # fmt: skip


def cache_directory() -> Path:
    """``$NBFMHA_CACHE_DIR``, else ``$XDG_CACHE_HOME/nbfmha``, else ``~/.cache/nbfmha``."""
    if chosen := os.environ.get("NBFMHA_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nbfmha"


@cache
def toolchain_versions() -> tuple[str, ...]:
    """Python and the compiler packages with their versions; part of every key."""
    versions = [f"python {sys.version_info.major}.{sys.version_info.minor}"]
    for name in _TOOLS:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if not any(version.startswith("nvidia-nvjitlink") for version in versions):
        from cuda.bindings import nvjitlink  # a system CUDA

        versions.append(f"nvjitlink {nvjitlink.version()}")
    return tuple(versions)


def key(*parts: object) -> str:
    """Hash of the parts and of the toolchain; parts must have a ``repr`` that says all about them."""
    return hashlib.sha256(repr((parts, toolchain_versions())).encode()).hexdigest()[:40]


def load(entry_key: str) -> tuple[bytes, str, Resources] | None:
    """Cubin, kernel name and resources; ``None`` if the entry is missing or damaged."""
    return _read(_path(entry_key, "cubin"), lambda header, cubin: (cubin, header["name"], Resources(**header["resources"])))


def load_ptx(entry_key: str) -> str | None:
    """PTX text; ``None`` if the entry is missing or damaged."""
    return _read(_path(entry_key, "ptx"), lambda _, text: text.decode())


def store(entry_key: str, cubin: bytes, name: str, resources: Resources) -> None:
    """Write a cubin; a directory that cannot be written to is logged and costs a compilation next time."""
    _write(_path(entry_key, "cubin"), cubin, {"name": name, "resources": asdict(resources)})


def store_ptx(entry_key: str, text: str) -> None:
    """Write PTX text; as :func:`store`."""
    _write(_path(entry_key, "ptx"), text.encode(), {})


def _path(entry_key: str, kind: str) -> Path:
    return cache_directory() / f"{entry_key}.{kind}"


def _read(path: Path, parse: Callable[[dict, bytes], object]):
    """What ``parse`` makes of an entry's header and content; ``None`` if the entry is missing or damaged."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    try:
        line, content = entry.split(b"\n", 1)
        header = json.loads(line)
        if header["sha256"] == hashlib.sha256(content).hexdigest():
            return parse(header, content)
    except (ValueError, KeyError, TypeError):
        pass
    _log.warning("damaged cache entry %s is compiled again", path)
    return None


def _write(path: Path, content: bytes, about: dict) -> None:
    header = {**about, "sha256": hashlib.sha256(content).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(json.dumps(header).encode() + b"\n" + content)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        _log.warning("kernel cache %s is not usable: %s", path.parent, error)
