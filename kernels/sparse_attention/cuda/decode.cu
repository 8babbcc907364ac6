// sparse_attention over paged keys (decode). Contract: kernels/sparse_attention/api.py.
//
// The keys of a query (window slots, then entries) are cut into chunks of 160 at fixed places. Persistent blocks
// take one (row, 64 heads, chunk) after the other: warpgroup w reads 80 keys, a row of bytes per warp access,
// decodes them to bfloat16 in shared memory in two parts, multiplies the queries with one part while it decodes
// the next, and owns half w of the output columns for all 160 keys. A row of one chunk is finished at once; the
// chunks of a longer row leave their sums (bfloat16) and maxima to a second kernel. Which of the two happens
// depends on the row alone.
#include "decode_plan.cuh"
#include "hopper.cuh"
#include "pages.cuh"
#include "products.cuh"
#include "query_map.h"
#include "wgmma.cuh"

namespace causeway {

constexpr int kThreads = 256;
constexpr int kWarpKeys = 20;  // of a tile
constexpr int kPartKeys = kTileKeys / 2;
constexpr int kTileBytes = kTileKeys * kDim * 2;
constexpr int kKeySubtile = kTileKeys * 128;
constexpr int kQuerySubtile = kHeadTile * 128;

struct DecodeSmem {
  alignas(1024) uint8_t q[kHeadTile * kDim * 2];  // later the probabilities of both tiles
  uint8_t keys[2][kTileBytes];
  float top[2][kHeadTile];
  float total[2][kHeadTile];
  int32_t page[2][kTileKeys];  // -1: no key
  uint64_t queries;            // barrier: they have arrived
};

// 16 bytes, zeros where `p` is null; volatile: all reads of a tile are issued where they are written.
__device__ __forceinline__ uint4 load_now(const uint8_t* p, int at) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u64 p, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p + at), "l"(p));
  return v;
}

__device__ __forceinline__ const uint8_t* shuffle_pointer(const uint8_t* p, int lane) {
  return reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, (unsigned long long)p, lane));
}

__device__ __forceinline__ const Pages& pages_of(const DecodeArgs& a, int at) {
  return at < a.window ? a.ring : a.entries.pages;
}

// Row of the tile that is key k = 0..19 of a warp: ten in each part.
__device__ __forceinline__ int warp_row(int warp, int k) {
  return (k < kWarpKeys / 2 ? 0 : kPartKeys - kWarpKeys / 2) + warp * (kWarpKeys / 2) + k;
}

// Place of columns 8 c..+7 of row r in a subtile of keys.
__device__ __forceinline__ uint32_t swizzled(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

// A warp's 20 entries: lane l has bytes 16 l..+15 of each, lane 4 i + q bytes 512 + 16 q..+15 of entry 8 j + i.
struct WarpEntries {
  uint4 raw[kWarpKeys], rest[3];
  uint2 scales;  // of the entry that this lane lists
  bool any_large;

  __device__ __forceinline__ void load(const DecodeArgs& a, Place place, int at) {
    int lane = threadIdx.x & 31;
    const uint8_t* mine = nullptr;
    scales = make_uint2(0, 0);
    if (place.page >= 0) {
      const Pages& p = pages_of(a, at);
      const uint8_t* page = p.pool + (int64_t)place.page * p.stride;
      mine = page + (int64_t)place.offset * kFp8Payload;
      scales = __ldg(reinterpret_cast<const uint2*>(scales_of(p, page, place.offset)));
    }
#pragma unroll
    for (int k = 0; k < kWarpKeys; ++k) raw[k] = load_now(shuffle_pointer(mine, k), 16 * lane);
#pragma unroll
    for (int j = 0; j < 3; ++j) rest[j] = load_now(shuffle_pointer(mine, 8 * j + lane / 4), 512 + 16 * (lane & 3));
    uint32_t limit = kLargestScale * 0x01010101u;
    any_large = __any_sync(~0u, __vcmpgtu4(scales.x, limit) | (__vcmpgtu4(scales.y, limit) & 0xffffffu));
  }

  // Entries k = first..+9 become bfloat16 rows.
  __device__ __forceinline__ void decode(uint32_t tile, int first) const {
    int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, block = lane / 4, q = lane & 3, odd = block & 1;
    bool codes = lane < 28;
#pragma unroll
    for (int k = first; k < first + kWarpKeys / 2; ++k) {
      uint32_t low = __shfl_sync(~0u, scales.x, k), high = __shfl_sync(~0u, scales.y, k);
      uint32_t scale = ((lane < 16 ? low : high) >> (8 * (block & 3))) & 255u;
      // Odd blocks start with their second half: 8 lanes of a store meet 8 different banks.
      bool swap = odd && codes;
      uint4 v = raw[k], out[2];
      if (swap) v = make_uint4(v.z, v.w, v.x, v.y);
      decode_codes(v, scale, any_large, out);
      int r = warp_row(warp, k);
      uint32_t to = tile + block * kKeySubtile;
      store_shared(to + swizzled(r, codes ? 2 * q + odd : q), codes ? out[0] : raw[k]);
      if (codes) store_shared(to + swizzled(r, 2 * q + 1 - odd), out[1]);
    }
#pragma unroll
    for (int j = first == 0 ? 0 : 2; j < (first == 0 ? 2 : 3); ++j) {
      int k = 8 * j + lane / 4;
      if (k < kWarpKeys) store_shared(tile + 7 * kKeySubtile + swizzled(warp_row(warp, k), 4 + q), rest[j]);
    }
  }
};

// A warp's 20 entries of any format, without haste.
__device__ __forceinline__ void read_entries(const DecodeArgs& a, Place place, int at, uint32_t tile) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, q = lane & 3;
  for (int first = 0; first < 24; first += 8) {
    int k = first + lane / 4, page = __shfl_sync(~0u, place.page, k), offset = __shfl_sync(~0u, place.offset, k);
    int key_at = __shfl_sync(~0u, at, k);
    if (k >= kWarpKeys) continue;
    int r = warp_row(warp, k);
    auto put = [&](int column, uint4 v) {
      store_shared(tile + (column >> 6) * kKeySubtile + swizzled(r, (column >> 3) & 7), v);
    };
    if (page >= 0) {
      const Pages& p = pages_of(a, key_at);
      decode_entry(p, p.pool + (int64_t)page * p.stride, offset, q, is_aligned(p), put);
    } else {
      for (int i = 0; i < 16; ++i) put(8 * (q + 4 * i), make_uint4(0, 0, 0, 0));
    }
  }
}

__device__ __forceinline__ void copy_queries(DecodeSmem& s, const CUtensorMap* map, const Item& it) {
  uint32_t bar = smem_address(&s.queries), to = smem_address(s.q);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"((uint32_t)sizeof(s.q)) : "memory");
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
    mma_m64n128k16_ss_t(acc, desc_advance(p, (k / 4) * kQuerySubtile + (k & 3) * 32), desc_advance(values, k * 2048), 1);
  }
  wgmma_commit();
}

__device__ __forceinline__ void prefetch_entry(const DecodeArgs& a, int at, Place place) {
  if (place.page < 0) return;
  const Pages& p = pages_of(a, at);
  const uint8_t* page = p.pool + (int64_t)place.page * p.stride;
  const uint8_t* entry = page + (int64_t)place.offset * kFp8Payload;
#pragma unroll
  for (int i = 0; i < 5; ++i) asm volatile("prefetch.global.L2 [%0];" ::"l"(entry + min(128 * i, kFp8Payload - 16)));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(scales_of(p, page, place.offset)));
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
  if (threadIdx.x == 0) {
    mbar_init(smem_address(&s.queries), 1);
    mbar_fence_init();
  }
  __syncthreads();
  cudaGridDependencySynchronize();  // launched early: the inputs are there from here on
  cudaTriggerProgrammaticLaunchCompletion();

  Walk walk;
  Item it;
  int number = blockIdx.x;
  // The next item that exists, and the key that this thread lists of it.
  auto find = [&](Item& item, int64_t& key) {
    for (;; number += gridDim.x) {
      if (!walk.find(a, number, item)) return false;
      key = lists ? listed_key(a, item.row, item.chunk * kChunk + at_in_chunk) : -1;
      if (item.chunk < item.chunks) return true;
    }
  };
  int64_t key;
  bool more = find(it, key);
  Place place = {-1, 0};
  if (more && lists) place = locate_key(a, it, it.chunk * kChunk + at_in_chunk, key);
  while (more) {
    int at = it.chunk * kChunk + at_in_chunk;
    if (threadIdx.x == 0) copy_queries(s, &query_map, it);
    if (lists) s.page[group][own_row] = place.page;
    uint64_t q_desc = desc_k_major(q), keys = desc_k_major(own);
    float z[40];
    WarpEntries entries;
    if constexpr (kPlain) {
      read_entries(a, place, at, own);
    } else {
      entries.load(a, place, at);
      entries.decode(own, 0);
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
      entries.decode(own, kWarpKeys / 2);
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
#pragma unroll
    for (int i = 0; i < 2; ++i) store_output(right, factor[i], i, to[i] ? to[i] + 128 : nullptr);
    if (more) __syncthreads();  // nobody reads shared memory of this item any more
    it = next;
  }
}

// Merges the chunks of a row, 64 threads per head, 8 columns each, chunks in order. Launched early: what
// the decode kernel waited for is there, its own results are waited for here.
__global__ void __launch_bounds__(64) merge_chunks_kernel(const __grid_constant__ DecodeArgs a) {
  constexpr int kBatch = 8;  // chunks whose loads are under way at once
  extern __shared__ float2 stats[];  // maximum and sum of each chunk
  int row = blockIdx.x / a.heads, head = blockIdx.x % a.heads, column = threadIdx.x;
  int64_t seq;
  int chunks = count_chunks(a, seen_entries(a, row, seq));
  int64_t slot = ((int64_t)row * a.tiles + head / kHeadTile) * a.chunks * a.tile_heads + head % kHeadTile;
  const uint4* partial = reinterpret_cast<const uint4*>(a.partial + slot * kDim) + column;
  uint4 v[kBatch];
  auto load = [&](int first) {
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (first + c < chunks) v[c] = __ldcg(partial + (int64_t)(first + c) * a.tile_heads * (kDim / 8));
    }
  };
  cudaGridDependencySynchronize();  // also where there is nothing to do: a later kernel waits for this one only
  if (chunks <= 1) return;          // finished by its only block
  load(0);
  for (int c = threadIdx.x; c < chunks; c += 64) stats[c] = __ldcg(a.stats + slot + (int64_t)c * a.tile_heads);
  __syncthreads();
  float top = kNegInf, total = 0.0f, sum[8] = {};
  for (int c = 0; c < chunks; ++c) top = fmaxf(top, stats[c].x);
  for (int first = 0; first < chunks; first += kBatch) {
    if (first > 0) load(first);
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (first + c >= chunks) break;
      float2 own = stats[first + c];
      float weight = own.x == kNegInf ? 0.0f : exp2_fast(own.x - top);
      total = fmaf(weight, own.y, total);
      const uint32_t words[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[2 * i] = fmaf(weight, __uint_as_float(words[i] << 16), sum[2 * i]);
        sum[2 * i + 1] = fmaf(weight, __uint_as_float(words[i] & 0xffff0000u), sum[2 * i + 1]);
      }
    }
  }
  float factor = finish(a, row, head, top, total, column == 0);
  uint4 packed = make_uint4(pack_bf16(sum[0] * factor, sum[1] * factor), pack_bf16(sum[2] * factor, sum[3] * factor),
                            pack_bf16(sum[4] * factor, sum[5] * factor), pack_bf16(sum[6] * factor, sum[7] * factor));
  reinterpret_cast<uint4*>(a.o + ((int64_t)row * a.heads + head) * kDim)[column] = packed;
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
                  pool != nullptr && index == nullptr};
  CUtensorMap query_map;
  int code = map_queries(query_map, q, q_row, q_head, rows, heads);
  if (code != 0) return code;
  auto is_plain = [](const Pages& p) {
    return p.format != kFp8 || ((uintptr_t)p.pool | (uintptr_t)p.stride) % 16 != 0;
  };
  bool plain = (window > 0 && is_plain(a.ring)) || (pool != nullptr && is_plain(a.entries.pages));
  auto kernel = plain ? decode_kernel<true> : decode_kernel<false>;
  int bytes = sizeof(DecodeSmem);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  int64_t items = (int64_t)rows * a.tiles * chunks;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)(items < processors ? items : processors));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, a, query_map);
  if (error != cudaSuccess || chunks == 1) return (int)error;
  config.gridDim = dim3((unsigned)(rows * heads));
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = chunks * sizeof(float2);
  return (int)cudaLaunchKernelEx(&config, merge_chunks_kernel, a);
}
