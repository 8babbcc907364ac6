// The producer: queries and keys of one (row, 64 heads) after the other, as tiles of a ring.
#pragma once
#include "copy_engine.cuh"
#include "prefill_tile.cuh"

namespace causeway {

// Says how many bytes the copy engine brings; arrives not.
__device__ __forceinline__ void expect_bytes(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// What there is to know of a query row's keys.
struct Row {
  int64_t seq, start;
  int window, entries, limit;

  __device__ __forceinline__ Row(const PrefillArgs& a, int row) {
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
  __device__ __forceinline__ int num_tiles() const { return (window + entries + kTileKeys - 1) / kTileKeys; }
};

__device__ __forceinline__ bool has_page(const PrefillArgs& a, const Row& r, int entry) {
  unsigned block = (unsigned)entry / (unsigned)a.entries.pages.per_page;
  return __ldg(a.entries.block_table + r.seq * a.entries.table_row + block) >= 0;
}

// Address of the key at position `at` of a row, null when there is none.
__device__ __forceinline__ const uint8_t* key_row(const PrefillArgs& a, const Row& r, int row, int at) {
  if (at < r.window) return reinterpret_cast<const uint8_t*>(a.kv + (r.start + at) * a.kv_row);
  int place = at - r.window;
  if (place >= r.entries) return nullptr;
  int entry = entry_at(a.entries, row, place, r.limit);
  if (entry < 0 || !has_page(a, r, entry)) return nullptr;
  return reinterpret_cast<const uint8_t*>(a.decoded + (r.seq * a.capacity + entry) * kDim);
}

// Half a tile whose 32 keys all exist and lie one behind the other: the copy engine brings it. The answer is
// the same for all threads.
__device__ __forceinline__ bool is_dense(const PrefillArgs& a, const Row& r, int at) {
  if (at + 32 <= r.window) return true;
  int place = at - r.window;
  if (a.entries.index || place < 0 || place + 32 > r.limit) return false;
  return __all_sync(~0u, has_page(a, r, place + (threadIdx.x & 31)));
}

// Rows of 1 KB to swizzled subtiles: this thread copies chunk `lane & 7` of two rows of a half.
__device__ __forceinline__ void copy_rows(uint32_t tile, const uint8_t* own, const uint8_t* anything, int half) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, chunk = lane & 7;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int r = 32 * half + 8 * warp + (lane >> 3) + 4 * i;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(
        __shfl_sync(~0u, (unsigned long long)own, 8 * half + (lane >> 3) + 4 * i));
    bool there = from != nullptr;
    uint32_t to = tile + r * 128 + ((chunk ^ (r & 7)) << 4);
    from = (there ? from : anything) + chunk * 16;
#pragma unroll
    for (int j = 0; j < 8; ++j) copy16_async(to + j * kSubtile, from + j * 128, there);
  }
}

__device__ void produce(PrefillSmem& s, const PrefillArgs& a, const PrefillMaps& maps) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  bool elected = warp == 0 && lane == 0;
  uint32_t full = smem_address(s.full), empty = smem_address(s.empty), memory = smem_address(s.tiles);
  const uint8_t* anything = reinterpret_cast<const uint8_t*>(a.q);
  Place slot;
  int parity = 0;
  for (Walk walk(a); walk.row < a.rows; walk.next(a)) {
    Row r(a, walk.row);
    int count = r.num_tiles();
    for (int half = 0; half < 2; ++half) mbar_wait(empty + (2 * slot.at + half) * 8, slot.round ^ 1);
    if (elected) {
      s.num_tiles[slot.at] = count;
      if (count > 0) {
        expect_bytes(full + slot.at * 8, kTileBytes);
        for (int j = 0; j < 8; ++j) {
          uint32_t to = j < 7 ? memory + slot.at * kTileBytes + j * kSubtile : smem_address(s.q_last[parity]);
          load_3d(&maps.queries, to, full + slot.at * 8, 64 * j, walk.head(), walk.row);
        }
      }
    }
    parity ^= count > 0;
    mbar_arrive(full + slot.at * 8);
    if (lane == 0) mbar_arrive(full + slot.at * 8);
    slot.next(kSlots);
    // This lane's key of a tile: lanes of a warp have eight of each half.
    int mine = 32 * ((lane >> 3) & 1) + 8 * warp + (lane & 7);
    for (int n = 0; n < count; ++n, slot.next(kSlots)) {
      uint32_t tile = memory + slot.at * kTileBytes;
      bool dense[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) dense[half] = is_dense(a, r, n * kTileKeys + 32 * half);
      const uint8_t* own = anything;
      if (!(mine < 32 ? dense[0] : dense[1])) own = key_row(a, r, walk.row, n * kTileKeys + mine);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mbar_wait(empty + (2 * slot.at + half) * 8, slot.round ^ 1);
        if (!dense[half]) {
          copy_rows(tile, own, anything, half);
        } else if (elected) {
          int at = n * kTileKeys + 32 * half;
          bool window = at < r.window;
          int from = (int)(window ? r.start + at : r.seq * a.capacity + at - r.window);
          expect_bytes(full + slot.at * 8, kTileBytes / 2);
          for (int j = 0; j < 8; ++j) {
            load_2d(window ? &maps.window : &maps.entries, tile + j * kSubtile + half * (kSubtile / 2),
                    full + slot.at * 8, 64 * j, from);
          }
        }
        __syncwarp();
      }
      mbar_arrive_after_copies(full + slot.at * 8);
      uint32_t mask = __ballot_sync(~0u, own != nullptr);
      if (lane == 0) {
        s.mask[slot.at][warp] = (uint8_t)mask;
        s.mask[slot.at][4 + warp] = (uint8_t)(mask >> 8);
        mbar_arrive(full + slot.at * 8);
      }
    }
  }
}

}  // namespace causeway
