// Decode of at most 16 heads (one rank of several): a block works on 80 keys of a row, two blocks on a processor.
//
// Eight warps read ten keys each and decode them to bfloat16 in shared memory. Scores: warp w multiplies 40 keys
// with a quarter of the columns, whose queries it keeps in registers; the four sums are added where they become
// probabilities, two heads a warp. Values: warp w owns 64 columns of all keys.
#pragma once
#include "decode_merge.cuh"
#include "decode_plan.cuh"
#include "decode_read.cuh"
#include "hopper.cuh"
#include "pages.cuh"

namespace causeway {

constexpr int kNarrowThreads = 256;
constexpr int kNarrowWarpKeys = kNarrowKeys / 8;
constexpr int kScoreRow = 88;   // floats: rows g = 0..3 of a store, and heads h and h + 2, meet different banks
constexpr int kWeightRow = 88;  // bfloat16: an odd number of 16-byte columns

struct NarrowSmem {
  alignas(128) uint8_t keys[kTileBytes];
  float scores[4][kFewHeads][kScoreRow];  // of a quarter of the columns
  __nv_bfloat16 weights[kFewHeads][kWeightRow];
  float factor[kFewHeads];
  float2 stats[kFewHeads];    // for the cluster
  int32_t page[kNarrowKeys];  // -1: no key
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

// The queries of a quarter of the columns, as the products take them: a[s] are columns 16 s..+15.
struct NarrowQueries {
  uint4 raw[2][4];  // heads g and g + 8, columns 32 j + 8 t..+7

  __device__ __forceinline__ void load(const DecodeArgs& a, int row, int quarter) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __nv_bfloat16* from = a.q + row * a.q_row + (g + 8 * i) * a.q_head + 128 * quarter + 8 * t;
      const uint8_t* p = g + 8 * i < a.heads ? reinterpret_cast<const uint8_t*>(from) : nullptr;
#pragma unroll
      for (int j = 0; j < 4; ++j) raw[i][j] = load_now(p, 64 * j);
    }
  }
  __device__ __forceinline__ void arrange(uint4 (&a)[8]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint4 x = quad_transpose(raw[0][j].x, raw[0][j].y, raw[0][j].z, raw[0][j].w);
      uint4 y = quad_transpose(raw[1][j].x, raw[1][j].y, raw[1][j].z, raw[1][j].w);
      a[2 * j] = make_uint4(x.x, y.x, x.y, y.y);
      a[2 * j + 1] = make_uint4(x.z, y.z, x.w, y.w);
    }
  }
};

// Scores of 40 keys over a quarter of the columns.
__device__ __forceinline__ void multiply_narrow_queries(NarrowSmem& s, const uint4 (&a)[8], int warp) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, quarter = warp & 3, first = 40 * (warp >> 2);
  uint32_t keys = smem_address(s.keys) + 2 * quarter * kKeySubtile;
  float z[5][4] = {};
#pragma unroll
  for (int c = 0; c < 4; ++c) {  // 32 columns: 16-byte columns 4 (c & 1)..+3 of a subtile
#pragma unroll
    for (int n = 0; n < 5; ++n) {
      uint4 b = load_matrices(keys + (c >> 1) * kKeySubtile +
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

// Where the cluster finds this chunk's sums of a head: over its keys. 4 16-byte columns of 2 rows: 8 different banks.
constexpr int kSumRow = kDim * 2 + 64;

__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ uint4 load_from(uint32_t smem, int rank) {
  uint4 v;
  asm volatile(
      "{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %4, %5;\n"
      "ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [at];\n}\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(smem), "r"(rank)
      : "memory");
  return v;
}
__device__ __forceinline__ float2 load_pair_from(uint32_t smem, int rank) {
  float2 v;
  asm volatile(
      "{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %2, %3;\nld.shared::cluster.v2.f32 {%0, %1}, [at];\n}\n"
      : "=f"(v.x), "=f"(v.y)
      : "r"(smem), "r"(rank)
      : "memory");
  return v;
}

// The blocks of a cluster have the chunks of one row: each merges some columns of all of them.
__device__ __forceinline__ void merge_cluster(NarrowSmem& s, const DecodeArgs& a, const Item& it) {
  wait_for_cluster();
  for (int at = it.chunk * 128 + threadIdx.x; threadIdx.x < 128 && at < a.heads * 64; at += a.chunks * 128) {
    int head = at / 64, column = at % 64;
    uint4 v[kClusterChunks];
    float2 stats[kClusterChunks];
    ColumnSum columns = {kNegInf};
#pragma unroll
    for (int c = 0; c < kClusterChunks; ++c) {
      if (c >= it.chunks) break;
      stats[c] = load_pair_from(smem_address(&s.stats[head]), c);
      v[c] = load_from(smem_address(s.keys) + head * kSumRow + 16 * column, c);
    }
#pragma unroll
    for (int c = 0; c < kClusterChunks; ++c) {
      if (c < it.chunks) columns.top = fmaxf(columns.top, stats[c].x);
    }
#pragma unroll
    for (int c = 0; c < kClusterChunks; ++c) {
      if (c < it.chunks) columns.add(stats[c], v[c]);
    }
    columns.store(a, it.row, head, column);
  }
  wait_for_cluster();  // nobody reads this block's memory any more
}

// Probabilities of two heads a warp, half a warp each, and what becomes of the chunk's maximum and sum.
template <bool kCluster>
__device__ __forceinline__ void weigh_narrow(NarrowSmem& s, const DecodeArgs& a, const Item& it, int warp) {
  int lane = threadIdx.x & 31, l = lane & 15, head = (warp & 1) + 4 * (warp >> 1) + 2 * (lane >> 4);
  float factor = a.scale * kLog2e, x[5], top = kNegInf, total = 0.0f;
#pragma unroll
  for (int j = 0; j < 5; ++j) {
    int key = l + 16 * j;
    float z = (s.scores[0][head][key] + s.scores[1][head][key]) + (s.scores[2][head][key] + s.scores[3][head][key]);
    x[j] = s.page[key] >= 0 ? z : kNegInf;
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
  s.factor[head] = 1.0f;
  if (it.chunks == 1) {
    s.factor[head] = finish(a, it.row, head, top, total, true);
  } else if constexpr (kCluster) {
    s.stats[head] = make_float2(top, total);
  } else {
    a.stats[((int64_t)it.row * a.chunks + it.chunk) * a.tile_heads + head] = make_float2(top, total);
  }
}

// Columns 64 warp..+63 of all heads.
__device__ __forceinline__ void multiply_narrow_values(NarrowSmem& s, float (&acc)[32], int warp) {
  int lane = threadIdx.x & 31;
  uint32_t values = smem_address(s.keys) + warp * kKeySubtile;
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

// kPlain: pages other than fp8 ones at multiples of 16 bytes. kCluster: a cluster has all chunks of a row.
template <bool kPlain, bool kCluster>
__global__ void __launch_bounds__(kNarrowThreads, 2) decode_narrow_kernel(const __grid_constant__ DecodeArgs a) {
  extern __shared__ __align__(1024) uint8_t smem[];
  NarrowSmem& s = *reinterpret_cast<NarrowSmem*>(smem);
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  uint32_t tile = smem_address(s.keys);
  bool lists = lane < kNarrowWarpKeys;
  auto row_of = [&](int k) { return 8 * k + warp; };  // one swizzle for all rows of a warp
  int at_in_chunk = row_of(lists ? lane : 0);
  cudaGridDependencySynchronize();  // launched early: the inputs are there from here on
  cudaTriggerProgrammaticLaunchCompletion();

  Walk<kNarrowKeys> walk;
  Item it = {};
  int number = blockIdx.x;
  // The next item that exists, and the key that this thread lists of it.
  auto find = [&](Item& item, int64_t& key) {
    for (;; number += gridDim.x) {
      if (!walk.find(a, number, lists ? at_in_chunk : -1, item, key)) return false;
      if (item.chunk < item.chunks) return true;
    }
  };
  NarrowQueries queries;
  WarpEntries<kNarrowWarpKeys> entries;
  Place place = {-1, 0};
  // Sends for an item's keys and queries; shared memory is free.
  auto start = [&] {
    int at = it.chunk * kNarrowKeys + at_in_chunk;
    // Before the keys: what waits for the scales may wait for these reads, too.
    queries.load(a, it.row, warp & 3);
    if (lists) s.page[at_in_chunk] = place.page;
    if constexpr (!kPlain) entries.load(a, place, at, tile, row_of);
  };
  int64_t key;
  bool more;
  if constexpr (kCluster) {
    walk.find(a, number, lists ? at_in_chunk : -1, it, key);
    more = it.chunk < it.chunks;
  } else {
    more = find(it, key);
  }
  if (more) {
    if (lists) place = locate_key(a, it, it.chunk * kNarrowKeys + at_in_chunk, key);
    start();
  }
  while (more) {
    if constexpr (kPlain) {
      read_entries<kNarrowWarpKeys>(a, place, it.chunk * kNarrowKeys + at_in_chunk, tile, row_of);
    } else {
      entries.template decode<0>(tile, row_of);
    }
    uint4 q[8];
    queries.arrange(q);
    __syncthreads();
    multiply_narrow_queries(s, q, warp);
    Item next = it;
    number += gridDim.x;
    if constexpr (kCluster) {
      more = false;
    } else {
      more = find(next, key);
    }
    __syncthreads();
    weigh_narrow<kCluster>(s, a, it, warp);
    int next_at = next.chunk * kNarrowKeys + at_in_chunk;
    place = {-1, 0};
    if (more && lists) place = locate_key(a, next, next_at, key);
    __syncthreads();
    float acc[32], factor[2];
    multiply_narrow_values(s, acc, warp);
    bool shared = kCluster && it.chunks > 1;
    if (shared) __syncthreads();  // the sums take the keys' place
    __nv_bfloat16* to[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int head = (lane >> 2) + 8 * i;
      bool real = head < a.heads;
      int64_t slot = it.chunks == 1 ? (int64_t)it.row * a.heads + head
                                    : ((int64_t)it.row * a.chunks + it.chunk) * a.tile_heads + head;
      if (shared) {
        to[i] = reinterpret_cast<__nv_bfloat16*>(s.keys + head * kSumRow) + 64 * warp;
        factor[i] = 1.0f;
        continue;
      }
      to[i] = real ? (it.chunks == 1 ? a.o : a.partial) + slot * kDim + 64 * warp : nullptr;
      factor[i] = real ? s.factor[head] : 0.0f;
    }
    if (more) {
      __syncthreads();  // nobody reads shared memory of this item any more
      it = next;
      start();
    }
    store_output(acc, factor[0], 0, to[0]);
    store_output(acc, factor[1], 1, to[1]);
  }
  if constexpr (kCluster) {
    if (it.chunks > 1) merge_cluster(s, a, it);
  }
}

}  // namespace causeway
