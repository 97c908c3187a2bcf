"""Where a kernel test runs: the PTX for sm_120a on this CPU, or a GPU. One test body for both."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from nbfmha.emulated import Machine


class EmulatedDevice:
    """An emulated GPU: sm_120a with the block-scale MMA, sm_90a by exact dequantisation."""

    def __init__(self, arch: str = "sm_120a"):
        self.machine = Machine(arch)
        self.implementation = "blockscale" if arch == "sm_120a" else "dequant"

    def to_device(self, x: np.ndarray):
        if x.dtype == ml_dtypes.bfloat16:
            return self.machine.array(x.view(np.uint16), "bfloat16")
        return self.machine.array(x)

    def empty(self, shape, dtype: str):
        return self.machine.empty(tuple(shape), dtype)

    def to_host(self, array) -> np.ndarray:
        """float64 of the content."""
        bits = array.copy_to_host()
        return (bits.view(ml_dtypes.bfloat16) if array.dtype == "bfloat16" else bits).astype(np.float64)


class GpuDevice:
    """The GPU that torch sees, by exact dequantisation; outputs begin as NaN."""

    implementation = "dequant"

    def __init__(self, torch):
        self.torch = torch

    def to_device(self, x: np.ndarray):
        if x.dtype == ml_dtypes.bfloat16:
            bits = self.torch.from_numpy(np.ascontiguousarray(x).view(np.int16))
            return bits.view(self.torch.bfloat16).cuda()
        return self.torch.from_numpy(np.ascontiguousarray(x)).cuda()

    def empty(self, shape, dtype: str):
        return self.torch.full(tuple(shape), float("nan"), dtype=getattr(self.torch, dtype), device="cuda")

    def to_host(self, array) -> np.ndarray:
        return array.double().cpu().numpy()
