// What both kernels of hc_pre, hc_head and hc_post_pre compute with: the weight's fragments, the mix of a
// unit; in hc_factors.cuh the rest. The two kernels give the same bits because these are the same.
#pragma once
#include "../../quant_rows/cuda/scale_columns.cuh"
#include "hopper.cuh"

namespace causeway {
namespace hc {

constexpr int kStreams = 4;
constexpr int kSlab = 256;   // columns of each stream
constexpr int kLeastSlabs = 16, kMostSlabs = 28;
constexpr int kUnits = 16;   // of a slab: 64 columns of a stream each, whose products one warp chains
constexpr int kSteps = 4;    // products of 16 columns in a unit
constexpr int kSquares = 24;
constexpr int kRecord = 28;  // sums of a token: 4 pre, 4 post, 16 comb, squares, padding

enum class Mode { kPre, kHead, kPostPre };

struct Arguments {
  const __nv_bfloat16* x;
  const __nv_bfloat16* a;  // see a_is_float
  const float* post_in;
  const float* comb_in;
  const float* fn;
  const float* scale;
  const float* base;
  const void* norm_weight;  // of the RMSNorm behind, or null: then `out` is the collapsed row
  __nv_bfloat16* streams;
  __nv_bfloat16* out;
  float* post;
  float* comb;
  float* ring;
  unsigned* flags;
  uint8_t* codes;  // FP8 form of the normed row, one scale byte for 128 columns
  uint8_t* code_scale;
  ScaleColumns code_columns;  // many tokens: the same bytes by columns
  int64_t x_token, x_stream, a_token, code_row, code_scale_row, tokens;
  int dim, slabs, groups, blocks, iters, norm_is_float, few;  // blocks: that the ring has room for
  int a_is_float;  // few tokens: `a` holds float32, rounded as it is read
  float eps, norm_eps, rms_eps, inverse_dim;
};

__device__ __forceinline__ float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word) {
  return __uint_as_float(word & 0xffff0000u);
}

// Two values of a stream after hc_post: `old` holds the same columns of all streams.
__device__ __forceinline__ uint32_t mix_pair(float post, const float (&comb)[4], uint32_t a,
                                             const uint32_t (&old)[4]) {
  float low = post * low_half(a), high = post * high_half(a);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    low = fmaf(comb[j], low_half(old[j]), low);
    high = fmaf(comb[j], high_half(old[j]), high);
  }
  return pack_bf16(low, high);
}

// Two bf16 pairs that add up to a pair of f32, but for 2^-18 of it at most.
__device__ __forceinline__ void split(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack_bf16(x, y);
  low = pack_bf16(x - low_half(high), y - high_half(high));
}

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
      " {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 16 bytes; lane i brings the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// The f32 weights of a unit as they lie in memory: rows lane / 4 + 8 i; of a step's 16 columns a pair in
// each half.
struct RawWeight {
  float2 row[3][kSteps][2];
};

template <Mode kMode>
__device__ __forceinline__ void load_raw_step(RawWeight& raw, const Arguments& args, int slab, int unit,
                                              int lane, int step) {
  constexpr int kMixes = kMode == Mode::kHead ? kStreams : 24;
  const float* from = args.fn + (int64_t)(lane / 4) * kStreams * args.dim +
                      (int64_t)(unit / 4) * args.dim + slab * kSlab + unit % 4 * 64 + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* at = from + (int64_t)i * 8 * kStreams * args.dim + step * 16 + half * 8;
      raw.row[i][step][half] = lane / 4 + 8 * i < kMixes ? __ldg(reinterpret_cast<const float2*>(at))
                                                         : make_float2(0.0f, 0.0f);
    }
  }
}
// Fragments of one step: rows 0..15 in two parts; rows 16..23 as (high over low).
struct Step {
  uint32_t first[2][4];
  uint32_t second[4];
};

__device__ __forceinline__ void split_step(Step& weight, const RawWeight& raw, int step) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 v = raw.row[i][step][half];
      uint32_t high, low;
      split(v.x, v.y, high, low);
      if (i < 2) {
        weight.first[0][half * 2 + i] = high;
        weight.first[1][half * 2 + i] = low;
      } else {
        weight.second[half * 2] = high;
        weight.second[half * 2 + 1] = low;
      }
    }
  }
}

// Sums of eight tokens over a unit.
struct Sums {
  float first[4], second[4], square;
};

// One step: b0 and b1 are pairs of columns of token lane / 4.
template <Mode kMode>
__device__ __forceinline__ void mix_step(Sums& sums, const Step& weight, uint32_t b0, uint32_t b1) {
#pragma unroll
  for (int part = 1; part >= 0; --part) {
    const uint32_t* a = weight.first[part];
    mma(sums.first, a[0], a[1], a[2], a[3], b0, b1);
  }
  if constexpr (kMode != Mode::kHead) {
    const uint32_t* a = weight.second;
    mma(sums.second, a[0], a[1], a[2], a[3], b0, b1);
  }
#pragma unroll
  for (int word = 0; word < 2; ++word) {
    float low = low_half(word ? b1 : b0), high = high_half(word ? b1 : b0);
    sums.square = fmaf(low, low, sums.square);
    sums.square = fmaf(high, high, sums.square);
  }
}

// The same without what lanes and registers share: two mixes of rows 0..7, 8..15 and 16..23, the squares.
struct Added {
  float value[6], square;
};
__device__ __forceinline__ Added add_up(const Sums& s) {
  float square = s.square;
  square += __shfl_xor_sync(~0u, square, 1);
  square += __shfl_xor_sync(~0u, square, 2);
  return {{s.first[0], s.first[1], s.first[2], s.first[3], s.second[0] + s.second[2],
           s.second[1] + s.second[3]},
          square};
}

// The sums to `to` [8 tokens, kRecord].
__device__ __forceinline__ void store_sums(const Added& sums, float* to, int lane) {
  int row = lane / 4, quad = lane % 4;
  if (quad == 0) to[row * kRecord + kSquares] = sums.square;
  to += quad * 2 * kRecord + row;
#pragma unroll
  for (int i = 0; i < 6; ++i) to[i / 2 * 8 + i % 2 * kRecord] = sums.value[i];
}

}  // namespace hc
}  // namespace causeway
