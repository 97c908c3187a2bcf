// ldmatrix that widens 4-bit codes to bytes on the way, PTX ISA 8.6+, sm_120a: rows of sixteen codes in 8 bytes plus
// 8 bytes of padding (b4x16_p64). A code lands in bits [3:0] of its byte; shift left by 2 for kind::f8f6f4.
// Every lane of the warp must execute the call together (.sync.aligned).

typedef unsigned int u32;

extern "C" __device__ void ldmatrix_x4_b8x16_b4x16_p64(u32 *dst, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n16.x4.shared.b8x16.b4x16_p64 {%0,%1,%2,%3}, [%4];"
               : "=r"(dst[0]), "=r"(dst[1]), "=r"(dst[2]), "=r"(dst[3])
               : "r"(address)
               : "memory");
}

extern "C" __device__ void ldmatrix_x2_b8x16_b4x16_p64(u32 *dst, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n16.x2.shared.b8x16.b4x16_p64 {%0,%1}, [%2];"
               : "=r"(dst[0]), "=r"(dst[1])
               : "r"(address)
               : "memory");
}
