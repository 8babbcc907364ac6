// Query heads, KV latents and indexer heads of the same tokens, one launch: a warp per row of a head or
// latent, eight lanes per row of an indexer head. Blocks of the three kinds lie behind each other.
#include <algorithm>

#include "latents.cuh"
#include "launch.cuh"

namespace causeway {
namespace {

constexpr int kWarps = 4;

template <class T>
struct Rows {
  const T* in;
  T* out;
  int64_t stride, head_stride;  // of `in`; `out` is contiguous
  int heads;
};
template <class T>
struct Args {
  Rows<T> q, kv, index;
  const void* weight;
  const int64_t *positions, *slots;
  const float* inv_freq;
  Pages pages;
  float eps, index_scale;
  int64_t tokens;
  int64_t kv_blocks, index_blocks;       // blocks [0, kv_blocks) make latents, the next ones index heads
  int q_groups, index_groups;            // blocks per token
  int q_rounds, index_rounds;            // rows (index: four rows) of a warp
  bool weight_f32, weight_early, quantize;  // early: nobody writes the weight any more
};

__device__ __forceinline__ void make_table(float2* table, float position, const float* inv_freq,
                                           int lane) {
  table[lane] = cos_sin(__fmul_rn(position, inv_freq[lane]));
  __syncwarp();
}

template <int D, class T>
__device__ __forceinline__ void read_row(const T* row, float (&v)[Shape<D>::C][Shape<D>::E], int lane) {
#pragma unroll
  for (int c = 0; c < Shape<D>::C; ++c)
    load_values(row + (c * 32 + lane) * Shape<D>::E, v[c]);
}

// Factor of the official query norm: each step rounded to the rows' dtype.
template <int D, class T>
__device__ __forceinline__ float query_factor(const float (&v)[Shape<D>::C][Shape<D>::E], float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < Shape<D>::C; ++c)
#pragma unroll
    for (int e = 0; e < Shape<D>::E; ++e) sum += as_held<T>(__fmul_rn(v[c][e], v[c][e]));
  float mean = as_held<T>(sum_lanes<32>(sum) / D);
  return as_held<T>(rsqrtf(as_held<T>(__fadd_rn(mean, eps))));
}

template <int D, class T>
__device__ void query_heads(const Args<T>& a, int64_t block, float2* table, int warp, int lane) {
  using S = Shape<D>;
  int64_t token = block / a.q_groups;
  int first = ((int)(block - token * a.q_groups) * kWarps + warp) * a.q_rounds;
  if (first >= a.q.heads) return;
  int last = min(first + a.q_rounds, a.q.heads);
  const T* from = a.q.in + token * a.q.stride;
  T* to = a.q.out + token * a.q.heads * D;
  float v[S::C][S::E];
  read_row<D>(from + first * a.q.head_stride, v, lane);  // under way while angles are made
  make_table(table, (float)a.positions[token], a.inv_freq, lane);
  for (int head = first; head < last; ++head) {
    float next[S::C][S::E];
    read_row<D>(from + min(head + 1, last - 1) * a.q.head_stride, next, lane);
    float factor = query_factor<D, T>(v, a.eps);
#pragma unroll
    for (int c = 0; c < S::C; ++c) {
#pragma unroll
      for (int e = 0; e < S::E; ++e) v[c][e] = __fmul_rn(v[c][e], factor);
      hold<T>(v[c]);
      if (c == S::C - 1 && lane >= S::kTailLane)
        rotate(v[c], table + (lane - S::kTailLane) * (S::E / 2));
      store_values(to + (int64_t)head * D + (c * 32 + lane) * S::E, v[c]);
#pragma unroll
      for (int e = 0; e < S::E; ++e) v[c][e] = next[c][e];
    }
  }
}

// Rows of a warp lie as far apart as the warps that make rows: neighbours read neighbouring rows.
template <int D, class T>
__device__ void any_latents(const Args<T>& a, WeightTable<D>& weight, int64_t block, float2* table,
                            int warp, int lane) {
  using S = Shape<D>;
  int64_t step = a.kv_blocks * kWarps, token = block * kWarps + warp;
  if (!a.weight_early) weight.fill(a.weight, a.weight_f32);
  __syncthreads();
  if (token >= a.tokens) return;
  float v[S::C][S::E];
  float freq = a.inv_freq[lane];
  bool stores = a.pages.format != kNoPages;
  for (; token < a.tokens; token += step) {
    read_row<D>(a.kv.in + token * a.kv.stride, v, lane);
    int64_t slot = stores ? a.slots[token] : -1;
    Place at = place_of(a.pages, max(slot, (int64_t)0));
    __syncwarp();  // the last row's angles have been read
    table[lane] = cos_sin(__fmul_rn((float)a.positions[token], freq));
    __syncwarp();
    norm_row<D>(v, weight, a.eps, lane);
#pragma unroll
    for (int c = 0; c < S::C; ++c) {
      hold<T>(v[c]);
      bool tail = c == S::C - 1 && lane >= S::kTailLane;
      if (tail) {
        rotate(v[c], table + (lane - S::kTailLane) * (S::E / 2));
        hold<T>(v[c]);
      }
      int col = (c * 32 + lane) * S::E;
      finish_latent(v[c], col, D, tail, a.quantize, a.pages, at, slot >= 0);
      store_values(a.kv.out + token * D + col, v[c]);
    }
  }
}

// The same for bf16 rows that are rounded, and stored in wide fp8 pages or not at all.
template <int D, bool PAGES>
__device__ __forceinline__ void rounded_latents(const Args<__nv_bfloat16>& a, WeightTable<D>& weight,
                                                int64_t block, float2* table, int warp, int lane) {
  using S = Shape<D>;
  int64_t step = a.kv_blocks * kWarps, token = block * kWarps + warp;
  const __nv_bfloat16* from = a.kv.in + min(token, a.tokens - 1) * a.kv.stride;
  Words<D> row;
  row.read(from, lane);
  if (!a.weight_early) weight.fill(a.weight, a.weight_f32);
  __syncthreads();
  if (token >= a.tokens) return;
  float freq = a.inv_freq[lane], position = 0.0f;
  int64_t slot = -1;
  for (int turn = 0; token < a.tokens; token += step, ++turn) {
    if (turn % 32 == 0) {  // a lane holds the position and slot of one of the next 32 rows
      int64_t mine = min(token + lane * step, a.tokens - 1);
      position = (float)a.positions[mine];
      if (PAGES) slot = a.slots[mine];
    }
    Words<D> next;
    if (token + step < a.tokens) from += step * a.kv.stride;
    next.read(from, lane);
    float at = __shfl_sync(kAll, position, turn % 32);  // behind it the last row's table is free
    table[lane] = cos_sin(__fmul_rn(at, freq));
    __syncwarp();
    float v[S::C][S::E];
#pragma unroll
    for (int c = 0; c < S::C; ++c) row.unpack(c, v[c]);
    norm_row<D>(v, weight, a.eps, lane);
#pragma unroll
    for (int c = 0; c < S::C; ++c) row.pack(c, v[c]);
    if (lane >= S::kTailLane) {
      row.unpack(S::C - 1, v[S::C - 1]);
      rotate(v[S::C - 1], table + (lane - S::kTailLane) * (S::E / 2));
      row.pack(S::C - 1, v[S::C - 1]);
    }
    round_latent<D, PAGES>(row, a.pages, PAGES ? __shfl_sync(kAll, slot, turn % 32) : -1, lane);
    row.write(a.kv.out + token * D, lane);
    row = next;
  }
}

template <int D, class T>
__device__ void latents(const Args<T>& a, WeightTable<D>& weight, int64_t block, float2* table,
                        int warp, int lane) {
  if constexpr (sizeof(T) == 2) {
    if (a.quantize && a.pages.format == kFp8Latent && are_wide(a.pages))
      return rounded_latents<D, true>(a, weight, block, table, warp, lane);
    if (a.quantize && a.pages.format == kNoPages)
      return rounded_latents<D, false>(a, weight, block, table, warp, lane);
  }
  any_latents<D>(a, weight, block, table, warp, lane);
}

// Butterfly over the register bits of N values.
template <int N>
__device__ __forceinline__ void butterfly(float (&v)[N]) {
#pragma unroll
  for (int step = 1; step < N; step <<= 1)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!(i & step)) {
        float low = v[i], high = v[i | step];
        v[i] = low + high, v[i | step] = low - high;
      }
}

template <int C, class T>
__device__ __forceinline__ void read_fours(const T* row, float (&v)[C][8]) {
#pragma unroll
  for (int c = 0; c < C; ++c) load_values(row + c * 64, v[c]);
}

// Rows of D = 64 C columns: lane l of eight holds columns 8 l .. 8 l + 7 of each chunk of 64.
template <int D, class T>
__device__ void index_heads(const Args<T>& a, int64_t block, float2* table, int warp, int lane) {
  constexpr int C = D / 64;
  int64_t token = block / a.index_groups;
  int first = ((int)(block - token * a.index_groups) * kWarps + warp) * a.index_rounds * 4;
  if (first >= a.index.heads) return;
  int last = min(first + a.index_rounds * 4, a.index.heads);
  int part = lane & 7;
  const T* rows = a.index.in + token * a.index.stride + part * 8;
  float v[C][8];
  read_fours(rows + min(first + (lane >> 3), last - 1) * a.index.head_stride, v);
  make_table(table, (float)a.positions[token], a.inv_freq, lane);
  for (int row = first; row < last; row += 4) {
    int head = row + (lane >> 3);
    bool live = head < last;
    float next[C][8];
    read_fours(rows + min(head + 4, last - 1) * a.index.head_stride, next);
    rotate(v[C - 1], table + part * 4);
    hold<T>(v[C - 1]);
    if (a.quantize) {
#pragma unroll
      for (int c = 0; c < C; ++c) butterfly(v[c]);
      if constexpr (C == 2) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float low = v[0][e], high = v[1][e];
          v[0][e] = low + high, v[1][e] = low - high;
        }
      }
#pragma unroll
      for (int step = 1; step < 8; step <<= 1) {
        float sign = part & step ? -1.0f : 1.0f;
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
          for (int e = 0; e < 8; ++e)
            v[c][e] = fmaf(sign, v[c][e], __shfl_xor_sync(kAll, v[c][e], step));
      }
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int e = 0; e < 8; ++e) v[c][e] = __fmul_rn(v[c][e], a.index_scale);
        hold<T>(v[c]);
        int byte = fp4_byte(max_lanes<4>(largest_bits(v[c])));
#pragma unroll
        for (int e = 0; e < 8; ++e) v[c][e] = on_fp4_grid(v[c][e], byte);
      }
    }
    if (live) {
      T* to = a.index.out + (token * a.index.heads + head) * D + part * 8;
#pragma unroll
      for (int c = 0; c < C; ++c) store_values(to + c * 64, v[c]);
    }
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int e = 0; e < 8; ++e) v[c][e] = next[c][e];
  }
}

template <int D, int DI, class T>
__global__ void __launch_bounds__(32 * kWarps, 7) rows_kernel(const __grid_constant__ Args<T> a) {
  __shared__ float2 tables[kWarps][kPairs];
  __shared__ WeightTable<D> weight;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t block = blockIdx.x;
  if (block < a.kv_blocks && a.weight_early) weight.fill(a.weight, a.weight_f32);
  await_inputs();
  if (block < a.kv_blocks) return latents<D>(a, weight, block, tables[warp], warp, lane);
  block -= a.kv_blocks;
  if (block < a.index_blocks) return index_heads<DI>(a, block, tables[warp], warp, lane);
  query_heads<D>(a, block - a.index_blocks, tables[warp], warp, lane);
}

// Latents alone: fewer registers, so that a full step's rows are made in four turns of the machine.
constexpr int kLatentBlocks = 132 * 8;
template <int D, class T>
__global__ void __launch_bounds__(32 * kWarps, 8) latents_kernel(const __grid_constant__ Args<T> a) {
  __shared__ float2 tables[kWarps][kPairs];
  __shared__ WeightTable<D> weight;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (a.weight_early) weight.fill(a.weight, a.weight_f32);
  await_inputs();
  latents<D>(a, weight, blockIdx.x, tables[warp], warp, lane);
}

// Rows of a warp: one while the machine is not full, so that a step of few tokens is short.
int rounds_of(int64_t tokens, int units, int most) {
  int rounds = 1;
  while (rounds < most && tokens * units >= 2 * rounds * kWarps * 132 * 8) rounds *= 2;
  return rounds;
}

template <int D, int DI, class T>
int launch(Args<T> a, cudaStream_t stream) {
  a.q_rounds = rounds_of(a.tokens, a.q.heads, 4);
  a.q_groups = (a.q.heads + kWarps * a.q_rounds - 1) / (kWarps * a.q_rounds);
  int fours = (a.index.heads + 3) / 4;
  a.index_rounds = rounds_of(a.tokens, fours, 4);
  a.index_groups = (fours + kWarps * a.index_rounds - 1) / (kWarps * a.index_rounds);
  a.index_blocks = a.tokens * a.index_groups;
  int64_t others = a.index_blocks + a.tokens * a.q_groups;
  int64_t most = others ? 132 * 7 : kLatentBlocks;
  a.kv_blocks = a.kv.in ? std::min<int64_t>((a.tokens + kWarps - 1) / kWarps, most) : 0;
  if (others == 0)
    return EarlyLaunch{a.kv_blocks, 32 * kWarps, stream}.start(latents_kernel<D, T>, a);
  return EarlyLaunch{a.kv_blocks + others, 32 * kWarps, stream}.start(rows_kernel<D, DI, T>, a);
}

}  // namespace

// One description for all calls; null inputs with no heads are left out.
struct Call {
  const void *q, *kv, *index, *weight, *positions, *slots, *inv_freq;
  void *q_out, *kv_out, *index_out;
  int64_t q_stride, q_head_stride, kv_stride, index_stride, index_head_stride, tokens;
  Pages pages;
  float eps, index_scale;
  int q_heads, index_heads, dim, index_dim, is_f32, weight_f32, weight_early, quantize;
};

template <class T>
int run(const Call& c, cudaStream_t stream) {
  Args<T> a{};
  a.q = {(const T*)c.q, (T*)c.q_out, c.q_stride, c.q_head_stride, c.q_heads};
  a.kv = {(const T*)c.kv, (T*)c.kv_out, c.kv_stride, 0, 1};
  a.index = {(const T*)c.index, (T*)c.index_out, c.index_stride, c.index_head_stride, c.index_heads};
  a.weight = c.weight, a.weight_f32 = c.weight_f32, a.weight_early = c.weight_early;
  a.positions = (const int64_t*)c.positions, a.slots = (const int64_t*)c.slots;
  a.inv_freq = (const float*)c.inv_freq;
  a.pages = c.pages, a.eps = c.eps, a.index_scale = c.index_scale, a.tokens = c.tokens;
  a.quantize = c.quantize;
  if (c.dim == 512) return c.index_dim == 128 ? launch<512, 128>(a, stream) : launch<512, 64>(a, stream);
  return c.index_dim == 128 ? launch<128, 128>(a, stream) : launch<128, 64>(a, stream);
}

extern "C" int causeway_qkv_norm_rope(const Call* call, void* stream) {
  return call->is_f32 ? run<float>(*call, (cudaStream_t)stream)
                      : run<__nv_bfloat16>(*call, (cudaStream_t)stream);
}

}  // namespace causeway
