"""Results of block-scale and f8f6f4 MMAs read from a physical sm_120 GPU: the touchstone of our arithmetic model.

``data/sm120_mma_transcripts.json`` states who read them on which GPU, the recipe of the inputs and the hash of the
results. Each case is one warp-wide MMA: its hash fails when one bit of one lane's D differs, so it checks formats,
fragment maps, selectors, alignment and rounding together. We have not run that GPU ourselves.

What they settle: layouts, selectors, containers, NaN, rounding toward zero, and the 25 fraction bits of the k32 kinds
(24 or 26 fail). What they do not: the 35 fraction bits, groups of 16 and smallest exponent of the k64 kinds, because
their scales lie too close together for anything to be truncated; these rest on the paper alone. The one case with UE4M3
scales has 32 numbers beside 96 NaN.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from ptx_inline.isa.arithmetic import mma_registers
from ptx_inline.isa.fragments import WARP_SIZE

_KINDS = {"f8f6f4": "m16n8k32.f8f6f4", "mx8": "m16n8k32.mxf8f6f4.1x"}
_K64_KINDS = {
    "mxf4": ("m16n8k64.mxf4.2x", "ue8m0"),
    "nvf4_2X_ue8m0": ("m16n8k64.mxf4nvf4.2x", "ue8m0"),
    "nvf4_4X_ue4m3": ("m16n8k64.mxf4nvf4.4x", "ue4m3"),
}
_SELECTOR_NAMES = ("byte_id_a", "thread_id_a", "byte_id_b", "thread_id_b")


@dataclass(frozen=True)
class Transcript:
    """One case: its name, the MMA's key in ``INSTRUCTIONS``, formats (``None``: the MMA's default), selectors, hash."""

    name: str
    mma: str
    a_format: str | None
    b_format: str | None
    sf_format: str | None
    selectors: tuple[int, int, int, int]
    hash: str

    def compute(self) -> np.ndarray:
        """D registers, float32 (32, 4), of our model on the transcripts' inputs."""
        inputs = input_registers()
        scales = () if self.sf_format is None else (inputs["sfa"], inputs["sfb"])
        return mma_registers(
            self.mma,
            inputs["a"],
            inputs["b"],
            inputs["c"],
            *scales,
            a_format=self.a_format,
            b_format=self.b_format,
            sf_format=self.sf_format,
            **dict(zip(_SELECTOR_NAMES, self.selectors, strict=True)),
        )


@functools.cache
def document() -> dict:
    """The JSON document: source, inputs, hash, names, notes (texts) and hashes."""
    return json.loads(files("ptx_inline.isa").joinpath("data/sm120_mma_transcripts.json").read_text("utf-8"))


def transcripts() -> tuple[Transcript, ...]:
    """Every case of the document, in its order."""
    return tuple(_parse(name, value) for name, value in document()["hashes"].items())


def _parse(name: str, value: str) -> Transcript:
    head, _, digits = name.rpartition("_s")
    selectors = tuple(int(digit) for digit in digits) if head else (0, 0, 0, 0)
    head = head or name
    if head in _K64_KINDS:
        mma, sf_format = _K64_KINDS[head]
        return Transcript(name, mma, None, None, sf_format, selectors, value)
    kind, a_format, b_format = head.split("_")
    return Transcript(name, _KINDS[kind], a_format, b_format, "ue8m0" if kind == "mx8" else None, selectors, value)


@functools.cache
def input_registers() -> dict[str, np.ndarray]:
    """Inputs of every case, by the document's recipe: a, b, sfa, sfb (uint32), c (float32), lane first; read-only."""
    index = np.arange(352, dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    words = ((index * np.uint64(2654435761)) & mask) ^ (((index >> np.uint64(3)) * np.uint64(40503)) & mask)
    # scale bytes near 1: words 192 to 255
    scale_index, byte = np.arange(192, 256)[:, None], np.arange(4)[None, :]
    scale_bytes = 123 + (7 * scale_index + 3 * byte) % 8
    words[192:256] = (scale_bytes << (8 * byte)).sum(axis=1).astype(np.uint64)
    words = words.astype(np.uint32)
    lane = np.arange(WARP_SIZE)
    c = np.empty((WARP_SIZE, 4), np.float32)
    c[:] = (0.0, 1.0, -2.0, 0.25)
    c[:, 0] = 0.5 * lane
    result = {
        "a": words[lane[:, None] + 32 * np.arange(4)],
        "b": words[lane[:, None] + 128 + 32 * np.arange(2)],
        "sfa": words[lane + 192],
        "sfb": words[lane + 224],
        "c": c,
    }
    for array in result.values():
        array.setflags(write=False)
    return result


def result_hash(d: np.ndarray) -> str:
    """The document's hash (FNV-1a over a lane's words, then over the lanes) of D registers, float32 (32, 4)."""
    bits = np.ascontiguousarray(d, np.float32).view(np.uint32)
    total = 1469598103934665603
    for lane in bits.tolist():
        h = 2166136261
        for word in lane:
            h = ((h ^ word) * 16777619) % 2**32
        total = ((total ^ h) * 1099511628211) % 2**64
    return f"{total:016x}"
