// Memory movement: vector loads and stores, cp.async, shared-memory addresses.
// `index` counts elements of the pointer's type; vector forms need the address aligned to their width.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// 16 bytes through the read-only path; the memory must not be written while the kernel runs. PTX ISA 3.1+.
extern "C" __device__ void ld_global_nc_v4_u32(u32 *dst, const u32 *base, i64 index) {
  asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(dst[0]), "=r"(dst[1]), "=r"(dst[2]), "=r"(dst[3])
      : "l"(base + index));
}

extern "C" __device__ void ld_global_nc_v2_u32(u32 *dst, const u32 *base, i64 index) {
  asm("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(dst[0]), "=r"(dst[1]) : "l"(base + index));
}

// What another kernel may be writing: not from L1, where a later load would find it. PTX ISA 6.0+, sm_70.
extern "C" __device__ int ld_relaxed_gpu_global_s32(const int *base, i64 index) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(base + index));
  return value;
}

// 16 bytes of memory that this kernel may write too. PTX ISA 2.0+.
extern "C" __device__ void ld_global_v4_u32(u32 *dst, const u32 *base, i64 index) {
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(dst[0]), "=r"(dst[1]), "=r"(dst[2]), "=r"(dst[3])
               : "l"(base + index)
               : "memory");
}

// `offset` in bytes, a multiple of 4.
extern "C" __device__ u32 ld_global_nc_u32(const unsigned char *base, i64 offset) {
  u32 value;
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(value) : "l"(base + offset));
  return value;
}

extern "C" __device__ void st_global_v4_u32(u32 *base, i64 index, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(base + index), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

extern "C" __device__ void st_global_v2_u32(u32 *base, i64 index, u32 x, u32 y) {
  asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(base + index), "r"(x), "r"(y) : "memory");
}

// Atomic maximum without the old value. PTX ISA 1.2+.
extern "C" __device__ void red_global_max_u32(u32 *base, i64 index, u32 value) {
  asm volatile("red.global.max.u32 [%0], %1;" ::"l"(base + index), "r"(value) : "memory");
}

// Counts up to `last` and then starts at 0 again; returns the count before. What this thread has seen done before it is
// done for whoever counts later. PTX ISA 6.0+, sm_70.
extern "C" __device__ u32 atom_acq_rel_gpu_global_inc_u32(u32 *base, i64 index, u32 last) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(base + index), "r"(last) : "memory");
  return before;
}

// Generic pointer -> 32-bit address in the shared window, as ldmatrix, cp.async and ld.shared take it.
extern "C" __device__ u32 cvta_to_shared_u32(const void *pointer) {
  u64 address;
  asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
  return (u32)address;
}

// Waits until the kernels that this one was launched after are done and what they wrote is visible; lets those that are
// launched after this one begin. PTX ISA 7.8+, sm_90: older GPUs launch one after the other, so nothing is to be done there.
extern "C" __device__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

extern "C" __device__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// 1 where these two do something, and a kernel may begin before the one ahead of it is done.
extern "C" __device__ u32 has_griddepcontrol() {
#if __CUDA_ARCH__ >= 900
  return 1;
#else
  return 0;
#endif
}

// Hints: L2 is asked for a line, or for `bytes`, which is a multiple of 16 as their address is. PTX ISA 2.0+; 8.0+, sm_90.
extern "C" __device__ void prefetch_global_l2(const unsigned char *base, i64 offset) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(base + offset));
}

extern "C" __device__ void cp_async_bulk_prefetch_l2_global(const unsigned char *base, i64 offset, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(base + offset), "r"(bytes));
#endif
}

extern "C" __device__ u32 ld_shared_u32(u32 address) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

extern "C" __device__ u32 ld_shared_u16(u32 address) {
  u16 value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  return value;
}

extern "C" __device__ void ld_shared_v2_u32(u32 *dst, u32 address) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(dst[0]), "=r"(dst[1]) : "r"(address) : "memory");
}

extern "C" __device__ void ld_shared_v4_u32(u32 *dst, u32 address) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(dst[0]), "=r"(dst[1]), "=r"(dst[2]), "=r"(dst[3])
               : "r"(address)
               : "memory");
}

extern "C" __device__ void st_shared_u32(u32 address, u32 value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

extern "C" __device__ void st_shared_v2_u32(u32 address, u32 x, u32 y) {
  asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}

extern "C" __device__ void st_shared_v4_u32(u32 address, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// Asynchronous copy of 16 bytes to shared memory, PTX ISA 7.0+, sm_80. Bytes past `src_bytes` (0..16) are zero-filled
// and not read, which is how edges of a tensor are handled. `base + offset` in bytes.
extern "C" __device__ void cp_async_cg_16(u32 smem_address, const unsigned char *base, i64 offset, u32 src_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address), "l"(base + offset), "r"(src_bytes)
               : "memory");
}

extern "C" __device__ void cp_async_ca_4(u32 smem_address, const unsigned char *base, i64 offset, u32 src_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address), "l"(base + offset), "r"(src_bytes)
               : "memory");
}

// The same for what is read once: L2 gives it up before anything else, so that it drives out nothing that is read again.
// The policy is what `createpolicy.fractional.L2::evict_first 1.0` gives. PTX ISA 7.4+, sm_80.
extern "C" __device__ void cp_async_cg_16_evict_first(u32 smem_address, const unsigned char *base, i64 offset,
                                                      u32 src_bytes) {
  asm volatile("{ .reg .b64 policy; mov.b64 policy, 0x12F0000000000000; "
               "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, policy; }" ::"r"(smem_address),
               "l"(base + offset), "r"(src_bytes)
               : "memory");
}

extern "C" __device__ void cp_async_ca_8_evict_first(u32 smem_address, const unsigned char *base, i64 offset,
                                                     u32 src_bytes) {
  asm volatile("{ .reg .b64 policy; mov.b64 policy, 0x12F0000000000000; "
               "cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 8, %2, policy; }" ::"r"(smem_address),
               "l"(base + offset), "r"(src_bytes)
               : "memory");
}

extern "C" __device__ void cp_async_ca_4_evict_first(u32 smem_address, const unsigned char *base, i64 offset,
                                                     u32 src_bytes) {
  asm volatile("{ .reg .b64 policy; mov.b64 policy, 0x12F0000000000000; "
               "cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 4, %2, policy; }" ::"r"(smem_address),
               "l"(base + offset), "r"(src_bytes)
               : "memory");
}

extern "C" __device__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// The group count is an immediate of the instruction, hence one function each.
extern "C" __device__ void cp_async_wait_group_0() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

extern "C" __device__ void cp_async_wait_group_1() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
