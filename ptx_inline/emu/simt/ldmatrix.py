"""What ``ldmatrix`` puts into a warp's registers, from the 16-byte rows that the lanes' addresses point at.

Matrix ``r`` has the rows of lanes ``8 r .. 8 r + 7`` and becomes result register ``r``: lane ``l`` holds four bytes
of row ``l / 4``. Source: PTX ISA, "Warp-level matrix load instruction: ldmatrix".
"""

from __future__ import annotations

import numpy as np

from ptx_inline.emu.simt.jit import compiled

#: ``.m8n8.b16``: a row is 8 elements of 16 bits.
M8N8_B16 = 0
#: ``.m8n16.b8x16.b4x16_p64``: a row is 16 packed elements of 4 bits and 8 bytes of padding, widened to bytes.
M8N16_B4X16_P64 = 1
#: ``.m8n16.b8x16.b6x16_p32``: a row is 16 packed elements of 6 bits and 4 bytes of padding, widened to bytes.
M8N16_B6X16_P32 = 2


@compiled
def ldmatrix_registers(kind, num, trans, rows, out):
    """Registers ``out[:, :num]`` (uint32, (32, 4)) of ``num`` matrices (1, 2, 4); the other columns are left.

    rows: uint8 (32, 16), the bytes at each lane's address (read for lanes below ``8 * num``); trans: transposed 16-bit
    elements, for M8N8_B16 only. Widened elements lie in the low bits of their bytes, under zeros.
    """
    for register in range(num):
        for lane in range(32):
            word = np.uint32(0)
            for byte in range(4):
                row = 8 * register + lane // 4
                column = 4 * (lane % 4) + byte
                if kind == M8N16_B4X16_P64:
                    value = (rows[row, column // 2] >> np.uint8(4 * (column % 2))) & np.uint8(0xF)
                elif kind == M8N16_B6X16_P32:
                    bit = 6 * column
                    # the byte after the last element's is padding, so that there always is one
                    pair = np.uint32(rows[row, bit // 8]) | (np.uint32(rows[row, bit // 8 + 1]) << np.uint32(8))
                    value = np.uint8((pair >> np.uint32(bit % 8)) & np.uint32(0x3F))
                elif trans:
                    value = rows[8 * register + 2 * (lane % 4) + byte // 2, 2 * (lane // 4) + byte % 2]
                else:
                    value = rows[row, column]
                word = np.uint32(word | (np.uint32(value) << np.uint32(8 * byte)))
            out[lane, register] = word
