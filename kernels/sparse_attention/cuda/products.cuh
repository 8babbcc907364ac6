// Products of 64 queries: with 96 keys, and of their probabilities with 128 columns of values.
// Descriptors: wgmma.cuh.
#pragma once
#include <cstdint>

#include "wgmma_lists.cuh"

namespace causeway {

// bf16, A and B K-major in smem.
__device__ __forceinline__ void mma_m64n96k16_ss(float (&d)[48], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" WGMMA_PLACES_48
      "}, %48, %49, p, 1, 1, 0, 0;\n}\n"
      : WGMMA_SUMS_48(d, 0)
      : "l"(a), "l"(b), "r"(accumulate));
}

// bf16, A K-major and B MN-major in smem: two subtiles of values.
__device__ __forceinline__ void mma_m64n128k16_ss_t(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_PLACES_64
      "}, %64, %65, p, 1, 1, 0, 1;\n}\n"
      : WGMMA_SUMS_64(d, 0)
      : "l"(a), "l"(b), "r"(accumulate));
}

}  // namespace causeway
