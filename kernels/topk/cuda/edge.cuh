// The k-th best score from one histogram over a linear scale: few barriers where few scores share its bin.
#pragma once
#include "select.cuh"

namespace causeway {

constexpr int kOwnBins = 4;      // of a thread
constexpr int kShortList = 256;  // scores of one bin that are ranked by comparing each with all

template <int kThreads>
struct EdgeSmem {
  static constexpr int kBins = kOwnBins * kThreads;
  uint4 bins[kThreads];    // the largest scores in the last
  uint2 list[kShortList];  // scores of the bin at the edge: key and column
  uint2 last;              // of those, the last that is chosen
  uint32_t valid[32], low[32], high[32], sums[32];
  uint32_t bin, room, in_bin, listed;

  __device__ __forceinline__ void add(int bin) { atomicAdd(&reinterpret_cast<uint32_t*>(bins)[bin], 1u); }
};

// Bins of equal width from the lowest to the highest key; a larger score never lies in a smaller bin. NaN (no
// width, infinities): bin 0.
template <int kThreads>
struct Scale {
  float base, factor;
  __device__ __forceinline__ Scale(uint32_t low, uint32_t high)
      : base(key_to_float(low)), factor((float)EdgeSmem<kThreads>::kBins / (key_to_float(high) - base)) {}
  __device__ __forceinline__ int bin(float x) const {
    return min((int)((x - base) * factor), EdgeSmem<kThreads>::kBins - 1);
  }
};

__device__ __forceinline__ uint32_t sum_up_to(uint32_t value) {  // lanes up to this one
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    uint32_t other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

// The sum over the warps before this one, each with its own `sum` in lane 31; every thread gets the total. One
// barrier.
template <int kThreads>
__device__ __forceinline__ uint32_t warps_before(uint32_t sum, uint32_t (&sums)[32], uint32_t& total) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  uint32_t of_warp = lane < kThreads / 32 ? sums[lane] : 0;
  total = __reduce_add_sync(~0u, of_warp);
  return __reduce_add_sync(~0u, lane < warp ? of_warp : 0);
}

// Of the block: how many keys, the lowest and the highest. Empties the bins. One barrier, and it may start
// after one.
template <int kThreads>
__device__ __forceinline__ void gather_range(EdgeSmem<kThreads>& s, uint32_t& valid, uint32_t& low, uint32_t& high) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  s.bins[threadIdx.x] = make_uint4(0, 0, 0, 0);
  valid = __reduce_add_sync(~0u, valid);
  low = __reduce_min_sync(~0u, low);
  high = __reduce_max_sync(~0u, high);
  if (lane == 0) s.valid[warp] = valid, s.low[warp] = low, s.high[warp] = high;
  if (threadIdx.x == 0) s.listed = 0;
  __syncthreads();
  bool read = lane < kThreads / 32;
  valid = __reduce_add_sync(~0u, read ? s.valid[lane] : 0);
  low = __reduce_min_sync(~0u, read ? s.low[lane] : ~0u);
  high = __reduce_max_sync(~0u, read ? s.high[lane] : 0);
}

// The bin of the k-th best -> s.bin, how many of it are chosen -> s.room, of how many -> s.in_bin. own: counts of
// the thread's bins, the best first. Ends with a barrier.
template <int kThreads>
__device__ __forceinline__ void find_edge(EdgeSmem<kThreads>& s, const uint32_t (&own)[kOwnBins], uint32_t k) {
  uint32_t sum = own[0] + own[1] + own[2] + own[3], up_to = sum_up_to(sum), unused;
  uint32_t above = warps_before<kThreads>(up_to, s.sums, unused) + up_to - sum;
  if (above < k && k <= above + sum) {
#pragma unroll
    for (int j = 0; j < kOwnBins; ++j) {
      if (above < k && k <= above + own[j]) {
        s.bin = EdgeSmem<kThreads>::kBins - 1 - kOwnBins * threadIdx.x - j, s.room = k - above, s.in_bin = own[j];
      }
      above += own[j];
    }
  }
  __syncthreads();
}
template <int kThreads>
__device__ __forceinline__ void find_edge(EdgeSmem<kThreads>& s, uint32_t k) {
  uint4 x = s.bins[kThreads - 1 - threadIdx.x];
  const uint32_t own[kOwnBins] = {x.w, x.z, x.y, x.x};
  find_edge<kThreads>(s, own, k);
}

// Better, or as good and earlier.
__device__ __forceinline__ bool precedes(uint2 a, uint2 b) { return a.x > b.x || (a.x == b.x && a.y < b.y); }

// The list's entry that has room - 1 others before it -> s.last. It is kept in parts: listed_by(p) entries at the
// start of the p-th. Ends with a barrier.
template <int kThreads, int kParts, typename ListedBy>
__device__ __forceinline__ void rank_list(EdgeSmem<kThreads>& s, uint32_t room, ListedBy listed_by) {
  constexpr int kShare = kShortList / kParts;
  if (threadIdx.x < kShortList && threadIdx.x % kShare < listed_by(threadIdx.x / kShare)) {
    uint2 mine = s.list[threadIdx.x];
    uint32_t before = 0;
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
#pragma unroll 1
      for (uint32_t i = 0; i < listed_by(part); ++i) before += precedes(s.list[part * kShare + i], mine);
    }
    if (before == room - 1) s.last = mine;
  }
  __syncthreads();
}

// The last of the k best of the block's candidates (more than k), if few share its bin. visit(f) calls f(key,
// column) for this thread's; low and high are gathered.
template <int kThreads, typename Visit>
__device__ __forceinline__ bool select_by_edge(EdgeSmem<kThreads>& s, uint32_t low, uint32_t high, uint32_t k,
                                               Visit visit, uint2& last) {
  Scale<kThreads> scale(low, high);
  visit([&](uint32_t key, uint32_t) {
    if (key) s.add(scale.bin(key_to_float(key)));
  });
  __syncthreads();
  find_edge<kThreads>(s, k);
  if (s.in_bin > kShortList) return false;
  int edge = (int)s.bin;
  visit([&](uint32_t key, uint32_t column) {
    if (key && scale.bin(key_to_float(key)) == edge) s.list[atomicAdd(&s.listed, 1u)] = make_uint2(key, column);
  });
  __syncthreads();
  rank_list<kThreads, 1>(s, s.room, [&](int) { return s.listed; });
  last = s.last;
  return true;
}

}  // namespace causeway
