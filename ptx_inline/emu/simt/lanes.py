"""Instructions that every lane executes for itself: integers, floats, conversions, comparisons, moves."""

from __future__ import annotations

import numpy as np

from ptx_inline.emu import encoding as enc
from ptx_inline.emu.scalar_types import (
    F16,
    F32,
    IADD,
    IAND,
    IMAD,
    IMOV,
    IMUL,
    IOR,
    ISELECT,
    ISHL,
    ISHR,
    ISUB,
    IXOR,
    RN,
)
from ptx_inline.emu.simt.convert import convert
from ptx_inline.emu.simt.float_alu import f32_nearest, float_alu, float_compare, is_exact
from ptx_inline.emu.simt.floats import f32_value
from ptx_inline.emu.simt.integers import extend, int_alu, int_compare, is_signed, low_bits, width_of
from ptx_inline.emu.simt.jit import compiled

_LOW32, _U63 = np.uint64(0xFFFFFFFF), np.uint64(63)
_U0, _U1 = np.uint64(0), np.uint64(1)
_SHARED_HIGH, _LOCAL_HIGH = np.uint64(enc.SHARED_WINDOW >> 32), np.uint64(enc.LOCAL_WINDOW >> 32)


@compiled
def _common_integers(op, ty, x, y, w, z, mask):
    """The operations that kernels are made of, each a loop that the compiler can vectorise; false for another one."""
    bits = low_bits(width_of(ty))
    if op == IMOV:
        for lane in range(32):
            z[lane] = x[lane] & bits if (mask >> lane) & 1 else z[lane]
    elif op == IADD:
        for lane in range(32):
            z[lane] = (x[lane] + y[lane]) & bits if (mask >> lane) & 1 else z[lane]
    elif op == ISUB:
        for lane in range(32):
            z[lane] = (x[lane] - y[lane]) & bits if (mask >> lane) & 1 else z[lane]
    elif op == IMUL:
        for lane in range(32):
            z[lane] = (x[lane] * y[lane]) & bits if (mask >> lane) & 1 else z[lane]
    elif op == IMAD:
        for lane in range(32):
            z[lane] = (x[lane] * y[lane] + w[lane]) & bits if (mask >> lane) & 1 else z[lane]
    elif op == IAND:
        for lane in range(32):
            z[lane] = x[lane] & y[lane] if (mask >> lane) & 1 else z[lane]
    elif op == IOR:
        for lane in range(32):
            z[lane] = x[lane] | y[lane] if (mask >> lane) & 1 else z[lane]
    elif op == IXOR:
        for lane in range(32):
            z[lane] = x[lane] ^ y[lane] if (mask >> lane) & 1 else z[lane]
    elif op == ISELECT:
        for lane in range(32):
            chosen = x[lane] if w[lane] != _U0 else y[lane]
            z[lane] = chosen if (mask >> lane) & 1 else z[lane]
    elif op == ISHL:
        width = width_of(ty)
        for lane in range(32):
            amount = y[lane] & _LOW32
            shifted = (x[lane] << (amount & _U63)) & bits if amount < width else _U0
            z[lane] = shifted if (mask >> lane) & 1 else z[lane]
    elif op == ISHR and not is_signed(ty):
        width = width_of(ty)
        for lane in range(32):
            amount = y[lane] & _LOW32
            shifted = x[lane] >> (amount & _U63) if amount < width else _U0
            z[lane] = shifted if (mask >> lane) & 1 else z[lane]
    else:
        return False
    return True


@compiled
def integers(row, regs, base, mask):
    """INT rows: a register row from up to four."""
    op, ty, aux = row[enc.OP], row[enc.TYPE], row[enc.AUX]
    a, b = base + row[enc.A] * 32, base + max(row[enc.B], 0) * 32
    c, d = base + max(row[enc.C], 0) * 32, base + max(row[enc.D], 0) * 32
    target = base + row[enc.DST] * 32
    x, y, w, z = regs[a : a + 32], regs[b : b + 32], regs[c : c + 32], regs[target : target + 32]
    if _common_integers(op, ty, x, y, w, z, mask):
        return
    for lane in range(32):
        if (mask >> lane) & 1:
            z[lane] = int_alu(op, ty, aux, x[lane], y[lane], w[lane], regs[d + lane])


@compiled
def floats(row, regs, base, mask):
    """FLOAT rows."""
    op, ty, flags, rounding = row[enc.OP], row[enc.TYPE], row[enc.FLAGS], row[enc.ROUND]
    a, b, c = base + row[enc.A] * 32, base + max(row[enc.B], 0) * 32, base + max(row[enc.C], 0) * 32
    target = base + row[enc.DST] * 32
    if ty == F32 and flags == 0 and rounding == RN and is_exact(op):
        for lane in range(32):
            if (mask >> lane) & 1:
                x, y, z = f32_value(regs[a + lane]), f32_value(regs[b + lane]), f32_value(regs[c + lane])
                regs[target + lane] = f32_nearest(op, x, y, z)
        return
    for lane in range(32):
        if (mask >> lane) & 1:
            regs[target + lane] = float_alu(op, ty, flags, rounding, regs[a + lane], regs[b + lane], regs[c + lane])


@compiled
def conversions(row, regs, base, mask):
    """CONVERT rows."""
    ty, src, flags, rounding = row[enc.TYPE], row[enc.SRC_TYPE], row[enc.FLAGS], row[enc.ROUND]
    a, b, target = base + row[enc.A] * 32, base + max(row[enc.B], 0) * 32, base + row[enc.DST] * 32
    if row[enc.OP] == enc.CONVERT_LOW_BITS:
        bits = low_bits(width_of(ty))
        x, z = regs[a : a + 32], regs[target : target + 32]
        for lane in range(32):
            z[lane] = x[lane] & bits if (mask >> lane) & 1 else z[lane]
        return
    wider = is_signed(ty)
    register = low_bits(np.uint64(row[enc.AUX]))
    for lane in range(32):
        if (mask >> lane) & 1:
            value = convert(src, ty, rounding, flags, regs[a + lane], regs[b + lane])
            regs[target + lane] = extend(ty, value) & register if wider else value


@compiled
def comparisons(row, regs, base, mask):
    """COMPARE rows: ``setp`` with both predicates, and ``set``."""
    op, ty, flags = row[enc.OP], row[enc.TYPE], row[enc.FLAGS]
    a, b, c = base + row[enc.A] * 32, base + row[enc.B] * 32, base + max(row[enc.C], 0) * 32
    combine, negated, truth = row[enc.AUX], row[enc.AUX2] != 0, row[enc.ROUND]
    one = _U1
    if truth == enc.TRUE_MASK:
        one = np.uint64(0xFFFFFFFF)
    elif truth == enc.TRUE_ONE:
        one = np.uint64(0x3F800000)
    for lane in range(32):
        if (mask >> lane) & 1:
            x, y = regs[a + lane], regs[b + lane]
            p = float_compare(op, ty, flags, x, y) if ty >= F16 else int_compare(op, ty, x, y)
            q = not p
            other = (regs[c + lane] != _U0) != negated
            if combine == enc.COMBINE_AND:
                p, q = p and other, q and other
            elif combine == enc.COMBINE_OR:
                p, q = p or other, q or other
            elif combine == enc.COMBINE_XOR:
                p, q = p != other, q != other
            if row[enc.DST] >= 0:
                regs[base + row[enc.DST] * 32 + lane] = one if p else _U0
            if row[enc.DST2] >= 0:
                regs[base + row[enc.DST2] * 32 + lane] = _U1 if q else _U0


@compiled
def moves(row, lists, regs, base, mask, steps):
    """PACK, UNPACK, LOCATE and CLOCK."""
    kind, width, start = row[enc.KIND], np.uint64(row[enc.AUX]), row[enc.LIST]
    for lane in range(32):
        if not (mask >> lane) & 1:
            continue
        if kind == enc.PACK:
            value = _U0
            for k in range(row[enc.COUNT]):
                part = regs[base + lists[start + k] * 32 + lane] & low_bits(width)
                value |= part << (width * np.uint64(k))
            regs[base + row[enc.DST] * 32 + lane] = value
        elif kind == enc.UNPACK:
            value = regs[base + row[enc.A] * 32 + lane]
            for k in range(row[enc.COUNT]):
                if lists[start + k] >= 0:
                    part = (value >> (width * np.uint64(k))) & low_bits(width)
                    regs[base + lists[start + k] * 32 + lane] = part
        elif kind == enc.CLOCK:
            regs[base + row[enc.DST] * 32 + lane] = np.uint64(steps) & low_bits(width)
        else:
            high = regs[base + row[enc.A] * 32 + lane] >> np.uint64(32)
            if row[enc.OP] == enc.LOCATE_IS_SHARED:
                inside = high == _SHARED_HIGH
            elif row[enc.OP] == enc.LOCATE_IS_LOCAL:
                inside = high == _LOCAL_HIGH
            else:
                inside = high not in (_SHARED_HIGH, _LOCAL_HIGH)
            regs[base + row[enc.DST] * 32 + lane] = np.uint64(inside)
