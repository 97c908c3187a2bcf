"""The block-scale MMA as kernels call it, and its stand-in for GPUs without the instruction.

Both have the operands of ``mma.sync.m16n8k64 kind::mxf4nvf4 scale_vec::4X`` (PTX ISA; fragment maps in
:mod:`ptx_inline.isa.fragments`): ``mma(acc: f32[4], a: u32[4], b: u32[2], sfa: u32, sfb: u32, thread_id_a,
thread_id_b)`` adds the product to ``acc``. All 32 lanes must call together.

==============  ==================================================================================================
``blockscale``  the instruction, sm_120a
``dequant``     sm_80 and up: codes times scales in f16, which is exact (at most 6 significant bits, 2^-10 .. 2688),
                then four ``mma.m16n8k16``. The k slots of those are filled in the order in which the codes lie in the
                block-scale fragment: a permutation of k, the same for A and B, leaves the sum of products as it is.
                Scales come from the lanes that the selectors name, by shuffles.
==============  ==================================================================================================
"""

from __future__ import annotations

IMPLEMENTATIONS = ("blockscale", "dequant")


def make_clear_accumulator():
    """Device function ``(acc: f32[4])``: an accumulator of zeros."""
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    f32 = types.float32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def clear(acc):
        for r in unroll(4):
            acc[r] = f32(0)

    return clear


def make_mma(implementation: str):
    """The device function for one of ``IMPLEMENTATIONS``; ``ValueError`` for another name."""
    if implementation == "blockscale":
        return _make_blockscale()
    if implementation == "dequant":
        return _make_dequant()
    raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")


def _make_blockscale():
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u16 = types.uint16
    ffi, mma_4x = dev.ffi, dev.mma_m16n8k64_mxf4nvf4_4x_ue4m3

    @cuda.jit(device=True, forceinline=True)
    def mma(acc, a, b, sfa, sfb, thread_id_a, thread_id_b):
        d, c = ffi.from_buffer(acc), ffi.from_buffer(acc)
        mma_4x(
            d, ffi.from_buffer(a), ffi.from_buffer(b), c, sfa, sfb, u16(0), u16(thread_id_a), u16(0), u16(thread_id_b)
        )

    return mma


def _make_dequant():
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32 = types.uint32
    ffi, mma_f16 = dev.ffi, dev.mma_m16n8k16_f16
    f16x2_e2m1x2, f16x2_e4m3x2, mul_f16x2 = dev.cvt_rn_f16x2_e2m1x2, dev.cvt_rn_f16x2_e4m3x2, dev.mul_rn_f16x2
    shuffle, laneid = dev.shfl_sync_idx_b32, dev.laneid

    @cuda.jit(device=True, forceinline=True)
    def scale_pair(word, index):
        """Scale byte ``index`` of a word, twice, as f16x2."""
        byte = (word >> (u32(8) * index)) & u32(0xFF)
        return f16x2_e4m3x2(byte | (byte << u32(8)))

    @cuda.jit(device=True, forceinline=True)
    def element_pair(codes, index, scale):
        """Codes 2 index and 2 index + 1 of a word, times their scale, as f16x2."""
        return mul_f16x2(f16x2_e2m1x2((codes >> u32(8 * index)) & u32(0xFF)), scale)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def mma(acc, a, b, sfa, sfb, thread_id_a, thread_id_b):
        lane = laneid()
        quad = lane & u32(0x1C)
        sfa_low = shuffle(sfa, quad + u32(2 * thread_id_a))  # row group_id
        sfa_high = shuffle(sfa, quad + u32(2 * thread_id_a + 1))  # row group_id + 8
        sfb_column = shuffle(sfb, quad + u32(thread_id_b))
        rows = cuda.local.array(4, u32)
        columns = cuda.local.array(2, u32)
        for half in unroll(2):  # k 0..31, then 32..63: this lane's eight codes lie in one block of 16
            index = ((lane & u32(3)) >> u32(1)) + u32(2 * half)
            scale_low, scale_high, scale_b = (
                scale_pair(sfa_low, index),
                scale_pair(sfa_high, index),
                scale_pair(sfb_column, index),
            )
            for step in unroll(2):
                rows[0] = element_pair(a[2 * half], 2 * step, scale_low)
                rows[1] = element_pair(a[2 * half + 1], 2 * step, scale_high)
                rows[2] = element_pair(a[2 * half], 2 * step + 1, scale_low)
                rows[3] = element_pair(a[2 * half + 1], 2 * step + 1, scale_high)
                columns[0] = element_pair(b[half], 2 * step, scale_b)
                columns[1] = element_pair(b[half], 2 * step + 1, scale_b)
                mma_f16(ffi.from_buffer(acc), ffi.from_buffer(rows), ffi.from_buffer(columns), ffi.from_buffer(acc))

    return mma
