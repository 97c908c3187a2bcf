"""The view of fragments that tables and drawings share."""

import numpy as np
import pytest

from nbfmha.ownership import ownership
from ptx_inline.isa.fragments import fragment

MMA = "m16n8k64.mxf4nvf4.4x"


def test_labels_name_lane_register_and_bits():
    held = ownership(fragment(MMA, "A"))
    assert held.runs(0) == [(8 * i, 8 * i + 8) for i in range(8)]
    assert held.label(0, 0, 8) == "T0 r0"
    assert held.label(9, 40, 48) == "T5 r3"
    assert held.label(9, 42, 44) == "T5 r3[8:16]"
    assert np.all(held.elements_of_lane == 32)


@pytest.mark.parametrize(("operand", "idle"), [("A", 0), ("SFA", 16), ("SFB", 24)])
def test_lanes_that_are_not_read_are_counted(operand, idle):
    held = ownership(fragment(MMA, operand))
    assert np.count_nonzero(held.elements_of_lane == 0) == idle
    assert ("lanes are not read" in held.replication()) is (idle > 0)


class Copies:
    """A made-up operand of one element a row: rows 0 and 1 are held by four lanes each, row 2 by none."""

    mma, operand, shape, element_bits, registers = "made up", "C", (3, 1), 32, 1
    row = np.full((32, 1), -1)
    row[0:4], row[4:8] = 0, 1
    col = np.where(row >= 0, 0, -1)
    register, bit = np.zeros(1, int), np.zeros(1, int)

    def owners(self):
        return np.array([[4], [4], [0]])


def test_replication_is_shown():
    held = ownership(Copies())
    assert held.label(0, 0, 1) == "T0 r0 x4"
    assert held.label(1, 0, 1) == "T4 r0 x4"
    assert held.label(2, 0, 1) == "no lane"
    assert held.replication() == "each element is held by 0 to 4 lanes; 24 of 32 lanes are not read"
