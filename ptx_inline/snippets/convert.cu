// Conversions. Where a target lacks the instruction, the same name is served by a bit-identical software form
// (tests compare the two exhaustively against ptx_inline.isa.formats).

typedef unsigned int u32;
typedef unsigned short u16;

#if defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#define HAS_E2M1 (__CUDA_ARCH__ >= 1000)
#else
#define HAS_E2M1 0
#endif
#define HAS_E4M3 (__CUDA_ARCH__ >= 890)

extern "C" __device__ float cvt_f32_f16(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// A bf16 is the upper half of an f32.
extern "C" __device__ float cvt_f32_bf16(u16 bits) {
  float value;
  asm("mov.b32 %0, {%1, %2};" : "=f"(value) : "h"((u16)0), "h"(bits));
  return value;
}

extern "C" __device__ u16 cvt_rn_f16_f32(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// PTX ISA 7.0+, sm_80.
extern "C" __device__ u16 cvt_rn_bf16_f32(float value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Two f32 to one register, `low` in bits [15:0]. PTX ISA 7.0+, sm_80.
extern "C" __device__ u32 cvt_rn_f16x2_f32(float high, float low) {
  u32 bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

extern "C" __device__ u32 cvt_rn_bf16x2_f32(float high, float low) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

#if !HAS_E2M1
// Magnitude of y as an E2M1 code, 0..7, added to 2^23 so that it stands in the low mantissa bits. The three steps of
// the format (0.5 below 2, 1 below 4, 2 below 6) are three saturated ramps; each is rounded to nearest even by the add
// to 2^23, and the partial sums 4 and 6 are even, so ties resolve as in the format. All of it runs on the FMA pipe.
__device__ __forceinline__ float e2m1_ramps(float y) {
  float a, b, c, t = 8388608.0f;
  asm("fma.rn.sat.f32 %0, %1, 0f3F000000, 0f00000000;" : "=f"(a) : "f"(y));
  asm("fma.rn.sat.f32 %0, %1, 0f3F000000, 0fBF800000;" : "=f"(b) : "f"(y));
  asm("fma.rn.sat.f32 %0, %1, 0f3F000000, 0fC0000000;" : "=f"(c) : "f"(y));
  t = __fmaf_rn(a, 4.0f, t);
  t = __fmaf_rn(b, 2.0f, t);
  return __fadd_rn(c, t);
}
#endif

// Two f32 to two E2M1 codes, `high` in bits [7:4]. Nearest even, saturating; NaN gives +6.
// Instruction: PTX ISA 8.6+, sm_100a, sm_120a and their families.
extern "C" __device__ u32 cvt_rn_satfinite_e2m1x2_f32(float high, float low) {
  u32 codes;
#if HAS_E2M1
  asm("{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, %1, %2; cvt.u32.u8 %0, pair; }"
      : "=r"(codes)
      : "f"(high), "f"(low));
#else
  // min.f32 returns the operand that is not NaN, so NaN becomes +6 here
  high = fminf(high, 6.0f);
  low = fminf(low, 6.0f);
  const float pair = __fmaf_rn(__fadd_rn(e2m1_ramps(fabsf(high)), -8388608.0f), 16.0f, e2m1_ramps(fabsf(low)));
  const u32 signs = ((__float_as_uint(high) >> 24) & 0x80u) | ((__float_as_uint(low) >> 28) & 0x08u);
  codes = (__float_as_uint(pair) & 0x77u) | signs;
#endif
  return codes;
}

// Eight f32 to eight E2M1 codes, x0 in bits [3:0]: one statement, so that ptxas merges the pairs as it converts them.
extern "C" __device__ u32 cvt_rn_satfinite_e2m1x8_f32(float x0, float x1, float x2, float x3, float x4, float x5,
                                                      float x6, float x7) {
#if HAS_E2M1
  u32 codes;
  asm("{ .reg .b8 a, b, c, d; cvt.rn.satfinite.e2m1x2.f32 a, %2, %1; cvt.rn.satfinite.e2m1x2.f32 b, %4, %3; "
      "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5; cvt.rn.satfinite.e2m1x2.f32 d, %8, %7; mov.b32 %0, {a, b, c, d}; }"
      : "=r"(codes)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3), "f"(x4), "f"(x5), "f"(x6), "f"(x7));
  return codes;
#else
  return cvt_rn_satfinite_e2m1x2_f32(x1, x0) | (cvt_rn_satfinite_e2m1x2_f32(x3, x2) << 8) |
         (cvt_rn_satfinite_e2m1x2_f32(x5, x4) << 16) | (cvt_rn_satfinite_e2m1x2_f32(x7, x6) << 24);
#endif
}

// Two E2M1 codes (bits [7:4] and [3:0]) to two f16, exact. Instruction: PTX ISA 8.6+, sm_100a, sm_120a and families.
extern "C" __device__ u32 cvt_rn_f16x2_e2m1x2(u32 codes) {
  u32 halves;
#if HAS_E2M1
  asm("{ .reg .b8 pair; cvt.u8.u32 pair, %1; cvt.rn.f16x2.e2m1x2 %0, pair; }" : "=r"(halves) : "r"(codes));
#else
  // exponent and mantissa of E2M1 at f16's bit 9 mean value * 2^-14, denormals included; one exact product mends it
  u32 bits = ((codes & 0x08u) << 12) | ((codes & 0x07u) << 9) | ((codes & 0x80u) << 24) | ((codes & 0x70u) << 21);
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(bits), "r"(0x74007400u));
#endif
  return halves;
}

// Two f32 to two E4M3 codes, `high` in bits [15:8]. Nearest even, saturating to 448; NaN gives 0x7F.
// Instruction: PTX ISA 8.1+, sm_89.
#if !HAS_E4M3
__device__ __forceinline__ u32 e4m3_from_f32(float value) {
  const u32 bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 24) & 0x80u;
  if (magnitude > 0x7F800000u) return 0x7Fu;
  if (magnitude >= 0x43E00000u) return sign | 0x7Eu;  // 448 and above
  u32 code;
  if (magnitude < 0x3C800000u) {  // below 2^-6: multiples of 2^-9
    code = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f)) & 0xFu;
  } else {
    code = (magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20;  // ties to even at the third mantissa bit
    code -= (127u - 7u) << 3;
  }
  return sign | (code > 0x7Eu ? 0x7Eu : code);
}
#endif

extern "C" __device__ u32 cvt_rn_satfinite_e4m3x2_f32(float high, float low) {
#if HAS_E4M3
  u16 codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  return (e4m3_from_f32(high) << 8) | e4m3_from_f32(low);
#endif
}

// Four f32 to four E4M3 codes, x0 in bits [7:0]: one statement, so that ptxas merges the pairs as it converts them.
extern "C" __device__ u32 cvt_rn_satfinite_e4m3x4_f32(float x0, float x1, float x2, float x3) {
#if HAS_E4M3
  u32 codes;
  asm("{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, %2, %1; cvt.rn.satfinite.e4m3x2.f32 b, %4, %3; "
      "mov.b32 %0, {a, b}; }"
      : "=r"(codes)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return codes;
#else
  return e4m3_from_f32(x0) | (e4m3_from_f32(x1) << 8) | (e4m3_from_f32(x2) << 16) | (e4m3_from_f32(x3) << 24);
#endif
}

// Two E4M3 codes (bits [15:8] and [7:0]) to two f16, exact; 0x7F and 0xFF give the f16 NaN 0x7FFF.
// Instruction: PTX ISA 8.1+, sm_89.
#if !HAS_E4M3
__device__ __forceinline__ u32 f16_from_e4m3(u32 code) {
  const u32 sign = (code & 0x80u) << 8, magnitude = code & 0x7Fu;
  if (magnitude == 0x7Fu) return 0x7FFFu;
  u32 half = magnitude << 7;  // value * 2^-8 in f16, denormals included; the product with 2^8 is exact
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(half) : "r"(half), "r"(0x5C00u));
  return sign | half;
}
#endif

extern "C" __device__ u32 cvt_rn_f16x2_e4m3x2(u32 codes) {
#if HAS_E4M3
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)codes));
  return halves;
#else
  return (f16_from_e4m3((codes >> 8) & 0xFFu) << 16) | f16_from_e4m3(codes & 0xFFu);
#endif
}
