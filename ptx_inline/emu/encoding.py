"""The numbers that :mod:`ptx_inline.emu.decode` writes into a program and the compiled core reads.

An instruction is a row of int64 columns. Operands are rows of the register file: a warp's file holds its registers, then
the program's constants and special registers, so that reading an operand never asks what it is.
"""

from __future__ import annotations

# Columns of an instruction.
(KIND, OP, TYPE, SRC_TYPE, FLAGS, ROUND, GUARD, GUARD_NEGATED, DST, DST2, A, B, C, D, AUX, AUX2, LIST, COUNT, SPACE, OFFSET,
 LINE) = range(21)  # fmt: skip
COLUMNS = 21
NO_ROW = -1

# Kinds, by what executes them.
(INT, FLOAT, CONVERT, COMPARE, PACK, UNPACK, LOCATE, CLOCK, NOP,  # lane by lane
 LOAD, STORE, ATOMIC, CP_ASYNC,  # memory, lane by lane
 CP_ASYNC_COMMIT, CP_ASYNC_WAIT, CP_ASYNC_MBARRIER, FENCE,
 LDMATRIX, STMATRIX, MOVMATRIX, MMA, SHUFFLE, VOTE, MATCH, REDUCE, ELECT, ACTIVE_MASK, WARP_SYNC,  # a warp together
 BARRIER, MBARRIER, BULK_COPY, BULK_COMMIT, BULK_WAIT,
 BRANCH, BRANCH_INDEXED, JUMP, EXIT, TRAP) = range(38)  # fmt: skip

#: Kind -> class in a profile.
CLASSES = {
    INT: "integer", FLOAT: "float", CONVERT: "conversion", COMPARE: "compare", PACK: "move", UNPACK: "move",
    LOCATE: "integer", CLOCK: "other", NOP: "other", LOAD: "load", STORE: "store", ATOMIC: "atomic", CP_ASYNC: "cp.async",
    CP_ASYNC_COMMIT: "cp.async", CP_ASYNC_WAIT: "cp.async", CP_ASYNC_MBARRIER: "cp.async", FENCE: "synchronisation",
    LDMATRIX: "ldmatrix", STMATRIX: "stmatrix", MOVMATRIX: "warp", MMA: "mma", SHUFFLE: "warp", VOTE: "warp",
    MATCH: "warp", REDUCE: "warp", ELECT: "warp", ACTIVE_MASK: "warp", WARP_SYNC: "synchronisation",
    BARRIER: "synchronisation", MBARRIER: "synchronisation", BULK_COPY: "bulk copy", BULK_COMMIT: "bulk copy",
    BULK_WAIT: "bulk copy", BRANCH: "branch", BRANCH_INDEXED: "branch", EXIT: "branch", TRAP: "branch",
}  # fmt: skip

# State spaces. A generic address is one of the windows or global.
GLOBAL, SHARED, LOCAL, PARAM, GENERIC = range(5)
SPACES = ("global", "shared", "local", "param", "generic")
#: First generic address of the shared and of the local window, each of 2^32 bytes; buffer i of global memory begins at
#: (i + 1) 2^32, so that an address beside a buffer is no address of another.
SHARED_WINDOW, LOCAL_WINDOW = 0x7FFE << 32, 0x7FFF << 32

# Flags of a memory access: ordered by the memory model (volatile, relaxed, acquire, release), read-only path.
STRONG, READ_ONLY, ACQUIRE, RELEASE = 1, 2, 4, 8

# Atomic operations: an operation of int_alu or float_alu, or one of their own.
ATOM_ALU, ATOM_EXCHANGE, ATOM_CAS, ATOM_INC, ATOM_DEC = range(5)

# How setp joins its comparison with a third predicate; how set writes true.
COMBINE_NONE, COMBINE_AND, COMBINE_OR, COMBINE_XOR = range(4)
TRUE_PREDICATE, TRUE_MASK, TRUE_ONE = range(3)

# Conversions: any, or one that keeps the low bits of an integer.
CONVERT_ANY, CONVERT_LOW_BITS = range(2)

SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_BUTTERFLY, SHUFFLE_INDEX = range(4)
VOTE_ALL, VOTE_ANY, VOTE_UNIFORM, VOTE_BALLOT = range(4)
BARRIER_SYNC, BARRIER_ARRIVE, BARRIER_POPC, BARRIER_AND, BARRIER_OR = range(5)
(MBARRIER_INIT, MBARRIER_INVALIDATE, MBARRIER_ARRIVE, MBARRIER_ARRIVE_DROP, MBARRIER_EXPECT, MBARRIER_ARRIVE_EXPECT,
 MBARRIER_TEST, MBARRIER_TEST_PARITY) = range(8)  # fmt: skip
BULK_TO_SHARED, BULK_TO_GLOBAL = range(2)
LOCATE_IS_SHARED, LOCATE_IS_LOCAL, LOCATE_IS_GLOBAL = range(3)

# Special registers, filled in when a warp starts: those of three axes, x first, and the others.
TID, NTID, CTAID, NCTAID = 0, 3, 6, 9
(LANEID, WARPID, NWARPID, SMID, GRIDID, TOTAL_SMEM_SIZE, DYNAMIC_SMEM_SIZE, WARP_SIZE, MASK_EQ, MASK_LT, MASK_LE, MASK_GT,
 MASK_GE) = range(12, 25)  # fmt: skip
SPECIALS = {
    **{
        f"%{base}.{axis}": first + number
        for base, first in (("tid", TID), ("ntid", NTID), ("ctaid", CTAID), ("nctaid", NCTAID))
        for number, axis in enumerate("xyz")
    },
    "%laneid": LANEID, "%warpid": WARPID, "%nwarpid": NWARPID, "%smid": SMID, "%gridid": GRIDID,
    "%total_smem_size": TOTAL_SMEM_SIZE, "%dynamic_smem_size": DYNAMIC_SMEM_SIZE, "WARP_SZ": WARP_SIZE,
    "%lanemask_eq": MASK_EQ, "%lanemask_lt": MASK_LT, "%lanemask_le": MASK_LE, "%lanemask_gt": MASK_GT,
    "%lanemask_ge": MASK_GE,
}  # fmt: skip
CLOCKS = ("%clock", "%clock64", "%globaltimer")
