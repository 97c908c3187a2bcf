"""Tiled Q·K^T as warps compute it, in NumPy: the mirror of ``nbfmha.kernels.qk``.

One warp owns a tile of MMA_M = 16 queries x MMA_N = 8 keys and walks head_dim in steps of MMA_K = 64:

    for each step:  a   <- Q tile   (16, 64) packed into 4 registers a lane (fragment A)
                    b   <- K tile   ( 8, 64) packed into 2 registers a lane (fragment B)
                    sfa <- Q scales (16,  4), sfb <- K scales (8, 4)
                    acc_S = mma(a, b, acc_S, sfa, sfb)
    scores <- acc_S unpacked (fragment C)

Codes go into registers and results come out of them only through `ptx_inline.isa.fragments`, so a wrong layout shows as
a wrong score. Lengths need not be multiples of a tile: missing rows and the rest of head_dim are zero codes with zero
scales, which add exact zeroes. Runs on any CPU; the arithmetic is `ptx_inline.isa.arithmetic.mma_registers`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ptx_inline.isa.arithmetic import mma_registers
from ptx_inline.isa.fragments import Fragment, fragment

MMA = "m16n8k64.mxf4nvf4.4x"
MMA_M, MMA_N, MMA_K = 16, 8, 64
BLOCK = 16
# Tiles multiplied at once: bounds the memory of the model's intermediate products (a few hundred KiB a tile).
_TILES_AT_ONCE = 512


@dataclass(frozen=True)
class Packing:
    """The maps by which the warp packs its operands; `Packing.right()` is what the hardware expects."""

    a: Fragment
    b: Fragment
    c: Fragment
    sfa: Fragment
    sfb: Fragment

    @classmethod
    def right(cls) -> Packing:
        return cls(*(fragment(MMA, operand) for operand in ("A", "B", "C", "SFA", "SFB")))


def qk(q_codes, q_scales, k_codes, k_scales, *, packing: Packing | None = None) -> np.ndarray:
    """Scores of one head.

    q_codes (M, head_dim), k_codes (N, head_dim): E2M1 codes, uint8, one a byte; q_scales (M, ceil(head_dim / 16)),
    k_scales (N, ...): UE4M3 bytes. packing: the register maps, by default the right ones. Returns float32 (M, N).
    """
    packing = packing or Packing.right()
    rows, cols = q_codes.shape[0], k_codes.shape[0]
    a = _tiles(q_codes, MMA_M, MMA_K)
    b = _tiles(k_codes, MMA_N, MMA_K)
    sfa = _tiles(q_scales, MMA_M, MMA_K // BLOCK)
    sfb = _tiles(k_scales, MMA_N, MMA_K // BLOCK)
    a_registers, b_registers = packing.a.pack(a), packing.b.pack(b)
    sfa_registers, sfb_registers = packing.sfa.pack(sfa)[..., 0], packing.sfb.pack(sfb)[..., 0]
    row_tiles, steps = a.shape[:2]
    col_tiles = b.shape[0]
    scores = np.empty((row_tiles, col_tiles, MMA_M, MMA_N), dtype=np.float32)
    band = max(1, _TILES_AT_ONCE // max(1, col_tiles))
    for start in range(0, row_tiles, band):
        part = slice(start, min(start + band, row_tiles))
        batch = (part.stop - part.start, col_tiles)
        acc_s = np.zeros((*batch, 32, packing.c.registers), dtype=np.float32)
        for step in range(steps):
            acc_s = mma_registers(
                MMA,
                np.broadcast_to(a_registers[part, None, step], (*batch, *a_registers.shape[2:])),
                np.broadcast_to(b_registers[None, :, step], (*batch, *b_registers.shape[2:])),
                acc_s,
                np.broadcast_to(sfa_registers[part, None, step], (*batch, 32)),
                np.broadcast_to(sfb_registers[None, :, step], (*batch, 32)),
            )
        bits = packing.c.unpack(acc_s.view(np.uint32))
        scores[part] = bits.astype(np.uint32).view(np.float32)
    whole = scores.transpose(0, 2, 1, 3).reshape(row_tiles * MMA_M, col_tiles * MMA_N)
    return np.ascontiguousarray(whole[:rows, :cols])


def qk_quantized(q, k, *, packing: Packing | None = None) -> np.ndarray:
    """`qk` of two `QuantizedTensor`s (..., tokens, head_dim), NVFP4, blocks along head_dim, linear scales.

    Leading axes must be equal. Global scales are not applied: the result is in units of q.global_scale *
    k.global_scale. Raises ValueError for another format, axis or scale layout, or when shapes do not fit.
    """
    for name, tensor in (("q", q), ("k", k)):
        for attribute, expected in (("format", "nvfp4"), ("axis", "head_dim"), ("scale_layout", "linear")):
            got = getattr(tensor, attribute)
            if got != expected:
                raise ValueError(f"{name}.{attribute} must be {expected!r}, got {got!r}; quantise or relayout it first")
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have equal leading axes and head_dim, got shapes {q.shape} and {k.shape}")
    from ptx_inline.isa.formats import unpack_nibbles

    q_codes, k_codes = unpack_nibbles(q.codes), unpack_nibbles(k.codes)
    scores = np.empty((*q.shape[:-1], k.shape[-2]), dtype=np.float32)
    for head in np.ndindex(*q.shape[:-2]):
        scores[head] = qk(q_codes[head], q.scales[head], k_codes[head], k.scales[head], packing=packing)
    return scores


def _tiles(matrix: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """(R, C) -> (ceil(R / rows), ceil(C / cols), rows, cols), zero-padded."""
    row_tiles, col_tiles = -(-matrix.shape[0] // rows), -(-matrix.shape[1] // cols)
    padded = np.zeros((row_tiles * rows, col_tiles * cols), dtype=matrix.dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.reshape(row_tiles, rows, col_tiles, cols).transpose(0, 2, 1, 3)
