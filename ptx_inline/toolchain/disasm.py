"""SASS of a cubin by NVIDIA's ``nvdisasm`` (a PyPI wheel or a CUDA toolkit), and counts of what is in it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_MMA = ("HMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "IMMA", "DMMA")


@dataclass(frozen=True)
class InstructionMix:
    """Static counts of a SASS listing: instructions by full opcode, without padding after the kernel's end."""

    opcodes: dict[str, int]

    def count(self, *prefixes: str) -> int:
        """How many instructions have an opcode that is, or starts with, one of these names (``"LDL"``, ``"OMMA"``)."""
        return sum(number for opcode, number in self.opcodes.items() if opcode.split(".")[0] in prefixes)

    @property
    def total(self) -> int:
        return sum(self.opcodes.values())

    @property
    def mma(self) -> int:
        return self.count(*_MMA)

    @property
    def local_memory(self) -> int:
        """Loads and stores of local memory: spills, or arrays that did not fit registers."""
        return self.count("LDL", "STL")


def find_nvdisasm() -> Path | None:
    """The disassembler of the ``nvidia-cuda-nvdisasm`` wheel, else the one on PATH or of ``/usr/local/cuda``."""
    try:
        for file in metadata.files("nvidia-cuda-nvdisasm") or ():
            if file.name in ("nvdisasm", "nvdisasm.exe"):
                return Path(file.locate())
    except metadata.PackageNotFoundError:
        pass
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin")
    return Path(found) if found else None


def disassemble(cubin: bytes) -> str:
    """SASS of every function in the cubin. Raises ``RuntimeError`` where no disassembler is installed."""
    tool = find_nvdisasm()
    if tool is None:
        raise RuntimeError("no nvdisasm found; install the PyPI package nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        run = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"nvdisasm failed: {run.stderr.strip()}")
    return run.stdout


def instruction_mix(sass: str) -> InstructionMix:
    """Count the instructions of a listing made by :func:`disassemble`; what follows the last EXIT or RET is padding."""
    opcodes = [match[1] for line in sass.splitlines() if (match := _INSTRUCTION.match(line))]
    while opcodes and opcodes[-1] in ("NOP", "BRA"):
        opcodes.pop()
    return InstructionMix(dict(Counter(opcodes).most_common()))
