"""How large a decode launch is: rows and warps of a team, its shared memory, teams of a CTA, splits of the sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nbfmha.kernels.decode_frame import FRAME
from nbfmha.kernels.decode_rows import Q_TILE
from nbfmha.kernels.out_columns import result_pitch
from nbfmha.kernels.paged_products import words_of_lane
from nbfmha.kernels.tile_16bit import row_pitch
from nbfmha.kernels.tile_paged import PagedStage
from nbfmha.kernels.tile_sixteen import TOKENS as SIXTEEN
from nbfmha.kv_layout import BLOCK, HEAD_DIMS, CacheLayout
from nbfmha.problem import Problem
from nbfmha.recipe import TILE_N
from ptx_inline.isa.shared_memory import shared_limit
from ptx_inline.toolchain import Target

RESIDENT_WARPS = {
    (64, 1): 16, (64, 2): 16, (64, 4): 8, (128, 1): 16, (128, 2): 12, (128, 4): 8, (256, 1): 8, (256, 2): 8
}  # fmt: skip
"""Warps whose registers an SM holds at once, by head_dim and query tiles: 16 have 128 registers a thread, 12 168, 8 255."""
TEAM_WARPS = (4, 8, 16)
TEAMS = (4, 2, 1)
"""Of a CTA."""
MAX_BATCH = 65535
"""Sequences of a call: of a grid's z."""


@dataclass(frozen=True)
class ContiguousLayout:
    """Sequences that are one page each, all of it in NVFP4 without a mean, in the words of ``CacheLayout``.

    ``page_size``: tokens of each, a multiple of 16 of any size.
    """

    num_heads_kv: int
    head_dim: int
    page_size: int
    dtype: str
    recent_tokens: int = 0
    sink_tokens: int = 0
    ring_tokens: int = 0

    def quantized_tokens(self, length: int) -> int:
        """All of them."""
        return length


Layout = CacheLayout | ContiguousLayout


def q_tiles_of(head_dim: int, rows: int) -> int:
    """Tiles of 8 rows that a team has, for so many rows of a head of K and V: more of them share the work for each element
    of the cache, as far as their accumulators fit the registers."""
    most = 4 if head_dim <= 128 else 2
    return next((tiles for tiles in (1, 2) if rows <= Q_TILE * tiles), most)


def row_tiles_of(head_dim: int, rows: int) -> int:
    """Teams that share so many rows."""
    return -(-rows // (Q_TILE * q_tiles_of(head_dim, rows)))


@dataclass(frozen=True)
class Memory:
    """Dynamic shared memory of a team, in bytes: parts and offsets. Those of a CTA lie one behind the other.

    Q as it came; q_tile: Q for the NVFP4 tiles; shifts: q . km, f32; mean: km; frame: ``FRAME`` words of the team's own;
    then a place for each warp, in which K and V of its tile lie, and its result at the end.
    """

    implementation: str
    head_dim: int
    q_tiles: int

    @property
    def stage(self) -> PagedStage:
        """Of an NVFP4 tile."""
        return PagedStage(self.head_dim, words_of_lane(self.head_dim, self.q_tiles) if self._widens else 0)

    @property
    def _widens(self) -> bool:
        return self.implementation == "dequant"

    @property
    def q_tile(self) -> int:
        return Q_TILE * self.q_tiles * row_pitch(self.head_dim)

    @property
    def shifts(self) -> int:
        row = row_pitch(self.head_dim) if self._widens else self.head_dim // 2 + self.head_dim // BLOCK
        return self.q_tile + Q_TILE * self.q_tiles * row

    @property
    def mean(self) -> int:
        return self.shifts + 4 * Q_TILE * self.q_tiles

    @property
    def frame(self) -> int:
        return self.mean + 4 * self.head_dim

    @property
    def warps(self) -> int:
        """Offset of the first warp's place: lines of 128, to be copied to in lines."""
        return -(-(self.frame + 4 * FRAME) // 128) * 128

    @property
    def pages(self) -> int:
        """Offset in a warp's place of 32 pairs of words: page, and place in it, of its next tiles."""
        return max(self.stage.bytes, Q_TILE * self.q_tiles * result_pitch(self.head_dim))

    @property
    def warp_bytes(self) -> int:
        return self.pages + 8 * 32

    def bytes(self, warps: int) -> int:
        """Of a team of so many warps: lines of 128, as its parts are."""
        return self.warps + warps * self.warp_bytes


def why_not(layout: Layout, rows: int, implementation: str, target: Target) -> str | None:
    """Why ``implementation`` cannot decode ``rows`` rows a head of K and V on ``target``, in words; None where it can."""
    if implementation == "blockscale" and not target.has_block_scale_mma:
        return f"the block-scale MMA needs sm_120a or sm_121a, this is {target}"
    if layout.head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {layout.head_dim}"
    needed = Memory(implementation, layout.head_dim, q_tiles_of(layout.head_dim, rows)).bytes(min(TEAM_WARPS))
    if needed > shared_limit(target.name):
        return f"needs {needed} bytes of shared memory a CTA, {target} has {shared_limit(target.name)}"
    return None


@dataclass(frozen=True)
class Splits:
    """How a call is divided: teams of one split, splits, warps of a team, and teams of a CTA.

    A team is what has one sequence, one head of K and V and one tile of rows, or a split of them.
    """

    teams: int
    num_splits: int
    warps: int
    teams_a_cta: int = 1


#: Microseconds, fitted to 30 shapes on an H200 (bench/HISTORY.md): a tile of each warp of an SM takes the first, and of
#: every warp there the second besides; a team's beginning and end; a merge of splits, and each of them.
_ROUND_US, _TILE_US, _ENDS_US, _MERGE_US, _SPLIT_US = 1.36, 0.184, 0.8, 3.93, 0.073


def teams_of(teams: int, num_splits: int, resident: int, multiprocessors: int, choices: Sequence[int] = TEAMS) -> int:
    """Teams of a CTA, one of ``choices``, for so many ``teams`` of a split, of which an SM holds ``resident``: as many, or
    a half or a quarter of them, if no SM has more of them for it.

    Of several CTAs an SM prefers the one that began first: of four alike one is done 6 % before the mean of them, the last
    one 8 % behind it, and by itself it keeps neither SM nor memory busy (H200). Teams of one CTA go at one pace.
    """
    launched = teams * num_splits

    def most(n: int) -> int:
        """Of an SM, with ``n`` in a CTA."""
        return n * -(-launched // (n * multiprocessors))

    return next(n for n in choices if resident % n == 0 and teams % n == 0 and most(n) <= most(1))


def choose_splits(
    layout: Layout,
    problem: Problem,
    max_length: int,
    num_splits: int | None,
    *,
    implementation: str,
    target: Target,
    multiprocessors: int,
    team_warps: Sequence[int] = TEAM_WARPS,
    teams_a_cta: Sequence[int] = TEAMS,
) -> Splits:
    """Splits and warps a team for sequences of up to ``max_length`` tokens: those that a plain model of the time likes
    best, in which teams come in waves, and the warps of an SM take a tile each in turn. A split has a tile a warp at
    least, and all of them are there at once. ``team_warps``, ``teams_a_cta``: those to choose from, the latter by
    ``teams_of``. ``num_splits``: as many, if it is given. Every sequence is divided by its own length, so that a
    ``max_length`` far above it costs splits without tokens, no more.
    """
    head_dim, rows = layout.head_dim, problem.seqlen_q * problem.qhead_per_kvhead
    q_tiles = q_tiles_of(head_dim, rows)
    teams = problem.batch * problem.num_heads_kv * row_tiles_of(head_dim, rows)
    left, _ = problem.bounds
    quantised = layout.quantized_tokens(max_length)
    if left is not None:
        quantised = min(quantised, left + problem.seqlen_q + TILE_N)
    work = -(-quantised // TILE_N) + (layout.sink_tokens + layout.ring_tokens) // SIXTEEN
    if num_splits is not None or not teams:
        return Splits(teams, num_splits or 1, min(team_warps))
    memory, limit = Memory(implementation, head_dim, q_tiles), shared_limit(target.name)
    found = []  # (microseconds, splits, warps, teams that an SM holds)
    for warps in team_warps:
        own = memory.bytes(warps)
        # the driver keeps 1 KiB of each CTA's shared memory
        resident = min(RESIDENT_WARPS[head_dim, q_tiles] // warps, (limit + 1024) // (own + 1024))
        if own > limit or not resident:
            continue
        slots = multiprocessors * resident
        for splits in range(1, max(1, min(work // warps, slots // teams)) + 1):
            launched = teams * splits
            share = work / splits
            teams_there = min(resident, -(-launched // multiprocessors))
            time = max(share / warps, 1) * _ROUND_US + share * teams_there * _TILE_US + _ENDS_US
            time *= -(-launched // slots)
            found.append((time + (_MERGE_US + _SPLIT_US * splits if splits > 1 else 0.0), splits, warps, resident))
    _, splits, warps, resident = min(found)
    return Splits(teams, splits, warps, teams_of(teams, splits, resident, multiprocessors, teams_a_cta))
