"""Tiled S = Q K^T on NVFP4 codes and scales: the harness that proves layouts, scales and MMA before attention has them.

    S[m, n] = sum_k  value(q[m, k]) sfq[m, k / 16] * value(k[n, k]) sfk[n, k / 16]      (times both global scales)

CTA: 4 warps, 64 queries x 64 keys. Warp w: queries [16 w, 16 w + 16), eight 16x8 accumulators in registers.

=============  =======================================================================================================
Q, K codes     gmem -> smem by ``cp.async`` (16 bytes; rows and columns past the end are zero-filled), row pitch
               head_dim / 2 + 16 bytes so that ``ldmatrix`` has no bank conflict, then ``ldmatrix`` straight into the
               A and B fragments of m16n8k64: 16 bytes of a row are the 32 codes that one quad of lanes holds
scales         four bytes a row and k step of 64. sfa: lanes q = 0, 1 of a quad hold rows g, g + 8 of an even k step,
               lanes 2, 3 those of the odd one (thread_id_a = k step & 1). sfb: lane q of a quad holds column g of
               n tile 4 j + q (thread_id_b = n tile & 3). From gmem, or staged in smem: ``scales_in``
S              f32, row-major, stored where inside
=============  =======================================================================================================

smem: 2 * 64 * (head_dim_padded / 2 + 16) bytes (18 KiB at head_dim 256) + 2 KiB of scales. ``blockscale`` needs sm_120a,
``dequant`` sm_80; the source is the same, only the MMA of :mod:`nbfmha.kernels.mma` differs. head_dim 64, 96, 128, 256.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from nbfmha import gpu_arrays, scale_layouts
from nbfmha.kernels.mma import make_mma
from nbfmha.quantized_tensor import QuantizedTensor
from nbfmha.validation import check_choice, message
from ptx_inline.toolchain import Kernel

TILE_M = 64
TILE_N = 64
THREADS = 128
HEAD_DIMS = (64, 96, 128, 256)
SCALES_IN = ("shared", "global")


def make_qk(implementation: str, head_dim: int, scale_layout: str, scales_in: str, has_global: bool):
    """Kernel ``qk(q, sfq, gq, k, sfk, gk, s, seqlen_q, seqlen_k, qhead_per_kvhead, m_tiles, n_tiles)``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi = dev.ffi
    mma = make_mma(implementation)
    scale_offset = cuda.jit(device=True, forceinline=True)(scale_layouts.FORMULAS[scale_layout])
    k_steps = (head_dim + 63) // 64
    row_bytes = head_dim // 2
    chunks = 2 * k_steps  # of 16 bytes in a padded row
    pitch = 32 * k_steps + 16
    scale_cols = head_dim // 16
    _, padded_cols = scale_layouts.padded_shape(scale_layout, 1, scale_cols)
    words_aligned = padded_cols % 4 == 0
    row_multiple, _ = scale_layouts.padded_shape(scale_layout, 1, 1)
    staged = scales_in == "shared"
    smem_words = TILE_M * pitch // 4  # TILE_N is the same
    n_mmas = TILE_N // 8
    sfb_words = n_mmas // 4
    cp_async, commit, wait_all = dev.cp_async_cg_16, dev.cp_async_commit_group, dev.cp_async_wait_group_0
    ldmatrix_x4, to_shared, load_u32 = dev.ldmatrix_x4, dev.cvta_to_shared_u32, dev.ld_global_nc_u32

    @cuda.jit(device=True, forceinline=True)
    def copy_tile(smem, codes, first_row, rows, thread):
        """64 rows of codes to shared memory, zero where there are none."""
        for chunk in range(thread, TILE_M * chunks, THREADS):
            row, column = i32(chunk) // i32(chunks), i32(chunk) % i32(chunks)
            inside = row < rows and column < i32(row_bytes // 16)
            offset = (first_row + i64(row)) * i64(row_bytes) + i64(column) * i64(16) if inside else i64(0)
            cp_async(smem + u32(row * i32(pitch) + column * i32(16)), codes, offset, u32(16) if inside else u32(0))

    @cuda.jit(device=True, forceinline=True)
    def scale_word(scales, matrix_offset, row, rows, k_step):
        """The four scale bytes of a row in a k step; zero past the last row and the last column."""
        word = u32(0)
        if row < rows:
            if words_aligned:
                word = load_u32(scales, matrix_offset + i64(scale_offset(row, i32(4) * k_step, i32(padded_cols))))
            else:
                for i in range(4):
                    col = i32(4) * k_step + i32(i)
                    if col < i32(scale_cols):
                        byte = scales[matrix_offset + i64(scale_offset(row, col, i32(padded_cols)))]
                        word |= u32(byte) << u32(8 * i)
        return word

    @unrolled
    def qk(q, sfq, gq, k, sfk, gk, s, seqlen_q, seqlen_k, qhead_per_kvhead, m_tiles, n_tiles):
        smem_q = cuda.shared.array(smem_words, u32)
        smem_k = cuda.shared.array(smem_words, u32)
        smem_sfq = cuda.shared.array((TILE_M, k_steps), u32)
        smem_sfk = cuda.shared.array((TILE_N, k_steps), u32)
        thread = i32(cuda.threadIdx.x)
        lane, warp = thread & i32(31), thread >> i32(5)
        group_id, thread_in_group = lane >> i32(2), lane & i32(3)
        tile = i32(cuda.blockIdx.x)
        n_tile, m_tile = tile % n_tiles, (tile // n_tiles) % m_tiles
        head = tile // (n_tiles * m_tiles)
        first_m, first_n = m_tile * i32(TILE_M), n_tile * i32(TILE_N)
        matrix_q, matrix_k = i64(head), i64(head // qhead_per_kvhead)
        address_q, address_k = to_shared(ffi.from_buffer(smem_q)), to_shared(ffi.from_buffer(smem_k))

        copy_tile(address_q, q, matrix_q * i64(seqlen_q) + i64(first_m), seqlen_q - first_m, thread)
        copy_tile(address_k, k, matrix_k * i64(seqlen_k) + i64(first_n), seqlen_k - first_n, thread)
        commit()
        padded_q = (seqlen_q + i32(row_multiple - 1)) // i32(row_multiple) * i32(row_multiple)
        padded_k = (seqlen_k + i32(row_multiple - 1)) // i32(row_multiple) * i32(row_multiple)
        sfq_matrix = matrix_q * i64(padded_q) * i64(padded_cols)
        sfk_matrix = matrix_k * i64(padded_k) * i64(padded_cols)
        if staged:
            for index in range(thread, TILE_M * k_steps, THREADS):
                row, k_step = i32(index) // i32(k_steps), i32(index) % i32(k_steps)
                smem_sfq[row, k_step] = scale_word(sfq, sfq_matrix, first_m + row, seqlen_q, k_step)
                smem_sfk[row, k_step] = scale_word(sfk, sfk_matrix, first_n + row, seqlen_k, k_step)
        wait_all()
        cuda.syncthreads()

        acc = cuda.local.array((n_mmas, 4), f32)
        for t in unroll(n_mmas):
            for r in unroll(4):
                acc[t, r] = f32(0)
        a = cuda.local.array(4, u32)
        b = cuda.local.array(4, u32)
        sfa = u32(0)
        sfb = cuda.local.array(sfb_words, u32)
        row_of_lane = warp * i32(16) + group_id + i32(8) * (thread_in_group & i32(1))
        for k_step in unroll(k_steps):
            # matrices 0..3 of the ldmatrix are the A registers: rows 0-7 and 8-15 of k 0..31, then of k 32..63
            a_row, a_half = warp * i32(16) + (lane & i32(15)), lane >> i32(4)
            ldmatrix_x4(ffi.from_buffer(a), address_q + u32(a_row * i32(pitch) + i32(32 * k_step) + a_half * i32(16)))
            if k_step % 2 == 0:
                step_of_lane = i32(k_step) + (thread_in_group >> i32(1))
                if step_of_lane < i32(k_steps):
                    if staged:
                        sfa = smem_sfq[row_of_lane, step_of_lane]
                    else:
                        sfa = scale_word(sfq, sfq_matrix, first_m + row_of_lane, seqlen_q, step_of_lane)
            for j in unroll(n_mmas // 4):
                row = i32(32 * j) + thread_in_group * i32(8) + group_id
                if staged:
                    sfb[j] = smem_sfk[row, k_step]
                else:
                    sfb[j] = scale_word(sfk, sfk_matrix, first_n + row, seqlen_k, i32(k_step))
            for pair in unroll(n_mmas // 2):
                # two n tiles at once: keys 0-7 of k 0..31 and k 32..63, then keys 8-15
                b_row, b_half = (
                    i32(16 * pair) + (lane & i32(7)) + ((lane >> i32(4)) << i32(3)),
                    (lane >> i32(3)) & i32(1),
                )
                ldmatrix_x4(
                    ffi.from_buffer(b), address_k + u32(b_row * i32(pitch) + i32(32 * k_step) + b_half * i32(16))
                )
                for side in unroll(2):
                    t = 2 * pair + side
                    mma(acc[t], a, b[2 * side :], sfa, sfb[t // 4], k_step % 2, t % 4)

        g = gq[0] * gk[0] if has_global else f32(1)
        for t in unroll(n_mmas):
            for r in unroll(4):
                m = i32(first_m + warp * i32(16) + group_id + i32(8 * (r >> 1)))
                n = i32(first_n + i32(8 * t) + i32(2) * thread_in_group + i32(r & 1))
                if m < seqlen_q and n < seqlen_k:
                    s[(matrix_q * i64(seqlen_q) + i64(m)) * i64(seqlen_k) + i64(n)] = (
                        acc[t, r] * g if has_global else acc[t, r]
                    )

    return qk


@functools.cache
def qk_kernel(
    implementation: str,
    head_dim: int,
    scale_layout: str = "linear",
    scales_in: str = "shared",
    has_global: bool = False,
) -> Kernel:
    """The Q K^T kernel for these constants. Raises ``ValueError`` for a head_dim or a name that it has not."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(message("head_dim", f"one of {', '.join(map(str, HEAD_DIMS))}", head_dim, "pad the last axis"))
    check_choice("scales_in", scales_in, SCALES_IN)
    constants = {
        "implementation": implementation,
        "head_dim": head_dim,
        "scale_layout": scale_layout,
        "scales_in": scales_in,
        "has_global": has_global,
    }
    signature = ("u8*", "u8*", "f32*", "u8*", "u8*", "f32*", "f32*", "i32", "i32", "i32", "i32", "i32")
    return Kernel(make_qk, signature, constants, launch_bounds=(THREADS,))


def qk(q: QuantizedTensor, k: QuantizedTensor, *, implementation: str, scales_in: str = "shared") -> Any:
    """Scores S = Q K^T of two NVFP4 tensors, on the GPU or an emulated machine.

    Args:
        q: (..., num_heads_q, seqlen_q, head_dim), blocks along head_dim, any scale layout. head_dim 64, 96, 128 or 256.
        k: (..., num_heads_kv, seqlen_k, head_dim), likewise, in the same scale layout; num_heads_q is a multiple of
            num_heads_kv and the other leading axes are equal. The head axis may be missing in both.
        implementation: ``"blockscale"`` (sm_120a) or ``"dequant"``; scales_in: ``"shared"`` or ``"global"`` memory.

    Returns float32 (..., num_heads_q, seqlen_q, seqlen_k) in the library of q's arrays (NumPy arrays are copied to the
    GPU and back). Global scales, where there are any, are applied (both tensors or neither must have one).

    Raises ``TypeError`` / ``ValueError`` naming what does not fit, before any launch.
    """
    _check(q, k)
    kernel = qk_kernel(implementation, q.shape[-1], q.scale_layout, scales_in, q.global_scale is not None)
    if isinstance(q.codes, np.ndarray):
        from numba import cuda

        q, k = (tensor.with_arrays(lambda array: cuda.to_device(np.atleast_1d(array))) for tensor in (q, k))
        return _launch(kernel, q, k).copy_to_host()
    return _launch(kernel, q, k)


def _check(q: QuantizedTensor, k: QuantizedTensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if not isinstance(tensor, QuantizedTensor):
            raise TypeError(message(name, "a QuantizedTensor", type(tensor).__name__, "make one with nbfmha.quantize"))
        check_choice(f"{name}.format", tensor.format, ("nvfp4",))
        check_choice(f"{name}.axis", tensor.axis, ("head_dim",))
    if k.scale_layout != q.scale_layout:
        raise ValueError(message("k.scale_layout", repr(q.scale_layout), repr(k.scale_layout), "use nbfmha.relayout"))
    if (k.global_scale is None) != (q.global_scale is None):
        raise ValueError(message("global_scale", "given for q and k or for neither", "one of them"))
    heads_q, heads_kv = math.prod(q.shape[-3:-2]), math.prod(k.shape[-3:-2])
    fits = q.shape[-1] == k.shape[-1] and q.shape[:-3] == k.shape[:-3] and len(q.shape) == len(k.shape)
    if not fits or (heads_kv == 0 and heads_q > 0) or (heads_kv and heads_q % heads_kv):
        expected = f"(..., a divisor of {heads_q} heads, seqlen_k, {q.shape[-1]}) to go with q of shape {q.shape}"
        raise ValueError(message("k.shape", expected, k.shape))


def _launch(kernel: Kernel, q: QuantizedTensor, k: QuantizedTensor) -> Any:
    for name, tensor in (("q", q), ("k", k)):
        gpu_arrays.check_contiguous(f"{name}.codes", tensor.codes)
        gpu_arrays.check_contiguous(f"{name}.scales", tensor.scales)
        if not gpu_arrays.is_aligned(tensor.codes, 16) or not gpu_arrays.is_aligned(tensor.scales, 4):
            raise ValueError(
                message(f"{name}", "aligned: codes to 16 bytes, scales to 4", "other addresses", "copy it")
            )
    seqlen_q, seqlen_k = q.shape[-2], k.shape[-2]
    scores = gpu_arrays.empty(q.codes, (*q.shape[:-1], seqlen_k), "float32")
    heads_q, heads_kv = math.prod(q.shape[:-2]), math.prod(k.shape[:-2])
    if not math.prod(scores.shape):
        return scores
    m_tiles, n_tiles = -(-seqlen_q // TILE_M), -(-seqlen_k // TILE_N)
    if heads_q * m_tiles * n_tiles > 2**31 - 1:
        raise ValueError(message("q and k", "small enough for 2^31 - 1 tiles", heads_q * m_tiles * n_tiles))
    gq, gk = (0, 0) if q.global_scale is None else (q.global_scale, k.global_scale)
    shape = (seqlen_q, seqlen_k, heads_q // heads_kv, m_tiles, n_tiles)
    arguments = (q.codes, q.scales, gq, k.codes, k.scales, gk, scores, *shape)
    gpu_arrays.launch(kernel, (heads_q * m_tiles * n_tiles,), (THREADS,), arguments)
    return scores
