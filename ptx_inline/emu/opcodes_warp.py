"""Decoders of control flow and of what lanes do together: shuffles, votes, matrix instructions, barriers.

Source: PTX ISA, "Control Flow Instructions", "Parallel Synchronization and Communication Instructions", "Warp Level
Matrix Instructions"; the MMAs are those of :mod:`ptx_inline.isa.instructions`.
"""

from __future__ import annotations

import functools
import itertools

from ptx_inline.emu import encoding as enc
from ptx_inline.emu import scalar_types as st
from ptx_inline.emu.decode import decoder
from ptx_inline.emu.parse import Symbol
from ptx_inline.emu.simt.ldmatrix import M8N8_B16, M8N16_B4X16_P64, M8N16_B6X16_P32
from ptx_inline.isa.instructions import INSTRUCTIONS


@decoder("bra")
def _bra(decode, modifiers, label):
    modifiers.take("uni")
    decode.emit(enc.BRANCH, aux=decode.target(label))


@decoder("brx")
def _brx(decode, modifiers, index, table):
    modifiers.drop("idx", "uni")
    if not isinstance(table, Symbol) or table.name not in decode.tables:
        raise decode.unsupported("unknown branch targets")
    targets = [decode.target(Symbol(label)) for label in decode.tables[table.name]]
    start = len(decode.lists)
    decode.lists += targets
    decode.emit(enc.BRANCH_INDEXED, a=decode.source(index, st.U32), list=start, count=len(targets))


@decoder("ret", "exit")
def _exit(decode, modifiers):
    modifiers.take("uni")
    decode.emit(enc.EXIT)


@decoder("trap")
def _trap(decode, modifiers):
    decode.emit(enc.TRAP)


@decoder("shfl")
def _shfl(decode, modifiers, dst, value, lane, clamp, mask):
    modes = {"up": enc.SHUFFLE_UP, "down": enc.SHUFFLE_DOWN, "bfly": enc.SHUFFLE_BUTTERFLY, "idx": enc.SHUFFLE_INDEX}
    mode = modifiers.take(*modes)
    modifiers.drop("sync", "b32")
    first, second = decode.pair(dst)
    if mode is None:
        raise decode.unsupported("unsupported shuffle")
    decode.emit(
        enc.SHUFFLE, op=modes[mode], dst=first, dst2=second, a=decode.source(value, st.U32),
        b=decode.source(lane, st.U32), c=decode.source(clamp, st.U32), d=decode.source(mask, st.U32),
    )  # fmt: skip


@decoder("vote")
def _vote(decode, modifiers, dst, predicate, mask):
    modes = {"all": enc.VOTE_ALL, "any": enc.VOTE_ANY, "uni": enc.VOTE_UNIFORM, "ballot": enc.VOTE_BALLOT}
    mode = modifiers.take(*modes)
    if mode is None or modifiers.take("sync") is None:
        raise decode.unsupported("unsupported vote")
    modifiers.drop("pred", "b32")
    row, negated = decode.predicate(predicate)
    decode.emit(
        enc.VOTE, op=modes[mode], dst=decode.destination(dst), a=row, aux=negated, d=decode.source(mask, st.U32)
    )


@decoder("match")
def _match(decode, modifiers, dst, value, mask):
    all_lanes = modifiers.take("any", "all") == "all"
    modifiers.drop("sync")
    type = modifiers.type()
    if type not in (st.U32, st.U64):
        raise decode.unsupported("unsupported match")
    first, second = decode.pair(dst)
    decode.emit(
        enc.MATCH, op=int(all_lanes), dst=first, dst2=second, a=decode.source(value, type),
        d=decode.source(mask, st.U32),
    )  # fmt: skip


@decoder("redux")
def _redux(decode, modifiers, dst, value, mask):
    modes = {"add": st.IADD, "min": st.IMIN, "max": st.IMAX, "and": st.IAND, "or": st.IOR, "xor": st.IXOR}
    mode = modifiers.take(*modes)
    modifiers.drop("sync")
    type = modifiers.type()
    if mode is None or type not in (st.U32, st.S32):
        raise decode.unsupported("unsupported reduction")
    decode.emit(
        enc.REDUCE, op=modes[mode], type=type, dst=decode.destination(dst), a=decode.source(value, type),
        d=decode.source(mask, st.U32),
    )  # fmt: skip


@decoder("elect")
def _elect(decode, modifiers, dst, mask):
    modifiers.drop("sync")
    first, second = decode.pair(dst)
    decode.emit(enc.ELECT, dst=first, dst2=second, d=decode.source(mask, st.U32))


@decoder("activemask")
def _activemask(decode, modifiers, dst):
    modifiers.drop("b32")
    decode.emit(enc.ACTIVE_MASK, dst=decode.destination(dst))


@decoder("bar", "barrier")
def _bar(decode, modifiers, *operands):
    modifiers.drop("cta", "aligned")
    if modifiers.take("warp"):
        modifiers.drop("sync")
        (mask,) = operands
        decode.emit(enc.WARP_SYNC, d=decode.source(mask, st.U32))
        return
    mode = modifiers.take("sync", "arrive", "red")
    columns = {"op": enc.BARRIER_ARRIVE if mode == "arrive" else enc.BARRIER_SYNC}
    if mode is None or not operands:
        raise decode.unsupported("unsupported barrier")
    if mode == "red":
        dst, *operands, predicate = operands
        ops = {"popc": enc.BARRIER_POPC, "and": enc.BARRIER_AND, "or": enc.BARRIER_OR}
        op = modifiers.take(*ops)
        modifiers.drop("u32", "pred")
        if op is None:
            raise decode.unsupported("unsupported barrier")
        columns["c"], columns["aux"] = decode.predicate(predicate)
        columns |= {"op": ops[op], "dst": decode.destination(dst)}
    if len(operands) > 2 or (mode == "arrive" and len(operands) != 2):
        raise decode.unsupported("wrong number of operands")
    for name, operand in zip("ab", operands, strict=False):
        columns[name] = decode.source(operand, st.U32)
    decode.emit(enc.BARRIER, **columns)


@decoder("mbarrier")
def _mbarrier(decode, modifiers, *operands):
    op = modifiers.take("init", "inval", "arrive", "arrive_drop", "expect_tx", "test_wait", "try_wait", "complete_tx")
    expect = op in ("arrive", "arrive_drop") and modifiers.take("expect_tx") is not None
    parity = modifiers.take("parity") is not None
    if op is None:
        raise decode.unsupported("unsupported mbarrier operation")
    modifiers.drop("acquire", "release", "relaxed", "cta", "shared", "shared::cta", "noComplete", "b64")
    operands = list(operands)
    dst = enc.NO_ROW
    if op in ("arrive", "arrive_drop", "test_wait", "try_wait"):
        dst = decode.destination(operands.pop(0))
    if not operands:
        raise decode.unsupported("wrong number of operands")
    address = decode.shared_address(operands.pop(0))
    waits = op in ("test_wait", "try_wait")
    value = decode.source(operands[0], st.U64 if waits and not parity else st.U32) if operands else None
    codes = {
        "init": enc.MBARRIER_INIT, "inval": enc.MBARRIER_INVALIDATE, "expect_tx": enc.MBARRIER_EXPECT,
        "arrive": enc.MBARRIER_ARRIVE_EXPECT if expect else enc.MBARRIER_ARRIVE,
        "arrive_drop": None if expect else enc.MBARRIER_ARRIVE_DROP,
        "test_wait": enc.MBARRIER_TEST_PARITY if parity else enc.MBARRIER_TEST,
        "try_wait": enc.MBARRIER_TEST_PARITY if parity else enc.MBARRIER_TEST,
    }  # fmt: skip
    code = codes.get(op)
    if code is None or (value is None and (expect or waits or op in ("init", "expect_tx"))):
        raise decode.unsupported("unsupported mbarrier operation")
    columns = {"b": decode.constant(1) if value is None else value}
    decode.emit(enc.MBARRIER, op=code, dst=dst, **columns, **address)


@decoder("ldmatrix", "stmatrix")
def _matrix(decode, modifiers, first, second):
    load = modifiers.base == "ldmatrix"
    registers, address = (first, second) if load else (second, first)
    shape, number = modifiers.take("m8n8", "m8n16"), modifiers.take("x1", "x2", "x4")
    transposed = modifiers.take("trans") is not None
    types = [part for part in modifiers.rest if part in ("b16", "b8x16", "b4x16_p64", "b6x16_p32")]
    modifiers.drop("sync", "aligned", "shared", "shared::cta", *types)
    kinds = {
        ("m8n8", "b16"): M8N8_B16, ("m8n16", "b8x16", "b4x16_p64"): M8N16_B4X16_P64,
        ("m8n16", "b8x16", "b6x16_p32"): M8N16_B6X16_P32,
    }  # fmt: skip
    kind = kinds.get((shape, *types))
    start, count = decode.vector(registers, st.U32, destination=load)
    if kind is None or number != f"x{count}" or (kind != M8N8_B16 and (transposed or not load)):
        raise decode.unsupported("unsupported matrix access")
    decode.emit(
        enc.LDMATRIX if load else enc.STMATRIX, op=kind, aux=int(transposed), list=start, count=count,
        **decode.shared_address(address),
    )  # fmt: skip


@decoder("movmatrix")
def _movmatrix(decode, modifiers, dst, src):
    if decode.opcode != "movmatrix.sync.aligned.m8n8.trans.b16":  # PTX has no other
        raise decode.unsupported("unknown matrix instruction")
    modifiers.rest.clear()
    decode.emit(enc.MOVMATRIX, dst=decode.register(dst, 32), a=decode.register(src, 32))


@functools.cache
def mma_names() -> dict[str, tuple]:
    """PTX name of every registered MMA with every choice of formats -> (key, A, B, scale format)."""
    return {
        description.ptx_name(a, b, sf): (key, a, b, sf)
        for key, description in INSTRUCTIONS.items()
        for a, b, sf in itertools.product(description.a_formats, description.b_formats, description.sf_formats or (None,))
    }


@decoder("mma")
def _mma(decode, modifiers, d, a, b, c, *scales):
    found = mma_names().get(decode.opcode)
    if found is None:
        raise decode.unsupported("unknown matrix instruction")
    modifiers.rest.clear()
    description = INSTRUCTIONS[found[0]]
    if found not in decode.mmas:
        decode.mmas.append(found)
    start, _ = decode.vector(d, st.F32, destination=True)
    counts = {}
    for name, operand in (("a", a), ("b", b), ("c", c)):
        _, counts[name] = decode.vector(operand, st.F32 if name == "c" else st.U32)
    has_scales = bool(description.sf_vec_size)
    if len(scales) != (4 if has_scales else 0) or any(counts[name] != description.registers[name] for name in counts):
        raise decode.unsupported("operands do not fit")
    for operand, type in zip(scales, (st.U32, st.U16, st.U32, st.U16), strict=False):
        decode.vector(operand, type)
    if len(decode.lists) - start != 8 + counts["a"] + counts["b"] + (6 if has_scales else 0):
        raise decode.unsupported("operands do not fit")
    decode.emit(
        enc.MMA, op=decode.mmas.index(found), list=start, aux=counts["a"], aux2=counts["b"], count=int(has_scales)
    )
