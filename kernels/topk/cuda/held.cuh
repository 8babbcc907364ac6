// Selection in a row whose scores stay in registers, of a block or of a cluster of blocks: one histogram over
// a linear scale, few barriers.
#pragma once
#include <cooperative_groups.h>

#include "edge.cuh"

namespace causeway {

constexpr int kMostBlocks = 8;  // of a cluster

template <int kThreads>
struct HeldSmem {
  EdgeSmem<kThreads> edge;  // every block of a cluster has its share of the list
  uint2 own_list[kShortList];
  uint32_t chosen[32], lows[kMostBlocks], highs[kMostBlocks], counts[2][kMostBlocks], listed_by[kMostBlocks];
};

// Column of score j of this thread: a warp has neighbouring ones, a lane four side by side.
template <int kEach>
__device__ __forceinline__ int held_column(int j) {
  return (int)(threadIdx.x >> 5) * 32 * kEach + (j >> 2) * 128 + (int)(threadIdx.x & 31) * 4 + (j & 3);
}

// This thread's scores among the row's first `end`; NaN behind them.
template <int kEach>
__device__ __forceinline__ void load_held(float (&v)[kEach], const float* __restrict__ row, int end) {
  bool aligned = ((uintptr_t)row & 15) == 0;
#pragma unroll
  for (int j = 0; j < kEach; j += 4) {
    int column = held_column<kEach>(j);
    if (aligned && column + 4 <= end) {
      float4 x = __ldcg(reinterpret_cast<const float4*>(row + column));
      v[j] = x.x, v[j + 1] = x.y, v[j + 2] = x.z, v[j + 3] = x.w;
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) v[j + i] = column + i < end ? __ldcg(row + column + i) : __int_as_float(0x7fffffff);
  }
}

// The k best of the scores that the block or cluster holds, ascending, -1 behind them. v: this thread's, n of
// the block's count; their columns start at `shift` in the row, `begin` in the cluster. False, and nothing
// written, where too many scores meet in one bin; the whole cluster agrees on that. A cluster has arrived at
// its barrier once.
template <int kCluster, int kThreads, int kEach>
__device__ __forceinline__ bool select_held(HeldSmem<kThreads>& s, int rank, const float (&v)[kEach], int n,
                                            int begin, int shift, int k, int32_t* __restrict__ out) {
  constexpr int kShare = kShortList / kCluster;
  int lane = threadIdx.x & 31;
  auto& e = s.edge;
  auto other = [&](int block) { return cooperative_groups::this_cluster().map_shared_rank(&s, block); };
  uint32_t low = ~0u, high = 0, chosen = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    uint32_t key = held_column<kEach>(j) < n ? ordered_key(v[j]) : 0;
    chosen |= (uint32_t)(key != 0) << j;
    low = key ? min(low, key) : low;
    high = max(high, key);
  }
  uint32_t valid = __popc(chosen);
  gather_range<kThreads>(e, valid, low, high);
  if constexpr (kCluster > 1) {
    cluster_wait();
    if (threadIdx.x < kCluster) {
      HeldSmem<kThreads>& to = *other(threadIdx.x);
      to.counts[0][rank] = valid, to.lows[rank] = low, to.highs[rank] = high;
    }
    cluster_arrive();
    cluster_wait();
    bool read = lane < kCluster;
    valid = __reduce_add_sync(~0u, read ? s.counts[0][lane] : 0);
    low = __reduce_min_sync(~0u, read ? s.lows[lane] : ~0u);
    high = __reduce_max_sync(~0u, read ? s.highs[lane] : 0);
  }
  if (valid > (uint32_t)k) {
    Scale<kThreads> scale(low, high);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (chosen >> j & 1) e.add(scale.bin(v[j]));
    }
    if constexpr (kCluster > 1) {
      uint32_t own[kOwnBins] = {};
      cluster_arrive();
      cluster_wait();
#pragma unroll
      for (int block = 0; block < kCluster; ++block) {
        uint4 x = other(block)->edge.bins[kThreads - 1 - threadIdx.x];
        own[0] += x.w, own[1] += x.z, own[2] += x.y, own[3] += x.x;
      }
      find_edge<kThreads>(e, own, k);
    } else {
      __syncthreads();
      find_edge<kThreads>(e, k);
    }
    int edge = (int)e.bin;
    uint32_t room = e.room, tied = 0;
    bool few = room < e.in_bin;  // of the scores in the bin at the edge only the best
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      int bin = scale.bin(v[j]);
      tied |= (uint32_t)(bin == edge) << j;
      if (bin < edge) chosen &= ~(1u << j);
    }
    tied &= chosen;
    if (few) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (!(tied >> j & 1)) continue;
        uint32_t at = atomicAdd(&e.listed, 1u);
        uint2 pair = make_uint2(ordered_key(v[j]), begin + held_column<kEach>(j));
        if (at < kShare) (kCluster > 1 ? s.own_list : e.list)[at] = pair;
      }
      __syncthreads();
      if constexpr (kCluster > 1) {
        uint32_t listed = min(e.listed, (uint32_t)kShare);
        for (uint32_t i = threadIdx.x; i < listed * kCluster; i += kThreads) {
          other(i % kCluster)->edge.list[rank * kShare + i / kCluster] = s.own_list[i / kCluster];
        }
        if (threadIdx.x < kCluster) other(threadIdx.x)->listed_by[rank] = e.listed;
        cluster_arrive();
        cluster_wait();
      }
      auto listed_by = [&](int block) { return kCluster > 1 ? s.listed_by[block] : e.listed; };
      bool fits = true;
#pragma unroll
      for (int block = 0; block < kCluster; ++block) fits &= listed_by(block) <= kShare;
      if (!fits) {
        if constexpr (kCluster > 1) cluster_arrive(), cluster_wait();
        return false;
      }
      rank_list<kThreads, kCluster>(e, room, listed_by);
      uint2 last = e.last;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        uint2 pair = make_uint2(ordered_key(v[j]), begin + held_column<kEach>(j));
        if ((tied >> j & 1) && precedes(last, pair)) chosen &= ~(1u << j);
      }
    }
  }
  // Where a lane's scores go: behind those of the warps before, of the fours before, of the lanes before.
  constexpr int kWords = (kEach + 15) / 16;  // counts of four fours in a word; a warp has 128 at most
  uint32_t lanes[kWords], totals[kWords], of_warp = 0, total;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    uint32_t packed = 0;
#pragma unroll
    for (int u = 0; u < 4; ++u) packed |= (uint32_t)__popc(chosen >> (16 * w + 4 * u) & 15) << (8 * u);
    uint32_t up_to = sum_up_to(packed);
    lanes[w] = up_to - packed;
    totals[w] = __shfl_sync(~0u, up_to, 31);
#pragma unroll
    for (int u = 0; u < 4; ++u) of_warp += totals[w] >> (8 * u) & 255;
  }
  uint32_t at = warps_before<kThreads>(of_warp, s.chosen, total);
  if constexpr (kCluster > 1) {
    if (threadIdx.x < kCluster) other(threadIdx.x)->counts[1][rank] = total;
    cluster_arrive();
    cluster_wait();
    uint32_t of_block = lane < kCluster ? s.counts[1][lane] : 0;
    total = __reduce_add_sync(~0u, of_block);
    at += __reduce_add_sync(~0u, lane < rank ? of_block : 0);
  }
#pragma unroll
  for (int u = 0; u < kEach / 4; ++u) {
    int32_t* to = out + at + (lanes[u / 4] >> (8 * (u % 4)) & 255);
#pragma unroll
    for (int j = 4 * u; j < 4 * u + 4; ++j) {
      if (chosen >> j & 1) *to++ = begin + held_column<kEach>(j) + shift;
    }
    at += totals[u / 4] >> (8 * (u % 4)) & 255;
  }
  if (rank == 0) {
    for (int i = (int)total + (int)threadIdx.x; i < k; i += kThreads) out[i] = -1;
  }
  return true;
}

}  // namespace causeway
