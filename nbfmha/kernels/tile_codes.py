"""A tile of 64 keys in NVFP4 as it comes from memory: where its codes and scales lie in a stage of shared memory.

The 64 corrections of the query block (delta) come with it, to a place of their own.

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
DELTA_BYTES = 8 * TILE_N
"""Of a tile's corrections: two neighbours twice, as rows g and g + 8 of an accumulator have them: 16 bytes for each n tile
t and lane q of a quad, at 16 (4 t + q), are what its four scores start from."""


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
    """Device functions that bring tiles to a stage, asynchronously. per_row: as ``Stage`` has it; sfv is not read then.

    ``begin(at: i64[5], kv_head, delta_first, first, padded, thread)``: where the thread's part of the tile at padded row
    ``first`` begins in k, sfk, vt, sfv and delta, in bytes. kv_head: i64, in rows of ``padded``; delta_first: i64, the
    element of delta that belongs to padded row 0.
    ``load(smem, delta_smem, k, sfk, vt, sfv, delta, at, padded, thread)``: that tile comes. ``advance(at)``: to the next.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    # scales and deltas come in words, one or more a thread: one address in shared memory serves them all
    cp_async_16, cp_async_4 = dev.cp_async_cg_16, dev.cp_async_ca_4
    stage = Stage(head_dim, per_row)
    k_steps, k_pitch, at_v, at_sfk, at_sfv = stage.k_steps, stage.k_pitch, stage.v, stage.sfk, stage.sfv
    sfk_pitch, sfk_words = stage.sfk_pitch, TILE_N * stage.sfk_pitch // 4
    chunks, rows_a_pass = 2 * k_steps, THREADS // (2 * k_steps)
    delta_token = make_delta_token("stored")

    @cuda.jit(device=True, forceinline=True)
    def begin(at, kv_head, delta_first, first, padded, thread):
        lane = u32(thread)
        key = kv_head * i64(padded) + i64(first)
        row = kv_head * i64(head_dim)
        at[0] = key * i64(32 * k_steps) + i64(lane * u32(16))  # K's rows of a tile lie end to end
        at[1] = key * i64(sfk_pitch) + i64(lane * u32(4))
        half = i64((lane & u32(1)) * u32(16))
        at[2] = (row + i64(lane >> u32(1))) * i64(padded >> i32(1)) + i64(first >> i32(1)) + half
        at[3] = (row + i64(lane)) * i64(padded >> i32(4)) + i64(first >> i32(4))
        token = delta_token(thread)
        at[4] = (delta_first + i64(first) + i64(token)) * i64(4)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load(smem, delta_smem, k, sfk, vt, sfv, delta, at, padded, thread):
        lane = u32(thread)
        to = smem + (lane // u32(chunks)) * u32(k_pitch) + (lane % u32(chunks)) * u32(16)
        for i in unroll(TILE_N // rows_a_pass):
            cp_async_16(to + u32(i * rows_a_pass * k_pitch), k, at[0] + i64(16 * THREADS * i), u32(16))
        for i in unroll(-(-sfk_words // THREADS)):
            if sfk_words >= THREADS or lane < u32(sfk_words):
                cp_async_4(smem + u32(at_sfk + 4 * THREADS * i) + lane * u32(4), sfk, at[1] + i64(4 * THREADS * i), u32(4))
        to = smem + u32(at_v) + (lane >> u32(1)) * u32(V_PITCH) + (lane & u32(1)) * u32(16)
        for i in unroll(-(-head_dim // 64)):
            if 64 * (i + 1) <= head_dim or lane < u32(2 * head_dim - THREADS * i):
                cp_async_16(to + u32(64 * V_PITCH * i), vt, at[2] + i64(64 * i) * i64(padded >> i32(1)), u32(16))
        for i in unroll(0 if per_row else -(-head_dim // THREADS)):
            if THREADS * (i + 1) <= head_dim or lane < u32(head_dim - THREADS * i):
                to = smem + u32(at_sfv + 4 * THREADS * i) + lane * u32(4)
                cp_async_4(to, sfv, at[3] + i64(THREADS * i) * i64(padded >> i32(4)), u32(4))
        if has_delta:
            cp_async_4(delta_smem + lane * u32(4), delta, at[4], u32(4))

    @cuda.jit(device=True, forceinline=True)
    def advance(at):
        at[0] += i64(TILE_N * 32 * k_steps)
        at[1] += i64(TILE_N * sfk_pitch)
        at[2] += i64(TILE_N // 2)
        at[3] += i64(TILE_N // 16)
        at[4] += i64(4 * TILE_N)

    return begin, load, advance


def make_delta_token(tokens: str):
    """Device function ``(thread) -> u32``: the token whose correction is word ``thread`` of a tile's ``DELTA_BYTES``."""
    from numba import cuda
    from numba.core import types

    u32, stored = types.uint32, tokens == "stored"

    @cuda.jit(device=True, forceinline=True)
    def delta_token(thread):
        tile, quad_lane, column = u32(thread) >> u32(4), (u32(thread) >> u32(2)) & u32(3), u32(thread) & u32(1)
        if stored:
            return (tile >> u32(2)) * u32(32) + quad_lane * u32(8) + (tile & u32(3)) * u32(2) + column
        return tile * u32(8) + quad_lane * u32(2) + column

    return delta_token


def make_load_delta():
    """Device function ``(acc_s: f32[8, 4], delta_smem, thread_in_group)``: a tile's corrections, to all rows."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, ffi, float_of, load_v4 = types.uint32, dev.ffi, dev.mov_f32_b32, dev.ld_shared_v4_u32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_delta(acc_s, delta_smem, thread_in_group):
        at = delta_smem + u32(16) * u32(thread_in_group)
        four = cuda.local.array(4, u32)
        for t in unroll(TILE_N // 8):
            load_v4(ffi.from_buffer(four), at + u32(64 * t))
            for r in unroll(4):
                acc_s[t, r] = float_of(four[r])

    return load_delta
