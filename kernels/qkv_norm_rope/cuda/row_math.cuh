// What the row ops around attention share: rows in registers, angles, official rounding, page bytes.
#pragma once
#include <cuda_fp8.h>

#include "hopper.cuh"

namespace causeway {

constexpr int kRope = 64;           // rotary columns, the last ones of a row
constexpr int kPairs = kRope / 2;   // one per lane
constexpr int kQuantBlock = 64;     // columns of an FP8 scale
constexpr unsigned kAll = 0xffffffffu;

// How a kernel names the format of its pages; the same numbers as page_cache/triton_pages.py.
enum Format { kNoPages = 0, kFp8Latent = 1, kFp8Index = 2, kBf16Rows = 3, kFp32Rows = 4 };

struct Pages {
  unsigned char* pool;
  int64_t stride;  // bytes between pages
  int format, per_page, payload, scale_offset, scale_bytes;
};

// ---- rows: N neighbouring values of a lane --------------------------------------------------

// Addresses are multiples of the bytes read or written at once: 16, or all N values where that is less.
template <int N>
__device__ __forceinline__ void load_values(const float* p, float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float4 x = *reinterpret_cast<const float4*>(p + i);
    v[i] = x.x, v[i + 1] = x.y, v[i + 2] = x.z, v[i + 3] = x.w;
  }
}
template <int N>
__device__ __forceinline__ void load_values(const __nv_bfloat16* p, float (&v)[N]) {
  uint32_t w[N / 2];
  if constexpr (N % 8 == 0) {
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
      *reinterpret_cast<uint4*>(w + 4 * i) = reinterpret_cast<const uint4*>(p)[i];
  } else {
    *reinterpret_cast<uint2*>(w) = *reinterpret_cast<const uint2*>(p);
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    v[2 * i] = __uint_as_float(w[i] << 16);
    v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
}
template <int N>
__device__ __forceinline__ void store_values(float* p, const float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4)
    *reinterpret_cast<float4*>(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}
template <int N>
__device__ __forceinline__ void store_values(__nv_bfloat16* p, const float (&v)[N]) {
  uint32_t w[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) w[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
  if constexpr (N % 8 == 0) {
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
      reinterpret_cast<uint4*>(p)[i] = *reinterpret_cast<const uint4*>(w + 4 * i);
  } else {
    *reinterpret_cast<uint2*>(p) = *reinterpret_cast<const uint2*>(w);
  }
}

// Values as a row of T holds them.
template <class T>
__device__ __forceinline__ float as_held(float x) {
  if constexpr (sizeof(T) == 2) return __bfloat162float(__float2bfloat16_rn(x));
  return x;
}

template <class T, int N>
__device__ __forceinline__ void hold(float (&v)[N]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      uint32_t pair = pack_bf16(v[i], v[i + 1]);
      v[i] = __uint_as_float(pair << 16), v[i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
  }
}

// Sum over groups of LANES neighbouring lanes, in a fixed order; every lane gets it.
template <int LANES>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int step = LANES / 2; step; step >>= 1) x += __shfl_xor_sync(kAll, x, step);
  return x;
}
template <int LANES>
__device__ __forceinline__ int max_lanes(int x) {
#pragma unroll
  for (int step = LANES / 2; step; step >>= 1) x = max(x, __shfl_xor_sync(kAll, x, step));
  return x;
}
template <int N>
__device__ __forceinline__ int largest_bits(const float (&v)[N]) {
  int bits = 0;  // of magnitudes; NaN is above all
#pragma unroll
  for (int i = 0; i < N; ++i) bits = max(bits, __float_as_int(v[i]) & 0x7fffffff);
  return bits;
}

// ---- rotary angles --------------------------------------------------------------------------

// (cos, sin) of a float32 angle below 1.6e6 in magnitude, to half an ulp and a bit. Without branches: a
// position of a million costs what 1 costs.
__device__ __forceinline__ float2 cos_sin(float angle) {
  const double round = 6755399441055744.0;  // 1.5 * 2^52: a double added to it becomes an integer
  double x = angle;
  double shifted = x * 0.6366197723675814 + round;
  double turns = shifted - round;
  int quadrant = __double2loint(shifted) & 3;
  // pi/2 in two parts; the first has 33 bits, so its product with a quadrant below 2^20 is exact.
  double r = (x - turns * 1.57079632673412561417e+00) - turns * 6.07710050650619224932e-11;
  double z = r * r;
  double s = -1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  float sin = (float)(s * z * r + r);
  double c = -1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  float cos = (float)(c * z + 1.0);
  if (quadrant & 1) {
    float swap = sin;
    sin = cos, cos = swap;
  }
  if (quadrant & 2) sin = -sin;
  if ((quadrant + 1) & 2) cos = -cos;
  return make_float2(cos, sin);
}

// Rotates N / 2 neighbouring pairs; no fused multiply-add, as in the other implementations.
template <int N>
__device__ __forceinline__ void rotate(float (&v)[N], const float2* table) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    float2 t = table[i];
    float even = v[2 * i], odd = v[2 * i + 1];
    v[2 * i] = __fsub_rn(__fmul_rn(even, t.x), __fmul_rn(odd, t.y));
    v[2 * i + 1] = __fadd_rn(__fmul_rn(even, t.y), __fmul_rn(odd, t.x));
  }
}

// ---- official rounding: E8M0 bytes from the bits of a block's largest magnitude ---------------

__device__ __forceinline__ int scale_byte(float ratio) {
  int bits = __float_as_int(ratio);
  return min((bits >> 23) + ((bits & 0x7fffff) != 0), 255);
}
__device__ __forceinline__ int fp8_byte(int bits) {
  return scale_byte(__fmul_rn(__int_as_float(max(bits, 0x38D1B717)), 1.0f / 448.0f));  // >= 1e-4
}
__device__ __forceinline__ int fp4_byte(int bits) {
  return scale_byte(__fmul_rn(__int_as_float(max(bits, 0x01C00000)), 1.0f / 6.0f));  // 6 * 2^-126
}
__device__ __forceinline__ int index_byte(int bits) {
  return scale_byte(__fdiv_rn(__int_as_float(max(bits, 0x04E00000)), 448.0f));  // 448 * 2^-126
}
__device__ __forceinline__ float scale_value(int byte) {
  return __int_as_float(byte == 255 ? 0x7FC00000 : byte << 23);
}
__device__ __forceinline__ float scale_inverse(int byte) {
  return __int_as_float(byte == 255 ? 0x7FC00000 : (254 - byte) << 23);
}
// x rounded to steps of its own power of two (at least the smallest) times a constant: the addition of
// 1.5 * 2^23 steps does it, ties to even.
__device__ __forceinline__ float on_grid(float x, int smallest, float shift) {
  int power = max(__float_as_int(x) & 0x7F800000, smallest);
  float anchor = __fmul_rn(__int_as_float(power), shift);
  return __fsub_rn(__fadd_rn(x, anchor), anchor);
}
__device__ __forceinline__ float on_fp8_grid(float x, int byte) {
  return on_grid(x, byte == 255 ? 0x7FC00000 : (byte - 6) << 23, 12582912.0f / 8.0f);
}
__device__ __forceinline__ float on_fp4_grid(float x, int byte) {
  return on_grid(x, byte == 255 ? 0x7FC00000 : byte << 23, 12582912.0f / 2.0f);
}
__device__ __forceinline__ uint32_t e4m3x4(const float* v) {
  uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(v[0], v[1]), __NV_SATFINITE, __NV_E4M3);
  uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(v[2], v[3]), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// ---- pages ----------------------------------------------------------------------------------

struct Place {
  unsigned char* page;
  int offset;  // entry in the page
};
__device__ __forceinline__ Place place_of(const Pages& pages, int64_t slot) {
  // 64-bit divisions are slow and slots small.
  int64_t page = slot >> 32 ? slot / pages.per_page : (uint32_t)slot / (uint32_t)pages.per_page;
  return {pages.pool + page * pages.stride, (int)(slot - page * pages.per_page)};
}
// Whether a block's rounded values, stored, take half the scale of its own: its largest magnitude lies
// above 224 scales, and is rounded down to that at 232 of them or less.
__device__ __forceinline__ bool takes_half_scale(int peak, int byte) {
  return __fmul_rn(__int_as_float(max(peak, 0x38D1B717)), scale_inverse(byte)) <= 232.0f;
}
// N values at column `col` of a plain row that starts at `start`; page bytes are only 4-aligned.
template <int N>
__device__ __forceinline__ void put_plain(unsigned char* start, int col, const float (&v)[N],
                                          bool narrow) {
  if (narrow) {
    uint32_t* to = reinterpret_cast<uint32_t*>(start) + col / 2;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) to[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
  } else {
    float* to = reinterpret_cast<float*>(start) + col;
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = v[i];
  }
}
// e4m3 codes of N values over their scale, of N values under a scale byte, and the values of codes.
template <int N>
__device__ __forceinline__ void encode_scaled(const float (&v)[N], uint32_t (&codes)[N / 4]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) codes[i / 4] = e4m3x4(v + i);
}
template <int N>
__device__ __forceinline__ void encode(const float (&v)[N], int byte, uint32_t (&codes)[N / 4]) {
  float factor = scale_inverse(byte), scaled[N];
#pragma unroll
  for (int i = 0; i < N; ++i) scaled[i] = v[i] * factor;
  encode_scaled(scaled, codes);
}
template <int N>
__device__ __forceinline__ void decode(const uint32_t (&codes)[N / 4], int byte, float (&v)[N]) {
  float factor = scale_value(byte);
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2((codes[i / 4] >> (i % 4 * 8)) & 0xffffu, __NV_E4M3);
    float2 pair = __half22float2(__half2(raw));
    v[i] = pair.x * factor, v[i + 1] = pair.y * factor;
  }
}
template <int N>
__device__ __forceinline__ void put_codes(unsigned char* to, const uint32_t (&codes)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) reinterpret_cast<uint32_t*>(to)[i] = codes[i];
}

// The end of a latent, for N columns of one FP8 block held by LANES = 64 / N neighbouring lanes: official
// rounding, the write to pages, and the values that are read back. `tail`: the block is the rotary one.
// All lanes of the warp call this; those with `stores` have the entry's place. `alone`: the warp has
// no other block, whose maximum then is one instruction.
template <int N>
__device__ __forceinline__ void finish_latent(float (&v)[N], int col, int dim, bool tail,
                                              bool quantize, const Pages& pages, const Place& at,
                                              bool stores, bool alone = false) {
  constexpr int kLanes = kQuantBlock / N;
  const int format = pages.format;
  const bool rounds = quantize, narrow = format == kFp8Latent;
  uint32_t codes[N / 4];
  int byte = 0;
  if (rounds || narrow) {
    int peak = largest_bits(v);
    peak = alone ? __reduce_max_sync(kAll, peak) : max_lanes<kLanes>(peak);
    byte = fp8_byte(peak);
    encode(v, byte, codes);
    if (!tail) decode(codes, byte, v);
    if (rounds && narrow && !tail && takes_half_scale(peak, byte)) encode(v, --byte, codes);
  }
  if (format == kNoPages) return;
  unsigned char* start = at.page + (int64_t)at.offset * pages.payload;
  bool half = narrow || format == kBf16Rows;
  if (stores) {
    if (narrow && !tail) {
      put_codes(start + col, codes);
      if (col % kQuantBlock == 0)
        at.page[pages.scale_offset + at.offset * pages.scale_bytes + col / kQuantBlock] = byte;
    } else if (narrow) {
      put_plain(start + dim - kRope, col - (dim - kRope), v, true);
    } else {
      put_plain(start, col, v, half);
    }
  }
  if (half && (tail || !narrow)) hold<__nv_bfloat16>(v);
}

}  // namespace causeway
