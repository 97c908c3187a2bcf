"""What each MMA computes, bit for bit, as NumPy over a batch of tiles: the published model of the tensor cores.

For one element of D, with the parameters of :class:`ptx_inline.isa.instructions.Numerics`:

1. Every operand, scale and C is significand times 2^exponent, the significand in [1, 2), or in [0, 1) with the
   format's smallest exponent for subnormals.
2. A group of products (16 for the k64 kinds, 1 for the others) is summed exactly. An addend is that sum times both
   scales. Its exponent is the sum of the exponents of what was multiplied, *not normalised*; in a group of 16 the
   elements count as exponent 0, so only the scales' exponents are left. A group in which every product is zero, a zero
   scale and C = 0 have no exponent; a group whose products cancel keeps its own.
3. ``e_max`` is the largest exponent of the addends and C, at least ``min_exponent``.
4. Each addend and C is truncated toward zero to a multiple of 2^(e_max - fraction_bits); these are added exactly, and
   the sum is rounded toward zero to float32 (subnormals kept, infinity from 2^128 on).
   On targets before sm_90 the f16 and bf16 MMAs do steps 2 to 4 for each half of k, the first result being C of the next.
5. NaN is 0x7FFFFFFF, and -0 becomes +0. The top bit of a UE4M3 scale is ignored.

Source: arXiv 2511.10909 and its published code, for Ampere, Ada and Hopper (f16, bf16) and consumer Blackwell (the
rest). The results read from a physical sm_120 GPU in :mod:`ptx_inline.isa.transcripts` are reproduced. Cancellation
across very different exponents and non-finite operands are only partly covered by them.

Everything is exact in float64: a sum of 16 products of at most 36, times two significands below 2, is below 2^12 times
2^e_max, hence below 2^47 units of step 4, and there are four; single products are below 2^27 units, and there are 32.
"""

from __future__ import annotations

import functools

import numpy as np

from ptx_inline.isa.formats import E2M3, FORMATS, Format
from ptx_inline.isa.fragments import WARP_SIZE, fragment
from ptx_inline.isa.instructions import Instruction, Numerics, instruction

#: Bit pattern of every NaN that an MMA returns.
NAN_BITS = 0x7FFFFFFF
#: Exponent of a zero: four of them, and any sum with real exponents, stay below every min_exponent and fit int16.
ZERO_EXPONENT = -2000
#: Fields of the wide formats beside the sign: mantissa bits, exponent bits, bias.
WIDE = {"f16": (10, 5, 15), "bf16": (7, 8, 127), "f32": (23, 8, 127)}
# addends in flight at once; keeps the intermediate arrays in the cache of a core
_ADDENDS_AT_ONCE = 1 << 17


def to_containers(codes: np.ndarray, format: str) -> np.ndarray:
    """Codes (uint8) as the f8f6f4 kinds hold them, one in each byte: E2M1 in bits [5:2], the others from bit 0.

    Source: PTX ISA, "mma", packing of .e2m1, .e2m3, .e3m2 for .kind::f8f6f4. Raises ``ValueError`` for an unknown
    format.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return np.asarray(codes, np.uint8) << np.uint8(2 if format == "e2m1" else 0)


def mma(
    key: str,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    sfa: np.ndarray | None = None,
    sfb: np.ndarray | None = None,
    *,
    a_format: str | None = None,
    b_format: str | None = None,
    sf_format: str | None = None,
    target: str | None = None,
) -> np.ndarray:
    """D = A B + C of the MMA ``key``, float32 (..., M, N).

    a (..., M, K), b (..., N, K): codes, uint8 (uint16 bit patterns for f16 and bf16); c: float32 (..., M, N); sfa
    (..., M, K / sf_vec_size), sfb (..., N, K / sf_vec_size): uint8, where the MMA has scales. Leading axes broadcast.
    Formats: ``None`` is the instruction's first. target: whose arithmetic, e.g. ``"sm_80"``; ``None`` the newest.
    Raises ``TypeError`` for a dtype and ``ValueError`` for a shape, a format, a code beyond its format, or scales missing
    or in excess.
    """
    description = instruction(key).on(target)
    formats = description.formats(a_format, b_format, sf_format)
    m, n, k = description.shape
    scales = description.scales_per_row
    code_dtype = np.uint16 if description.element_bits == 16 else np.uint8
    a = _checked("a", a, code_dtype, (m, k))
    b = _checked("b", b, code_dtype, (n, k))
    c = _checked("c", c, np.float32, (m, n))
    sfa, sfb = _checked_scales(description, sfa, sfb, (m, scales), (n, scales))
    if code_dtype == np.uint8:
        for name, codes, format in (("a", a, formats[0]), ("b", b, formats[1])):
            if codes.size and int(codes.max()) >> FORMATS[format].bits:
                raise ValueError(f"{name} must hold {FORMATS[format].bits}-bit {format} codes, got {codes.max():#x}")
        if description.element_bits == 8:
            a, b = to_containers(a, formats[0]), to_containers(b, formats[1])
    tile = functools.partial(_mma_tiles, description, formats)
    return _over_batch(description, tile, (a, b, c, sfa, sfb), (2, 2, 2, 2, 2), (m, n))


def mma_registers(
    key: str,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    sfa: np.ndarray | None = None,
    sfb: np.ndarray | None = None,
    *,
    byte_id_a: int = 0,
    thread_id_a: int = 0,
    byte_id_b: int = 0,
    thread_id_b: int = 0,
    a_format: str | None = None,
    b_format: str | None = None,
    sf_format: str | None = None,
    target: str | None = None,
) -> np.ndarray:
    """D registers, float32 (..., 32, 4), of the MMA ``key`` on a warp's registers.

    a, b: uint32 (..., 32, registers); c: float32 (..., 32, 4); sfa, sfb: uint32 (..., 32), where the MMA has scales;
    the rest are its immediate selectors, formats and target. Leading axes broadcast. In the 8-bit containers of the f8f6f4
    kinds bits [7:6] of a 6-bit format are ignored, and E2M1's two pad bits [1:0] are not: the hardware reads the byte
    as E2M3, which is the same number when they are zero. Raises as :func:`mma` and
    :func:`ptx_inline.isa.fragments.fragment` do.
    """
    description = instruction(key).on(target)
    formats = description.formats(a_format, b_format, sf_format)
    registers = description.registers
    a = _checked("a", a, np.uint32, (WARP_SIZE, registers["a"]))
    b = _checked("b", b, np.uint32, (WARP_SIZE, registers["b"]))
    c = _checked("c", c, np.float32, (WARP_SIZE, registers["c"]))
    sfa, sfb = _checked_scales(description, sfa, sfb, (WARP_SIZE,), (WARP_SIZE,), np.uint32)
    maps = [fragment(key, operand) for operand in ("A", "B", "C")]
    if description.sf_vec_size:
        maps.append(fragment(key, "SFA", byte_id=byte_id_a, thread_id=thread_id_a))
        maps.append(fragment(key, "SFB", byte_id=byte_id_b, thread_id=thread_id_b))
    elif (byte_id_a, thread_id_a, byte_id_b, thread_id_b) != (0, 0, 0, 0):
        raise ValueError(f"byte and thread ids select scales, which {key} has not; leave them 0")

    def tile(a, b, c, sfa, sfb):
        operands = [maps[0].unpack(a), maps[1].unpack(b), maps[2].unpack(c.view(np.uint32)).view(np.float32)]
        scales = [] if sfa is None else [maps[3].unpack(sfa[..., None]), maps[4].unpack(sfb[..., None])]
        d = _mma_tiles(description, formats, *operands, *scales)
        return maps[2].pack(d.view(np.uint32)).view(np.float32)

    return _over_batch(description, tile, (a, b, c, sfa, sfb), (2, 2, 2, 1, 1), (WARP_SIZE, registers["d"]))


def _checked(name: str, array: np.ndarray, dtype, core: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype != dtype:
        raise TypeError(f"{name} must be of dtype {np.dtype(dtype)}, got {array.dtype}")
    if array.shape[array.ndim - len(core) :] != core:
        raise ValueError(f"{name} must have the shape (..., {', '.join(map(str, core))}), got {array.shape}")
    return array


def _checked_scales(description: Instruction, sfa, sfb, core_a, core_b, dtype=np.uint8):
    if description.sf_vec_size:
        if sfa is None or sfb is None:
            raise ValueError(f"sfa and sfb must be given for {description.key}, got None")
        return _checked("sfa", sfa, dtype, core_a), _checked("sfb", sfb, dtype, core_b)
    if sfa is not None or sfb is not None:
        raise ValueError(f"sfa and sfb must be None for {description.key}, which has no scales")
    return None, None


def _over_batch(description: Instruction, tile, arrays, core_axes, core: tuple[int, int]) -> np.ndarray:
    """``tile(*arrays)`` on flat pieces of the broadcast batch."""
    shapes = [x.shape[: x.ndim - axes] for x, axes in zip(arrays, core_axes, strict=True) if x is not None]
    batch = np.broadcast_shapes(*shapes)
    views = [
        None if x is None else np.broadcast_to(x, (*batch, *x.shape[x.ndim - axes :]))
        for x, axes in zip(arrays, core_axes, strict=True)
    ]
    m, n, k = description.shape
    tiles = int(np.prod(batch))
    step = max(1, _ADDENDS_AT_ONCE // (m * n * (k // description.numerics.group)))
    result = np.empty((tiles, *core), np.float32)
    for start in range(0, tiles, step):
        stop = min(start + step, tiles)
        # indexing copies this piece only, also of a view that broadcasting made
        where = np.unravel_index(np.arange(start, stop), batch) if batch else (None,)
        result[start:stop] = tile(*(None if x is None else x[where] for x in views))
    return result.reshape(*batch, *core)


def _mma_tiles(description: Instruction, formats, a, b, c, sfa=None, sfb=None) -> np.ndarray:
    """One flat batch: a (T, M, K) and b (T, N, K) as they lie in registers, scales as bytes, c float32 (T, M, N)."""
    numerics = description.numerics
    container = description.element_bits == 8
    scales_a = scales_b = None
    if description.sf_vec_size:
        scales_a, scales_b = _decode(sfa, formats[2]), _decode(sfb, formats[2])
    with np.errstate(invalid="ignore", over="ignore"):
        (a, a_exponent), (b, b_exponent) = (
            _decode(x, format, container) for x, format in zip((a, b), formats[:2], strict=True)
        )
        if numerics.group > 1:
            return _add(numerics, *_group_addends(a, b, scales_a, scales_b, numerics.group), c)
        k = a.shape[-1]
        for start in range(0, k, numerics.step or k):
            part = slice(start, start + (numerics.step or k))
            operands = (x[..., part] for x in (a, a_exponent, b, b_exponent))
            c = _add(numerics, *_product_addends(*operands, scales_a, scales_b), c)
        return c


def _add(numerics: Numerics, addends: np.ndarray, exponents: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Steps 3 to 5: float32 (T, M, N). Overwrites the addends."""
    c_exponent = _wide_exponent(c.view(np.uint32), c == 0, "f32")
    e_max = np.maximum(np.maximum(exponents, c_exponent), numerics.min_exponent).astype(np.int32)
    per_unit = np.ldexp(1.0, numerics.fraction_bits - e_max)
    np.multiply(addends, per_unit[..., None], out=addends)
    total = np.trunc(addends, out=addends).sum(axis=-1)
    total += np.trunc(c * per_unit)
    return _round_toward_zero(total * np.ldexp(1.0, e_max - numerics.fraction_bits))


def _group_addends(a, b, scales_a, scales_b, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Addends float64 (T, M, N, groups) and the largest of their exponents (T, M, N); operands are finite."""
    tiles, _, k = a.shape
    groups = k // group
    # exact in float32: sums of 16 products that are multiples of 1/4 and at most 36
    a = a.astype(np.float32).reshape(tiles, -1, groups, group).transpose(0, 2, 1, 3)
    b = b.astype(np.float32).reshape(tiles, -1, groups, group).transpose(0, 2, 3, 1)
    dots = a @ b
    all_zero = (np.abs(a) @ np.abs(b)) == 0
    (sfa, sfa_exponent), (sfb, sfb_exponent) = (
        tuple(np.repeat(x, groups // x.shape[-1], axis=-1).transpose(0, 2, 1) for x in pair)
        for pair in (scales_a, scales_b)
    )
    addends = dots * (sfa[:, :, :, None] * sfb[:, :, None, :])
    exponents = sfa_exponent[:, :, :, None] + sfb_exponent[:, :, None, :]
    exponents[all_zero] = ZERO_EXPONENT
    return np.ascontiguousarray(np.moveaxis(addends, 1, -1)), exponents.max(axis=1)


def _product_addends(a, a_exponent, b, b_exponent, scales_a, scales_b) -> tuple[np.ndarray, np.ndarray]:
    """Addends float64 (T, M, N, K) and the largest of their exponents (T, M, N)."""
    if scales_a is not None:  # one scale for all of k
        a, a_exponent = a * scales_a[0], a_exponent + scales_a[1]
        b, b_exponent = b * scales_b[0], b_exponent + scales_b[1]
    exponents = (a_exponent[:, :, None, :] + b_exponent[:, None, :, :]).max(axis=-1)
    return a[:, :, None, :] * b[:, None, :, :], exponents


@functools.cache
def code_table(format: str, element_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Value (float64) and exponent (int16) of each code of ``element_bits`` bits, as an MMA reads it; read-only.

    format: of A, B or the scales; element_bits: the instruction's (4, 8 or 16), so 8 for E2M1 is the container. Scales
    are 8 bits.
    """
    codes = np.arange(1 << element_bits, dtype=np.uint16 if element_bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):  # widening a signalling NaN is no error here
        table = _decode(codes, format, element_bits == 8)
    for array in table:
        array.setflags(write=False)
    return table


def _decode(codes: np.ndarray, format: str, container: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Values (float64) and exponents (int16) of codes; in an 8-bit container E2M1 is read as E2M3."""
    if format in WIDE:
        dtype = np.float16 if format == "f16" else np.float32
        bits = codes if format == "f16" else codes.astype(np.uint32) << np.uint32(16)
        values = bits.view(dtype).astype(np.float64)
        return values, _wide_exponent(codes, values == 0, format)
    table = E2M3 if container and format == "e2m1" else FORMATS[format]
    values, exponents = _tables(table)
    return values[codes], exponents[codes]


@functools.cache
def _tables(format: Format) -> tuple[np.ndarray, np.ndarray]:
    """Value (float64) and exponent (int16) of each of the 256 bytes; bits above the format's are ignored."""
    codes = np.arange(256, dtype=np.uint8)
    values = format.decode(codes).astype(np.float64)
    field = (codes.astype(np.int16) >> format.mantissa_bits) & ((1 << format.exponent_bits) - 1)
    exponents = np.maximum(field, 1 if format.has_zero else 0) - format.bias
    exponents[values == 0] = ZERO_EXPONENT
    return values, exponents.astype(np.int16)


def _wide_exponent(bits: np.ndarray, is_zero: np.ndarray, format: str) -> np.ndarray:
    """Exponents (int16) of f16, bf16 or f32 bit patterns; subnormals have the smallest normal one."""
    mantissa_bits, exponent_bits, bias = WIDE[format]
    field = (bits >> bits.dtype.type(mantissa_bits)).astype(np.int16) & np.int16((1 << exponent_bits) - 1)
    return np.where(is_zero, np.int16(ZERO_EXPONENT), np.maximum(field, np.int16(1)) - np.int16(bias))


def _round_toward_zero(values: np.ndarray) -> np.ndarray:
    """float64 to float32 toward zero; from 2^128 on infinity, NaN as NAN_BITS, zero as +0."""
    rounded = values.astype(np.float32)
    bits = rounded.view(np.uint32)
    # one step toward zero where rounding to nearest went outward, which may have been to infinity
    bits -= ((np.abs(rounded) > np.abs(values)) & (np.abs(values) < 2.0**128)).astype(np.uint32)
    bits[(bits << np.uint32(1)) == 0] = 0
    bits[np.isnan(values)] = NAN_BITS
    return rounded
