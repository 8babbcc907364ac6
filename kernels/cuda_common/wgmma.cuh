// Warpgroup matrix products (sm_90a), one wrapper per shape. D = A B (+ D when accumulate).
// Descriptors: 128-byte swizzle; smem tiles start at multiples of 1024 bytes.
#pragma once
#include <cstdint>

#include "wgmma_lists.cuh"

namespace causeway {

// K-major operand in [rows][64 x 16 bit] (or [rows][128 x 8 bit]) tiles: 8 rows every 1024 bytes.
__device__ __forceinline__ uint64_t desc_k_major(uint32_t smem) {
  return (uint64_t)((smem & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// MN-major operand: 64 values along MN per 128-byte row, next 64 values `stride` bytes further.
__device__ __forceinline__ uint64_t desc_mn_major(uint32_t smem, uint32_t stride) {
  return (uint64_t)((smem & 0x3ffff) >> 4) | ((uint64_t)(stride >> 4) << 16) | (64ull << 32) |
         (1ull << 62);
}

// The same operand `bytes` further on.
__device__ __forceinline__ uint64_t desc_advance(uint64_t desc, uint32_t bytes) { return desc + (bytes >> 4); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving accesses of accumulators across an asynchronous product.
template <int N>
__device__ __forceinline__ void fence_regs(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// bf16, A and B K-major in smem.
__device__ __forceinline__ void mma_m64n64k16_ss(
    float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_PLACES_32
      "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
      : WGMMA_SUMS_32(d, 0)
      : "l"(a), "l"(b), "r"(accumulate));
}

// e4m3, A in registers, B K-major in smem.
__device__ __forceinline__ void mma_m64n64k32_e4m3_rs(
    float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" WGMMA_PLACES_32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1;\n}\n"
      : WGMMA_SUMS_32(d, 0)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));
}

}  // namespace causeway
