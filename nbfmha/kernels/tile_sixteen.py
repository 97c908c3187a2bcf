"""A tile of 16 tokens in 16 bits, of the sinks or the ring of a KV cache, a warp alone: to shared memory, both products.

It has about the bytes of an NVFP4 tile of 64 tokens, stands where that one stands (:mod:`tile_paged`) and is loaded in its
turn. In memory its rows lie together: sinks and ring are multiples of 16 tokens, and so is where a tile begins.

In shared memory a row has 2 head_dim bytes, of which chunk c of 16 bytes stands in place ``c ^ (row & 7)``: the eight rows
of a matrix of ``ldmatrix`` lie in different banks, and sectors of 32 bytes stay whole.
"""

from __future__ import annotations

from nbfmha.kernels.tile_16bit import row_pitch

TOKENS = 16


def make_load_rows(head_dim: int):
    """Device function ``(smem, source: u8*, at, count, lane)``: 16 rows from byte ``at`` (i64) on, asynchronously; those
    from row ``count`` on are zeros."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i64, cp_async_16 = types.uint32, types.int64, dev.cp_async_cg_16
    chunks = head_dim // 8
    rows_a_pass = 32 // chunks
    passes = TOKENS // rows_a_pass

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_rows(smem, source, at, count, lane):
        own, own_row, rows = u32(lane), u32(lane) // u32(chunks), u32(count)
        to, at = u32(16) * (own ^ own_row), at + i64(u32(16) * own)
        for i in unroll(passes):
            cp_async_16(
                smem + (to ^ u32(16 * (rows_a_pass * i % 8))) + u32(512 * i), source, at + i64(512 * i),
                u32(16) if u32(own_row + u32(rows_a_pass * i)) < rows else u32(0),
            )  # fmt: skip

    return load_rows


def _make_address(head_dim: int):
    """Device function ``(smem, row, chunk, ahead) -> u32``: of chunk ``chunk + ahead`` of a row; ``ahead``, even, of the
    same value in all lanes, ``chunk`` 0 or 1."""
    from numba import cuda
    from numba.core import types

    u32 = types.uint32

    @cuda.jit(device=True, forceinline=True)
    def address(smem, row, chunk, ahead):
        own = u32(16) * (chunk ^ (row & u32(7)))
        return smem + row * u32(2 * head_dim) + u32(16) * (ahead & u32(~7 & 0xFF)) + (own ^ (u32(16) * (ahead & u32(7))))

    return address


def make_qk(head_dim: int, dtype: str, q_tiles: int):
    """Device function ``(acc_s: f32[q_tiles, >= 1, 4], q_smem, k_smem, lane)``: adds S^T = K Q^T to m tile 0, whose rows
    are the tokens in their order. Q: rows as they came, at the pitch of :mod:`tile_16bit`."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, ffi, ldmatrix_x4 = types.uint32, dev.ffi, dev.ldmatrix_x4
    mma = dev.mma_m16n8k16_bf16 if dtype == "bfloat16" else dev.mma_m16n8k16_f16
    q_pitch, address = row_pitch(head_dim), _make_address(head_dim)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def two_steps(acc_s, a, q_at):
        b = cuda.local.array(4, u32)
        for i in unroll(q_tiles):
            ldmatrix_x4(ffi.from_buffer(b), q_at + u32(8 * q_pitch * i))
            c = ffi.from_buffer(acc_s[i, 0])
            for step in unroll(2):
                mma(c, ffi.from_buffer(a[step]), ffi.from_buffer(b[2 * step :]), c)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def qk(acc_s, q_smem, k_smem, lane):
        a = cuda.local.array((2, 4), u32)
        # eight lanes address the rows of one matrix: of Q both k steps, of K both halves of the rows, then of the step
        q_at = q_smem + u32(lane & 7) * u32(q_pitch) + u32(lane >> 3) * u32(16)
        row, chunk = u32(lane & 15), u32(lane >> 4)
        for pair in unroll(head_dim // 32):
            for step in unroll(2):
                ldmatrix_x4(ffi.from_buffer(a[step]), address(k_smem, row, chunk, u32(4 * pair + 2 * step)))
            two_steps(acc_s, a, q_at + u32(64 * pair))

    return qk


def make_pv(head_dim: int, dtype: str, q_tiles: int):
    """Device function ``(acc_o: f32[head_dim / 16, q_tiles, 4], p: u32[q_tiles, 1, 2], v_smem, lane)``: adds P in ``dtype``
    times V, as :mod:`out_columns` has it."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, ffi, ldmatrix_x4_trans = types.uint32, dev.ffi, dev.ldmatrix_x4_trans
    mma = dev.mma_m16n8k16_bf16 if dtype == "bfloat16" else dev.mma_m16n8k16_f16
    address = _make_address(head_dim)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def pv(acc_o, p, v_smem, lane):
        a = cuda.local.array(4, u32)
        # eight tokens of both halves of the channels, then the next eight tokens
        row, chunk = u32((lane & 7) + ((lane >> 4) << 3)), u32((lane >> 3) & 1)
        for c in unroll(head_dim // 16):
            ldmatrix_x4_trans(ffi.from_buffer(a), address(v_smem, row, chunk, u32(2 * c)))
            for i in unroll(q_tiles):
                acc = ffi.from_buffer(acc_o[c, i])
                mma(acc, ffi.from_buffer(a), ffi.from_buffer(p[i, 0]), acc)

    return pv
