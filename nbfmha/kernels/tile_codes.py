"""A tile of 64 keys in NVFP4 as it comes from memory: where its codes and scales lie in a stage of shared memory.

The 64 corrections of the query block (delta) come with it, to a place of their own: they are read after the codes.

==============  =====================================================================================================
K codes         64 rows of 32 bytes a k step of 64 channels, pitch 16 bytes more: no bank conflict for ``ldmatrix``
V codes         head_dim rows of 32 bytes (64 tokens), pitch 48
sfk             64 rows of 4 bytes a k step; with one scale a row, of 4 bytes: an f32
sfv             head_dim words: the four blocks of 16 tokens of one channel; with one scale a row, nothing
==============  =====================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from nbfmha.kernels.tile_16bit import THREADS
from nbfmha.recipe import TILE_N

V_PITCH = TILE_N // 2 + 16
DELTA_BYTES = 4 * TILE_N


@dataclass(frozen=True)
class Stage:
    """Byte offsets of the parts of a stage, for one head_dim. per_row: a float32 scale a row, not one for 16 elements."""

    head_dim: int
    per_row: bool = False

    @property
    def k_steps(self) -> int:
        """k steps of m16n8k64 in Q K^T; head_dim 96 fills the second one by half."""
        return -(-self.head_dim // 64)

    @property
    def k_pitch(self) -> int:
        return 32 * self.k_steps + 16

    @property
    def v(self) -> int:
        return TILE_N * self.k_pitch

    @property
    def sfk(self) -> int:
        return self.v + self.head_dim * V_PITCH

    @property
    def sfk_pitch(self) -> int:
        return 4 if self.per_row else 4 * self.k_steps

    @property
    def sfv(self) -> int:
        return self.sfk + TILE_N * self.sfk_pitch

    @property
    def bytes(self) -> int:
        return self.sfv + (0 if self.per_row else 4 * self.head_dim)


def make_load_q_codes(head_dim: int):
    """Device function ``(a: u32[k_steps, 4], q: u8*, first_row, rows, row, thread_in_group)``: the words of codes that are
    A fragments of m16n8k64 for the queries ``row`` and ``row + 8`` after ``first_row`` (i64); zeros from ``rows`` on."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    load = dev.ld_global_nc_u32
    k_steps = Stage(head_dim).k_steps

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_q_codes(a, q, first_row, rows, row, thread_in_group):
        for k_step in unroll(k_steps):
            for r in unroll(4):
                this = i32(row + i32(8 * (r & 1)))
                a[k_step, r] = u32(0)
                if this < rows:
                    word = i64(thread_in_group) * i64(4) + i64(32 * k_step + 16 * (r >> 1))
                    a[k_step, r] = load(q, (first_row + i64(this)) * i64(32 * k_steps) + word)

    return load_q_codes


def make_load_codes(head_dim: int, has_delta: bool, per_row: bool = False):
    """Device function ``(smem, delta_smem, k, sfk, vt, sfv, delta, kv_head, delta_row, first, padded, thread)``.

    The tile that begins at padded row ``first`` comes to a stage, asynchronously. kv_head, delta_row: i64, in rows of
    ``padded``. per_row: as ``Stage`` has it; sfv is not read then.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    cp_async_16, cp_async_4 = dev.cp_async_cg_16, dev.cp_async_ca_4
    stage = Stage(head_dim, per_row)
    k_steps, k_pitch, at_v, at_sfk, at_sfv = stage.k_steps, stage.k_pitch, stage.v, stage.sfk, stage.sfv
    sfk_pitch = stage.sfk_pitch
    chunks, rows_a_pass = 2 * k_steps, THREADS // (2 * k_steps)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_codes(smem, delta_smem, k, sfk, vt, sfv, delta, kv_head, delta_row, first, padded, thread):
        key = kv_head * i64(padded) + i64(first)
        lane = u32(thread)
        # K's rows of a tile lie end to end
        k_at = key * i64(32 * k_steps) + i64(lane * u32(16))
        to = smem + (lane // u32(chunks)) * u32(k_pitch) + (lane % u32(chunks)) * u32(16)
        for i in unroll(TILE_N // rows_a_pass):
            cp_async_16(to + u32(i * rows_a_pass * k_pitch), k, k_at + i64(16 * THREADS * i), u32(16))
        if lane < u32(4 * sfk_pitch):
            scales_at = key * i64(sfk_pitch) + i64(lane * u32(16))
            cp_async_16(smem + u32(at_sfk) + lane * u32(16), sfk, scales_at, u32(16))
        row = kv_head * i64(head_dim) + i64(lane >> u32(1))
        v_pitch = i64(padded >> i32(1))
        v_at = row * v_pitch + i64(first >> i32(1)) + i64((lane & u32(1)) * u32(16))
        to = smem + u32(at_v) + (lane >> u32(1)) * u32(V_PITCH) + (lane & u32(1)) * u32(16)
        for i in unroll(-(-head_dim // 64)):
            if 64 * (i + 1) <= head_dim or lane < u32(2 * head_dim - THREADS * i):
                cp_async_16(to + u32(64 * V_PITCH * i), vt, v_at + i64(64 * i) * v_pitch, u32(16))
        scale_pitch = i64(padded >> i32(4))
        scales_at = (kv_head * i64(head_dim) + i64(lane)) * scale_pitch + i64(first >> i32(4))
        for i in unroll(0 if per_row else -(-head_dim // THREADS)):
            if THREADS * (i + 1) <= head_dim or lane < u32(head_dim - THREADS * i):
                to = smem + u32(at_sfv + 4 * THREADS * i) + lane * u32(4)
                cp_async_4(to, sfv, scales_at + i64(THREADS * i) * scale_pitch, u32(4))
        if has_delta and lane < u32(TILE_N // 4):
            delta_at = (delta_row * i64(padded) + i64(first)) * i64(4) + i64(lane * u32(16))
            cp_async_16(delta_smem + lane * u32(16), delta, delta_at, u32(16))

    return load_codes


def make_load_delta(tokens: str):
    """Device function ``(acc_s: f32[8, 4], delta_smem, thread_in_group)``: a tile's corrections, to all rows."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels.softmax import TOKENS, places
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, float_of = dev.ffi, dev.mov_f32_b32
    load, load_v2 = dev.ld_shared_u32, dev.ld_volatile_shared_v2_u32
    place, lane_tokens = places(tokens), TOKENS[tokens][1]
    neighbours = tokens == "stored"

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_delta(acc_s, delta_smem, thread_in_group):
        at = delta_smem + u32(4 * lane_tokens) * u32(thread_in_group)
        pair = cuda.local.array(2, u32)
        for t in unroll(TILE_N // 8):
            if neighbours:  # a load for each row is no dearer than copies of one load
                for side in unroll(2):
                    load_v2(ffi.from_buffer(pair), at + u32(4 * place[t][0]))
                    acc_s[t, 2 * side] = float_of(pair[0])
                    acc_s[t, 2 * side + 1] = float_of(pair[1])
            else:
                for e in unroll(2):
                    value = float_of(load(at + u32(4 * place[t][e])))
                    acc_s[t, e] = value
                    acc_s[t, 2 + e] = value

    return load_delta
