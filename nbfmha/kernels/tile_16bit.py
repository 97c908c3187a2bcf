"""A tile of 64 keys in 16 bits: rows of K, V or Q in shared memory, and both products by ``mma.m16n8k16``.

In shared memory a row of head_dim elements has a pitch of 16 bytes more than it needs, V transposed a row of 64 tokens
likewise: eight rows of ``ldmatrix`` then lie in eight different groups of four banks. Needs sm_80.
"""

from __future__ import annotations

from nbfmha.recipe import TILE_N

THREADS = 128
TRANSPOSED_PITCH = 2 * TILE_N + 16


def row_pitch(head_dim: int) -> int:
    """Bytes from one row of head_dim 16-bit elements to the next in shared memory."""
    return 2 * head_dim + 16


def make_load_rows(head_dim: int):
    """Device function ``(smem, source: u8*, first, pitch, rows, thread)``: 64 rows of head_dim elements to shared memory,
    asynchronously; ``first`` and ``pitch`` in bytes (i64), rows from ``rows`` on are zeros."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    cp_async_16 = dev.cp_async_cg_16
    chunks = head_dim // 8
    smem_pitch, passes = row_pitch(head_dim), TILE_N * chunks // THREADS

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_rows(smem, source, first, pitch, rows, thread):
        for i in unroll(passes):
            chunk = u32(thread) + u32(THREADS * i)
            row, column = chunk // u32(chunks), chunk % u32(chunks)
            there = i32(row) < rows
            offset = first + i64(row) * pitch + i64(column) * i64(16) if there else first
            cp_async_16(smem + row * u32(smem_pitch) + column * u32(16), source, offset, u32(16) if there else u32(0))

    return load_rows


def make_qk(head_dim: int, dtype: str):
    """Device function ``(acc_s: f32[8, 4], q_smem, k_smem, lane, warp)``: adds the scores of the warp's 16 queries with the
    64 keys; column c of n tile t is the key in row 8 t + c."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4 = dev.ffi, dev.ldmatrix_x4
    mma = dev.mma_m16n8k16_bf16 if dtype == "bfloat16" else dev.mma_m16n8k16_f16
    pitch, k_steps = row_pitch(head_dim), head_dim // 16

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, q_smem, k_smem, lane, warp):
        a = cuda.local.array(4, u32)
        b = cuda.local.array(4, u32)
        q_at = q_smem + u32(16 * warp + (lane & 15)) * u32(pitch) + u32(lane >> 4) * u32(16)
        k_at = k_smem + u32((lane & 7) + ((lane >> 4) << 3)) * u32(pitch) + u32((lane >> 3) & 1) * u32(16)
        for step in unroll(k_steps):
            ldmatrix_x4(ffi.from_buffer(a), q_at + u32(32 * step))
            for pair in unroll(TILE_N // 16):
                ldmatrix_x4(ffi.from_buffer(b), k_at + u32(16 * pitch * pair + 32 * step))
                for side in unroll(2):
                    c = ffi.from_buffer(acc_s[2 * pair + side])
                    mma(c, ffi.from_buffer(a), ffi.from_buffer(b[2 * side :]), c)

    return qk


def make_pv(head_dim: int, dtype: str, transposed: bool, rounded_sum: bool):
    """Device function ``(acc_o: f32[tiles, 4], acc_s: f32[8, 4], v_smem, lane)``: P (``acc_s``) in ``dtype``, times V.

    ``transposed``: V lies as head_dim rows of 64 tokens, else as 64 rows of head_dim. Token c of k slot tile t is the
    key of column c of n tile t. ``rounded_sum``: a last tile of ``acc_o`` takes the sums of the rounded P, each in all of
    its columns."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi = dev.ffi
    bf16 = dtype == "bfloat16"
    mma = dev.mma_m16n8k16_bf16 if bf16 else dev.mma_m16n8k16_f16
    pack = dev.cvt_rn_bf16x2_f32 if bf16 else dev.cvt_rn_f16x2_f32
    ldmatrix = dev.ldmatrix_x4 if transposed else dev.ldmatrix_x4_trans
    two_ones = 0x3F803F80 if bf16 else 0x3C003C00
    o_tiles = head_dim // 8
    pitch = TRANSPOSED_PITCH if transposed else row_pitch(head_dim)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pv(acc_o, acc_s, v_smem, lane):
        p = cuda.local.array(4, u32)
        b = cuda.local.array(4, u32)
        # four 8x8 matrices: low and high k of one n tile, then of the next
        if transposed:
            v_at = v_smem + u32((lane & 7) + ((lane >> 4) << 3)) * u32(pitch) + u32((lane >> 3) & 1) * u32(16)
        else:
            v_at = v_smem + u32(lane & 15) * u32(pitch) + u32(lane >> 4) * u32(16)
        for step in unroll(TILE_N // 16):
            for half in unroll(2):
                p[2 * half] = pack(acc_s[2 * step + half, 1], acc_s[2 * step + half, 0])
                p[2 * half + 1] = pack(acc_s[2 * step + half, 3], acc_s[2 * step + half, 2])
            for pair in unroll(o_tiles // 2):
                if transposed:
                    ldmatrix(ffi.from_buffer(b), v_at + u32(16 * pitch * pair + 32 * step))
                else:
                    ldmatrix(ffi.from_buffer(b), v_at + u32(16 * pitch * step + 32 * pair))
                for side in unroll(2):
                    c = ffi.from_buffer(acc_o[2 * pair + side])
                    mma(c, ffi.from_buffer(p), ffi.from_buffer(b[2 * side :]), c)
            if rounded_sum:
                b[0] = u32(two_ones)
                b[1] = u32(two_ones)
                c = ffi.from_buffer(acc_o[o_tiles])
                mma(c, ffi.from_buffer(p), ffi.from_buffer(b), c)

    return pv
