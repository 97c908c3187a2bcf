"""The splits of a decode call merged by their LSE, and the sinks with them.

    lse = log(sum of exp(lse_s) [+ exp(sink)]),  out = sum of exp(lse_s - lse) out_s

CTA: one row (query token and head) and 4 warps, each of which takes every fourth split; head_dim / 32 channels a lane. A
split with an LSE of -inf has no weight, whatever its ``out`` holds; a row without any is 0 with an LSE of -inf (its sink
where there is one). Bytes: 4 (head_dim + 1) a split and row. Needs sm_80.
"""

from __future__ import annotations

import functools
from typing import Any

from nbfmha.gpu_arrays import Launch
from nbfmha.problem import Problem
from ptx_inline.toolchain import Kernel

THREADS = 128
WARPS = THREADS // 32


def make_combine(head_dim: int, dtype: str):
    """Kernel ``combine(out, lse, part, part_lse, sinks, has_lse, has_sinks, num_splits, rows, num_heads_q, q_len)``."""
    import numpy as np
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    max_f32, fma, ex2, lg2, bfly = (
        dev.max_f32, dev.fma_rn_f32, dev.ex2_approx_ftz_f32, dev.lg2_approx_f32, dev.shfl_sync_bfly_f32
    )  # fmt: skip
    pack = dev.cvt_rn_bf16x2_f32 if dtype == "bfloat16" else dev.cvt_rn_f16x2_f32
    pairs, log2e = head_dim // 64, 1.4426950408889634

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def add_split(values, part, at, weight):
        for i in unroll(pairs):
            for e in unroll(2):
                x = part[at + i64(64 * i + e)]
                # loaded in any case, so that loads of several splits are under way
                values[i, e] = fma(x if weight > f32(0) else f32(0), weight, values[i, e])

    @unrolled
    def combine(out, lse, part, part_lse, sinks, has_lse, has_sinks, num_splits, rows, num_heads_q, q_len):
        sums = cuda.shared.array((WARPS, head_dim), f32)
        thread, row = i32(cuda.threadIdx.x), i64(cuda.blockIdx.x)
        lane, warp = i32(thread & i32(31)), i32(thread >> i32(5))
        head = i32(u32(row) % u32(num_heads_q))
        query = i32(u32(row) // u32(num_heads_q))  # of all sequences
        sink = sinks[head] if has_sinks != i32(0) else f32(-np.inf)

        most = sink
        split = i32(lane)
        while split < num_splits:
            most = max_f32(most, part_lse[i64(split) * i64(rows) + row])
            split = i32(split + i32(32))
        for i in unroll(5):
            most = max_f32(most, bfly(most, u32(1 << i)))
        origin = most if most > f32(-np.inf) else f32(0)
        total = f32(0)
        split = i32(lane)
        while split < num_splits:
            total += ex2((part_lse[i64(split) * i64(rows) + row] - origin) * f32(log2e))
            split = i32(split + i32(32))
        for i in unroll(5):
            total += bfly(total, u32(1 << i))
        total += ex2((sink - origin) * f32(log2e))

        values = cuda.local.array((pairs, 2), f32)
        for i in unroll(pairs):
            for e in unroll(2):
                values[i, e] = f32(0)
        split = i32(warp)
        while split < num_splits:
            at = i64(split) * i64(rows) + row
            weight = ex2((part_lse[at] - origin) * f32(log2e))
            add_split(values, part, at * i64(head_dim) + i64(i32(2) * lane), weight)
            split = i32(split + i32(WARPS))
        for i in unroll(pairs):
            for e in unroll(2):
                sums[warp, i32(2) * lane + i32(64 * i + e)] = values[i, e]
        cuda.syncthreads()
        factor = f32(0) if total == f32(0) else f32(1) / total
        for pair in range(thread, head_dim // 2, THREADS):
            even, odd = f32(0), f32(0)
            for w in unroll(WARPS):
                even += sums[w, 2 * pair]
                odd += sums[w, 2 * pair + 1]
            out[row * i64(head_dim // 2) + i64(pair)] = pack(odd * factor, even * factor)
        if has_lse != i32(0) and thread == i32(0):
            batch = i32(u32(query) // u32(q_len))
            at = (i64(batch) * i64(num_heads_q) + i64(head)) * i64(q_len) + i64(i32(query - batch * q_len))
            lse[at] = f32(-np.inf) if total == f32(0) else origin + lg2(total) * f32(1 / log2e)

    return combine


_SIGNATURE = ("u32*", "f32*", "f32*", "f32*", "f32*", *("i32",) * 6)


@functools.cache
def combine_kernel(head_dim: int, dtype: str) -> Kernel:
    """The kernel for these constants, see ``make_combine``."""
    return Kernel(make_combine, _SIGNATURE, {"head_dim": head_dim, "dtype": dtype}, launch_bounds=(THREADS,))


def combine(
    part: Any, part_lse: Any, out: Any, lse: Any, sinks: Any, num_splits: int, dtype: str, problem: Problem
) -> Launch:
    """The launch that merges float32 parts (num_splits, rows, head_dim) and (num_splits, rows), rows in the order of
    ``out``, (batch, q_len, num_heads_q, head_dim) of ``dtype``, which is filled, as is ``lse`` (batch, num_heads_q, q_len)
    where it is one."""
    rows = problem.batch * problem.seqlen_q * problem.num_heads_q
    arguments = (
        out, 0 if lse is None else lse, part, part_lse, 0 if sinks is None else sinks, int(lse is not None),
        int(sinks is not None), num_splits, rows, problem.num_heads_q, problem.seqlen_q,
    )  # fmt: skip
    return Launch(combine_kernel(problem.head_dim, dtype), (rows,), (THREADS,), arguments)
