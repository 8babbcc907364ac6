// What the warpgroups of the prefill kernel share: arguments, memory, the ring of tiles.
#pragma once
#include "hopper.cuh"
#include "pages.cuh"
#include "query_map.h"
#include "wgmma.cuh"

namespace causeway {

constexpr int kHeadTile = 64;
constexpr int kTileKeys = 64;
constexpr int kTileBytes = kTileKeys * kDim * 2;
constexpr int kSubtile = 64 * 128;  // 64 rows of 64 bfloat16 values, swizzled
constexpr int kSlots = 3;
// Products of 16 columns whose queries stay in registers, as many as fit; then one whose queries its warpgroup
// leaves in shared memory, and those of the last subtile, which the producer copies to a place of its own.
constexpr int kHeld = 27;

// What comes with probabilities: a tile of keys (none for a row without keys), the row's end, a new maximum.
constexpr int kTile = 1, kLast = 2, kShrink = 4;

// As the copy engine reads them.
struct PrefillMaps {
  CUtensorMap queries, window, entries;
};

struct PrefillArgs {
  const __nv_bfloat16* q;  // an address that can be read: queries come through their map
  const __nv_bfloat16* kv;
  int64_t kv_row;
  const int64_t* start;
  const int64_t* length;
  Entries entries;              // pages.pool null: no entries
  const __nv_bfloat16* decoded;  // [S * capacity, 512]
  int64_t capacity;
  const float* sink;
  float scale;  // of base-2 logits
  __nv_bfloat16* o;
  float* lse;
  int rows, heads;
  int tiles, row_step, tile_step;  // of 64 heads; from an item of a block to its next
};

struct PrefillSmem {
  uint8_t tiles[kSlots][kTileBytes];
  uint8_t q_last[2][kSubtile];  // of this row and the next
  uint8_t p[2][kSubtile];
  uint8_t q_left[64 * 32];     // 16 columns, not swizzled
  float shrink[2][kHeadTile];  // what the sums so far are multiplied by
  float factor[kHeadTile];     // what a row's values are multiplied by in the end
  uint8_t mask[kSlots][8];     // keys that exist
  int num_tiles[kSlots];       // of the row whose queries are there
  uint8_t state[2][4];         // of a warp's 16 heads: kTile, kLast, kShrink
  uint64_t full[kSlots], empty[kSlots][2];  // [half of the keys]
  uint64_t p_full[2], p_empty[2], factor_full;
};

static_assert(sizeof(PrefillSmem) <= 227 * 1024);

// The items (row, 64 heads) of a block, one after the other.
struct Walk {
  int row, tile;
  __device__ __forceinline__ explicit Walk(const PrefillArgs& a)
      : row(blockIdx.x / a.tiles), tile(blockIdx.x % a.tiles) {}
  __device__ __forceinline__ int head() const { return tile * kHeadTile; }
  __device__ __forceinline__ void next(const PrefillArgs& a) {
    row += a.row_step, tile += a.tile_step;
    if (tile >= a.tiles) tile -= a.tiles, ++row;
  }
};

// Step n of a ring: a place and the parity of its round.
struct Place {
  uint32_t at = 0, round = 0;
  __device__ __forceinline__ void next(uint32_t size) {
    if (++at == size) at = 0, round ^= 1;
  }
};

__device__ __forceinline__ void mbar_arrive_many(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

}  // namespace causeway
