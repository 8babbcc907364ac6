// sparse_attention with contiguous window rows (prefill). Contract: kernels/sparse_attention/api.py.
//
// First the pages' entries become bfloat16 rows of a workspace (once, not once per query). Then a
// persistent kernel walks over (query row, 64 heads), with a role for each of its four warpgroups. The
// producer copies queries and then keys to a ring of three tiles of 64 rows. One warpgroup makes scores
// and probabilities; its queries are in registers, so a product reads only keys from shared memory, and
// their place in the ring is free for keys. Two warpgroups sum values, half of the columns each. Each
// role goes on to the next row when it is through: the next row's scores are made while this one's
// output is written.
#include "prefill_load.cuh"
#include "prefill_scores.cuh"
#include "prefill_values.cuh"

namespace causeway {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const PrefillArgs a, const __grid_constant__ PrefillMaps maps) {
  // Aligned by declaration: addresses that are known cost no registers, of which there are none to spare.
  extern __shared__ __align__(1024) uint8_t raw[];
  PrefillSmem& s = *reinterpret_cast<PrefillSmem*>(raw);
  if (smem_address(raw) % 1024) __trap();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      mbar_init(smem_address(&s.full[i]), 132);
      for (int half = 0; half < 2; ++half) mbar_init(smem_address(&s.empty[i][half]), 8);
    }
    for (int i = 0; i < 2; ++i) {
      mbar_init(smem_address(&s.p_full[i]), 4);
      mbar_init(smem_address(&s.p_empty[i]), 8);
    }
    mbar_init(smem_address(&s.factor_full), 4);
    mbar_fence_init();
  }
  __syncthreads();
  int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
  if (group < 2) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    sum_values(s, a, group);
  } else if (group == 2) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 168;");
    score(s, a);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    produce(s, a, maps);
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
                                       int64_t kv_row, int64_t kv_rows, const int64_t* start, const int64_t* length,
                                       const uint8_t* pool, int per_page, const int32_t* block_table,
                                       int64_t table_row, const int64_t* row_seq, const int32_t* index,
                                       int64_t index_row, int index_count, const int64_t* num_entries,
                                       const void* decoded, int64_t capacity, int64_t seqs, const float* sink,
                                       float scale, void* o, float* lse, int rows, int heads, int processors,
                                       cudaStream_t stream) {
  using namespace causeway;
  PrefillArgs a = {static_cast<const __nv_bfloat16*>(q),
                   static_cast<const __nv_bfloat16*>(kv),
                   kv_row,
                   start,
                   length,
                   {{pool, 0, per_page, 0}, block_table, table_row, row_seq, index, index_row, index_count,
                    num_entries},
                   static_cast<const __nv_bfloat16*>(decoded),
                   capacity,
                   sink,
                   scale * kLog2e,
                   static_cast<__nv_bfloat16*>(o),
                   lse,
                   rows,
                   heads};
  a.tiles = (heads + kHeadTile - 1) / kHeadTile;
  int blocks = min(rows * a.tiles, processors);
  a.row_step = blocks / a.tiles, a.tile_step = blocks % a.tiles;
  PrefillMaps maps = {};
  int code = map_queries(maps.queries, q, q_row, q_head, rows, heads);
  if (code == 0 && kv_rows > 0) code = map_keys(maps.window, kv, kv_row, kv_rows);
  if (code == 0 && pool != nullptr) code = map_keys(maps.entries, decoded, kDim, seqs * capacity);
  if (code != 0) return code;
  int bytes = sizeof(PrefillSmem);
  cudaError_t error =
      cudaFuncSetAttribute(prefill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  prefill_kernel<<<blocks, kThreads, bytes, stream>>>(a, maps);
  return (int)cudaGetLastError();
}
