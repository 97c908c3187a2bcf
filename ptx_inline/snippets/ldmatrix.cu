// ldmatrix: 8x8 matrices of 16-bit elements from shared memory into MMA fragments, PTX ISA 6.5+, sm_75.
// Lanes 8 m .. 8 m + 7 give the 16-byte aligned row addresses of matrix m; lane l receives row l / 4, bytes
// [4 (l % 4), +4) of each matrix. Sixteen bytes are 32 E2M1 codes, so the plain form also loads m16n8k64 fragments.
// Every lane of the warp must execute the call together (.sync.aligned).

typedef unsigned int u32;

extern "C" __device__ void ldmatrix_x1(u32 *dst, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(dst[0]) : "r"(address) : "memory");
}

extern "C" __device__ void ldmatrix_x2(u32 *dst, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(dst[0]), "=r"(dst[1])
               : "r"(address)
               : "memory");
}

extern "C" __device__ void ldmatrix_x4(u32 *dst, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(dst[0]), "=r"(dst[1]), "=r"(dst[2]), "=r"(dst[3])
               : "r"(address)
               : "memory");
}

extern "C" __device__ void ldmatrix_x2_trans(u32 *dst, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(dst[0]), "=r"(dst[1])
               : "r"(address)
               : "memory");
}

extern "C" __device__ void ldmatrix_x4_trans(u32 *dst, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(dst[0]), "=r"(dst[1]), "=r"(dst[2]), "=r"(dst[3])
               : "r"(address)
               : "memory");
}
