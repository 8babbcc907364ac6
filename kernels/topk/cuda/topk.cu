// topk_select and topk_merge: exact, deterministic selection. Contract: kernels/topk/api.py.
//
// A row is read once. A sample of it gives a score that surely (checked, else the exact radix path
// runs) lies below the k-th best; what reaches it is a candidate and goes to shared memory, where a
// radix select finds the k best. A bitmap over the columns puts them in ascending order.
#include <cooperative_groups.h>

#include "select.cuh"

namespace cg = cooperative_groups;
namespace causeway {

constexpr int kMostSamples = 4096;
constexpr int kBitmapWords = 8192;  // rows of up to 262144 columns
constexpr int kMergeCandidates = 8192;
constexpr float kLowest = -3.402823466e38f;

template <int kCapacity>
struct SelectSmem {
  uint32_t keys[kCapacity];
  int32_t columns[kCapacity];
  SelectScratch scratch;
  uint32_t count;
  uint32_t bitmap[1];  // as many words as the row needs
};

// Appends the columns of [begin, end) whose score reaches `bound` to the candidates.
template <int kThreads, int kCapacity>
__device__ void collect(SelectSmem<kCapacity>& s, const float* __restrict__ row, int begin, int end, float bound) {
  int lane = threadIdx.x & 31;
  auto append = [&](const float (&v)[16], uint32_t hits, const int (&first)[4]) {
    uint32_t own = __popc(hits), sum = own;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      uint32_t other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    uint32_t base = 0;
    if (lane == 31) base = atomicAdd(&s.count, sum);
    uint32_t at = __shfl_sync(~0u, base, 31) + sum - own;
    if (hits == 0) return;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (hits >> j & 1) {
        if (at < kCapacity) {
          s.keys[at] = ordered_key(v[j]);
          s.columns[at] = first[j >> 2] + (j & 3);
        }
        ++at;
      }
    }
  };
  int misaligned = (int)(((uintptr_t)(row + begin) >> 2) & 3);
  int body = min(end, begin + ((4 - misaligned) & 3));
  int body_end = body + ((end - body) & ~3);
  // Head and tail: fewer than 8 columns in all, as one partial step.
  {
    float v[16];
    int first[4] = {0, 0, 0, 0};
    uint32_t hits = 0;
    int head = body - begin, tail = end - body_end, t = threadIdx.x;
    if (t < head + tail) {
      int column = t < head ? begin + t : body_end + t - head;
      v[0] = row[column];
      first[0] = column;
      hits = v[0] >= bound;
    }
    if (threadIdx.x < 32 && head + tail > 0) append(v, hits, first);
  }
  // All threads of a warp take the same number of steps.
  for (int start = body; start < body_end; start += kThreads * 16) {
    float v[16];
    int first[4];
    uint32_t hits = 0;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      first[u] = start + (u * kThreads + (int)threadIdx.x) * 4;
      float4 x = make_float4(kNegInf, kNegInf, kNegInf, kNegInf);
      if (first[u] < body_end) x = __ldcs(reinterpret_cast<const float4*>(row + first[u]));
      v[4 * u] = x.x, v[4 * u + 1] = x.y, v[4 * u + 2] = x.z, v[4 * u + 3] = x.w;
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) hits |= (uint32_t)(v[j] >= bound) << j;
    if (__any_sync(~0u, hits)) append(v, hits, first);
  }
}

// Writes the candidates that pass the threshold, ascending; -1 behind them.
template <int kThreads, int kCapacity>
__device__ void emit(SelectSmem<kCapacity>& s, Threshold<uint32_t> limit, int count, int n, int shift, int k,
                     int32_t* __restrict__ out) {
  int words = (n + 31) >> 5, per_thread = (words + kThreads - 1) / kThreads;
  int from = min(words, (int)threadIdx.x * per_thread), to = min(words, from + per_thread);
  for (int w = threadIdx.x; w < words; w += kThreads) s.bitmap[w] = 0;
  __syncthreads();
  if (limit.room < limit.ties) {  // only the first `room` of the equal ones
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (s.keys[i] == limit.key) atomicOr(&s.bitmap[s.columns[i] >> 5], 1u << (s.columns[i] & 31));
    }
    __syncthreads();
    uint32_t own = 0, total;
    for (int w = from; w < to; ++w) own += __popc(s.bitmap[w]);
    uint32_t before = block_scan<kThreads>(own, s.scratch, total);
    for (int w = from; w < to; ++w) {
      uint32_t bits = s.bitmap[w], kept = 0;
      for (; bits && before < limit.room; ++before) {
        kept |= bits & -bits;
        bits &= bits - 1;
      }
      s.bitmap[w] = kept;
    }
    __syncthreads();
  }
  bool with_ties = limit.room > 0 && limit.room == limit.ties;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    if (s.keys[i] > limit.key || (with_ties && s.keys[i] == limit.key)) {
      atomicOr(&s.bitmap[s.columns[i] >> 5], 1u << (s.columns[i] & 31));
    }
  }
  __syncthreads();
  uint32_t own = 0, total;
  for (int w = from; w < to; ++w) own += __popc(s.bitmap[w]);
  uint32_t at = block_scan<kThreads>(own, s.scratch, total);
  for (int w = from; w < to; ++w) {
    for (uint32_t bits = s.bitmap[w]; bits; bits &= bits - 1) {
      out[at++] = 32 * w + __ffs(bits) - 1 + shift;
    }
  }
  for (int i = (int)total + threadIdx.x; i < k; i += kThreads) out[i] = -1;
}

// Any row, any k: radix select over global memory, then one ordered pass.
template <int kThreads>
__device__ void select_exactly(SelectScratch& s, const float* __restrict__ row, int n, int shift, int k,
                               int32_t* __restrict__ out) {
  uint32_t valid = 0, total;
  for (int i = threadIdx.x; i < n; i += kThreads) valid += ordered_key(row[i]) != 0;
  block_scan<kThreads>(valid, s, total);
  Threshold<uint32_t> limit = {0, 0, 0};
  if (total > (uint32_t)k) {
    limit = radix_select<kThreads, uint32_t>(s, k, [&](auto visit) {
      for (int i = threadIdx.x; i < n; i += kThreads) visit(ordered_key(row[i]));
    });
  }
  uint32_t above_before = 0, ties_before = 0;
  for (int start = 0; start < n; start += kThreads * 8) {
    uint32_t above = 0, ties = 0, packed_total;
    int first = start + (int)threadIdx.x * 8;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t key = first + j < n ? ordered_key(row[first + j]) : 0;
      above |= (uint32_t)(key > limit.key) << j;
      ties |= (uint32_t)(limit.room > 0 && key == limit.key) << j;
    }
    uint32_t packed = block_scan<kThreads>((uint32_t)__popc(above) << 16 | __popc(ties), s, packed_total);
    uint32_t a = above_before + (packed >> 16), t = ties_before + (packed & 0xffff);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      bool tie = ties >> j & 1;
      if ((above >> j & 1) || (tie && t < limit.room)) out[a + min(t, limit.room)] = first + j + shift;
      a += above >> j & 1;
      t += tie;
    }
    above_before += packed_total >> 16;
    ties_before += packed_total & 0xffff;
  }
  for (int i = (int)(above_before + min(ties_before, limit.room)) + threadIdx.x; i < k; i += kThreads) {
    out[i] = -1;
  }
}

template <int kCluster, int kThreads, int kCapacity, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    topk_select_kernel(const float* __restrict__ scores, int64_t stride, int columns, int k,
                       const int64_t* __restrict__ row_start, const int64_t* __restrict__ row_end,
                       int32_t* __restrict__ out) {
  extern __shared__ char raw[];
  using Smem = SelectSmem<kCapacity>;
  Smem& s = *reinterpret_cast<Smem*>(raw);
  int64_t r = blockIdx.x / kCluster;
  int rank = blockIdx.x % kCluster;
  int64_t origin = row_start ? row_start[r] : 0;
  int64_t begin = max(origin, (int64_t)0);
  int64_t end = row_end ? min(row_end[r], (int64_t)columns) : columns;
  int n = (int)max(end - begin, (int64_t)0), shift = (int)(begin - origin);
  const float* row = scores + r * stride + begin;
  out += r * k;

  // Enough samples that the chosen rank surely, yet not by much, reaches below the k-th best.
  int samples = max(min(n / 32, kMostSamples), 1);
  float share = (float)samples / (float)max(n, 1), mean = k * share;
  int sample_rank = (int)(mean + 6.0f * sqrtf(mean)) + 8;
  float most = sample_rank + 4.0f * sqrtf((float)sample_rank);  // in units of 1 / share candidates
  bool sampled = n > 2048 && n <= 32 * kBitmapWords && most < kCapacity * share && sample_rank < samples;
  bool exact = !sampled && n > kCapacity;
  float bound = kLowest;
  if (threadIdx.x == 0) s.count = 0;
  if (sampled) {
    uint32_t valid = 0, total;
    for (int i = threadIdx.x; i < samples; i += kThreads) {
      uint32_t key = ordered_key(__ldg(row + (int64_t)i * n / samples));
      s.keys[i] = key;
      valid += key != 0;
    }
    block_scan<kThreads>(valid, s.scratch, total);
    if (total >= (uint32_t)sample_rank) {
      auto limit = radix_select<kThreads, uint32_t>(
          s.scratch, sample_rank,
          [&](auto visit) {
            for (int i = threadIdx.x; i < samples; i += kThreads) visit(s.keys[i]);
          },
          8);
      bound = key_to_float(limit.key);
    }
  }
  __syncthreads();
  if (!exact) {
    int part = ((n + kCluster - 1) / kCluster + 3) & ~3;
    int from = min(n, rank * part);
    collect<kThreads>(s, row, from, min(n, from + part), bound);
  }
  __syncthreads();
  uint32_t count = s.count;
  if constexpr (kCluster > 1) {
    auto cluster = cg::this_cluster();
    cluster.sync();
    if (rank == 0 && !exact) {
      for (int other = 1; other < kCluster; ++other) {
        Smem& remote = *cluster.map_shared_rank(&s, other);
        uint32_t theirs = *(volatile uint32_t*)&remote.count;
        if (count <= kCapacity && theirs <= kCapacity && count + theirs <= kCapacity) {
          for (uint32_t i = threadIdx.x; i < theirs; i += kThreads) {
            s.keys[count + i] = remote.keys[i];
            s.columns[count + i] = remote.columns[i];
          }
          count += theirs;
        } else {
          count = kCapacity + 1;
        }
      }
    }
    cluster.sync();
    if (rank != 0) return;
  }
  if (exact || count > kCapacity || (count < (uint32_t)k && bound > kLowest)) {
    select_exactly<kThreads>(s.scratch, row, n, shift, k, out);
    return;
  }
  Threshold<uint32_t> limit = {0, 0, 0};
  if (count > (uint32_t)k) {
    limit = radix_select<kThreads, uint32_t>(s.scratch, k, [&](auto visit) {
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) visit(s.keys[i]);
    });
  }
  __syncthreads();
  emit<kThreads>(s, limit, (int)count, n, shift, k, out);
}

struct MergeSmem {
  uint64_t keys[kMergeCandidates];
  int32_t chosen[kMergeCandidates];
  SelectScratch scratch;
  uint32_t count;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    topk_merge_kernel(const float* __restrict__ values, int64_t value_stride,
                      const int32_t* __restrict__ indices, int64_t index_stride, int columns, int k,
                      int32_t* __restrict__ out) {
  extern __shared__ char raw[];
  MergeSmem& s = *reinterpret_cast<MergeSmem*>(raw);
  int64_t r = blockIdx.x;
  values += r * value_stride;
  indices += r * index_stride;
  out += r * k;
  if (threadIdx.x == 0) s.count = 0;
  uint32_t valid = 0, total;
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    int32_t index = indices[i];
    uint32_t key = index >= 0 ? ordered_key(values[i]) : 0;
    // Equal scores: the smaller index makes the larger key.
    s.keys[i] = key ? (uint64_t)key << 32 | (0x7fffffffu - (uint32_t)index) : 0;
    valid += key != 0;
  }
  block_scan<kThreads>(valid, s.scratch, total);
  uint64_t limit = 0;
  if (total > (uint32_t)k) {
    auto found = radix_select<kThreads, uint64_t>(s.scratch, k, [&](auto visit) {
      for (int i = threadIdx.x; i < columns; i += kThreads) visit(s.keys[i]);
    });
    limit = found.ties ? found.key - 1 : found.key;  // all keys differ: one tie at most
  }
  __syncthreads();
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    uint64_t key = s.keys[i];
    if (key > limit) s.chosen[atomicAdd(&s.count, 1u)] = (int32_t)(0x7fffffffu - (uint32_t)key);
  }
  __syncthreads();
  int count = (int)s.count, size = 1;
  while (size < count) size <<= 1;
  for (int i = count + threadIdx.x; i < size; i += kThreads) s.chosen[i] = 0x7fffffff;
  for (int width = 2; width <= size; width <<= 1) {
    for (int step = width >> 1; step > 0; step >>= 1) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        int low = 2 * i - (i & (step - 1)), high = low + step;
        int32_t a = s.chosen[low], b = s.chosen[high];
        if ((a > b) == ((low & width) == 0)) s.chosen[low] = b, s.chosen[high] = a;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < k; i += kThreads) out[i] = i < count ? s.chosen[i] : -1;
}

template <int kCluster, int kThreads, int kCapacity, int kBlocks>
int launch_select(const float* scores, int64_t rows, int64_t stride, int columns, int k,
                  const int64_t* row_start, const int64_t* row_end, int32_t* out, cudaStream_t stream) {
  auto kernel = topk_select_kernel<kCluster, kThreads, kCapacity, kBlocks>;
  int words = columns / 32 + 1;
  int bytes = (int)sizeof(SelectSmem<kCapacity>) + 4 * (words < kBitmapWords ? words : kBitmapWords);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)(rows * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kCluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return (int)cudaLaunchKernelEx(&config, kernel, scores, stride, columns, k, row_start, row_end, out);
}

}  // namespace causeway

// shape 0: many rows with k up to 1024; 1: many rows, larger k; 2: few long rows, a cluster each.
extern "C" int causeway_topk_select(const float* scores, int64_t rows, int64_t stride, int columns, int k,
                                    const int64_t* row_start, const int64_t* row_end, int32_t* out, int shape,
                                    cudaStream_t stream) {
  using namespace causeway;
  auto launch = shape == 0   ? launch_select<1, 256, 4096, 4>
                : shape == 1 ? launch_select<1, 512, 8192, 2>
                             : launch_select<8, 512, 8192, 1>;
  return launch(scores, rows, stride, columns, k, row_start, row_end, out, stream);
}

extern "C" int causeway_topk_merge(const float* values, int64_t value_stride, const int32_t* indices,
                                   int64_t index_stride, int64_t rows, int columns, int k, int32_t* out,
                                   cudaStream_t stream) {
  using namespace causeway;
  auto kernel = topk_merge_kernel<512>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(MergeSmem));
  if (error != cudaSuccess) return (int)error;
  kernel<<<(unsigned)rows, 512, sizeof(MergeSmem), stream>>>(values, value_stride, indices, index_stride, columns,
                                                             k, out);
  return (int)cudaGetLastError();
}
