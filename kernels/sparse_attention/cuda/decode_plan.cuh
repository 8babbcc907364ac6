// Decode: what a block works on, and how the chunks of a row become its result. See decode.cu.
#pragma once
#include "hopper.cuh"
#include "pages.cuh"

namespace causeway {

constexpr int kHeadTile = 64;
constexpr int kTileKeys = 80;
constexpr int kChunk = 2 * kTileKeys;

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
  __nv_bfloat16* partial;  // [rows * tiles * chunks, tile_heads, 512]
  float2* stats;           // [rows * tiles * chunks, tile_heads]: maximum (base 2) and sum of a chunk
  int rows, heads, tiles, tile_heads;
  int chunks;    // of a row, at most
  int capacity;  // entries that a row's table has room for
  int ragged;  // many chunks may not exist: items are counted, not computed
};

// One chunk of a (row, 64 heads). Items are numbered row by row, tile by tile, chunk by chunk.
struct Item {
  int row, seq, tile, chunk, chunks, limit;
};

__device__ __forceinline__ int seen_entries(const DecodeArgs& a, int64_t row, int64_t& seq) {
  seq = -1;
  if (a.entries.pages.pool == nullptr) return 0;
  seq = a.entries.row_seq[row];
  int64_t count = a.entries.num_entries[row];  // both loads under way at once
  return seq < 0 ? 0 : (int)min(max(count, (int64_t)0), (int64_t)a.capacity);
}
__device__ __forceinline__ int visible_keys(const DecodeArgs& a, int limit) {
  return a.window + (limit == 0 ? 0 : a.entries.index ? a.entries.index_count : limit);
}
// A row without keys has one chunk too: it writes the result.
__device__ __forceinline__ int count_chunks(const DecodeArgs& a, int limit) {
  return max(1, (visible_keys(a, limit) + kChunk - 1) / kChunk);
}

// Finds items in ascending order. Every warp searches for itself: no barrier, no shared memory.
struct Walk {
  int row0 = 0, before = 0;  // rows that are behind, and their items

  __device__ __forceinline__ bool find(const DecodeArgs& a, int number, Item& it) {
    int row, at;
    if (!a.ragged) {
      int pair = number / a.chunks;
      row = pair / a.tiles, at = row * a.tiles * a.chunks;
      if (row >= a.rows) return false;
    } else if (!search(a, number, row, at)) {
      return false;
    }
    it.row = row;
    int64_t seq;
    it.limit = seen_entries(a, row, seq);
    it.seq = (int)seq;
    it.chunks = count_chunks(a, it.limit);
    int stride = a.ragged ? it.chunks : a.chunks;
    it.tile = (number - at) / stride;
    it.chunk = number - at - it.tile * stride;
    return true;
  }

 private:
  __device__ bool search(const DecodeArgs& a, int number, int& row, int& at) {
    int lane = threadIdx.x & 31;
    for (; row0 < a.rows; row0 += 128) {
      int count[4], sum = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        int64_t r = row0 + 4 * lane + k, seq;
        count[k] = r < a.rows ? count_chunks(a, seen_entries(a, r, seq)) * a.tiles : 0;
        sum += count[k];
      }
      int end = sum;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(~0u, end, step);
        if (lane >= step) end += other;
      }
      int all = __shfl_sync(~0u, end, 31);
      if (number >= before + all) {
        before += all;
        continue;
      }
      int source = __ffs(__ballot_sync(~0u, before + end > number)) - 1;
      row = row0 + 4 * lane, at = before + end - sum;
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        if (number >= at + count[k] && row == row0 + 4 * lane + k) at += count[k], ++row;
      }
      row = __shfl_sync(~0u, row, source), at = __shfl_sync(~0u, at, source);
      return true;
    }
    return false;
  }
};

// Where a key lies: page -1 is no key.
struct Place {
  int page, offset;
};

// What the slot list or the index holds for position `at` of a row's keys; -1: nothing.
__device__ __forceinline__ int64_t listed_key(const DecodeArgs& a, int64_t row, int at) {
  if (at < a.window) return __ldg(a.slots + row * a.slots_row + at);
  at -= a.window;
  if (a.entries.index == nullptr) return at;
  return at < a.entries.index_count ? __ldg(a.entries.index + row * a.entries.index_row + at) : -1;
}

__device__ __forceinline__ Place locate_key(const DecodeArgs& a, const Item& it, int at, int64_t key) {
  Place place = {-1, 0};
  if (at < a.window) {
    if (key >= 0) {
      place.page = (int)(key / a.ring.per_page);
      place.offset = (int)(key - (int64_t)place.page * a.ring.per_page);
    }
  } else if (key >= 0 && key < it.limit) {
    int block = (unsigned)key / (unsigned)a.entries.pages.per_page;
    place.page = __ldg(a.entries.block_table + (int64_t)it.seq * a.entries.table_row + block);
    place.offset = (int)key - block * a.entries.pages.per_page;
  }
  return place;
}

// Factor of the sum of one head. `top` is in base 2.
__device__ __forceinline__ float finish(const DecodeArgs& a, int64_t row, int head, float top, float total,
                                        bool write_lse) {
  bool empty = top == kNegInf;
  float extra = a.sink && !empty ? exp2_fast(a.sink[head] * kLog2e - top) : 0.0f;
  if (write_lse) a.lse[row * a.heads + head] = empty ? kNegInf : (top + log2f(total)) * kLn2;
  return empty ? 0.0f : 1.0f / (total + extra);
}

}  // namespace causeway
