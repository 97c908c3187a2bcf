"""What a team of the decode kernel seldom needs, in words of shared memory instead of registers, which are scarce."""

from __future__ import annotations

from nbfmha.kernels.paged_products import FACTORS

FRAME = 11 + len(FACTORS)
"""Words of it."""

(
    SLOT, KV_HEAD, LENGTH, POSITION, FIRST_ROW, SINK_TILES, SINK_STOP, RING_FIRST, RING_PLACE, SIXTEEN_TILES, STOP,
    FIRST_FACTOR,
) = range(FRAME - len(FACTORS) + 1)  # fmt: skip
"""Slot; head of K and V; tokens of the sequence; position of the first query; first row; tiles in 16 bits that are sinks;
where the sinks end; where the ring's tokens begin, and their place in it; the sequence's tiles in 16 bits; where its tokens
in NVFP4 end; ``FACTORS``."""


def make_frame():
    """Device functions ``keep(frame, word, value)``, ``recall(frame, word) -> i32`` and ``recall_factors(factors: u32[2],
    frame)``; frame: address in shared memory."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, load, store, n_factors = types.uint32, types.int32, dev.ld_shared_u32, dev.st_shared_u32, len(FACTORS)

    @cuda.jit(device=True, forceinline=True)
    def keep(frame, word, value):
        store(frame + u32(4 * word), u32(value))

    @cuda.jit(device=True, forceinline=True)
    def recall(frame, word):
        return i32(load(frame + u32(4 * word)))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def recall_factors(factors, frame):
        for i in unroll(n_factors):
            factors[i] = load(frame + u32(4 * (FIRST_FACTOR + i)))

    return keep, recall, recall_factors
