"""Queries of a team of the decode kernel: rows of q, packed from query tokens and the heads that share K and V.

In shared memory a row (:mod:`decode_rows`) has the pitch of :mod:`tile_16bit`; rows that there are none of are zeros.
"""

from __future__ import annotations

from nbfmha.kernels.decode_rows import Q_TILE
from nbfmha.kernels.paged_products import words_of_lane
from nbfmha.kernels.tile_16bit import row_pitch


def make_load_queries(head_dim: int, dtype: str, q_tiles: int, threads: int, widened: bool):
    """``passes``, and device functions of all threads, with a barrier before the last one for what the others copy
    asynchronously:

    ``find(to: u32[passes], at: i64[passes], count: u32[passes], own: decode_rows.Rows, plain, thread)``: bytes of q that a
    thread copies to shared memory, of 8 q_tiles rows: where to, where from, how many, 16 or 0. ``fetch(q: u8*, to, at,
    count, thread)``: copies them, and zeros where there are none.

    ``fetch_mean(mean, k_mean: f32*, has_mean, kv_head, num_heads_kv, slot, thread)``: km, or zeros where there is none.

    ``prepare(plain, mean, shifts, ordered, thread)``: q . km of each row to ``shifts``, f32; and where ``widened`` the rows
    as f16 in ``paged_products.channel_order`` to ``ordered``.
    """
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels import decode_rows
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u16, u32, i32, i64 = types.float32, types.uint16, types.uint32, types.int32, types.int64
    ffi, cp_async_16, load_v4, store, store_v4, prmt = (
        dev.ffi, dev.cp_async_cg_16, dev.ld_shared_v4_u32, dev.st_shared_u32, dev.st_shared_v4_u32, dev.prmt_b32
    )  # fmt: skip
    fma, bfly, bits_of, float_of, pack_f16 = (
        dev.fma_rn_f32, dev.shfl_sync_bfly_f32, dev.mov_b32_f32, dev.mov_f32_b32, dev.cvt_rn_f16x2_f32
    )  # fmt: skip
    bf16, places_of = dtype == "bfloat16", decode_rows.make_places_of()
    widen = dev.cvt_f32_bf16 if bf16 else dev.cvt_f32_f16
    chunks, pitch, words = head_dim // 8, row_pitch(head_dim), words_of_lane(head_dim, q_tiles)
    total, mean_chunks, halvings = Q_TILE * q_tiles * chunks, head_dim // 4, (head_dim // 8).bit_length() - 1
    passes = -(-total // threads)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def find(to, at, count, own, plain, thread):
        for i in unroll(passes):
            index = u32(u32(thread) + u32(threads * i))
            row, within = i32(index // u32(chunks)), index % u32(chunks) * u32(16)
            to[i], at[i], count[i] = plain + u32(row) * u32(pitch) + within, i64(0), u32(0)
            if i32(own.first_row + row) < own.rows and index < u32(total):
                _, q_row, _ = places_of(own, row)  # q and out have the same rows
                at[i], count[i] = i64(q_row) * i64(2 * head_dim) + i64(within), u32(16)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def fetch(q, to, at, count, thread):
        for i in unroll(passes):
            if threads * (i + 1) <= total or u32(u32(thread) + u32(threads * i)) < u32(total):
                cp_async_16(to[i], q, at[i], count[i])

    @cuda.jit(device=True, forceinline=True)
    def fetch_mean(mean, k_mean, has_mean, kv_head, num_heads_kv, slot, thread):
        if thread < i32(mean_chunks):
            if has_mean != i32(0):
                at = i64(u32(slot * num_heads_kv + kv_head)) * i64(4 * head_dim) + i64(u32(thread) * u32(16))
                cp_async_16(mean + u32(16) * u32(thread), k_mean, at, u32(16))
            else:
                store_v4(mean + u32(16) * u32(thread), u32(0), u32(0), u32(0), u32(0))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def order(raw, values):
        """Eight channels of a chunk as the pairs (i, i + 4), in f16."""
        if bf16:
            for i in unroll(4):
                raw[i] = pack_f16(values[i + 4], values[i])
        else:
            low, high = raw[0], raw[1]
            raw[0], raw[1] = prmt(low, raw[2], u32(0x5410)), prmt(low, raw[2], u32(0x7632))
            raw[2], raw[3] = prmt(high, raw[3], u32(0x5410)), prmt(high, raw[3], u32(0x7632))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def prepare_chunk(plain, mean, shifts, ordered, row, chunk):
        raw = cuda.local.array(4, u32)
        means = cuda.local.array((2, 4), u32)
        values = cuda.local.array(8, f32)
        at = row * u32(pitch)
        load_v4(ffi.from_buffer(raw), plain + at + u32(16) * chunk)
        for half in unroll(2):
            load_v4(ffi.from_buffer(means[half]), mean + u32(32) * chunk + u32(16 * half))
        product = f32(0)
        for i in unroll(4):
            values[2 * i] = widen(u16(raw[i] & u32(0xFFFF)))
            values[2 * i + 1] = widen(u16(raw[i] >> u32(16)))
        for i in unroll(8):
            product = fma(values[i], float_of(means[i // 4, i % 4]), product)
        for i in unroll(halvings):
            product += bfly(product, u32(1 << i))
        if chunk == u32(0):
            store(shifts + u32(4) * row, bits_of(product))
        if widened:
            order(raw, values)
            # the chunk is a lane's word of a slab: two k steps, the low and the high half of each
            slab, lane, word = chunk // u32(4 * words), chunk // u32(words) & u32(3), chunk & u32(words - 1)
            at += slab * u32(64 * words) + word * u32(64) + lane * u32(4)
            for i in unroll(4):
                store(ordered + at + u32(32 * (i // 2) + 16 * (i % 2)), raw[i])

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def prepare(plain, mean, shifts, ordered, thread):
        for i in unroll(passes):
            index = u32(u32(thread) + u32(threads * i))
            if threads * (i + 1) <= total or index < u32(total):  # whole warps: a row's lanes share its product
                prepare_chunk(plain, mean, shifts, ordered, index // u32(chunks), index % u32(chunks))

    return passes, find, fetch, fetch_mean, prepare


def make_quantize_queries(head_dim: int, dtype: str, q_tiles: int, threads: int):
    """Device functions ``quantize(plain, codes, scales, thread)``: the rows in shared memory to NVFP4, four_over_six, codes
    of head_dim / 2 bytes a row, then scales of head_dim / 16; and, once all threads have done so,
    ``load(b: u32[q_tiles, k_steps, 2], sfb: u32[q_tiles], codes, scales, lane)``: the B fragments of the block-scale MMA,
    whose scales of k step t lane t of a quad supplies."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels.blocks import make_quantize_block
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u16, u32 = types.float32, types.uint16, types.uint32
    ffi, load, load_v4, store, store_v2 = (
        dev.ffi, dev.ld_shared_u32, dev.ld_shared_v4_u32, dev.st_shared_u32, dev.st_shared_v2_u32
    )  # fmt: skip
    shuffle = dev.shfl_sync_idx_b32
    widen = dev.cvt_f32_bf16 if dtype == "bfloat16" else dev.cvt_f32_f16
    quantize_block = make_quantize_block(dtype, "nvfp4", "four_over_six", False)
    blocks, pitch, k_steps, total = head_dim // 16, row_pitch(head_dim), head_dim // 64, Q_TILE * q_tiles * head_dim // 16

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def quantize_one(plain, codes, scales, index):
        row, block = index // u32(blocks), index % u32(blocks)
        raw = cuda.local.array(8, u32)
        x = cuda.local.array(16, f32)
        packed = cuda.local.array(2, u32)
        at = plain + row * u32(pitch) + block * u32(32)
        for half in unroll(2):
            load_v4(ffi.from_buffer(raw[4 * half :]), at + u32(16 * half))
        for i in unroll(8):
            x[2 * i] = widen(u16(raw[i] & u32(0xFFFF)))
            x[2 * i + 1] = widen(u16(raw[i] >> u32(16)))
        byte = quantize_block(x, f32(1), packed)
        store_v2(codes + row * u32(head_dim // 2) + block * u32(8), packed[0], packed[1])
        # four neighbours' bytes make a word
        word = u32(byte) << (u32(8) * (block & u32(3)))
        for i in unroll(2):
            word |= shuffle(word, (index ^ u32(1 << i)) & u32(31))
        if (block & u32(3)) == u32(0):
            store(scales + row * u32(blocks) + block, word)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def quantize(plain, codes, scales, thread):
        for i in unroll(-(-total // threads)):
            index = u32(u32(thread) + u32(threads * i))
            if threads * (i + 1) <= total or index < u32(total):
                quantize_one(plain, codes, scales, index)

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_fragments(b, sfb, codes, scales, lane):
        group_id, q = u32(lane >> 2), u32(lane & 3)
        for i in unroll(q_tiles):
            row = group_id + u32(Q_TILE * i)
            for k_step in unroll(k_steps):
                for r in unroll(2):
                    b[i, k_step, r] = load(codes + row * u32(head_dim // 2) + u32(32 * k_step + 16 * r) + u32(4) * q)
            sfb[i] = u32(0)
            if q < u32(k_steps):
                sfb[i] = load(scales + row * u32(blocks) + u32(4) * q)

    return quantize, load_fragments
