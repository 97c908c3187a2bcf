"""One float32 scale a row, for the plain FP4 MMA: how ``q``, ``k`` and ``v`` of the pre-pass quantise by it.

The bit-level contract stands in :mod:`nbfmha.row_scales`. A row of q and k lies in neighbouring lanes, which find its
largest by shuffles. A row of v is a channel over the tokens of a sequence, so its scale comes first:

============  ============================================================================================================
``v_peaks``   CTA = (kv head, tile of 64 tokens, up to 128 channels): largest magnitude of each channel, as 16-bit patterns,
              two channels a word
``v_scales``  CTA = (kv head, sequence, 32 channels): scales, from the peaks of the sequence's tiles
============  ============================================================================================================

Magnitudes of f16 and bf16 order like their bits, NaN above all, so that integer maxima keep NaN. Needs sm_80.
"""

from __future__ import annotations

import functools

from nbfmha.kernels.prepass_load import channels_of_v, code_cols, make_load_pair, make_widen_pair, threads_of_v
from nbfmha.recipe import TILE_N
from ptx_inline.toolchain import Kernel

SCALE_CHANNELS = 32
_PARTS = 16
SCALE_THREADS = SCALE_CHANNELS // 2 * _PARTS


def make_encode():
    """Device function ``(values: f32[16], s, packed: u32[2])``: E2M1 codes of values / s, low nibble first; zeros where the
    scale is 0 or NaN."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32 = types.float32, types.uint32
    e2m1x2 = dev.cvt_rn_satfinite_e2m1x2_f32

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def encode(values, s, packed):
        some = s > f32(0)
        divisor = s if some else f32(1)
        for w in unroll(2):
            word = u32(0)
            for i in unroll(4):
                word |= e2m1x2(values[8 * w + 2 * i + 1] / divisor, values[8 * w + 2 * i] / divisor) << u32(8 * i)
            packed[w] = word if some else u32(0)

    return encode


def _make_scale_of():
    """Device function ``(bits) -> f32``: the scale of a row whose largest magnitude has these f32 bits."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u32, float_of = types.float32, types.uint32, dev.mov_f32_b32

    @cuda.jit(device=True, forceinline=True)
    def scale_of(bits):
        return float_of(bits) / f32(6) if bits < u32(0x7F800000) else float_of(u32(0x7FFFFFFF))

    return scale_of


def make_store_rows(head_dim: int):
    """Device function ``(codes: u32*, scales: f32*, values: f32[16], row, col, present)``, called by all lanes of a warp,
    ``code_cols`` neighbours a row: 16 channels of row ``row`` (i64) quantised, and written where ``present``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i64 = types.uint32, types.int64
    bfly, abs_f32, store_v2 = dev.shfl_sync_bfly_f32, dev.abs_f32, dev.st_global_v2_u32
    bits_of, float_of = dev.mov_b32_f32, dev.mov_f32_b32
    encode, scale_of = make_encode(), _make_scale_of()
    cols = code_cols(head_dim)
    halvings = cols.bit_length() - 1

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def store_rows(codes, scales, values, row, col, present):
        largest = u32(0)
        for c in unroll(16):
            largest = max(largest, bits_of(abs_f32(values[c])))
        for i in unroll(halvings):
            largest = max(largest, bits_of(bfly(float_of(largest), u32(1 << i))))
        s = scale_of(largest)
        packed = cuda.local.array(2, u32)
        encode(values, s, packed)
        if present:
            store_v2(codes, (row * i64(cols) + i64(col)) * i64(2), packed[0], packed[1])
            if col == u32(0):
                scales[row] = s

    return store_rows


def _make_larger():
    """Device function ``(x, y) -> u32``: the larger of both halves of two words, as unsigned numbers."""
    from numba import cuda
    from numba.core import types

    u32 = types.uint32

    @cuda.jit(device=True, forceinline=True)
    def larger(x, y):
        low, high = max(x & u32(0xFFFF), y & u32(0xFFFF)), max(x >> u32(16), y >> u32(16))
        return low | (high << u32(16))

    return larger


def make_v_peaks(dtype: str, head_dim: int):
    """Kernel ``v_peaks(peaks, v, key_tiles, v_b, v_h, v_t, tiles, num_heads_kv)``: peaks u32 (heads_kv, tiles,
    head_dim / 2)."""
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    load_pair, larger = make_load_pair(dtype), _make_larger()
    pairs, row_pairs, parts = channels_of_v(head_dim) // 2, head_dim // 2, head_dim // channels_of_v(head_dim)
    groups = threads_of_v(head_dim) // pairs
    tokens = TILE_N // groups

    @unrolled
    def v_peaks(peaks, v, key_tiles, v_b, v_h, v_t, tiles, num_heads_kv):
        staged = cuda.shared.array((groups, pairs), u32)
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        pair, group = thread % u32(pairs), thread // u32(pairs)
        part, other = cta % i32(parts), cta // i32(parts)
        head, tile = other // tiles, other % tiles
        first = i32(u32(tokens) * group)
        source, left = key_tiles[4 * tile] + first, key_tiles[4 * tile + 1] - first
        row_pair = i64(part) * i64(pairs) + i64(pair)
        at = i64(head // num_heads_kv) * v_b + i64(head % num_heads_kv) * v_h + i64(source) * v_t + i64(2) * row_pair
        peak = u32(0)
        for i in unroll(tokens):
            if i32(i) < left:
                peak = larger(peak, load_pair(v, at + i64(i) * v_t) & u32(0x7FFF7FFF))
        staged[group, pair] = peak
        cuda.syncthreads()
        if group == u32(0):
            for g in unroll(1, groups):
                peak = larger(peak, staged[g, pair])
            peaks[(i64(head) * i64(tiles) + i64(tile)) * i64(row_pairs) + row_pair] = peak

    return v_peaks


def make_v_scales(dtype: str, head_dim: int):
    """Kernel ``v_scales(scales, peaks, sequences, tiles, n_sequences)``: scales f32 (heads_kv, n_sequences, head_dim)."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    u32, i32, i64 = types.uint32, types.int32, types.int64
    bits_of = dev.mov_b32_f32
    widen_pair, larger, scale_of = make_widen_pair(dtype), _make_larger(), _make_scale_of()
    pairs, slabs, row_pairs = SCALE_CHANNELS // 2, head_dim // SCALE_CHANNELS, head_dim // 2

    @unrolled
    def v_scales(scales, peaks, sequences, tiles, n_sequences):
        staged = cuda.shared.array((_PARTS, pairs), u32)
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        lane, part = thread % u32(pairs), thread // u32(pairs)
        slab, row = cta % i32(slabs), cta // i32(slabs)
        head, sequence = row // n_sequences, row % n_sequences
        pair = i64(slab) * i64(pairs) + i64(lane)
        peak = u32(0)
        for tile in range(sequences[3 * sequence] + i32(part), sequences[3 * sequence + 1], _PARTS):
            peak = larger(peak, peaks[(i64(head) * i64(tiles) + i64(tile)) * i64(row_pairs) + pair])
        staged[part, lane] = peak
        cuda.syncthreads()
        if part == u32(0):
            for p in unroll(1, _PARTS):
                peak = larger(peak, staged[p, lane])
            even, odd = widen_pair(peak)
            at = i64(row) * i64(head_dim) + i64(2) * pair
            scales[at] = scale_of(bits_of(even))
            scales[at + i64(1)] = scale_of(bits_of(odd))

    return v_scales


@functools.cache
def v_peaks_kernel(dtype: str, head_dim: int) -> Kernel:
    """The ``v_peaks`` kernel for these constants."""
    signature = ("u32*", "u32*", "i32*", *("i64",) * 3, *("i32",) * 2)
    constants = {"dtype": dtype, "head_dim": head_dim}
    return Kernel(make_v_peaks, signature, constants, launch_bounds=(threads_of_v(head_dim),))


@functools.cache
def v_scales_kernel(dtype: str, head_dim: int) -> Kernel:
    """The ``v_scales`` kernel for these constants; ``dtype`` "float16" stands for float32 too."""
    signature = ("f32*", "u32*", "i32*", "i32", "i32")
    return Kernel(make_v_scales, signature, {"dtype": dtype, "head_dim": head_dim}, launch_bounds=(SCALE_THREADS,))
