"""Numbers for PTX's types: what the parser writes into a program and the compiled core reads.

Values live in 64-bit register slots, in the low bits; the bits above a type's width are always zero. ``B`` types are
their ``U`` counterparts. A packed type holds its first PTX source operand in the *upper* half, as ``cvt`` has it.
"""

from __future__ import annotations

PRED, U8, U16, U32, U64, S8, S16, S32, S64 = range(9)
F16, BF16, F32, F64 = range(9, 13)
F16X2, BF16X2 = 13, 14
E4M3X2, E5M2X2, E2M1X2, E2M3X2, E3M2X2, UE8M0X2 = range(15, 21)

#: PTX spelling -> type.
TYPES = {
    "pred": PRED, "u8": U8, "u16": U16, "u32": U32, "u64": U64, "s8": S8, "s16": S16, "s32": S32, "s64": S64,
    "b8": U8, "b16": U16, "b32": U32, "b64": U64, "f16": F16, "bf16": BF16, "f32": F32, "f64": F64,
    "f16x2": F16X2, "bf16x2": BF16X2, "e4m3x2": E4M3X2, "e5m2x2": E5M2X2, "e2m1x2": E2M1X2, "e2m3x2": E2M3X2,
    "e3m2x2": E3M2X2, "ue8m0x2": UE8M0X2,
}  # fmt: skip

#: Width in bits of each type, by number.
BITS = (1, 8, 16, 32, 64, 8, 16, 32, 64, 16, 16, 32, 64, 32, 32, 16, 16, 8, 16, 16, 16)
SIGNED = (S8, S16, S32, S64)
FLOATS = (F16, BF16, F32, F64)

# Rounding of a conversion: nearest even, toward zero, down, up; the I forms round to an integral value of the type.
RN, RZ, RM, RP, RNI, RZI, RMI, RPI = range(8)
ROUNDINGS = {"rn": RN, "rz": RZ, "rm": RM, "rp": RP, "rni": RNI, "rzi": RZI, "rmi": RMI, "rpi": RPI}

# Flags of arithmetic and conversions, added up.
FTZ, SAT, RELU, NAN = 1, 2, 4, 8

# Arithmetic on F16, BF16, F32, F64, F16X2 and BF16X2.
(FADD, FSUB, FMUL, FFMA, FDIV, FDIV_APPROX, FRCP, FRCP_APPROX, FSQRT, FSQRT_APPROX, FRSQRT_APPROX, FEX2_APPROX,
 FLG2_APPROX, FSIN_APPROX, FCOS_APPROX, FTANH_APPROX, FMIN, FMAX, FABS, FNEG, FCOPYSIGN) = range(21)  # fmt: skip

# Comparisons of setp, ordered then unordered.
(EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, ISNAN) = range(14)
COMPARISONS = {
    "eq": EQ, "ne": NE, "lt": LT, "le": LE, "gt": GT, "ge": GE, "lo": LT, "ls": LE, "hi": GT, "hs": GE,
    "equ": EQU, "neu": NEU, "ltu": LTU, "leu": LEU, "gtu": GTU, "geu": GEU, "num": NUM, "nan": ISNAN,
}  # fmt: skip

# Operations on integers and bits, of int_alu.
(IMOV, IADD, ISUB, IMUL, IMAD, IAND, IOR, IXOR, INOT, ISHL, ISHR, ISELECT, IMULHI, IDIV, IREM, IMIN, IMAX, IABS, INEG,
 ICNOT, IPRMT, ILOP3, IBFE, IBFI, IPOPC, ICLZ, IBREV, IBFIND, IBFIND_SHIFT, ISHF_LEFT, ISHF_RIGHT, ISAD, IADD_SAT, ISUB_SAT,
 IDP4A, IMUL_WIDE, IMAD_WIDE, IMADHI, IBMSK) = range(39)  # fmt: skip
