"""Every integer and bit operation as a case with its meaning in Python integers, from the PTX ISA."""

from __future__ import annotations

import itertools
import operator

from elementwise import WIDTHS, Case

LUTS = (0x00, 0x01, 0x1B, 0x3C, 0x40, 0x55, 0x6A, 0x80, 0x96, 0xAC, 0xB8, 0xC0, 0xCA, 0xE8, 0xF0, 0xFE, 0xFF)
PERMUTE_MODES = ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16")
COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
               "ge": operator.ge}  # fmt: skip
ALIASES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_JOINS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def signed(x: int, width: int) -> int:
    """The two's complement number of the lowest bits of ``x``."""
    x &= (1 << width) - 1
    return x - (1 << width) if x >> (width - 1) else x


def reader(ty: str):
    """Function: bit pattern -> number of a PTX type such as s32."""
    width = int(ty[1:])
    return (lambda x: signed(x, width)) if ty[0] == "s" else (lambda x: x)


def quotient(x: int, y: int) -> int:
    """Toward zero."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def _arithmetic() -> list[Case]:
    cases = []

    def add(name, ty, count, function, result=None, sources=None, body=None):
        """A case on numbers of ``ty``; the function's result is wrapped."""
        read = reader(ty)
        kind = f"u{ty[1:]}"
        result = result or kind
        operands = ", ".join(f"%{letter}" for letter in "abce"[:count])
        mask = (1 << WIDTHS[result]) - 1
        cases.append(
            Case(
                f"{name}.{ty}", body or f"{name}.{ty} %d, {operands};", sources or (kind,) * count, result,
                lambda *values: function(*map(read, values)) & mask,
            )
        )  # fmt: skip

    for ty in ("u16", "s16", "u32", "s32", "u64", "s64"):
        width, read = int(ty[1:]), reader(ty)
        add("add", ty, 2, operator.add)
        add("sub", ty, 2, operator.sub)
        add("mul.lo", ty, 2, operator.mul)
        add("mul.hi", ty, 2, lambda x, y, w=width: x * y >> w)
        add("mad.lo", ty, 3, lambda x, y, z: x * y + z)
        add("mad.hi", ty, 3, lambda x, y, z, w=width: (x * y >> w) + z)
        add("min", ty, 2, min)
        add("max", ty, 2, max)
        add("sad", ty, 3, lambda x, y, z: abs(x - y) + z)
        for name, function in (("div", quotient), ("rem", lambda x, y: x - y * quotient(x, y))):
            body = (
                f"{{ .reg .b{width} %t; .reg .pred %z; setp.eq.u{width} %z, %b, 0;"
                f" selp.b{width} %t, 1, %b, %z; {name}.{ty} %d, %a, %t; }}"
            )
            add(name, ty, 2, lambda x, y, f=function: f(x, y or 1), body=body)
        if ty[0] == "s":
            add("abs", ty, 1, abs)
            add("neg", ty, 1, operator.neg)
        add("shr", ty, 2, lambda x, y: x >> y, sources=(f"u{width}", "amount"))
        # shr's amount is no number of the type
        cases[-1] = Case(f"shr.{ty}", cases[-1].body, cases[-1].sources, f"u{width}",
                         lambda x, y, r=read, w=width: (r(x) >> min(y, w)) & ((1 << w) - 1))  # fmt: skip
        if width < 64:
            wide = f"u{2 * width}"
            add("mul.wide", ty, 2, operator.mul, result=wide)
            cases.append(
                Case(
                    f"mad.wide.{ty}", f"mad.wide.{ty} %d, %a, %b, %c;", (f"u{width}",) * 2 + (wide,), wide,
                    lambda x, y, z, r=read, w=width: (r(x) * r(y) + z) & ((1 << 2 * w) - 1),
                )
            )  # fmt: skip
    for name, function in (("min", min), ("max", max)):
        add(f"{name}.relu", "s32", 2, lambda x, y, f=function: max(f(x, y), 0))
    for name, function in (("add", operator.add), ("sub", operator.sub)):
        add(f"{name}.sat", "s32", 2, lambda x, y, f=function: max(min(f(x, y), 2**31 - 1), -(2**31)))
    return cases


def _bits() -> list[Case]:
    cases = []
    for width in (16, 32, 64):
        kind, ty, mask = f"u{width}", f"b{width}", (1 << width) - 1
        for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
            cases.append(Case(f"{name}.{ty}", f"{name}.{ty} %d, %a, %b;", (kind, kind), kind, function))
        cases.append(Case(f"not.{ty}", f"not.{ty} %d, %a;", (kind,), kind, lambda x, m=mask: x ^ m))
        cases.append(Case(f"cnot.{ty}", f"cnot.{ty} %d, %a;", (kind,), kind, lambda x: int(x == 0)))
        cases.append(
            Case(f"shl.{ty}", f"shl.{ty} %d, %a, %b;", (kind, "amount"), kind,
                 lambda x, y, w=width, m=mask: (x << min(y, w)) & m)
        )  # fmt: skip
        cases.append(
            Case(f"selp.{ty}", f"{{ .reg .pred %x; setp.ne.u32 %x, %c, 0; selp.{ty} %d, %a, %b, %x; }}",
                 (kind, kind, "amount"), kind, lambda x, y, z: x if z else y)
        )  # fmt: skip
        if width == 16:
            continue
        cases.append(Case(f"popc.{ty}", f"popc.{ty} %d, %a;", (kind,), "u32", lambda x: x.bit_count()))
        cases.append(Case(f"clz.{ty}", f"clz.{ty} %d, %a;", (kind,), "u32", lambda x, w=width: w - x.bit_length()))
        cases.append(Case(f"brev.{ty}", f"brev.{ty} %d, %a;", (kind,), kind, lambda x, w=width: int(f"{x:0{w}b}"[::-1], 2)))
        cases.append(
            Case(f"bfi.{ty}", f"bfi.{ty} %d, %a, %b, %c, %e;", (kind, kind, "amount", "amount"), kind,
                 lambda f, x, p, n, w=width: insert(f, x, _field(p, w), _field(n, w), w))
        )  # fmt: skip
        for letter in "us":
            of = f"{letter}{width}"
            cases.append(
                Case(f"bfe.{of}", f"bfe.{of} %d, %a, %b, %c;", (kind, "amount", "amount"), kind,
                     lambda x, p, n, w=width, s=letter == "s": extract(x, _field(p, w), _field(n, w), w, s))
            )  # fmt: skip
            for suffix in ("", ".shiftamt"):
                cases.append(
                    Case(f"bfind{suffix}.{of}", f"bfind{suffix}.{of} %d, %a;", (kind,), "u32",
                         lambda x, w=width, s=letter == "s", t=bool(suffix): find(x, w, s, t))
                )  # fmt: skip
    for half in ("low", "high"):
        body = f"{{ .reg .b16 %low, %high; mov.b32 {{%low, %high}}, %a; mov.b32 %d, {{%{half}, %{half}}}; }}"
        cases.append(
            Case(f"mov.b32 {half} twice", body, ("u32",), "u32",
                 lambda x, s=16 * (half == "high"): (x >> s & 0xFFFF) * 0x10001)
        )  # fmt: skip
    for mode in PERMUTE_MODES:
        cases.append(
            Case(f"prmt{mode}", f"prmt.b32{mode} %d, %a, %b, %c;", ("u32", "u32", "selector"), "u32",
                 lambda x, y, z, m=mode: permute(x, y, z, m))
        )  # fmt: skip
    for lut in LUTS:
        cases.append(
            Case(f"lop3 {lut:#x}", f"lop3.b32 %d, %a, %b, %c, {lut:#x};", ("u32", "u32", "u32"), "u32",
                 lambda x, y, z, t=lut: lookup(x, y, z, t))
        )  # fmt: skip
    for left, wrap in itertools.product((True, False), repeat=2):
        name = f"shf.{'l' if left else 'r'}.{'wrap' if wrap else 'clamp'}.b32"
        cases.append(
            Case(name, f"{name} %d, %a, %b, %c;", ("u32", "u32", "amount"), "u32",
                 lambda x, y, n, v=left, w=wrap: funnel(x, y, n, v, w))
        )  # fmt: skip
    for a, b in itertools.product("us", repeat=2):
        cases.append(
            Case(f"dp4a.{a}32.{b}32", f"dp4a.{a}32.{b}32 %d, %a, %b, %c;", ("u32", "u32", "u32"), "u32",
                 lambda x, y, z, s=a == "s", t=b == "s": dot4(x, y, z, s, t))
        )  # fmt: skip
    for wrap in (True, False):
        name = f"bmsk.{'wrap' if wrap else 'clamp'}.b32"
        cases.append(
            Case(name, f"{name} %d, %a, %b;", ("amount", "amount"), "u32", lambda p, n, w=wrap: mask_bits(p, n, w))
        )
    return cases


def _field(value: int, width: int) -> int:
    """Position or length of a bit field beyond the 0 to 255 that PTX allows: an H100 takes 8 bits of it, or for the 64-bit
    forms all of it, of which more than 128 says nothing new."""
    return min(value, 128) if width == 64 else value & 255


def insert(field: int, x: int, position: int, length: int, width: int) -> int:
    for i in range(length):
        if position + i < width:
            bit = 1 << (position + i)
            x = x | bit if field >> i & 1 else x & ~bit
    return x


def extract(x: int, position: int, length: int, width: int, is_signed: bool) -> int:
    fill = is_signed and length > 0 and x >> min(position + length - 1, width - 1) & 1
    bits = (x >> (position + i) & 1 if i < length and position + i < width else int(fill) for i in range(width))
    return sum(bit << i for i, bit in enumerate(bits))


def find(x: int, width: int, is_signed: bool, shift: bool) -> int:
    if is_signed and x >> (width - 1):
        x ^= (1 << width) - 1
    if x == 0:
        return 0xFFFFFFFF
    return width - x.bit_length() if shift else x.bit_length() - 1


def permute(x: int, y: int, selector: int, mode: str) -> int:
    """The PTX ISA's tables of prmt, byte 3 first."""
    pool = (x | y << 32).to_bytes(8, "little")
    if mode == "":
        result = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = pool[nibble & 7]
            result.append((0xFF if byte >> 7 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(result), "little")
    tables = {
        ".f4e": ("3210", "4321", "5432", "6543"),
        ".b4e": ("5670", "6701", "7012", "0123"),
        ".rc8": ("0000", "1111", "2222", "3333"),
        ".ecl": ("3210", "3211", "3222", "3333"),
        ".ecr": ("0000", "1110", "2210", "3210"),
        ".rc16": ("1010", "3232", "1010", "3232"),
    }
    return int.from_bytes(bytes(pool[int(digit)] for digit in tables[mode][selector & 3]), "big")


def lookup(x: int, y: int, z: int, table: int) -> int:
    return sum((table >> (4 * (x >> i & 1) + 2 * (y >> i & 1) + (z >> i & 1)) & 1) << i for i in range(32))


def funnel(x: int, y: int, n: int, left: bool, wrap: bool) -> int:
    n = n % 32 if wrap else min(n, 32)
    pair = y << 32 | x
    return (pair << n >> 32 if left else pair >> n) & 0xFFFFFFFF


def dot4(x: int, y: int, z: int, x_signed: bool, y_signed: bool) -> int:
    def items(word, is_signed):
        return [int.from_bytes(bytes([byte]), "little", signed=is_signed) for byte in word.to_bytes(4, "little")]

    return (z + sum(map(operator.mul, items(x, x_signed), items(y, y_signed)))) & 0xFFFFFFFF


def mask_bits(position: int, length: int, wrap: bool) -> int:
    if wrap:
        position, length = position % 32, length % 32
    return sum(1 << i for i in range(32) if position <= i < position + length)


def _comparisons() -> list[Case]:
    cases = []
    for ty in ("u16", "s16", "u32", "s32", "u64", "s64", "b16", "b32", "b64"):
        kind, read = f"u{ty[1:]}", reader(ty)
        names = {**COMPARISONS, **({a: COMPARISONS[b] for a, b in ALIASES.items()} if ty[0] == "u" else {})}
        if ty[0] == "b":
            names = {name: COMPARISONS[name] for name in ("eq", "ne")}
        for name, function in names.items():
            body = (
                f"{{ .reg .pred %x, %y; .reg .b32 %t; setp.{name}.{ty} %x|%y, %a, %b; selp.u32 %d, 1, 0, %x;"
                " selp.u32 %t, 2, 0, %y; or.b32 %d, %d, %t; }"
            )
            cases.append(
                Case(f"setp.{name}.{ty}", body, (kind, kind), "u32",
                     lambda x, y, f=function, r=read: 1 if f(r(x), r(y)) else 2)
            )  # fmt: skip
    for (join, function), negated in itertools.product(_JOINS.items(), ("", "!")):
        body = (
            "{ .reg .pred %x, %y, %z; .reg .b32 %t; setp.gt.u32 %z, %c, 31;"
            f" setp.lt.{join}.s32 %x|%y, %a, %b, {negated}%z;"
            " selp.u32 %d, 1, 0, %x; selp.u32 %t, 2, 0, %y; or.b32 %d, %d, %t; }"
        )

        def joined(x, y, z, f=function, n=bool(negated)):
            less, other = signed(x, 32) < signed(y, 32), (z > 31) != n
            return int(f(less, other)) + 2 * int(f(not less, other))

        cases.append(Case(f"setp.lt.{join} {negated}", body, ("u32", "u32", "amount"), "u32", joined))
        body = f"{{ .reg .pred %x, %y, %z; setp.gt.u32 %x, %a, %c; setp.gt.u32 %y, %b, %c; {join}.pred %z, %x, %y;"
        body += " not.pred %z, %z; selp.u32 %d, 1, 0, %z; }"
        cases.append(
            Case(f"{join}.pred {negated}", body, ("u32", "u32", "amount"), "u32",
                 lambda x, y, z, f=function: 1 - int(f(x > z, y > z)))
        )  # fmt: skip
    for written, truth in (("u32", 0xFFFFFFFF), ("s32", 0xFFFFFFFF), ("f32", 0x3F800000)):
        cases.append(
            Case(f"set.ge.{written}.s32", f"set.ge.{written}.s32 %d, %a, %b;", ("u32", "u32"), "u32",
                 lambda x, y, t=truth: t if signed(x, 32) >= signed(y, 32) else 0)
        )  # fmt: skip
    return cases


ARITHMETIC, BITS, COMPARISONS_AND_PREDICATES = _arithmetic(), _bits(), _comparisons()
CASES = (*ARITHMETIC, *BITS, *COMPARISONS_AND_PREDICATES)
