"""The launch of the decode kernel: its arguments, from a cache and a problem."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from nbfmha import gpu_arrays
from nbfmha.gpu_arrays import Launch
from nbfmha.kernels.decode_device import make_decode
from nbfmha.kernels.decode_sizes import RESIDENT_WARPS, Layout, Memory, Splits, q_tiles_of, row_tiles_of
from nbfmha.kernels.tile_paged import pages_of
from nbfmha.kv_layout import CacheArrays
from nbfmha.problem import NO_LIMIT, Problem
from ptx_inline.toolchain import Kernel

IMPLEMENTATIONS = ("blockscale", "dequant")
MAX_QUERIES = 16

#: Types of: seq_ids, lengths, tables; q, k_mean, k_codes, k_scales as bytes; 2 flags, num_splits ... window_left; v_codes
#: to v_sinks as bytes; out, lse; part, part_lse; sinks; tickets; 3 flags, batch_size, num_slots; softmax_scale, cap.
#: What is needed first stands first: constant memory comes in lines of 64 bytes, for each of which all warps wait.
SIGNATURE = (
    *("i32*",) * 3, *("u8*",) * 4, *("i32",) * 12, *("u8*",) * 6, "u32*", "f32*", "u32*", "f32*", "f32*", "u32*",
    *("i32",) * 5, "f32", "f32",
)  # fmt: skip


@functools.cache
def decode_kernel(
    implementation: str, head_dim: int, dtype: str = "float16", q_tiles: int = 1, general: bool = False,
    pages: str = "tile", warps: int = 4, teams: int = 1,
) -> Kernel:
    """The kernel for these constants, see ``make_decode``."""
    constants = {
        "implementation": implementation, "head_dim": head_dim, "dtype": dtype, "q_tiles": q_tiles, "general": general,
        "pages": pages, "warps": warps, "teams": teams,
    }  # fmt: skip
    bounds = 32 * warps * teams, RESIDENT_WARPS[head_dim, q_tiles] // (warps * teams)
    return Kernel(make_decode, SIGNATURE, constants, launch_bounds=bounds, programmatic=True)


def part_shapes(layout: Layout, problem: Problem, splits: Splits) -> tuple[tuple[int, ...], ...]:
    """Of ``part`` and ``part_lse``, float32, in which splits leave their results; empty where there is one split."""
    rows = problem.batch * problem.seqlen_q * problem.num_heads_q
    count = splits.num_splits
    return ((count, rows, layout.head_dim), (count, rows)) if count > 1 else ()


def launch_of(
    q: Any,
    layout: Layout,
    arrays: CacheArrays,
    seq_ids: Any | None,
    problem: Problem,
    splits: Splits,
    *,
    implementation: str,
    out: Any,
    lse: Any,
    sinks: Any,
    parts: Sequence[Any],
    tickets: Any,
) -> Launch:
    """What one pass queues. parts: arrays of ``part_shapes``, and tickets: int32 zeros, ``splits.teams`` or more, which are
    zeros again afterwards; with one split () and None. The others as in ``decode``."""
    group, head_dim = problem.qhead_per_kvhead, layout.head_dim
    rows = problem.seqlen_q * group
    q_tiles, warps, (window_left, _) = q_tiles_of(head_dim, rows), splits.warps, problem.limits
    part, part_lse = parts or (None, None)
    # whether the kernel gives hints (decode_hints)
    early = seq_ids is not None and splits.num_splits > 1 and window_left >= NO_LIMIT
    given = (
        seq_ids, arrays.lengths, arrays.block_tables, q, arrays.k_mean, arrays.k_codes, arrays.k_scales,
        int(early), int(seq_ids is not None), splits.num_splits, row_tiles_of(head_dim, rows),
        problem.seqlen_q, layout.num_heads_kv, group, layout.page_size,
        0 if seq_ids is None else arrays.block_tables.shape[1], layout.recent_tokens, layout.sink_tokens, window_left,
        arrays.v_codes, arrays.v_scales, arrays.k_recent, arrays.v_recent, arrays.k_sinks, arrays.v_sinks,
        out, lse, part, part_lse, sinks, tickets, int(lse is not None), int(sinks is not None),
        int(arrays.lengths is not None), problem.batch,
        0 if seq_ids is None else arrays.block_tables.shape[0], problem.softmax_scale, problem.softcap or 0.0,
    )  # fmt: skip
    arguments = tuple(0 if argument is None else argument for argument in given)
    general = problem.softcap is not None or problem.softmax_scale <= 0
    pages = pages_of(layout.page_size)
    teams = splits.teams_a_cta
    kernel = decode_kernel(implementation, head_dim, layout.dtype, q_tiles, general, pages, warps, teams)
    smem_bytes = teams * Memory(implementation, head_dim, q_tiles).bytes(warps)
    # heads first: their parts of a page are neighbours in memory
    sequences = problem.batch if teams == 1 else 1  # several teams find theirs from one number, see decode_rows
    grid = splits.teams // (sequences * teams), splits.num_splits, sequences
    return Launch(kernel, grid, (32 * warps * teams,), arguments, smem_bytes)


def decode(
    q: Any,
    layout: Layout,
    arrays: CacheArrays,
    seq_ids: Any | None,
    problem: Problem,
    splits: Splits,
    *,
    implementation: str,
    out: Any,
    tickets: Any,
    lse: Any = None,
    sinks: Any = None,
) -> None:
    """One pass, queued where q lies, on the current stream there.

    q, out: (batch, q_len, num_heads_q, head_dim), contiguous, 16-byte aligned. lse: float32 (batch, num_heads_q, q_len) or
    None. seq_ids: int32 (batch,); None: sequence i is page i as a whole, ``arrays`` has no more than codes, scales and
    perhaps ``lengths``, else None. sinks: float32 (num_heads_q,) or None. ``problem``: its bounds, scale and softcap.
    tickets: as in ``launch_of``.
    """
    if not splits.teams:
        return
    parts = [gpu_arrays.empty_for_parts(q, shape) for shape in part_shapes(layout, problem, splits)]
    given = {"implementation": implementation, "out": out, "lse": lse, "sinks": sinks, "parts": parts}
    gpu_arrays.launch(*launch_of(q, layout, arrays, seq_ids, problem, splits, tickets=tickets, **given))
