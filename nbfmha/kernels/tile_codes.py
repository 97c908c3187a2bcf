"""A tile of 64 keys in NVFP4 as it comes from memory: where its codes and scales lie in a stage of shared memory.

==============  =====================================================================================================
K codes         64 rows of 32 bytes a k step of 64 channels, pitch 16 bytes more: no bank conflict for ``ldmatrix``
V codes         head_dim rows of 32 bytes (64 tokens), pitch 48
sfk             64 rows of 4 bytes a k step
sfv             head_dim words: the four blocks of 16 tokens of one channel
==============  =====================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from nbfmha.kernels.tile_16bit import THREADS
from nbfmha.recipe import TILE_N

V_PITCH = TILE_N // 2 + 16


@dataclass(frozen=True)
class Stage:
    """Byte offsets of the four parts of a stage, for one head_dim."""

    head_dim: int

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
    def sfv(self) -> int:
        return self.sfk + TILE_N * 4 * self.k_steps

    @property
    def bytes(self) -> int:
        return self.sfv + 4 * self.head_dim


def make_load_codes(head_dim: int):
    """Device function ``(smem, k, sfk, vt, sfv, kv_head, first, padded, thread)``: the tile whose first padded row is
    ``first`` to a stage, asynchronously."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, i32, i64 = types.uint32, types.int32, types.int64
    cp_async_16, cp_async_4 = dev.cp_async_cg_16, dev.cp_async_ca_4
    stage = Stage(head_dim)
    k_steps, k_pitch, at_v, at_sfk, at_sfv = stage.k_steps, stage.k_pitch, stage.v, stage.sfk, stage.sfv

    @cuda.jit(device=True, forceinline=True)
    def load_codes(smem, k, sfk, vt, sfv, kv_head, first, padded, thread):
        key = i64(kv_head) * i64(padded) + i64(first)
        channel = i64(kv_head) * i64(head_dim)
        for chunk in range(thread, TILE_N * 2 * k_steps, THREADS):
            row, column = i32(chunk) // i32(2 * k_steps), i32(chunk) % i32(2 * k_steps)
            offset = (key + i64(row)) * i64(32 * k_steps) + i64(column) * i64(16)
            cp_async_16(smem + u32(row * i32(k_pitch) + column * i32(16)), k, offset, u32(16))
        for chunk in range(thread, head_dim * 2, THREADS):
            row, column = i32(chunk) >> i32(1), i32(chunk) & i32(1)
            offset = (channel + i64(row)) * i64(padded >> i32(1)) + i64(first >> i32(1)) + i64(column) * i64(16)
            cp_async_16(smem + u32(at_v) + u32(row * i32(V_PITCH) + column * i32(16)), vt, offset, u32(16))
        for word in range(thread, TILE_N * k_steps, THREADS):
            cp_async_4(smem + u32(at_sfk) + u32(4 * word), sfk, key * i64(4 * k_steps) + i64(4 * word), u32(4))
        for row in range(thread, head_dim, THREADS):
            offset = (channel + i64(row)) * i64(padded >> i32(4)) + i64(first >> i32(4))
            cp_async_4(smem + u32(at_sfv) + u32(4 * row), sfv, offset, u32(4))

    return load_codes
