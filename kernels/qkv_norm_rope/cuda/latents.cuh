// Latents in bf16 with the official rounding, to rows and to fp8 pages: the case that is served, with
// as few instructions as it takes. Bits are those of `finish_latent`.
#pragma once
#include "row_math.cuh"

namespace causeway {

// A row of D columns in a warp: C chunks of E neighbouring columns per lane.
template <int D>
struct Shape {
  static constexpr int E = D >= 256 ? 8 : 4, C = D / (32 * E);
  static constexpr int kTailLane = 32 - kRope / E;  // first lane of the rotary columns, last chunk
};

// The same row as words of two bf16 values.
template <int D>
struct Words {
  using S = Shape<D>;
  static constexpr int kWords = S::E / 2;
  uint32_t w[S::C][kWords];

  __device__ __forceinline__ void read(const __nv_bfloat16* row, int lane) {
#pragma unroll
    for (int c = 0; c < S::C; ++c) {
      const __nv_bfloat16* at = row + (c * 32 + lane) * S::E;
      if constexpr (kWords == 4) *reinterpret_cast<uint4*>(w[c]) = *reinterpret_cast<const uint4*>(at);
      else *reinterpret_cast<uint2*>(w[c]) = *reinterpret_cast<const uint2*>(at);
    }
  }
  __device__ __forceinline__ void write(__nv_bfloat16* row, int lane) const {
#pragma unroll
    for (int c = 0; c < S::C; ++c) put(w[c], row + (c * 32 + lane) * S::E);
  }
  __device__ static __forceinline__ void put(const uint32_t (&words)[kWords], void* at) {
    if constexpr (kWords == 4)
      __stcg(reinterpret_cast<uint4*>(at), make_uint4(words[0], words[1], words[2], words[3]));
    else
      __stcg(reinterpret_cast<uint2*>(at), make_uint2(words[0], words[1]));
  }
  __device__ __forceinline__ void pack(int c, const float (&v)[S::E]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) w[c][i] = pack_bf16(v[2 * i], v[2 * i + 1]);
  }
  // Values over a scale, a power of two: exact in bf16.
  __device__ __forceinline__ void scaled(int c, int byte, float (&v)[S::E]) const {
    uint32_t half = byte == 255 ? 0x7fc0u : (uint32_t)(254 - byte) << 7;
    uint32_t inverse = half << 16 | half;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      __nv_bfloat162 x = __hmul2(reinterpret_cast<const __nv_bfloat162&>(w[c][i]),
                                 reinterpret_cast<const __nv_bfloat162&>(inverse));
      uint32_t bits = reinterpret_cast<const uint32_t&>(x);
      v[2 * i] = __uint_as_float(bits << 16);
      v[2 * i + 1] = __uint_as_float(bits & 0xffff0000u);
    }
  }
  __device__ __forceinline__ void unpack(int c, float (&v)[S::E]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      v[2 * i] = __uint_as_float(w[c][i] << 16);
      v[2 * i + 1] = __uint_as_float(w[c][i] & 0xffff0000u);
    }
  }
};

// The norm's weight, a lane's values of a chunk in fours.
template <int D>
struct WeightTable {
  using S = Shape<D>;
  float4 fours[S::C * S::E / 4][32];

  // All threads of the block, and a barrier behind it.
  __device__ __forceinline__ void fill(const void* weight, bool is_f32) {
    for (int col = threadIdx.x * 4; col < D; col += blockDim.x * 4) {
      float v[4];
      if (is_f32) load_values((const float*)weight + col, v);
      else load_values((const __nv_bfloat16*)weight + col, v);
      int four = col / (32 * S::E) * (S::E / 4) + col % S::E / 4;
      fours[four][col / S::E % 32] = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
  __device__ __forceinline__ void read(int c, int lane, float (&w)[S::E]) const {
#pragma unroll
    for (int i = 0; i < S::E; i += 4) {
      float4 x = fours[(c * S::E + i) / 4][lane];
      w[i] = x.x, w[i + 1] = x.y, w[i + 2] = x.z, w[i + 3] = x.w;
    }
  }
};

// RMSNorm of a warp's row.
template <int D>
__device__ __forceinline__ void norm_row(float (&v)[Shape<D>::C][Shape<D>::E],
                                         const WeightTable<D>& weight, float eps, int lane) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < Shape<D>::C; ++c)
#pragma unroll
    for (int e = 0; e < Shape<D>::E; ++e) sum = fmaf(v[c][e], v[c][e], sum);
  float factor = rsqrtf(sum_lanes<32>(sum) / D + eps);
#pragma unroll
  for (int c = 0; c < Shape<D>::C; ++c) {
    float w[Shape<D>::E];
    weight.read(c, lane, w);
#pragma unroll
    for (int e = 0; e < Shape<D>::E; ++e) v[c][e] = __fmul_rn(__fmul_rn(v[c][e], factor), w[e]);
  }
}

// Bits of the largest magnitude of each chunk's FP8 block, as float32.
template <int D>
__device__ __forceinline__ void block_peaks(const Words<D>& x, int (&peak)[Shape<D>::C]) {
  constexpr int C = Shape<D>::C, kWords = Words<D>::kWords, kLanes = kQuantBlock / Shape<D>::E;
  constexpr uint32_t kMagnitudes = 0x7fff7fffu;
  static_assert(C <= 2, "one 16-bit half for each chunk");
  uint32_t top[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    top[c] = x.w[c][0] & kMagnitudes;
#pragma unroll
    for (int i = 1; i < kWords; ++i) top[c] = __vmaxu2(top[c], x.w[c][i] & kMagnitudes);
  }
  uint32_t low = __byte_perm(top[0], top[C - 1], 0x5410);
  uint32_t both = __vmaxu2(low, __byte_perm(top[0], top[C - 1], 0x7632));
#pragma unroll
  for (int step = kLanes / 2; step; step >>= 1)
    both = __vmaxu2(both, __shfl_xor_sync(kAll, both, step));
  peak[0] = (int)(both << 16);
  if constexpr (C == 2) peak[1] = (int)(both & 0xffff0000u);
}

// Whether every entry of the pages starts at a multiple of 16 bytes.
__device__ __forceinline__ bool are_wide(const Pages& p) {
  uint64_t bits = reinterpret_cast<uintptr_t>(p.pool) | (uint64_t)p.stride | (uint64_t)p.payload;
  return (bits & 15) == 0;
}

// `place_of` without a division where a page holds a power of two.
__device__ __forceinline__ Place quick_place_of(const Pages& pages, int64_t slot) {
  if (pages.per_page & (pages.per_page - 1)) return place_of(pages, slot);
  int64_t page = slot >> (__ffs(pages.per_page) - 1);
  return {pages.pool + page * pages.stride, (int)slot & (pages.per_page - 1)};
}

// `row`: normed and rotated. Rounds it in place and stores its entry in wide pages at `slot`, where that
// is not negative.
template <int D, bool PAGES>
__device__ __forceinline__ void round_latent(Words<D>& row, const Pages& pages, int64_t slot,
                                             int lane) {
  using S = Shape<D>;
  constexpr int E = S::E, C = S::C, kLanes = kQuantBlock / E;
  int peak[C];
  block_peaks(row, peak);
  bool stores = PAGES && slot >= 0;
  unsigned char *payload = nullptr, *scales = nullptr;
  if (stores) {
    Place at = quick_place_of(pages, slot);
    payload = at.page + (int64_t)at.offset * pages.payload + lane * E;
    scales = at.page + pages.scale_offset + at.offset * pages.scale_bytes + lane / kLanes;
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    bool tail = c == C - 1 && lane >= S::kTailLane;
    int byte = fp8_byte(peak[c]);
    float v[E];
    uint32_t codes[E / 4];
    row.scaled(c, byte, v);
    encode_scaled(v, codes);
    decode(codes, byte, v);
    if (stores && !tail) {
      if (takes_half_scale(peak[c], byte)) encode(v, --byte, codes);
      unsigned char* to = payload + c * 32 * E;
      if constexpr (E == 8) *reinterpret_cast<uint2*>(to) = make_uint2(codes[0], codes[1]);
      else *reinterpret_cast<uint32_t*>(to) = codes[0];
      if (lane % kLanes == 0) scales[c * (32 / kLanes)] = (unsigned char)byte;
    }
    if (stores && tail)
      Words<D>::put(row.w[c], payload - lane * E + (D - kRope) + (lane - S::kTailLane) * 2 * E);
#pragma unroll
    for (int i = 0; i < E / 2; ++i) {
      uint32_t rounded = pack_bf16(v[2 * i], v[2 * i + 1]);
      row.w[c][i] = tail ? row.w[c][i] : rounded;
    }
  }
}

}  // namespace causeway
