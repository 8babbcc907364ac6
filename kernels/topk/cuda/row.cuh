// Selection in one row: a bound from a sample, candidates that reach it, the chosen ones in order.
#pragma once
#include "edge.cuh"

namespace causeway {

constexpr int kMostSamples = 4096;
constexpr int kBitmapWords = 8192;  // rows of up to 262144 columns
constexpr float kLowest = -3.402823466e38f;

template <int kThreads, int kCapacity>
struct SelectSmem {
  uint2 found[kCapacity];  // candidates: score (its bits, then its key) and column
  EdgeSmem<kThreads> edge;
  SelectScratch scratch;
  uint32_t count, pushed;
  uint32_t bitmap[1];  // as many words as the row needs
};

// Appends the columns of [begin, end) whose score reaches `bound` to the candidates, in any order.
template <int kThreads, int kCapacity>
__device__ void collect(SelectSmem<kThreads, kCapacity>& s, const float* __restrict__ row, int begin, int end, float bound) {
  int misaligned = (int)(((uintptr_t)(row + begin) >> 2) & 3);
  int body = min(end, begin + ((4 - misaligned) & 3));
  int body_end = body + ((end - body) & ~3);
  // Head and tail: fewer than 8 columns in all.
  int head = body - begin, tail = end - body_end, t = threadIdx.x;
  if (t < head + tail) {
    int column = t < head ? begin + t : body_end + t - head;
    float v = row[column];
    if (v >= bound) {
      uint32_t at = atomicAdd(&s.count, 1u);
      if (at < kCapacity) s.found[at] = make_uint2(__float_as_uint(v), column);
    }
  }
  auto look = [&](const float4 (&x)[4], int first) {
    float v[16];
#pragma unroll
    for (int u = 0; u < 4; ++u) v[4 * u] = x[u].x, v[4 * u + 1] = x[u].y, v[4 * u + 2] = x[u].z, v[4 * u + 3] = x[u].w;
    uint32_t own = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j) own += v[j] >= bound;
    if (own == 0) return;
    uint32_t at = atomicAdd(&s.count, own);
    if (at + own > kCapacity) return;  // too many: the exact path runs
    uint2* to = s.found + at;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (v[j] >= bound) *to++ = make_uint2(__float_as_uint(v[j]), first + (j >> 2) * kThreads * 4 + (j & 3));
    }
  };
  // Whole steps, two at a time: the loads of one run while the other is looked at.
  constexpr int kStep = kThreads * 16;
  int whole = (body_end - body) / kStep, first = body + t * 4;
  const float4* from = reinterpret_cast<const float4*>(row + first);
  auto fetch = [&](float4 (&x)[4]) {
#pragma unroll
    for (int u = 0; u < 4; ++u) x[u] = __ldcs(from + u * kThreads);
    from += kStep / 4;
  };
  float4 even[4], odd[4];
  if (whole > 0) fetch(even);
  for (int step = 0; step < whole; step += 2) {
    if (step + 1 < whole) fetch(odd);
    look(even, first);
    if (step + 1 >= whole) break;
    if (step + 2 < whole) fetch(even);
    look(odd, first + kStep);
    first += 2 * kStep;
  }
  first = body + t * 4 + whole * kStep;
  if (body + whole * kStep >= body_end) return;
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    int column = first + u * kThreads * 4;
    even[u] = make_float4(kNegInf, kNegInf, kNegInf, kNegInf);
    if (column < body_end) even[u] = __ldcs(reinterpret_cast<const float4*>(row + column));
  }
  look(even, first);
}

// visit(word, bits set in the block's words before it) for all words of the bitmap, 32 at a time in every
// warp; returns the bits in all. Words that a whole warp finds empty are left out.
template <int kThreads, typename Visit>
__device__ uint32_t walk_bitmap(const uint32_t* bitmap, int words, SelectScratch& s, Visit visit) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int per_warp = ((words + kThreads - 1) / kThreads) * 32;
  int from = min(words, warp * per_warp), to = min(words, from + per_warp);
  uint32_t own = 0, total = 0, before = 0;
  for (int w = from + lane; w < to; w += 32) own += __popc(bitmap[w]);
  own = __reduce_add_sync(~0u, own);
  __syncthreads();
  if (lane == 0) s.warp_sums[warp] = own;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    before += w < warp ? s.warp_sums[w] : 0;
    total += s.warp_sums[w];
  }
  for (int first = from; first < to; first += 32) {
    uint32_t bits = first + lane < to ? bitmap[first + lane] : 0;
    if (!__any_sync(~0u, bits)) continue;
    uint32_t count = __popc(bits), sum = count;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      uint32_t other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    visit(first + lane, bits, before + sum - count);
    before += __shfl_sync(~0u, sum, 31);
  }
  return total;
}

// Writes the candidates that are chosen(key and column) or marked in the bitmap, ascending; -1 behind them. at(i)
// is where candidate i lies.
template <int kThreads, int kCapacity, typename At, typename Chosen>
__device__ void emit_marked(SelectSmem<kThreads, kCapacity>& s, int count, int n, int shift, int k,
                            int32_t* __restrict__ out, At at, Chosen chosen) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    uint2 x = s.found[at(i)];
    if (chosen(x)) atomicOr(&s.bitmap[x.y >> 5], 1u << (x.y & 31));
  }
  __syncthreads();
  uint32_t total =
      walk_bitmap<kThreads>(s.bitmap, (n + 31) >> 5, s.scratch, [&](int word, uint32_t bits, uint32_t before) {
        for (; bits; bits &= bits - 1) out[before++] = 32 * word + __ffs(bits) - 1 + shift;
      });
  for (int i = (int)total + threadIdx.x; i < k; i += kThreads) out[i] = -1;
}

// Writes the candidates that pass the threshold, ascending; -1 behind them. at(i) is where candidate i
// lies. The bitmap is empty.
template <int kThreads, int kCapacity, typename At>
__device__ void emit(SelectSmem<kThreads, kCapacity>& s, Threshold<uint32_t> limit, int count, int n, int shift, int k,
                     int32_t* __restrict__ out, At at) {
  int words = (n + 31) >> 5;
  auto mark = [&](int i) { atomicOr(&s.bitmap[s.found[i].y >> 5], 1u << (s.found[i].y & 31)); };
  if (limit.room < limit.ties) {  // only the first `room` of the equal ones
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (s.found[at(i)].x == limit.key) mark(at(i));
    }
    __syncthreads();
    walk_bitmap<kThreads>(s.bitmap, words, s.scratch, [&](int word, uint32_t bits, uint32_t before) {
      if (bits == 0) return;
      uint32_t kept = 0;
      for (; bits && before < limit.room; ++before) {
        kept |= bits & -bits;
        bits &= bits - 1;
      }
      s.bitmap[word] = kept;
    });
    __syncthreads();
  }
  bool with_ties = limit.room > 0 && limit.room == limit.ties;
  emit_marked<kThreads>(s, count, n, shift, k, out, at,
                        [&](uint2 x) { return x.x > limit.key || (with_ties && x.x == limit.key); });
}

// Any row, any k: radix select over global memory, then one ordered pass.
template <int kThreads>
__device__ void select_exactly(SelectScratch& s, const float* __restrict__ row, int n, int shift, int k,
                               int32_t* __restrict__ out) {
  uint32_t valid = 0, total, low = ~0u, high = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    uint32_t key = ordered_key(row[i]);
    valid += key != 0;
    low = key ? min(low, key) : low;
    high = max(high, key);
  }
  block_scan<kThreads>(valid, s, total);
  block_range<kThreads>(s, low, high);
  Threshold<uint32_t> limit = {0, 0, 0};
  if (total > (uint32_t)k) {
    limit = radix_select<kThreads, uint32_t>(s, k, low, high, [&](auto visit) {
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

// A lower bound that surely, yet not by much, lies below the k-th best: that of rank `rank` in a sample.
template <int kThreads>
__device__ float sample_bound(EdgeSmem<kThreads>& e, SelectScratch& s, const float* __restrict__ row, int n,
                              int samples, int rank) {
  constexpr int kEach = kMostSamples / kThreads;
  uint32_t keys[kEach], high = 0, low = ~0u, valid = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    int i = j * kThreads + (int)threadIdx.x;
    keys[j] = i < samples ? ordered_key(__ldg(row + (int64_t)i * n / samples)) : 0;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    high = max(high, keys[j]);
    low = keys[j] ? min(low, keys[j]) : low;
    valid += keys[j] != 0;
  }
  gather_range<kThreads>(e, valid, low, high);
  if (valid < (uint32_t)rank) return kLowest;
  Scale<kThreads> scale(low, high);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (keys[j]) e.add(scale.bin(key_to_float(keys[j])));
  }
  __syncthreads();
  find_edge<kThreads>(e, rank);
  if (e.in_bin <= (uint32_t)rank / 4 + 8) return scale.base + (float)e.bin / scale.factor;
  auto limit = radix_select<kThreads, uint32_t>(
      s, rank, low, high,
      [&](auto visit) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) visit(keys[j]);
      },
      8);
  return key_to_float(limit.key);
}

}  // namespace causeway
