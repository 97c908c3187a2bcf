"""Tiles in 16 bits of the decode kernel: which tokens of sinks or ring they are, and what their scores weigh. Their bytes
and products: :mod:`tile_sixteen`."""

from __future__ import annotations

from nbfmha.kernels.decode_frame import KV_HEAD, LENGTH, RING_FIRST, RING_PLACE, SINK_STOP, SINK_TILES, SLOT
from nbfmha.kernels.tile_sixteen import TOKENS as SIXTEEN
from nbfmha.kv_layout import BLOCK


def _make_find(recall):
    """Device function ``(frame, tile) -> (in the sinks, first token, end of the tokens there)`` of such a tile."""
    from numba import cuda
    from numba.core import types

    i32 = types.int32

    @cuda.jit(device=True, forceinline=True)
    def find(frame, tile):
        sink_tiles = recall(frame, SINK_TILES)
        if tile < sink_tiles:
            return True, i32(i32(SIXTEEN) * tile), recall(frame, SINK_STOP)
        return False, i32(recall(frame, RING_FIRST) + i32(SIXTEEN) * i32(tile - sink_tiles)), recall(frame, LENGTH)

    return find


def make_load(head_dim: int, recall):
    """Device function ``(smem, sinks, recent, tile, frame, num_heads_kv, sink_tokens, recent_tokens, lane)``: a warp brings
    K or V of such a tile. recall: of ``decode_frame.make_frame``."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import tile_sixteen

    u32, i32, i64 = types.uint32, types.int32, types.int64
    find, load_rows = _make_find(recall), tile_sixteen.make_load_rows(head_dim)

    @cuda.jit(device=True, forceinline=True)
    def load(smem, sinks, recent, tile, frame, num_heads_kv, sink_tokens, recent_tokens, lane):
        in_sinks, token, stop = find(frame, tile)
        sequence = u32(recall(frame, SLOT)) * u32(num_heads_kv) + u32(recall(frame, KV_HEAD))
        places, place = i32(sink_tokens), token
        if not in_sinks:
            places = i32(recent_tokens + i32(BLOCK))
            place = i32(recall(frame, RING_PLACE) + i32(token - recall(frame, RING_FIRST)))
            if place >= places:
                place = i32(place - places)
        row = i64(sequence) * i64(u32(places)) + i64(u32(place))
        load_rows(smem, sinks if in_sinks else recent, row * i64(2 * head_dim), i32(stop - token), lane)

    return load


def make_score(head_dim: int, dtype: str, q_tiles: int, shift_of):
    """Device function ``(acc_s: f32[q_tiles, >= 1, 4], plain, stage, shifts, lane)``: scores of such a tile without
    q . km, as those of NVFP4 tiles come. shift_of: of ``decode_rows.make_shifts``."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import tile_sixteen
    from ptx_inline.unroll import unroll, unrolled

    u32, qk = types.uint32, tile_sixteen.make_qk(head_dim, dtype, q_tiles)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def score(acc_s, plain, stage, shifts, lane):
        for i in unroll(q_tiles):
            for e in unroll(2):
                shift = shift_of(shifts, u32(i), u32(e), lane)
                for half in unroll(2):
                    acc_s[i, 0, 2 * half + e] = -shift
        qk(acc_s, plain, stage, lane)

    return score


def make_weigh(dtype: str, q_tiles: int, general: bool, recall, shift_of, find_bounds, rescale):
    """Device function ``(acc_o, row_max: f32[q_tiles, 2], row_sum, acc_s, p, tile, frame, group, q_len, window_left,
    shifts, scale, softmax_scale, cap, lane)``: masks and weighs the scores of such a tile, and leaves P in ``dtype``.

    general: as in ``decode_device.make_decode``. recall, shift_of, find_bounds, rescale: of ``decode_frame``,
    ``decode_rows`` and ``out_columns``."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import out_columns, softmax_columns
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, find = types.float32, types.uint32, types.int32, _make_find(recall)
    pack, mask = out_columns.make_pack_columns(dtype, q_tiles, 1), softmax_columns.make_mask_columns("rows", 1)
    general_scores, weights = softmax_columns.make_general_columns(1), softmax_columns.make_weights_columns(1)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def weigh(
        acc_o, row_max, row_sum, acc_s, p, tile, frame, group, q_len, window_left, shifts, scale, softmax_scale, cap,
        lane,
    ):  # fmt: skip
        factor = cuda.local.array(2, f32)
        shifted = cuda.local.array(2, f32)
        low = cuda.local.array(2, i32)
        high = cuda.local.array(2, i32)
        _, token, stop = find(frame, tile)
        for i in unroll(q_tiles):
            if general:
                for e in unroll(2):
                    shifted[e] = shift_of(shifts, u32(i), u32(e), lane)
                general_scores(acc_s[i], shifted, softmax_scale, cap)
            find_bounds(low, high, u32(i), lane, frame, group, q_len, window_left, i32(0), stop)
            mask(acc_s[i], low, high, token, lane)
            weights(acc_s[i], row_max[i], row_sum[i], factor, scale)
            rescale(acc_o, u32(i), factor)
        pack(p, acc_s)

    return weigh
