// The matrix instruction of Hopper with both operands in shared memory behind descriptors (K-major, 128-byte swizzle: see
// `operand`): D[64, N] (+)= A[64, K] B[N, K]^T in f32, K of 32 bytes. One specialisation per N in use.
#pragma once

#include <cstdint>

#include "wgmma_lists.cuh"

namespace causeway {

// The lower half of the 64-bit descriptor of a tile that starts at a multiple of 1024 bytes; the upper
// half is the same for all. 32 bytes of every row further on it is larger by two.
__device__ __forceinline__ uint32_t operand(uint32_t address) {
  return ((address & 0x3FFFF) >> 4) | (1u << 16);
}

template <int N>
struct WgmmaBf16;
template <int N>
struct WgmmaE4m3;

// `sums` of a thread; the operands' and the flag's places behind them; the instruction's name and last words.
#define WGMMA_SHARED(name, n, sums, b_place, add_place, shape, words) \
  template <> \
  struct name<n> { \
    static __device__ __forceinline__ void run(float (&d)[sums], uint32_t a, uint32_t b, int add) { \
      asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %" #add_place ", 0;\n" \
                   "mov.b64 a, {%" #sums ", 0x40000040};\nmov.b64 b, {%" #b_place ", 0x40000040};\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #n shape " {" WGMMA_PLACES_##sums \
                   "}, a, b, p, " words ";\n}\n" \
                   : WGMMA_SUMS_##sums(d, 0) \
                   : "r"(a), "r"(b), "r"(add)); \
    } \
  };
#define WGMMA_BF16(n, sums, b_place, add_place) \
  WGMMA_SHARED(WgmmaBf16, n, sums, b_place, add_place, "k16.f32.bf16.bf16", "1, 1, 0, 0")
#define WGMMA_E4M3(n, sums, b_place, add_place) \
  WGMMA_SHARED(WgmmaE4m3, n, sums, b_place, add_place, "k32.f32.e4m3.e4m3", "1, 1")

WGMMA_BF16(16, 8, 9, 10)
WGMMA_BF16(32, 16, 17, 18)
WGMMA_BF16(64, 32, 33, 34)
WGMMA_BF16(128, 64, 65, 66)
WGMMA_BF16(192, 96, 97, 98)

WGMMA_E4M3(16, 8, 9, 10)
WGMMA_E4M3(32, 16, 17, 18)
WGMMA_E4M3(64, 32, 33, 34)
WGMMA_E4M3(96, 48, 49, 50)
WGMMA_E4M3(112, 56, 57, 58)
WGMMA_E4M3(128, 64, 65, 66)
WGMMA_E4M3(192, 96, 97, 98)
#undef WGMMA_E4M3
#undef WGMMA_BF16
#undef WGMMA_SHARED

}  // namespace causeway
