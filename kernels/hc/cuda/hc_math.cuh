// What both kernels of hc_pre, hc_head and hc_post_pre compute with: the weight's fragments, a warp's
// mix of 64 columns, the factors. The two kernels give the same bits because these are the same.
#pragma once
#include "hopper.cuh"

namespace causeway {
namespace hc {

constexpr int kTile = 16;  // tokens
constexpr int kStreams = 4;
constexpr int kSlab = 256;  // columns of each stream
constexpr int kWarps = 16;  // that share the 1024 values of a slab
constexpr int kSteps = 4;   // products of 16 columns that one warp chains
constexpr int kRecord = 28;  // sums of a token: 4 pre, squares, 4 post, 16 comb, padding
constexpr int kSums = kRecord * kTile;

enum class Mode { kPre, kHead, kPostPre };

struct Arguments {
  const __nv_bfloat16* x;
  const __nv_bfloat16* a;
  const float* post_in;
  const float* comb_in;
  const float* fn;
  const float* scale;
  const float* base;
  __nv_bfloat16* streams;
  __nv_bfloat16* out;
  float* post;
  float* comb;
  float* ring;
  unsigned* flags;  // [groups, ring], then the count of finished blocks; all zero between launches
  int64_t x_token, x_stream, a_token, tokens;
  int dim, slabs, groups, iters;
  float eps, norm_eps;
};

__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
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
  return pack(low, high);
}

// Three bf16 pairs that add up to a pair of f32.
__device__ __forceinline__ void split(float2 v, uint32_t& high, uint32_t& middle, uint32_t& low) {
  high = pack(v.x, v.y);
  float2 rest = {v.x - low_half(high), v.y - high_half(high)};
  middle = pack(rest.x, rest.y);
  low = pack(rest.x - low_half(middle), rest.y - high_half(middle));
}

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
      " {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Rows 0..15 of the weight in three parts; rows 16..23 as (high over middle) and (low over zeros).
struct Weight {
  uint32_t first[kSteps][3][4];
  uint32_t second[kSteps][6];
};

template <Mode kMode>
__device__ __forceinline__ void load_weight(Weight& weight, const Arguments& args, int slab, int warp,
                                            int lane) {
  constexpr int kMixes = kMode == Mode::kHead ? kStreams : 24;
  int row = lane / 4, stream = warp / 4;
  int64_t width = (int64_t)kStreams * args.dim;
  int64_t column = (int64_t)stream * args.dim + slab * kSlab + (warp % 4) * 64 + (lane % 4) * 2;
  auto pair = [&](int r, int64_t at) {
    return r < kMixes ? *reinterpret_cast<const float2*>(args.fn + r * width + at)
                      : make_float2(0.0f, 0.0f);
  };
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    int64_t at = column + step * 16;
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // fragment registers: (row, k), (row + 8, k), (row, k + 8), ..
      uint32_t high, middle, low;
      split(pair(row + (part % 2) * 8, at + (part / 2) * 8), high, middle, low);
      weight.first[step][0][part] = high;
      weight.first[step][1][part] = middle;
      weight.first[step][2][part] = low;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t high, middle, low;
      split(pair(row + 16, at + half * 8), high, middle, low);
      weight.second[step][half * 2] = high;
      weight.second[step][half * 2 + 1] = middle;
      weight.second[step][4 + half] = low;
    }
  }
}

// A warp's sums over its 64 columns for a tile of tokens, to `partial` [kTile, kRecord].
// fetch(half, step, b0, b1) gives the fragment of token 8 * half + lane / 4: the pairs of columns
// 16 * step + 2 * (lane % 4) and 8 further.
template <Mode kMode, typename Fetch>
__device__ __forceinline__ void mix(const Weight& weight, float* partial, int lane, Fetch fetch) {
  float first[2][4] = {}, second[2][4] = {}, square[2] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t b[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) fetch(half, step, b[half][0], b[half][1]);
#pragma unroll
    for (int part = 2; part >= 0; --part) {
      const uint32_t* a = weight.first[step][part];
#pragma unroll
      for (int half = 0; half < 2; ++half) mma(first[half], a[0], a[1], a[2], a[3], b[half][0], b[half][1]);
      if constexpr (kMode != Mode::kHead) {
        const uint32_t* other = weight.second[step];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (part == 2) mma(second[half], other[4], 0, other[5], 0, b[half][0], b[half][1]);
          if (part == 1) {
            mma(second[half], other[0], other[1], other[2], other[3], b[half][0], b[half][1]);
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        float low = low_half(b[half][word]), high = high_half(b[half][word]);
        square[half] = fmaf(low, low, square[half]);
        square[half] = fmaf(high, high, square[half]);
      }
    }
  }
  int group = lane / 4, quad = lane % 4;
  int rows[3] = {group < 4 ? group : group + 1, group + 9, group + 17};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    square[half] += __shfl_xor_sync(~0u, square[half], 1);
    square[half] += __shfl_xor_sync(~0u, square[half], 2);
    float* to = partial + (half * 8 + quad * 2) * kRecord;
    to[rows[0]] = first[half][0];
    to[rows[0] + kRecord] = first[half][1];
    to[rows[1]] = first[half][2];
    to[rows[1] + kRecord] = first[half][3];
    to[rows[2]] = second[half][0] + second[half][2];
    to[rows[2] + kRecord] = second[half][1] + second[half][3];
    if (quad == 0) partial[(half * 8 + group) * kRecord + 4] = square[half];
  }
}

// Argument of a factor's sigmoid (or of comb's softmax) from its mix; `row` counts the 24 mixes.
__device__ __forceinline__ float logit_of(const Arguments& args, float sum, float squares, int row) {
  float norm = rsqrtf(squares / (float)(kStreams * args.dim) + args.norm_eps);
  return fmaf(__fmul_rn(sum, norm), args.scale[row < 4 ? 0 : row < 8 ? 1 : 2], args.base[row]);
}

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// Reciprocals of four sums for the price of one: they lie between 1e-6 and 5, their product far from 0.
__device__ __forceinline__ void invert(const float (&sum)[4], float (&inverse)[4]) {
  float low = sum[0] * sum[1], high = sum[2] * sum[3];
  float both = __fdividef(1.0f, low * high);
  float of_low = both * high, of_high = both * low;
  inverse[0] = of_low * sum[1];
  inverse[1] = of_low * sum[0];
  inverse[2] = of_high * sum[3];
  inverse[3] = of_high * sum[2];
}

// Sum over four neighbouring lanes.
__device__ __forceinline__ float over_four(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// comb from its logits: row softmax plus eps, columns, then iters - 1 times rows and columns. Four lanes
// make one matrix, a column each; all lanes of the warp must call this.
__device__ __forceinline__ void finish_comb(const float* logits, float* comb, bool live, int iters,
                                            float eps) {
  int k = threadIdx.x % 4;
  float c[4], sum[4], inverse[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float v = live ? logits[j * 4 + k] : 0.0f;
    float top = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    c[j] = expf(v - top);
    sum[j] = over_four(c[j]);
  }
  invert(sum, inverse);
#pragma unroll
  for (int j = 0; j < 4; ++j) c[j] = fmaf(c[j], inverse[j], eps);
  for (int i = 0; i < iters; ++i) {
    if (i > 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] = over_four(c[j]) + eps;
      invert(sum, inverse);
#pragma unroll
      for (int j = 0; j < 4; ++j) c[j] *= inverse[j];
    }
    float column = __fdividef(1.0f, ((c[0] + c[1]) + (c[2] + c[3])) + eps);
#pragma unroll
    for (int j = 0; j < 4; ++j) c[j] *= column;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (live) comb[j * 4 + k] = c[j];
  }
}

// Eight columns of a collapsed row from those of the streams.
__device__ __forceinline__ uint4 collapse_columns(float4 factor, const uint4 (&x)[kStreams]) {
  float value[8] = {};
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    float f = (&factor.x)[s];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      value[2 * word] = fmaf(f, low_half((&x[s].x)[word]), value[2 * word]);
      value[2 * word + 1] = fmaf(f, high_half((&x[s].x)[word]), value[2 * word + 1]);
    }
  }
  return {pack(value[0], value[1]), pack(value[2], value[3]), pack(value[4], value[5]),
          pack(value[6], value[7])};
}

}  // namespace hc
}  // namespace causeway
