// FP4 (e2m1) weights as e4m3 codes. The copy of the weights that the GPU keeps holds 32 columns of a row in four
// words (kernels/linear/fp4_order.py): word t has columns 4t .. 4t+3 and 16+4t .. 16+4t+3, as the tensor cores take
// them from registers. Nibbles 0-3 hold the magnitudes of the first four in bits 0-2, nibbles 4-7 those of the others;
// bit 3 of the odd nibbles holds the signs of the first four, of the even nibbles those of the others.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace causeway {

// The codes of the magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 times a power of two, a byte each.
struct E2m1Table {
  uint32_t low, high;
};

__device__ __forceinline__ E2m1Table e2m1_table(float factor) {
  auto pair = [&](float low, float high) -> uint32_t {
    return __nv_cvt_float2_to_fp8x2(make_float2(low * factor, high * factor), __NV_SATFINITE, __NV_E4M3);
  };
  return {pair(0.0f, 0.5f) | (pair(1.0f, 1.5f) << 16), pair(2.0f, 3.0f) | (pair(4.0f, 6.0f) << 16)};
}

// Codes are exact from 2^kLowestShift on (but for zeros, which every factor gives), and normal numbers from
// 2^kLowestNormal on: then one more power of two adds one to every exponent. 2^6 is the largest factor.
constexpr int kLowestShift = -11, kLowestNormal = -5;

// The same table for the factor 2^(index + kLowestShift), index >= kLowestNormal - kLowestShift.
__device__ __forceinline__ E2m1Table e2m1_normal_table(uint32_t index) {
  constexpr uint32_t kBack = static_cast<uint32_t>(-kLowestShift);
  return {0x3C383000u - kBack * 0x08080800u + index * 0x08080800u,
          0x4C484440u - kBack * 0x08080808u + index * 0x08080808u};
}

__device__ __forceinline__ uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selectors));
  return bytes;
}

// A word to two words of codes.
__device__ __forceinline__ void unpack_e2m1(E2m1Table table, uint32_t word, uint32_t& first, uint32_t& second) {
  const uint32_t magnitudes = word & 0x77777777u;
  first = select_bytes(table.low, table.high, magnitudes) | (word & 0x80808080u);
  second = select_bytes(table.low, table.high, magnitudes >> 16) | ((word << 4) & 0x80808080u);
}

}  // namespace causeway
