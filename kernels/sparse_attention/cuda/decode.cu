// sparse_attention over paged keys (decode): the launcher. Contract: kernels/sparse_attention/api.py.
//
// The keys of a query (window slots, then entries) are cut into chunks of 160 (80 for at most 16 heads) at fixed
// places. Persistent blocks take one (row, 64 heads, chunk) after the other. A row of one chunk is finished at once;
// the chunks of a longer row leave their sums (bfloat16) and maxima to a second kernel. Which of the two happens
// depends on the row alone. More than 16 heads: decode_wide.cuh. Fewer: decode_narrow.cuh.
#include "decode_merge.cuh"
#include "decode_narrow.cuh"
#include "decode_plan.cuh"
#include "decode_wide.cuh"
#include "launch.cuh"
#include "query_map.h"

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
                  static_cast<uint4*>(partial),
                  static_cast<float2*>(stats),
                  rows,
                  heads,
                  (heads + kHeadTile - 1) / kHeadTile,
                  (heads < kHeadTile ? heads + 7 : kHeadTile) / 8 * 8,
                  chunks,
                  capacity,
                  0,
                  0,
                  Divisor(ring_per_page),
                  Divisor(per_page),
                  Divisor((heads + kHeadTile - 1) / kHeadTile * chunks),
                  Divisor(chunks)};
  bool narrow = heads <= kFewHeads;
  int64_t items = (int64_t)rows * a.tiles * chunks, blocks = narrow ? 2 * processors : processors;
  if (items < blocks) blocks = items;
  a.many = items > blocks;
  a.ragged = pool != nullptr && index == nullptr && a.many;
  auto is_plain = [](const Pages& p) {
    return p.format != kFp8 || ((uintptr_t)p.pool | (uintptr_t)p.stride) % 16 != 0;
  };
  bool plain = (window > 0 && is_plain(a.ring)) || (pool != nullptr && is_plain(a.entries.pages));
  auto launch = [&](auto kernel, int threads, int bytes, auto... arguments) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    return EarlyLaunch{blocks, threads, stream, bytes}.start(kernel, arguments...);
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
  int warps = narrow ? kMergeWarps<kNarrowKeys> : kMergeWarps<kChunk>;
  EarlyLaunch merging{(int64_t)rows * a.tiles, 32 * warps, stream};
  merging.y = a.tile_heads / 8, merging.z = kPieces / warps;
  return merging.start(narrow ? merge_chunks_kernel<kNarrowKeys> : merge_chunks_kernel<kChunk>, a);
}
