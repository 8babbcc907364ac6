// Eight columns of a row in memory, and their FP8 codes: the pieces that the kernels here share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "scale_columns.cuh"

namespace causeway {

struct Output {
  uint8_t* q;        // [rows, k] e4m3
  uint8_t* scale;    // [rows, blocks]
  int64_t q_stride;
  int64_t scale_stride;
  ScaleColumns columns;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Eight columns of a row as they lie in memory: waiting loads hold no more registers than this.
template <typename T>
struct alignas(16) Raw {
  T item[8];
  __device__ __forceinline__ float operator[](int i) const { return to_float(item[i]); }
};

// Columns column .. column + 7 of a row of k; zeros outside. `wide`: 16-byte loads are allowed.
template <typename T>
__device__ __forceinline__ Raw<T> load8(const T* row, int column, int k, bool wide) {
  constexpr int kVectors = sizeof(Raw<T>) / 16;
  Raw<T> raw;
  uint4* target = reinterpret_cast<uint4*>(raw.item);
  if (wide) {
    const uint4* source = reinterpret_cast<const uint4*>(row + column);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      target[i] = column < k ? __ldg(source + i) : make_uint4(0, 0, 0, 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = column + i;
      raw.item[i] = at >= 0 && at < k ? row[at] : from_float<T>(0.0f);
    }
  }
  return raw;
}

// The larger one, NaN if either is NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// Bits of the largest magnitude of the half-warp's block; a NaN's are above those of infinity.
__device__ __forceinline__ uint32_t block_peak(const float (&v)[8]) {
  float peak = fabsf(v[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) peak = max_or_nan(peak, fabsf(v[i]));
#pragma unroll
  for (int step = 8; step > 0; step /= 2) {
    peak = max_or_nan(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, step));
  }
  return __float_as_uint(peak);
}

// E8M0 byte of the smallest power of two >= max(peak, 1e-4) / 448; 255 for NaN and infinity.
__device__ __forceinline__ uint32_t scale_byte(uint32_t peak) {
  if (peak > 0x7F800000u) return 255;
  const uint32_t bits =
      __float_as_uint(fmaxf(__uint_as_float(peak), 1e-4f) * static_cast<float>(1.0 / 448.0));
  return min((bits >> 23) + ((bits & 0x7FFFFFu) != 0 ? 1u : 0u), 255u);
}

// Dividing by the scale and multiplying by its inverse are the same: both are powers of two.
__device__ __forceinline__ float inverse_scale(uint32_t byte) {
  return byte == 255 ? __uint_as_float(0x7FC00000u) : __uint_as_float((254 - byte) << 23);
}

// Two e4m3 codes, the first in the low byte.
__device__ __forceinline__ uint32_t code_pair(float first, float second, float inverse) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first * inverse, second * inverse), __NV_SATFINITE, __NV_E4M3);
}

// The codes of columns column .. column + 7; nothing outside of the row.
__device__ __forceinline__ void write8(
    const float (&v)[8], uint32_t byte, const Output& out, int64_t row, int column, int k, bool wide) {
  const float inverse = inverse_scale(byte);
  uint32_t codes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) codes[i] = code_pair(v[2 * i], v[2 * i + 1], inverse);
  uint8_t* line = out.q + row * out.q_stride;
  if (wide) {
    if (column < k) {
      *reinterpret_cast<uint2*>(line + column) =
          make_uint2(codes[0] | (codes[1] << 16), codes[2] | (codes[3] << 16));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i >= 0 && column + i < k) {
        line[column + i] = static_cast<uint8_t>(codes[i / 2] >> (8 * (i & 1)));
      }
    }
  }
}

__device__ __forceinline__ void write_scale(uint32_t byte, const Output& out, int64_t row, int block) {
  out.scale[row * out.scale_stride + block] = static_cast<uint8_t>(byte);
  out.columns.write(row, block, byte);
}

}  // namespace causeway
