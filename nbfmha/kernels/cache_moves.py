"""Small moves within a paged KV cache: entries of block tables, copies of pages and of what a sequence has beside them.

==============  =========================================================================================================
``entries``     a thread sets one entry of the block tables
``clear``       CTA = slot: length 0, an empty row of the block table, km as given or 0
``copy_pages``  CTA = (pair of pages, one of four arrays): K and V of all heads, codes and scales
``copy_slots``  CTA = (pair of slots, one of five arrays): ring, sinks and km; with km, the length and whether km was
                given
==============  =========================================================================================================

Copies go by 16 bytes, each byte once. Needs sm_80.
"""

from __future__ import annotations

import functools
from typing import Any

from nbfmha import gpu_arrays
from nbfmha.kv_layout import CacheArrays, CacheLayout
from ptx_inline.toolchain import Kernel

THREADS = 256
_PAGE_ARRAYS = 4
_SLOT_ARRAYS = 5


def _make_copy():
    """Device function ``(array: u32*, source, target, vectors, thread)``: copies entry ``source`` of an array of entries
    of ``vectors`` times 16 bytes to entry ``target``; by ``THREADS`` threads."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev

    u32, i64 = types.uint32, types.int64
    ffi, load_v4, store_v4 = dev.ffi, dev.ld_global_v4_u32, dev.st_global_v4_u32

    @cuda.jit(device=True, forceinline=True)
    def copy(array, source, target, vectors, thread):
        words = cuda.local.array(4, u32)
        for i in range(i64(thread), vectors, THREADS):
            load_v4(ffi.from_buffer(words), array, (i64(source) * vectors + i64(i)) * i64(4))
            store_v4(array, (i64(target) * vectors + i64(i)) * i64(4), words[0], words[1], words[2], words[3])

    return copy


def make_entries():
    """Kernel ``entries(block_tables, changes, count, width)``; changes: int32 (count, 3), slot, column and page."""
    from numba import cuda
    from numba.core import types

    i32, i64 = types.int32, types.int64

    def entries(block_tables, changes, count, width):
        i = i64(cuda.blockIdx.x) * i64(THREADS) + i64(cuda.threadIdx.x)
        if i < i64(count):
            slot, column = i64(changes[i64(3) * i]), i64(changes[i64(3) * i + i64(1)])
            block_tables[slot * i64(width) + column] = i32(changes[i64(3) * i + i64(2)])

    return entries


def make_clear():
    """Kernel ``clear(lengths, block_tables, k_mean, mean_given, slots, means, has_means, width, mean_floats)``; means:
    f32 (slots of the call, mean_floats)."""
    from numba import cuda
    from numba.core import types

    f32, i32, i64 = types.float32, types.int32, types.int64

    def clear(lengths, block_tables, k_mean, mean_given, slots, means, has_means, width, mean_floats):
        thread, index = i32(cuda.threadIdx.x), i64(cuda.blockIdx.x)
        slot = i64(slots[index])
        for column in range(thread, width, THREADS):
            block_tables[slot * i64(width) + i64(column)] = i32(-1)
        for i in range(thread, mean_floats, THREADS):
            mean = f32(0)
            if has_means != i32(0):
                mean = means[index * i64(mean_floats) + i64(i)]
            k_mean[slot * i64(mean_floats) + i64(i)] = mean
        if thread == i32(0):
            lengths[slot] = i32(0)
            mean_given[slot] = has_means

    return clear


def make_copy_pages():
    """Kernel ``copy_pages(k_codes, k_scales, v_codes, v_scales, pairs, code_vectors, scale_vectors)``; pairs: int32 (n,
    2), from and to; vectors: of 16 bytes, of a page."""
    from numba import cuda
    from numba.core import types

    i32, i64 = types.int32, types.int64
    copy = _make_copy()

    def copy_pages(k_codes, k_scales, v_codes, v_scales, pairs, code_vectors, scale_vectors):
        thread, cta = i32(cuda.threadIdx.x), i64(cuda.blockIdx.x)
        pair, array = cta // i64(_PAGE_ARRAYS), i32(cta % i64(_PAGE_ARRAYS))
        source, target = pairs[i64(2) * pair], pairs[i64(2) * pair + i64(1)]
        if array == i32(0):
            copy(k_codes, source, target, code_vectors, thread)
        elif array == i32(1):
            copy(v_codes, source, target, code_vectors, thread)
        elif array == i32(2):
            copy(k_scales, source, target, scale_vectors, thread)
        else:
            copy(v_scales, source, target, scale_vectors, thread)

    return copy_pages


def make_copy_slots():
    """Kernel ``copy_slots(k_recent, v_recent, k_sinks, v_sinks, k_mean, lengths, mean_given, pairs, ring_vectors,
    sink_vectors, mean_vectors)``; as ``copy_pages``."""
    from numba import cuda
    from numba.core import types

    i32, i64 = types.int32, types.int64
    copy = _make_copy()

    def copy_slots(
        k_recent, v_recent, k_sinks, v_sinks, k_mean, lengths, mean_given, pairs, ring_vectors, sink_vectors,
        mean_vectors,
    ):  # fmt: skip
        thread, cta = i32(cuda.threadIdx.x), i64(cuda.blockIdx.x)
        pair, array = cta // i64(_SLOT_ARRAYS), i32(cta % i64(_SLOT_ARRAYS))
        source, target = pairs[i64(2) * pair], pairs[i64(2) * pair + i64(1)]
        if array == i32(0):
            copy(k_recent, source, target, ring_vectors, thread)
        elif array == i32(1):
            copy(v_recent, source, target, ring_vectors, thread)
        elif array == i32(2):
            copy(k_sinks, source, target, sink_vectors, thread)
        elif array == i32(3):
            copy(v_sinks, source, target, sink_vectors, thread)
        else:
            copy(k_mean, source, target, mean_vectors, thread)
            if thread == i32(0):
                lengths[target] = lengths[source]
                mean_given[target] = mean_given[source]

    return copy_slots


@functools.cache
def entries_kernel() -> Kernel:
    """The ``entries`` kernel."""
    return Kernel(make_entries, ("i32*", "i32*", "i32", "i32"), launch_bounds=(THREADS,))


@functools.cache
def clear_kernel() -> Kernel:
    """The ``clear`` kernel."""
    signature = ("i32*", "i32*", "f32*", "i32*", "i32*", "f32*", *("i32",) * 3)
    return Kernel(make_clear, signature, launch_bounds=(THREADS,))


@functools.cache
def copy_pages_kernel() -> Kernel:
    """The ``copy_pages`` kernel."""
    return Kernel(make_copy_pages, (*("u32*",) * 4, "i32*", "i64", "i64"), launch_bounds=(THREADS,))


@functools.cache
def copy_slots_kernel() -> Kernel:
    """The ``copy_slots`` kernel."""
    signature = (*("u32*",) * 5, *("i32*",) * 3, *("i64",) * 3)
    return Kernel(make_copy_slots, signature, launch_bounds=(THREADS,))


def set_entries(arrays: CacheArrays, changes: Any) -> None:
    """Queue ``entries``; changes: int32 (n, 3) on the device."""
    count, width = changes.shape[0], arrays.block_tables.shape[1]
    arguments = (arrays.block_tables, changes, count, width)
    gpu_arrays.launch(entries_kernel(), (-(-count // THREADS),), (THREADS,), arguments)


def clear(arrays: CacheArrays, mean_given: Any, slots: Any, means: Any = None) -> None:
    """Queue ``clear``; slots: int32 (n,), means: float32 (n, heads_kv, head_dim) or None, on the device."""
    width, mean_floats = arrays.block_tables.shape[1], arrays.k_mean.shape[1] * arrays.k_mean.shape[2]
    given = 0 if means is None else means
    arguments = (
        arrays.lengths, arrays.block_tables, arrays.k_mean, mean_given, slots, given, int(means is not None), width,
        mean_floats,
    )  # fmt: skip
    gpu_arrays.launch(clear_kernel(), (slots.shape[0],), (THREADS,), arguments)


def copy_pages(arrays: CacheArrays, layout: CacheLayout, pairs: Any) -> None:
    """Queue ``copy_pages``; pairs: int32 (n, 2) on the device."""
    elements = layout.num_heads_kv * layout.page_size * layout.head_dim
    a = arrays
    arguments = (a.k_codes, a.k_scales, a.v_codes, a.v_scales, pairs, elements // 2 // 16, elements // 16 // 16)
    gpu_arrays.launch(copy_pages_kernel(), (_PAGE_ARRAYS * pairs.shape[0],), (THREADS,), arguments)


def copy_slots(arrays: CacheArrays, layout: CacheLayout, mean_given: Any, pairs: Any) -> None:
    """Queue ``copy_slots``; pairs: int32 (n, 2) on the device."""
    row = layout.num_heads_kv * layout.head_dim
    ring, sinks, mean = row * layout.ring_tokens // 8, row * max(layout.sink_tokens, 1) // 8, row // 4
    a = arrays
    arguments = (
        a.k_recent, a.v_recent, a.k_sinks, a.v_sinks, a.k_mean, a.lengths, mean_given, pairs, ring, sinks, mean
    )  # fmt: skip
    gpu_arrays.launch(copy_slots_kernel(), (_SLOT_ARRAYS * pairs.shape[0],), (THREADS,), arguments)
