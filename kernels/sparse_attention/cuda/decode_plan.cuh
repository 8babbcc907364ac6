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

// Division of numbers below 2^31 by one that is known on the host: a multiplication. What lies between the end of the
// kernel ahead and the first copies is as long as its instructions.
struct Divisor {
  uint32_t factor;
  int shift;

  explicit Divisor(int by) : shift(31) {
    while ((1ll << (shift - 31)) < by) ++shift;
    factor = (uint32_t)((1ull << shift) / by + 1);
  }
  __device__ __forceinline__ int quotient(int x) const { return (int)((uint64_t)(uint32_t)x * factor >> shift); }
};

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
  uint4* partial;          // [rows * tiles * chunks, tile_heads / 8, kPieces, 32 lanes]: see partial_of
  float2* stats;           // [rows * tiles * chunks, tile_heads]: maximum (base 2) and sum of a chunk
  int rows, heads, tiles;
  int tile_heads;  // of a tile, in whole blocks of 8
  int chunks;    // of a row, at most
  int capacity;  // entries that a row's table has room for
  int ragged;    // many chunks may not exist: items are counted, not computed
  int many;      // a block may have more than one item
  Divisor ring_page, entry_page;  // entries of a page
  Divisor row_items, tile_items;  // items of a row and of a tile, if all chunks exist
};

// One chunk of a (row, 64 heads or fewer). Items are numbered row by row, tile by tile, chunk by chunk.
struct Item {
  int row, seq, tile, chunk, chunks, limit, number;
};

// What the tables say of a row. The reads are issued where they are written, and waited for where they are used.
struct RowFacts {
  int64_t seq, count;

  __device__ __forceinline__ RowFacts() {}
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

  // Item `number`, where all chunks exist. What the tables say of it is not known yet.
  static __device__ __forceinline__ Item item(const DecodeArgs& a, int number) {
    Item it = {};
    it.number = number;
    if (a.ragged) return it;
    it.row = a.row_items.quotient(number);
    int rest = number - it.row * a.tiles * a.chunks;
    it.tile = a.tile_items.quotient(rest);
    it.chunk = rest - it.tile * a.chunks;
    return it;
  }

  // While the kernel ahead still runs: brings what `find` will read of an item nearer. Uses nothing of it.
  static __device__ __forceinline__ void warm(const DecodeArgs& a, const Item& it, int at) {
    if (a.ragged || at < 0) return;
    int in_row = it.chunk * kKeys + at;
    if (in_row < a.window) {
      prefetch(a.slots + it.row * a.slots_row + in_row);
    } else if (a.entries.index != nullptr && in_row - a.window < a.entries.index_count) {
      prefetch(a.entries.index + it.row * a.entries.index_row + in_row - a.window);
    }
    if (a.entries.pages.pool == nullptr || at != 0) return;  // one thread of a block is enough
    prefetch(a.entries.row_seq + it.row);
    prefetch(a.entries.num_entries + it.row);
  }

  // What the tables say of `it`, a result of `item`, and what is listed for key `at` of its chunk (-1: no key).
  __device__ __forceinline__ bool find(const DecodeArgs& a, Item& it, int at, int64_t& key) {
    int first = 0;
    if (a.ragged) {
      if (!(a.rows <= 32 ? search<1>(a, it, first) : search<4>(a, it, first))) return false;
    } else {
      if (it.row >= a.rows) return false;
      RowFacts facts(a, it.row);  // under way together with the list
      key = at >= 0 ? listed_key(a, it.row, it.chunk * kKeys + at) : -1;
      it.limit = facts.limit(a);
      it.seq = (int)facts.seq;
    }
    it.chunks = count_chunks<kKeys>(a, it.limit);
    if (a.ragged) {
      it.tile = a.tiles == 1 ? 0 : (it.number - first) / it.chunks;  // a division takes as long as a shuffle or four
      it.chunk = it.number - first - it.tile * it.chunks;
      key = at >= 0 ? listed_key(a, it.row, it.chunk * kKeys + at) : -1;
    }
    return true;
  }

  // Likewise of the first item from `it` on that exists.
  __device__ __forceinline__ bool find_existing(const DecodeArgs& a, Item& it, int at, int64_t& key) {
    for (;; it = item(a, it.number + gridDim.x)) {
      if (!find(a, it, at, key)) return false;
      if (it.chunk < it.chunks) return true;
    }
  }

 private:
  // Row, sequence and limit of item `it.number`, and the number of the row's first. A lane has kRows rows.
  template <int kRows>
  __device__ bool search(const DecodeArgs& a, Item& it, int& at) {
    int lane = threadIdx.x & 31;
    for (; row0 < a.rows; row0 += 32 * kRows) {
      int mine = row0 + kRows * lane, seqs[kRows], limits[kRows], count[kRows], sum = 0;
      RowFacts facts[kRows];  // all under way at once
#pragma unroll
      for (int k = 0; k < kRows; ++k) facts[k] = RowFacts(a, min(mine + k, a.rows - 1));
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        seqs[k] = (int)facts[k].seq, limits[k] = facts[k].limit(a);
        count[k] = mine + k < a.rows ? count_chunks<kKeys>(a, limits[k]) * a.tiles : 0;
        sum += count[k];
      }
      int end = sum;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(~0u, end, step);
        if (lane >= step) end += other;
      }
      int all = __shfl_sync(~0u, end, 31);
      if (it.number >= before + all) {
        before += all;
        continue;
      }
      int source = __ffs(__ballot_sync(~0u, before + end > it.number)) - 1;
      int row = mine, seq = seqs[0], limit = limits[0];
      at = before + end - sum;
#pragma unroll
      for (int k = 0; k < kRows - 1; ++k) {
        if (it.number < at + count[k] || row != mine + k) continue;
        at += count[k], ++row, seq = seqs[k + 1], limit = limits[k + 1];
      }
      it.row = __shfl_sync(~0u, row, source), at = __shfl_sync(~0u, at, source);
      it.seq = __shfl_sync(~0u, seq, source), it.limit = __shfl_sync(~0u, limit, source);
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
      int slot = (int)key;  // no memory has room for more
      place.page = a.ring_page.quotient(slot);
      place.offset = slot - place.page * a.ring.per_page;
    }
  } else if (key >= 0 && key < it.limit) {
    int block = a.entry_page.quotient((int)key);
    place.page = __ldg(a.entries.block_table + (int64_t)it.seq * a.entries.table_row + block);
    place.offset = (int)key - block * a.entries.pages.per_page;
  }
  return place;
}

// Partial results lie as the products leave them: lane 4 g + t has, of head g of a block of 8 heads, columns 8 j + 2 t
// and the next for j = 0..3 of a piece of 32 columns. A warp stores and reads pieces in whole lines; the merge kernel
// puts columns in order, when there are fewer of them.
constexpr int kPieces = kDim / 32;
constexpr int kLineBlock = kPieces * 32;  // words of 8 heads

__device__ __forceinline__ uint4* partial_of(const DecodeArgs& a, const Item& it, int block, int piece) {
  int64_t slot = ((int64_t)it.row * a.tiles + it.tile) * a.chunks + it.chunk;
  return a.partial + (slot * (a.tile_heads / 8) + block) * kLineBlock + piece * 32 + (threadIdx.x & 31);
}
// Rows g + 8 i of an accumulator of 64 rows: pieces that follow each other.
template <int kValues>
__device__ __forceinline__ void store_partial(const float (&d)[kValues], int i, uint4* to) {
#pragma unroll
  for (int j = 0; j < kValues / 4; j += 4) {
    uint32_t w[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) w[u] = pack_bf16(d[4 * (j + u) + 2 * i], d[4 * (j + u) + 2 * i + 1]);
    to[j * 8] = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

// Logit of a head's sink; to be read before it is needed.
__device__ __forceinline__ float sink_of(const DecodeArgs& a, int head) {
  float sink = kNegInf;
  if (a.sink != nullptr && head < a.heads) asm volatile("ld.global.f32 %0, [%1];" : "=f"(sink) : "l"(a.sink + head));
  return sink;
}
// Factor of the sum of one head. `top` is in base 2.
__device__ __forceinline__ float finish(const DecodeArgs& a, int64_t row, int head, float top, float total, float sink,
                                        bool write_lse) {
  bool empty = top == kNegInf && total == total;  // a maximum does not show NaN
  float extra = empty ? 0.0f : exp2_fast(sink * kLog2e - top);
  if (write_lse) a.lse[row * a.heads + head] = empty ? kNegInf : (top + log2f(total)) * kLn2;
  return empty ? 0.0f : 1.0f / (total + extra);
}

}  // namespace causeway
