"""Cubins on disk, one file a kernel, named by a hash of all that decides its content.

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
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path

from ptx_inline.toolchain.compiler import Resources

_log = logging.getLogger("ptx_inline")

# Everything that turns source into machine code.
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
    try:
        content = _path(entry_key).read_bytes()
    except OSError:
        return None
    try:
        header, cubin = content.split(b"\n", 1)
        fields = json.loads(header)
        if fields["sha256"] == hashlib.sha256(cubin).hexdigest():
            return cubin, fields["name"], Resources(**fields["resources"])
    except (ValueError, KeyError, TypeError):
        pass
    _log.warning("damaged cache entry %s is compiled again", _path(entry_key))
    return None


def store(entry_key: str, cubin: bytes, name: str, resources: Resources) -> None:
    """Write an entry; a directory that cannot be written to is logged and costs a compilation next time."""
    header = {"name": name, "sha256": hashlib.sha256(cubin).hexdigest(), "resources": asdict(resources)}
    target = _path(entry_key)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            try:
                file.write(json.dumps(header).encode() + b"\n" + cubin)
                file.flush()
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        _log.warning("kernel cache %s is not usable: %s", target.parent, error)


def _path(entry_key: str) -> Path:
    return cache_directory() / f"{entry_key}.cubin"
