"""Forward attention on NVFP4 operands, P in f16: the tiles, the online softmax and both matrix products of one CTA.

    S = (Q K^T [+ delta]) softmax_scale,  O = softmax(S) V,  LSE = log sum exp(S) [+ shift]

CTA: 4 warps, TILE_M = 64 queries of one head; warp w has queries [16 w, 16 w + 16) and all TILE_N = 64 keys of a tile.

==============  ====================================================================================================
Q codes, sfq    gmem -> registers once, as A fragments of m16n8k64
K codes, sfk    gmem -> smem by ``cp.async``, two stages, ``ldmatrix`` into B fragments (row pitch + 16 bytes: no bank
                conflict). Rows are stored permuted within each 32 tokens: stored row ``8 t + 2 q + e`` is token
                ``8 q + 2 t + e`` (:func:`stored_order`), so that lane q of a quad gets, over four n tiles, the scores
                of tokens 8 q .. 8 q + 7: the eight that its fragments of P and V hold. No shuffle feeds P.
V codes, sfv    transposed, (head_dim, tokens), 16-blocks along tokens; smem row pitch 48 bytes, read as words of eight
                tokens, dequantised exactly to f16 in registers
P               exp2 in f32, rounded to f16, A fragments of four ``mma.m16n8k16`` a tile (k slots in the order above)
acc_S, acc_O    f32; acc_S starts from ``delta``, the Q-smoothing correction of the query block, where there is one
==============  ====================================================================================================

smem: two stages of 64 (32 k_steps + 16) + 48 head_dim + 256 k_steps + 4 head_dim bytes: 23 KiB at head_dim 128.
``blockscale`` needs sm_120a, ``dequant`` sm_80; the source is the same, only the MMA of :mod:`nbfmha.kernels.mma` differs.
Not here: P in NVFP4, 16-bit windows, packed sequences.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbfmha import gpu_arrays
from nbfmha.kernels.mma import make_mma
from nbfmha.problem import Problem
from nbfmha.validation import check_choice, message
from ptx_inline.toolchain import Kernel

TILE_M = 64
TILE_N = 64
THREADS = 128
HEAD_DIMS = (64, 128)
OUT_DTYPES = ("float16", "bfloat16", "float32")
NO_LIMIT = 1 << 30  # of a window's side
_V_PITCH = TILE_N // 2 + 16


@dataclass(frozen=True)
class Operands:
    """What the kernel reads: arrays that kernels can reach, C-contiguous, codes 16-byte aligned, scales linear.

    heads_q, heads_kv count the heads of all batches. ``padded_k`` is seqlen_k rounded up to whole tiles of 64; what lies
    past the last key must be zero.

    q, sfq       uint8 (heads_q, seqlen_q, head_dim / 2) and (heads_q, seqlen_q, head_dim / 16)
    k, sfk       uint8 (heads_kv, padded_k, head_dim / 2) and (..., head_dim / 16), tokens in ``stored_order`` within a tile
    vt, sfv      uint8 (heads_kv, head_dim, padded_k / 2) and (heads_kv, head_dim, padded_k / 16): V transposed
    delta        float32 (heads_q, ceil(seqlen_q / 64), padded_k), added to the scores of each block of 64 queries, or None
    shift        float32 (heads_q, seqlen_q), added to every score of a row: to the LSE, or before a softcap; or None
    sinks        float32 (heads_q,), a logit that joins the denominator, or None
    """

    q: Any
    sfq: Any
    k: Any
    sfk: Any
    vt: Any
    sfv: Any
    delta: Any = None
    shift: Any = None
    sinks: Any = None


def stored_order() -> np.ndarray:
    """int (64,): the token of a tile that each of K's stored rows holds."""
    row = np.arange(TILE_N)
    inside = row % 32
    return row - inside + inside % 8 // 2 * 8 + inside // 8 * 2 + inside % 2


def make_prefill(implementation: str, head_dim: int, out_dtype: str, softcap: bool):
    """Kernel ``prefill(q, sfq, k, sfk, vt, sfv, delta, shift, sinks, out, lse, has_delta, has_shift, has_sinks, seqlen_q,
    seqlen_k, padded_k, q_offset, window_left, window_right, qhead_per_kvhead, m_tiles, softmax_scale, softcap)``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi = dev.ffi
    qk_mma = make_mma(implementation)
    pv_mma, ldmatrix_x4, to_shared = dev.mma_m16n8k16_f16, dev.ldmatrix_x4, dev.cvta_to_shared_u32
    cp_async_16, cp_async_4, commit = dev.cp_async_cg_16, dev.cp_async_ca_4, dev.cp_async_commit_group
    wait_all, load_u32, load_shared = dev.cp_async_wait_group_0, dev.ld_global_nc_u32, dev.ld_shared_u32
    f16x2_e2m1x2, f16x2_e4m3x2, mul_f16x2 = dev.cvt_rn_f16x2_e2m1x2, dev.cvt_rn_f16x2_e4m3x2, dev.mul_rn_f16x2
    ex2, lg2, bfly, pack_f16 = dev.ex2_approx_ftz_f32, dev.lg2_approx_f32, dev.shfl_sync_bfly_f32, dev.cvt_rn_f16x2_f32
    max_f32, fma, to_bf16, to_f16 = dev.max_f32, dev.fma_rn_f32, dev.cvt_rn_bf16_f32, dev.cvt_rn_f16_f32

    k_steps = head_dim // 64
    k_pitch = 32 * k_steps + 16
    k_bytes, v_bytes = TILE_N * k_pitch, head_dim * _V_PITCH
    sfk_bytes, sfv_bytes = TILE_N * 4 * k_steps, head_dim * 4
    stage_bytes = k_bytes + v_bytes + sfk_bytes + sfv_bytes
    smem_words, scale_words = 2 * stage_bytes // 4, (k_steps + 1) // 2
    n_mmas, o_tiles = TILE_N // 8, head_dim // 8
    log2e = 1.4426950408889634

    @cuda.jit(device=True, forceinline=True)
    def load_tile(smem, k, sfk, vt, sfv, kv_head, tile, padded_k, thread):
        """Codes and scales of one tile of keys to a stage of shared memory; asynchronous."""
        first = i64(kv_head) * i64(padded_k) + i64(tile) * i64(TILE_N)
        for chunk in range(thread, TILE_N * 2 * k_steps, THREADS):
            row, column = i32(chunk) // i32(2 * k_steps), i32(chunk) % i32(2 * k_steps)
            offset = (first + i64(row)) * i64(32 * k_steps) + i64(column) * i64(16)
            cp_async_16(smem + u32(row * i32(k_pitch) + column * i32(16)), k, offset, u32(16))
        smem += u32(k_bytes)
        v_row = i64(kv_head) * i64(head_dim)
        for chunk in range(thread, head_dim * 2, THREADS):
            row, column = i32(chunk) >> i32(1), i32(chunk) & i32(1)
            offset = (v_row + i64(row)) * i64(padded_k // i32(2)) + i64(tile) * i64(32) + i64(column) * i64(16)
            cp_async_16(smem + u32(row * i32(_V_PITCH) + column * i32(16)), vt, offset, u32(16))
        smem += u32(v_bytes)
        for word in range(thread, TILE_N * k_steps, THREADS):
            cp_async_4(smem + u32(4 * word), sfk, first * i64(4 * k_steps) + i64(4 * word), u32(4))
        smem += u32(sfk_bytes)
        for row in range(thread, head_dim, THREADS):
            offset = (v_row + i64(row)) * i64(padded_k // i32(16)) + i64(tile) * i64(4)
            cp_async_4(smem + u32(4 * row), sfv, offset, u32(4))

    @cuda.jit(device=True, forceinline=True)
    def quad_max(x):
        x = max_f32(x, bfly(x, u32(1)))
        return max_f32(x, bfly(x, u32(2)))

    @cuda.jit(device=True, forceinline=True)
    def quad_sum(x):
        x = x + bfly(x, u32(1))
        return x + bfly(x, u32(2))

    @unrolled
    def prefill(
        q, sfq, k, sfk, vt, sfv, delta, shift, sinks, out, lse, has_delta, has_shift, has_sinks, seqlen_q, seqlen_k,
        padded_k, q_offset, window_left, window_right, qhead_per_kvhead, m_tiles, softmax_scale, cap,
    ):  # fmt: skip
        stages = cuda.shared.array(smem_words, u32)
        smem = to_shared(ffi.from_buffer(stages))
        thread = i32(cuda.threadIdx.x)
        lane, warp = thread & i32(31), thread >> i32(5)
        group_id, thread_in_group = lane >> i32(2), lane & i32(3)
        tile_id = i32(cuda.blockIdx.x)
        m_tile, head = tile_id % m_tiles, tile_id // m_tiles
        kv_head = head // qhead_per_kvhead
        first_m = m_tile * i32(TILE_M)
        last_m = min(first_m + i32(TILE_M), seqlen_q) - i32(1)
        begin = max(first_m + q_offset - window_left, i32(0)) // i32(TILE_N)
        end = (min(last_m + q_offset + window_right + i32(1), seqlen_k) + i32(TILE_N - 1)) // i32(TILE_N)
        row_low = first_m + warp * i32(16) + group_id
        q_row = i64(head) * i64(seqlen_q)

        a = cuda.local.array((k_steps, 4), u32)
        for k_step in unroll(k_steps):
            for r in unroll(4):
                row = i32(row_low + i32(8 * (r & 1)))
                a[k_step, r] = u32(0)
                if row < seqlen_q:
                    word = i64(thread_in_group) * i64(4) + i64(32 * k_step + 16 * (r >> 1))
                    a[k_step, r] = load_u32(q, (q_row + i64(row)) * i64(32 * k_steps) + word)
        # lanes 0, 1 of a quad supply the scales of rows g, g + 8 of an even k step, lanes 2, 3 those of the odd one
        sfa = cuda.local.array(scale_words, u32)
        scale_row = row_low + i32(8) * (thread_in_group & i32(1))
        for pair in unroll(scale_words):
            step = i32(2 * pair) + (thread_in_group >> i32(1))
            sfa[pair] = u32(0)
            if scale_row < seqlen_q and step < i32(k_steps):
                sfa[pair] = load_u32(sfq, (q_row + i64(scale_row)) * i64(4 * k_steps) + i64(step) * i64(4))

        acc_o = cuda.local.array((o_tiles, 4), f32)
        for t in unroll(o_tiles):
            for r in unroll(4):
                acc_o[t, r] = f32(0)
        row_max = cuda.local.array(2, f32)
        row_sum = cuda.local.array(2, f32)
        key_first = cuda.local.array(2, i32)
        key_stop = cuda.local.array(2, i32)
        shifted = cuda.local.array(2, f32)
        for side in unroll(2):
            position = row_low + i32(8 * side) + q_offset
            key_first[side] = max(position - window_left, i32(0))
            key_stop[side] = min(position + window_right + i32(1), seqlen_k)
            row_max[side] = f32(-np.inf)
            row_sum[side] = f32(0)
            shifted[side] = f32(0)
            if has_shift != i32(0) and row_low + i32(8 * side) < seqlen_q:
                shifted[side] = shift[q_row + i64(row_low + i32(8 * side))]

        acc_s = cuda.local.array((n_mmas, 4), f32)
        b = cuda.local.array(4, u32)
        sfb = cuda.local.array(2, u32)
        p = cuda.local.array(4, u32)
        v = cuda.local.array(2, u32)
        if begin < end:
            load_tile(smem, k, sfk, vt, sfv, kv_head, begin, padded_k, thread)
        commit()
        for tile in range(begin, end):
            wait_all()
            cuda.syncthreads()
            stage = smem + u32((tile - begin) & i32(1)) * u32(stage_bytes)
            if tile + i32(1) < end:
                other = smem + u32((tile - begin + i32(1)) & i32(1)) * u32(stage_bytes)
                load_tile(other, k, sfk, vt, sfv, kv_head, tile + i32(1), padded_k, thread)
            commit()
            first_n = tile * i32(TILE_N)

            for t in unroll(n_mmas):
                for r in unroll(4):
                    acc_s[t, r] = f32(0)
            if has_delta != i32(0):
                base = (i64(head) * i64(m_tiles) + i64(m_tile)) * i64(padded_k) + i64(first_n)
                for t in unroll(n_mmas):
                    for e in unroll(2):
                        token = i32(32 * (t >> 2) + 2 * (t & 3) + e) + i32(8) * thread_in_group
                        value = delta[base + i64(token)]
                        acc_s[t, e] = value
                        acc_s[t, 2 + e] = value
            sfk_smem = stage + u32(k_bytes + v_bytes)
            for k_step in unroll(k_steps):
                for j in unroll(2):
                    row = i32(32 * j) + thread_in_group * i32(8) + group_id
                    sfb[j] = load_shared(sfk_smem + u32(4 * k_steps) * u32(row) + u32(4 * k_step))
                for pair in unroll(n_mmas // 2):
                    b_row = i32(16 * pair) + (lane & i32(7)) + ((lane >> i32(4)) << i32(3))
                    b_half = (lane >> i32(3)) & i32(1)
                    address = stage + u32(b_row * i32(k_pitch) + i32(32 * k_step) + b_half * i32(16))
                    ldmatrix_x4(ffi.from_buffer(b), address)
                    for side in unroll(2):
                        t = 2 * pair + side
                        qk_mma(acc_s[t], a[k_step], b[2 * side :], sfa[k_step // 2], sfb[t // 4], k_step % 2, t % 4)

            for side in unroll(2):
                largest = f32(-np.inf)
                for t in unroll(n_mmas):
                    for e in unroll(2):
                        token = first_n + i32(32 * (t >> 2) + 2 * (t & 3) + e) + i32(8) * thread_in_group
                        if softcap:
                            x = (acc_s[t, 2 * side + e] + shifted[side]) * softmax_scale / cap
                            tanh = f32(1) - f32(2) / (f32(1) + ex2(x * f32(2 * log2e)))
                            s = cap * tanh * f32(log2e)
                        else:
                            s = acc_s[t, 2 * side + e] * (softmax_scale * f32(log2e))
                        if token < key_first[side] or token >= key_stop[side]:
                            s = f32(-np.inf)
                        acc_s[t, 2 * side + e] = s
                        largest = max_f32(largest, s)
                largest = max_f32(row_max[side], quad_max(largest))
                origin = largest if largest > f32(-np.inf) else f32(0)
                rescale = ex2(row_max[side] - origin)
                row_max[side] = largest
                total = f32(0)
                for t in unroll(n_mmas):
                    for e in unroll(2):
                        weight = ex2(acc_s[t, 2 * side + e] - origin)
                        acc_s[t, 2 * side + e] = weight
                        total += weight
                row_sum[side] = fma(row_sum[side], rescale, total)
                for t in unroll(o_tiles):
                    for e in unroll(2):
                        acc_o[t, 2 * side + e] = acc_o[t, 2 * side + e] * rescale

            v_smem = stage + u32(k_bytes)
            sfv_smem = stage + u32(k_bytes + v_bytes + sfk_bytes)
            for half in unroll(2):
                for t in unroll(o_tiles):
                    row = i32(8 * t) + group_id
                    codes = load_shared(
                        v_smem + u32(row * i32(_V_PITCH)) + u32(16 * half) + u32(4) * u32(thread_in_group)
                    )
                    scales = load_shared(sfv_smem + u32(4) * u32(row))
                    byte = (scales >> (u32(16 * half) + u32(8) * u32(thread_in_group >> i32(1)))) & u32(0xFF)
                    scale = f16x2_e4m3x2(byte | (byte << u32(8)))
                    for step in unroll(2):
                        for i in unroll(2):
                            v[i] = mul_f16x2(
                                f16x2_e2m1x2((codes >> u32(16 * step + 8 * i)) & u32(0xFF)), scale
                            )
                            n = 4 * half + 2 * step + i
                            p[2 * i] = pack_f16(acc_s[n, 1], acc_s[n, 0])
                            p[2 * i + 1] = pack_f16(acc_s[n, 3], acc_s[n, 2])
                        pv_mma(
                            ffi.from_buffer(acc_o[t]), ffi.from_buffer(p), ffi.from_buffer(v), ffi.from_buffer(acc_o[t])
                        )

        for side in unroll(2):
            row = i32(row_low + i32(8 * side))
            total = quad_sum(row_sum[side])
            origin = row_max[side] if row_max[side] > f32(-np.inf) else f32(0)
            log_sum = (origin + lg2(total)) * f32(1 / log2e) if total > f32(0) else f32(-np.inf)
            if not softcap:  # shifted is zero without a shift
                log_sum = fma(shifted[side], softmax_scale, log_sum)
            factor = f32(1) / total if total > f32(0) else f32(0)
            if has_sinks != i32(0):
                sink = sinks[head]
                most = max_f32(log_sum, sink)
                both = ex2((log_sum - most) * f32(log2e)) + ex2((sink - most) * f32(log2e))
                with_sink = most + lg2(both) * f32(1 / log2e)
                factor = factor * ex2((log_sum - with_sink) * f32(log2e))
                log_sum = with_sink
            if row < seqlen_q:
                if thread_in_group == i32(0):
                    lse[q_row + i64(row)] = log_sum
                at = (q_row + i64(row)) * i64(head_dim) + i64(2) * i64(thread_in_group)
                for t in unroll(o_tiles):
                    for e in unroll(2):
                        value = acc_o[t, 2 * side + e] * factor
                        if out_dtype == "float16":
                            out[at + i64(8 * t + e)] = to_f16(value)
                        elif out_dtype == "bfloat16":
                            out[at + i64(8 * t + e)] = to_bf16(value)
                        else:
                            out[at + i64(8 * t + e)] = value

    return prefill


@functools.cache
def prefill_kernel(implementation: str, head_dim: int, out_dtype: str = "float16", softcap: bool = False) -> Kernel:
    """The kernel for these constants. Raises ``ValueError`` for a head_dim or a name that it has not."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(message("head_dim", f"one of {', '.join(map(str, HEAD_DIMS))}", head_dim, "pad the last axis"))
    check_choice("out_dtype", out_dtype, OUT_DTYPES)
    constants = {"implementation": implementation, "head_dim": head_dim, "out_dtype": out_dtype, "softcap": softcap}
    out = "f32*" if out_dtype == "float32" else "u16*"
    signature = (*("u8*",) * 6, *("f32*",) * 3, out, "f32*", *("i32",) * 11, "f32", "f32")
    return Kernel(make_prefill, signature, constants, launch_bounds=(THREADS,))


def prefill(operands: Operands, problem: Problem, *, implementation: str, out_dtype: str = "float16") -> tuple[Any, Any]:
    """One forward pass: out (heads_q, seqlen_q, head_dim) and the natural LSE, float32 (heads_q, seqlen_q).

    Where the operands lie, and on the current stream there; ``out`` of an emulated machine is bit patterns (uint16) for
    the 16-bit dtypes. A row that sees no key is 0 with lse = -inf, or the sink's logit.

    Args:
        operands: see :class:`Operands`. problem: its masks, softcap and softmax_scale; not packed.
        implementation: ``"blockscale"`` (sm_120a) or ``"dequant"`` (sm_80). out_dtype: one of ``OUT_DTYPES``.

    Raises ``ValueError`` for a packed problem, sinks that the problem does not have or lacks, and shapes that do not fit.
    """
    _check(operands, problem)
    heads_q, heads_kv = problem.batch * problem.num_heads_q, problem.batch * problem.num_heads_kv
    kernel = prefill_kernel(implementation, problem.head_dim, out_dtype, problem.softcap is not None)
    emulated = out_dtype != "float32" and not gpu_arrays.is_gpu_array(operands.q)
    out = gpu_arrays.empty(
        operands.q, (heads_q, problem.seqlen_q, problem.head_dim), "uint16" if emulated else out_dtype
    )
    lse = gpu_arrays.empty(operands.q, (heads_q, problem.seqlen_q), "float32")
    m_tiles = -(-problem.seqlen_q // TILE_M)
    if heads_q * m_tiles > 2**31 - 1:
        raise ValueError(message("q", "small enough for 2^31 - 1 tiles of 64 queries", heads_q * m_tiles))
    if m_tiles:
        left, right = (NO_LIMIT if side is None else min(side, NO_LIMIT) for side in problem.bounds)
        optional = operands.delta, operands.shift, operands.sinks
        given = (0 if array is None else array for array in optional)
        arrays = (operands.q, operands.sfq, operands.k, operands.sfk, operands.vt, operands.sfv, *given, out, lse)
        flags = (int(array is not None) for array in optional)
        numbers = (problem.seqlen_q, problem.seqlen_k, _padded_k(problem), problem.q_offset, left, right)
        scale = problem.softmax_scale, problem.softcap or 0.0
        arguments = (*arrays, *flags, *numbers, heads_q // heads_kv, m_tiles, *scale)
        gpu_arrays.launch(kernel, (heads_q * m_tiles,), (THREADS,), arguments)
    return out, lse


def _padded_k(problem: Problem) -> int:
    return -(-problem.seqlen_k // TILE_N) * TILE_N


def _check(operands: Operands, problem: Problem) -> None:
    if problem.is_packed:
        raise ValueError(message("problem", "not packed", "packed sequences", "one call a sequence"))
    if (operands.sinks is not None) != problem.has_sinks:
        expected = "an array" if problem.has_sinks else "None"
        got = "None" if problem.has_sinks else "an array"
        raise ValueError(message("operands.sinks", f"{expected}, as problem.has_sinks says", got))
    heads_q, heads_kv = problem.batch * problem.num_heads_q, problem.batch * problem.num_heads_kv
    d, rows, tokens = problem.head_dim, problem.seqlen_q, _padded_k(problem)
    shapes = {
        "q": (heads_q, rows, d // 2), "sfq": (heads_q, rows, d // 16), "k": (heads_kv, tokens, d // 2),
        "sfk": (heads_kv, tokens, d // 16), "vt": (heads_kv, d, tokens // 2), "sfv": (heads_kv, d, tokens // 16),
        "delta": (heads_q, -(-rows // TILE_M), tokens), "shift": (heads_q, rows), "sinks": (heads_q,),
    }  # fmt: skip
    for name, expected in shapes.items():
        array = getattr(operands, name)
        if array is None:
            continue
        if tuple(array.shape) != expected:
            raise ValueError(message(f"operands.{name}", f"of shape {expected}", tuple(array.shape)))
        gpu_arrays.check_contiguous(f"operands.{name}", array)
        if not gpu_arrays.is_aligned(array, 16 if name in ("k", "vt") else 4):
            raise ValueError(message(f"operands.{name}", "aligned to 16 bytes (k, vt) or 4", "another", "copy it"))
