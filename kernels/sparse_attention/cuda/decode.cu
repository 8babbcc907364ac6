// sparse_attention over paged keys (decode). Contract: kernels/sparse_attention/api.py.
//
// The keys of a query (window slots, then entries) are cut into chunks of 160 (80 for at most 16 heads, whose kernel
// is in decode_narrow.cuh) at fixed places. Persistent blocks take one (row, 64 heads, chunk) after the other. Five
// warpgroups have 32 keys each. Their first warps find the keys, and they send for the entries one after the other:
// copies arrive in that order, and while later ones are under way, warpgroups decode their keys, and one of two
// multiplies the queries with the keys of both (the queries are read half as often). Probabilities go through shared
// memory; warpgroups 0..3 own 128 output columns each, for all keys, and the last one adds up, finishes what is one
// number a head, and finds the next item. A row of one chunk is finished at once; the chunks of a longer row leave
// their sums (bfloat16) and maxima to a second kernel. Which of the two happens depends on the row alone.
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

constexpr int kParts = (kTiles + 1) / 2;  // of the keys, whose scores one warpgroup makes: two tiles, or the last
constexpr int kThreads = kTiles * 128;
constexpr int kQuerySubtile = kHeadTile * 128;
constexpr int kKeySubtile = kChunk * 128;

struct DecodeSmem {
  union {
    alignas(1024) uint8_t q[kHeadTile * kDim * 2];
    struct {  // once all products with the queries are over
      uint8_t p[3 * kHeadTile * 128];
      float total[kParts][kHeadTile];
    };
  };
  uint8_t keys[kChunk * kDim * 2];
  union {
    const uint8_t* entries[kChunk];  // to be copied
    float top[kParts][kHeadTile];
  };
  float factor[kHeadTile];
  KeyTable<kChunk> table;
  Item next;         // row -1: there is none
  uint64_t queries;  // barrier: they have arrived
};
static_assert(sizeof(DecodeSmem) <= 227 * 1024);

// Box `part` of eight of an item's queries.
__device__ __forceinline__ void copy_queries(DecodeSmem& s, const CUtensorMap* map, const Item& it, int part) {
  uint32_t bar = smem_address(&s.queries), to = smem_address(s.q);
  expect_bytes(bar, kQuerySubtile);
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to + part * kQuerySubtile),
      "l"(map), "r"(bar), "r"(64 * part), "r"(it.tile * kHeadTile), "r"(it.row)
      : "memory");
}

// Probabilities of 8 kColumns keys, from those of this warpgroup on, to shared memory (over the queries).
template <int kColumns>
__device__ __forceinline__ void weigh(DecodeSmem& s, const DecodeArgs& a, int group) {
  float z[4 * kColumns] = {};
  wgmma_fence();
  uint64_t q = desc_k_major(smem_address(s.q)), keys = desc_k_major(smem_address(s.keys) + group * (kTileKeys * 128));
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    uint64_t queries = desc_advance(q, (k / 4) * kQuerySubtile + (k & 3) * 32);
    uint64_t values = desc_advance(keys, (k / 4) * kKeySubtile + (k & 3) * 32);
    if constexpr (kColumns == 8) {
      mma_m64n64k16_ss(z, queries, values, k > 0);
    } else {
      mma_m64n32k16_ss(z, queries, values, k > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  fence_regs(z);
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, t = lane & 3, part = group / 2;
  int line = 16 * warp + (lane >> 2);
  uint32_t to = smem_address(s.p) + part * kQuerySubtile;
#pragma unroll
  for (int h = 0; h < kColumns / 4; ++h) {
    uint32_t exists = *reinterpret_cast<const uint32_t*>(&s.table.exists[4 * (group + h)]);
    if (exists == ~0u) continue;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (!(exists >> (8 * (i / 4) + 2 * t + (i & 1)) & 1)) z[16 * h + i] = kNegInf;
    }
  }
  float factor = a.scale * kLog2e, best[2] = {kNegInf, kNegInf};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) best[i] = fmaxf(best[i], fmaxf(z[4 * j + 2 * i], z[4 * j + 2 * i + 1]));
    best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 1));
    best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 2)) * factor;
    if (t == 0) s.top[part][line + 8 * i] = best[i];
  }
  __syncthreads();  // all products with s.q are over: it takes the probabilities now
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int r = line + 8 * i;
    float top = kNegInf, total = 0.0f;
#pragma unroll
    for (int g = 0; g < kParts; ++g) top = fmaxf(top, s.top[g][r]);
    float shift = top == kNegInf ? 0.0f : top;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float x = exp2_fast(fmaf(z[4 * j + 2 * i], factor, -shift));
      float y = exp2_fast(fmaf(z[4 * j + 2 * i + 1], factor, -shift));
      total += x + y;
      store_shared(to + swizzled(r, j) + 4 * t, pack_bf16(x, y));
    }
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (t == 0) s.total[part][r] = total;
  }
  fence_async_proxy();
}

// A head's maximum and sum: factor of its result.
__device__ __forceinline__ void finish_line(DecodeSmem& s, const DecodeArgs& a, const Item& it, int line) {
  int head = it.tile * kHeadTile + line;
  float top = kNegInf, total = 0.0f, factor = 1.0f;
#pragma unroll
  for (int g = 0; g < kParts; ++g) top = fmaxf(top, s.top[g][line]), total += s.total[g][line];
  if (head >= a.heads) return;
  if (it.chunks == 1) {
    factor = finish(a, it.row, head, top, total, true);
  } else {
    a.stats[(((int64_t)it.row * a.tiles + it.tile) * a.chunks + it.chunk) * a.tile_heads + line] =
        make_float2(top, total);
  }
  s.factor[line] = factor;
}

// kPlain: pages other than fp8 ones at multiples of 16 bytes.
template <bool kPlain>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArgs a, const __grid_constant__ CUtensorMap query_map) {
  extern __shared__ __align__(1024) uint8_t smem[];
  DecodeSmem& s = *reinterpret_cast<DecodeSmem*>(smem);
  if (smem_address(smem) & 1023) __trap();
  int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0), lane = threadIdx.x & 31;
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32 % 4, 0);
  uint32_t keys = smem_address(s.keys), parity = 0;
  bool lists = warp == 0;
  int own_key = kTileKeys * group + lane;  // of a thread that lists
  if (threadIdx.x == 0) {
    mbar_init(smem_address(&s.queries), 8);
    for (uint64_t& bar : s.table.landed) mbar_init(smem_address(&bar), 2);
    mbar_fence_init();
    asm volatile("prefetch.tensormap [%0];" ::"l"(&query_map) : "memory");
  }
  Walk<kChunk> walk;
  if (lists) walk.warm(a, blockIdx.x, own_key);
  __syncthreads();
  cudaGridDependencySynchronize();  // launched early: the inputs are there from here on
  cudaTriggerProgrammaticLaunchCompletion();

  Item it = {};
  // Sends for this warpgroup's keys of an item, after the warpgroup before it. Shared memory is free.
  auto send = [&](Place place) {
    if (group == kTiles - 1 && warp == 1 && lane < 8) copy_queries(s, &query_map, it, lane);
    __syncwarp();
    auto copy = [&] {
      named_barrier(1 + group, 128);
      if (group > 0) named_barrier(kTiles + group, 256);
      if constexpr (kPlain) {
        if (lane == 0) mbar_arrive(smem_address(&s.table.landed[4 * group + warp]));
      } else {
        send_group<kChunk>(s.table, s.entries, keys, 4 * group + warp);
      }
      if (group < kTiles - 1) named_barrier_arrive(kTiles + group + 1, 256);
    };
    if (lists) {
      list_key<kPlain>(s.table, s.entries, a, place, own_key, it.chunk * kChunk + own_key, copy);
    } else {
      copy();
    }
  };
  int64_t key = -1;
  if (lists) {
    if (!walk.find_existing(a, blockIdx.x, own_key, it, key)) it.row = -1;
    if (threadIdx.x == 0) s.next = it;
  }
  __syncthreads();
  it = s.next;
  if (it.row >= 0) {
    Place place = {-1, 0};
    if (lists) place = locate_key(a, it, it.chunk * kChunk + own_key, key);
    send(place);
  }
  while (it.row >= 0) {
    if constexpr (kPlain) {
      read_group<kChunk>(s.table, a, keys, 4 * group + warp, it.chunk, parity);
    } else {
      decode_group<kChunk>(s.table, keys, 4 * group + warp, parity);
    }
    fence_async_proxy();
    if (group % 2 == 1) {
      named_barrier_arrive(2 * kTiles + group, 256);
      __syncthreads();
    } else {
      mbar_wait(smem_address(&s.queries), parity);
      if (group < kTiles - 1) {
        named_barrier(2 * kTiles + group + 1, 256);
        weigh<8>(s, a, group);
      } else {
        named_barrier(1 + group, 128);
        weigh<4>(s, a, group);
      }
    }
    parity ^= 1;
    __syncthreads();
    uint64_t p = desc_k_major(smem_address(s.p));

    // What comes after the last product: the next item's copies, if there is one.
    auto go_on = [&] {
      it = s.next;
      if (it.row >= 0) send(s.table.places[own_key]);
    };
    if (group == kTiles - 1) {
      if (threadIdx.x % 128 < kHeadTile) finish_line(s, a, it, threadIdx.x % 128);
      named_barrier_arrive(2 * kTiles, kThreads);
      find_next<kChunk, 128, kPlain>(s.next, s.table.places, a, walk, it.number + gridDim.x);
      __syncthreads();
      go_on();
    } else {  // columns 128 group..+127, in two halves
      float left[32] = {}, right[32] = {};
      wgmma_fence();
      auto multiply = [&](float(&sum)[32], int half) {
        uint64_t values = desc_mn_major(keys + (2 * group + half) * kKeySubtile, kKeySubtile);
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
          mma_m64n64k16_ss_t(sum, desc_advance(p, (k / 4) * kQuerySubtile + (k & 3) * 32),
                             desc_advance(values, k * 2048), k > 0);
        }
        wgmma_commit();
      };
      multiply(left, 0);
      multiply(right, 1);
      int line = 16 * warp + lane / 4, lines = a.heads - it.tile * kHeadTile;
      int64_t slot = it.chunks == 1 ? (int64_t)it.row * a.heads + it.tile * kHeadTile
                                    : (((int64_t)it.row * a.tiles + it.tile) * a.chunks + it.chunk) * a.tile_heads;
      __nv_bfloat16* to = (it.chunks == 1 ? a.o : a.partial) + (slot + line) * kDim + 128 * group;
      named_barrier(2 * kTiles, kThreads);  // the factors are there
      float factor[2] = {s.factor[line], s.factor[line + 8]};
      auto store = [&](const float(&sum)[32], int half) {
        store_output(sum, factor[0], 0, line < lines ? to + 64 * half : nullptr);
        store_output(sum, factor[1], 1, line + 8 < lines ? to + 8 * kDim + 64 * half : nullptr);
      };
      wgmma_wait<1>();
      fence_regs(left);
      store(left, 0);
      wgmma_wait<0>();
      fence_regs(right);
      __syncthreads();  // nobody reads this item's keys and probabilities any more
      go_on();
      store(right, 1);
    }
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
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
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
    auto kernel = plain ? decode_narrow_kernel<true> : decode_narrow_kernel<false>;
    error = launch(kernel, kNarrowThreads, sizeof(NarrowSmem), a);
  } else {
    CUtensorMap query_map;
    int code = map_queries(query_map, q, q_row, q_head, rows, heads);
    if (code != 0) return code;
    error = launch(plain ? decode_kernel<true> : decode_kernel<false>, kThreads, sizeof(DecodeSmem), a, query_map);
  }
  if (error != cudaSuccess || chunks == 1) return (int)error;
  bool many = heads % kMergeHeads == 0 && rows * heads >= 8 * processors && chunks <= 1024;
  unsigned merged = many ? kMergeHeads : 1;
  config.gridDim = dim3((unsigned)(rows * heads) / merged);
  config.blockDim = dim3(64, merged);
  config.dynamicSmemBytes = merged * chunks * sizeof(float2);
  auto merge = narrow ? merge_chunks_kernel<kNarrowKeys> : merge_chunks_kernel<kChunk>;
  return (int)cudaLaunchKernelEx(&config, merge, a);
}
