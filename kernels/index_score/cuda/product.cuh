// Products of 64 keys with the queries of two rows.
#pragma once
#include <cstdint>

#include "wgmma_lists.cuh"

namespace causeway {

// e4m3, A in registers, B K-major in smem. D = A B (+ D when accumulate).
__device__ __forceinline__ void mma_m64n128k32_e4m3_rs(
    float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" WGMMA_PLACES_64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n}\n"
      : WGMMA_SUMS_64(d, 0)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));
}

}  // namespace causeway
