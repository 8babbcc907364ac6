// Keys of index_score: from their pages through a ring in shared memory to registers.
#pragma once
#include "hopper.cuh"

namespace causeway {

constexpr int kHeads = 64;
constexpr int kDim = 128;
constexpr int kTile = 64;                  // keys of a warpgroup
constexpr int kTermBytes = kHeads * kDim;  // one row's queries, one term

struct ScoreArgs {
  const __nv_bfloat16* q;
  int64_t q_row, q_head;  // strides, elements
  const float* w;
  int64_t w_row;
  const uint8_t* pool;
  int64_t page_stride;  // bytes
  int per_page, page_shift;  // page_shift: its logarithm, -1 where it is no power of two
  const int32_t* block_table;
  int64_t table_row;
  const int64_t* row_seq;
  const int64_t* num_entries;
  float* out;
  int64_t out_row;
  int rows, width, fill;
  float w_scale;  // 0: w as it is; else w becomes bf16, then is multiplied by this
  int coarse, fine, tiles;  // of all tiles of rows the first `coarse` have one block each, the others `fine`
};

// Page of the block table, and place in it, of an entry.
__device__ __forceinline__ int block_of(const ScoreArgs& a, int entry) {
  if (a.page_shift >= 0) return entry >> a.page_shift;
  return (int)((unsigned)entry / (unsigned)a.per_page);
}

struct KeyTile {
  uint32_t words[2][8];  // rows g and g + 8 of the warp's 16
  float scale[2];        // NaN: the page is not here
};

// 16 keys of one warp, on their way or landed; chunks of odd rows swap halves (bank conflicts).
struct alignas(16) WarpKeys {
  uint8_t bytes[16][kDim];
  float scale[16];
};

// Where a key of a warp lies: lanes 0..15 know one each. page < 0: nowhere.
struct Place {
  int page, offset;
};

__device__ __forceinline__ void copy4_async(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(shared)), "l"(global)
               : "memory");
}

__device__ __forceinline__ Place find_key(const ScoreArgs& a, const int32_t* table, int entry, int limit) {
  if (entry >= limit) return {-1, 0};
  int block = block_of(a, entry);
  return {__ldg(table + block), entry - block * a.per_page};
}

// Starts the copy of a warp's 16 keys and scales.
__device__ __forceinline__ void start_keys(WarpKeys& to, const ScoreArgs& a, Place place, bool aligned) {
  int lane = threadIdx.x & 31;
  int64_t page = (int64_t)place.page * a.page_stride, key = place.page < 0 ? -1 : page + place.offset * kDim;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int row = 4 * j + (lane >> 3), chunk = lane & 7;
    int64_t from = __shfl_sync(~0u, key, row);
    const uint8_t* source = a.pool + max(from, (int64_t)0) + chunk * 16;
    uint32_t target = smem_address(&to.bytes[row][(chunk ^ ((row & 1) << 2)) * 16]);
    if (aligned) {
      copy16_async(target, source, from >= 0);
    } else {
      store_shared(target, from >= 0 ? load16(source, false) : make_uint4(0, 0, 0, 0));
    }
  }
  if (lane < 16) {
    const uint8_t* source = a.pool + page + (int64_t)a.per_page * kDim + place.offset * 4;
    if (place.page < 0) {
      to.scale[lane] = __int_as_float(0x7fffffff);
    } else {
      copy4_async(&to.scale[lane], source);
    }
  }
}

// The same where pages hold multiples of 16 keys and lie at multiples of 16 bytes: a warp's keys lie together, `first` being theirs.
__device__ __forceinline__ void start_page_keys(WarpKeys& to, const ScoreArgs& a, Place first) {
  int lane = threadIdx.x & 31;
  bool here = first.page >= 0;
  const uint8_t* page = a.pool + (int64_t)max(first.page, 0) * a.page_stride;
  const uint8_t* source = page + first.offset * kDim + lane * 16;
  int row = lane >> 3, chunk = (lane & 7) ^ ((row & 1) << 2);
  uint32_t target = smem_address(&to.bytes[row][chunk * 16]);
#pragma unroll
  for (int j = 0; j < 4; ++j) copy16_async(target + 4 * j * kDim, source + 4 * j * kDim, here);
  if (lane < 16) {
    if (here) {
      copy4_async(&to.scale[lane], page + (int64_t)a.per_page * kDim + (first.offset + lane) * 4);
    } else {
      to.scale[lane] = __int_as_float(0x7fffffff);
    }
  }
}

__device__ __forceinline__ void read_keys(KeyTile& tile, const WarpKeys& from) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = 8 * half + (lane >> 2), swap = (row & 1) << 2;
    uint4 low = *reinterpret_cast<const uint4*>(&from.bytes[row][((lane & 3) ^ swap) * 16]);
    uint4 high = *reinterpret_cast<const uint4*>(&from.bytes[row][((lane & 3) ^ swap ^ 4) * 16]);
    tile.words[half][0] = low.x, tile.words[half][1] = low.y;
    tile.words[half][2] = low.z, tile.words[half][3] = low.w;
    tile.words[half][4] = high.x, tile.words[half][5] = high.y;
    tile.words[half][6] = high.z, tile.words[half][7] = high.w;
    tile.scale[half] = from.scale[row];
  }
}

// One warp's keys of every `stride`-th tile from `begin` on, several tiles on their way.
template <int kDepth, bool kTogether>
struct KeyStream {
  WarpKeys* ring;
  const int32_t* table;
  int own, stride, limit;  // own: this lane's key within a tile
  bool aligned;
  Place next;
  int slot, ahead;

  __device__ __forceinline__ void start(WarpKeys& to, const ScoreArgs& a, Place place) {
    if constexpr (kTogether) {
      start_page_keys(to, a, place);
    } else {
      start_keys(to, a, place, aligned);
    }
  }

  __device__ __forceinline__ void open(const ScoreArgs& a, int seq, int begin, int entries) {
    int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    table = a.block_table + (int64_t)max(seq, 0) * a.table_row;
    limit = entries;
    aligned = ((uintptr_t)a.pool | (uintptr_t)a.page_stride) % 16 == 0;
    own = 16 * warp + (kTogether ? 0 : lane & 15);
    Place place[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) place[d] = find_key(a, table, begin + d * stride + own, limit);
#pragma unroll
    for (int d = 0; d < kDepth - 1; ++d) {
      if (begin + d * stride < limit) start(ring[d], a, place[d]);
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
    next = place[kDepth - 1];
    slot = 0, ahead = kDepth - 1;
  }

  // The keys of `tile`; the copy of a later tile starts.
  __device__ __forceinline__ void take(KeyTile& keys, const ScoreArgs& a, int tile) {
    if (tile + (kDepth - 1) * stride < limit) start(ring[ahead], a, next);
    asm volatile("cp.async.commit_group;\ncp.async.wait_group %0;" ::"n"(kDepth - 1) : "memory");
    next = find_key(a, table, tile + kDepth * stride + own, limit);
    __syncwarp();
    read_keys(keys, ring[slot]);
    __syncwarp();
    slot = slot + 1 == kDepth ? 0 : slot + 1;
    ahead = ahead + 1 == kDepth ? 0 : ahead + 1;
  }

  __device__ __forceinline__ void close() {
    copies_wait_all();
    __syncwarp();
  }
};

}  // namespace causeway
