// As `WgmmaE4m3`, with A in registers: a thread of warp w holds, of rows 16 w + lane / 4 (a[0], a[2]) and 8 further on
// (a[1], a[3]), the columns lane % 4 * 4 .. + 3 (a[0], a[1]) and those 16 further on (a[2], a[3]).
#pragma once

#include <cstdint>

#include "wgmma_lists.cuh"

namespace causeway {

template <int N>
struct WgmmaE4m3Registers;

// `sums` of a thread; the places of A, B and the flag behind them.
#define WGMMA_E4M3_REGISTERS(n, sums, a1, a2, a3, b_place, add_place) \
  template <> \
  struct WgmmaE4m3Registers<n> { \
    static __device__ __forceinline__ void run(float (&d)[sums], const uint32_t* a, uint32_t b, int add) { \
      asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %" #add_place ", 0;\n" \
                   "mov.b64 b, {%" #b_place ", 0x40000040};\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" WGMMA_PLACES_##sums \
                   "}, {%" #sums ", %" #a1 ", %" #a2 ", %" #a3 "}, b, p, 1, 1;\n}\n" \
                   : WGMMA_SUMS_##sums(d, 0) \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add)); \
    } \
  };

WGMMA_E4M3_REGISTERS(8, 4, 5, 6, 7, 8, 9)
WGMMA_E4M3_REGISTERS(16, 8, 9, 10, 11, 12, 13)
WGMMA_E4M3_REGISTERS(32, 16, 17, 18, 19, 20, 21)
WGMMA_E4M3_REGISTERS(48, 24, 25, 26, 27, 28, 29)
#undef WGMMA_E4M3_REGISTERS

}  // namespace causeway
