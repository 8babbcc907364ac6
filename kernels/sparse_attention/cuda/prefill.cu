// sparse_attention with contiguous window rows (prefill). Contract: kernels/sparse_attention/api.py.
//
// First the pages' entries become bfloat16 rows of a workspace (once, not once per query). Then a
// persistent kernel walks over (query row, 64 heads). A producer warpgroup copies rows of keys to
// shared memory, 2 tiles of 64 keys at a time; of the two consumer warpgroups, w multiplies the queries
// with tile w, and owns half w of the output columns for the keys of both tiles. A tile half is free
// for the next keys as soon as its one reader is done, and each warpgroup starts with the half that
// is free first: loads hide behind products although there is room for two tiles only.
#include "hopper.cuh"
#include "pages.cuh"
#include "wgmma.cuh"

namespace causeway {

constexpr int kHeadTile = 64;
constexpr int kTileKeys = 64;
constexpr int kTileBytes = kTileKeys * kDim * 2;
constexpr int kSubtile = 64 * 128;  // 64 rows of 64 bfloat16 values, swizzled
constexpr int kThreads = 384;

struct PrefillArgs {
  const __nv_bfloat16* q;
  int64_t q_row, q_head;
  const __nv_bfloat16* kv;
  int64_t kv_row;
  const int64_t* start;
  const int64_t* length;
  Entries entries;              // pages.pool null: no entries
  const __nv_bfloat16* decoded;  // [S * capacity, 512]
  int64_t capacity;
  const float* sink;
  float scale;
  __nv_bfloat16* o;
  float* lse;
  int rows, heads;
};

struct PrefillSmem {
  alignas(1024) uint8_t q[kTileBytes];
  uint8_t keys[2][kTileBytes];
  uint8_t p[2][kSubtile];
  float top[2][kHeadTile];
  float total[2][kHeadTile];
  uint16_t mask[2][4];  // keys that exist
  uint64_t q_full, q_empty;
  uint64_t full[2][2], empty[2][2];  // [tile][half of the columns]
};

struct Item {
  int64_t row, seq, start;
  int window, entries, limit, head;

  __device__ void fetch(const PrefillArgs& a, int item, int tiles) {
    row = item / tiles;
    head = item % tiles * kHeadTile;
    start = a.start ? a.start[row] : 0;
    window = a.start ? (int)max(a.length[row], (int64_t)0) : 0;
    seq = -1;
    entries = limit = 0;
    if (a.entries.pages.pool) {
      seq = a.entries.row_seq[row];
      limit = seq < 0 ? 0 : (int)max(a.entries.num_entries[row], (int64_t)0);
      entries = limit == 0 ? 0 : a.entries.index ? a.entries.index_count : limit;
    }
  }
  __device__ int steps() const { return (window + entries + 2 * kTileKeys - 1) / (2 * kTileKeys); }
};

// Address of the key at position `at` of an item, null when there is none.
__device__ __forceinline__ const uint8_t* key_row(const PrefillArgs& a, const Item& it, int at) {
  if (at < it.window) return reinterpret_cast<const uint8_t*>(a.kv + (it.start + at) * a.kv_row);
  int place = at - it.window;
  if (place >= it.entries) return nullptr;
  int entry = entry_at(a.entries, it.row, place, it.limit);
  if (entry < 0) return nullptr;
  int block = (unsigned)entry / (unsigned)a.entries.pages.per_page;
  if (__ldg(a.entries.block_table + it.seq * a.entries.table_row + block) < 0) return nullptr;
  return reinterpret_cast<const uint8_t*>(a.decoded + (it.seq * a.capacity + entry) * kDim);
}

// Rows of 1 KB to swizzled subtiles: this thread copies chunk `lane & 7` of 4 rows.
__device__ __forceinline__ void copy_columns(uint32_t tile, const uint8_t* const (&rows)[4],
                                             const uint8_t* anything, int first, int count) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, chunk = lane & 7;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int r = 16 * warp + (lane >> 3) + 4 * i;
    uint32_t to = tile + r * 128 + ((chunk ^ (r & 7)) << 4);
    const uint8_t* from = (rows[i] ? rows[i] : anything) + chunk * 16;
#pragma unroll
    for (int j = 0; j < count; ++j) {
      copy16_async(to + (first + j) * kSubtile, from + (first + j) * 128, rows[i] != nullptr);
    }
  }
}

__device__ __forceinline__ void spread_rows(const uint8_t* own, const uint8_t* (&rows)[4]) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    rows[i] = reinterpret_cast<const uint8_t*>(
        __shfl_sync(~0u, (unsigned long long)own, (lane >> 3) + 4 * i));
  }
}

__device__ void produce(PrefillSmem& s, const PrefillArgs& a, int items, int tiles) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  uint32_t q_full = smem_address(&s.q_full), q_empty = smem_address(&s.q_empty);
  uint32_t full = smem_address(s.full), empty = smem_address(s.empty), keys = smem_address(s.keys);
  const uint8_t* anything = reinterpret_cast<const uint8_t*>(a.q);
  uint32_t step = 0, item_count = 0;
  for (int index = blockIdx.x; index < items; index += gridDim.x) {
    Item it;
    it.fetch(a, index, tiles);
    int steps = it.steps();
    if (steps == 0) continue;
    const uint8_t* own[2];
    int mine = 16 * warp + (lane & 15);
#pragma unroll
    for (int b = 0; b < 2; ++b) own[b] = key_row(a, it, b * kTileKeys + mine);
    mbar_wait(q_empty, (item_count & 1) ^ 1);
    {
      const uint8_t* rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int head = it.head + 16 * warp + (lane >> 3) + 4 * i;
        rows[i] = head < a.heads ? reinterpret_cast<const uint8_t*>(a.q + it.row * a.q_row + head * a.q_head)
                                 : nullptr;
      }
      copy_columns(smem_address(s.q), rows, anything, 0, 8);
      mbar_arrive_after_copies(q_full);
    }
    ++item_count;
    for (int n = 0; n < steps; ++n, ++step) {
      const uint8_t* rows[2][4];
#pragma unroll
      for (int b = 0; b < 2; ++b) spread_rows(own[b], rows[b]);
      // Tile halves in the order in which they come free: (0, 0), (1, 1), (0, 1), (1, 0).
#pragma unroll
      for (int turn = 0; turn < 4; ++turn) {
        int b = turn & 1, half = turn < 2 ? b : 1 - b;
        mbar_wait(empty + (2 * b + half) * 8, (step & 1) ^ 1);
        copy_columns(keys + b * kTileBytes, rows[b], anything, 4 * half, 4);
        mbar_arrive_after_copies(full + (2 * b + half) * 8);
        if (turn < 2) {
          uint32_t mask = __ballot_sync(~0u, own[b] != nullptr) & 0xffffu;
          if (lane == 0) {
            s.mask[b][warp] = (uint16_t)mask;
            mbar_arrive(full + (2 * b + half) * 8);
          }
        }
      }
      if (n + 1 < steps) {
#pragma unroll
        for (int b = 0; b < 2; ++b) own[b] = key_row(a, it, (2 * n + 2 + b) * kTileKeys + mine);
      }
    }
  }
}

// Products of the queries with half of the columns of a tile of keys; the descriptors point there.
__device__ __forceinline__ void multiply_half(float (&z)[32], uint64_t q, uint64_t keys, int accumulate) {
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    uint32_t at = (k / 4) * kSubtile + (k & 3) * 32;
    mma_m64n64k16_ss(z, desc_advance(q, at), desc_advance(keys, at), accumulate || k > 0);
  }
}

__device__ void consume(PrefillSmem& s, const PrefillArgs& a, int items, int tiles) {
  int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, t = lane & 3;
  int line = 16 * warp + (lane >> 2);  // this thread's heads: line and line + 8
  uint32_t q_full = smem_address(&s.q_full), q_empty = smem_address(&s.q_empty);
  uint32_t full = smem_address(s.full), empty = smem_address(s.empty);
  uint32_t q = smem_address(s.q), keys = smem_address(s.keys), p_base = smem_address(s.p);
  // This warpgroup's half of the columns comes first, then the other one.
  uint32_t own_keys = keys + group * kTileBytes, ahead = group * 4 * kSubtile, behind = (1 - group) * 4 * kSubtile;
  uint64_t q_first = desc_k_major(q + ahead), q_second = desc_k_major(q + behind);
  uint64_t k_first = desc_k_major(own_keys + ahead), k_second = desc_k_major(own_keys + behind);
  uint64_t own_values = desc_mn_major(own_keys + ahead, kSubtile);
  uint64_t other_values = desc_mn_major(keys + (1 - group) * kTileBytes + ahead, kSubtile);
  uint64_t other_p = desc_k_major(p_base + (1 - group) * kSubtile);
  float factor = a.scale * kLog2e;
  uint32_t step = 0, item_count = 0;
  float acc[128];
  Item it;
  it.fetch(a, blockIdx.x, tiles);
  int steps = it.steps();
  for (int index = blockIdx.x; index < items; index += gridDim.x, steps = it.steps()) {
    float top[2] = {kNegInf, kNegInf}, total[2] = {0.0f, 0.0f};
    if (steps > 0) {
      mbar_wait(q_full, item_count & 1);
      ++item_count;
    }
    for (int n = 0; n < steps; ++n, ++step) {
      float z[32];
      mbar_wait(full + (2 * group + group) * 8, step & 1);
      fence_async_proxy();
      fence_regs(z);
      wgmma_fence();
      multiply_half(z, q_first, k_first, 0);
      wgmma_commit();
      mbar_wait(full + (2 * group + 1 - group) * 8, step & 1);
      fence_async_proxy();
      wgmma_fence();
      multiply_half(z, q_second, k_second, 1);
      wgmma_commit();
      wgmma_wait<0>();
      fence_regs(z);
      if (n + 1 == steps && lane == 0) mbar_arrive(q_empty);
      uint2 mask = *reinterpret_cast<const uint2*>(s.mask[group]);
      if ((mask.x & mask.y) != ~0u) {
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          int key = 8 * (j >> 1) + 2 * t + (j & 1);
          if (!((key < 32 ? mask.x : mask.y) >> (key & 31) & 1)) {
            z[4 * (j >> 1) + (j & 1)] = z[4 * (j >> 1) + 2 + (j & 1)] = kNegInf;
          }
        }
      }
      float best[2] = {kNegInf, kNegInf};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        best[0] = fmaxf(best[0], fmaxf(z[4 * j], z[4 * j + 1]));
        best[1] = fmaxf(best[1], fmaxf(z[4 * j + 2], z[4 * j + 3]));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 1));
        best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 2)) * factor;
        if (t == 0) s.top[group][line + 8 * i] = best[i];
      }
      named_barrier(1, 256);
      float shift[2], shrink[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float now = fmaxf(fmaxf(top[i], best[i]), s.top[1 - group][line + 8 * i]);
        shift[i] = now == kNegInf ? 0.0f : now;
        shrink[i] = exp2_fast(top[i] - shift[i]);
        top[i] = now;
        total[i] *= shrink[i];
      }
      uint32_t p[16];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float x = exp2_fast(fmaf(z[4 * j + 2 * i], factor, -shift[i]));
          float y = exp2_fast(fmaf(z[4 * j + 2 * i + 1], factor, -shift[i]));
          total[i] += x + y;
          p[2 * j + i] = pack_bf16(x, y);
          int r = line + 8 * i;
          store_shared(p_base + group * kSubtile + r * 128 + ((j ^ (r & 7)) << 4) + 4 * t, p[2 * j + i]);
        }
      }
      fence_async_proxy();
      if (n > 0) {
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          acc[4 * j] *= shrink[0], acc[4 * j + 1] *= shrink[0];
          acc[4 * j + 2] *= shrink[1], acc[4 * j + 3] *= shrink[1];
        }
      }
      fence_regs(acc);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        mma_m64n256k16_rs_t(acc, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3],
                            desc_advance(own_values, k * 2048), n > 0 || k > 0);
      }
      wgmma_commit();
      named_barrier(1, 256);  // both tiles' p are written
      mbar_wait(full + (2 * (1 - group) + group) * 8, step & 1);
      fence_async_proxy();
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        mma_m64n256k16_ss_t(acc, desc_advance(other_p, k * 32), desc_advance(other_values, k * 2048), 1);
      }
      wgmma_commit();
      wgmma_wait<1>();
      mbar_arrive(empty + (2 * group + group) * 8);  // all threads: each has read the mask
      wgmma_wait<0>();
      if (lane == 0) mbar_arrive(empty + (2 * (1 - group) + group) * 8);
      fence_regs(acc);
    }
    int64_t row = it.row;
    int first_head = it.head;
    // The next item's facts are under way while this one is written.
    if (index + gridDim.x < items) it.fetch(a, index + gridDim.x, tiles);
    if (steps > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        total[i] += __shfl_xor_sync(~0u, total[i], 1);
        total[i] += __shfl_xor_sync(~0u, total[i], 2);
        if (t == 0) s.total[group][line + 8 * i] = total[i];
      }
      named_barrier(1, 256);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int head = first_head + line + 8 * i;
      float sum = s.total[0][line + 8 * i] + s.total[1][line + 8 * i], extra = 0.0f;
      // Without a step the sum is an older row's. A row of NaN has no maximum either, but a sum of NaN.
      bool real = head < a.heads, empty_row = top[i] == kNegInf && (steps == 0 || sum == 0.0f);
      if (a.sink && real && !empty_row) extra = exp2_fast(a.sink[head] * kLog2e - top[i]);
      if (empty_row) {
#pragma unroll
        for (int j = 0; j < 32; ++j) acc[4 * j + 2 * i] = acc[4 * j + 2 * i + 1] = 0.0f;
      }
      int64_t place = row * a.heads + head;
      __nv_bfloat16* to = real ? a.o + place * kDim + group * 256 : nullptr;
      store_output(acc, empty_row ? 0.0f : 1.0f / (sum + extra), i, to);
      if (real && group == 0 && t == 0) {
        a.lse[place] = empty_row ? kNegInf : (top[i] + log2f(sum)) * kLn2;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) prefill_kernel(const PrefillArgs a) {
  extern __shared__ uint8_t raw[];
  PrefillSmem& s = *reinterpret_cast<PrefillSmem*>(raw + ((1024 - (smem_address(raw) & 1023)) & 1023));
  int tiles = (a.heads + kHeadTile - 1) / kHeadTile, items = a.rows * tiles;
  if (threadIdx.x == 0) {
    mbar_init(smem_address(&s.q_full), 128);
    mbar_init(smem_address(&s.q_empty), 8);
    for (int b = 0; b < 2; ++b) {
      for (int half = 0; half < 2; ++half) {
        mbar_init(smem_address(&s.full[b][half]), b == half ? 132 : 128);
        mbar_init(smem_address(&s.empty[b][half]), b == half ? 128 : 4);
      }
    }
    mbar_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < 256) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume(s, a, items, tiles);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    produce(s, a, items, tiles);
  }
}

// Every entry of every block in the table -> a bfloat16 row; 4 lanes each.
__global__ void __launch_bounds__(128)
    decode_pages_kernel(Pages pages, const int32_t* __restrict__ block_table, int64_t table_row, int blocks,
                        int64_t total, uint4* __restrict__ out) {
  int64_t at = (int64_t)blockIdx.x * 32 + threadIdx.x / 4;
  if (at >= total) return;
  int64_t capacity = (int64_t)blocks * pages.per_page, seq = at / capacity;
  int entry = (int)(at - seq * capacity), block = entry / pages.per_page;
  int64_t page = __ldg(block_table + seq * table_row + block);
  if (page < 0) return;
  uint4* row = out + at * (kDim / 8);
  decode_entry(pages, pages.pool + page * pages.stride, entry - block * pages.per_page, threadIdx.x & 3,
               is_aligned(pages), [&](int column, uint4 v) { row[column / 8] = v; });
}

}  // namespace causeway

extern "C" int causeway_decode_pages(const uint8_t* pool, int64_t stride, int per_page, int format,
                                     const int32_t* block_table, int64_t table_row, int64_t seqs, int blocks,
                                     void* out, cudaStream_t stream) {
  int64_t total = seqs * blocks * per_page;
  causeway::Pages pages = {pool, stride, per_page, format};
  causeway::decode_pages_kernel<<<(unsigned)((total + 31) / 32), 128, 0, stream>>>(
      pages, block_table, table_row, blocks, total, static_cast<uint4*>(out));
  return (int)cudaGetLastError();
}

extern "C" int causeway_attend_prefill(const void* q, int64_t q_row, int64_t q_head, const void* kv,
                                       int64_t kv_row, const int64_t* start, const int64_t* length,
                                       const uint8_t* pool, int per_page, const int32_t* block_table,
                                       int64_t table_row, const int64_t* row_seq, const int32_t* index,
                                       int64_t index_row, int index_count, const int64_t* num_entries,
                                       const void* decoded, int64_t capacity, const float* sink, float scale,
                                       void* o, float* lse, int rows, int heads, int processors,
                                       cudaStream_t stream) {
  using namespace causeway;
  PrefillArgs a = {static_cast<const __nv_bfloat16*>(q),
                   q_row,
                   q_head,
                   static_cast<const __nv_bfloat16*>(kv),
                   kv_row,
                   start,
                   length,
                   {{pool, 0, per_page, 0}, block_table, table_row, row_seq, index, index_row, index_count, num_entries},
                   static_cast<const __nv_bfloat16*>(decoded),
                   capacity,
                   sink,
                   scale,
                   static_cast<__nv_bfloat16*>(o),
                   lse,
                   rows,
                   heads};
  int bytes = sizeof(PrefillSmem) + 1024;
  cudaError_t error =
      cudaFuncSetAttribute(prefill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  int items = rows * ((heads + kHeadTile - 1) / kHeadTile);
  prefill_kernel<<<items < processors ? items : processors, kThreads, bytes, stream>>>(a);
  return (int)cudaGetLastError();
}
