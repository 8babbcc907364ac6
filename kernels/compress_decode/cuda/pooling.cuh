// Gated pooling of rows and the end of an entry: norm, RoPE, rounding, pages. Shared by the decode step
// and by the chunk form, so that an entry has the same bits from both.
//
// A thread holds four neighbouring channels. Sums of squares run over 64 channels (16 lanes) first.
#pragma once
#include "../../qkv_norm_rope/cuda/latents.cuh"
#include "../../qkv_norm_rope/cuda/row_math.cuh"
#include "launch.cuh"

namespace causeway {

// What is done to the entries of one compressor.
struct Finish {
  const void* weight;
  const float* inv_freq;
  void* out;  // rows [E, D], or null
  Pages pages;
  float eps, index_scale;
  int weight_f32, quantize;
};

struct Quad {
  float u[4], g[4];
};

// Channels col .. col + 3 of series S of a row [u | g] with SERIES * D values each; a row that is not
// there has u = 0 and g = -inf.
template <int D, int SERIES>
__device__ __forceinline__ Quad load_quad(const float* row, int series, int col, bool there) {
  Quad q;
#pragma unroll
  for (int c = 0; c < 4; ++c) q.u[c] = 0.0f, q.g[c] = kNegInf;
  if (there) {
    load_values(row + series * D + col, q.u);
    load_values(row + (SERIES + series) * D + col, q.g);
  }
  return q;
}

__device__ __forceinline__ float gate(float g, float top) { return exp2_fast((g - top) * kLog2e); }
__device__ __forceinline__ float finite_top(float top) { return top == kNegInf ? 0.0f : top; }
// The weighted mean; `total` is zero (no row), or 1 at least.
__device__ __forceinline__ float mean_of(float sum, float total) {
  return __fdividef(sum, total == 0.0f ? 1.0f : total);
}

// Four channels of an entry from eight rows: four of the previous group, four of the own one.
// `value(j, u)` gives u of row j.
template <class Value>
__device__ __forceinline__ void pool8(const float (&g)[8][4], const Value& value, float (&x)[4]) {
  float top[4], total[4], sum[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    top[c] = g[0][c];
#pragma unroll
    for (int j = 1; j < 8; ++j) top[c] = fmaxf(top[c], g[j][c]);
    top[c] = finite_top(top[c]);
    total[c] = sum[c] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float u[4];
    value(j, u);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float w = gate(g[j][c], top[c]);
      total[c] += w;
      sum[c] = fmaf(w, u[c], sum[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) x[c] = mean_of(sum[c], total[c]);
}
__device__ __forceinline__ void pool8(const Quad (&q)[8], float (&x)[4]) {
  float g[8][4];
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) g[j][c] = q[j].g[c];
  pool8(
      g,
      [&](int j, float (&u)[4]) {
#pragma unroll
        for (int c = 0; c < 4; ++c) u[c] = q[j].u[c];
      },
      x);
}

// Sum of squares over the 16 lanes that hold 64 channels.
__device__ __forceinline__ float square_sum(const float (&x)[4]) {
  float sum = x[0] * x[0];
#pragma unroll
  for (int c = 1; c < 4; ++c) sum = fmaf(x[c], x[c], sum);
  return sum_lanes<16>(sum);
}

// What the end of an entry needs besides its values, for channels col .. col + 3: read early, so that no
// load is waited for after the pooling.
struct Ending {
  float weight[4], freq[2];
  float2 turn[2];  // (cos, sin) of the two rotary pairs
  bool tail;       // whether these channels rotate

  __device__ __forceinline__ void read_weight(const void* from, int f32) {
    if (f32) load_values((const float*)from, weight);
    else load_values((const __nv_bfloat16*)from, weight);
  }
  __device__ __forceinline__ void read(const Finish& f, int col, int dim) {
    tail = col >= dim - kRope;
    read_weight((const char*)f.weight + col * (f.weight_f32 ? 4 : 2), f.weight_f32);
    freq[0] = freq[1] = 0.0f;
    if (tail) {
      freq[0] = f.inv_freq[(col - (dim - kRope)) / 2];
      freq[1] = f.inv_freq[(col - (dim - kRope)) / 2 + 1];
    }
  }
  __device__ __forceinline__ void turn_at(int64_t position) {
    if (!tail) return;
    turn[0] = cos_sin(__fmul_rn((float)position, freq[0]));
    turn[1] = cos_sin(__fmul_rn((float)position, freq[1]));
  }
  // The same where a warp has all pairs: a lane makes the one of its number, whose frequency `own` is.
  __device__ __forceinline__ void turn_together(int64_t position, float own, int col, int dim) {
    float2 mine = cos_sin(__fmul_rn((float)position, own));
    int pair = max(col - (dim - kRope), 0) / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      turn[i].x = __shfl_sync(kAll, mine.x, pair + i);
      turn[i].y = __shfl_sync(kAll, mine.y, pair + i);
    }
  }
};

// Norm and RoPE of four channels whose row has `total` as its sum of squares.
template <class T>
__device__ __forceinline__ void norm_rope(float (&x)[4], float total, int dim, const Ending& end,
                                          float eps) {
  float factor = rsqrtf(total / (float)dim + eps);
#pragma unroll
  for (int c = 0; c < 4; ++c) x[c] = __fmul_rn(__fmul_rn(x[c], factor), end.weight[c]);
  hold<T>(x);
  if (end.tail) {
    rotate(x, end.turn);
    hold<T>(x);
  }
}

// The place of a slot; nothing stores where that is negative.
__device__ __forceinline__ Place place_in(const Pages& pages, int64_t slot) {
  if (pages.format == kNoPages) return {nullptr, 0};
  return quick_place_of(pages, max(slot, (int64_t)0));
}

// The end of a latent; all lanes of a warp call it, `live` ones write. `alone`: as `finish_latent` has it.
template <class T>
__device__ __forceinline__ void finish_main(float (&x)[4], float total, int col, int dim,
                                            const Ending& end, const Finish& f, const Place& at,
                                            bool stores, int64_t entry, bool live,
                                            bool alone = false) {
  norm_rope<T>(x, total, dim, end, f.eps);
  finish_latent(x, col, dim, end.tail, f.quantize, f.pages, at, live && stores, alone);
  if (live && f.out) store_values((T*)f.out + entry * dim + col, x);
}

// The end of an indexer key of D channels in the first D / 4 lanes of a warp; all its lanes call it.
template <int D, class T>
__device__ __forceinline__ void finish_index(float (&x)[4], const Ending& end, const Finish& f,
                                             int64_t slot, int64_t entry) {
  constexpr int kLanes = D / 4;
  int lane = threadIdx.x % 32, col = lane % kLanes * 4;
  bool live = lane < kLanes;
  float total = square_sum(x);
  if constexpr (D == 128) total += __shfl_xor_sync(kAll, total, 16);
  norm_rope<T>(x, total, D, end, f.eps);
  if (f.quantize) {
    float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll
    for (int step = 1; step < kLanes; step <<= 1) {
      float sign = lane & step ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = fmaf(sign, x[i], __shfl_xor_sync(kAll, x[i], step));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = as_held<T>(__fmul_rn(x[i], f.index_scale));
    int byte = fp4_byte(max_lanes<8>(largest_bits(x)));
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = on_fp4_grid(x[i], byte);
  }
  int byte = index_byte(max_lanes<kLanes>(largest_bits(x)));
  if (live && f.out) store_values((T*)f.out + entry * D + col, x);
  if (!live || f.pages.format == kNoPages || slot < 0) return;
  Place at = quick_place_of(f.pages, slot);
  unsigned char* start = at.page + (int64_t)at.offset * f.pages.payload;
  if (f.pages.format == kFp8Index) {
    uint32_t codes[1];
    encode(x, byte, codes);
    put_codes(start + col, codes);
    if (lane == 0)
      *reinterpret_cast<float*>(at.page + f.pages.scale_offset +
                                at.offset * f.pages.scale_bytes) = scale_value(byte);
  } else {
    put_plain(start, col, x, f.pages.format == kBf16Rows);
  }
}

// A main entry of D channels in D / 4 threads, 64 per half-warp; `sums` holds D / 64 floats.
template <int D, class T>
__device__ __forceinline__ void finish_main_block(float (&x)[4], const Ending& end, const Finish& f,
                                                  int64_t slot, int64_t entry, float* sums) {
  int col = threadIdx.x * 4;
  Place at = place_in(f.pages, slot);
  hold<T>(x);
  float part = square_sum(x);
  if (threadIdx.x % 16 == 0) sums[threadIdx.x / 16] = part;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < D / 64; ++i) total += sums[i];
  finish_main<T>(x, total, col, D, end, f, at, slot >= 0, entry, true);
}

}  // namespace causeway
