"""PTX kernels of what lanes and CTAs do together, with NumPy's answer: memory, shuffles, votes, matrices, atomics."""

from __future__ import annotations

import numpy as np

from ptx_inline.toolchain import PtxKernel

THREADS = 256
#: Access -> bytes and its PTX registers.
ACCESSES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "v2.u32": 8, "v4.u32": 16, "v2.u64": 16, "v4.u8": 4, "v2.u16": 4}
SHUFFLES = ("up", "down", "bfly", "idx")
_HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n"


def _kernel(parameters: str, lines: list[str], signature: tuple[str, ...], head: str = _HEAD) -> PtxKernel:
    """A kernel whose thread number over all CTAs is in %i; parameters: one letter each, pointers in %p_x."""
    text = [head, ".visible .entry kernel(" + ", ".join(f".param .u64 {name}" for name in parameters) + ")", "{"]
    text += [".reg .b32 %i, %thread, %lane, %t<12>;", ".reg .b64 %o, %q<4>;", ".reg .pred %x, %y;"]
    text += [f".reg .b64 %p_{name};" for name in parameters]
    text += [f"ld.param.u64 %p_{name}, [{name}];" for name in parameters]
    text += ["mov.u32 %thread, %tid.x;", "mov.u32 %lane, %laneid;", "mov.u32 %t0, %ctaid.x;", "mov.u32 %t1, %ntid.x;"]
    text += ["mad.lo.u32 %i, %t0, %t1, %thread;", *lines, "ret;", "}", ""]
    return PtxKernel("\n".join(text), signature)


def _at(register: str, pointer: str, index: str, size: int) -> str:
    """``register = pointer + index * size``."""
    return f"mul.wide.u32 {register}, {index}, {size}; add.u64 {register}, {register}, {pointer};"


def permute_kernel(access: str) -> PtxKernel:
    """y[i] = the element that lies at b[tid] of shared memory, where thread t has put x[a[t's i]] at c[t's i].

    Arguments: x, y (elements of the access's size), a, b, c (u32 a thread; b and c permute the threads of a CTA).
    """
    size = ACCESSES[access]
    vector = access.rpartition(".")[0]
    count = int(vector[1:]) if vector else 1
    width = {1: ".b16", 2: ".b16", 4: ".b32", 8: ".b64"}[size // count]
    names = [f"%e{k}" for k in range(count)]
    operand = "{" + ", ".join(names) + "}" if count > 1 else names[0]
    lines = [f".shared .align 16 .b8 buffer[{THREADS * size}];", f".reg {width} %e<{count}>;", ".reg .b32 %base;"]
    for register, pointer in (("%t2", "%p_a"), ("%t3", "%p_b"), ("%t4", "%p_c")):
        lines += [_at("%o", pointer, "%i", 4), f"ld.global.u32 {register}, [%o];"]
    lines += [
        _at("%o", "%p_x", "%t2", size), f"ld.global.{access} {operand}, [%o];", "mov.u32 %base, buffer;",
        f"mad.lo.u32 %t5, %t4, {size}, %base;", f"st.shared.{access} [%t5], {operand};", "bar.sync 0;",
        f"mad.lo.u32 %t5, %t3, {size}, %base;", f"ld.shared.{access} {operand}, [%t5];",
        _at("%o", "%p_y", "%i", size), f"st.global.{access} [%o], {operand};",
    ]  # fmt: skip
    return _kernel("xyabc", lines, ("u8*", "u8*", "u32*", "u32*", "u32*"))


def permuted(x: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """What :func:`permute_kernel` computes, on elements (n, bytes)."""
    taken = x[a].reshape(-1, THREADS, x.shape[1])
    shared = np.empty_like(taken)
    block = np.arange(taken.shape[0])[:, None]
    shared[block, c.reshape(-1, THREADS)] = taken
    return shared[block, b.reshape(-1, THREADS)].reshape(x[a].shape)


def shuffle_kernel(mode: str) -> PtxKernel:
    """y[i], z[i] = value and predicate of a shuffle of x by lane operand a, clamp and segment c."""
    lines = []
    for register, pointer in (("%t2", "%p_x"), ("%t3", "%p_a"), ("%t4", "%p_c")):
        lines += [_at("%o", pointer, "%i", 4), f"ld.global.u32 {register}, [%o];"]
    lines += [f"shfl.sync.{mode}.b32 %t5|%x, %t2, %t3, %t4, 0xffffffff;", "selp.u32 %t6, 1, 0, %x;"]
    lines += [_at("%o", "%p_y", "%i", 4), "st.global.u32 [%o], %t5;"]
    lines += [_at("%o", "%p_z", "%i", 4), "st.global.u32 [%o], %t6;"]
    return _kernel("xacyz", lines, ("u32*",) * 5)


def shuffled(mode: str, x: np.ndarray, a: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`shuffle_kernel` computes. Source: the PTX ISA's pseudo-code of shfl.sync."""
    x, a, c = (array.reshape(-1, 32).astype(np.int64) for array in (x, a, c))
    lane = np.arange(32)
    b, clamp, segment = a & 31, c & 31, c >> 8 & 31
    last, first = (lane & segment) | (clamp & ~segment), lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
    valid = source >= last if mode == "up" else source <= last
    source = np.where(valid, source, lane)
    y = np.take_along_axis(x, source, axis=1)
    return y.astype(np.uint32).reshape(-1), valid.astype(np.uint32).reshape(-1)


#: Output of the kernel below -> NumPy's answer for values (warps, 32).
REDUCTIONS = {
    "redux.sync.add.u32": lambda x: x.sum(1, dtype=np.uint32),
    "redux.sync.min.s32": lambda x: x.view(np.int32).min(1).view(np.uint32),
    "redux.sync.max.u32": lambda x: x.max(1),
    "redux.sync.and.b32": lambda x: np.bitwise_and.reduce(x, 1),
    "redux.sync.or.b32": lambda x: np.bitwise_or.reduce(x, 1),
    "redux.sync.xor.b32": lambda x: np.bitwise_xor.reduce(x, 1),
    "vote.sync.ballot.b32": lambda x: ((x & 1) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32),
    "match.any.sync.b32": None,
}


def reduction_kernel() -> PtxKernel:
    """y[k, i] = result k of ``REDUCTIONS`` for x[i]; the vote is on bit 0, the match on the lowest three bits."""
    lines = [_at("%o", "%p_x", "%i", 4), "ld.global.u32 %t2, [%o];", "and.b32 %t3, %t2, 1;", "setp.ne.u32 %x, %t3, 0;"]
    lines += ["and.b32 %t3, %t2, 7;", "mov.u32 %t5, %nctaid.x;", "mul.lo.u32 %t5, %t5, %t1;"]
    for number, name in enumerate(REDUCTIONS):
        source = {"vote": "%x", "matc": "%t3"}.get(name[:4], "%t2")
        lines += [f"{name} %t4, {source}, 0xffffffff;", f"mad.lo.u32 %t6, %t5, {number}, %i;"]
        lines += [_at("%o", "%p_y", "%t6", 4), "st.global.u32 [%o], %t4;"]
    return _kernel("xy", lines, ("u32*", "u32*"))


def reduced(x: np.ndarray) -> np.ndarray:
    """What :func:`reduction_kernel` computes."""
    warps = x.reshape(-1, 32)
    low = warps & 7
    alike = (low[:, :, None] == low[:, None, :]).astype(np.uint64)
    matches = (alike << np.arange(32, dtype=np.uint64)).sum(2).astype(np.uint32)
    found = [
        matches if function is None else np.repeat(function(warps)[:, None], 32, 1) for function in REDUCTIONS.values()
    ]
    return np.stack([array.reshape(-1) for array in found])


def ldmatrix_kernel(number: int, trans: bool) -> PtxKernel:
    """y[4 * i + k] = register k of thread i: each warp fills 4 KiB from x and reads rows at a[i] (multiples of 16)."""
    registers = ", ".join(f"%t{4 + k}" for k in range(number))
    lines = [f".shared .align 16 .b8 buffer[{4096 * THREADS // 32}];", ".reg .b32 %base;", "mov.u32 %base, buffer;"]
    lines += ["mad.lo.u32 %base, %thread, 128, %base;", _at("%o", "%p_x", "%i", 128)]
    for k in range(8):
        lines += [f"ld.global.v4.u32 {{%t4, %t5, %t6, %t7}}, [%o+{16 * k}];"]
        lines += [f"st.shared.v4.u32 [%base+{16 * k}], {{%t4, %t5, %t6, %t7}};"]
    lines += ["bar.sync 0;", "sub.u32 %t2, %thread, %lane;", "mov.u32 %base, buffer;", "mad.lo.u32 %base, %t2, 128, %base;"]
    lines += [_at("%o", "%p_a", "%i", 4), "ld.global.u32 %t3, [%o];", "add.u32 %base, %base, %t3;"]
    name = f"ldmatrix.sync.aligned.m8n8.x{number}{'.trans' if trans else ''}.shared.b16"
    lines += [f"{name} {{{registers}}}, [%base];", _at("%o", "%p_y", "%i", 16)]
    lines += [f"st.global.u32 [%o+{4 * k}], %t{4 + k};" for k in range(number)]
    return _kernel("xay", lines, ("u8*", "u32*", "u32*"))


def matrices_loaded(number: int, trans: bool, x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """What :func:`ldmatrix_kernel` computes: uint32 (threads, number)."""
    memory = np.ascontiguousarray(x).view(np.uint16).reshape(-1, 2048)
    rows = a.reshape(-1, 32)[:, : 8 * number] // 2
    block = np.arange(memory.shape[0])[:, None, None]
    matrices = memory[block, rows[:, :, None] + np.arange(8)].reshape(-1, number, 8, 8).astype(np.uint32)
    if trans:
        matrices = matrices.swapaxes(2, 3)
    lane = np.arange(32)
    row, column = lane // 4, 2 * (lane % 4)
    words = matrices[:, :, row, column] | matrices[:, :, row, column + 1] << np.uint32(16)
    return words.transpose(0, 2, 1).reshape(-1, number)


def movmatrix_kernel() -> PtxKernel:
    """y[i] = the word of x's matrix that ``movmatrix`` gives thread i, a matrix a warp."""
    lines = [_at("%o", "%p_x", "%i", 4), "ld.global.u32 %t2, [%o];", "movmatrix.sync.aligned.m8n8.trans.b16 %t3, %t2;"]
    lines += [_at("%o", "%p_y", "%i", 4), "st.global.u32 [%o], %t3;"]
    return _kernel("xy", lines, ("u32*", "u32*"))


def matrices_transposed(x: np.ndarray) -> np.ndarray:
    """What :func:`movmatrix_kernel` computes."""
    matrices = np.ascontiguousarray(x).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(matrices.swapaxes(1, 2)).view(np.uint32).reshape(-1)


def mma_kernel(name: str) -> PtxKernel:
    """y = D of one m16n8k16 a warp; a, b, c, y: registers, lane after lane."""
    lines = [".reg .f32 %f<8>;", _at("%o", "%p_a", "%i", 16), "ld.global.v4.u32 {%t2, %t3, %t4, %t5}, [%o];"]
    lines += [_at("%o", "%p_b", "%i", 8), "ld.global.v2.u32 {%t6, %t7}, [%o];"]
    lines += [_at("%o", "%p_c", "%i", 16), "ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%o];"]
    lines += [f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32"]
    lines += ["{%f4, %f5, %f6, %f7}, {%t2, %t3, %t4, %t5}, {%t6, %t7}, {%f0, %f1, %f2, %f3};"]
    lines += [_at("%o", "%p_y", "%i", 16), "st.global.v4.f32 [%o], {%f4, %f5, %f6, %f7};"]
    return _kernel("abcy", lines, ("u32*", "u32*", "f32*", "f32*"))


#: Operations whose order does not matter, many threads to an address: PTX, first content, NumPy's ufunc.
SHARED_ATOMICS = {
    "add.u32": (np.uint32, np.add), "min.s32": (np.int32, np.minimum), "max.s32": (np.int32, np.maximum),
    "min.u32": (np.uint32, np.minimum), "max.u64": (np.uint64, np.maximum), "add.u64": (np.uint64, np.add),
    "and.b32": (np.uint32, np.bitwise_and), "or.b32": (np.uint32, np.bitwise_or), "xor.b32": (np.uint32, np.bitwise_xor),
    "add.f32": (np.float32, np.add),
}  # fmt: skip


def red_kernel(operation: str) -> PtxKernel:
    """y[a[i]] op= x[i]."""
    size = np.dtype(SHARED_ATOMICS[operation][0]).itemsize
    lines = [_at("%o", "%p_a", "%i", 4), "ld.global.u32 %t2, [%o];", _at("%o", "%p_x", "%i", size)]
    value = {4: "%t3", 8: "%q0"}[size]
    lines += [f"ld.global.b{8 * size} {value}, [%o];", _at("%o", "%p_y", "%t2", size)]
    lines += [f"red.relaxed.gpu.global.{operation} [%o], {value};"]
    return _kernel("xay", lines, ("u8*", "u32*", "u8*"))


def own_atomics_kernel() -> PtxKernel:
    """Each thread on its own word y[i]: inc, dec, cas, exch, add by x[i], in turn; z[k, i]: what step k returned."""
    lines = ["mov.u32 %t5, %nctaid.x;", "mul.lo.u32 %t5, %t5, %t1;", _at("%o", "%p_x", "%i", 4), "ld.global.u32 %t2, [%o];"]
    lines += [_at("%q0", "%p_y", "%i", 4), "and.b32 %t3, %t2, 3;"]
    steps = ("inc.u32 %t4, [%q0], %t3", "dec.u32 %t4, [%q0], %t2", "cas.b32 %t4, [%q0], %t3, %t2",
             "exch.b32 %t4, [%q0], %t2", "add.u32 %t4, [%q0], %t3", "inc.u32 %t4, [%q0], %t2",
             "dec.u32 %t4, [%q0], %t3")  # fmt: skip
    for number, step in enumerate(steps):
        lines += [f"atom.global.{step};", f"mad.lo.u32 %t6, %t5, {number}, %i;", _at("%o", "%p_z", "%t6", 4)]
        lines += ["st.global.u32 [%o], %t4;"]
    return _kernel("xyz", lines, ("u32*",) * 3)


def own_atomics(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`own_atomics_kernel` leaves in y, and z."""

    def inc(y, bound):
        return np.where(y >= bound, np.uint32(0), y + np.uint32(1))

    def dec(y, bound):
        return np.where((y == 0) | (y > bound), bound, y - np.uint32(1))

    low, old = x & 3, []
    steps = (
        lambda y: inc(y, low), lambda y: dec(y, x), lambda y: np.where(y == low, x, y), lambda y: x, lambda y: y + low,
        lambda y: inc(y, x), lambda y: dec(y, low),
    )  # fmt: skip
    for step in steps:
        old.append(y)
        y = step(y).astype(np.uint32)
    return y, np.stack(old)
