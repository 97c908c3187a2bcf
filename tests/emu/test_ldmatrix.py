"""ldmatrix against the PTX ISA's layout written with whole arrays."""

import numpy as np
import pytest
from numba import njit

from ptx_inline.emu.simt.ldmatrix import M8N8_B16, M8N16_B4X16_P64, M8N16_B6X16_P32, ldmatrix_registers

LANE = np.arange(32)


@njit
def compiled(kind, num, trans, rows, out):
    ldmatrix_registers(kind, num, trans, rows, out)


def load(kind, num, trans, rows):
    out = np.full((32, 4), 0x55555555, np.uint32)
    compiled(kind, num, trans, rows, out)
    assert np.all(out[:, num:] == 0x55555555)
    return out[:, :num]


def random_rows(num, seed=0):
    """Rows of 16 random bytes; those of lanes that are not asked must not matter, hence another value in each call."""
    rows = np.random.default_rng(seed).integers(0, 256, (32, 16), dtype=np.uint8)
    rows[8 * num :] = np.random.default_rng().integers(0, 256, (32 - 8 * num, 16), dtype=np.uint8)
    return rows


@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_m8n8_b16(num, trans):
    rows = random_rows(num)
    matrices = rows.view("<u2").reshape(4, 8, 8)[:num].astype(np.uint32)
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    row, column = LANE // 4, 2 * (LANE % 4)
    expected = matrices[:, row, column] | (matrices[:, row, column + 1] << np.uint32(16))
    np.testing.assert_array_equal(load(M8N8_B16, num, trans, rows), expected.T)


@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize(("kind", "bits"), [(M8N16_B4X16_P64, 4), (M8N16_B6X16_P32, 6)])
def test_widened_elements(kind, bits, num):
    rows = random_rows(num)
    packed = np.unpackbits(rows, axis=1, bitorder="little")[:, : 16 * bits].reshape(4, 8, 16, bits)
    elements = (packed.astype(np.uint32) << np.arange(bits, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    expected = np.zeros((num, 32), np.uint32)
    for byte in range(4):
        expected |= elements[:num, LANE // 4, 4 * (LANE % 4) + byte] << np.uint32(8 * byte)
    np.testing.assert_array_equal(load(kind, num, False, rows), expected.T)
    # the padding is not read
    rows[:, 2 * bits :] ^= 0xFF
    np.testing.assert_array_equal(load(kind, num, False, rows), expected.T)


def test_known_bytes():
    rows = np.zeros((32, 16), np.uint8)
    rows[0, :3] = 0x21, 0x43, 0x65
    assert load(M8N8_B16, 1, False, rows)[0, 0] == 0x00654321 & 0xFFFFFFFF
    assert load(M8N16_B4X16_P64, 1, False, rows)[:2, 0].tolist() == [0x04030201, 0x00000605]
    # 6-bit elements 1, 2, 3, 4 in three bytes
    rows[0, :3] = np.array([1 | 2 << 6 | 3 << 12 | 4 << 18], "<u4").view(np.uint8)[:3]
    assert load(M8N16_B6X16_P32, 1, False, rows)[0, 0] == 0x04030201
