// Packed 16-bit arithmetic, bit patterns of floats, and integer permutes that Python has no operator for.

typedef long long i64;
typedef unsigned int u32;

// PTX ISA 4.2+, sm_53.
extern "C" __device__ u32 mul_rn_f16x2(u32 x, u32 y) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
  return product;
}

extern "C" __device__ u32 prmt_b32(u32 x, u32 y, u32 selector) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(x), "r"(y), "r"(selector));
  return bytes;
}

// The low 16 bits of a register in both halves, and the high ones. An operand of packed arithmetic takes them as they are.
extern "C" __device__ u32 mov_b32_low_twice(u32 x) {
  u32 twice;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low}; }" : "=r"(twice) : "r"(x));
  return twice;
}

extern "C" __device__ u32 mov_b32_high_twice(u32 x) {
  u32 twice;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high}; }" : "=r"(twice) : "r"(x));
  return twice;
}

// x * y + z, the lower 32 bits: one instruction, where Python's operators become shifts and additions.
extern "C" __device__ u32 mad_lo_u32(u32 x, u32 y, u32 z) {
  u32 sum;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
  return sum;
}

extern "C" __device__ u32 mov_b32_f32(float value) {
  u32 bits;
  asm("mov.b32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

extern "C" __device__ float mov_f32_b32(u32 bits) {
  float value;
  asm("mov.b32 %0, %1;" : "=f"(value) : "r"(bits));
  return value;
}

// The operand that is not NaN wins, so a running maximum ignores NaN.
extern "C" __device__ float max_f32(float x, float y) {
  float larger;
  asm("max.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}

extern "C" __device__ float min_f32(float x, float y) {
  float smaller;
  asm("min.f32 %0, %1, %2;" : "=f"(smaller) : "f"(x), "f"(y));
  return smaller;
}

extern "C" __device__ float rcp_rn_f32(float x) {
  float reciprocal;
  asm("rcp.rn.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

// Within one unit of the last place; subnormal results are 0.
extern "C" __device__ float rcp_approx_ftz_f32(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

extern "C" __device__ float fma_rn_f32(float x, float y, float z) {
  float result;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(x), "f"(y), "f"(z));
  return result;
}

extern "C" __device__ float abs_f32(float x) {
  float magnitude;
  asm("abs.f32 %0, %1;" : "=f"(magnitude) : "f"(x));
  return magnitude;
}

// Value of lane `source_lane`, all 32 lanes taking part. PTX ISA 6.0+, sm_30.
extern "C" __device__ u32 shfl_sync_idx_b32(u32 value, u32 source_lane) {
  u32 result;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(result) : "r"(value), "r"(source_lane));
  return result;
}

extern "C" __device__ u32 laneid() {
  u32 lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// 2^x, within 2 ulp; subnormal results become zero. PTX ISA 1.4+.
extern "C" __device__ float ex2_approx_ftz_f32(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// log2(x), absolute error 2^-22 near 1, relative elsewhere. PTX ISA 1.4+.
extern "C" __device__ float lg2_approx_f32(float x) {
  float result;
  asm("lg2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The same for normal numbers alone: without .ftz the compiler scales denormals first.
extern "C" __device__ float lg2_approx_ftz_f32(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The 8 x 8 matrix of 16-bit elements that the warp holds, row g in lanes 4 g .. 4 g + 3, two a lane, transposed: lane
// 4 g + q gets elements 2 q and 2 q + 1 of column g. All 32 lanes take part. PTX ISA 7.8+, sm_75.
extern "C" __device__ u32 movmatrix_trans_b16(u32 row) {
  u32 column;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
  return column;
}

// Value of lane `lane ^ lane_mask`, all 32 lanes taking part. PTX ISA 6.0+, sm_30.
extern "C" __device__ float shfl_sync_bfly_f32(float value, u32 lane_mask) {
  float result;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(result) : "f"(value), "r"(lane_mask));
  return result;
}

// Whether any lane of the warp has a predicate that is not 0. PTX ISA 6.0+; all 32 lanes must call.
extern "C" __device__ u32 vote_sync_any(u32 predicate) {
  u32 any;
  asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %1, 0; vote.sync.any.pred q, p, 0xFFFFFFFF; selp.u32 %0, 1, 0, q; }"
               : "=r"(any)
               : "r"(predicate));
  return any;
}

// No instruction. What stands beside it is not speculated: a branch around much work stays a branch.
extern "C" __device__ void keep_branch() { asm volatile(""); }

// No instruction. The same value, of which the compiler knows nothing: what is computed from it is computed here, and not
// kept up to date from round to round of the loop around.
extern "C" __device__ u32 unknown_u32(u32 value) {
  asm volatile("" : "+r"(value));
  return value;
}

extern "C" __device__ i64 unknown_i64(i64 value) {
  asm volatile("" : "+l"(value));
  return value;
}
