// Warp-level matrix multiply-accumulate: D = A * B + C, accumulators in f32.
// Fragment maps: ptx_inline.isa.fragments. Every lane of the warp must execute the call together (.sync.aligned).
// Pointers name per-lane register arrays; after link-time optimisation they are registers.

typedef unsigned int u32;
typedef unsigned short u16;

// PTX ISA 8.7+, sm_120a. SFA/SFB: four UE4M3 bytes a register, byte j scales k in [16 j, 16 j + 16).
// byte_id must be 0 for 4X; thread_id_a 0..1 and thread_id_b 0..3 choose the lanes of a quad that supply the scales.
extern "C" __device__ void mma_m16n8k64_mxf4nvf4_4x_ue4m3(float *d, const u32 *a, const u32 *b, const float *c, u32 sfa,
                                                           u32 sfb, u16 byte_id_a, u16 thread_id_a, u16 byte_id_b,
                                                           u16 thread_id_b) {
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13}, {%14}, {%15,%16}, {%17}, {%18,%19};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]),
        "r"(sfa), "h"(byte_id_a), "h"(thread_id_a), "r"(sfb), "h"(byte_id_b), "h"(thread_id_b));
#else
#error "mma kind::mxf4nvf4 needs sm_120a or sm_121a"
#endif
}

// PTX ISA 8.7+, sm_120a. One code a byte, e2m1 in bits [5:2] of it; no scales.
extern "C" __device__ void mma_m16n8k32_f8f6f4_e2m1_e2m1(float *d, const u32 *a, const u32 *b, const float *c) {
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
  asm volatile("mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.e2m1.e2m1.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                 "f"(c[3]));
#else
#error "mma kind::f8f6f4 needs sm_120a or sm_121a"
#endif
}

// PTX ISA 8.7+, sm_120a. A in e4m3, B in e2m1 (bits [5:2] of a byte); no scales.
extern "C" __device__ void mma_m16n8k32_f8f6f4_e4m3_e2m1(float *d, const u32 *a, const u32 *b, const float *c) {
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
  asm volatile("mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.e4m3.e2m1.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                 "f"(c[3]));
#else
#error "mma kind::f8f6f4 needs sm_120a or sm_121a"
#endif
}
