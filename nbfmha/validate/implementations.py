"""Who multiplies: the implementations of tiled Q·K^T that a validation can be run on.

Each one is chosen by name and never replaced: asking for one that cannot run here raises with the reason. `auto` takes
the first that can, and `explain_auto` says why the others were passed over.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from nbfmha import doctor

#: Implementations of Q·K^T, in the order in which `auto` tries them.
PREFERENCE = ("blockscale", "dequant", "reference")
CHOICES = ("auto", *PREFERENCE)


class Unavailable(RuntimeError):
    """The implementation asked for cannot run on this machine."""


class Implementation(Protocol):
    """Tiled Q·K^T by one implementation.

    name: as in the table; proof: how the result came about, for the summary; accumulation: the parameters of
    `nbfmha.testing.accumulation_budget` for its MMA, with `k` the length of one step.
    """

    name: str
    proof: str
    mma: str

    def qk(self, q, k) -> np.ndarray:
        """Scores q k^T of two quantised tensors (tokens, head_dim), linear scales: float32 (tokens q, tokens k)."""
        ...


class Reference:
    """The NumPy warp model: registers packed by the fragment maps, multiplied by the bit-exact model of the MMA."""

    name = "reference"
    proof = "bit-exact NumPy model of the MMA, reproducing transcripts of an RTX PRO 6000"
    mma = "m16n8k64.mxf4nvf4.4x"

    def qk(self, q, k) -> np.ndarray:
        from nbfmha.validate import warp_model

        return warp_model.qk_quantized(q, k)


class OnGpu:
    """A CUDA kernel on this machine's GPU: `blockscale` or `dequant`."""

    def __init__(self, name: str, device: str):
        self.name = name
        self.proof = f"run on {device}"
        self.mma = {"blockscale": "m16n8k64.mxf4nvf4.4x", "dequant": "m16n8k16.f16"}[name]

    def qk(self, q, k) -> np.ndarray:
        from nbfmha.kernels import qk

        return qk.qk(q, k, implementation=self.name)


def choose(name: str) -> Implementation:
    """The implementation of this name, or the first that can run here for "auto".

    Raises ValueError for an unknown name and `Unavailable`, with the reason, for one that cannot run on this machine.
    """
    if name not in CHOICES:
        raise ValueError(f"implementation must be one of {', '.join(CHOICES)}, got {name!r}")
    if name == "reference":
        return Reference()
    found = doctor.availability()
    if name == "auto":
        name = next(candidate for candidate in PREFERENCE if found[candidate].available)
        return choose(name)
    if not found[name].available:
        raise Unavailable(f"implementation {name!r} cannot run here: {found[name].reason}")
    return OnGpu(name, found[name].reason)


def explain_auto() -> list[str]:
    """One line for each implementation that `auto` considered: taken, or passed over and why."""
    found = doctor.availability()
    lines = []
    for name in PREFERENCE:
        if found[name].available:
            return [*lines, f"{name}: taken, {found[name].reason}"]
        lines.append(f"{name}: passed over, {found[name].reason}")
    return lines
