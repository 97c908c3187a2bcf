"""Who multiplies: the implementations of the MMA tile and of tiled Q·K^T that a validation can be run on.

Each one is chosen by name and never replaced: asking for one that cannot run here raises with the reason. ``auto``
takes the first that can, and ``explain_auto`` says why the others were passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nbfmha import doctor

#: Implementations of Q·K^T, in the order in which ``auto`` tries them.
PREFERENCE = ("blockscale", "dequant", "reference")
CHOICES = ("auto", *PREFERENCE)
BLOCK_SCALE_MMA = "m16n8k64.mxf4nvf4.4x"


class Unavailable(RuntimeError):
    """The implementation asked for cannot run on this machine."""


@dataclass(frozen=True)
class Accumulation:
    """How an MMA adds: ``k`` elements a step, ``addends`` terms aligned and truncated at ``fraction_bits`` places.

    ``smallest_factor`` is the smallest power of two by which a factor of an addend (a scale of the block-scale MMA, an
    element of the f16 MMA) can set the alignment: that of the subnormals, zero among them.
    """

    k: int
    addends: int
    fraction_bits: int
    smallest_factor: float

    @classmethod
    def of_instruction(cls, key: str, smallest_factor: float) -> Accumulation:
        from ptx_inline.isa.instructions import instruction

        description = instruction(key)
        k = description.shape[2]
        numerics = description.numerics
        return cls(k, k // numerics.group + 1, numerics.fraction_bits, smallest_factor)

    def steps(self, head_dim: int) -> int:
        """MMAs in a chain over head_dim, which kernels pad to the block-scale MMA's 64."""
        return -(-head_dim // 64) * 64 // self.k


class Implementation(Protocol):
    """One way to multiply.

    name: as in the table; proof: how a result comes about, for the summary; accumulation: what its error budget
    follows from; on_gpu: it runs on this machine's GPU; multiplies_scales: the scales are factors of an addend (else
    they are multiplied into the elements beforehand); scale_sources: where the tiled kernel can read scales from.
    """

    name: str
    proof: str
    accumulation: Accumulation
    on_gpu: bool
    multiplies_scales: bool
    scale_sources: tuple[str, ...]

    def qk(self, q, k, *, scales_in: str) -> np.ndarray:
        """Scores q k^T of two NVFP4 ``QuantizedTensor``s in NumPy arrays: float32 (..., heads, tokens q, tokens k)."""
        ...

    def mma_registers(self, a, b, c, sfa, sfb, thread_id_a: int, thread_id_b: int) -> np.ndarray:
        """One MMA a tile on register images: uint32 (T, 32, 4), (T, 32, 2), float32 (T, 32, 4), uint32 (T, 32) twice;
        float32 (T, 32, 4)."""
        ...


class Reference:
    """The NumPy warp model: registers packed by the fragment maps, multiplied by the bit-exact model of the MMA."""

    name = "reference"
    proof = "bit-exact NumPy model of the MMA, reproducing transcripts of an RTX PRO 6000"
    on_gpu = False
    multiplies_scales = True
    scale_sources = ("host memory",)

    def __init__(self):
        self.accumulation = Accumulation.of_instruction(BLOCK_SCALE_MMA, 2.0**-6)

    def qk(self, q, k, *, scales_in: str = "host memory") -> np.ndarray:
        from nbfmha.validate import warp_model

        return warp_model.qk_quantized(q, k)

    def mma_registers(self, a, b, c, sfa, sfb, thread_id_a: int = 0, thread_id_b: int = 0) -> np.ndarray:
        from ptx_inline.isa.arithmetic import mma_registers

        return mma_registers(BLOCK_SCALE_MMA, a, b, c, sfa, sfb, thread_id_a=thread_id_a, thread_id_b=thread_id_b)


class OnGpu:
    """A CUDA kernel on this machine's GPU: ``blockscale`` or ``dequant``."""

    on_gpu = True
    scale_sources = ("shared", "global")

    def __init__(self, name: str, gpu: doctor.Gpu):
        self.name = name
        self.proof = f"run on {gpu.describe()}"
        self.multiplies_scales = name == "blockscale"
        if name == "blockscale":
            self.accumulation = Accumulation.of_instruction(BLOCK_SCALE_MMA, 2.0**-6)
        elif gpu.compute_capability >= (9, 0):
            self.accumulation = Accumulation.of_instruction("m16n8k16.f16", 2.0**-14)
        else:  # Ampere and Ada: two halves of 8 products, 24 fraction bits (arXiv 2511.10909)
            self.accumulation = Accumulation(8, 9, 24, 2.0**-14)

    def qk(self, q, k, *, scales_in: str = "shared") -> np.ndarray:
        from nbfmha.kernels.qk import qk

        return qk(q, k, implementation=self.name, scales_in=scales_in)

    def mma_registers(self, a, b, c, sfa, sfb, thread_id_a: int = 0, thread_id_b: int = 0) -> np.ndarray:
        return run_probe(self.name, a, b, c, sfa, sfb, thread_id_a, thread_id_b)


def run_probe(mma: str, a, b, c, sfa, sfb, thread_id_a: int = 0, thread_id_b: int = 0) -> np.ndarray:
    """The kernel of ``nbfmha.kernels.probe`` for ``mma`` on this machine's GPU, one CTA a tile; D starts as NaN."""
    from numba import cuda

    from nbfmha.kernels.probe import probe_kernel

    operands = [cuda.to_device(np.ascontiguousarray(operand)) for operand in (a, b, c, sfa, sfb)]
    d = cuda.to_device(np.full(c.shape, np.nan, np.float32))
    probe_kernel(mma, thread_id_a, thread_id_b).launch((len(a),), (32,), [*operands, d])
    return d.copy_to_host()


def choose(name: str) -> Implementation:
    """The implementation of this name, or the first that can run here for "auto".

    Raises ValueError for an unknown name and ``Unavailable``, with the reason, for one that cannot run on this machine.
    """
    if name not in CHOICES:
        raise ValueError(f"implementation must be one of {', '.join(CHOICES)}, got {name!r}")
    if name == "reference":
        return Reference()
    found = doctor.availability()
    if name == "auto":
        name = next(candidate for candidate in PREFERENCE if found[candidate].available)
        if name == "reference":
            return Reference()
    if not found[name].available:
        raise Unavailable(f"implementation {name!r} cannot run here: {found[name].reason}")
    return OnGpu(name, found[name].gpu)


def explain_auto() -> list[str]:
    """One line for each implementation that ``auto`` considered: taken, or passed over and why."""
    found = doctor.availability()
    lines = []
    for name in PREFERENCE:
        if found[name].available:
            return [*lines, f"{name}: taken, {found[name].reason}"]
        lines.append(f"{name}: passed over, {found[name].reason}")
    return lines
