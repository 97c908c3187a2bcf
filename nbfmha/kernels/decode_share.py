"""What a team of the decode kernel has to read, worked out on the device from the length of its sequence.

==============  ====================================================================================================
in 16 bits      tokens [.., sink_stop), unless a window hides them all, and [ring_first, length), in tiles of 16
in NVFP4        tokens [sink_tokens, stop), in tiles of 64 from ``begin`` on, a multiple of 64
==============  ====================================================================================================

All of them, those in NVFP4 first, are dealt to the splits one by one, and of a split's to its warps, the last warp first:
every warp has as many as any other, or one less, and where its first one is does not depend on the length unless a window
hides tokens.
"""

from __future__ import annotations

from nbfmha.kernels.tile_sixteen import TOKENS as SIXTEEN
from nbfmha.kv_layout import BLOCK
from nbfmha.recipe import TILE_N


def make_begin():
    """Device function ``(seen_from, sink_tokens) -> i32``: the first NVFP4 tile's first token, a multiple of 64. seen_from:
    the first token that a row of the team sees, or any before the sinks' end."""
    from numba import cuda
    from numba.core import types

    i32 = types.int32

    @cuda.jit(device=True, forceinline=True)
    def begin_of(seen_from, sink_tokens):
        return i32(max(seen_from, sink_tokens) & i32(-TILE_N))

    return begin_of


def make_stop():
    """Device function ``(length, recent_tokens) -> i32``: where the tokens in NVFP4 end."""
    from numba import cuda
    from numba.core import types

    i32 = types.int32

    @cuda.jit(device=True, forceinline=True)
    def stop_of(length, recent_tokens):
        stop = i32(max(i32(length - recent_tokens), i32(0)))
        return i32(stop & i32(-BLOCK)) if recent_tokens > i32(0) else stop

    return stop_of


def make_share():
    """Device function ``(length, first_position, begin, stop, window_left, sink_tokens) -> (stop_n, sink_stop, sink_tiles,
    ring_first, sixteen)``.

    first_position: of the first query of the team's rows. ``begin``: of ``make_begin``. NVFP4 tiles begin before
    ``stop_n``, which is a multiple of 64 tokens behind ``begin``; then come ``sixteen`` tiles in 16 bits, of which the
    first ``sink_tiles`` are sinks.
    """
    from numba import cuda
    from numba.core import types

    u32, i32 = types.uint32, types.int32

    @cuda.jit(device=True, forceinline=True)
    def share(length, first_position, begin, stop, window_left, sink_tokens):
        seen_from = i32(max(i32(first_position - window_left), i32(0)))
        tiles = i32(max(i32(stop - max(begin, sink_tokens)), i32(0)))
        tiles = i32((stop - begin + i32(TILE_N - 1)) >> i32(6)) if tiles > i32(0) else i32(0)
        sink_stop = i32(min(sink_tokens, length))
        sink_tiles = i32(u32(sink_stop + i32(SIXTEEN - 1)) // u32(SIXTEEN)) if seen_from < sink_stop else i32(0)
        ring_first = i32(max(max(stop, sink_tokens), i32(seen_from & i32(-SIXTEEN))))
        ring_tiles = i32(u32(max(i32(length - ring_first), i32(0)) + i32(SIXTEEN - 1)) // u32(SIXTEEN))
        sixteen = i32(sink_tiles + ring_tiles)
        return i32(begin + i32(tiles * i32(TILE_N))), sink_stop, sink_tiles, ring_first, sixteen

    return share
