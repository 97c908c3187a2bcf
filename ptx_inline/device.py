"""The instructions of :mod:`ptx_inline.snippets` as device functions for Numba CUDA kernels.

This is the only module that declares foreign functions. Each one is an ``extern "C" __device__`` function with one asm
statement, linked as link-time-optimisation IR, so that the call disappears and pointer arguments become registers. A
kernel passes a register array (``cuda.local.array``) by ``ffi.from_buffer(array)``.

Operands, fragment maps, PTX version and minimum target of each function stand in the ``.cu`` file that defines it.
"""

from __future__ import annotations

import re
from pathlib import Path

import cffi
from numba import cuda

from ptx_inline.types import numba_type

SNIPPETS = Path(__file__).parent / "snippets"

#: Numba turns ``ffi.from_buffer(array)`` inside a kernel into the array's address.
ffi = cffi.FFI()

_SIGNATURE = re.compile(r"(\S+)\s+(\w+)\((.*)\)")
_sources: dict[str, cuda.CUSource] = {}


def _source(file: str) -> cuda.CUSource:
    if file not in _sources:
        _sources[file] = cuda.CUSource((SNIPPETS / file).read_text(), name=file)
    return _sources[file]


def _declare(file: str, prototype: str):
    """Declare the snippet with this C-like prototype, e.g. ``"u32 f(u32*, f32)"``."""
    result, name, arguments = _SIGNATURE.fullmatch(prototype).groups()
    types = [numba_type(argument.strip()) for argument in arguments.split(",") if argument.strip()]
    return cuda.declare_device(name, numba_type(result)(*types), abi="c", link=_source(file))


_MMA = "f32*, u32*, u32*, f32*"
mma_m16n8k64_mxf4nvf4_4x_ue4m3 = _declare(
    "mma.cu", f"void mma_m16n8k64_mxf4nvf4_4x_ue4m3({_MMA}, u32, u32, u16, u16, u16, u16)"
)
mma_m16n8k32_f8f6f4_e2m1_e2m1 = _declare("mma.cu", f"void mma_m16n8k32_f8f6f4_e2m1_e2m1({_MMA})")
mma_m16n8k32_f8f6f4_e4m3_e2m1 = _declare("mma.cu", f"void mma_m16n8k32_f8f6f4_e4m3_e2m1({_MMA})")
mma_m16n8k16_f16 = _declare("mma_f16.cu", f"void mma_m16n8k16_f16({_MMA})")
mma_m16n8k16_bf16 = _declare("mma_f16.cu", f"void mma_m16n8k16_bf16({_MMA})")

ldmatrix_x1 = _declare("ldmatrix.cu", "void ldmatrix_x1(u32*, u32)")
ldmatrix_x2 = _declare("ldmatrix.cu", "void ldmatrix_x2(u32*, u32)")
ldmatrix_x4 = _declare("ldmatrix.cu", "void ldmatrix_x4(u32*, u32)")
ldmatrix_x2_trans = _declare("ldmatrix.cu", "void ldmatrix_x2_trans(u32*, u32)")
ldmatrix_x4_trans = _declare("ldmatrix.cu", "void ldmatrix_x4_trans(u32*, u32)")
ldmatrix_x2_b8x16_b4x16_p64 = _declare("ldmatrix_b4.cu", "void ldmatrix_x2_b8x16_b4x16_p64(u32*, u32)")
ldmatrix_x4_b8x16_b4x16_p64 = _declare("ldmatrix_b4.cu", "void ldmatrix_x4_b8x16_b4x16_p64(u32*, u32)")

ld_global_nc_v4_u32 = _declare("memory.cu", "void ld_global_nc_v4_u32(u32*, u32*, i64)")
ld_global_nc_v2_u32 = _declare("memory.cu", "void ld_global_nc_v2_u32(u32*, u32*, i64)")
ld_global_v4_u32 = _declare("memory.cu", "void ld_global_v4_u32(u32*, u32*, i64)")
ld_global_nc_u32 = _declare("memory.cu", "u32 ld_global_nc_u32(u8*, i64)")
ld_relaxed_gpu_global_s32 = _declare("memory.cu", "i32 ld_relaxed_gpu_global_s32(i32*, i64)")
st_global_v4_u32 = _declare("memory.cu", "void st_global_v4_u32(u32*, i64, u32, u32, u32, u32)")
st_global_v2_u32 = _declare("memory.cu", "void st_global_v2_u32(u32*, i64, u32, u32)")
red_global_max_u32 = _declare("memory.cu", "void red_global_max_u32(u32*, i64, u32)")
atom_acq_rel_gpu_global_inc_u32 = _declare("memory.cu", "u32 atom_acq_rel_gpu_global_inc_u32(u32*, i64, u32)")
cvta_to_shared_u32 = _declare("memory.cu", "u32 cvta_to_shared_u32(u32*)")
griddepcontrol_wait = _declare("memory.cu", "void griddepcontrol_wait()")
griddepcontrol_launch_dependents = _declare("memory.cu", "void griddepcontrol_launch_dependents()")
has_griddepcontrol = _declare("memory.cu", "u32 has_griddepcontrol()")
prefetch_global_l2 = _declare("memory.cu", "void prefetch_global_l2(u8*, i64)")
cp_async_bulk_prefetch_l2_global = _declare("memory.cu", "void cp_async_bulk_prefetch_l2_global(u8*, i64, u32)")
ld_shared_u32 = _declare("memory.cu", "u32 ld_shared_u32(u32)")
ld_shared_u16 = _declare("memory.cu", "u32 ld_shared_u16(u32)")
ld_shared_v2_u32 = _declare("memory.cu", "void ld_shared_v2_u32(u32*, u32)")
ld_shared_v4_u32 = _declare("memory.cu", "void ld_shared_v4_u32(u32*, u32)")
st_shared_u32 = _declare("memory.cu", "void st_shared_u32(u32, u32)")
st_shared_v2_u32 = _declare("memory.cu", "void st_shared_v2_u32(u32, u32, u32)")
st_shared_v4_u32 = _declare("memory.cu", "void st_shared_v4_u32(u32, u32, u32, u32, u32)")
cp_async_cg_16 = _declare("memory.cu", "void cp_async_cg_16(u32, u8*, i64, u32)")
cp_async_ca_4 = _declare("memory.cu", "void cp_async_ca_4(u32, u8*, i64, u32)")
cp_async_cg_16_evict_first = _declare("memory.cu", "void cp_async_cg_16_evict_first(u32, u8*, i64, u32)")
cp_async_ca_8_evict_first = _declare("memory.cu", "void cp_async_ca_8_evict_first(u32, u8*, i64, u32)")
cp_async_ca_4_evict_first = _declare("memory.cu", "void cp_async_ca_4_evict_first(u32, u8*, i64, u32)")
cp_async_commit_group = _declare("memory.cu", "void cp_async_commit_group()")
cp_async_wait_group_0 = _declare("memory.cu", "void cp_async_wait_group_0()")
cp_async_wait_group_1 = _declare("memory.cu", "void cp_async_wait_group_1()")

cvt_f32_f16 = _declare("convert.cu", "f32 cvt_f32_f16(u16)")
cvt_f32_bf16 = _declare("convert.cu", "f32 cvt_f32_bf16(u16)")
cvt_rn_f16_f32 = _declare("convert.cu", "u16 cvt_rn_f16_f32(f32)")
cvt_rn_bf16_f32 = _declare("convert.cu", "u16 cvt_rn_bf16_f32(f32)")
cvt_rn_f16x2_f32 = _declare("convert.cu", "u32 cvt_rn_f16x2_f32(f32, f32)")
cvt_rn_bf16x2_f32 = _declare("convert.cu", "u32 cvt_rn_bf16x2_f32(f32, f32)")
cvt_rn_satfinite_e2m1x2_f32 = _declare("convert.cu", "u32 cvt_rn_satfinite_e2m1x2_f32(f32, f32)")
cvt_rn_satfinite_e2m1x8_f32 = _declare(
    "convert.cu", "u32 cvt_rn_satfinite_e2m1x8_f32(f32, f32, f32, f32, f32, f32, f32, f32)"
)
cvt_rn_f16x2_e2m1x2 = _declare("convert.cu", "u32 cvt_rn_f16x2_e2m1x2(u32)")
cvt_rn_satfinite_e4m3x2_f32 = _declare("convert.cu", "u32 cvt_rn_satfinite_e4m3x2_f32(f32, f32)")
cvt_rn_satfinite_e4m3x4_f32 = _declare("convert.cu", "u32 cvt_rn_satfinite_e4m3x4_f32(f32, f32, f32, f32)")
cvt_rn_f16x2_e4m3x2 = _declare("convert.cu", "u32 cvt_rn_f16x2_e4m3x2(u32)")

mul_rn_f16x2 = _declare("arith.cu", "u32 mul_rn_f16x2(u32, u32)")
prmt_b32 = _declare("arith.cu", "u32 prmt_b32(u32, u32, u32)")
mov_b32_low_twice = _declare("arith.cu", "u32 mov_b32_low_twice(u32)")
mov_b32_high_twice = _declare("arith.cu", "u32 mov_b32_high_twice(u32)")
mad_lo_u32 = _declare("arith.cu", "u32 mad_lo_u32(u32, u32, u32)")
mov_b32_f32 = _declare("arith.cu", "u32 mov_b32_f32(f32)")
mov_f32_b32 = _declare("arith.cu", "f32 mov_f32_b32(u32)")
max_f32 = _declare("arith.cu", "f32 max_f32(f32, f32)")
min_f32 = _declare("arith.cu", "f32 min_f32(f32, f32)")
abs_f32 = _declare("arith.cu", "f32 abs_f32(f32)")
rcp_rn_f32 = _declare("arith.cu", "f32 rcp_rn_f32(f32)")
rcp_approx_ftz_f32 = _declare("arith.cu", "f32 rcp_approx_ftz_f32(f32)")
fma_rn_f32 = _declare("arith.cu", "f32 fma_rn_f32(f32, f32, f32)")
shfl_sync_idx_b32 = _declare("arith.cu", "u32 shfl_sync_idx_b32(u32, u32)")
laneid = _declare("arith.cu", "u32 laneid()")
ex2_approx_ftz_f32 = _declare("arith.cu", "f32 ex2_approx_ftz_f32(f32)")
lg2_approx_f32 = _declare("arith.cu", "f32 lg2_approx_f32(f32)")
lg2_approx_ftz_f32 = _declare("arith.cu", "f32 lg2_approx_ftz_f32(f32)")
movmatrix_trans_b16 = _declare("arith.cu", "u32 movmatrix_trans_b16(u32)")
shfl_sync_bfly_f32 = _declare("arith.cu", "f32 shfl_sync_bfly_f32(f32, u32)")
vote_sync_any = _declare("arith.cu", "u32 vote_sync_any(u32)")
unknown_u32 = _declare("arith.cu", "u32 unknown_u32(u32)")
keep_branch = _declare("arith.cu", "void keep_branch()")
unknown_i64 = _declare("arith.cu", "i64 unknown_i64(i64)")
