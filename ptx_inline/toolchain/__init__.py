"""From a Numba CUDA Python function to PTX, cubin, SASS and a launch, with or without a GPU.

``Kernel`` is the one object users need, ``PtxKernel`` the same for PTX text; the modules behind them have one duty each:
``targets`` names architectures, ``compiler`` turns Python into LLVM IR and LTO-IR and links it, ``shared_functions`` has
device functions compiled once, ``cache`` keeps cubins and PTX on disk, ``disasm`` reads SASS, ``arrays`` reads addresses
off other libraries' arrays, ``launcher`` talks to the driver.
"""

from ptx_inline.toolchain.cache import cache_directory
from ptx_inline.toolchain.compiler import Resources
from ptx_inline.toolchain.disasm import InstructionMix, instruction_mix
from ptx_inline.toolchain.kernel import Kernel, PtxKernel
from ptx_inline.toolchain.targets import TARGETS, Target

__all__ = ["TARGETS", "InstructionMix", "Kernel", "PtxKernel", "Resources", "Target", "cache_directory", "instruction_mix"]
