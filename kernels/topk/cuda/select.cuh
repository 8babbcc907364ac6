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

__device__ __forceinline__ int bit_length(uint32_t x) { return 32 - __clz(x); }
__device__ __forceinline__ int bit_length(uint64_t x) { return 64 - __clzll(x); }

// The rank-th largest key (rank >= 1) among those in [low, high]. visit(f) calls f(key) for all keys of
// this thread (0 is no key); the block has at least `rank` in the range. Digits are those of key - low:
// a narrow range is done in few steps, and its keys do not meet in one counter. May end early with a
// lower key when no tie must be cut, and does so at bit `last` when that is > 0.
template <int kThreads, typename Key, typename Visit>
__device__ Threshold<Key> radix_select(SelectScratch& s, uint32_t rank, Key low, Key high, Visit visit,
                                       int last = 0) {
  Key prefix = 0;
  uint32_t remaining = rank, count = 0;
  int above = max(bit_length((Key)(high - low)), last + 1);  // bits from here on are settled
  while (above > last) {
    int shift = max(above - 8, last);
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += kThreads) s.histogram[i] = 0;
    __syncthreads();
    visit([&](Key key) {
      Key offset = key - low;
      bool settled = above >= 8 * (int)sizeof(Key) || (offset >> above) == (prefix >> above);
      if (key != 0 && key >= low && settled) {
        atomicAdd(&s.histogram[(uint32_t)(offset >> shift) & ((1u << (above - shift)) - 1)], 1u);
      }
    });
    __syncthreads();
    pick_digit(s, remaining);
    __syncthreads();
    prefix |= (Key)s.digit << shift;
    remaining = s.remaining;
    count = s.in_digit;
    above = shift;
    if (count == remaining || (shift == last && last > 0)) return {low + prefix - 1, 0, 0};
  }
  return {low + prefix, remaining, count};
}

// Smallest nonzero and largest of the block's keys, given each thread's own. A block without any key
// gets (~0, 0).
template <int kThreads>
__device__ __forceinline__ void block_range(SelectScratch& s, uint32_t& low, uint32_t& high) {
  low = __reduce_min_sync(~0u, low);
  high = __reduce_max_sync(~0u, high);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) s.histogram[threadIdx.x >> 5] = low, s.histogram[32 + (threadIdx.x >> 5)] = high;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    low = min(low, s.histogram[w]);
    high = max(high, s.histogram[32 + w]);
  }
}

}  // namespace causeway
