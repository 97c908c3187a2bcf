"""Decoders of memory accesses: loads, stores, atomics, asynchronous copies, fences.

Source: PTX ISA, "Data Movement and Conversion Instructions", "Parallel Synchronization and Communication Instructions".
"""

from __future__ import annotations

from ptx_inline.emu import encoding as enc
from ptx_inline.emu import scalar_types as st
from ptx_inline.emu.decode import Decoder, Modifiers, decoder, space_of
from ptx_inline.emu.parse import Register

# where a value is cached, and who is meant to see an ordered access, do not change what a single GPU computes
_CACHING = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt"),
    *(f"L1::{name}" for name in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")),
    *(f"L2::{name}" for name in ("64B", "128B", "256B", "evict_normal", "evict_first", "evict_last")),
)
_SCOPES = ("cta", "cluster", "gpu", "sys")
_ORDERS = {
    "weak": 0, "volatile": enc.STRONG, "relaxed": enc.STRONG, "acquire": enc.STRONG | enc.ACQUIRE,
    "release": enc.STRONG | enc.RELEASE, "acq_rel": enc.STRONG | enc.ACQUIRE | enc.RELEASE,
}  # fmt: skip


def _order(modifiers: Modifiers) -> int:
    flags = _ORDERS[modifiers.take(*_ORDERS, default="weak")]
    modifiers.drop(*_SCOPES, *_CACHING)
    return flags


def _access(decode: Decoder, modifiers: Modifiers, address, values, *, load: bool) -> None:
    flags = _order(modifiers)
    space = space_of(modifiers)
    if modifiers.take("nc"):
        flags |= enc.READ_ONLY
    vector = {"v2": 2, "v4": 4, "v8": 8}.get(modifiers.take("v2", "v4", "v8"), 1)
    type = modifiers.type()
    if type is None or type > st.F64:
        raise decode.unsupported("unsupported type")
    columns = decode.address(address, space)
    if columns["space"] == enc.PARAM and not load:
        raise decode.unsupported("parameters are read-only")
    start, count = decode.vector(values, type, destination=load)
    if count != vector:
        raise decode.unsupported("vector of another length")
    first = values[0] if isinstance(values, tuple) else values
    width = st.BITS[getattr(first, "type", type)]
    decode.emit(
        enc.LOAD if load else enc.STORE, type=type, flags=flags, list=start, count=count, aux=width, **columns
    )


@decoder("ld", "ldu")
def _ld(decode, modifiers, dst, address):
    _access(decode, modifiers, address, dst, load=True)


@decoder("st")
def _st(decode, modifiers, address, value):
    _access(decode, modifiers, address, value, load=False)


_ATOMIC_ALU = {"add": (st.IADD, st.FADD), "min": (st.IMIN, st.FMIN), "max": (st.IMAX, st.FMAX), "and": (st.IAND, None),
               "or": (st.IOR, None), "xor": (st.IXOR, None)}  # fmt: skip
_ATOMICS = {**dict.fromkeys(_ATOMIC_ALU, enc.ATOM_ALU), "exch": enc.ATOM_EXCHANGE, "cas": enc.ATOM_CAS,
            "inc": enc.ATOM_INC, "dec": enc.ATOM_DEC}  # fmt: skip


def _atomic(decode, modifiers, dst, address, *values):
    flags = _order(modifiers) | enc.STRONG
    space = space_of(modifiers)
    op = modifiers.take(*_ATOMICS)
    modifiers.take("noftz")
    type = modifiers.type()
    if op is None or type is None or st.BITS[type] not in (32, 64) or len(values) != (2 if op == "cas" else 1):
        raise decode.unsupported("unsupported atomic operation")
    is_float = type >= st.F16
    if is_float and op not in ("add", "exch", "min", "max"):
        raise decode.unsupported("unsupported atomic operation")
    rows = {name: decode.source(value, type) for name, value in zip("bc", values, strict=False)}
    columns = decode.address(address, space)
    if columns["space"] not in (enc.GLOBAL, enc.SHARED, enc.GENERIC):
        raise decode.unsupported("unsupported state space")
    operation = _ATOMIC_ALU[op][is_float] if op in _ATOMIC_ALU else 0
    decode.emit(
        enc.ATOMIC, op=operation, aux=_ATOMICS[op], type=type, flags=flags, dst=dst, **rows, **columns
    )


@decoder("atom")
def _atom(decode, modifiers, dst, address, *values):
    _atomic(decode, modifiers, decode.destination(dst), address, *values)


@decoder("red")
def _red(decode, modifiers, address, *values):
    _atomic(decode, modifiers, enc.NO_ROW, address, *values)


@decoder("fence", "membar")
def _fence(decode, modifiers):
    modifiers.drop("acq_rel", "sc", "acquire", "release", "mbarrier_init", "gl", *_SCOPES)
    modifiers.drop("proxy", "alias", "async", "async::generic", "async.shared::cta", "shared::cta", "global")
    decode.emit(enc.FENCE)


@decoder("nanosleep", "prefetch", "prefetchu", "griddepcontrol", "setmaxnreg", "discard", "applypriority", "pmevent")
def _hint(decode, modifiers, *operands):
    """What changes time and registers but no result. A launch is complete before the next begins (griddepcontrol)."""
    modifiers.rest.clear()
    decode.emit(enc.NOP)


@decoder("cp")
def _cp(decode, modifiers, *operands):
    if modifiers.take("async") is None:
        raise decode.unsupported("unknown instruction")
    if modifiers.take("bulk"):
        _bulk(decode, modifiers, *operands)
    elif modifiers.take("commit_group"):
        decode.emit(enc.CP_ASYNC_COMMIT)
    elif modifiers.take("wait_all"):
        decode.emit(enc.CP_ASYNC_WAIT, aux=-1)
    elif modifiers.take("wait_group"):
        decode.emit(enc.CP_ASYNC_WAIT, aux=decode.literal(operands[0]))
    elif modifiers.take("mbarrier"):
        modifiers.drop("arrive", "shared", "shared::cta", "b64")
        noinc = modifiers.take("noinc") is not None
        decode.emit(enc.CP_ASYNC_MBARRIER, aux=int(noinc), **decode.shared_address(operands[0]))
    else:
        _cp_async(decode, modifiers, *operands)


def _cp_async(decode, modifiers, dst=None, src=None, size=None, *rest):
    modifiers.drop("shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B")
    sizes = {"ca": (4, 8, 16), "cg": (16,)}.get(modifiers.take("ca", "cg"), ())
    hints = int(modifiers.take("L2::cache_hint") is not None)
    if size is None or len(rest) - hints not in (0, 1) or decode.literal(size) not in sizes:
        raise decode.unsupported("unsupported cp.async")
    if hints:  # the policy: how long L2 keeps the bytes changes no result
        decode.register(rest[-1], 64)
    length = decode.literal(size)
    if len(rest) == hints:
        given = decode.constant(length)
    elif isinstance(rest[0], Register):  # a predicate here would be ignore-src
        given = decode.register(rest[0], 32)
    else:
        given = decode.source(rest[0], st.U32)
    source = decode.address(src, enc.GLOBAL)
    decode.emit(
        enc.CP_ASYNC, b=source["a"], aux2=source["offset"], c=given, aux=length, **decode.shared_address(dst)
    )


def _bulk(decode, modifiers, *operands):
    if modifiers.take("commit_group"):
        decode.emit(enc.BULK_COMMIT)
        return
    if modifiers.take("wait_group"):
        modifiers.take("read")
        decode.emit(enc.BULK_WAIT, aux=decode.literal(operands[0]))
        return
    if modifiers.take("prefetch"):  # changes time but no result
        modifiers.drop("L2", "global")
        if len(operands) != 2:
            raise decode.unsupported("unsupported bulk prefetch")
        decode.address(operands[0], enc.GLOBAL)  # both are read here alone, to refuse what they cannot be
        decode.source(operands[1], st.U32)
        decode.emit(enc.NOP)
        return
    spaces = [part for part in modifiers.rest if part in ("shared::cluster", "shared::cta", "global")]
    modifiers.drop(*spaces)
    if spaces in (["shared::cluster", "global"], ["shared::cta", "global"]) and len(operands) == 4:
        modifiers.drop("mbarrier::complete_tx::bytes")
        dst, src, size, barrier = operands
        source, bar = decode.address(src, enc.GLOBAL), decode.shared_address(barrier)
        decode.emit(
            enc.BULK_COPY, op=enc.BULK_TO_SHARED, b=source["a"], aux2=source["offset"], c=decode.source(size, st.U32),
            d=bar["a"], aux=bar["offset"], **decode.shared_address(dst),
        )  # fmt: skip
    elif spaces == ["global", "shared::cta"] and len(operands) == 3:
        modifiers.drop("bulk_group")
        dst, src, size = operands
        target = decode.address(dst, enc.GLOBAL)
        decode.emit(
            enc.BULK_COPY, op=enc.BULK_TO_GLOBAL, b=target["a"], aux2=target["offset"], c=decode.source(size, st.U32),
            **decode.shared_address(src),
        )  # fmt: skip
    else:
        raise decode.unsupported("unsupported bulk copy")
