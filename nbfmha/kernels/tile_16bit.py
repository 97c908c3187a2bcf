"""Tiles in 16 bits: rows of Q, K or V in shared memory, and both products by ``mma.m16n8k16``.

A warp has ``m_tiles`` times 16 queries, so that each fragment of K or V that it reads from shared memory serves as many
MMAs. In shared memory a row of head_dim elements has a pitch of 16 bytes more than it needs: eight rows of ``ldmatrix``
then lie in eight different groups of four banks. Needs sm_80.
"""

from __future__ import annotations

from nbfmha.recipe import TILE_N

THREADS = 128
WARPS = THREADS // 32


def row_pitch(head_dim: int) -> int:
    """Bytes from one row of head_dim 16-bit elements to the next in shared memory."""
    return 2 * head_dim + 16


def make_load_rows(head_dim: int, tile_rows: int):
    """Device function ``(smem, source: u8*, first, pitch, rows, thread)``: ``tile_rows`` rows of head_dim elements to
    shared memory, asynchronously; ``first`` and ``pitch`` in bytes (i64), rows from ``rows`` on are zeros."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    cp_async_16, unknown = dev.cp_async_cg_16, dev.unknown_i64
    chunks = head_dim // 8
    smem_pitch, passes = row_pitch(head_dim), tile_rows * chunks // THREADS
    rows_a_pass = THREADS // chunks

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_rows(smem, source, first, pitch, rows, thread):
        pitch = unknown(pitch)  # else the offset of each pass is kept from tile to tile, and there is no register for it
        row, column = u32(thread) // u32(chunks), u32(thread) % u32(chunks)
        to = smem + row * u32(smem_pitch) + column * u32(16)
        offset = first + i64(row) * pitch + i64(column) * i64(16)
        step = i64(rows_a_pass) * pitch
        for i in unroll(passes):
            there = i32(row) + i32(rows_a_pass * i) < rows
            cp_async_16(
                to + u32(rows_a_pass * smem_pitch * i), source, offset if there else first, u32(16) if there else u32(0)
            )
            offset += step

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_uneven_rows(smem, source, first, pitch, rows, thread):
        for i in unroll(passes):
            chunk = u32(thread) + u32(THREADS * i)
            row, column = chunk // u32(chunks), chunk % u32(chunks)
            there = i32(row) < rows
            offset = first + i64(row) * pitch + i64(column) * i64(16) if there else first
            cp_async_16(smem + row * u32(smem_pitch) + column * u32(16), source, offset, u32(16) if there else u32(0))

    return load_uneven_rows if THREADS % chunks else load_rows


def make_qk(head_dim: int, dtype: str, m_tiles: int):
    """Device function ``(acc_s: f32[m_tiles, 8, 4], q_smem, k_smem, lane, warp)``: adds the scores of the warp's queries
    with the 64 keys; column c of n tile t is the key in row 8 t + c."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4 = dev.ffi, dev.ldmatrix_x4
    mma = dev.mma_m16n8k16_bf16 if dtype == "bfloat16" else dev.mma_m16n8k16_f16
    pitch, k_steps, pairs = row_pitch(head_dim), head_dim // 16, TILE_N // 16

    # functions of their own: Numba's time to compile one grows with the square of its statements
    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_a(a, q_at):
        for m in unroll(m_tiles):
            ldmatrix_x4(ffi.from_buffer(a[m]), q_at + u32(16 * pitch * m))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def multiply(acc_s, a, b, n):
        for m in unroll(m_tiles):
            for side in unroll(2):
                c = ffi.from_buffer(acc_s[m, n + u32(side)])
                mma(c, ffi.from_buffer(a[m]), ffi.from_buffer(b[2 * side :]), c)

    # what the next MMAs read is loaded before these. ptxas orders as it likes; so it spills 12 bytes less at head_dim 128
    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, q_smem, k_smem, lane, warp):
        a = cuda.local.array((2, m_tiles, 4), u32)
        b = cuda.local.array((2, 4), u32)
        q_at = q_smem + u32(16 * m_tiles * warp + (lane & 15)) * u32(pitch) + u32(lane >> 4) * u32(16)
        k_at = k_smem + u32((lane & 7) + ((lane >> 4) << 3)) * u32(pitch) + u32((lane >> 3) & 1) * u32(16)
        load_a(a[0], q_at)
        ldmatrix_x4(ffi.from_buffer(b[0]), k_at)
        for step in unroll(k_steps):
            for pair in unroll(pairs):
                if pair + 1 < pairs:
                    ldmatrix_x4(ffi.from_buffer(b[(pair + 1) % 2]), k_at + u32(16 * pitch * (pair + 1) + 32 * step))
                elif step + 1 < k_steps:
                    ldmatrix_x4(ffi.from_buffer(b[0]), k_at + u32(32 * (step + 1)))
                    load_a(a[(step + 1) % 2], q_at + u32(32 * (step + 1)))
                multiply(acc_s, a[step % 2], b[pair % 2], u32(2 * pair))

    return qk


def make_pack(dtype: str, m_tiles: int):
    """Device function ``(p: u32[m_tiles, 4, 4], acc_s: f32[m_tiles, 8, 4])``: P rounded to ``dtype``, as the A fragments of
    four k steps. No lane gives anything to another: what it holds of two n tiles is what it needs of one k step."""
    from numba import cuda

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    pack = dev.cvt_rn_bf16x2_f32 if dtype == "bfloat16" else dev.cvt_rn_f16x2_f32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pack_step(p, low, high):
        for side in unroll(2):
            p[side] = pack(low[2 * side + 1], low[2 * side])
            p[2 + side] = pack(high[2 * side + 1], high[2 * side])

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pack_p(p, acc_s):
        for m in unroll(m_tiles):
            for step in unroll(TILE_N // 16):
                pack_step(p[m, step], acc_s[m, 2 * step], acc_s[m, 2 * step + 1])

    return pack_p


def make_pv(head_dim: int, dtype: str, m_tiles: int, rounded_sum: bool):
    """Device function ``(acc_o: f32[m_tiles, tiles, 4], p: u32[m_tiles, 4, 4], v_smem, lane)``: P in ``dtype``, as
    ``make_pack`` leaves it, times 64 rows of V. ``rounded_sum``: a last tile of ``acc_o`` takes the sums of P, each in all
    of its columns."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, ldmatrix_x4_trans = dev.ffi, dev.ldmatrix_x4_trans
    bf16 = dtype == "bfloat16"
    mma = dev.mma_m16n8k16_bf16 if bf16 else dev.mma_m16n8k16_f16
    two_ones = 0x3F803F80 if bf16 else 0x3C003C00
    o_tiles, pitch = head_dim // 8, row_pitch(head_dim)
    k_steps, pairs = TILE_N // 16, o_tiles // 2

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def multiply(acc_o, p, b, step, n):
        # four 8x8 matrices: low and high k of one n tile, then of the next
        for m in unroll(m_tiles):
            for side in unroll(2):
                c = ffi.from_buffer(acc_o[m, n + u32(side)])
                mma(c, ffi.from_buffer(p[m, step]), ffi.from_buffer(b[2 * side :]), c)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def add_sums(acc_o, p, step):
        b = cuda.local.array(2, u32)
        b[0] = u32(two_ones)
        b[1] = u32(two_ones)
        for m in unroll(m_tiles):
            c = ffi.from_buffer(acc_o[m, o_tiles])
            mma(c, ffi.from_buffer(p[m, step]), ffi.from_buffer(b), c)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pv(acc_o, p, v_smem, lane):
        b = cuda.local.array((2, 4), u32)
        v_at = v_smem + u32(lane & 15) * u32(pitch) + u32(lane >> 4) * u32(16)
        ldmatrix_x4_trans(ffi.from_buffer(b[0]), v_at)
        for step in unroll(k_steps):
            for pair in unroll(pairs):
                if pair + 1 < pairs:
                    ldmatrix_x4_trans(ffi.from_buffer(b[(pair + 1) % 2]), v_at + u32(16 * pitch * step + 32 * (pair + 1)))
                elif step + 1 < k_steps:
                    ldmatrix_x4_trans(ffi.from_buffer(b[0]), v_at + u32(16 * pitch * (step + 1)))
                multiply(acc_o, p, b[pair % 2], u32(step), u32(2 * pair))
            if rounded_sum:
                add_sums(acc_o, p, u32(step))

    return pv
