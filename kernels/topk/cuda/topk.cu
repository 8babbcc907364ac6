// topk_select and topk_merge: exact, deterministic selection. Contract: kernels/topk/api.py.
//
// A row that its threads can hold stays in registers (held.cuh). A longer one is read once. A sample of it gives
// a score that surely (checked, else the exact radix path runs) lies below the k-th best; what reaches it is a
// candidate and goes to shared memory, where a histogram (edge.cuh), or a radix select where many scores are
// nearly equal, finds the k best. A bitmap over the columns puts them in ascending order.
#include <cooperative_groups.h>

#include <type_traits>

#include "held.cuh"
#include "launch.cuh"
#include "row.cuh"

namespace cg = cooperative_groups;
namespace causeway {

constexpr int kMergeCandidates = 8192;
constexpr int kSolo = 8192;  // columns that one block of a cluster takes alone
constexpr int kFew = 8;      // columns of a thread in a short row; twice as many in a longer one

template <int kCluster, int kThreads, int kCapacity, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    topk_select_kernel(const float* __restrict__ scores, int64_t stride, int columns, int k,
                       const int64_t* __restrict__ row_start, const int64_t* __restrict__ row_end,
                       const int64_t* __restrict__ row_seq, int32_t* __restrict__ out) {
  await_inputs();
  extern __shared__ char raw[];
  using Smem = SelectSmem<kThreads, kCapacity>;
  Smem& s = *reinterpret_cast<Smem*>(raw);
  int64_t r = blockIdx.x / kCluster;
  int rank = blockIdx.x % kCluster;
  // Where a row starts at its first column, its values are on their way before its length is known.
  float early[kFew];
  if (!row_start && rank == 0) load_held(early, scores + r * stride, columns);
  int64_t origin = row_start ? row_start[r] : 0;
  int64_t begin = max(origin, (int64_t)0);
  int64_t end = row_end ? min(row_end[r], (int64_t)columns) : columns;
  if (row_seq && row_seq[r] < 0) end = begin;
  int n = (int)max(end - begin, (int64_t)0), shift = (int)(begin - origin);
  const float* row = scores + r * stride + begin;
  out += r * k;
  bool solo = kCluster == 1 || n <= kSolo;  // one block does it all: no wait for the others
  if (solo && rank > 0) return;
  auto& held = *reinterpret_cast<HeldSmem<kThreads>*>(raw);
  auto take = [&](auto each, auto cluster, int from, int count) {
    float values[decltype(each)::value];
    load_held(values, row + from, count);
    return select_held<decltype(cluster)::value, kThreads>(held, rank, values, count, from, shift, k, out);
  };
  using One = std::integral_constant<int, 1>;
  if (solo && n <= 2 * kFew * kThreads) {
    if (n <= kFew * kThreads) {
      if (row_start) load_held(early, row, n);
      if (select_held<1, kThreads>(held, 0, early, n, 0, shift, k, out)) return;
    } else if (take(std::integral_constant<int, 2 * kFew>{}, One{}, 0, n)) {
      return;
    }
    __syncthreads();
  }
  if constexpr (kCluster > 1) {
    int part = ((n + kCluster - 1) / kCluster + 3) & ~3, from = min(n, rank * part), own = min(n - from, part);
    if (!solo && part <= kFew * kThreads) {
      cluster_arrive();
      if (take(std::integral_constant<int, kFew>{}, std::integral_constant<int, kCluster>{}, from, own)) return;
      __syncthreads();
    }
  }

  // As few samples (in 128ths, 64ths, 32nds) as leave room for the candidates.
  int samples = 0, sample_rank = 0;
  bool sampled = false;
  for (int part = 128; part >= 32 && !sampled; part >>= 1) {
    samples = min(n / part, kMostSamples);
    float share = (float)samples / (float)max(n, 1), mean = k * share;
    sample_rank = (int)(mean + 6.0f * sqrtf(mean)) + 8;
    float most = sample_rank + 4.0f * sqrtf((float)sample_rank);  // in units of 1 / share candidates
    sampled = n > 2048 && n <= 32 * kBitmapWords && most < kCapacity * share && 2 * sample_rank < samples;
  }
  bool exact = !sampled && n > kCapacity;
  if (threadIdx.x == 0) s.count = 0, s.pushed = 0;
  for (int w = threadIdx.x; w < min((n + 31) >> 5, kBitmapWords); w += kThreads) s.bitmap[w] = 0;
  if constexpr (kCluster > 1) {
    if (!solo) cluster_arrive();
  }
  float bound = sampled ? sample_bound<kThreads>(s.edge, s.scratch, row, n, samples, sample_rank) : kLowest;
  __syncthreads();
  if (!exact) {
    int part = solo ? n : ((n + kCluster - 1) / kCluster + 3) & ~3;
    int from = min(n, rank * part);
    collect<kThreads>(s, row, from, min(n, from + part), bound);
  }
  __syncthreads();
  uint32_t own = s.count, count = own;
  if constexpr (kCluster > 1) {
    if (!solo) {  // the others put theirs behind each other at the far end of the first block's memory
      cluster_wait();
      Smem& first = *cg::this_cluster().map_shared_rank(&s, 0);
      if (rank > 0 && !exact) {
        if (threadIdx.x == 0) s.pushed = atomicAdd(&first.pushed, own);
        __syncthreads();
        uint32_t base = s.pushed;
        for (uint32_t i = threadIdx.x; i < min(own, (uint32_t)kCapacity) && base + i < kCapacity; i += kThreads) {
          first.found[kCapacity - 1 - base - i] = s.found[i];
        }
      }
      cluster_arrive();
      cluster_wait();
      if (rank > 0) return;
      count = own + *(volatile uint32_t*)&s.pushed;
    }
  }
  if (exact || count > kCapacity || (count < (uint32_t)k && bound > kLowest)) {
    select_exactly<kThreads>(s.scratch, row, n, shift, k, out);
    return;
  }
  auto at = [&](uint32_t i) { return kCluster == 1 || i < own ? i : kCapacity - 1 - (i - own); };
  Threshold<uint32_t> limit = {0, 0, 0};
  uint32_t low = ~0u, high = 0;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    uint32_t key = ordered_key(__uint_as_float(s.found[at(i)].x));
    s.found[at(i)].x = key;
    low = min(low, key);
    high = max(high, key);
  }
  if (count > (uint32_t)k) {
    uint32_t all = 0;
    uint2 last;
    gather_range<kThreads>(s.edge, all, low, high);
    auto each = [&](auto visit) {
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) visit(s.found[at(i)].x, s.found[at(i)].y);
    };
    if (select_by_edge<kThreads>(s.edge, low, high, k, each, last)) {
      emit_marked<kThreads>(s, (int)count, n, shift, k, out, at, [&](uint2 x) { return !precedes(last, x); });
      return;
    }
    limit = radix_select<kThreads, uint32_t>(s.scratch, k, low, high, [&](auto visit) {
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) visit(s.found[at(i)].x);
    });
  }
  __syncthreads();
  emit<kThreads>(s, limit, (int)count, n, shift, k, out, at);
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
    auto found = radix_select<kThreads, uint64_t>(s.scratch, k, 1, ~0ull, [&](auto visit) {
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
                  const int64_t* row_start, const int64_t* row_end, const int64_t* row_seq, int32_t* out,
                  cudaStream_t stream) {
  auto kernel = topk_select_kernel<kCluster, kThreads, kCapacity, kBlocks>;
  int words = columns / 32 + 1;
  int bytes = (int)sizeof(SelectSmem<kThreads, kCapacity>) + 4 * (words < kBitmapWords ? words : kBitmapWords);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  return EarlyLaunch{rows * kCluster, kThreads, stream, bytes, kCluster}.start(
      kernel, scores, stride, columns, k, row_start, row_end, row_seq, out);
}

}  // namespace causeway

// shape 0: many rows with few candidates; 1: fewer rows, more threads each; 2: a cluster for each.
extern "C" int causeway_topk_select(const float* scores, int64_t rows, int64_t stride, int columns, int k,
                                    const int64_t* row_start, const int64_t* row_end, const int64_t* row_seq,
                                    int32_t* out, int shape, cudaStream_t stream) {
  using namespace causeway;
  auto launch = shape == 0   ? launch_select<1, 256, 4096, 4>
                : shape == 1 ? launch_select<1, 512, 8192, 2>
                             : launch_select<8, 512, 8192, 2>;
  return launch(scores, rows, stride, columns, k, row_start, row_end, row_seq, out, stream);
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
