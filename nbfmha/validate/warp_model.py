"""Tiled Q·K^T as warps compute it, in NumPy: the mirror of ``nbfmha.kernels.qk``.

One warp owns a tile of MMA_M = 16 queries and walks the keys in tiles of MMA_N = 8 and head_dim in steps of MMA_K = 64:

    for each k step:  a   <- Q tile   (16, 64) packed into 4 registers a lane (fragment A)
                      sfa <- Q scales (16,  4); lanes 0, 1 of a quad hold those of an even step, 2, 3 of the odd one,
                             so one register serves two steps: thread_id_a = step & 1
      for each tile of 8 keys:
                      b   <- K tile   ( 8, 64) packed into 2 registers a lane (fragment B)
                      sfb <- K scales ( 8,  4); lane q of a quad holds those of tile 4 j + q, so one register serves
                             four tiles: thread_id_b = tile & 3
                      acc_S = mma(a, b, acc_S, sfa, sfb)
    scores <- acc_S unpacked (fragment C)

Codes go into registers and results come out of them only through ``ptx_inline.isa.fragments``, so a wrong layout shows
as a wrong score. Lengths need not be multiples of a tile: missing rows and the rest of head_dim are zero codes with zero
scales, which add exact zeroes. The arithmetic is ``ptx_inline.isa.arithmetic.mma_registers``; it runs on any CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nbfmha import scale_layouts
from nbfmha.validation import check_choice, message
from ptx_inline.isa.arithmetic import mma_registers
from ptx_inline.isa.formats import unpack_nibbles
from ptx_inline.isa.fragments import Fragment, fragment, wrong_row_major_fragment

MMA = "m16n8k64.mxf4nvf4.4x"
MMA_M, MMA_N, MMA_K = 16, 8, 64
BLOCKS = 4  # scales of a row in one step


@dataclass(frozen=True)
class Packing:
    """The maps by which a warp packs its operands: ``right`` is what the hardware expects."""

    a: Fragment
    b: Fragment
    c: Fragment
    sfa: Fragment
    sfb: Fragment

    @classmethod
    def right(cls, thread_id_a: int = 0, thread_id_b: int = 0) -> Packing:
        """The hardware's maps, for these scale selectors."""
        return cls(
            *(fragment(MMA, operand) for operand in ("A", "B", "C")),
            fragment(MMA, "SFA", thread_id=thread_id_a),
            fragment(MMA, "SFB", thread_id=thread_id_b),
        )

    @classmethod
    def row_major(cls) -> Packing:
        """The counter-example: A and B packed by the row-major reading of the CuTe offsets, the rest right."""
        return replace(cls.right(), a=wrong_row_major_fragment(MMA, "A"), b=wrong_row_major_fragment(MMA, "B"))


def qk(q_codes, q_scales, k_codes, k_scales) -> np.ndarray:
    """Scores of one head.

    q_codes (M, head_dim), k_codes (N, head_dim): E2M1 codes, uint8, one a byte; q_scales (M, ceil(head_dim / 16)),
    k_scales (N, ...): UE4M3 bytes. Returns float32 (M, N).
    """
    rows, cols = q_codes.shape[0], k_codes.shape[0]
    a = fragment(MMA, "A").pack(_tiles(q_codes, MMA_M, MMA_K))
    b = fragment(MMA, "B").pack(_tiles(k_codes, MMA_N, MMA_K))
    sfa = _shared_registers(_tiles(q_scales, MMA_M, BLOCKS), "SFA", axis=1, ways=2)
    sfb = _shared_registers(_tiles(k_scales, MMA_N, BLOCKS), "SFB", axis=0, ways=4)
    accumulator = fragment(MMA, "C")
    row_tiles, steps = a.shape[:2]
    col_tiles = b.shape[0]
    scores = np.empty((row_tiles, col_tiles, MMA_M, MMA_N), np.float32)
    for thread_id_b in range(min(4, col_tiles)):
        b_part = b[thread_id_b::4]
        acc_s = np.zeros((row_tiles, b_part.shape[0], 32, accumulator.registers), np.float32)
        for step in range(steps):
            acc_s = mma_registers(
                MMA,
                a[:, None, step],
                b_part[None, :, step],
                acc_s,
                sfa[:, None, step // 2],
                sfb[None, : b_part.shape[0], step],
                thread_id_a=step & 1,
                thread_id_b=thread_id_b,
            )
        scores[:, thread_id_b::4] = accumulator.unpack(acc_s.view(np.uint32)).view(np.float32)
    whole = scores.transpose(0, 2, 1, 3).reshape(row_tiles * MMA_M, col_tiles * MMA_N)
    return np.ascontiguousarray(whole[:rows, :cols])


def qk_quantized(q, k) -> np.ndarray:
    """``qk`` of two ``QuantizedTensor``s (..., heads, tokens, head_dim) in NVFP4, blocks along head_dim, any scale layout.

    The head axis may be missing in both; where it is not, query head h reads key head h / (heads of q / heads of k).
    Global scales are applied to the scores, as the kernel does. Returns float32 (..., heads of q, tokens q, tokens k).
    Raises ValueError for another format or axis, or when shapes do not fit.
    """
    for name, tensor in (("q", q), ("k", k)):
        check_choice(f"{name}.format", tensor.format, ("nvfp4",))
        check_choice(f"{name}.axis", tensor.axis, ("head_dim",))
    heads_q, heads_kv = (tensor.shape[-3] if len(tensor.shape) > 2 else 1 for tensor in (q, k))
    fits = len(q.shape) == len(k.shape) and q.shape[:-3] == k.shape[:-3] and q.shape[-1] == k.shape[-1]
    if not fits or heads_kv == 0 or heads_q % heads_kv:
        expected = f"(..., a divisor of {heads_q} heads, tokens, {q.shape[-1]}) to go with q of shape {q.shape}"
        raise ValueError(message("k.shape", expected, k.shape))
    if (k.global_scale is None) != (q.global_scale is None):
        raise ValueError(message("global_scale", "given for q and k or for neither", "one of them"))
    q_codes, k_codes = unpack_nibbles(q.codes), unpack_nibbles(k.codes)
    q_scales, k_scales = (scale_layouts.undo(x.scale_layout, x.scales, x.rows, x.cols) for x in (q, k))
    scores = np.empty((*q.shape[:-1], k.shape[-2]), np.float32)
    for index in np.ndindex(*q.shape[:-2]):
        key = (*index[:-1], index[-1] // (heads_q // heads_kv)) if index else ()
        scores[index] = qk(q_codes[index], q_scales[index], k_codes[key], k_scales[key])
    if q.global_scale is not None:
        scores *= np.float32(q.global_scale) * np.float32(k.global_scale)
    return scores


def _tiles(matrix: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """(R, C) -> (ceil(R / rows), ceil(C / cols), rows, cols), zero-padded."""
    row_tiles, col_tiles = -(-matrix.shape[0] // rows), -(-matrix.shape[1] // cols)
    padded = np.zeros((row_tiles * rows, col_tiles * cols), matrix.dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.reshape(row_tiles, rows, col_tiles, cols).transpose(0, 2, 1, 3)


def _shared_registers(scales: np.ndarray, operand: str, *, axis: int, ways: int) -> np.ndarray:
    """Scale registers (..., 32) of tiles (..., rows, 4): each ``ways`` neighbours along ``axis`` share one register, every
    one in the lanes that its thread_id names. Lanes without a tile hold zero."""
    length = scales.shape[axis]
    registers = 0
    for thread_id in range(min(ways, length)):
        part = scales[(slice(None),) * axis + (slice(thread_id, None, ways),)]
        packed = fragment(MMA, operand, thread_id=thread_id).pack(part)[..., 0]
        missing = -(-length // ways) - part.shape[axis]
        packed = np.pad(packed, [(0, missing if dimension == axis else 0) for dimension in range(packed.ndim)])
        registers = registers | packed
    return registers
