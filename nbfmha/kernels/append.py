"""Append tokens to sequences of a paged KV cache: rings, sinks, and the blocks that leave the recent window.

The memory is :mod:`nbfmha.kv_layout`'s, the specification :mod:`nbfmha.cache_model`. A sequence grows from n to N:

    blocks of 16 tokens in [quantized(n), quantized(N))   from the ring (tokens < n) or the chunk, to pages in NVFP4
    tokens in [max(n, quantized(N)), N)                   from the chunk to the ring, which holds no others afterwards
    tokens in [n, sink_tokens)                            from the chunk to the sinks
    km, when quantized(n) = 0 < quantized(N)              the mean of all N tokens, unless it was given

==========  ==============================================================================================================
``append``  CTA = (sequence, kv head, 64 tokens of its chunk). The first one of a head takes the blocks that begin in the
            ring and writes ring and sinks; the others only blocks of their own tokens: nobody writes what another one
            reads. A chunk of up to 64 tokens has one CTA a head, which makes km too
``mean``    CTA = (sequence, kv head): km, before ``append``, for longer chunks
==========  ==============================================================================================================

Everything that changes from call to call (lengths, block tables) is read from device memory: a CUDA graph of it appends
the next tokens at every replay. All CTAs of a sequence read its length; each then takes a ticket, and the last one writes
the new length: nobody can still be about to read the old one. Tickets count up to the number of CTAs and start at 0
again. A sequence without a page for what would be quantised (a replay beyond what was reserved) is left as it is. From
sm_90 on a kernel that is launched for it (programmatic dependent launch) may begin while this one runs.

2 head_dim threads: half of them take K, a token's 16 channels each, half V, a channel's 16 tokens each; one block is one
quantisation a thread. Bytes a token and channel, K and V: 4 read and 4 written for the ring, later 4 read and 9/8 written
for the page. Needs sm_80. Not offered: float32, V's blocks along head_dim.
"""

from __future__ import annotations

import functools
from typing import Any

from nbfmha import gpu_arrays
from nbfmha.gpu_arrays import Launch
from nbfmha.kernels.blocks import make_quantize_block, make_widen
from nbfmha.kernels.prepass_load import make_load_16, make_widen_pair
from nbfmha.kv_layout import BLOCK, CacheArrays, CacheLayout
from nbfmha.tiles import View
from nbfmha.validation import message
from ptx_inline.toolchain import Kernel

TOKENS_A_CTA = 64
WORK_FIELDS = 3
"""Of a sequence of a call: slot, first row of k and v, number of rows."""

_MAX_CTAS = 2**31 - 1
_VECTOR = 8  # 16-bit elements of a load of 16 bytes


def threads_of(head_dim: int) -> int:
    """Threads of a CTA of ``append``."""
    return 2 * head_dim


def mean_threads_of(head_dim: int) -> int:
    """Threads of a CTA of ``mean``."""
    return min(1024, 8 * head_dim)


def _make_grow():
    """Device function ``(lengths, block_tables, slot, count, table_width, page_size, recent_tokens) -> (length, total,
    first, stop)``: tokens before and after, tokens in pages before and after; no growth where a page is missing."""
    from numba import cuda
    from numba.core import types

    i32, i64 = types.int32, types.int64

    @cuda.jit(device=True, forceinline=True)
    def grow(lengths, block_tables, slot, count, table_width, page_size, recent_tokens):
        length = i32(lengths[slot])
        total = i32(length + count)
        first = i32(max(i32(length - recent_tokens), i32(0)) // i32(BLOCK) * i32(BLOCK))
        stop = i32(max(i32(total - recent_tokens), i32(0)) // i32(BLOCK) * i32(BLOCK))
        if stop > first:
            column = i32(i32(stop - i32(1)) // page_size)
            page = i32(-1)
            if column < table_width:
                page = i32(block_tables[i64(slot) * i64(table_width) + i64(column)])
            if page < i32(0):
                total, stop = length, first
        return length, total, first, stop

    return grow


def _make_sum_keys(dtype: str, head_dim: int, threads: int):
    """Device function ``(staged: shared f32[threads * 8], k, k_recent, k_first, k_t, ring_first, ring_tokens, length,
    total, thread) -> f32``, called by all threads: the sum over all tokens of channel ``thread``, for the first head_dim
    threads.
    k_first, ring_first: elements before the first token of the chunk and of the ring, of this head."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    ffi, load_fixed, load_v4 = dev.ffi, dev.ld_global_nc_v4_u32, dev.ld_global_v4_u32
    widen_pair = make_widen_pair(dtype)
    lanes = head_dim // _VECTOR
    rows = threads // lanes

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def sum_keys(staged, k, k_recent, k_first, k_t, ring_first, ring_tokens, length, total, thread):
        lane, row = thread % u32(lanes), i32(thread // u32(lanes))
        sums = cuda.local.array(_VECTOR, f32)
        words = cuda.local.array(4, u32)
        for c in unroll(_VECTOR):
            sums[c] = f32(0)
        for token in range(row, total, rows):
            if i32(token) < length:
                at = ring_first + i64(i32(token) % ring_tokens) * i64(head_dim) + i64(_VECTOR) * i64(lane)
                load_v4(ffi.from_buffer(words), k_recent, at >> i64(1))
            else:
                at = k_first + i64(i32(token) - length) * k_t + i64(_VECTOR) * i64(lane)
                load_fixed(ffi.from_buffer(words), k, at >> i64(1))
            for w in unroll(4):
                even, odd = widen_pair(words[w])
                sums[2 * w] += even
                sums[2 * w + 1] += odd
        for c in unroll(_VECTOR):
            staged[u32(row) * u32(head_dim) + u32(_VECTOR) * lane + u32(c)] = sums[c]
        cuda.syncthreads()
        total_sum = f32(0)
        if thread < u32(head_dim):
            for other in range(rows):
                total_sum += staged[u32(other) * u32(head_dim) + thread]
        return total_sum

    return sum_keys


def make_append(dtype: str, head_dim: int, scale: str):
    """Kernel ``append(k_codes, k_scales, v_codes, v_scales, k_recent, v_recent, v_recent_16, k_sinks, v_sinks, k_mean,
    lengths, block_tables, mean_given, tickets, k, v, v_16, work, k_h, k_t, v_h, v_t, heads, parts, table_width,
    page_size, recent_tokens, sink_tokens, makes_mean)``; the names with _16 are the arrays before them, by single
    elements."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u8, u32, i32, i64 = types.float32, types.uint8, types.uint32, types.int32, types.int64
    threads, cols, vectors = threads_of(head_dim), head_dim // BLOCK, head_dim // _VECTOR
    staged_floats, pitch = threads * _VECTOR, BLOCK + 1  # of a column's means: different columns in different banks
    mean_floats = pitch * cols
    ffi, load_v4, load_fixed, store_v4, store_v2 = (
        dev.ffi, dev.ld_global_v4_u32, dev.ld_global_nc_v4_u32, dev.st_global_v4_u32, dev.st_global_v2_u32
    )  # fmt: skip
    take_ticket = dev.atom_acq_rel_gpu_global_inc_u32
    load_16, widen_pair, widen = make_load_16(dtype), make_widen_pair(dtype), make_widen(dtype)
    grow, sum_keys = _make_grow(), _make_sum_keys(dtype, head_dim, threads)
    quantize_block = make_quantize_block(dtype, "nvfp4", scale, False)

    @cuda.jit(device=True, forceinline=True)
    def copy_rows(target, source, target_first, places, source_first, source_t, length, begin, end, thread):
        """Tokens [begin, end) of a sequence, from the chunk that begins at token ``length`` to their places modulo
        ``places``; by head_dim threads."""
        words = cuda.local.array(4, u32)
        for item in range(i32(thread), i32((end - begin) * i32(vectors)), head_dim):
            token, column = i32(begin + i32(item) // i32(vectors)), i64(_VECTOR) * i64(i32(item) % i32(vectors))
            source_at = (source_first + i64(token - length) * source_t + column) >> i64(1)
            load_fixed(ffi.from_buffer(words), source, source_at)
            at = (target_first + i64(token % places) * i64(head_dim) + column) >> i64(1)
            store_v4(target, at, words[0], words[1], words[2], words[3])

    @unrolled
    def append(
        k_codes, k_scales, v_codes, v_scales, k_recent, v_recent, v_recent_16, k_sinks, v_sinks, k_mean, lengths,
        block_tables, mean_given, tickets, k, v, v_16, work, k_h, k_t, v_h, v_t, heads, parts, table_width, page_size,
        recent_tokens, sink_tokens, makes_mean,
    ):  # fmt: skip
        staged = cuda.shared.array(staged_floats, f32)
        means = cuda.shared.array(mean_floats, f32)
        dev.griddepcontrol_launch_dependents()  # a decode begins meanwhile, and waits before it reads what counts
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        part, pair = i32(cta % parts), i32(cta // parts)
        head, index = i32(pair % heads), i32(pair // heads)
        slot, row, count = work[3 * index], work[3 * index + 1], i32(work[3 * index + 2])
        own_parts = i32(max(i32(count + i32(TOKENS_A_CTA - 1)) // i32(TOKENS_A_CTA), i32(1)))
        if part >= own_parts:
            return
        length, total, first, stop = grow(lengths, block_tables, slot, count, table_width, page_size, recent_tokens)
        ring_tokens = i32(recent_tokens + i32(BLOCK))
        slot_head = i64(slot) * i64(heads) + i64(head)
        ring_first = slot_head * i64(ring_tokens) * i64(head_dim)
        k_first, v_first = i64(row) * k_t + i64(head) * k_h, i64(row) * v_t + i64(head) * v_h
        is_v = thread >= u32(head_dim)
        own = thread % u32(head_dim)
        channel_place = u32(pitch) * (own // u32(BLOCK)) + own % u32(BLOCK)

        if stop > first:
            if makes_mean != i32(0) and first == i32(0) and i32(mean_given[slot]) == i32(0):
                total_sum = sum_keys(
                    staged, k, k_recent, k_first, k_t, ring_first, ring_tokens, length, total, thread
                )  # fmt: skip
                if not is_v:
                    mean = total_sum / f32(total)
                    means[channel_place] = mean
                    k_mean[slot_head * i64(head_dim) + i64(own)] = mean
            elif not is_v:
                means[channel_place] = k_mean[slot_head * i64(head_dim) + i64(own)]
            cuda.syncthreads()

            col, inside = own % u32(cols), i32(own // u32(cols))
            words = cuda.local.array(8, u32)
            values = cuda.local.array(BLOCK, f32)
            packed = cuda.local.array(2, u32)
            own_means = u32(pitch) * col
            # blocks of the chunk alone begin at ``whole``; a CTA takes four of them, the first one those before as well
            whole = i32(i32(length + i32(BLOCK - 1)) // i32(BLOCK))
            begin = i32(whole + part * i32(TOKENS_A_CTA // BLOCK))
            end = min(i32(begin + i32(TOKENS_A_CTA // BLOCK)), i32(stop // i32(BLOCK)))
            if part == i32(0):
                begin = i32(first // i32(BLOCK))
            for block in range(begin, end):
                token = i32(i32(block) * i32(BLOCK))
                page = i64(block_tables[i64(slot) * i64(table_width) + i64(i32(token // page_size))])
                place = i32(token % page_size)
                if is_v:
                    for i in unroll(BLOCK):
                        t = i32(token + i32(i))
                        if t < length:
                            values[i] = widen(v_recent_16[ring_first + i64(t % ring_tokens) * i64(head_dim) + i64(own)])
                        else:
                            values[i] = widen(v_16[v_first + i64(t - length) * v_t + i64(own)])
                else:
                    t = i32(token + inside)
                    if t < length:
                        at = (ring_first + i64(t % ring_tokens) * i64(head_dim) + i64(BLOCK) * i64(col)) >> i64(1)
                        for w in unroll(0, 8, 4):
                            load_v4(ffi.from_buffer(words[w:]), k_recent, at + i64(w))
                    else:
                        load_16(k, k_first + i64(t - length) * k_t + i64(BLOCK) * i64(col), words)
                    for w in unroll(8):
                        even, odd = widen_pair(words[w])
                        values[2 * w] = even - means[own_means + u32(2 * w)]
                        values[2 * w + 1] = odd - means[own_means + u32(2 * w + 1)]
                byte = u8(quantize_block(values, f32(1), packed))
                if is_v:
                    stored = (page * i64(heads) + i64(head)) * i64(head_dim) + i64(own)
                    out = stored * i64(page_size // i32(BLOCK)) + i64(place // i32(BLOCK))
                    v_scales[out] = byte
                    store_v2(v_codes, out * i64(2), packed[0], packed[1])
                else:
                    stored = (page * i64(heads) + i64(head)) * i64(page_size) + i64(place + inside)
                    out = stored * i64(cols) + i64(col)
                    k_scales[out] = byte
                    store_v2(k_codes, out * i64(2), packed[0], packed[1])
            cuda.syncthreads()  # the ring's old tokens are read

        if part == i32(0):
            newest, sinks_end = max(length, stop), min(total, sink_tokens)
            sink_first = slot_head * i64(max(sink_tokens, i32(1))) * i64(head_dim)
            if is_v:
                copy_rows(v_recent, v, ring_first, ring_tokens, v_first, v_t, length, newest, total, own)
                copy_rows(v_sinks, v, sink_first, sink_tokens, v_first, v_t, length, length, sinks_end, own)
            else:
                copy_rows(k_recent, k, ring_first, ring_tokens, k_first, k_t, length, newest, total, own)
                copy_rows(k_sinks, k, sink_first, sink_tokens, k_first, k_t, length, length, sinks_end, own)
        cuda.syncthreads()
        if thread == u32(0):
            last = u32(own_parts * heads) - u32(1)
            if take_ticket(tickets, i64(slot), last) == last:
                lengths[slot] = total

    return append


def make_mean(dtype: str, head_dim: int):
    """Kernel ``mean(k_mean, k_recent, lengths, block_tables, mean_given, k, work, k_h, k_t, heads, table_width,
    page_size, recent_tokens)``."""
    from numba import cuda
    from numba.core import types

    f32, u32, i32, i64 = types.float32, types.uint32, types.int32, types.int64
    threads = mean_threads_of(head_dim)
    staged_floats = threads * _VECTOR
    grow, sum_keys = _make_grow(), _make_sum_keys(dtype, head_dim, threads)

    def mean(
        k_mean, k_recent, lengths, block_tables, mean_given, k, work, k_h, k_t, heads, table_width, page_size,
        recent_tokens,
    ):  # fmt: skip
        staged = cuda.shared.array(staged_floats, f32)
        thread, cta = u32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        head, index = i32(cta % heads), i32(cta // heads)
        slot, row, count = work[3 * index], work[3 * index + 1], i32(work[3 * index + 2])
        length, total, first, stop = grow(lengths, block_tables, slot, count, table_width, page_size, recent_tokens)
        if stop > first and first == i32(0) and i32(mean_given[slot]) == i32(0):
            ring_tokens = i32(recent_tokens + i32(BLOCK))
            slot_head = i64(slot) * i64(heads) + i64(head)
            ring_first = slot_head * i64(ring_tokens) * i64(head_dim)
            k_first = i64(row) * k_t + i64(head) * k_h
            total_sum = sum_keys(staged, k, k_recent, k_first, k_t, ring_first, ring_tokens, length, total, thread)
            if thread < u32(head_dim):
                k_mean[slot_head * i64(head_dim) + i64(thread)] = total_sum / f32(total)

    return mean


@functools.cache
def append_kernel(dtype: str, head_dim: int, scale: str) -> Kernel:
    """The ``append`` kernel for these constants."""
    signature = (
        "u32*", "u8*", "u32*", "u8*", "u32*", "u32*", "u16*", "u32*", "u32*", "f32*", "i32*", "i32*", "i32*", "u32*",
        "u32*", "u32*", "u16*", "i32*", *("i64",) * 4, *("i32",) * 7,
    )  # fmt: skip
    constants = {"dtype": dtype, "head_dim": head_dim, "scale": scale}
    return Kernel(make_append, signature, constants, launch_bounds=(threads_of(head_dim),))


@functools.cache
def mean_kernel(dtype: str, head_dim: int) -> Kernel:
    """The ``mean`` kernel for these constants."""
    signature = ("f32*", "u32*", "i32*", "i32*", "i32*", "u32*", "i32*", "i64", "i64", *("i32",) * 4)
    constants = {"dtype": dtype, "head_dim": head_dim}
    return Kernel(make_mean, signature, constants, launch_bounds=(mean_threads_of(head_dim),))


def parts_of(longest: int) -> int:
    """CTAs of a head of a sequence, for a longest chunk of so many rows."""
    return max(1, -(-longest // TOKENS_A_CTA))


def launches(
    arrays: CacheArrays,
    layout: CacheLayout,
    k: View,
    v: View,
    work: Any,
    sequences: int,
    parts: int,
    *,
    mean_given: Any,
    tickets: Any,
) -> list[Launch]:
    """What the append of a chunk to each of ``sequences`` queues, in order: ``parts`` as ``parts_of`` has it, the others as
    in ``append``. Raises ``ValueError`` for more CTAs than a launch has."""
    if not sequences:
        return []
    heads, width = layout.num_heads_kv, arrays.block_tables.shape[1]
    ctas = sequences * heads * parts
    if ctas > _MAX_CTAS:
        raise ValueError(message("k, v", f"small enough for {_MAX_CTAS} CTAs", ctas, "append fewer sequences at once"))
    a, (_, k_h, k_t), (_, v_h, v_t) = arrays, k.strides, v.strides
    arguments = (
        a.k_codes, a.k_scales, a.v_codes, a.v_scales, a.k_recent, a.v_recent, a.v_recent, a.k_sinks, a.v_sinks,
        a.k_mean, a.lengths, a.block_tables, mean_given, tickets, k.array, v.array, v.array, work, k_h, k_t, v_h, v_t,
        heads, parts, width, layout.page_size, layout.recent_tokens, layout.sink_tokens, int(parts == 1),
    )  # fmt: skip
    kernel = append_kernel(layout.dtype, layout.head_dim, layout.scale)
    last = Launch(kernel, (ctas,), (threads_of(layout.head_dim),), arguments)
    if parts == 1:
        return [last]
    arguments = (
        a.k_mean, a.k_recent, a.lengths, a.block_tables, mean_given, k.array, work, k_h, k_t, heads, width,
        layout.page_size, layout.recent_tokens,
    )  # fmt: skip
    kernel = mean_kernel(layout.dtype, layout.head_dim)
    return [Launch(kernel, (sequences * heads,), (mean_threads_of(layout.head_dim),), arguments), last]


def append(
    arrays: CacheArrays,
    layout: CacheLayout,
    k: View,
    v: View,
    work: Any,
    longest: int,
    *,
    mean_given: Any,
    tickets: Any,
) -> None:
    """Queue the append of one chunk to each of some sequences: one launch, two where the longest chunk has more than
    ``TOKENS_A_CTA`` tokens; nothing waits.

    Args:
        k, v: (tokens, heads_kv, head_dim) of the layout's dtype, their batch stride unused; first element 16-byte
            aligned, strides multiples of 16 bytes. Read only.
        work: int32 (sequences, 3) on the device: ``WORK_FIELDS`` of each; a slot comes once at most.
        longest: rows of the longest chunk, or more.
        mean_given: int32 (slots,), not 0 where km was given. tickets: uint32 or int32 (slots,), zeros before and after.

    Raises ``ValueError`` for more CTAs than a launch has.
    """
    given = {"mean_given": mean_given, "tickets": tickets}
    for launch in launches(arrays, layout, k, v, work, work.shape[0], parts_of(longest), **given):
        gpu_arrays.launch(*launch)
