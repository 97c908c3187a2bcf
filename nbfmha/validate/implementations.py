"""Who computes: the implementations of the MMA tile, tiled Q·K^T, quantisers, attention and decode for a validation.

Each one is chosen by name and never replaced: asking for one that cannot run here raises with the reason. ``auto``
takes the first that can, and ``explain_auto`` says why the others were passed over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nbfmha import doctor
from nbfmha.call import DEFAULT_RECIPE
from nbfmha.emulated import EmulatedArray, Machine
from nbfmha.recipe import PRESETS, Recipe, resolve_recipe

#: Implementations, in the order in which ``auto`` tries them.
PREFERENCE = ("blockscale", "dequant", "emulated", "reference")
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
    def of_instruction(cls, key: str, smallest_factor: float, target: str | None = None) -> Accumulation:
        """By the model of ``ptx_inline.isa`` for a target (``None``: the newest)."""
        from ptx_inline.isa.instructions import instruction

        description = instruction(key).on(target)
        numerics = description.numerics
        k = numerics.step or description.shape[2]
        return cls(k, k // numerics.group + 1, numerics.fraction_bits, smallest_factor)

    def steps(self, head_dim: int) -> int:
        """MMAs in a chain over head_dim, which kernels pad to the block-scale MMA's 64."""
        return -(-head_dim // 64) * 64 // self.k


class Implementation(Protocol):
    """One way to compute.

    name: as in the table; proof: how a result comes about, for the summary; accumulation: what its error budget
    follows from; on_gpu: it runs on this machine's GPU; runs_kernels: it is a ``KernelRunner``; multiplies_scales: the
    scales are factors of an addend (else they are multiplied into the elements beforehand); scale_sources: where the
    tiled kernel can read scales from; recipes: the presets that ``attention`` takes.
    """

    name: str
    proof: str
    accumulation: Accumulation
    on_gpu: bool
    runs_kernels: bool
    multiplies_scales: bool
    scale_sources: tuple[str, ...]
    recipes: tuple[Recipe, ...]

    def qk(self, q, k, *, scales_in: str) -> np.ndarray:
        """Scores q k^T of two NVFP4 ``QuantizedTensor``s in NumPy arrays: float32 (..., heads, tokens q, tokens k)."""
        ...

    def mma_registers(self, a, b, c, sfa, sfb, thread_id_a: int, thread_id_b: int) -> np.ndarray:
        """One MMA a tile on register images: uint32 (T, 32, 4), (T, 32, 2), float32 (T, 32, 4), uint32 (T, 32) twice;
        float32 (T, 32, 4)."""
        ...

    def attention(self, q, k, v, **options) -> tuple[np.ndarray, np.ndarray]:
        """``nbfmha.attention`` of NumPy arrays (..., heads, tokens, head_dim) with its options but ``impl`` and ``out``:
        (out, lse) in NumPy."""
        ...


class Reference:
    """NumPy's models: of the warp, registers packed by the fragment maps and multiplied by the bit-exact model of the MMA;
    and of the recipe, for attention."""

    name = "reference"
    proof = (
        "NumPy on this CPU (the MMA by its bit-exact model, which reproduces transcripts of an RTX PRO 6000; attention by "
        "the recipe's model in float64)"
    )
    on_gpu = False
    runs_kernels = False
    multiplies_scales = True
    scale_sources = ("host memory",)
    recipes = tuple(PRESETS.values())

    def __init__(self):
        self.accumulation = Accumulation.of_instruction(BLOCK_SCALE_MMA, 2.0**-6)

    def qk(self, q, k, *, scales_in: str = "host memory") -> np.ndarray:
        from nbfmha.validate import warp_model

        return warp_model.qk_quantized(q, k)

    def mma_registers(self, a, b, c, sfa, sfb, thread_id_a: int = 0, thread_id_b: int = 0) -> np.ndarray:
        from ptx_inline.isa.arithmetic import mma_registers

        return mma_registers(BLOCK_SCALE_MMA, a, b, c, sfa, sfb, thread_id_a=thread_id_a, thread_id_b=thread_id_b)

    def attention(self, q, k, v, **options) -> tuple[np.ndarray, np.ndarray]:
        from nbfmha.forward import attention

        return attention(q, k, v, **options, impl="reference", return_lse=True)


class KernelRunner(ABC):
    """What implementations that run CUDA kernels share; ``kernels`` is "blockscale" or "dequant".

    A subclass says where the kernels' arrays lie. target: what they are compiled for, e.g. "sm_90a"; dtypes: what its
    arrays can hold for the quantisers to read.
    """

    name: str
    kernels: str
    target: str
    runs_kernels = True
    scale_sources = ("shared", "global")
    dtypes: tuple[str, ...]

    @property
    def multiplies_scales(self) -> bool:
        return self.kernels == "blockscale"

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return tuple(recipe for recipe in PRESETS.values() if recipe.scale_per == "block" or self.kernels == "blockscale")

    @property
    def accumulation(self) -> Accumulation:
        if self.kernels == "blockscale":
            return Accumulation.of_instruction(BLOCK_SCALE_MMA, 2.0**-6, self.target)
        return Accumulation.of_instruction("m16n8k16.f16", 2.0**-14, self.target)

    @abstractmethod
    def to_device(self, values: np.ndarray, dtype: str | None = None):
        """A copy where kernels can reach it, with ``copy_to_host()`` for the way back. ``dtype="bfloat16"``: ``values``
        are uint16 bit patterns."""

    def qk(self, q, k, *, scales_in: str = "shared") -> np.ndarray:
        from nbfmha.kernels.qk import qk

        q, k = (tensor.with_arrays(lambda array: self.to_device(np.atleast_1d(array))) for tensor in (q, k))
        return qk(q, k, implementation=self.kernels, scales_in=scales_in).copy_to_host()

    def mma_registers(self, a, b, c, sfa, sfb, thread_id_a: int = 0, thread_id_b: int = 0) -> np.ndarray:
        return self.probe(self.kernels, a, b, c, sfa, sfb, thread_id_a, thread_id_b)

    def attention(self, q, k, v, **options) -> tuple[np.ndarray, np.ndarray]:
        from nbfmha.forward import attention

        q, k, v = (self.to_device(np.ascontiguousarray(array)) for array in (q, k, v))
        one_scale_a_row = resolve_recipe(options.get("recipe", DEFAULT_RECIPE)).scale_per == "row"
        impl = "legacy" if one_scale_a_row else self.kernels
        out, lse = attention(q, k, v, **options, impl=impl, return_lse=True)
        return out.copy_to_host(), lse.copy_to_host()

    def decode(self, q: np.ndarray, cache, seq_ids, **options) -> tuple[np.ndarray, np.ndarray]:
        """``nbfmha.decode`` of q in NumPy, from a cache where kernels can reach it: (out, lse) in NumPy; out begins as
        NaN."""
        from nbfmha.decoding import decode

        out = self.to_device(np.full(q.shape, np.nan, q.dtype))
        options = {"impl": self.kernels, "out": out, "return_lse": True} | options
        _, lse = decode(self.to_device(q), cache, seq_ids, **options)
        return out.copy_to_host(), lse.copy_to_host()

    def probe(self, mma: str, a, b, c, sfa, sfb, thread_id_a: int = 0, thread_id_b: int = 0) -> np.ndarray:
        """The kernel of ``nbfmha.kernels.probe`` for ``mma``, one CTA a tile; D starts as NaN."""
        from nbfmha import gpu_arrays
        from nbfmha.kernels.probe import probe_kernel

        operands = [self.to_device(np.ascontiguousarray(operand)) for operand in (a, b, c, sfa, sfb)]
        d = self.to_device(np.full(c.shape, np.nan, np.float32))
        gpu_arrays.launch(probe_kernel(mma, thread_id_a, thread_id_b), (len(a),), (32,), (*operands, d))
        return d.copy_to_host()


class OnGpu(KernelRunner):
    """The kernels on this machine's GPU: ``blockscale`` or ``dequant``."""

    on_gpu = True
    dtypes = ("float16", "float32")  # Numba's arrays know no bfloat16

    def __init__(self, name: str, gpu: doctor.Gpu):
        self.name = self.kernels = name
        self.proof = f"run on {gpu.describe()}"
        self.target = gpu.target

    def to_device(self, values: np.ndarray, dtype: str | None = None):
        from numba import cuda

        return cuda.to_device(values)


class Emulated(KernelRunner):
    """The kernels' final PTX for a target, run by ``ptx_inline.emu``: ``blockscale`` where the target has its MMA, else
    ``dequant``. The emulator's MMAs follow the bit-exact models of ``ptx_inline.isa`` for that target."""

    name = "emulated"
    on_gpu = False
    dtypes = ("float16", "bfloat16", "float32")

    def __init__(self, target: str, machine: Machine | None = None):
        from ptx_inline.toolchain import Target

        self.kernels = "blockscale" if Target.parse(target).has_block_scale_mma else "dequant"
        self.machine = machine or Machine(target)
        self.proof = (
            f"the final PTX of the {self.kernels!r} kernels for {target}, compiled here and emulated on this CPU by "
            "ptx_inline.emu (MMAs by their bit-exact models, every memory access checked), not run on hardware"
        )
        self.target = target

    def to_device(self, values: np.ndarray, dtype: str | None = None) -> EmulatedArray:
        return self.machine.array(values, dtype)


def choose(name: str, target: str = "sm_120a") -> Implementation:
    """The implementation of this name, or the first that can run here for "auto"; ``emulated`` runs the PTX for ``target``.

    Raises ValueError for an unknown name and ``Unavailable``, with the reason, for one that cannot run on this machine.
    """
    if name not in CHOICES:
        raise ValueError(f"implementation must be one of {', '.join(CHOICES)}, got {name!r}")
    if name == "reference":
        return Reference()
    found = doctor.availability()
    if name == "auto":
        name = next(candidate for candidate in PREFERENCE if found[candidate].available)
    if not found[name].available:
        raise Unavailable(f"implementation {name!r} cannot run here: {found[name].reason}")
    if name == "reference":
        return Reference()
    return Emulated(target) if name == "emulated" else OnGpu(name, found[name].gpu)


def explain_auto() -> list[str]:
    """One line for each implementation that ``auto`` considered: taken, or passed over and why."""
    found = doctor.availability()
    lines = []
    for name in PREFERENCE:
        if found[name].available:
            return [*lines, f"{name}: taken, {found[name].reason}"]
        lines.append(f"{name}: passed over, {found[name].reason}")
    return lines
