// sparse_attention over paged keys (decode). Contract: kernels/sparse_attention/api.py.
//
// The keys of a query (window slots, then entries) are cut into chunks of 160 at fixed places. A block
// takes one chunk for 64 heads: warpgroup w decodes 80 keys from their pages to shared memory,
// multiplies the queries with them, and owns half w of the output columns for all 160 keys. A row of
// one chunk is finished at once; the chunks of a longer row leave their sums (bfloat16) and maxima to
// a second kernel. Which of the two happens depends on the row alone.
#include "hopper.cuh"
#include "pages.cuh"
#include "wgmma.cuh"

namespace causeway {

constexpr int kHeadTile = 64;
constexpr int kTileKeys = 80;
constexpr int kChunk = 2 * kTileKeys;
constexpr int kTileBytes = kTileKeys * kDim * 2;
constexpr int kKeySubtile = kTileKeys * 128;
constexpr int kQuerySubtile = kHeadTile * 128;
constexpr int kThreads = 256;

struct DecodeArgs {
  const __nv_bfloat16* q;
  int64_t q_row, q_head;
  Pages ring;
  const int64_t* slots;
  int64_t slots_row;
  int window;
  Entries entries;  // pages.pool null: no entries
  const float* sink;
  float scale;
  __nv_bfloat16* o;
  float* lse;
  __nv_bfloat16* partial;  // [items, chunks, 64, 512]
  float* stats;            // [items, chunks, 2, 64]
  int rows, heads, chunks;
};

struct DecodeSmem {
  alignas(1024) uint8_t q[kHeadTile * kDim * 2];  // later the probabilities of both tiles
  uint8_t keys[2][kTileBytes];
  float top[2][kHeadTile];
  float total[2][kHeadTile];
  float stats[2][kHeadTile];  // maximum and sum of the chunk
  int32_t page[2][kTileKeys];
  int32_t offset[2][kTileKeys];
};

__device__ __forceinline__ int visible_keys(const DecodeArgs& a, int64_t row, int64_t& seq, int& limit) {
  seq = -1;
  limit = 0;
  if (a.entries.pages.pool) {
    seq = a.entries.row_seq[row];
    limit = seq < 0 ? 0 : (int)max(a.entries.num_entries[row], (int64_t)0);
  }
  return a.window + (limit == 0 ? 0 : a.entries.index ? a.entries.index_count : limit);
}

// Factor of the merged sum of one head, and its lse. `top` is in base 2.
__device__ __forceinline__ float finish(const DecodeArgs& a, int64_t row, int head, float top, float total,
                                        bool write_lse) {
  bool empty = top == kNegInf;
  float extra = a.sink && !empty ? exp2_fast(a.sink[head] * kLog2e - top) : 0.0f;
  if (write_lse) a.lse[row * a.heads + head] = empty ? kNegInf : (top + log2f(total)) * kLn2;
  return empty ? 0.0f : 1.0f / (total + extra);
}

// What the slot list or the index holds for position `at` of a row's keys; -1: nothing.
__device__ __forceinline__ int64_t listed_key(const DecodeArgs& a, int64_t row, int at) {
  if (at < a.window) return __ldg(a.slots + row * a.slots_row + at);
  at -= a.window;
  if (a.entries.index == nullptr) return at;
  return at < a.entries.index_count ? __ldg(a.entries.index + row * a.entries.index_row + at) : -1;
}

__device__ __forceinline__ void locate_key(DecodeSmem& s, const DecodeArgs& a, int64_t seq, int limit, int at,
                                           int64_t key, int group, int i) {
  int page = -1, offset = 0;
  if (at < a.window) {
    if (key >= 0) {
      page = (int)(key / a.ring.per_page);
      offset = (int)(key - (int64_t)page * a.ring.per_page);
    }
  } else if (key >= 0 && key < limit) {
    int block = (unsigned)key / (unsigned)a.entries.pages.per_page;
    page = __ldg(a.entries.block_table + seq * a.entries.table_row + block);
    offset = (int)key - block * a.entries.pages.per_page;
  }
  s.page[group][i] = page;
  s.offset[group][i] = offset;
}

// Decodes this warpgroup's tile; all pages' reads are under way before the first is used, and
// meanwhile() runs between the two.
template <typename Meanwhile>
__device__ __forceinline__ void load_tile(const DecodeSmem& s, const DecodeArgs& a, uint32_t tile, int first,
                                          int group, Meanwhile meanwhile) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, q = lane & 3;
  auto store = [&](int r, int column, uint4 v) {
    store_shared(tile + (column >> 6) * kKeySubtile + r * 128 + ((((column >> 3) & 7) ^ (r & 7)) << 4), v);
  };
  bool plain = a.window > 0 && (a.ring.format != kFp8 || !is_aligned(a.ring));
  plain |= a.entries.pages.pool && (a.entries.pages.format != kFp8 || !is_aligned(a.entries.pages));
  if (plain) {
    meanwhile();
    for (int r = 8 * warp + (lane >> 2); r < kTileKeys; r += 32) {
      int page = s.page[group][r];
      const Pages& p = first + group * kTileKeys + r < a.window ? a.ring : a.entries.pages;
      if (page < 0) {
        for (int i = 0; i < 16; ++i) store(r, 8 * (q + 4 * i), make_uint4(0, 0, 0, 0));
      } else {
        decode_entry(p, p.pool + (int64_t)page * p.stride, s.offset[group][r], q, is_aligned(p),
                     [&](int column, uint4 v) { store(r, column, v); });
      }
    }
    return;
  }
  Fp8Quarter quarters[3];
#pragma unroll
  for (int u = 0; u < 3; ++u) {
    int r = 32 * u + 8 * warp + (lane >> 2);
    quarters[u].clear();
    int page = r < kTileKeys ? s.page[group][r] : -1;
    if (page >= 0) {
      const Pages& p = first + group * kTileKeys + r < a.window ? a.ring : a.entries.pages;
      quarters[u].load(p, p.pool + (int64_t)page * p.stride, s.offset[group][r], q, true);
    }
  }
  meanwhile();
#pragma unroll
  for (int u = 0; u < 3; ++u) {
    int r = 32 * u + 8 * warp + (lane >> 2);
    if (r < kTileKeys) quarters[u].decode(q, [&](int column, uint4 v) { store(r, column, v); });
  }
}

// One chunk: 64 heads x 512 output columns (this warpgroup's half in acc), unnormalised, and s.stats;
// ends with a block barrier behind the last read of s.q and s.keys. False: the row ends before it
// (the first chunk is always worked on: it writes the result of a row without keys).
__device__ __forceinline__ bool attend_chunk(DecodeSmem& s, const DecodeArgs& a, int64_t row, int head, int first,
                                             int& visible, float (&acc)[128]) {
  int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, t = lane & 3;
  int line = 16 * warp + (lane >> 2);
  uint32_t q = smem_address(s.q), keys = smem_address(s.keys);
  uint32_t own = keys + group * kTileBytes, other = keys + (1 - group) * kTileBytes;
  int in_group = threadIdx.x & 127, at = first + group * kTileKeys + in_group, limit;
  cudaGridDependencySynchronize();  // launched early: the inputs are there from here on
  cudaTriggerProgrammaticLaunchCompletion();
  int64_t seq, key = in_group < kTileKeys ? listed_key(a, row, at) : -1;
  visible = visible_keys(a, row, seq, limit);
  if (first > 0 && first >= visible) return false;
  {
    int chunk = threadIdx.x & 7;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int r = threadIdx.x / 8 + 32 * i;
      bool real = head + r < a.heads;
      const __nv_bfloat16* from = a.q + row * a.q_row + (real ? head + r : 0) * a.q_head + chunk * 8;
      uint32_t to = q + r * 128 + ((chunk ^ (r & 7)) << 4);
#pragma unroll
      for (int j = 0; j < 8; ++j) copy16_async(to + j * kQuerySubtile, from + j * 64, real);
    }
  }
  if (in_group < kTileKeys) locate_key(s, a, seq, limit, at, key, group, in_group);
  named_barrier(1 + group, 128);
  load_tile(s, a, own, first, group, [] {
    copies_wait_all();  // the queries
    fence_async_proxy();
    __syncthreads();
  });
  fence_async_proxy();
  named_barrier(1 + group, 128);  // a warpgroup may be ahead of the other

  float z[40];
  fence_regs(z);
  wgmma_fence();
  uint64_t q_desc = desc_k_major(q), key_desc = desc_k_major(own);
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    mma_m64n80k16_ss(z, desc_advance(q_desc, (k / 4) * kQuerySubtile + (k & 3) * 32),
                     desc_advance(key_desc, (k / 4) * kKeySubtile + (k & 3) * 32), k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  fence_regs(z);
  float factor = a.scale * kLog2e, best[2] = {kNegInf, kNegInf};
#pragma unroll
  for (int j = 0; j < 10; ++j) {
    int2 page = *reinterpret_cast<const int2*>(&s.page[group][8 * j + 2 * t]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (page.x < 0) z[4 * j + 2 * i] = kNegInf;
      if (page.y < 0) z[4 * j + 2 * i + 1] = kNegInf;
      best[i] = fmaxf(best[i], fmaxf(z[4 * j + 2 * i], z[4 * j + 2 * i + 1]));
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 1));
    best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 2)) * factor;
    if (t == 0) s.top[group][line + 8 * i] = best[i];
  }
  __syncthreads();  // all products with s.q are over: it takes the probabilities now
  float total[2] = {0.0f, 0.0f};
  uint32_t p[20];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = fmaxf(s.top[0][line + 8 * i], s.top[1][line + 8 * i]);
    float shift = top == kNegInf ? 0.0f : top;
    if (group == 0 && t == 0) s.stats[0][line + 8 * i] = top;
    int r = line + 8 * i;
#pragma unroll
    for (int j = 0; j < 10; ++j) {
      float x = exp2_fast(fmaf(z[4 * j + 2 * i], factor, -shift));
      float y = exp2_fast(fmaf(z[4 * j + 2 * i + 1], factor, -shift));
      total[i] += x + y;
      p[2 * j + i] = pack_bf16(x, y);
      store_shared(q + (2 * group + j / 8) * kQuerySubtile + r * 128 + (((j & 7) ^ (r & 7)) << 4) + 4 * t,
                   p[2 * j + i]);
    }
    total[i] += __shfl_xor_sync(~0u, total[i], 1);
    total[i] += __shfl_xor_sync(~0u, total[i], 2);
    if (t == 0) s.total[group][r] = total[i];
  }
  fence_async_proxy();
  fence_regs(acc);
  wgmma_fence();
  uint64_t value_desc = desc_mn_major(own + 4 * group * kKeySubtile, kKeySubtile);
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    mma_m64n256k16_rs_t(acc, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3],
                        desc_advance(value_desc, k * 2048), k > 0);
  }
  wgmma_commit();
  __syncthreads();
  fence_async_proxy();
  wgmma_fence();
  uint64_t p_desc = desc_k_major(q + 2 * (1 - group) * kQuerySubtile);
  value_desc = desc_mn_major(other + 4 * group * kKeySubtile, kKeySubtile);
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    mma_m64n256k16_ss_t(acc, desc_advance(p_desc, (k / 4) * kQuerySubtile + (k & 3) * 32),
                        desc_advance(value_desc, k * 2048), 1);
  }
  wgmma_commit();
  wgmma_wait<0>();
  fence_regs(acc);
  if (threadIdx.x < kHeadTile) s.stats[1][threadIdx.x] = s.total[0][threadIdx.x] + s.total[1][threadIdx.x];
  __syncthreads();
  return true;
}

__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const DecodeArgs a) {
  extern __shared__ __align__(1024) uint8_t raw[];
  DecodeSmem& s = *reinterpret_cast<DecodeSmem*>(raw);
  if (smem_address(raw) & 1023) __trap();
  int tiles = (a.heads + kHeadTile - 1) / kHeadTile, chunk = blockIdx.x % a.chunks;
  int64_t item = blockIdx.x / a.chunks, row = item / tiles;
  int head = (int)(item % tiles) * kHeadTile, keys;
  float acc[128];
  if (!attend_chunk(s, a, row, head, chunk * kChunk, keys, acc)) return;
  int group = threadIdx.x / 128, lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int line = 16 * warp + (lane >> 2) + 8 * i;
    bool real = head + line < a.heads;
    float top = s.stats[0][line], total = s.stats[1][line], factor = 1.0f;
    __nv_bfloat16* to = a.partial + ((int64_t)blockIdx.x * kHeadTile + line) * kDim;
    if (keys <= kChunk) {
      factor = real ? finish(a, row, head + line, top, total, group == 0 && t == 0) : 0.0f;
      to = a.o + (row * a.heads + head + line) * kDim;
    } else if (group == 0 && t == 0) {
      float* stats = a.stats + (int64_t)blockIdx.x * 2 * kHeadTile + line;
      stats[0] = top, stats[kHeadTile] = total;
    }
    store_output(acc, factor, i, real ? to + group * 256 : nullptr);
  }
}

// Merges the chunks of a row, 64 threads per head, 8 columns each, chunks in order. Launched early: it
// waits for the partial results itself (programmatic launch).
__global__ void __launch_bounds__(64) merge_chunks_kernel(const DecodeArgs a) {
  constexpr int kBatch = 8;  // chunks whose loads are under way at once
  extern __shared__ float2 stats[];  // maximum and sum of each chunk
  cudaGridDependencySynchronize();
  int64_t row = blockIdx.x / a.heads, seq;
  int head = blockIdx.x % a.heads, limit, column = threadIdx.x;
  int tiles = (a.heads + kHeadTile - 1) / kHeadTile, r = head % kHeadTile;
  int chunks = min((visible_keys(a, row, seq, limit) + kChunk - 1) / kChunk, a.chunks);
  if (chunks <= 1) return;  // finished by its only block
  int64_t block = (row * tiles + head / kHeadTile) * a.chunks;
  const uint4* partial = reinterpret_cast<const uint4*>(a.partial + (block * kHeadTile + r) * kDim) + column;
  uint4 v[kBatch];
  auto load = [&](int first) {
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (first + c < chunks) v[c] = __ldcg(partial + (int64_t)(first + c) * kHeadTile * kDim / 8);
    }
  };
  load(0);
  for (int c = threadIdx.x; c < chunks; c += 64) {
    const float* from = a.stats + (block + c) * 2 * kHeadTile + r;
    stats[c] = make_float2(__ldcg(from), __ldcg(from + kHeadTile));
  }
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
  reinterpret_cast<uint4*>(a.o + (row * a.heads + head) * kDim)[column] = packed;
}

}  // namespace causeway

extern "C" int causeway_attend_decode(const void* q, int64_t q_row, int64_t q_head, const uint8_t* ring,
                                      int64_t ring_stride, int ring_per_page, int ring_format,
                                      const int64_t* slots, int64_t slots_row, int window, const uint8_t* pool,
                                      int64_t pool_stride, int per_page, int format,
                                      const int32_t* block_table, int64_t table_row, const int64_t* row_seq,
                                      const int32_t* index, int64_t index_row, int index_count,
                                      const int64_t* num_entries, const float* sink, float scale, void* o,
                                      float* lse, void* partial, float* stats, int rows, int heads, int chunks,
                                      cudaStream_t stream) {
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
                  stats,
                  rows,
                  heads,
                  chunks};
  int bytes = sizeof(DecodeSmem);
  cudaError_t error =
      cudaFuncSetAttribute(decode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  int64_t tiles = (heads + kHeadTile - 1) / kHeadTile;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)(rows * tiles * chunks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, decode_kernel, a);
  if (error != cudaSuccess || chunks == 1) return (int)error;
  config.gridDim = dim3((unsigned)(rows * heads));
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = chunks * sizeof(float2);
  return (int)cudaLaunchKernelEx(&config, merge_chunks_kernel, a);
}
