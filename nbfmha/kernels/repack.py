"""Codes and scales of ``QuantizedTensor``s moved to where the forward kernel reads them; no value changes.

==========  ==============================================================================================================
``rows``    CTA = 64 stored rows, a thread for a block of 16 channels of two of them. Of K: one tile of a kv head, rows in
            ``operands.stored_order``, those past the sequence's end zero. Of Q: rows as they are. Channels are padded with
            zeros to ``code_dim``
``values``  a thread for a block of 16 tokens of a channel of V, which lies transposed; each sequence ends on a whole tile
==========  ==============================================================================================================

A block is 8 bytes of codes and one of scales; neighbouring threads have neighbouring blocks. Needs sm_80. What already lies
as it must is not moved: Q where head_dim is code_dim, V where every sequence of keys is whole tiles.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from nbfmha import gpu_arrays
from nbfmha.kernels.operands import Operands, stored_order
from nbfmha.kernels.prefill import rows_of_cta
from nbfmha.kernels.prepass_load import ROWS_A_PASS, code_cols, threads_of
from nbfmha.kernels.prepass_tables import Tables, tables_of
from nbfmha.problem import Problem
from nbfmha.quantized_tensor import QuantizedTensor
from nbfmha.recipe import TILE_N
from nbfmha.tiles import padded_tokens
from ptx_inline.toolchain import Kernel

BLOCK = 16
THREADS = 256


def make_rows(head_dim: int, tiled: bool):
    """Kernel ``rows(codes, scales, from_codes, from_scales, key_tiles, rows, tiles)``.

    tiled: K, of ``tiles`` tiles a head and ``rows`` tokens a head; else Q, of ``rows`` rows in all.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, u8, i32, i64 = types.uint32, types.uint8, types.int32, types.int64
    ffi, load_v2, store_v2 = dev.ffi, dev.ld_global_nc_v2_u32, dev.st_global_v2_u32
    cols, source_cols = code_cols(head_dim), head_dim // BLOCK
    order = stored_order().astype("int32")

    @unrolled
    def rows_kernel(codes, scales, from_codes, from_scales, key_tiles, rows, tiles):
        token_of = cuda.const.array_like(order)
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        col, inside = thread % u32(cols), i32(thread // u32(cols))
        first, count = i64(cta) * i64(TILE_N), i64(rows) - i64(cta) * i64(TILE_N)
        if tiled:
            tile = cta % tiles
            first = i64(cta // tiles) * i64(rows) + i64(key_tiles[4 * tile])
            count = i64(key_tiles[4 * tile + 1])
        words = cuda.local.array(2, u32)
        for step in unroll(TILE_N // ROWS_A_PASS):
            row = i32(inside + i32(step * ROWS_A_PASS))
            token = i64(token_of[row]) if tiled else i64(row)
            words[0] = u32(0)
            words[1] = u32(0)
            byte = u8(0)
            if token < count and col < u32(source_cols):
                source = (first + token) * i64(source_cols) + i64(col)
                load_v2(ffi.from_buffer(words), from_codes, source * i64(2))
                byte = from_scales[source]
            if tiled or token < count:
                at = (i64(cta) * i64(TILE_N) + i64(row)) * i64(cols) + i64(col)
                store_v2(codes, at * i64(2), words[0], words[1])
                scales[at] = byte

    return rows_kernel


def make_values():
    """Kernel ``values(codes, scales, from_codes, from_scales, key_tiles, blocks, tiles, source_cols)``: ``blocks`` in all,
    four to a tile of each channel, from rows of ``source_cols``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, u8, i32, i64 = types.uint32, types.uint8, types.int32, types.int64
    ffi, load_v2, store_v2 = dev.ffi, dev.ld_global_nc_v2_u32, dev.st_global_v2_u32
    blocks_a_tile = TILE_N // BLOCK

    def values(codes, scales, from_codes, from_scales, key_tiles, blocks, tiles, source_cols):
        at = i64(cuda.blockIdx.x) * i64(THREADS) + i64(cuda.threadIdx.x)
        if at >= blocks:
            return
        cols = i64(tiles) * i64(blocks_a_tile)
        row, col = at // cols, i32(at % cols)
        tile, part = col // i32(blocks_a_tile), col % i32(blocks_a_tile)
        words = cuda.local.array(2, u32)
        words[0] = u32(0)
        words[1] = u32(0)
        byte = u8(0)
        if part * i32(BLOCK) < key_tiles[4 * tile + 1]:
            source = row * i64(source_cols) + i64(key_tiles[4 * tile] // i32(BLOCK) + part)
            load_v2(ffi.from_buffer(words), from_codes, source * i64(2))
            byte = from_scales[source]
        store_v2(codes, at * i64(2), words[0], words[1])
        scales[at] = byte

    return values


@functools.cache
def rows_kernel(head_dim: int, tiled: bool) -> Kernel:
    """The ``rows`` kernel for these constants."""
    signature = ("u32*", "u8*", "u32*", "u8*", "i32*", "i64", "i32")
    constants = {"head_dim": head_dim, "tiled": tiled}
    return Kernel(make_rows, signature, constants, launch_bounds=(threads_of(head_dim),))


@functools.cache
def values_kernel() -> Kernel:
    """The ``values`` kernel."""
    signature = ("u32*", "u8*", "u32*", "u8*", "i32*", "i64", "i32", "i32")
    return Kernel(make_values, signature, {}, launch_bounds=(THREADS,))


def why_not(problem: Problem) -> str | None:
    """Why V's blocks of ``problem`` cannot be dealt out to its sequences, in words; None where they can."""
    starts = [keys.start for _, keys, _ in problem.sequences() if keys.start < keys.stop and keys.start % BLOCK]
    if not starts:
        return None
    return f"V's blocks of {BLOCK} tokens must not reach over two sequences, but cu_seqlens_k has one begin at {starts[0]}"


def repack(q: QuantizedTensor, k: QuantizedTensor, v: QuantizedTensor, problem: Problem, sinks: Any = None) -> Operands:
    """The operands of one call, queued where q lies on the current stream there; they may share memory with q and v.

    Args:
        q, k, v: NVFP4, scales linear, without global scale, on one GPU or emulated machine; (..., heads, tokens, head_dim)
            as ``problem`` says, contiguous, codes 8-byte aligned; q and k blocked along head_dim, v along tokens.
        problem: one for which ``why_not`` gives None; its head_dim is one of ``operands.HEAD_DIMS``.
        sinks: float32 (num_heads_q,) there, or None; handed on.

    Raises ``RuntimeError`` for lengths that are new while a CUDA graph is captured.
    """
    # no grid here is too large: its operands would not fit any memory
    tables = tables_of(problem, None, rows_of_cta("blockscale", problem.head_dim), q.codes)
    made = _rows_of_q(q, problem) | _tiles_of_k(k, problem, tables) | _tiles_of_v(v, problem, tables)
    rest = dict.fromkeys(("q_values", "k_values", "v_values", "q16", "k16", "v16", "delta", "shift"))
    return Operands(**made, **rest, sinks=sinks, blocks=tables.query_blocks)


def _rows_of_q(q: QuantizedTensor, problem: Problem) -> dict[str, Any]:
    head_dim, rows = problem.head_dim, problem.batch * problem.num_heads_q * problem.seqlen_q
    cols = code_cols(head_dim)
    if cols * BLOCK == head_dim and gpu_arrays.is_aligned(q.scales, 4):
        return {"q": q.codes, "sfq": q.scales}
    shape = (problem.batch * problem.num_heads_q, problem.seqlen_q)
    codes, scales = _new(q, (*shape, cols))
    if rows:
        arguments = (codes, scales, q.codes, q.scales, 0, rows, 1)
        gpu_arrays.launch(rows_kernel(head_dim, False), (-(-rows // TILE_N),), (threads_of(head_dim),), arguments)
    return {"q": codes, "sfq": scales}


def _tiles_of_k(k: QuantizedTensor, problem: Problem, tables: Tables) -> dict[str, Any]:
    head_dim, heads, tiles = problem.head_dim, problem.batch * problem.num_heads_kv, tables.key_tiles.shape[0]
    codes, scales = _new(k, (heads, tiles * TILE_N, code_cols(head_dim)))
    if heads * tiles:
        arguments = (codes, scales, k.codes, k.scales, tables.key_tiles, problem.seqlen_k, tiles)
        gpu_arrays.launch(rows_kernel(head_dim, True), (heads * tiles,), (threads_of(head_dim),), arguments)
    return {"k": codes, "sfk": scales}


def _tiles_of_v(v: QuantizedTensor, problem: Problem, tables: Tables) -> dict[str, Any]:
    aligned = gpu_arrays.is_aligned(v.codes, 16) and gpu_arrays.is_aligned(v.scales, 4)
    if aligned and padded_tokens(problem) == problem.seqlen_k:
        return {"vt": v.codes, "sfv": v.scales}
    tiles = tables.key_tiles.shape[0]
    shape = (problem.batch * problem.num_heads_kv, problem.head_dim, tiles * TILE_N // BLOCK)
    codes, scales = _new(v, shape)
    blocks = math.prod(shape)
    if blocks:
        arguments = (codes, scales, v.codes, v.scales, tables.key_tiles, blocks, tiles, v.cols)
        gpu_arrays.launch(values_kernel(), (-(-blocks // THREADS),), (THREADS,), arguments)
    return {"vt": codes, "sfv": scales}


def _new(like: QuantizedTensor, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """(codes, scales) of ``shape`` blocks, not written yet."""
    codes = gpu_arrays.empty(like.codes, (*shape[:-1], shape[-1] * BLOCK // 2), "uint8")
    return codes, gpu_arrays.empty(like.codes, shape, "uint8")
