// sparse_attention over paged keys (decode). Contract: kernels/sparse_attention/api.py.
//
// The keys of a query (window slots, then entries) are cut into chunks of 160 (80 for at most 16 heads, whose kernel
// is in decode_narrow.cuh) at fixed places. Persistent blocks take one (row, 64 heads, chunk) after the other:
// warpgroup w copies 80 keys to shared memory, a row of bytes per warp access, decodes them to bfloat16 there as they
// arrive, in two parts, multiplies the queries with one part while it decodes the next, and owns half w of the output
// columns for all 160 keys. The next chunk's copies start before the last results are stored. A row of one chunk
// is finished at once; the chunks of a longer row leave their sums (bfloat16) and maxima to a second kernel. Which of
// the two happens depends on the row alone.
#include "decode_merge.cuh"
#include "decode_narrow.cuh"
#include "decode_plan.cuh"
#include "decode_read.cuh"
#include "hopper.cuh"
#include "pages.cuh"
#include "products.cuh"
#include "query_map.h"
#include "wgmma.cuh"

namespace causeway {

constexpr int kThreads = 256;
constexpr int kQuerySubtile = kHeadTile * 128;

struct DecodeSmem {
  alignas(1024) uint8_t q[kHeadTile * kDim * 2];  // later the probabilities of both tiles
  uint8_t keys[2][kTileBytes];
  float top[2][kHeadTile];
  float total[2][kHeadTile];
  int32_t page[2][kTileKeys];  // -1: no key
  uint64_t queries;            // barrier: they have arrived
};

__device__ __forceinline__ void copy_queries(DecodeSmem& s, const CUtensorMap* map, const Item& it) {
  uint32_t bar = smem_address(&s.queries), to = smem_address(s.q);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"((uint32_t)sizeof(s.q))
               : "memory");
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to + j * kQuerySubtile),
        "l"(map), "r"(bar), "r"(64 * j), "r"(it.tile * kHeadTile), "r"(it.row)
        : "memory");
  }
}

// Scores of 40 keys, sums z[kFirst]..; the product is under way on return.
template <int kFirst>
__device__ __forceinline__ void multiply_queries(float (&z)[40], uint64_t q, uint64_t keys) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    mma_m64n40k16_ss<kFirst>(z, desc_advance(q, (k / 4) * kQuerySubtile + (k & 3) * 32),
                             desc_advance(keys, (k / 4) * kKeySubtile + (k & 3) * 32), k > 0);
  }
  wgmma_commit();
}

// Probabilities of this warpgroup's keys, to registers and to shared memory (over the queries).
__device__ __forceinline__ void exponentiate(DecodeSmem& s, const DecodeArgs& a, int group, const float (&z)[40],
                                             uint32_t (&p)[20]) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, t = lane & 3;
  int line = 16 * warp + (lane >> 2);
  uint32_t to = smem_address(s.q), exists = 0;
  float factor = a.scale * kLog2e, best[2] = {kNegInf, kNegInf}, total[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < 10; ++j) {
    int2 page = *reinterpret_cast<const int2*>(&s.page[group][8 * j + 2 * t]);
    exists |= (page.x >= 0 ? 1u << (2 * j) : 0u) | (page.y >= 0 ? 2u << (2 * j) : 0u);
  }
  auto score = [&](int i, int j, int k) { return exists >> (2 * j + k) & 1 ? z[4 * j + 2 * i + k] : kNegInf; };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 10; ++j) best[i] = fmaxf(best[i], fmaxf(score(i, j, 0), score(i, j, 1)));
    best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 1));
    best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 2)) * factor;
    if (t == 0) s.top[group][line + 8 * i] = best[i];
  }
  __syncthreads();  // all products with s.q are over: it takes the probabilities now
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int r = line + 8 * i;
    float top = fmaxf(s.top[0][r], s.top[1][r]), shift = top == kNegInf ? 0.0f : top;
#pragma unroll
    for (int j = 0; j < 10; ++j) {
      float x = exp2_fast(fmaf(score(i, j, 0), factor, -shift));
      float y = exp2_fast(fmaf(score(i, j, 1), factor, -shift));
      total[i] += x + y;
      p[2 * j + i] = pack_bf16(x, y);
      store_shared(to + (2 * group + j / 8) * kQuerySubtile + swizzled(r, j & 7) + 4 * t, p[2 * j + i]);
    }
    total[i] += __shfl_xor_sync(~0u, total[i], 1);
    total[i] += __shfl_xor_sync(~0u, total[i], 2);
    if (t == 0) s.total[group][r] = total[i];
  }
  fence_async_proxy();
}

// Half of this warpgroup's columns, for the keys of one tile.
__device__ __forceinline__ void multiply_own(float (&acc)[64], const uint32_t (&p)[20], uint64_t values) {
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    mma_m64n128k16_rs_t(acc, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3], desc_advance(values, k * 2048), k > 0);
  }
}
__device__ __forceinline__ void multiply_other(float (&acc)[64], uint64_t p, uint64_t values) {
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    uint32_t at = (k / 4) * kQuerySubtile + (k & 3) * 32;
    mma_m64n128k16_ss_t(acc, desc_advance(p, at), desc_advance(values, k * 2048), 1);
  }
  wgmma_commit();
}

// kPlain: pages other than fp8 ones at multiples of 16 bytes.
template <bool kPlain>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArgs a, const __grid_constant__ CUtensorMap query_map) {
  extern __shared__ __align__(1024) uint8_t smem[];
  DecodeSmem& s = *reinterpret_cast<DecodeSmem*>(smem);
  if (smem_address(smem) & 1023) __trap();
  int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, t = lane & 3;
  uint32_t q = smem_address(s.q), own = smem_address(s.keys) + group * kTileBytes, parity = 0;
  uint32_t other = smem_address(s.keys) + (1 - group) * kTileBytes;
  bool lists = lane < kWarpKeys;
  int own_row = warp_row(warp, lists ? lane : 0), at_in_chunk = group * kTileKeys + own_row;
  auto row_of = [&](int k) { return warp_row(warp, k); };
  if (threadIdx.x == 0) {
    mbar_init(smem_address(&s.queries), 1);
    mbar_fence_init();
  }
  __syncthreads();
  cudaGridDependencySynchronize();  // launched early: the inputs are there from here on
  cudaTriggerProgrammaticLaunchCompletion();

  Walk<kChunk> walk;
  Item it;
  int number = blockIdx.x;
  // The next item that exists, and the key that this thread lists of it.
  auto find = [&](Item& item, int64_t& key) {
    for (;; number += gridDim.x) {
      if (!walk.find(a, number, lists ? at_in_chunk : -1, item, key)) return false;
      if (item.chunk < item.chunks) return true;
    }
  };
  WarpEntries<kWarpKeys> entries;
  Place place = {-1, 0};
  // Sends for an item's queries and keys; shared memory is free.
  auto start = [&] {
    if (threadIdx.x == 0) copy_queries(s, &query_map, it);
    if (lists) s.page[group][own_row] = place.page;
    if constexpr (!kPlain) entries.load(a, place, it.chunk * kChunk + at_in_chunk, own, row_of);
  };
  int64_t key;
  bool more = find(it, key);
  if (more) {
    if (lists) place = locate_key(a, it, it.chunk * kChunk + at_in_chunk, key);
    start();
  }
  while (more) {
    uint64_t q_desc = desc_k_major(q), keys = desc_k_major(own);
    float z[40];
    if constexpr (kPlain) {
      read_entries<kWarpKeys>(a, place, it.chunk * kChunk + at_in_chunk, own, row_of);
    } else {
      entries.template decode<0>(own, row_of);
    }
    Item next = it;
    number += gridDim.x;
    fence_async_proxy();
    mbar_wait(smem_address(&s.queries), parity);
    parity ^= 1;
    named_barrier(1 + group, 128);
    fence_regs(z);
    multiply_queries<0>(z, q_desc, keys);
    if constexpr (!kPlain) {
      entries.template decode<kPartEntries>(own, row_of);
      fence_async_proxy();
      named_barrier(1 + group, 128);
    }
    multiply_queries<20>(z, q_desc, desc_advance(keys, kPartKeys * 128));
    wgmma_wait<0>();
    fence_regs(z);
    uint32_t p[20];
    exponentiate(s, a, group, z, p);

    float left[64], right[64];  // halves of this warpgroup's columns
    fence_regs(left);
    fence_regs(right);
    wgmma_fence();
    uint64_t values = desc_mn_major(own + 4 * group * kKeySubtile, kKeySubtile);
    multiply_own(left, p, values);
    multiply_own(right, p, desc_advance(values, 2 * kKeySubtile));
    wgmma_commit();
    __syncthreads();
    fence_async_proxy();
    wgmma_fence();
    uint64_t p_desc = desc_k_major(q + 2 * (1 - group) * kQuerySubtile);
    values = desc_mn_major(other + 4 * group * kKeySubtile, kKeySubtile);
    multiply_other(left, p_desc, values);
    multiply_other(right, p_desc, desc_advance(values, 2 * kKeySubtile));
    more = find(next, key);  // while the products run
    place = {-1, 0};
    if (more && lists) {
      int next_at = next.chunk * kChunk + at_in_chunk;
      place = locate_key(a, next, next_at, key);
      if constexpr (!kPlain) prefetch_entry(a, next_at, place);
    }

    __nv_bfloat16* to[2];
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int line = 16 * warp + (lane >> 2) + 8 * i, head = it.tile * kHeadTile + line;
      bool real = head < a.heads, writes = real && group == 0 && t == 0;
      float top = fmaxf(s.top[0][line], s.top[1][line]), total = s.total[0][line] + s.total[1][line];
      factor[i] = 1.0f;
      if (it.chunks == 1) {
        factor[i] = real ? finish(a, it.row, head, top, total, writes) : 0.0f;
        to[i] = a.o + ((int64_t)it.row * a.heads + head) * kDim;
      } else {
        int64_t slot = (((int64_t)it.row * a.tiles + it.tile) * a.chunks + it.chunk) * a.tile_heads + line;
        if (writes) a.stats[slot] = make_float2(top, total);
        to[i] = a.partial + slot * kDim;
      }
      to[i] = real ? to[i] + group * 256 : nullptr;
    }
    wgmma_wait<1>();
    fence_regs(left);
#pragma unroll
    for (int i = 0; i < 2; ++i) store_output(left, factor[i], i, to[i]);
    wgmma_wait<0>();
    fence_regs(right);
    if (more) {
      __syncthreads();  // nobody reads shared memory of this item any more
      it = next;
      start();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) store_output(right, factor[i], i, to[i] ? to[i] + 128 : nullptr);
  }
}

}  // namespace causeway

extern "C" int causeway_attend_decode(const void* q, int64_t q_row, int64_t q_head, const uint8_t* ring,
                                      int64_t ring_stride, int ring_per_page, int ring_format,
                                      const int64_t* slots, int64_t slots_row, int window, const uint8_t* pool,
                                      int64_t pool_stride, int per_page, int format,
                                      const int32_t* block_table, int64_t table_row, const int64_t* row_seq,
                                      const int32_t* index, int64_t index_row, int index_count,
                                      const int64_t* num_entries, const float* sink, float scale, void* o,
                                      float* lse, void* partial, void* stats, int rows, int heads, int chunks,
                                      int capacity, int processors, cudaStream_t stream) {
  using namespace causeway;
  DecodeArgs a = {static_cast<const __nv_bfloat16*>(q),
                  q_row,
                  q_head,
                  {ring, ring_stride, ring_per_page, ring_format},
                  slots,
                  slots_row,
                  window,
                  {{pool, pool_stride, per_page, format},
                   block_table,
                   table_row,
                   row_seq,
                   index,
                   index_row,
                   index_count,
                   num_entries},
                  sink,
                  scale,
                  static_cast<__nv_bfloat16*>(o),
                  lse,
                  static_cast<__nv_bfloat16*>(partial),
                  static_cast<float2*>(stats),
                  rows,
                  heads,
                  (heads + kHeadTile - 1) / kHeadTile,
                  heads < kHeadTile ? heads : kHeadTile,
                  chunks,
                  capacity,
                  0};
  bool narrow = heads <= kFewHeads;
  int64_t items = (int64_t)rows * a.tiles * chunks, blocks = narrow ? 2 * processors : processors;
  if (items < blocks) blocks = items;
  a.ragged = pool != nullptr && index == nullptr && items > blocks;
  auto is_plain = [](const Pages& p) {
    return p.format != kFp8 || ((uintptr_t)p.pool | (uintptr_t)p.stride) % 16 != 0;
  };
  bool plain = (window > 0 && is_plain(a.ring)) || (pool != nullptr && is_plain(a.entries.pages));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)blocks);
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = 1;
  auto launch = [&](auto kernel, int threads, int bytes, auto... arguments) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
  };
  cudaError_t error;
  if (narrow) {
    if (kMergeInCluster && !plain && items == blocks && chunks > 1 && chunks <= kClusterChunks) {
      attributes[1].id = cudaLaunchAttributeClusterDimension;
      attributes[1].val.clusterDim = {(unsigned)chunks, 1, 1};
      config.numAttrs = 2;
      return (int)launch(decode_narrow_kernel<false, true>, kNarrowThreads, sizeof(NarrowSmem), a);
    }
    auto kernel = plain ? decode_narrow_kernel<true, false> : decode_narrow_kernel<false, false>;
    error = launch(kernel, kNarrowThreads, sizeof(NarrowSmem), a);
  } else {
    CUtensorMap query_map;
    int code = map_queries(query_map, q, q_row, q_head, rows, heads);
    if (code != 0) return code;
    error = launch(plain ? decode_kernel<true> : decode_kernel<false>, kThreads, sizeof(DecodeSmem), a, query_map);
  }
  if (error != cudaSuccess || chunks == 1) return (int)error;
  config.gridDim = dim3((unsigned)(rows * heads));
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = chunks * sizeof(float2);
  auto merge = narrow ? merge_chunks_kernel<kNarrowKeys> : merge_chunks_kernel<kChunk>;
  return (int)cudaLaunchKernelEx(&config, merge, a);
}
