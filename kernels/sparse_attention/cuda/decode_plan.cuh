// Decode: what a block works on, and how the chunks of a row become its result. See decode.cu.
#pragma once
#include "hopper.cuh"
#include "pages.cuh"

namespace causeway {

constexpr int kHeadTile = 64;
constexpr int kTileKeys = 32;  // of a warpgroup
constexpr int kTiles = 5;
constexpr int kChunk = kTiles * kTileKeys;
constexpr int kFewHeads = 16;    // so many have a kernel of their own, with smaller chunks
constexpr int kNarrowKeys = 80;  // of its chunks

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

// One chunk of a (row, 64 heads or fewer). Items are numbered row by row, tile by tile, chunk by chunk.
struct Item {
  int row, seq, tile, chunk, chunks, limit, number;
};

// What the tables say of a row. The reads are issued where they are written, and waited for where they are used.
struct RowFacts {
  int64_t seq, count;

  __device__ __forceinline__ RowFacts(const DecodeArgs& a, int64_t row) : seq(-1), count(0) {
    if (a.entries.pages.pool == nullptr) return;
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(seq) : "l"(a.entries.row_seq + row));
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(count) : "l"(a.entries.num_entries + row));
  }
  // Entries that the row sees.
  __device__ __forceinline__ int limit(const DecodeArgs& a) const {
    return seq < 0 ? 0 : (int)min(max(count, (int64_t)0), (int64_t)a.capacity);
  }
};
__device__ __forceinline__ int visible_keys(const DecodeArgs& a, int limit) {
  return a.window + (limit == 0 ? 0 : a.entries.index ? a.entries.index_count : limit);
}
// A row without keys has one chunk too: it writes the result.
template <int kKeys>
__device__ __forceinline__ int count_chunks(const DecodeArgs& a, int limit) {
  return max(1, (visible_keys(a, limit) + kKeys - 1) / kKeys);
}

// What the slot list or the index holds for position `at` of a row's keys; -1: nothing.
__device__ __forceinline__ int64_t listed_key(const DecodeArgs& a, int64_t row, int at) {
  if (at < a.window) return __ldg(a.slots + row * a.slots_row + at);
  at -= a.window;
  if (a.entries.index == nullptr) return at;
  return at < a.entries.index_count ? __ldg(a.entries.index + row * a.entries.index_row + at) : -1;
}

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Finds items in ascending order. Every warp searches for itself: no barrier, no shared memory.
template <int kKeys>
struct Walk {
  int row0 = 0, before = 0;  // rows that are behind, and their items

  // While the kernel ahead still runs: brings what `find` will read of a block's first item nearer. Uses nothing of it.
  static __device__ __forceinline__ void warm(const DecodeArgs& a, int number, int at) {
    if (a.ragged || at < 0) return;
    int items = a.chunks * a.tiles, row = number / items;
    at += (number - row * items) % a.chunks * kKeys;
    if (at < a.window) {
      prefetch(a.slots + row * a.slots_row + at);
    } else if (a.entries.index != nullptr && at - a.window < a.entries.index_count) {
      prefetch(a.entries.index + row * a.entries.index_row + at - a.window);
    }
    if (a.entries.pages.pool == nullptr || at % kKeys != 0) return;  // one thread of a block is enough
    prefetch(a.entries.row_seq + row);
    prefetch(a.entries.num_entries + row);
  }

  // Item `number`, and what is listed for key `at` of its chunk (-1: no key).
  __device__ __forceinline__ bool find(const DecodeArgs& a, int number, int at, Item& it, int64_t& key) {
    int row, first;
    if (!a.ragged) {
      row = number / (a.chunks * a.tiles), first = row * a.tiles * a.chunks;
      if (row >= a.rows) return false;
    } else if (!search(a, number, row, first)) {
      return false;
    }
    it.row = row;
    it.number = number;
    RowFacts facts(a, row);  // under way together with the list
    if (!a.ragged) list(a, number - first, a.chunks, at, it, key);
    it.limit = facts.limit(a);
    it.seq = (int)facts.seq;
    it.chunks = count_chunks<kKeys>(a, it.limit);
    if (a.ragged) list(a, number - first, it.chunks, at, it, key);
    return true;
  }

  // Likewise of the first item from `number` on that exists.
  __device__ __forceinline__ bool find_existing(const DecodeArgs& a, int number, int at, Item& it, int64_t& key) {
    for (;; number += gridDim.x) {
      if (!find(a, number, at, it, key)) return false;
      if (it.chunk < it.chunks) return true;
    }
  }

 private:
  static __device__ __forceinline__ void list(const DecodeArgs& a, int number, int chunks, int at, Item& it,
                                              int64_t& key) {
    it.tile = number / chunks;
    it.chunk = number - it.tile * chunks;
    key = at >= 0 ? listed_key(a, it.row, it.chunk * kKeys + at) : -1;
  }
  __device__ bool search(const DecodeArgs& a, int number, int& row, int& at) {
    int lane = threadIdx.x & 31;
    for (; row0 < a.rows; row0 += 128) {
      int mine = row0 + 4 * lane, last = a.rows - 1, count[4], sum = 0;
      const RowFacts facts[4] = {{a, min(mine, last)}, {a, min(mine + 1, last)}, {a, min(mine + 2, last)},
                                 {a, min(mine + 3, last)}};  // all under way at once
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        count[k] = mine + k < a.rows ? count_chunks<kKeys>(a, facts[k].limit(a)) * a.tiles : 0;
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
