"""Scalar integer and bit operations of the compiled core: 64-bit slots in, 64-bit slots out.

A value of a narrower type lies in the low bits of its slot under zeros. Source: PTX ISA, "Integer Arithmetic Instructions",
"Logic and Shift Instructions".
"""

from __future__ import annotations

import numpy as np

from ptx_inline.emu.scalar_types import (
    BITS,
    EQ,
    GT,
    IABS,
    IADD,
    IADD_SAT,
    IAND,
    IBFE,
    IBFI,
    IBFIND,
    IBFIND_SHIFT,
    IBREV,
    ICLZ,
    ICNOT,
    IDIV,
    IDP4A,
    ILOP3,
    IMAD_WIDE,
    IMADHI,
    IMAX,
    IMIN,
    IMUL_WIDE,
    IMULHI,
    INEG,
    INOT,
    IOR,
    IPOPC,
    IPRMT,
    IREM,
    ISAD,
    ISHF_LEFT,
    ISHF_RIGHT,
    ISHR,
    ISUB_SAT,
    IXOR,
    LE,
    LT,
    NE,
    S8,
    S64,
)
from ptx_inline.emu.simt.jit import compiled

U0, U1 = np.uint64(0), np.uint64(1)
_U8, _U32, _U63, _U64 = np.uint64(8), np.uint64(32), np.uint64(63), np.uint64(64)
_LOW32 = np.uint64(0xFFFFFFFF)
_WIDTH = np.array(BITS, np.uint64)


@compiled
def width_of(ty):
    """Bits of a type."""
    return _WIDTH[ty]


@compiled
def low_bits(width):
    """A word with the ``width`` (1 to 64) lowest bits set."""
    return (~U0) >> (_U64 - width)


@compiled
def is_signed(ty):
    """Whether a type is a signed integer."""
    return S8 <= ty <= S64


@compiled
def extend(ty, a):
    """The 64-bit two's complement of an integer of type ``ty``."""
    width = _WIDTH[ty]
    mask = low_bits(width)
    a &= mask
    if is_signed(ty) and ((a >> (width - U1)) & U1) != U0:
        a |= ~mask
    return a


@compiled
def count_ones(a):
    """How many of the 64 bits are set, int64."""
    x = np.uint64(a)
    x -= (x >> U1) & np.uint64(0x5555555555555555)
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def highest_one(a):
    """Position of the highest set bit, -1 for zero."""
    position = -1
    while a != U0:
        a >>= U1
        position += 1
    return position


@compiled
def _high_product(ty, a, b):
    """The upper half of the product of two numbers of ``ty``."""
    width = _WIDTH[ty]
    a, b = extend(ty, a), extend(ty, b)
    if width < _U64:
        return ((a * b) >> width) & low_bits(width)
    a_low, a_high, b_low, b_high = a & _LOW32, a >> _U32, b & _LOW32, b >> _U32
    middle = a_high * b_low + ((a_low * b_low) >> _U32)
    carry = ((middle & _LOW32) + a_low * b_high) >> _U32
    high = a_high * b_high + (middle >> _U32) + carry
    if is_signed(ty):
        if np.int64(a) < 0:
            high -= b
        if np.int64(b) < 0:
            high -= a
    return high


@compiled
def _divide(ty, a, b, remainder):
    """Quotient toward zero, or remainder of the dividend's sign. Division by zero gives all ones for both, as on an H100
    (PTX leaves it open)."""
    mask = low_bits(_WIDTH[ty])
    a, b = extend(ty, a), extend(ty, b)
    if b == U0:
        return mask
    if not is_signed(ty):
        return a % b if remainder else a // b
    a_negative, b_negative = np.int64(a) < 0, np.int64(b) < 0
    a, b = U0 - a if a_negative else a, U0 - b if b_negative else b
    if remainder:
        result = a % b
        return (U0 - result if a_negative else result) & mask
    result = a // b
    return (U0 - result if a_negative != b_negative else result) & mask


@compiled
def _permute(mode, a, b, selector):
    """``prmt.b32``: bytes of {b, a}; mode 0 the default, then f4e, b4e, rc8, ecl, ecr, rc16."""
    source = (a & _LOW32) | (b << _U32)
    result = U0
    low = selector & np.uint64(3)
    for i in range(4):
        n = np.uint64(i)
        if mode == 0:
            pick = (selector >> (n * np.uint64(4))) & np.uint64(0xF)
        elif mode == 1:
            pick = low + n
        elif mode == 2:
            pick = (low - n) & np.uint64(7)
        elif mode == 3:
            pick = low
        elif mode == 4:
            pick = max(n, low)
        elif mode == 5:
            pick = min(n, low)
        else:
            pick = np.uint64(2) * (low & U1) + (n & U1)
        byte = (source >> (_U8 * (pick & np.uint64(7)))) & np.uint64(0xFF)
        if mode == 0 and (pick & _U8) != U0:  # the sign, eight times
            byte = np.uint64(0xFF) if byte >= np.uint64(0x80) else U0
        result |= byte << (_U8 * n)
    return result


@compiled
def _field_operand(width, value):
    """Position or length of a bit field: 8 bits of it, but all 32 for the 64-bit forms, as an H100 has them. PTX asks for
    0 to 255."""
    return value & _LOW32 if width == _U64 else value & np.uint64(0xFF)


@compiled
def _bit_field(ty, a, start, length):
    """``bfe``: bits from ``start`` on, sign-extended for a signed type by the highest bit that the field has in ``a``."""
    width = _WIDTH[ty]
    start, length = _field_operand(width, start), _field_operand(width, length)
    if length == U0:
        return U0
    negative = is_signed(ty) and ((a >> min(start + length - U1, width - U1)) & U1) != U0
    field = a >> start if start < width else U0
    kept = min(length, width - start) if start < width else U0
    if kept > U0:
        field &= low_bits(kept)
    if negative:
        field |= ~low_bits(kept) if kept > U0 else ~U0
    return field & low_bits(width)


@compiled
def _bit_insert(ty, field, target, start, length):
    """``bfi``: ``target`` with the low ``length`` bits of ``field`` put at ``start``."""
    width = _WIDTH[ty]
    start, length = _field_operand(width, start), _field_operand(width, length)
    if length == U0 or start >= width:
        return target
    mask = low_bits(min(length, width - start)) << start
    return (target & ~mask) | ((field << start) & mask)


@compiled
def _funnel(left, wrap, a, b, c):
    """``shf``: 64 bits {b, a} shifted; the upper word of a left shift, the lower of a right one."""
    amount = c & np.uint64(31) if wrap else min(c & _LOW32, _U32)
    pair = (a & _LOW32) | (b << _U32)
    if left:
        return ((pair << amount) >> _U32) & _LOW32 if amount < _U32 else a & _LOW32
    return (pair >> amount) & _LOW32


@compiled
def _saturated(a, b):
    """s32 sum (or difference, with ``b`` negated in 64 bits), clamped."""
    total = np.int64(a + b)
    return np.uint64(max(min(total, np.int64(0x7FFFFFFF)), np.int64(-0x80000000))) & _LOW32


@compiled
def _dot4(a_signed, b_signed, a, b, c):
    total = c
    for i in range(4):
        shift = _U8 * np.uint64(i)
        x, y = (a >> shift) & np.uint64(0xFF), (b >> shift) & np.uint64(0xFF)
        x = x - np.uint64(256) if a_signed and x > np.uint64(127) else x
        y = y - np.uint64(256) if b_signed and y > np.uint64(127) else y
        total += x * y
    return total & _LOW32


@compiled
def int_alu(op, ty, aux, a, b, c, d):
    """One integer operation on type ``ty``; ``aux`` is the operation's immediate or mode.

    Not here: the operations that :func:`ptx_inline.emu.simt.lanes.integers` does for all lanes at once, but for those that
    atomics and reductions need too.
    """
    mask = low_bits(_WIDTH[ty])
    if op == IADD:
        return (a + b) & mask
    if op == IAND:
        return a & b
    if op == IOR:
        return a | b
    if op == IXOR:
        return a ^ b
    if op == INOT:
        return ~a & mask
    if op == ISHR:  # of a signed type
        amount = min(b & _LOW32, _U63)
        return np.uint64(np.int64(extend(ty, a)) >> np.int64(amount)) & mask
    if op in (IMUL_WIDE, IMAD_WIDE):  # of 16 or 32 bits
        product = extend(ty, a) * extend(ty, b)
        return (product + c if op == IMAD_WIDE else product) & low_bits(_WIDTH[ty] + _WIDTH[ty])
    if op == IMULHI:
        return _high_product(ty, a, b)
    if op == IMADHI:
        return (_high_product(ty, a, b) + c) & mask
    if op == IDIV:
        return _divide(ty, a, b, False)
    if op == IREM:
        return _divide(ty, a, b, True)
    if op in (IMIN, IMAX):
        less = np.int64(extend(ty, a)) < np.int64(extend(ty, b)) if is_signed(ty) else a < b
        chosen = a if less == (op == IMIN) else b
        return U0 if aux != 0 and np.int64(extend(ty, chosen)) < 0 else chosen  # .relu
    if op == IABS:
        return U0 - extend(ty, a) & mask if np.int64(extend(ty, a)) < 0 else a
    if op == INEG:
        return (U0 - a) & mask
    if op == ICNOT:
        return U1 if a == U0 else U0
    if op == IPRMT:
        return _permute(aux, a, b, c)
    if op == ILOP3:
        result = U0
        for i in range(8):
            if (aux >> i) & 1:
                x = a if i & 4 else ~a
                y = b if i & 2 else ~b
                z = c if i & 1 else ~c
                result |= x & y & z
        return result & mask
    if op == IBFE:
        return _bit_field(ty, a, b, c)
    if op == IBFI:
        return _bit_insert(ty, a, b, c, d)
    if op == IPOPC:
        return np.uint64(count_ones(a))
    if op == ICLZ:
        return _WIDTH[ty] - np.uint64(highest_one(a) + 1)
    if op == IBREV:
        result = U0
        for _ in range(_WIDTH[ty]):
            result = (result << U1) | (a & U1)
            a >>= U1
        return result
    if op in (IBFIND, IBFIND_SHIFT):
        a = extend(ty, a)
        if is_signed(ty) and np.int64(a) < 0:
            a = ~a
        position = highest_one(a)
        if position < 0:
            return _LOW32
        return np.uint64(position) if op == IBFIND else _WIDTH[ty] - U1 - np.uint64(position)
    if op == ISHF_LEFT:
        return _funnel(True, aux != 0, a, b, c)
    if op == ISHF_RIGHT:
        return _funnel(False, aux != 0, a, b, c)
    if op == ISAD:
        x, y = extend(ty, a), extend(ty, b)
        less = np.int64(x) < np.int64(y) if is_signed(ty) else x < y
        return (c + (y - x if less else x - y)) & mask
    if op == IADD_SAT:
        return _saturated(extend(ty, a), extend(ty, b))
    if op == ISUB_SAT:
        return _saturated(extend(ty, a), U0 - extend(ty, b))
    if op == IDP4A:
        return _dot4((aux & 1) != 0, (aux & 2) != 0, a, b, c)
    # IBMSK, the last: ``aux`` says whether positions wrap
    start, length = a & _LOW32, b & _LOW32
    if aux:
        start, length = start & np.uint64(31), length & np.uint64(31)
    if start >= _U32 or length == U0:
        return U0
    return (low_bits(min(length, _U32)) << start) & _LOW32


@compiled
def int_compare(comparison, ty, a, b):
    """One comparison of ``setp`` on an integer type."""
    if comparison == EQ:
        return a == b
    if comparison == NE:
        return a != b
    if is_signed(ty):
        x, y = np.int64(extend(ty, a)), np.int64(extend(ty, b))
        less, equal = x < y, x == y
    else:
        less, equal = a < b, a == b
    if comparison == LT:
        return less
    if comparison == LE:
        return less or equal
    if comparison == GT:
        return not (less or equal)
    return not less  # GE

