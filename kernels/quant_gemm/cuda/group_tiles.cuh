// What group.cuh is made of: the shape of its tiles, the units of work and their order, and their scales.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gemm.h"
#include "hopper.cuh"
#include "row_scales.cuh"
#include "tiles.cuh"

namespace causeway {

// What two blocks of threads do together. `kPaired`: 128 rows each, the same columns. `kApart`: the same (up to
// 128) rows, each its own columns. `kSplit`: the same (up to 64) rows, each of the four warpgroups its own columns.
enum Kind : int { kPaired = 0, kApart = 1, kSplit = 2 };

template <bool GATED>
struct GroupShape {
  static constexpr bool kGated = GATED, kTensorStore = true;
  static constexpr int kRows = 128, kHalf = 128;  // columns of a product
  static constexpr int kColumns = (GATED ? 1 : 2) * kHalf;  // of the output that a tile makes
  static constexpr int kStages = 4, kParts = kHalf / 2;
  static constexpr int kBoxRows = 64, kBoxBytes = kBoxRows * kBlockK;  // that one copy brings
  static constexpr int kABytes = kRows * kBlockK, kHalfBytes = kHalf * kBlockK;
  static constexpr int kStageBytes = kABytes + 2 * kHalfBytes;
  static constexpr int kWarps = 8, kThreads = (kWarps + 4) * 32;
  static constexpr int kStagingOffset = kStages * kStageBytes;
  static constexpr int kStagingWarp = GATED ? 2048 : 4096;  // bytes, see `swizzled`; of plain tiles, one product
  static constexpr int kScaleBytes = kRows * 4, kWeightScaleBytes = 8;
  static constexpr int kScaleOffset = kStagingOffset + kWarps * kStagingWarp;
  static constexpr int kWeightScaleOffset = kScaleOffset + kStages * kScaleBytes;
  static constexpr int kBarrierOffset = kWeightScaleOffset + kStages * kWeightScaleBytes;
  static constexpr int kSharedBytes = kBarrierOffset + control_bytes(kStages);

  static_assert(kSharedBytes <= 232448, "more shared memory than a block may have");
};

// A tile's `group` carries the kind of its unit.
__device__ __forceinline__ int kind_of(const Tile& tile) { return tile.group & 3; }
__device__ __forceinline__ int weight_of(const Tile& tile) { return tile.group >> 2; }

// The units of a pair of blocks, in order; made after the kernel that writes the offsets. Whole warps call it, and get
// their block's tile. The rows of a group make as many units of 256 rows as there are, then perhaps one row of 128 and,
// where at most 64 rows are left, one of these.
template <class S>
class GroupWalk {
 public:
  __device__ __forceinline__ GroupWalk(const GemmArguments& args, int rank)
      : args_(args), rank_(rank), next_(blockIdx.x / 2), tiles_n_((args.n + S::kColumns - 1) / S::kColumns) {
    window_.load(args, [this](int rows) { return units(rows); });
  }

  __device__ __forceinline__ Tile next() {
    GroupUnit unit;
    if (!window_.find(next_, args_, [this](int rows) { return units(rows); }, unit)) return {0, -1, 0, 0};
    next_ += gridDim.x / 2;

    const int whole = rows_of_tiles(unit.row_end - unit.row), paired = whole / 2 * tiles_n_;
    int row = unit.row, n, kind = kPaired;
    if (unit.index < paired) {
      const TilePlace at = place_in_bands(unit.index, whole / 2, tiles_n_, kBand);
      n = at.n;
      row += (2 * at.m + rank_) * S::kRows;
    } else {
      int index = unit.index - paired;
      kind = (whole & 1) != 0 && index < (tiles_n_ + 1) / 2 ? kApart : kSplit;
      if (kind == kSplit && (whole & 1) != 0) index -= (tiles_n_ + 1) / 2;
      n = kind == kApart ? 2 * index + rank_ : 4 * index + 2 * rank_;
      row += (kind == kApart ? whole - 1 : whole) * S::kRows;
    }
    const int column = n * S::kColumns;
    // Beyond the last column a block has no row to store.
    return {row, column < args_.n ? unit.row_end : row, column, unit.group * 4 + kind};
  }

 private:
  static constexpr int kBand = 8;  // column tiles

  // Tiles of more than 64 rows, one below the other.
  __device__ __forceinline__ static int rows_of_tiles(int rows) { return (rows + 63) / S::kRows; }
  __device__ __forceinline__ int units(int rows) const {
    const int whole = rows_of_tiles(rows);
    return whole / 2 * tiles_n_ + (whole & 1) * ((tiles_n_ + 1) / 2) +
           (rows > whole * S::kRows ? (tiles_n_ + 3) / 4 : 0);
  }

  const GemmArguments& args_;
  int rank_, next_, tiles_n_;
  GroupWindow window_;
};

// The scales of every stage as float32: the rows' so that rows r and r + 8 are neighbours, and those of its two products'
// weight blocks. A whole warp calls it; loads run four blocks ahead. `apart`: columns from a product to the second.
template <class S>
class GroupScales {
 public:
  __device__ __forceinline__ GroupScales(const GemmArguments& args, int apart, int lane)
      : args_(args), apart_(apart), lane_(lane) {}

  // Loads the first scales of a tile. Those of the tile before are then in `step`'s last words.
  __device__ __forceinline__ void open(const Tile& tile) {
    rows_.open(args_, tile.row, lane_);
    // Eight lanes each: both products of the first warpgroup's columns, and of the second's where they differ.
    const int column = tile.column + (lane_ >> 4) * S::kColumns + (lane_ >> 3 & 1) * apart_;
    weight_ = weight_of(tile) * args_.b_scale_group + min(column / 128, args_.n_blocks - 1) * args_.b_scale_stride;
    load_weight(0);
  }

  // To the four blocks from kb on of the tile; `next` comes after it.
  __device__ __forceinline__ void step(int kb, const Tile& next) {
    rows_.step();
    if ((kb & 7) == 0) {
      weight_byte_ = next_weight_;
      if (kb + 8 < args_.k_blocks) load_weight(kb + 8);
    }
    if (kb + 4 < args_.k_blocks) {
      rows_.load(args_, kb + 4);
    } else if (next.row_end >= 0) {
      open(next);
    }
  }

  // Writes the scales of block kb + i for the columns of warpgroup `half` (0 where both have the same).
  __device__ __forceinline__ void write(int kb, int i, int half, uint32_t rows, uint32_t weight) const {
    const uint32_t at = rows + ((lane_ & 16) + (lane_ & 7) * 2 + (lane_ >> 3 & 1)) * 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) store_shared(at + r * 128, rows_.byte(r, i) << 23);
    const uint32_t byte = __shfl_sync(0xFFFFFFFFu, weight_byte_, half * 16 + (lane_ & 1) * 8 + (kb & 7) + i);
    if (lane_ < 2) store_shared(weight + lane_ * 4, byte << 23);
  }

 private:
  __device__ __forceinline__ void load_weight(int kb) {
    next_weight_ = __ldg(args_.b_scale + weight_ + min(kb + lane_ % 8, args_.k_blocks - 1));
  }

  const GemmArguments& args_;
  int apart_, lane_;
  RowScales<4, 1> rows_;
  uint32_t weight_, next_weight_, weight_byte_;
};

}  // namespace causeway
