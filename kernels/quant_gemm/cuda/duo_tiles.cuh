// What duo.cuh is made of: the shape of its tiles, their order, and their scales.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gemm.h"
#include "hopper.cuh"
#include "pair_tiles.cuh"
#include "row_scales.cuh"
#include "tiles.cuh"

namespace causeway {

// Two blocks of threads (a cluster) with 64 rows each against the same BN columns, multiplied by GROUPS warpgroups that
// take turns, from a ring of STAGES with DEPTH blocks of K. EARLY: the first weights go to L2 before the cluster has
// met, where so many blocks of K follow that it pays. WOVEN: additions stand between the instructions of the next
// product, the blocks of threads take turns to bring whole blocks of the weight, and the store goes through the tile's
// last stage, which leaves room for one stage more.
template <int BN, int STAGES, int DEPTH, int GROUPS, bool EARLY, bool WOVEN>
struct DuoShape {
  static constexpr int kBlocks = 2, kBlockRows = 64, kRows = kBlocks * kBlockRows, kColumns = BN, kProductColumns = BN;
  static constexpr int kParts = BN / 2, kStages = STAGES, kDepth = DEPTH;  // kParts: accumulators of a thread
  static constexpr int kGroup = largest_common(BN, 128), kScaleGroups = BN / kGroup;  // kGroup: columns of a scale
  static constexpr int kLines = 128 % BN == 0 ? 1 : 2;       // lines of the weight's blocks that a tile may meet
  static constexpr int kABytes = kBlockRows * kBlockK, kBBytes = BN * kBlockK;  // of one block of K
  static constexpr int kBlockBytes = kABytes + kBBytes, kStageBytes = DEPTH * kBlockBytes;
  static constexpr int kShare = WOVEN ? BN : BN / kBlocks;  // columns that a block brings at once
  static constexpr bool kTakesTurns = GROUPS > 1, kEarly = EARLY, kWoven = WOVEN;
  static constexpr int kWarps = 4 * GROUPS, kThreads = (kWarps + (kTakesTurns ? 4 : 3)) * 32;
  static constexpr int kUnit = BN % 64 == 0 ? 64 : BN % 32 == 0 ? 32 : 16;  // columns that one copy stores
  static constexpr int kUnitBytes = 16 * kUnit * 2, kStagingWarp = BN / kUnit * kUnitBytes;
  // Behind the ring: staging of the store, the stages' scales, barriers.
  static constexpr int kStagingOffset = STAGES * kStageBytes;
  static constexpr int kScaleBytes = DEPTH * kLines * kBlockRows * 4;
  static constexpr int kScaleOffset = kStagingOffset + (WOVEN ? 0 : kWarps * kStagingWarp);
  static constexpr int kBarrierOffset = kScaleOffset + STAGES * kScaleBytes;
  static constexpr int kSharedBytes = kBarrierOffset + STAGES * 16;

  static_assert(kSharedBytes <= 232448, "more shared memory than a block may have");
  static_assert(kShare * kBlockK % 1024 == 0, "swizzled tiles");
  static_assert(!WOVEN || (!kTakesTurns && kWarps * kStagingWarp <= kStageBytes), "a stage holds the tile");
  static_assert(DEPTH <= 2 && GROUPS <= 2, "two products are in registers, two groups take turns");
};

// The tiles of a block in order. Rows turn fastest: they stay in L2. The last tile of rows reaches back rather than
// over the end, where the copy engine fills row after row with zeros: rows that two blocks make have the same bits.
template <class S>
class DuoWalk {
 public:
  __device__ __forceinline__ DuoWalk(const GemmArguments& args, int rank)
      : args_(args),
        rank_(rank),
        at_(blockIdx.x / S::kBlocks),
        lead_(args.row_offset % S::kColumns),
        tiles_m_((args.rows + S::kRows - 1) / S::kRows),
        tiles_((args.n + lead_ + S::kColumns - 1) / S::kColumns * tiles_m_) {}

  // The next tile; its `row_end` is negative after the last.
  __device__ __forceinline__ Tile next() {
    if (at_ >= tiles_) return {0, -1, 0, 0};
    const int n = at_ / tiles_m_, m = at_ - n * tiles_m_;
    at_ += gridDim.x / S::kBlocks;
    const int row = min(m * S::kRows + rank_ * S::kBlockRows, max(args_.rows - S::kBlockRows, 0));
    return {row, args_.rows, n * S::kColumns - lead_, 0};
  }

  // Blocks of K that all tiles of the busiest block of threads have.
  __device__ __forceinline__ int length() const {
    const int pairs = gridDim.x / S::kBlocks;
    return (tiles_ + pairs - 1) / pairs * args_.k_blocks;
  }

 private:
  const GemmArguments& args_;
  int rank_, at_, lead_, tiles_m_, tiles_;
};

// The products of the rows' scales with those of the weight, for each line of the weight's blocks; rows r and r + 8 are
// neighbours. A whole warp calls it; loads run one chunk of blocks ahead.
template <class S>
class DuoScales {
 public:
  static constexpr int kChunk = 16;  // blocks: of the weight a lane each, of a row four a word

  __device__ __forceinline__ DuoScales(const GemmArguments& args, int lane)
      : args_(args), lane_(lane), last_(args.k_blocks - 1) {}

  // The weight's part may be opened before the kernel ahead has ended, the rows' may not.
  __device__ __forceinline__ void open_weight(const Tile& tile) {
    const int line = (args_.row_offset + tile.column) / 128 + (S::kLines > 1 ? lane_ / kChunk : 0);
    weight_ = static_cast<uint32_t>(min(line, args_.n_blocks - 1)) * args_.b_scale_stride;
    load_weight(0);
  }
  __device__ __forceinline__ void open_rows(const Tile& tile) { rows_.open(args_, tile.row, lane_); }

  // To the chunk that starts at block kb.
  __device__ __forceinline__ void step(int kb) {
    rows_.step();
    byte_ = next_byte_;
    if (kb + kChunk <= last_) {
      rows_.load(args_, kb + kChunk);
      load_weight(kb + kChunk);
    }
  }

  // Of the stage that starts at block `first` of the chunk: floats [depth][lines][64].
  __device__ __forceinline__ void write(int first, uint32_t address) const {
    const uint32_t at = address + ((lane_ & 16) + (lane_ & 7) * 2 + (lane_ >> 3 & 1)) * 4;
#pragma unroll
    for (int d = 0; d < S::kDepth; ++d) {
      const int block = first + d;
#pragma unroll
      for (int line = 0; line < S::kLines; ++line) {
        const float weight = scale_value(__shfl_sync(0xFFFFFFFFu, byte_, line * kChunk + block));
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const float both = scale_value(rows_.byte(j, block)) * weight;
          store_shared(at + ((d * S::kLines + line) * S::kBlockRows + 32 * j) * 4, __float_as_uint(both));
        }
      }
    }
  }

 private:
  static constexpr int kEach = S::kBlockRows / 32;
  static_assert(kChunk % S::kDepth == 0, "a stage's blocks lie in one chunk");

  __device__ __forceinline__ void load_weight(int kb) {
    next_byte_ = __ldg(args_.b_scale + weight_ + min(kb + lane_ % kChunk, last_));
  }

  const GemmArguments& args_;
  int lane_, last_;
  RowScales<kEach, kChunk / 4> rows_;
  uint32_t weight_ = 0, byte_ = 0, next_byte_ = 0;  // weight_: bytes from the first scale
};

}  // namespace causeway
