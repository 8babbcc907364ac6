// Latent entries (512 values: 448 + 64 rotary) in pages, read as bfloat16. Layout: page_layout.py.
#pragma once
#include "hopper.cuh"

namespace causeway {

constexpr int kDim = 512;
constexpr int kNope = 448;
constexpr int kFp8Payload = kNope + 2 * (kDim - kNope);  // bytes of an fp8 entry without its scales

enum EntryFormat : int { kFp8 = 0, kBf16 = 1, kF32 = 2 };

struct Pages {
  const uint8_t* pool;
  int64_t stride;  // bytes between pages
  int per_page;
  int format;  // EntryFormat
};

struct Entries {
  Pages pages;
  const int32_t* block_table;
  int64_t table_row;
  const int64_t* row_seq;
  const int32_t* index;  // null: all entries
  int64_t index_row;
  int index_count;
  const int64_t* num_entries;
};

// 4 e4m3 codes -> 4 bfloat16 values times 2^-120: the code's bits, moved to a bfloat16's places. Subnormal
// codes become subnormal values, so one exact multiplication puts the exponent right.
__device__ __forceinline__ uint2 spread_codes(uint32_t codes) {
  uint32_t low = __byte_perm(codes, 0, 0x1404), high = __byte_perm(codes, 0, 0x3424);
  low = ((low >> 4) & 0x07f007f0u) | (low & 0x80008000u);
  high = ((high >> 4) & 0x07f007f0u) | (high & 0x80008000u);
  return make_uint2(low, high);
}
__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

constexpr uint32_t kLargestScale = 134;  // whose factor is a bfloat16; larger ones multiply twice

// 16 codes of one E8M0 scale -> 16 bfloat16 values. any_large: some scale of the warp is above kLargestScale.
__device__ __forceinline__ void decode_codes(uint4 raw, uint32_t scale_byte, bool any_large, uint4 (&out)[2]) {
  uint32_t factor = min(scale_byte + 120u, 254u) * 0x00800080u;
  uint2 v[4] = {spread_codes(raw.x), spread_codes(raw.y), spread_codes(raw.z), spread_codes(raw.w)};
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i].x = multiply_bf16x2(v[i].x, factor), v[i].y = multiply_bf16x2(v[i].y, factor);
  if (any_large) {
    factor = scale_byte > kLargestScale ? (scale_byte - 7u) * 0x00800080u : 0x3f803f80u;
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i].x = multiply_bf16x2(v[i].x, factor), v[i].y = multiply_bf16x2(v[i].y, factor);
  }
  out[0] = make_uint4(v[0].x, v[0].y, v[1].x, v[1].y);
  out[1] = make_uint4(v[2].x, v[2].y, v[3].x, v[3].y);
}

// Byte of scale i = 0..6 of an entry's 8 bytes.
__device__ __forceinline__ uint32_t scale_byte(uint2 scales, int i) {
  return ((i < 4 ? scales.x : scales.y) >> (8 * (i & 3))) & 255u;
}

__device__ __forceinline__ const uint8_t* scales_of(const Pages& p, const uint8_t* page, int offset) {
  return page + (int64_t)p.per_page * kFp8Payload + (int64_t)offset * 8;
}

// Entry `offset` of the page at `page` in any format, decoded by the 4 lanes of a quad.
template <typename Put>
__device__ __forceinline__ void decode_entry(const Pages& p, const uint8_t* page, int offset, int q,
                                             bool aligned, Put put) {
  if (p.format == kFp8) {
    const uint8_t* codes = page + (int64_t)offset * kFp8Payload + q * 16;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(scales_of(p, page, offset));
    uint2 scales = make_uint2(__ldg(words), __ldg(words + 1));
    uint4 raw[9], values[2];
#pragma unroll
    for (int i = 0; i < 9; ++i) raw[i] = load16(codes + 64 * i, aligned);
#pragma unroll
    for (int i = 0; i < 7; ++i) {
      decode_codes(raw[i], scale_byte(scales, i), true, values);
      put(64 * i + 16 * q, values[0]);
      put(64 * i + 16 * q + 8, values[1]);
    }
    put(kNope + 8 * q, raw[7]);
    put(kNope + 32 + 8 * q, raw[8]);
    return;
  }
  const uint8_t* entry = page + (int64_t)offset * (p.format == kBf16 ? 2 * kDim : 4 * kDim);
  for (int i = 0; i < 16; ++i) {
    int column = 8 * (q + 4 * i);
    if (p.format == kBf16) {
      put(column, load16(entry + column * 2, aligned));
    } else {
      uint4 a = load16(entry + column * 4, aligned), b = load16(entry + column * 4 + 16, aligned);
      put(column, make_uint4(pack_bf16(__uint_as_float(a.x), __uint_as_float(a.y)),
                             pack_bf16(__uint_as_float(a.z), __uint_as_float(a.w)),
                             pack_bf16(__uint_as_float(b.x), __uint_as_float(b.y)),
                             pack_bf16(__uint_as_float(b.z), __uint_as_float(b.w))));
    }
  }
}

__device__ __forceinline__ bool is_aligned(const Pages& p) {
  return ((uintptr_t)p.pool | (uintptr_t)p.stride) % 16 == 0;
}

// Entry number behind position `at` of a row's entry list; -1: none (out of range or index -1).
__device__ __forceinline__ int entry_at(const Entries& e, int64_t row, int at, int limit) {
  if (e.index == nullptr) return at < limit ? at : -1;
  if (at >= e.index_count) return -1;
  int entry = __ldg(e.index + row * e.index_row + at);
  return entry < limit ? entry : -1;
}

// The 4x4 transposition of a quad: lane t gives words of its columns in 4 groups and gets group t.
__device__ __forceinline__ uint4 quad_transpose(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  int t = threadIdx.x & 3;
  bool odd = t & 1, upper = t & 2;
  uint32_t x = __shfl_xor_sync(~0u, odd ? w0 : w1, 1), y = __shfl_xor_sync(~0u, odd ? w2 : w3, 1);
  uint32_t a0 = odd ? x : w0, a1 = odd ? w1 : x;  // group 0 or 1, from this pair of lanes
  uint32_t b0 = odd ? y : w2, b1 = odd ? w3 : y;  // group 2 or 3
  uint32_t c0 = __shfl_xor_sync(~0u, upper ? a0 : b0, 2), c1 = __shfl_xor_sync(~0u, upper ? a1 : b1, 2);
  return upper ? make_uint4(c0, c1, b0, b1) : make_uint4(a0, a1, c0, c1);
}

// Row g + 8 i of an accumulator of 64 rows, as bfloat16, in 16-byte stores: d[4 j + 2 i ..] are columns
// 8 j + 2 t and the next. `to` null: nothing is stored.
template <int kValues>
__device__ __forceinline__ void store_output(const float (&d)[kValues], float factor, int i,
                                             __nv_bfloat16* to) {
  int t = threadIdx.x & 3;
#pragma unroll
  for (int j = 0; j < kValues / 4; j += 4) {
    uint32_t w[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      w[u] = pack_bf16(d[4 * (j + u) + 2 * i] * factor, d[4 * (j + u) + 2 * i + 1] * factor);
    }
    uint4 v = quad_transpose(w[0], w[1], w[2], w[3]);
    if (to) *reinterpret_cast<uint4*>(to + 8 * (j + t)) = v;
  }
}

}  // namespace causeway
