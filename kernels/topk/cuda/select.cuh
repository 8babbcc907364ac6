// Block-wide selection in shared memory: ordered keys, radix select, prefix sums.
#pragma once
#include "hopper.cuh"

namespace causeway {

// Larger score, larger key; -0.0 equals 0.0; NaN and -inf give 0, which nothing else does.
__device__ __forceinline__ uint32_t ordered_key(float v) {
  if (!(v > kNegInf)) return 0;
  uint32_t bits = __float_as_uint(v == 0.0f ? 0.0f : v);
  return (bits >> 31) ? ~bits : bits | 0x80000000u;
}

// Largest float whose key is at most `key` (a lower bound for the selection), at least -FLT_MAX.
__device__ __forceinline__ float key_to_float(uint32_t key) {
  if (key < 0x00800000u) return -3.402823466e38f;
  return __uint_as_float((key >> 31) ? key & 0x7fffffffu : ~key);
}

struct SelectScratch {
  uint32_t histogram[256];
  uint32_t warp_sums[32];
  uint32_t digit, remaining, in_digit;
};

// Exclusive prefix sum over the block; every thread gets the total.
template <int kThreads>
__device__ __forceinline__ uint32_t block_scan(uint32_t value, SelectScratch& s, uint32_t& total) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint32_t sum = value;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    uint32_t other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  __syncthreads();  // the previous use of warp_sums is over
  if (lane == 31) s.warp_sums[warp] = sum;
  __syncthreads();
  uint32_t before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    uint32_t x = s.warp_sums[w];
    before += w < warp ? x : 0;
    total += x;
  }
  return before + sum - value;
}

// After a histogram: the digit that holds the `remaining`-th largest, counted from the top.
__device__ __forceinline__ void pick_digit(SelectScratch& s, uint32_t remaining) {
  if (threadIdx.x < 32) {
    int lane = threadIdx.x;
    uint32_t bins[8], own = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) own += bins[j] = s.histogram[255 - 8 * lane - j];
    uint32_t sum = own;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      uint32_t other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    uint32_t before = sum - own;
    if (before < remaining && remaining <= sum) {
      int chosen = 0;
      uint32_t above = before, count = 0;
      bool found = false;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (!found && above + bins[j] >= remaining) {
          found = true;
          chosen = 255 - 8 * lane - j;
          count = bins[j];
        }
        if (!found) above += bins[j];
      }
      s.digit = chosen;
      s.in_digit = count;
      s.remaining = remaining - above;
    }
  }
}

template <typename Key>
struct Threshold {
  Key key;         // accept every key above it
  uint32_t room;   // of those equal to it, accept this many
  uint32_t ties;   // how many are equal to it (>= room); room == ties: accept all
};

// The rank-th largest key (rank >= 1). visit(f) calls f(key) for all keys of this thread, at least
// `rank` of them nonzero in the block. May end early with a lower key when no tie must be cut, and
// does so when `last` > 0: then the bits below it count as zero.
template <int kThreads, typename Key, typename Visit>
__device__ Threshold<Key> radix_select(SelectScratch& s, uint32_t rank, Visit visit, int last = 0) {
  Key prefix = 0, mask = 0;
  uint32_t remaining = rank, count = 0;
  for (int shift = 8 * (int)sizeof(Key) - 8; shift >= last; shift -= 8) {
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += kThreads) s.histogram[i] = 0;
    __syncthreads();
    visit([&](Key key) {
      if (key != 0 && (key & mask) == prefix) {
        atomicAdd(&s.histogram[(uint32_t)(key >> shift) & 255u], 1u);
      }
    });
    __syncthreads();
    pick_digit(s, remaining);
    __syncthreads();
    prefix |= (Key)s.digit << shift;
    mask |= (Key)255 << shift;
    remaining = s.remaining;
    count = s.in_digit;
    if (count == remaining || (shift == last && last > 0)) return {prefix ? prefix - 1 : 0, 0, 0};
  }
  return {prefix, remaining, count};
}

}  // namespace causeway
