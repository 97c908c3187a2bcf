"""One MMA in one warp: registers in, registers out. The smallest test that an instruction does what we say it does.

``probe(a, b, c, sfa, sfb, d)`` reads and writes register images, (32 lanes, registers) of 32-bit words in memory, as
``Fragment.pack`` and ``Fragment.unpack`` of :mod:`ptx_inline.isa.fragments` make and take them. ``blocks`` tiles run in
as many CTAs of one warp.
"""

from __future__ import annotations

import functools

from nbfmha.kernels.mma import IMPLEMENTATIONS, make_mma
from ptx_inline.toolchain import Kernel

#: Probes beside the two block-scale implementations: one instruction each, without scales.
PLAIN_MMAS = {
    "legacy": "mma_m16n8k32_f8f6f4_e2m1_e2m1",
    "f16": "mma_m16n8k16_f16",
    "bf16": "mma_m16n8k16_bf16",
}


def make_probe(mma: str, thread_id_a: int, thread_id_b: int):
    """Kernel ``probe(a, b, c, sfa, sfb, d)`` for ``mma`` in ``IMPLEMENTATIONS`` or ``PLAIN_MMAS``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi = dev.ffi
    plain = mma in PLAIN_MMAS
    instruction = getattr(dev, PLAIN_MMAS[mma]) if plain else None
    block_scale = None if plain else make_mma(mma)

    def probe(a, b, c, sfa, sfb, d):
        lane = i64(cuda.blockIdx.x) * i64(32) + i64(i32(cuda.threadIdx.x))
        a_registers = cuda.local.array(4, u32)
        b_registers = cuda.local.array(2, u32)
        acc = cuda.local.array(4, f32)
        for r in range(4):
            a_registers[r] = a[lane * i64(4) + i64(r)]
            acc[r] = c[lane * i64(4) + i64(r)]
        for r in range(2):
            b_registers[r] = b[lane * i64(2) + i64(r)]
        if plain:
            pointer = ffi.from_buffer(acc)
            instruction(pointer, ffi.from_buffer(a_registers), ffi.from_buffer(b_registers), pointer)
        else:
            block_scale(acc, a_registers, b_registers, sfa[lane], sfb[lane], thread_id_a, thread_id_b)
        for r in range(4):
            d[lane * i64(4) + i64(r)] = acc[r]

    return probe


@functools.cache
def probe_kernel(mma: str, thread_id_a: int = 0, thread_id_b: int = 0) -> Kernel:
    """The probe for ``"blockscale"``, ``"dequant"`` (both with selectors), ``"legacy"``, ``"f16"`` or ``"bf16"``.

    Raises ``ValueError`` for another name or a selector outside 0..1 (A), 0..3 (B).
    """
    if mma not in (*IMPLEMENTATIONS, *PLAIN_MMAS):
        raise ValueError(f"mma must be one of {', '.join((*IMPLEMENTATIONS, *PLAIN_MMAS))}, got {mma!r}")
    if thread_id_a not in range(2) or thread_id_b not in range(4):
        raise ValueError(f"thread_id_a must be 0..1 and thread_id_b 0..3, got {thread_id_a} and {thread_id_b}")
    constants = {"mma": mma, "thread_id_a": thread_id_a, "thread_id_b": thread_id_b}
    return Kernel(make_probe, ("u32*", "u32*", "f32*", "u32*", "u32*", "f32*"), constants, launch_bounds=(32,))
