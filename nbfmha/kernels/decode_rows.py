"""Rows of a team of the decode kernel: which of them a lane has, where they stand, what is added to their scores, what they
see. Row r is query token r / group of head ``kv_head * group + r % group``, so that neighbouring rows are neighbours in
memory; a query tile has ``Q_TILE`` rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from nbfmha.kernels.decode_frame import FIRST_ROW, POSITION
from nbfmha.kernels.decode_merge import LOG2E

Q_TILE = 8


class Rows(NamedTuple):
    """Rows of a team, i32: sequence, head of K and V, number of its first row among those of that head, how many those are;
    heads that share one of K and V, query tokens and heads of the call. number: i64, of these rows among all teams of a
    split."""

    number: Any
    batch: Any
    kv_head: Any
    first_row: Any
    rows: Any
    group: Any
    q_len: Any
    heads: Any


def make_find_rows(team_rows: int, threads: int, teams: int):
    """Device functions ``find_team(num_heads_kv, row_tiles) -> (team, thread, batch, pair, pairs, split)``: which team of
    its CTA a thread is in, and its number there; and what that team has: ``pair`` is head of K and V times ``row_tiles``
    and tile of rows, one of ``pairs`` of a sequence. ``rows_of(batch, pair, pairs, num_heads_kv, row_tiles, group, q_len)
    -> Rows``. team_rows, threads: of a team; teams: of a CTA.

    Teams of a CTA are as far apart as there are CTAs: those of a sequence that is longer than others are on many SMs.
    The compiler does not know that ``find_team`` finds the same each time."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, i32, i64, unknown = types.uint32, types.int32, types.int64, dev.unknown_u32

    @cuda.jit(device=True, forceinline=True)
    def find_team(num_heads_kv, row_tiles):
        thread, team = i32(cuda.threadIdx.x), i32(0)
        pair, split, batch = i32(cuda.blockIdx.x), i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        if teams == 1:
            return team, thread, batch, pair, i64(cuda.gridDim.x), split
        thread = i32(unknown(u32(thread)))
        team = i32(u32(thread) // u32(threads))
        number, pairs = u32(team * i32(cuda.gridDim.x) + pair), i32(num_heads_kv * row_tiles)
        batch = i32(number // u32(pairs))
        return team, i32(thread - team * i32(threads)), batch, i32(number - u32(batch * pairs)), i64(pairs), split

    @cuda.jit(device=True, forceinline=True)
    def rows_of(batch, pair, pairs, num_heads_kv, row_tiles, group, q_len):
        number, kv_head, row_tile = i64(batch) * pairs + i64(pair), pair, i32(0)
        if row_tiles > i32(1):
            row_tile, kv_head = i32(u32(kv_head) % u32(row_tiles)), i32(u32(kv_head) // u32(row_tiles))
        first_row, rows, heads = i32(row_tile * i32(team_rows)), i32(q_len * group), i32(num_heads_kv * group)
        return Rows(number, batch, kv_head, first_row, rows, group, q_len, heads)

    return find_team, rows_of


def make_token_of():
    """Device function ``(query, group, q_len) -> i32``: which query token a row is of."""
    from numba import cuda
    from numba.core import types

    u32, i32 = types.uint32, types.int32

    @cuda.jit(device=True, forceinline=True)
    def token_of(query, group, q_len):
        return i32(0) if q_len == i32(1) else i32(u32(query) // u32(group))

    return token_of


def make_places_of():
    """Device function ``(own: Rows, row) -> (head, row of out, place of the LSE)``. 32 bits: no memory has 2^32 rows of 128
    bytes."""
    from numba import cuda
    from numba.core import types

    u32, i32, token_of = types.uint32, types.int32, make_token_of()

    @cuda.jit(device=True, forceinline=True)
    def places_of(own, row):
        query, first_head = i32(own.first_row + row), i32(own.kv_head * own.group)
        token = token_of(query, own.group, own.q_len)
        head = i32(first_head + query - token * own.group)
        out_row = u32((own.batch * own.q_len + token) * own.heads + head)
        return head, out_row, u32((own.batch * own.heads + head) * own.q_len + token)

    return places_of


def make_shifts(general: bool):
    """Device functions ``shift_of(shifts, i, e, lane)``: q . km of column ``e`` of the lane's two of query tile ``i``; and
    ``shift2_of(shifts, row, softmax_scale, cap)``: what is yet to be added to a row's logarithm, in log2 units: with a
    softcap (``general``) the shift is in the scores. shifts: address in shared memory."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    f32, u32, load, float_of, row_of = types.float32, types.uint32, dev.ld_shared_u32, dev.mov_f32_b32, _make_row_of()

    @cuda.jit(device=True, forceinline=True)
    def shift_of(shifts, i, e, lane):
        return float_of(load(shifts + u32(4) * row_of(i, e, lane)))

    @cuda.jit(device=True, forceinline=True)
    def shift2_of(shifts, row, softmax_scale, cap):
        if general and cap != f32(0):
            return f32(0)
        return float_of(load(shifts + u32(4) * u32(row))) * softmax_scale * f32(LOG2E)

    return shift_of, shift2_of


def make_find_bounds(recall):
    """Device function ``(low: i32[2], high: i32[2], i, lane, frame, group, q_len, window_left, first, stop)``: tokens [low,
    high) of [first, stop) that the lane's two rows of query tile ``i`` see. recall: of ``decode_frame.make_frame``."""
    from numba import cuda
    from numba.core import types

    from ptx_inline.unroll import unroll, unrolled

    u32, i32, token_of, row_of = types.uint32, types.int32, make_token_of(), _make_row_of()

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def find_bounds(low, high, i, lane, frame, group, q_len, window_left, first, stop):
        for e in unroll(2):
            row = i32(recall(frame, FIRST_ROW) + i32(row_of(i, u32(e), lane)))
            own = i32(recall(frame, POSITION) + token_of(row, group, q_len))
            low[e] = i32(max(i32(own - window_left), first))
            high[e] = i32(min(own + i32(1), stop))

    return find_bounds


def _make_row_of():
    """Device function ``(i, e, lane) -> u32``: which of the team's rows is column ``e`` of the lane's two of query tile
    ``i``."""
    from numba import cuda
    from numba.core import types

    u32, i32 = types.uint32, types.int32

    @cuda.jit(device=True, forceinline=True)
    def row_of(i, e, lane):
        return u32(Q_TILE) * i + u32(2) * u32(lane & i32(3)) + e

    return row_of
