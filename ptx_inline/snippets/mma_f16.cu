// 16-bit MMA, sm_80 and newer: D = A * B + C with f32 accumulators. Fragment maps: ptx_inline.isa.fragments.
// Every lane of the warp must execute the call together (.sync.aligned).

typedef unsigned int u32;

// PTX ISA 7.0+, sm_80. Two f16 a register, low half the lower k.
extern "C" __device__ void mma_m16n8k16_f16(float *d, const u32 *a, const u32 *b, const float *c) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                 "f"(c[3]));
}

// PTX ISA 7.0+, sm_80. Two bf16 a register, low half the lower k.
extern "C" __device__ void mma_m16n8k16_bf16(float *d, const u32 *a, const u32 *b, const float *c) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                 "f"(c[3]));
}
