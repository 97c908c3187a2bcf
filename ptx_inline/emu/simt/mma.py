"""The MMAs of one warp in compiled code: :func:`ptx_inline.isa.arithmetic.mma_registers`, bit for bit, on register images.

One function serves every instruction and format. What tells them apart is data, taken from ``isa`` in plain Python: the
value and exponent of each code, where each element lies in the registers, and how the products are added. The tables of
all MMAs of a program are stacked into one :class:`MmaTables`, and an index picks the MMA.

Sums are exact in float32 within a group of products and in float64 after that, for the reasons given in
:mod:`ptx_inline.isa.arithmetic`, so their order does not matter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ptx_inline.emu.simt.jit import compiled
from ptx_inline.isa.arithmetic import NAN_BITS, WIDE, code_table
from ptx_inline.isa.fragments import fragment
from ptx_inline.isa.instructions import INSTRUCTIONS, instruction

# columns of MmaTables.numbers, and their positions
_FIELDS = (
    *("k", "element_bits", "group", "step", "fraction_bits", "min_exponent"),
    *("sf_vec_size", "scales", "thread_ids_a", "thread_ids_b", "byte_ids"),
    *("a_table", "b_table", "sf_table"),
    *("a_map", "b_map", "c_map", "sfa_map", "sfb_map"),
)
_K, _ELEMENT_BITS, _GROUP, _STEP, _FRACTION_BITS, _MIN_EXPONENT = range(6)
_SF_VEC_SIZE, _SCALES, _THREAD_IDS_A, _THREAD_IDS_B, _BYTE_IDS = range(6, 11)
_A_TABLE, _B_TABLE, _SF_TABLE = range(11, 14)
_A_MAP, _B_MAP, _C_MAP, _SFA_MAP, _SFB_MAP = range(14, 19)

# every MMA has the same M and N, so these are constants of the compiled code
((_M, _N),) = {description.shape[:2] for description in INSTRUCTIONS.values()}
_MAX_K = max(description.shape[2] for description in INSTRUCTIONS.values())
_MAX_GROUPS = max(d.shape[2] // d.numerics.group for d in INSTRUCTIONS.values() if d.numerics.group > 1)
_MAX_SCALES = max(description.scales_per_row for description in INSTRUCTIONS.values())
_F32_MANTISSA_BITS, _F32_EXPONENT_BITS, _F32_BIAS = WIDE["f32"]
_F32_EXPONENT_MASK = (1 << _F32_EXPONENT_BITS) - 1
# float64, the format of the sums
_F64_MANTISSA_BITS, _F64_BIAS = np.finfo(np.float64).nmant, np.finfo(np.float64).maxexp - 1
_F32_LIMIT = 2.0 ** np.finfo(np.float32).maxexp
_NAN_BITS = np.uint32(NAN_BITS)
# a place in the registers, in one int32: lane, register, lowest bit
_LANE_SHIFT, _REGISTER_SHIFT, _PLACE_MASK = 16, 8, 0xFF


class MmaTables(NamedTuple):
    """What the MMAs of a program are, for :func:`mma`; C-contiguous arrays.

    Attributes:
        numbers: int64 (MMAs, fields): shape and numerics, and where its parts of the other arrays begin.
        values, exponents: float32, int16: value and exponent of each code, format after format.
        places: int32: where element ``row * cols + col`` of an operand lies in the registers, operand after operand;
            for the scales, one such map for each byte and thread selector.
    """

    numbers: np.ndarray
    values: np.ndarray
    exponents: np.ndarray
    places: np.ndarray


@dataclass(frozen=True, eq=False)
class MmaTable:
    """One MMA with its formats, before stacking: fields by name, (values, exponents) and maps by the field they fill."""

    numbers: dict[str, int]
    tables: dict[str, tuple[np.ndarray, np.ndarray]]
    maps: dict[str, np.ndarray]


@functools.cache
def mma_table(
    key: str,
    a_format: str | None = None,
    b_format: str | None = None,
    sf_format: str | None = None,
    target: str | None = None,
) -> MmaTable:
    """The MMA ``key`` of ``INSTRUCTIONS`` with these formats (``None``: its first), for all its selectors.

    target: whose arithmetic, e.g. ``"sm_80"``; ``None`` the newest.

    Raises ``ValueError`` for an unknown key and a format that the instruction does not take.
    """
    description = instruction(key).on(target)
    a_format, b_format, sf_format = description.formats(a_format, b_format, sf_format)
    bits = description.element_bits
    tables = {"a_table": _narrow_table(a_format, bits), "b_table": _narrow_table(b_format, bits)}
    maps = {f"{operand.lower()}_map": _places(fragment(key, operand)) for operand in ("A", "B", "C")}
    numbers = {
        "k": description.shape[2],
        "element_bits": bits,
        "group": description.numerics.group,
        "step": description.numerics.step or description.shape[2],
        "fraction_bits": description.numerics.fraction_bits,
        "min_exponent": description.numerics.min_exponent,
        "sf_vec_size": description.sf_vec_size,
        "scales": description.scales_per_row,
    }
    if sf_format is not None:
        numbers["byte_ids"] = sum(1 << byte_id for byte_id in description.byte_ids)
        tables["sf_table"] = _narrow_table(sf_format, 8)
        for operand, thread_ids in (("A", description.thread_ids_a), ("B", description.thread_ids_b)):
            numbers[f"thread_ids_{operand.lower()}"] = max(thread_ids) + 1
            maps[f"sf{operand.lower()}_map"] = _scale_places(key, f"SF{operand}", description.byte_ids, thread_ids)
    return MmaTable(numbers, tables, maps)


def stack_tables(tables: list[MmaTable] | tuple[MmaTable, ...] = ()) -> MmaTables:
    """The tables of a program's MMAs; :func:`mma` is given the position in ``tables``. Equal parts are kept once."""
    numbers = np.zeros((max(len(tables), 1), len(_FIELDS)), np.int64)
    starts: dict[int, int] = {}
    values, exponents, places = ([np.zeros(1, dtype)] for dtype in (np.float32, np.int16, np.int32))

    def put(pools, arrays) -> int:
        """Where ``arrays`` begin in ``pools``. They are cached, so that an object stands for its content."""
        if id(arrays[0]) not in starts:
            starts[id(arrays[0])] = sum(part.size for part in pools[0])
            for pool, array in zip(pools, arrays, strict=True):
                pool.append(array)
        return starts[id(arrays[0])]

    for row, table in zip(numbers, tables, strict=False):
        fields = dict(table.numbers)
        fields.update((name, put((values, exponents), arrays)) for name, arrays in table.tables.items())
        fields.update((name, put((places,), (array,))) for name, array in table.maps.items())
        row[:] = [fields.get(name, 0) for name in _FIELDS]
    return MmaTables(numbers, *(np.concatenate(pool) for pool in (values, exponents, places)))


@functools.cache
def _narrow_table(format: str, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The code table with the values as float32, which holds every value of every format."""
    values, exponents = code_table(format, bits)
    with np.errstate(invalid="ignore"):
        return values.astype(np.float32), exponents


def _places(map) -> np.ndarray:
    """int32 (rows * cols): lane, register and bit of each element of a fragment."""
    rows, cols = map.shape
    lane, value = np.nonzero(map.row >= 0)
    places = np.zeros(rows * cols, np.int32)
    places[map.row[lane, value] * cols + map.col[lane, value]] = (
        (lane << _LANE_SHIFT) | (map.register[value] << _REGISTER_SHIFT) | map.bit[value]
    )
    return places


def _scale_places(key: str, operand: str, byte_ids, thread_ids) -> np.ndarray:
    """The maps of scales, byte selector by thread selector; zeros for those between that are not allowed."""
    shape = fragment(key, operand).shape
    places = np.zeros((max(byte_ids) + 1, max(thread_ids) + 1, shape[0] * shape[1]), np.int32)
    for byte_id in byte_ids:
        for thread_id in thread_ids:
            places[byte_id, thread_id] = _places(fragment(key, operand, byte_id=byte_id, thread_id=thread_id))
    return places.reshape(-1)


@compiled
def _power_of_two(exponent):
    """2.0 ** exponent, for an exponent in float64's normal range."""
    return np.int64((np.int64(exponent) + _F64_BIAS) << _F64_MANTISSA_BITS).view(np.float64)


@compiled
def _toward_zero(value):
    """Bits of a float64 rounded toward zero to float32: NaN is canonical, -0 becomes +0."""
    if np.isnan(value):
        return _NAN_BITS
    rounded = np.float32(value)
    bits = np.float32(rounded).view(np.uint32)
    # one step toward zero where rounding to nearest went outward, which may have been to infinity
    if abs(np.float64(rounded)) > abs(value) and abs(value) < _F32_LIMIT:
        bits = np.uint32(bits - np.uint32(1))
    if (bits << np.uint32(1)) & np.uint32(0xFFFFFFFF) == 0:
        return np.uint32(0)
    return bits


@compiled
def _code(registers, place, mask):
    word = registers[place >> _LANE_SHIFT, (place >> _REGISTER_SHIFT) & _PLACE_MASK]
    return np.int64((word >> np.uint32(place & _PLACE_MASK)) & mask)


@compiled
def _load_scales(tables, start, table, rows, count, registers, values, exponents):
    """Scales (rows, count) from a scale register of each lane."""
    for i in range(rows * count):
        place = tables.places[start + i]
        code = np.int64((registers[place >> _LANE_SHIFT] >> np.uint32(place & _PLACE_MASK)) & np.uint32(0xFF))
        values[i // count, i % count] = tables.values[table + code]
        exponents[i // count, i % count] = tables.exponents[table + code]


@compiled
def _load_addends(numbers, tables, c, e_max, total):
    """C and its exponents, at least the smallest one, as (M, N)."""
    for m in range(_M):
        for n in range(_N):
            place = tables.places[numbers[_C_MAP] + m * _N + n]
            bits = c[place >> _LANE_SHIFT, (place >> _REGISTER_SHIFT) & _PLACE_MASK]
            total[m, n] = np.float64(np.uint32(bits).view(np.float32))
            e_max[m, n] = numbers[_MIN_EXPONENT]
            if total[m, n] != 0.0:
                field = np.int64(bits >> np.uint32(_F32_MANTISSA_BITS)) & np.int64(_F32_EXPONENT_MASK)
                e_max[m, n] = max(np.int64(e_max[m, n]), max(field, np.int64(1)) - np.int64(_F32_BIAS))


@compiled
def _add_groups(numbers, tables, a, b, sfa, sfa_exponent, sfb, sfb_exponent, e_max, total):
    """MMAs that add groups of products; e_max and total (M, N) hold C's exponents and C, and get the result."""
    k, group = numbers[_K], numbers[_GROUP]
    mask = np.uint32((np.int64(1) << numbers[_ELEMENT_BITS]) - np.int64(1))
    groups = k // group
    scales = numbers[_SCALES]
    columns = np.empty((_MAX_K, _N), np.float32)  # of B
    start, table = numbers[_B_MAP], numbers[_B_TABLE]
    for n in range(_N):
        for i in range(k):
            columns[i, n] = tables.values[table + _code(b, tables.places[start + n * k + i], mask)]
    dots = np.empty((_MAX_GROUPS, _M, _N), np.float32)
    start, table = numbers[_A_MAP], numbers[_A_TABLE]
    magnitudes = np.empty(_N, np.float32)
    for m in range(_M):
        for g in range(groups):
            s = g * scales // groups
            for n in range(_N):
                dots[g, m, n] = np.float32(0)
                magnitudes[n] = np.float32(0)
            for i in range(g * group, g * group + group):
                factor = tables.values[table + _code(a, tables.places[start + m * k + i], mask)]
                for n in range(_N):
                    product = factor * columns[i, n]
                    dots[g, m, n] += product
                    magnitudes[n] += abs(product)
            for n in range(_N):
                if magnitudes[n] != np.float32(0):  # a group of zeros has no exponent
                    e_max[m, n] = max(e_max[m, n], sfa_exponent[m, s] + sfb_exponent[n, s])
    for m in range(_M):
        for n in range(_N):
            unit = _power_of_two(numbers[_FRACTION_BITS] - np.int64(e_max[m, n]))
            total[m, n] = np.trunc(total[m, n] * unit)
            for g in range(groups):
                s = g * scales // groups
                total[m, n] += np.trunc(np.float64(dots[g, m, n]) * (sfa[m, s] * sfb[n, s]) * unit)


@compiled
def _add_products(numbers, tables, first, a, b, sfa, sfa_exponent, sfb, sfb_exponent, e_max, total):
    """MMAs that add single products, whose scales multiply the elements, those from ``first`` to the end of the step;
    otherwise as :func:`_add_groups`."""
    k, vec = numbers[_K], numbers[_SF_VEC_SIZE]
    end = first + numbers[_STEP]
    mask = np.uint32((np.int64(1) << numbers[_ELEMENT_BITS]) - np.int64(1))
    columns = np.empty((_MAX_K, _N), np.float64)  # of B
    column_exponents = np.empty((_MAX_K, _N), np.int32)
    start, table = numbers[_B_MAP], numbers[_B_TABLE]
    for n in range(_N):
        for i in range(first, end):
            code = _code(b, tables.places[start + n * k + i], mask)
            columns[i, n] = np.float64(tables.values[table + code])
            column_exponents[i, n] = np.int32(tables.exponents[table + code])
            if vec:
                columns[i, n] *= sfb[n, i // vec]
                column_exponents[i, n] += sfb_exponent[n, i // vec]
    row = np.empty(_MAX_K, np.float64)  # of A
    units = np.empty(_N, np.float64)
    start, table = numbers[_A_MAP], numbers[_A_TABLE]
    for m in range(_M):
        for i in range(first, end):
            code = _code(a, tables.places[start + m * k + i], mask)
            row[i] = np.float64(tables.values[table + code])
            exponent = np.int32(tables.exponents[table + code])
            if vec:
                row[i] *= sfa[m, i // vec]
                exponent += sfa_exponent[m, i // vec]
            for n in range(_N):
                e_max[m, n] = max(e_max[m, n], np.int32(exponent + column_exponents[i, n]))
        for n in range(_N):
            units[n] = _power_of_two(numbers[_FRACTION_BITS] - np.int64(e_max[m, n]))
            total[m, n] = np.trunc(total[m, n] * units[n])
        for i in range(first, end):
            for n in range(_N):
                total[m, n] += np.trunc(row[i] * columns[i, n] * units[n])


@compiled
def selector_allowed(numbers, which, value):
    """Whether the instruction takes this byte_id_a, thread_id_a, byte_id_b or thread_id_b (``which`` 0 to 3)."""
    if which == 1:
        return value < numbers[_THREAD_IDS_A]
    if which == 3:
        return value < numbers[_THREAD_IDS_B]
    return value < 4 and ((numbers[_BYTE_IDS] >> value) & 1) != 0


@compiled
def mma(tables, index, byte_id_a, thread_id_a, byte_id_b, thread_id_b, a, b, c, sfa, sfb, d):
    """D of the MMA ``tables.numbers[index]`` into ``d``, which may be ``c``.

    a, b: uint32 (32, registers); c, d: uint32 (32, 4), float32 bits; sfa, sfb: uint32 (32,). Columns beyond the MMA's
    registers are not read; without scales neither are sfa, sfb and the selectors, which must be allowed ones otherwise.
    """
    numbers = tables.numbers[np.int64(index)]
    row_scales, column_scales = np.empty((_M, _MAX_SCALES), np.float64), np.empty((_N, _MAX_SCALES), np.float64)
    row_exponents, column_exponents = np.empty((_M, _MAX_SCALES), np.int32), np.empty((_N, _MAX_SCALES), np.int32)
    scales = numbers[_SCALES]
    if scales:
        table = numbers[_SF_TABLE]
        start = numbers[_SFA_MAP] + (np.int64(byte_id_a) * numbers[_THREAD_IDS_A] + np.int64(thread_id_a)) * (_M * scales)
        _load_scales(tables, start, table, _M, scales, sfa, row_scales, row_exponents)
        start = numbers[_SFB_MAP] + (np.int64(byte_id_b) * numbers[_THREAD_IDS_B] + np.int64(thread_id_b)) * (_N * scales)
        _load_scales(tables, start, table, _N, scales, sfb, column_scales, column_exponents)
    e_max = np.empty((_M, _N), np.int32)
    total = np.empty((_M, _N), np.float64)
    for first in range(0, numbers[_K], numbers[_STEP]):
        _load_addends(numbers, tables, d if first > 0 else c, e_max, total)
        if numbers[_GROUP] > 1:
            _add_groups(numbers, tables, a, b, row_scales, row_exponents, column_scales, column_exponents, e_max, total)
        else:
            _add_products(
                numbers, tables, first, a, b, row_scales, row_exponents, column_scales, column_exponents, e_max, total
            )
        for m in range(_M):
            for n in range(_N):
                place = tables.places[numbers[_C_MAP] + m * _N + n]
                unit = _power_of_two(np.int64(e_max[m, n]) - numbers[_FRACTION_BITS])
                bits = _toward_zero(total[m, n] * unit)
                d[place >> _LANE_SHIFT, (place >> _REGISTER_SHIFT) & _PLACE_MASK] = bits
