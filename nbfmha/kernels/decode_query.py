"""Queries of one CTA of the decode kernel: rows of q, packed from query tokens and the heads that share K and V.

Row r is query token r / group of head ``kv_head * group + r % group``, so that neighbouring rows are neighbours in
memory. In shared memory a row has the pitch of :mod:`tile_16bit`; rows that there are none of are zeros.
"""

from __future__ import annotations

from nbfmha.kernels.out_columns import m_tiles_of, sides_of
from nbfmha.kernels.paged_products import words_of_lane
from nbfmha.kernels.tile_16bit import row_pitch

Q_TILE = 8


def make_load_queries(head_dim: int, dtype: str, q_tiles: int, threads: int, widened: bool):
    """Device functions of all threads, with a barrier between them for what the first one copies:

    ``fetch(plain, mean, q: u32*, k_mean: f32*, has_mean, batch, kv_head, num_heads_kv, slot, first_row, rows, group, q_len,
    thread)``: 8 q_tiles rows of Q, from row ``first_row`` on, and km (zeros where there is none) to shared memory,
    asynchronously.

    ``prepare(plain, mean, shifts, ordered, thread)``: q . km of each row to ``shifts``, f32; and where ``widened`` the rows
    as f16 in ``paged_products.channel_order`` to ``ordered``.
    """
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u16, u32, i32, i64 = types.float32, types.uint16, types.uint32, types.int32, types.int64
    ffi, cp_async_16, load_v4, store, store_v4, prmt = (
        dev.ffi, dev.cp_async_cg_16, dev.ld_shared_v4_u32, dev.st_shared_u32, dev.st_shared_v4_u32, dev.prmt_b32
    )  # fmt: skip
    fma, bfly, bits_of, float_of, pack_f16 = (
        dev.fma_rn_f32, dev.shfl_sync_bfly_f32, dev.mov_b32_f32, dev.mov_f32_b32, dev.cvt_rn_f16x2_f32
    )  # fmt: skip
    bf16 = dtype == "bfloat16"
    widen = dev.cvt_f32_bf16 if bf16 else dev.cvt_f32_f16
    chunks, pitch, words = head_dim // 8, row_pitch(head_dim), words_of_lane(head_dim, q_tiles)
    total, mean_chunks, halvings = Q_TILE * q_tiles * chunks, head_dim // 4, (head_dim // 8).bit_length() - 1

    @cuda.jit(device=True, forceinline=True)
    def fetch(
        plain, mean, q, k_mean, has_mean, batch, kv_head, num_heads_kv, slot, first_row, rows, group, q_len, thread
    ):  # fmt: skip
        heads = i32(num_heads_kv * group)
        head_at = i64(batch) * i64(q_len) * i64(heads) + i64(kv_head) * i64(group)
        for index in range(u32(thread), u32(total), u32(threads)):
            row, chunk = u32(index) // u32(chunks), u32(index) % u32(chunks)
            query = i32(first_row + i32(row))
            at = i64(0)
            if query < rows:
                token = i32(u32(query) // u32(group))
                at = (head_at + i64(token) * i64(heads) + i64(i32(query - token * group))) * i64(2 * head_dim)
                at += i64(chunk) * i64(16)
            cp_async_16(plain + row * u32(pitch) + u32(16) * chunk, q, at, u32(16) if query < rows else u32(0))
        if thread < i32(mean_chunks):
            if has_mean != i32(0):
                at = (i64(slot) * i64(num_heads_kv) + i64(kv_head)) * i64(4 * head_dim) + i64(thread) * i64(16)
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
    def prepare(plain, mean, shifts, ordered, thread):
        for index in range(u32(thread), u32(total), u32(threads)):  # whole warps: a row's lanes share its product
            prepare_chunk(plain, mean, shifts, ordered, u32(index) // u32(chunks), u32(index) % u32(chunks))

    return fetch, prepare


def make_quantize_queries(head_dim: int, dtype: str, q_tiles: int, threads: int):
    """Device functions ``quantize(plain, codes, scales, thread)``: the rows in shared memory to NVFP4, four_over_six, codes
    of head_dim / 2 bytes a row, then scales of head_dim / 16; and, once all threads have done so,
    ``load(a: u32[m_tiles, k_steps, 4], sfa: u32[m_tiles, words], codes, scales, lane)``: the fragments of the block-scale
    MMA, as :mod:`tile_blockscale` has them. One query tile stands in both halves of its m tile."""
    from numba import cuda
    from numba.core import types

    from nbfmha.kernels.blocks import make_quantize_block
    from ptx_inline import device as dev
    from ptx_inline.unroll import unroll, unrolled

    f32, u16, u32, i32 = types.float32, types.uint16, types.uint32, types.int32
    ffi, load, load_v4, store, store_v2 = (
        dev.ffi, dev.ld_shared_u32, dev.ld_shared_v4_u32, dev.st_shared_u32, dev.st_shared_v2_u32
    )  # fmt: skip
    shuffle = dev.shfl_sync_idx_b32
    widen = dev.cvt_f32_bf16 if dtype == "bfloat16" else dev.cvt_f32_f16
    quantize_block = make_quantize_block(dtype, "nvfp4", "four_over_six", False)
    blocks, pitch, k_steps = head_dim // 16, row_pitch(head_dim), head_dim // 64
    m_tiles, sides, total = m_tiles_of(q_tiles), sides_of(q_tiles), Q_TILE * q_tiles * blocks

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
    def quantize(plain, codes, scales, thread):
        for index in range(u32(thread), u32(total), u32(threads)):
            quantize_one(plain, codes, scales, u32(index))

    @cuda.jit(device=True, forceinline=True)
    @unrolled
    def load_fragments(a, sfa, codes, scales, lane):
        group_id, q = u32(lane >> 2), u32(lane & 3)
        for m in unroll(m_tiles):
            for k_step in unroll(k_steps):
                for r in unroll(4):
                    row = group_id + u32(16 * m + 8 * (r & (sides - 1)))
                    a[m, k_step, r] = load(codes + row * u32(head_dim // 2) + u32(32 * k_step + 16 * (r >> 1)) + u32(4) * q)
            # lanes 0, 1 of a quad supply the scales of rows g, g + 8 of an even k step, lanes 2, 3 those of the odd one
            row = group_id + u32(16 * m) + u32(8) * (q & u32(sides - 1))
            for pair in unroll((k_steps + 1) // 2):
                step = i32(2 * pair) + i32(q >> u32(1))
                sfa[m, pair] = u32(0)
                if step < i32(k_steps):
                    sfa[m, pair] = load(scales + row * u32(blocks) + u32(4) * u32(step))

    return quantize, load_fragments
