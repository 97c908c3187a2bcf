"""Fragment maps: bijections, equal to the PTX ISA's formulas and to CuTe's layouts; and the wrong packing."""

import numpy as np
import pytest

from ptx_inline.isa.arithmetic import mma_registers
from ptx_inline.isa.cute import LAYOUTS, CuteLayout, mode_offsets, scale_layouts
from ptx_inline.isa.fragments import fragment, wrong_row_major_fragment
from ptx_inline.isa.instructions import INSTRUCTIONS
from ptx_inline.isa.patterns import all_ones, col_indicator, indicator_values, row_indicator

BLOCK_SCALE = "m16n8k64.mxf4nvf4.4x"
OPERANDS = [(key, operand) for key in INSTRUCTIONS for operand in "ABC"]
SCALES = [
    (key, operand, byte_id, thread_id)
    for key, instruction in INSTRUCTIONS.items()
    if instruction.sf_vec_size
    for operand, thread_ids in (("SFA", instruction.thread_ids_a), ("SFB", instruction.thread_ids_b))
    for byte_id in instruction.byte_ids
    for thread_id in thread_ids
]


def every_fragment():
    for key, operand in OPERANDS:
        yield fragment(key, operand)
    for key, operand, byte_id, thread_id in SCALES:
        yield fragment(key, operand, byte_id=byte_id, thread_id=thread_id)


def ptx_element(operand: str, bits: int, lane: int, i: int) -> tuple[int, int]:
    """(row, col) as stored of element i of a lane, in the PTX ISA's words ("row = groupID for ai where ...")."""
    group_id, thread = lane >> 2, lane % 4
    if operand == "C":
        return (group_id if i < 2 else group_id + 8), thread * 2 + (i & 1)
    if bits == 4:
        if operand == "A":
            first_rows = 0 <= i < 8 or 16 <= i < 24
            return (group_id if first_rows else group_id + 8), thread * 8 + (i & 7) + (0 if i < 16 else 32)
        return group_id, thread * 8 + (i & 7) + (0 if i < 8 else 32)
    if bits == 8:
        if operand == "A":
            first_rows = 0 <= i < 4 or 8 <= i < 12
            return (group_id if first_rows else group_id + 8), thread * 4 + (i & 3) + (0 if i < 8 else 16)
        return group_id, thread * 4 + (i & 3) + (0 if i < 4 else 16)
    if operand == "A":
        first_rows = 0 <= i < 2 or 4 <= i < 6
        return (group_id if first_rows else group_id + 8), thread * 2 + (i & 1) + (0 if i < 4 else 8)
    return group_id, thread * 2 + (i & 1) + (0 if i < 2 else 8)


@pytest.mark.parametrize(("key", "operand"), OPERANDS)
def test_every_lane_and_element_as_in_the_ptx_isa(key, operand):
    found = fragment(key, operand)
    for lane in range(32):
        for i in range(found.register.size):
            expected = ptx_element(operand, INSTRUCTIONS[key].element_bits, lane, i)
            assert (found.row[lane, i], found.col[lane, i]) == expected, (lane, i)


@pytest.mark.parametrize(("key", "operand"), OPERANDS)
def test_equal_to_cute_read_column_major(key, operand):
    found = fragment(key, operand)
    layout = LAYOUTS[INSTRUCTIONS[key].element_bits][operand]
    np.testing.assert_array_equal(layout.offsets(), found.col * found.shape[0] + found.row)


def test_every_element_has_exactly_one_owner_and_every_bit_at_most_one_element():
    for found in every_fragment():
        np.testing.assert_array_equal(found.owners(), 1, err_msg=f"{found.mma} {found.operand}")
        places = found.register * 32 + found.bit
        assert np.unique(places).size == places.size
        assert found.bit.max() + found.element_bits <= 32
        assert found.register.max() == found.registers - 1


@pytest.mark.parametrize(("key", "operand", "byte_id", "thread_id"), SCALES)
def test_scales_are_read_from_one_of_the_copies_in_cute(key, operand, byte_id, thread_id):
    instruction = INSTRUCTIONS[key]
    found = fragment(key, operand, byte_id=byte_id, thread_id=thread_id)
    offsets = scale_layouts(instruction.shape[2])[operand].offsets()
    read = found.row[:, 0] >= 0
    # stride-0 modes: 2 lanes hold each row of SFA, 4 each column of SFB; the selector leaves one of each
    assert np.count_nonzero(read) == found.shape[0]
    copies = {"SFA": 2, "SFB": 4}[operand]
    assert copies * np.count_nonzero(read) == 32
    for lane in np.flatnonzero(read):
        rows, elements = offsets[lane] % found.shape[0], offsets[lane] // found.shape[0]
        assert set(rows) == {found.row[lane, 0]}
        np.testing.assert_array_equal(elements, np.arange(instruction.shape[2]))
        np.testing.assert_array_equal(found.col[lane], np.unique(elements // instruction.sf_vec_size))
    np.testing.assert_array_equal(found.bit, 8 * (byte_id + np.arange(found.shape[1])))


def test_selected_lanes_as_in_the_ptx_isa():
    for thread_id, lanes in ((0, {0, 1}), (1, {2, 3})):
        found = fragment(BLOCK_SCALE, "SFA", thread_id=thread_id)
        assert {lane % 4 for lane in np.flatnonzero(found.row[:, 0] >= 0)} == lanes
        assert (found.row[4 + min(lanes), 0], found.row[4 + max(lanes), 0]) == (1, 9)
    for thread_id in range(4):
        found = fragment(BLOCK_SCALE, "SFB", thread_id=thread_id)
        assert set(np.flatnonzero(found.row[:, 0] >= 0) % 4) == {thread_id}


def test_pack_and_unpack_are_inverse():
    rng = np.random.default_rng(1)
    for found in every_fragment():
        codes = rng.integers(0, 1 << found.element_bits, (2, 3, *found.shape), dtype=np.uint64).astype(found.dtype)
        registers = found.pack(codes, fill=0xDEADBEEF)
        assert registers.shape == (2, 3, 32, found.registers)
        assert registers.dtype == np.uint32
        np.testing.assert_array_equal(found.unpack(registers), codes)
        assert found.unpack(registers).dtype == found.dtype


@pytest.mark.parametrize(("key", "operand"), [*OPERANDS, ("m16n8k32.mxf8f6f4.1x", "SFA")])
def test_pack_puts_one_element_where_the_map_says(key, operand):
    found = fragment(key, operand)
    for lane, value in ((0, 0), (5, found.register.size - 1), (28, found.register.size // 2)):
        codes = np.zeros(found.shape, found.dtype)
        codes[found.row[lane, value], found.col[lane, value]] = 1
        expected = np.zeros((32, found.registers), np.uint32)
        expected[lane, found.register[value]] = 1 << found.bit[value]
        np.testing.assert_array_equal(found.pack(codes), expected)


def test_fill_is_found_only_where_nothing_is_read():
    found = fragment("m16n8k64.mxf4.2x", "SFB", byte_id=2, thread_id=3)
    registers = found.pack(np.zeros(found.shape, np.uint8), fill=0xFFFFFFFF)[:, 0]
    assert set(registers[3::4]) == {0x0000FFFF}
    assert set(np.delete(registers, np.arange(3, 32, 4))) == {0xFFFFFFFF}


def test_maps_are_read_only_and_shared():
    found = fragment(BLOCK_SCALE, "A")
    assert fragment(BLOCK_SCALE, "A") is found
    with pytest.raises(ValueError, match="read-only"):
        found.row[0, 0] = 1


@pytest.mark.parametrize(
    ("arguments", "selectors", "message"),
    [
        (("m16n8k8", "A"), {}, "mma must be one of m16n8k64"),
        ((BLOCK_SCALE, "D"), {}, "operand must be one of A, B, C, SFA, SFB, got 'D'"),
        (("m16n8k16.f16", "SFA"), {}, "which has no scales"),
        ((BLOCK_SCALE, "SFA"), {"byte_id": 1}, "byte_id must be one of"),
        ((BLOCK_SCALE, "SFA"), {"thread_id": 2}, "thread_id must be one of"),
        ((BLOCK_SCALE, "SFB"), {"thread_id": 4}, "thread_id must be one of"),
        (("m16n8k64.mxf4.2x", "SFA"), {"byte_id": 1}, "byte_id must be one of"),
        ((BLOCK_SCALE, "A"), {"thread_id": 1}, "operand A has none"),
    ],
)
def test_wrong_names_and_selectors(arguments, selectors, message):
    with pytest.raises(ValueError, match=message):
        fragment(*arguments, **selectors)


def test_wrong_matrices_and_registers():
    found = fragment(BLOCK_SCALE, "A")
    with pytest.raises(TypeError, match="integer bit patterns, got float32"):
        found.pack(np.zeros(found.shape, np.float32))
    with pytest.raises(ValueError, match=r"shape \(..., 16, 64\)"):
        found.pack(np.zeros((64, 16), np.uint8))
    for code in (16, -1):
        with pytest.raises(ValueError, match="codes of 4 bits"):
            found.pack(np.full(found.shape, code, np.int16))
    with pytest.raises(TypeError, match="uint32, got float32"):
        found.unpack(np.zeros((32, 4), np.float32))
    with pytest.raises(ValueError, match=r"shape \(..., 32, 4\)"):
        found.unpack(np.zeros((32, 2), np.uint32))
    with pytest.raises(ValueError, match="operand must be one of A, B, C, got 'SFA'"):
        wrong_row_major_fragment(BLOCK_SCALE, "SFA")


def test_empty_batch():
    found = fragment(BLOCK_SCALE, "A")
    assert found.unpack(found.pack(np.zeros((0, 16, 64), np.uint8))).shape == (0, 16, 64)


def test_cute_layouts_run_the_first_mode_fastest():
    np.testing.assert_array_equal(mode_offsets((2, 3), (10, 1)), [0, 10, 1, 11, 2, 12])
    np.testing.assert_array_equal(CuteLayout((2, (2, 2)), (1, (10, 100))).offsets()[1], [1, 11, 101, 111])


def product(pattern, a_map, b_map, c_map):
    a, b, expected = pattern(INSTRUCTIONS[BLOCK_SCALE].shape)
    ones = np.full(32, 0x38383838, np.uint32)
    d = mma_registers(BLOCK_SCALE, a_map.pack(a), b_map.pack(b), np.zeros((32, 4), np.float32), ones, ones)
    return c_map.unpack(d.view(np.uint32)).view(np.float32), expected


@pytest.mark.parametrize("pattern", [all_ones, row_indicator, col_indicator])
def test_right_packing_gives_the_patterns_exactly(pattern):
    got, expected = product(pattern, *(fragment(BLOCK_SCALE, operand) for operand in "ABC"))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("c_map", [fragment, wrong_row_major_fragment])
def test_row_major_reading_gives_what_the_rtx_5090_printed(c_map):
    wrong = [wrong_row_major_fragment(BLOCK_SCALE, operand) for operand in "AB"]
    maps = (*wrong, c_map(BLOCK_SCALE, "C"))
    got, expected = product(all_ones, *maps)
    np.testing.assert_array_equal(got, expected)  # which is why all-ones proves nothing about a packing
    np.testing.assert_array_equal(product(col_indicator, *maps)[0], 112.0)
    np.testing.assert_array_equal(product(row_indicator, *maps)[0], 112.0)


def test_row_major_reading_mixes_four_rows_in_each_lane():
    wrong = wrong_row_major_fragment(BLOCK_SCALE, "A")
    np.testing.assert_array_equal(wrong.owners(), 1)
    for lane in range(32):
        t = lane % 4
        assert set(wrong.row[lane]) == {2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9}


@pytest.mark.parametrize(("key", "operand"), OPERANDS)
def test_wrong_maps_are_bijections_that_differ(key, operand):
    wrong, right = wrong_row_major_fragment(key, operand), fragment(key, operand)
    np.testing.assert_array_equal(wrong.owners(), 1)
    assert not np.array_equal(wrong.row, right.row)


def test_indicator_values():
    np.testing.assert_array_equal(indicator_values(), [0, 0.5, 1, 1.5, 2, 2, 3, 4])
    assert indicator_values().mean() * 64 == 112
