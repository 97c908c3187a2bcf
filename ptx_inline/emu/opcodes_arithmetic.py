"""Decoders of arithmetic, logic, comparisons, conversions and moves. Source: PTX ISA, "Instruction Set"."""

from __future__ import annotations

from ptx_inline.emu import encoding as enc
from ptx_inline.emu import scalar_types as st
from ptx_inline.emu.decode import Decoder, Modifiers, decoder, space_of
from ptx_inline.emu.parse import Special, Symbol
from ptx_inline.emu.simt.convert import can_convert

_ROUND = ("rn", "rz", "rm", "rp")
_FLOATS = (*st.FLOATS, st.F16X2, st.BF16X2)


def _float_flags(modifiers: Modifiers) -> int:
    flags = {"ftz": st.FTZ, "sat": st.SAT, "relu": st.RELU, "NaN": st.NAN}
    return sum(bit for name, bit in flags.items() if modifiers.take(name))


def _require_type(decode: Decoder, modifiers: Modifiers) -> int:
    type = modifiers.type()
    if type is None:
        raise decode.unsupported("no type")
    return type


def _emit_int(decode: Decoder, op: int, type: int, dst, *sources, types=None, aux: int = 0) -> None:
    types = types or (type,) * len(sources)
    rows = {name: decode.source(operand, ty) for name, operand, ty in zip("abcd", sources, types, strict=False)}
    decode.emit(enc.INT, op=op, type=type, aux=aux, dst=decode.destination(dst), **rows)


def _emit_float(decode: Decoder, modifiers: Modifiers, op: int, type: int, dst, *sources) -> None:
    if type not in _FLOATS:
        raise decode.unsupported("unsupported type")
    rounding = st.ROUNDINGS[modifiers.take(*_ROUND, default="rn")]
    rows = {name: decode.source(operand, type) for name, operand in zip("abc", sources, strict=False)}
    columns = {"op": op, "type": type, "flags": _float_flags(modifiers), "round": rounding}
    decode.emit(enc.FLOAT, dst=decode.destination(dst), **columns, **rows)


@decoder("add", "sub")
def _add(decode, modifiers, dst, a, b):
    plus = modifiers.base == "add"
    type = _require_type(decode, modifiers)
    if type in _FLOATS:
        _emit_float(decode, modifiers, st.FADD if plus else st.FSUB, type, dst, a, b)
    elif type == st.S32 and modifiers.take("sat"):
        _emit_int(decode, st.IADD_SAT if plus else st.ISUB_SAT, type, dst, a, b)
    else:
        _emit_int(decode, st.IADD if plus else st.ISUB, type, dst, a, b)


@decoder("mul", "mad", "fma")
def _mul(decode, modifiers, dst, a, b, *c):
    type = _require_type(decode, modifiers)
    if len(c) != (modifiers.base != "mul"):
        raise decode.unsupported("wrong number of operands")
    if type in _FLOATS:
        _emit_float(decode, modifiers, st.FFMA if c else st.FMUL, type, dst, a, b, *c)
        return
    part = modifiers.take("lo", "hi", "wide")
    if part is None or modifiers.base == "fma":
        raise decode.unsupported("needs .lo, .hi or .wide")
    op = {"lo": (st.IMUL, st.IMAD), "hi": (st.IMULHI, st.IMADHI), "wide": (st.IMUL_WIDE, st.IMAD_WIDE)}[part][len(c)]
    if part == "wide" and st.BITS[type] not in (16, 32):
        raise decode.unsupported("unsupported type")
    wide = {st.U16: st.U32, st.S16: st.S32, st.U32: st.U64, st.S32: st.S64}.get(type) if part == "wide" else type
    _emit_int(decode, op, type, dst, a, b, *c, types=(type, type, wide))


@decoder("div")
def _div(decode, modifiers, dst, a, b):
    type = _require_type(decode, modifiers)
    if type in _FLOATS:
        approximate = modifiers.take("approx", "full")
        _emit_float(decode, modifiers, st.FDIV_APPROX if approximate == "approx" else st.FDIV, type, dst, a, b)
    else:
        _emit_int(decode, st.IDIV, type, dst, a, b)


_INTEGER = {"rem": st.IREM, "sad": st.ISAD, "cnot": st.ICNOT, "brev": st.IBREV, "and": st.IAND, "or": st.IOR,
            "xor": st.IXOR, "not": st.INOT}  # fmt: skip


@decoder(*_INTEGER)
def _integer(decode, modifiers, dst, *sources):
    _emit_int(decode, _INTEGER[modifiers.base], _require_type(decode, modifiers), dst, *sources)


_EITHER = {"abs": (st.IABS, st.FABS), "neg": (st.INEG, st.FNEG), "min": (st.IMIN, st.FMIN), "max": (st.IMAX, st.FMAX)}


@decoder(*_EITHER)
def _either(decode, modifiers, dst, *sources):
    type = _require_type(decode, modifiers)
    if len(sources) > 2:
        raise decode.unsupported("min and max of three are not supported")
    integer, floating = _EITHER[modifiers.base]
    if type in _FLOATS:
        _emit_float(decode, modifiers, floating, type, dst, *sources)
    else:
        relu = type == st.S32 and len(sources) == 2 and modifiers.take("relu") is not None
        _emit_int(decode, integer, type, dst, *sources, aux=int(relu))


@decoder("shl", "shr")
def _shift(decode, modifiers, dst, a, b):
    type = _require_type(decode, modifiers)
    op = st.ISHL if modifiers.base == "shl" else st.ISHR
    _emit_int(decode, op, type, dst, a, b, types=(type, st.U32))


@decoder("popc", "clz")
def _count(decode, modifiers, dst, a):
    _emit_int(decode, st.IPOPC if modifiers.base == "popc" else st.ICLZ, _require_type(decode, modifiers), dst, a)


@decoder("bfe", "bfi")
def _bit_field(decode, modifiers, dst, *sources):
    type = _require_type(decode, modifiers)
    if modifiers.base == "bfe":
        _emit_int(decode, st.IBFE, type, dst, *sources, types=(type, st.U32, st.U32))
    else:
        _emit_int(decode, st.IBFI, type, dst, *sources, types=(type, type, st.U32, st.U32))


@decoder("bfind")
def _bfind(decode, modifiers, dst, a):
    op = st.IBFIND_SHIFT if modifiers.take("shiftamt") else st.IBFIND
    _emit_int(decode, op, _require_type(decode, modifiers), dst, a)


@decoder("bmsk")
def _bmsk(decode, modifiers, dst, a, b):
    wrap = modifiers.take("wrap", "clamp") == "wrap"
    _emit_int(decode, st.IBMSK, _require_type(decode, modifiers), dst, a, b, aux=int(wrap))


@decoder("prmt")
def _prmt(decode, modifiers, dst, a, b, c):
    modes = ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    mode = modifiers.take(*modes)
    type = _require_type(decode, modifiers)
    _emit_int(decode, st.IPRMT, type, dst, a, b, c, aux=0 if mode is None else 1 + modes.index(mode))


@decoder("lop3")
def _lop3(decode, modifiers, dst, a, b, c, table):
    _emit_int(decode, st.ILOP3, _require_type(decode, modifiers), dst, a, b, c, aux=decode.literal(table))


@decoder("shf")
def _shf(decode, modifiers, dst, a, b, c):
    left = modifiers.take("l", "r") == "l"
    wrap = modifiers.take("wrap", "clamp") == "wrap"
    op = st.ISHF_LEFT if left else st.ISHF_RIGHT
    _emit_int(decode, op, _require_type(decode, modifiers), dst, a, b, c, aux=int(wrap))


@decoder("dp4a")
def _dp4a(decode, modifiers, dst, a, b, c):
    types = [_require_type(decode, modifiers), _require_type(decode, modifiers)]
    aux = sum(1 << number for number, type in enumerate(types) if type == st.S32)
    _emit_int(decode, st.IDP4A, st.U32, dst, a, b, c, aux=aux)


_FUNCTIONS = {"rcp": (st.FRCP, st.FRCP_APPROX), "sqrt": (st.FSQRT, st.FSQRT_APPROX), "rsqrt": (None, st.FRSQRT_APPROX),
              "ex2": (None, st.FEX2_APPROX), "lg2": (None, st.FLG2_APPROX), "sin": (None, st.FSIN_APPROX),
              "cos": (None, st.FCOS_APPROX), "tanh": (None, st.FTANH_APPROX)}  # fmt: skip


@decoder(*_FUNCTIONS)
def _function(decode, modifiers, dst, a):
    op = _FUNCTIONS[modifiers.base][modifiers.take("approx") is not None]
    type = _require_type(decode, modifiers)
    if op is None or (type == st.F64 and op not in (st.FRCP, st.FSQRT)):
        raise decode.unsupported("unsupported form")
    _emit_float(decode, modifiers, op, type, dst, a)


@decoder("copysign")
def _copysign(decode, modifiers, dst, a, b):
    _emit_float(decode, modifiers, st.FCOPYSIGN, _require_type(decode, modifiers), dst, a, b)


@decoder("selp")
def _selp(decode, modifiers, dst, a, b, p):
    type = _require_type(decode, modifiers)
    row, negated = decode.predicate(p)
    if negated:
        raise decode.unsupported("unexpected '!'")
    decode.emit(
        enc.INT, op=st.ISELECT, type=type, dst=decode.destination(dst), a=decode.source(a, type),
        b=decode.source(b, type), c=row,
    )  # fmt: skip


_COMBINE = {"and": enc.COMBINE_AND, "or": enc.COMBINE_OR, "xor": enc.COMBINE_XOR}


@decoder("setp", "set")
def _setp(decode, modifiers, dst, a, b, *c):
    comparison = modifiers.take(*st.COMPARISONS)
    combine = modifiers.take(*_COMBINE)
    flags = _float_flags(modifiers)
    written = _require_type(decode, modifiers) if modifiers.base == "set" else st.PRED
    type = _require_type(decode, modifiers)
    if comparison is None or len(c) != (combine is not None) or type in (st.F16X2, st.BF16X2):
        raise decode.unsupported("unsupported comparison")
    if type < st.F16 and comparison in ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"):
        raise decode.unsupported("unsupported comparison")
    row, negated = decode.predicate(c[0]) if c else (enc.NO_ROW, 0)
    first, second = decode.pair(dst)
    truth = enc.TRUE_PREDICATE if written == st.PRED else enc.TRUE_ONE if written == st.F32 else enc.TRUE_MASK
    if truth == enc.TRUE_MASK and st.BITS[written] != 32:
        raise decode.unsupported("unsupported type")
    decode.emit(
        enc.COMPARE, op=st.COMPARISONS[comparison], type=type, flags=flags, dst=first, dst2=second,
        a=decode.source(a, type), b=decode.source(b, type), c=row, aux=_COMBINE.get(combine, enc.COMBINE_NONE),
        aux2=negated, round=truth,
    )  # fmt: skip


@decoder("cvt")
def _cvt(decode, modifiers, dst, a, *b):
    rounding = st.ROUNDINGS[modifiers.take(*st.ROUNDINGS, default="rn")]
    flags = _float_flags(modifiers)
    dst_type, src_type = _require_type(decode, modifiers), _require_type(decode, modifiers)
    if dst_type >= st.E4M3X2 or src_type >= st.E4M3X2:
        modifiers.take("satfinite")  # always so for these
    if not can_convert(src_type, dst_type, rounding) or len(b) > (src_type == st.F32 and dst_type >= st.F16X2):
        raise decode.unsupported("unsupported conversion")
    target, columns = decode.destination(dst), {"a": decode.source(a, src_type)}
    register = st.BITS[getattr(dst, "type", dst_type)]
    op = enc.CONVERT_ANY
    if _only_drops_bits(src_type, dst_type, flags, register):
        op = enc.CONVERT_LOW_BITS
        dst_type = min(src_type, dst_type, key=lambda type: st.BITS[type])
    if b:
        columns["b"] = decode.source(b[0], src_type)
    decode.emit(
        enc.CONVERT, op=op, type=dst_type, src_type=src_type, round=rounding, flags=flags, dst=target, aux=register,
        **columns,
    )  # fmt: skip


def _only_drops_bits(src: int, dst: int, flags: int, register: int) -> bool:
    """Whether an integer conversion keeps the low bits and does no more, which the core does faster."""
    if src >= st.F16 or dst >= st.F16 or flags:
        return False
    extends = dst in st.SIGNED and register > st.BITS[dst]
    return not extends and (src not in st.SIGNED or st.BITS[dst] <= st.BITS[src])


@decoder("mov")
def _mov(decode, modifiers, dst, a):
    type = _require_type(decode, modifiers)
    if isinstance(dst, tuple):
        start, count = decode.vector(dst, type, destination=True)
        decode.emit(enc.UNPACK, a=decode.source(a, type), list=start, count=count, aux=st.BITS[type] // count)
    elif isinstance(a, tuple):
        start, count = decode.vector(a, type)
        decode.emit(enc.PACK, dst=decode.destination(dst), list=start, count=count, aux=st.BITS[type] // count)
    elif isinstance(a, Special) and a.name in enc.CLOCKS:
        decode.emit(enc.CLOCK, dst=decode.destination(dst), aux=st.BITS[type])
    else:
        _emit_int(decode, st.IMOV, type, dst, a)


_WINDOWS = {enc.SHARED: enc.SHARED_WINDOW, enc.LOCAL: enc.LOCAL_WINDOW, enc.GLOBAL: 0}


@decoder("cvta")
def _cvta(decode, modifiers, dst, a):
    back = modifiers.take("to") is not None
    space = space_of(modifiers)
    type = _require_type(decode, modifiers)
    if space not in _WINDOWS or type != st.U64 or (isinstance(a, Symbol) and back):
        raise decode.unsupported("unsupported address conversion")
    window = decode.constant(_WINDOWS[space])
    op = st.ISUB if back else st.IADD
    decode.emit(enc.INT, op=op, type=type, dst=decode.destination(dst), a=decode.source(a, type), b=window)


@decoder("isspacep")
def _isspacep(decode, modifiers, dst, a):
    space = space_of(modifiers)
    ops = {enc.SHARED: enc.LOCATE_IS_SHARED, enc.LOCAL: enc.LOCATE_IS_LOCAL, enc.GLOBAL: enc.LOCATE_IS_GLOBAL}
    if space not in ops:
        raise decode.unsupported("unsupported state space")
    decode.emit(enc.LOCATE, op=ops[space], dst=decode.destination(dst), a=decode.source(a, st.U64))
