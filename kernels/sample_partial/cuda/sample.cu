// The best token of some columns of a row, and their log-sum-exp. Blocks take parts of a row; short rows,
// if they are few, have a cluster of blocks that merges them, others a launch behind.
//
// Most columns are only compared: an upper bound of their noise, from the high word of the hash, shows
// that they are worse than one of the block's first columns. The others get an estimate in float32, within
// a known error, and those that may be the block's best one the exact score (float64 logarithms): about
// one per block. Sums of exponentials are kept per unit of 2048 columns, so that they do not depend on how
// many units a block takes, which depends on the number of rows.
#include <algorithm>

#include "../../qkv_norm_rope/cuda/cluster.cuh"
#include "launch.cuh"

namespace causeway {

struct Sample {
  const float *logits, *temperature, *peak;
  const int64_t *seeds, *steps;
  float *score, *lse;
  int64_t* ids;
  float *unit_sums, *part_scores;  // [rows, units], [rows, units]
  int* part_columns;               // [rows, units]
  int64_t stride, offset;
  int rows, columns, wide;
  int units, per_block, parts;  // of a row; units of a block; blocks of a row
};

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kStride = kThreads * 4;    // columns between two reads of a thread
constexpr int kUnit = 2 * kStride;       // columns
constexpr int kMostUnits = 8;            // of a block
constexpr int kBlocksAtOnce = 132 * 4;
constexpr int kMergeWarps = 4;
constexpr int kClusterUnits = 16, kClusterRows = 64;  // the most of a row, and rows, that clusters merge
constexpr int kClusterBlocks = 132 * 2;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kNone = 0x7fffffff;
constexpr uint64_t kWeyl = 0x9E3779B97F4A7C15ull, kStep = 0xD1342543DE82EF95ull;
constexpr uint64_t kMul1 = 0xBF58476D1CE4E5B9ull, kMul2 = 0x94D049BB133111EBull;

__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * kMul1;
  x = (x ^ (x >> 27)) * kMul2;
  return x ^ (x >> 31);
}
// The high word of `mix`, but for its lowest bit.
__device__ __forceinline__ uint32_t mix_high(uint64_t x) {
  x = (x ^ (x >> 30)) * kMul1;
  x = (x ^ (x >> 27)) * kMul2;
  return (uint32_t)(x >> 32);
}
// 1 and a lower bound of 1 - u, from a hash's high word: the noise -log(-log(u)) is at most -log(1 - u).
__device__ __forceinline__ float one_and_rest(uint32_t high) {
  return __uint_as_float(~high >> 9 | 0x3f800000u);
}

// -log(-log(u)), u = (hash / 2^12 + 0.5) / 2^52, to 2e-5: from whichever of u and 1 - u is small, so that
// neither end loses digits.
__device__ __forceinline__ float noise_estimate(uint64_t hash) {
  uint64_t bits = hash >> 12;
  bool low = bits < (1ull << 51);
  uint64_t small = low ? bits : (1ull << 52) - 1 - bits;
  float value = fmaf((float)(uint32_t)(small >> 20), 1048576.0f,
                     (float)((uint32_t)small & 0xfffffu) + 0.5f);
  float e = value * 0x1p-52f;
  float series = e * fmaf(e, fmaf(e, fmaf(e, fmaf(e, 0.2f, 0.25f), 1.0f / 3.0f), 0.5f), 1.0f);
  float direct = -__logf(low ? e : 1.0f - e);
  return -__logf(!low && e < 0.0625f ? series : direct);
}
__device__ __forceinline__ float noise_exact(uint64_t hash) {
  double u = ((double)(int64_t)(hash >> 12) + 0.5) * 0x1p-52;
  return (float)(-log(-log(u)));
}

struct Best {
  float score;
  int column;
};
__device__ __forceinline__ Best better(Best a, Best b) {
  return b.score > a.score || (b.score == a.score && b.column < a.column) ? b : a;
}

// Four columns of a row from `column` on; -inf beyond the last.
__device__ __forceinline__ float4 read_four(const float* row, int column, int columns, bool wide) {
  if (wide && column + 4 <= columns) return *reinterpret_cast<const float4*>(row + column);
  float v[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) v[c] = column + c < columns ? row[column + c] : kNegInf;
  return make_float4(v[0], v[1], v[2], v[3]);
}

struct Row {
  uint64_t key;
  float peak, temperature, inverse;
  int64_t offset;
  bool greedy;

  __device__ uint64_t counter(int column) const {
    return key + (uint64_t)(offset + column + 1) * kWeyl;
  }
  __device__ uint64_t hash(int column) const { return mix(counter(column)); }
  __device__ float estimate(float logit, uint64_t hash) const {
    return fmaf(logit - peak, inverse, noise_estimate(hash));
  }
  __device__ float exact(float logit, int column) const {
    if (greedy) return logit;
    return __fadd_rn(__fdiv_rn(__fsub_rn(logit, peak), temperature), noise_exact(hash(column)));
  }
};

// The least estimate that a column must have to be the best one, where another has `top`.
__device__ __forceinline__ float least_of(float top) { return top - (1.5e-4f + 1e-6f * fabsf(top)); }

// A thread's best two estimates.
struct Top {
  Best best{kNegInf, kNone};
  float second = kNegInf;

  __device__ __forceinline__ void add(float score, int column) {
    if (best.column == kNone || score > best.score) {
      second = best.score;
      best = {score, column};
    } else {
      second = fmaxf(second, score);
    }
  }
};

__device__ __forceinline__ float max_warp(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

__device__ __forceinline__ float max_block(float x, float* room) {
  x = max_warp(x);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  x = room[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = fmaxf(x, room[w]);
  return x;
}

__device__ __forceinline__ float sum_warp(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(kAll, x, step);
  return x;
}
__device__ __forceinline__ Best best_of_warp(Best best) {
#pragma unroll
  for (int step = 16; step; step >>= 1)
    best = better(best, {__shfl_xor_sync(kAll, best.score, step),
                         __shfl_xor_sync(kAll, best.column, step)});
  return best;
}

// One warp: the row's results from the sums of its units and the best of its parts.
__device__ __forceinline__ void merge_row(const Sample& a, int row, const float* sums, const float* scores,
                                          const int* columns, float peak) {
  const int lane = threadIdx.x % 32;
  Best best{kNegInf, kNone};
  float sum = 0.0f;
  for (int i = lane; i < a.units; i += 32) {
    sum += sums[i];
    if (i < a.parts) best = better(best, {scores[i], columns[i]});
  }
  best = best_of_warp(best), sum = sum_warp(sum);
  if (lane) return;
  a.score[row] = best.score;
  a.ids[row] = a.offset + (best.column == kNone ? 0 : best.column);  // NaN only: any token
  a.lse[row] = logf(sum) + peak;
}

// What the first block of a cluster receives.
struct Box {
  float sums[kClusterUnits], scores[kClusterUnits];
  int columns[kClusterUnits];
  uint64_t mail;
};

template <bool CLUSTER>
__global__ void __launch_bounds__(kThreads, 5) part_kernel(const __grid_constant__ Sample a) {
  __shared__ float first_top[kWarps], last_top[kWarps], warp_score[kWarps];
  __shared__ float warp_sum[kMostUnits][kWarps];
  __shared__ int warp_column[kWarps];
  const int row = blockIdx.x / a.parts, part = blockIdx.x % a.parts;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_unit = part * a.per_block, units = min(a.per_block, a.units - first_unit);
  const int start = first_unit * kUnit, end = min(start + units * kUnit, a.columns);
  __shared__ Box box;
  if (CLUSTER) {
    if (threadIdx.x == 0) {
      mail_open(&box.mail);
      if (part == 0) mail_expect(&box.mail, 4 * a.units + 8 * a.parts);
    }
    cluster_here();
  }
  switch (threadIdx.x) {
    case 0: ask_for(a.temperature + row); break;
    case 1: ask_for(a.peak + row); break;
    case 2: ask_for(a.seeds + row); break;
    case 3: ask_for(a.steps + row); break;
    default: break;
  }
  await_inputs();
  const float* logits = a.logits + row * a.stride;
  const int first = start + threadIdx.x * 4;
  float4 next = read_four(logits, first, end, a.wide);
  float warmth = a.temperature[row];
  Row r;
  r.greedy = !(warmth > 0.0f);
  r.temperature = fmaxf(warmth, 1e-30f), r.inverse = 1.0f / r.temperature;
  r.peak = a.peak[row], r.offset = a.offset;
  r.key = mix(mix((uint64_t)a.seeds[row] + kWeyl) ^ ((uint64_t)a.steps[row] * kStep));

  // exp2(scale * (logit - peak) + shift): a score without noise over the least one that still matters.
  const float scale = r.inverse * kLog2e;
  Top tops;
  float sum = 0.0f, shift = -kNegInf;
  uint64_t counter = r.counter(first);
  for (int at = start, turn = 0; at < end; at += kStride, ++turn) {
    const int column = at + threadIdx.x * 4;
    float v[4] = {next.x, next.y, next.z, next.w}, down[4];
    next = read_four(logits, column + kStride, end, a.wide);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      down[c] = v[c] - r.peak;
      sum += exp2_fast(down[c] * kLog2e);
    }
    if (turn % 2 || at + kStride >= end) {  // the unit's last columns
      sum = sum_warp(sum);
      if (lane == 0) warp_sum[turn / 2][warp] = sum;
      sum = 0.0f;
    }
    if (r.greedy) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (column + c < end) tops.add(v[c], column + c);
    } else {
      float rest[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) rest[c] = one_and_rest(mix_high(counter + c * kWeyl));
      if (at == start) {
        // The estimate of the column with the highest bound, one of a thread.
        float bound = kNegInf, from = kNegInf;
        int best = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float mine = fmaf(down[c], scale, -__log2f(fmaxf(rest[c] - 1.0f, 0x1p-24f)));
          if (mine > bound) bound = mine, best = c, from = v[c];
        }
        float top = max_block(r.estimate(from, mix(counter + best * kWeyl)), first_top);
        float least = least_of(top);
        shift = fmaf(-least, kLog2e, 1e-3f + 1e-6f * fabsf(least));
      }
      float over[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) over[c] = exp2_fast(fmaf(down[c], scale, shift)) - rest[c];
      if (fmaxf(fmaxf(over[0], over[1]), fmaxf(over[2], over[3])) >= -1.0f) {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (over[c] >= -1.0f && column + c < end)
            tops.add(r.estimate(v[c], mix(counter + c * kWeyl)), column + c);
      }
      counter += kStride * kWeyl;
    }
  }

  // Exact scores of the columns that may be the block's best one.
  const Best best = tops.best;
  const float top = max_block(best.score, last_top), least = r.greedy ? top : least_of(top);
  Best exact{kNegInf, best.column};
  if (best.column != kNone && !(best.score < least)) {
    exact.score = r.exact(logits[best.column], best.column);
    if (!r.greedy && tops.second >= least) {
      for (int column = first; column < end; column += kStride)
        for (int c = column; c < min(column + 4, end); ++c)
          if (r.estimate(logits[c], r.hash(c)) >= least)
            exact = better(exact, {r.exact(logits[c], c), c});
    }
  }
  exact = best_of_warp(exact);
  if (lane == 0) warp_score[warp] = exact.score, warp_column[warp] = exact.column;
  __syncthreads();
  if (CLUSTER) cluster_all_here();  // the first block's box is open
  if (threadIdx.x < units) {
    sum = warp_sum[threadIdx.x][0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += warp_sum[threadIdx.x][w];
    const int unit = first_unit + threadIdx.x;
    if (CLUSTER) mail_send(&box.sums[unit], &box.mail, 0, __float_as_uint(sum));
    else a.unit_sums[(int64_t)row * a.units + unit] = sum;
  }
  if (threadIdx.x == 32) {
    exact = {warp_score[0], warp_column[0]};
#pragma unroll
    for (int w = 1; w < kWarps; ++w) exact = better(exact, {warp_score[w], warp_column[w]});
    if (CLUSTER) {
      mail_send(&box.scores[part], &box.mail, 0, __float_as_uint(exact.score));
      mail_send(&box.columns[part], &box.mail, 0, (uint32_t)exact.column);
    } else {
      a.part_scores[(int64_t)row * a.units + part] = exact.score;
      a.part_columns[(int64_t)row * a.units + part] = exact.column;
    }
  }
  if (CLUSTER && part == 0 && warp == 2) {
    mail_wait(&box.mail, 0);
    merge_row(a, row, box.sums, box.scores, box.columns, r.peak);
  }
}

// A warp per row.
__global__ void __launch_bounds__(32 * kMergeWarps) merge_kernel(const __grid_constant__ Sample a) {
  const int row = blockIdx.x * kMergeWarps + threadIdx.x / 32;
  await_inputs();
  if (row >= a.rows) return;
  const int64_t first = (int64_t)row * a.units;
  merge_row(a, row, a.unit_sums + first, a.part_scores + first, a.part_columns + first, a.peak[row]);
}

}  // namespace

extern "C" int causeway_sample_partial(const Sample* call, void* stream_of) {
  const auto stream = (cudaStream_t)stream_of;
  Sample a = *call;
  const int64_t wanted = ((int64_t)a.rows * a.units + kBlocksAtOnce - 1) / kBlocksAtOnce;
  const bool short_rows = a.units <= kClusterUnits && a.rows <= kClusterRows;
  a.per_block = (int)std::min<int64_t>(std::max<int64_t>(wanted, 1), kMostUnits);
  if (short_rows) a.per_block = a.rows * a.units > kClusterBlocks ? 2 : 1;
  a.parts = (a.units + a.per_block - 1) / a.per_block;
  const int64_t blocks = (int64_t)a.rows * a.parts;
  if (short_rows && a.parts > 1) {
    static const cudaError_t allowed =
        cudaFuncSetAttribute(part_kernel<true>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (allowed != cudaSuccess) return (int)allowed;
    return EarlyLaunch{blocks, kThreads, stream, 0, a.parts}.start(part_kernel<true>, a);
  }
  const cudaError_t code = EarlyLaunch{blocks, kThreads, stream}.start(part_kernel<false>, a);
  if (code != cudaSuccess) return code;
  const int64_t merges = (a.rows + kMergeWarps - 1) / kMergeWarps;
  return EarlyLaunch{merges, 32 * kMergeWarps, stream}.start(merge_kernel, a);
}

}  // namespace causeway
