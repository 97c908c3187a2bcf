"""What a CTA of the decode kernel has to read, worked out on the device from the length of its sequence.

==============  ====================================================================================================
in 16 bits      tokens [.., sink_stop), unless a window hides them all, and [ring_first, length), in tiles of 16
in NVFP4        tokens [sink_tokens, stop), in tiles of 64 from ``begin`` on, a multiple of 64
==============  ====================================================================================================

The splits of a sequence have equal numbers of NVFP4 tiles, but for the last; all tiles in 16 bits are those of the split in
which the NVFP4 tiles end, or of the one after.
"""

from __future__ import annotations

from nbfmha.kernels.tile_sixteen import TOKENS as SIXTEEN
from nbfmha.kv_layout import BLOCK
from nbfmha.recipe import TILE_N


def make_share():
    """Device function ``(length, first_position, window_left, recent_tokens, sink_tokens, num_splits, split, split_tiles)
    -> (begin, stop, own_from, own_to, sink_stop, sink_tiles, ring_first, sixteen)``.

    first_position: of the first query of the CTA's rows. The split has NVFP4 tiles ``own_from`` to ``own_to``, then
    ``sixteen`` tiles in 16 bits, of which the first ``sink_tiles`` are sinks; at least ``split_tiles`` of the former.
    """
    from numba import cuda
    from numba.core import types

    u32, i32 = types.uint32, types.int32

    @cuda.jit(device=True, forceinline=True)
    def share(length, first_position, window_left, recent_tokens, sink_tokens, num_splits, split, split_tiles):
        seen_from = i32(max(i32(first_position - window_left), i32(0)))
        stop = i32(max(i32(length - recent_tokens), i32(0)))
        if recent_tokens > i32(0):
            stop &= i32(-BLOCK)
        begin = i32(i32(max(seen_from, sink_tokens)) & i32(-TILE_N))
        tiles = i32(max(i32(stop - max(begin, sink_tokens)), i32(0)))
        tiles = i32((stop - begin + i32(TILE_N - 1)) >> i32(6)) if tiles > i32(0) else i32(0)
        sink_stop = i32(min(sink_tokens, length))
        sink_tiles = i32(u32(sink_stop + i32(SIXTEEN - 1)) // u32(SIXTEEN)) if seen_from < sink_stop else i32(0)
        ring_first = i32(max(max(stop, sink_tokens), i32(seen_from & i32(-SIXTEEN))))
        ring_tiles = i32(u32(max(i32(length - ring_first), i32(0)) + i32(SIXTEEN - 1)) // u32(SIXTEEN))
        sixteen = i32(sink_tiles + ring_tiles)
        own_from, own_to, sixteen_split = i32(0), tiles, i32(0)
        if num_splits > i32(1):
            each = i32(max(split_tiles, i32(u32(tiles + sixteen + num_splits - i32(1)) // u32(num_splits))))
            own_from = i32(min(i32(split * each), tiles))
            own_to = i32(min(i32(own_from + each), tiles))
            sixteen_split = i32(u32(tiles + max(sixteen, i32(1)) - i32(1)) // u32(each))
            sixteen_split = i32(min(sixteen_split, i32(num_splits - i32(1))))
        if split != sixteen_split:
            sixteen = i32(0)
        return begin, stop, own_from, own_to, sink_stop, sink_tiles, ring_first, sixteen

    return share
