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

// 4 e4m3 codes -> 4 bfloat16 values * 2^(byte - 127). The code's bits moved into a bfloat16 are the
// value times 2^-120, subnormals included; one exact multiplication puts the exponent right.
__device__ __forceinline__ uint2 e4m3x4_to_bf16(uint32_t codes, uint32_t scale_byte) {
  uint32_t low = __byte_perm(codes, 0, 0x1404), high = __byte_perm(codes, 0, 0x3424);
  low = ((low >> 4) & 0x07f007f0u) | (low & 0x80008000u);
  high = ((high >> 4) & 0x07f007f0u) | (high & 0x80008000u);
  uint32_t factor = min(scale_byte + 120u, 254u) << 7;
  factor |= factor << 16;
  auto multiply = [](uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  };
  low = multiply(low, factor), high = multiply(high, factor);
  if (scale_byte > 134u) {  // larger factors do not fit a bfloat16: twice
    factor = (scale_byte - 7u) << 7;
    factor |= factor << 16;
    low = multiply(low, factor), high = multiply(high, factor);
  }
  return make_uint2(low, high);
}

// A quarter of an fp8 entry: what lane q = 0..3 of a quad reads of it.
struct Fp8Quarter {
  uint4 raw[9];
  uint32_t scale[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 9; ++i) raw[i] = make_uint4(0, 0, 0, 0);
    scale[0] = scale[1] = 0;
  }
  __device__ __forceinline__ void load(const Pages& p, const uint8_t* page, int offset, int q,
                                       bool aligned) {
    const uint8_t* entry = page + (int64_t)offset * kFp8Payload + q * 16;
    const uint32_t* scales =
        reinterpret_cast<const uint32_t*>(page + (int64_t)p.per_page * kFp8Payload + (int64_t)offset * 8);
#pragma unroll
    for (int i = 0; i < 9; ++i) raw[i] = load16(entry + 64 * i, aligned);
    scale[0] = __ldg(scales), scale[1] = __ldg(scales + 1);
  }
  // put(column, 8 bfloat16 values) for each of the lane's columns, a multiple of 8.
  template <typename Put>
  __device__ __forceinline__ void decode(int q, Put put) const {
#pragma unroll
    for (int i = 0; i < 7; ++i) {
      uint32_t byte = (scale[i >> 2] >> (8 * (i & 3))) & 255u;
      uint2 a = e4m3x4_to_bf16(raw[i].x, byte), b = e4m3x4_to_bf16(raw[i].y, byte);
      uint2 c = e4m3x4_to_bf16(raw[i].z, byte), d = e4m3x4_to_bf16(raw[i].w, byte);
      put(16 * (q + 4 * i), make_uint4(a.x, a.y, b.x, b.y));
      put(16 * (q + 4 * i) + 8, make_uint4(c.x, c.y, d.x, d.y));
    }
    put(kNope + 8 * q, raw[7]);
    put(kNope + 32 + 8 * q, raw[8]);
  }
};

// Entry `offset` of the page at `page` in any format, decoded by the 4 lanes of a quad.
template <typename Put>
__device__ __forceinline__ void decode_entry(const Pages& p, const uint8_t* page, int offset, int q,
                                             bool aligned, Put put) {
  if (p.format == kFp8) {
    Fp8Quarter quarter;
    quarter.load(p, page, offset, q, aligned);
    quarter.decode(q, put);
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

// Row g + 8 i of a 64 x 256 accumulator, as bfloat16, in 16-byte stores: d[4 j + 2 i ..] are columns
// 8 j + 2 t and the next. `to` null: nothing is stored.
__device__ __forceinline__ void store_output(const float (&d)[128], float factor, int i,
                                             __nv_bfloat16* to) {
  int t = threadIdx.x & 3;
#pragma unroll
  for (int j = 0; j < 32; j += 4) {
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
