// Tile shapes of the bf16 product, the order in which blocks walk tiles, and the ring of stages.
#pragma once

#include <cstdint>

#include "dense.h"
#include "walk.cuh"

namespace causeway {

constexpr int kStepK = 64;       // columns of K in a stage: 128 bytes, the width of the swizzle
constexpr int kSegments = 4;     // sums that K is split into, whatever the tile: see dense.cuh
constexpr int kLeastSteps = 3;   // of the first segment, if need be steps of zeros; with RoPE 8
constexpr int kBandTiles = 16;   // column tiles that neighbouring blocks walk together

// A tile of TM rows by BN columns, made by WGS warpgroups from a ring of STAGES. SPLIT: a cluster of
// kSegments * SIDE blocks makes SIDE neighbouring tiles, each block one segment of K, and adds
// through distributed shared memory; else blocks are persistent and walk all of K. ROPE: rows are
// rotated on their way. BLOCKS: blocks of a multiprocessor.
template <int TM, int WGS, int BN, int STAGES, bool SPLIT, int SIDE, bool ROPE, int BLOCKS>
struct DenseShape {
  static constexpr int kRows = TM, kColumns = BN, kStages = STAGES, kSide = SIDE, kBlocks = BLOCKS;
  static constexpr bool kSplit = SPLIT, kRope = ROPE;
  static constexpr int kABytes = TM * kStepK * 2;
  static constexpr int kBBytes = BN * kStepK * 2;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kWarps = WGS * 4;
  static constexpr int kActiveWarps = TM < 64 * WGS ? (TM + 15) / 16 : kWarps;  // others own no row
  // Two persistent warpgroups need more registers than an even split gives them.
  static constexpr bool kTrades = WGS > 1 && !SPLIT;
  static constexpr int kHelpers = kTrades ? 4 : 2;  // warps: weight, rows, two for company
  static constexpr int kThreads = (kWarps + kHelpers) * 32;
  static constexpr int kParts = BN / 2;  // accumulators of a thread
  static constexpr int kCluster = SPLIT ? kSegments * SIDE : 1;

  // Shared memory: stages, then what the way out needs, then barriers.
  static constexpr int kEmitColumns = BN < 64 ? BN : 64;  // stored at once by a persistent block
  static constexpr int kStagingRow = (ROPE ? 64 : kEmitColumns) * 2 + 16;  // spreads over banks
  // Split: a block owns every kCluster-th row of the cluster's tiles, with the sums of all segments.
  static constexpr int kOwnedRow = kSegments * SIDE * BN * 4;  // bytes
  static constexpr int kWayOut = STAGES * kStageBytes;
  static constexpr int kBarriers =
      kWayOut + (SPLIT ? TM / kCluster * kOwnedRow : kActiveWarps * 16 * kStagingRow);
  // A warpgroup reads 64 rows of A; where a tile has fewer, it runs on into what follows.
  static constexpr int kRunOn = TM < 64 ? 8192 : 0;
  static constexpr int kUsed = kBarriers + STAGES * 16;
  static constexpr int kSharedBytes =
      kUsed > kWayOut + kRunOn ? kUsed : kWayOut + kRunOn;

  static_assert(kSharedBytes <= 232448 / BLOCKS - (BLOCKS > 1 ? 1024 : 0), "shared memory");
  static_assert(!SPLIT || TM % kCluster == 0, "rows to own");
  static_assert(TM % 16 == 0 && WGS <= 2 && (TM == 64 * WGS || WGS == 1), "rows of a tile");
  static_assert(BN % kEmitColumns == 0 && kWayOut % 16 == 0 && kBarriers % 16 == 0, "layout");
};

struct Tile {
  int row;     // first row
  int column;  // first column inside the group
  int group;
};

// The tiles of one block of threads, in order.
template <class S>
class Schedule {
 public:
  __device__ __forceinline__ explicit Schedule(const DenseArguments& args)
      : next_(blockIdx.x / S::kCluster) {
    constexpr int kWide = S::kColumns * S::kSide;
    tiles_m_ = (args.rows + S::kRows - 1) / S::kRows;
    tiles_n_ = (args.n + kWide - 1) / kWide;
    total_ = tiles_m_ * tiles_n_ * args.groups;  // fits: the launcher looks
  }

  __device__ __forceinline__ bool advance(Tile& tile) {
    if (next_ >= total_) return false;
    const int per_group = tiles_m_ * tiles_n_;
    tile.group = next_ / per_group;
    const int index = next_ - tile.group * per_group;
    const TilePlace at = place_in_bands(index, tiles_m_, tiles_n_, kBandTiles);
    tile.row = at.m * S::kRows;
    tile.column = at.n * S::kColumns * S::kSide;
    next_ += gridDim.x / S::kCluster;
    return true;
  }

 private:
  int next_, total_, tiles_m_, tiles_n_;
};

}  // namespace causeway
