// Decode of at most 16 heads (one rank of several): a block works on 80 keys of a row, two blocks on a processor.
//
// Ten warps read eight keys each and decode them to bfloat16 in shared memory; eight multiply, two find the next item.
// Scores: warp w multiplies 40 keys with a quarter of the columns, whose queries it keeps in registers; the four sums
// are added where they become probabilities, two heads a warp. Values: warp w owns 64 columns of all keys.
#pragma once
#include "decode_merge.cuh"
#include "decode_plan.cuh"
#include "decode_read.cuh"
#include "hopper.cuh"
#include "pages.cuh"

namespace causeway {

constexpr int kNarrowWarps = kNarrowKeys / kGroupKeys;
constexpr int kNarrowMultiply = 8;  // of them
constexpr int kNarrowThreads = kNarrowWarps * 32;
constexpr int kNarrowSubtile = kNarrowKeys * 128;
constexpr int kScoreRow = 88;   // floats: rows g = 0..3 of a store, and heads h and h + 2, meet different banks
constexpr int kWeightRow = 88;  // bfloat16: an odd number of 16-byte columns

struct NarrowSmem {
  alignas(1024) uint8_t keys[kNarrowKeys * kDim * 2];
  float scores[4][kFewHeads][kScoreRow];  // of a quarter of the columns
  __nv_bfloat16 weights[kFewHeads][kWeightRow];
  float factor[kFewHeads];
  const uint8_t* entries[kNarrowKeys];  // to be copied
  KeyTable<kNarrowKeys> table;
  Item next;         // row -1: there is none
  uint64_t queries;  // barrier: they have arrived
};

__device__ __forceinline__ uint4 load_matrices(uint32_t smem) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(smem)
               : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_matrices_t(uint32_t smem) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(smem)
               : "memory");
  return v;
}
__device__ __forceinline__ void mma_m16n8k16(float* d, uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// The queries, in rows of kQueryRow bytes, take the place that the scores will have.
constexpr int kQueryRow = kDim * 2 + 16;  // an odd number of 16-byte columns

// Those of a quarter of the columns, as the products take them: a[s] are columns 16 s..+15.
// Head `head`, one thread each; those that do not exist stay what they are: nobody reads their results.
__device__ __forceinline__ void copy_narrow_queries(NarrowSmem& s, const DecodeArgs& a, int row, int head) {
  uint32_t bar = smem_address(&s.queries);
  if (head == 0) mbar_expect(bar, a.heads * kDim * 2);
  if (head >= a.heads) return;
  copy_bulk<kDim * 2>(smem_address(s.scores) + head * kQueryRow, a.q + row * a.q_row + head * a.q_head, bar);
}
__device__ __forceinline__ void load_narrow_queries(const NarrowSmem& s, uint4 (&a)[8], int quarter) {
  int lane = threadIdx.x & 31;
  uint32_t from = smem_address(s.scores) + (lane & 15) * kQueryRow + 256 * quarter + 16 * (lane >> 4);
#pragma unroll
  for (int k = 0; k < 8; ++k) a[k] = load_matrices(from + 32 * k);
}

// Scores of 40 keys over a quarter of the columns.
__device__ __forceinline__ void multiply_narrow_queries(NarrowSmem& s, const uint4 (&a)[8], int warp) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, quarter = warp & 3, first = 40 * (warp >> 2);
  uint32_t keys = smem_address(s.keys) + 2 * quarter * kNarrowSubtile;
  float z[5][4] = {};
#pragma unroll
  for (int c = 0; c < 4; ++c) {  // 32 columns: 16-byte columns 4 (c & 1)..+3 of a subtile
#pragma unroll
    for (int n = 0; n < 5; ++n) {
      uint4 b = load_matrices(keys + (c >> 1) * kNarrowSubtile +
                              swizzled(first + 8 * n + (lane & 7), 4 * (c & 1) + (lane >> 3)));
      mma_m16n8k16(z[n], a[2 * c], b.x, b.y);
      mma_m16n8k16(z[n], a[2 * c + 1], b.z, b.w);
    }
  }
#pragma unroll
  for (int n = 0; n < 5; ++n) {
    float* to = &s.scores[quarter][g][first + 8 * n + 2 * t];
    *reinterpret_cast<float2*>(to) = make_float2(z[n][0], z[n][1]);
    *reinterpret_cast<float2*>(to + 8 * kScoreRow) = make_float2(z[n][2], z[n][3]);
  }
}

// Probabilities of two heads a warp, half a warp each, and what becomes of the chunk's maximum and sum.
__device__ __forceinline__ void weigh_narrow(NarrowSmem& s, const DecodeArgs& a, const Item& it, int warp) {
  int lane = threadIdx.x & 31, l = lane & 15, head = (warp & 1) + 4 * (warp >> 1) + 2 * (lane >> 4);
  float factor = a.scale * kLog2e, x[5], top = kNegInf, total = 0.0f;
#pragma unroll
  for (int j = 0; j < 5; ++j) {
    int key = l + 16 * j;
    float z = (s.scores[0][head][key] + s.scores[1][head][key]) + (s.scores[2][head][key] + s.scores[3][head][key]);
    x[j] = s.table.exists[key / kGroupKeys] >> (key % kGroupKeys) & 1 ? z : kNegInf;
    top = fmaxf(top, x[j]);
  }
#pragma unroll
  for (int step = 1; step < 16; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  top *= factor;
  float shift = top == kNegInf ? 0.0f : top;
#pragma unroll
  for (int j = 0; j < 5; ++j) {
    float p = exp2_fast(fmaf(x[j], factor, -shift));
    total += p;
    s.weights[head][l + 16 * j] = __float2bfloat16(p);
  }
#pragma unroll
  for (int step = 1; step < 16; step *= 2) total += __shfl_xor_sync(~0u, total, step);
  if (l != 0 || head >= a.heads) return;
  if (it.chunks == 1) {
    s.factor[head] = finish(a, it.row, head, top, total, sink_of(a, head), true);
  } else {
    a.stats[((int64_t)it.row * a.chunks + it.chunk) * a.tile_heads + head] = make_float2(top, total);
  }
}

// Columns 64 warp..+63 of all heads.
__device__ __forceinline__ void multiply_narrow_values(NarrowSmem& s, float (&acc)[32], int warp) {
  int lane = threadIdx.x & 31;
  uint32_t values = smem_address(s.keys) + warp * kNarrowSubtile;
  uint32_t weights = smem_address(s.weights) + (lane & 15) * kWeightRow * 2 + (lane >> 4) * 16;
#pragma unroll
  for (int i = 0; i < 32; ++i) acc[i] = 0.0f;
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    uint4 p = load_matrices(weights + 32 * k);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint4 b = load_matrices_t(values + swizzled(16 * k + (lane & 15), 2 * n + (lane >> 4)));
      mma_m16n8k16(acc + 8 * n, p, b.x, b.y);
      mma_m16n8k16(acc + 8 * n + 4, p, b.z, b.w);
    }
  }
}

// kPlain: pages other than fp8 ones at multiples of 16 bytes.
template <bool kPlain>
__global__ void __launch_bounds__(kNarrowThreads, 2) decode_narrow_kernel(const __grid_constant__ DecodeArgs a) {
  extern __shared__ __align__(1024) uint8_t smem[];
  NarrowSmem& s = *reinterpret_cast<NarrowSmem*>(smem);
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  uint32_t keys = smem_address(s.keys), parity = 0;
  bool lists = warp == 0 || warp == 5 || warp == 8;  // of four warps one; not all on the same quarter of the processor
  bool multiplies = warp < kNarrowMultiply;
  int own_key = warp / 4 * 32 + lane;  // of a thread that lists, if there are so many
  int listed = lists && own_key < kNarrowKeys ? own_key : -1;
  if (threadIdx.x == 0) {
    mbar_init(smem_address(&s.queries), 1);
    for (uint64_t& bar : s.table.listed) mbar_init(smem_address(&bar), 1);
    mbar_fence_init();
  }
  Walk<kNarrowKeys> walk;
  Item it = walk.item(a, blockIdx.x);
  if (lists) walk.warm(a, it, listed);
  __syncthreads();
  cudaGridDependencySynchronize();  // launched early: the inputs are there from here on
  cudaTriggerProgrammaticLaunchCompletion();

  // Sends for an item's keys and queries. Shared memory is free.
  auto send = [&](Place place) {
    auto copy = [&] {
      named_barrier(2 + warp / 4, 32 * min(4, kNarrowWarps - warp / 4 * 4));
      if constexpr (!kPlain) {
        send_group<kNarrowKeys>(s.entries, keys, warp);
      }
    };
    if (lists) {
      list_key<kPlain>(s.table, s.entries, a, place, own_key, it.chunk * kNarrowKeys + own_key, copy);
    } else {
      copy();
      if (warp == kNarrowWarps - 1 && lane < kFewHeads) copy_narrow_queries(s, a, it.row, lane);
    }
  };
  int64_t key = -1;
  if (lists) {
    if (!walk.find_existing(a, it, listed, key)) it.row = -1;
    if (threadIdx.x == 0) s.next = it;
  }
  __syncthreads();
  it = s.next;
  if (it.row >= 0) {
    Place place = {-1, 0};
    if (listed >= 0) place = locate_key(a, it, it.chunk * kNarrowKeys + own_key, key);
    send(place);
  }
  while (it.row >= 0) {
    if constexpr (kPlain) {
      read_group<kNarrowKeys>(s.table, a, keys, warp, it.chunk, parity);
    } else {
      decode_group<kNarrowKeys>(s.table, keys, warp, parity);
    }
    // What comes after the last product: the next item's copies, if there is one.
    auto go_on = [&] {
      fence_async_proxy();
      __syncthreads();  // nobody reads this item's keys any more
      it = s.next;
      if (it.row < 0) return;
      Place place = {-1, 0};
      if (listed >= 0) place = s.table.places[own_key];
      send(place);
    };
    if (!multiplies) {
      __syncthreads();
      find_next<kNarrowKeys, 32 * (kNarrowWarps - kNarrowMultiply), kPlain>(s.next, s.table.places, a, walk,
                                                                                  it.number + gridDim.x);
      go_on();
    } else {
      uint4 q[8];
      mbar_wait(smem_address(&s.queries), parity);
      load_narrow_queries(s, q, warp & 3);
      __syncthreads();
      multiply_narrow_queries(s, q, warp);
      named_barrier(1, 32 * kNarrowMultiply);
      weigh_narrow(s, a, it, warp);
      named_barrier(1, 32 * kNarrowMultiply);
      float acc[32];
      multiply_narrow_values(s, acc, warp);
      int line = lane >> 2;
      if (it.chunks == 1) {
        __nv_bfloat16* to = a.o + ((int64_t)it.row * a.heads + line) * kDim + 64 * warp;
        store_output(acc, s.factor[line], 0, line < a.heads ? to : nullptr);
        store_output(acc, s.factor[line + 8], 1, line + 8 < a.heads ? to + 8 * kDim : nullptr);
      } else {
        uint4* to = partial_of(a, it, 0, 2 * warp);
        if (line < a.heads) store_partial(acc, 0, to);
        if (line + 8 < a.heads) store_partial(acc, 1, to + kLineBlock);
      }
      go_on();
    }
    parity ^= 1;
  }
}

}  // namespace causeway
