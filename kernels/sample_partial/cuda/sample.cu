// The best token of some columns of a row, and their log-sum-exp: a cluster of eight blocks per row.
//
// Scores are first estimated in float32, within a known error, and most columns not even that: an upper
// bound of the noise shows that they are worse than one of the block's first columns. Only the columns
// that may be the best one get the exact score (float64 logarithms): about one per row.
#include "../../qkv_norm_rope/cuda/cluster.cuh"

namespace causeway {

struct Sample {
  const float *logits, *temperature, *peak;
  const int64_t *seeds, *steps;
  float *score, *lse;
  int64_t* ids;
  int64_t stride, offset;
  int rows, columns, wide;
};

namespace {

constexpr int kBlocks = 8, kThreads = 256, kWarps = kThreads / 32;
constexpr int kStride = kBlocks * kThreads * 4;  // columns between two reads of a thread
constexpr unsigned kAll = 0xffffffffu;
constexpr int kNone = 0x7fffffff;
constexpr uint64_t kWeyl = 0x9E3779B97F4A7C15ull, kStep = 0xD1342543DE82EF95ull;
constexpr uint64_t kMul1 = 0xBF58476D1CE4E5B9ull, kMul2 = 0x94D049BB133111EBull;

__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * kMul1;
  x = (x ^ (x >> 27)) * kMul2;
  return x ^ (x >> 31);
}
// Upper bound of the noise of a hash: -log(-log(u)) <= -log(1 - u), and the high word bounds 1 - u from
// below; infinite where that is zero.
__device__ __forceinline__ float noise_bound(uint64_t hash) {
  return -__logf((float)~(uint32_t)(hash >> 32) * 0x1p-32f);
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

__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ Sample a) {
  __shared__ float tops[kBlocks], sums[kBlocks], scores[kBlocks], warp_top[kWarps], warp_sum[kWarps];
  __shared__ float warp_score[kWarps];  // not warp_top: another thread may still be reading that
  __shared__ int columns[kBlocks], warp_column[kWarps];
  __shared__ uint64_t estimates_mail, scores_mail;
  if (threadIdx.x == 0) {
    mail_open(&estimates_mail);
    mail_open(&scores_mail);
    mail_expect(&estimates_mail, 8 * kBlocks);
    mail_expect(&scores_mail, 8 * kBlocks);
  }
  cluster_here();
  int row = blockIdx.x / kBlocks, rank = blockIdx.x % kBlocks;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* logits = a.logits + row * a.stride;
  int first = (rank * kThreads + threadIdx.x) * 4;
  float4 next = read_four(logits, first, a.columns, a.wide);
  float warmth = a.temperature[row];
  Row r;
  r.greedy = !(warmth > 0.0f);
  r.temperature = fmaxf(warmth, 1e-30f), r.inverse = 1.0f / r.temperature;
  r.peak = a.peak[row], r.offset = a.offset;
  r.key = mix(mix((uint64_t)a.seeds[row] + kWeyl) ^ ((uint64_t)a.steps[row] * kStep));

  Top tops_here;
  float sum = 0.0f, least = kNegInf;
  uint64_t counter = r.counter(first);
  const int start = rank * kThreads * 4;  // the same for the block: its threads meet in the loop
  for (int at = start; at < a.columns; at += kStride) {
    int column = at + threadIdx.x * 4;
    float v[4] = {next.x, next.y, next.z, next.w};
    next = read_four(logits, column + kStride, a.columns, a.wide);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum += exp2_fast((v[c] - r.peak) * kLog2e);
    if (r.greedy) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (column + c < a.columns) tops_here.add(v[c], column + c);
    } else {
      uint64_t hash[4];
      bool passes = false;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        hash[c] = mix(counter + c * kWeyl);
        passes |= !(fmaf(v[c] - r.peak, r.inverse, noise_bound(hash[c])) < least);
      }
      if (passes) {
        float score[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) score[c] = r.estimate(v[c], hash[c]);
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (column + c < a.columns) tops_here.add(score[c], column + c);
      }
      counter += kStride * kWeyl;
      if (at == start) {
        float top = max_warp(tops_here.best.score);
        if (lane == 0) warp_top[warp] = top;
        __syncthreads();
        for (int w = 0; w < kWarps; ++w) top = fmaxf(top, warp_top[w]);
        least = least_of(top);
        __syncthreads();
      }
    }
  }
  Best best = tops_here.best;
  float second = tops_here.second;

  // The best estimate of the row, and the sum.
  float top = max_warp(best.score);
#pragma unroll
  for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(kAll, sum, step);
  if (lane == 0) warp_top[warp] = top, warp_sum[warp] = sum;
  __syncthreads();
  cluster_all_here();  // every mailbox is open
  if (threadIdx.x < kBlocks) {
    top = warp_top[0], sum = warp_sum[0];
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, warp_top[w]), sum += warp_sum[w];
    mail_send(&tops[rank], &estimates_mail, lane, __float_as_uint(top));
    mail_send(&sums[rank], &estimates_mail, lane, __float_as_uint(sum));
  }
  mail_wait(&estimates_mail, 0);
  top = tops[0];
  for (int b = 1; b < kBlocks; ++b) top = fmaxf(top, tops[b]);

  // Exact scores of the columns that may be the best.
  least = r.greedy ? top : least_of(top);
  Best exact{kNegInf, best.column};
  if (best.column != kNone && !(best.score < least)) {
    exact.score = r.exact(logits[best.column], best.column);
    if (!r.greedy && second >= least) {
      for (int column = first; column < a.columns; column += kStride)
        for (int c = column; c < min(column + 4, a.columns); ++c)
          if (r.estimate(logits[c], r.hash(c)) >= least) exact = better(exact, {r.exact(logits[c], c), c});
    }
  }
#pragma unroll
  for (int step = 16; step; step >>= 1)
    exact = better(exact, {__shfl_xor_sync(kAll, exact.score, step),
                           __shfl_xor_sync(kAll, exact.column, step)});
  if (lane == 0) warp_score[warp] = exact.score, warp_column[warp] = exact.column;
  __syncthreads();
  if (threadIdx.x < kBlocks) {
    for (int w = 0; w < kWarps; ++w) exact = better(exact, {warp_score[w], warp_column[w]});
    mail_send(&scores[rank], &scores_mail, lane, __float_as_uint(exact.score));
    mail_send(&columns[rank], &scores_mail, lane, (uint32_t)exact.column);
  }
  if (threadIdx.x == 0) {
    mail_wait(&scores_mail, 0);  // in every block: none may go while mail for it is under way
    if (rank) return;
    exact = {scores[0], columns[0]}, sum = sums[0];
    for (int b = 1; b < kBlocks; ++b) {
      exact = better(exact, {scores[b], columns[b]});
      sum += sums[b];
    }
    a.score[row] = exact.score;
    a.ids[row] = a.offset + (exact.column == kNone ? 0 : exact.column);  // NaN only: any token
    a.lse[row] = logf(sum) + r.peak;
  }
}

}  // namespace

extern "C" int causeway_sample_partial(const Sample* a, void* stream) {
  if (a->rows == 0) return 0;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((unsigned)a->rows * kBlocks);
  config.blockDim = dim3(kThreads);
  config.stream = (cudaStream_t)stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kBlocks, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaError_t code = cudaLaunchKernelEx(&config, sample_kernel, *a);
  return (int)(code == cudaSuccess ? cudaGetLastError() : code);
}

}  // namespace causeway
