// Tile shapes of the GEMM, the order in which blocks walk tiles, and the scales of a tile.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace causeway {

constexpr int kBlockK = 128;
constexpr int kRasterTiles = 16;  // column tiles that neighbouring blocks walk together

// A tile of TM rows by BN columns, made by WGS warpgroups from a ring of STAGES.
template <int TM, int WGS, int BN, int STAGES>
struct Shape {
  static constexpr int kRows = TM, kColumns = BN, kStages = STAGES;
  static constexpr int kABytes = TM * kBlockK;
  static constexpr int kStageBytes = kABytes + BN * kBlockK;
  static constexpr int kWarps = WGS * 4;
  static constexpr int kActiveWarps = TM < 64 * WGS ? (TM + 15) / 16 : kWarps;  // others own no row
  // Two consumer warpgroups need more registers than an even split gives them: the producer is then a
  // warpgroup of its own that hands registers over (setmaxnreg).
  static constexpr bool kTrades = WGS > 1;
  static constexpr int kThreads = kWarps * 32 + (kTrades ? 128 : 64);
  static constexpr int kParts = BN / 2;             // accumulators of a thread
  static constexpr int kStagingRow = BN * 2 + 16;   // bytes; the pad keeps rows on different banks
  static constexpr int kStagingBytes = kActiveWarps * 16 * kStagingRow;
  // A warpgroup reads 64 rows of A; where a tile has fewer, it runs on into what follows.
  static constexpr int kRunOn = TM < 64 ? 8192 : 0;
  static constexpr int kBarrierOffset = STAGES * kStageBytes + kStagingBytes;
  static constexpr int kSharedBytes = kBarrierOffset + STAGES * 16 + kRunOn;

  static_assert(kSharedBytes <= 232448, "more shared memory than a block may have");
  static_assert(TM % 16 == 0 && WGS <= 2 && (TM == 64 * WGS || WGS == 1), "rows of a tile");
};

struct Tile {
  int row;      // first row
  int row_end;  // end of the rows that belong to the same weight
  int column;   // first column, may be negative (before a slice that starts inside a block)
  int group;
};

// The tiles of one block of threads, in order.
template <class S>
class Schedule {
 public:
  __device__ __forceinline__ explicit Schedule(const GemmArguments& args)
      : args_(args), next_(blockIdx.x), lead_(args.row_offset % S::kColumns) {
    tiles_n_ = (args.n + lead_ + S::kColumns - 1) / S::kColumns;
    load(0);
  }

  __device__ __forceinline__ bool advance(Tile& tile) {
    while (next_ >= base_ + tiles_m_ * tiles_n_) {
      base_ += tiles_m_ * tiles_n_;
      if (++group_ >= args_.groups) return false;
      load(group_);
    }
    const int index = next_ - base_;
    const int band = index / (kRasterTiles * tiles_m_);
    const int width = min(kRasterTiles, tiles_n_ - band * kRasterTiles);
    const int inside = index - band * kRasterTiles * tiles_m_;
    const int m = inside / width;
    const int n = band * kRasterTiles + inside - m * width;
    tile.row = start_ + m * S::kRows;
    tile.row_end = stop_;
    tile.column = n * S::kColumns - lead_;
    tile.group = group_;
    next_ += gridDim.x;
    return true;
  }

 private:
  __device__ __forceinline__ void load(int group) {
    start_ = args_.offsets == nullptr ? 0 : static_cast<int>(args_.offsets[group]);
    stop_ = args_.offsets == nullptr ? args_.rows : static_cast<int>(args_.offsets[group + 1]);
    tiles_m_ = (stop_ - start_ + S::kRows - 1) / S::kRows;
  }

  const GemmArguments& args_;
  int next_, lead_, tiles_n_;
  int base_ = 0, group_ = 0, tiles_m_ = 0, start_ = 0, stop_ = 0;
};

// A position in the ring of stages.
template <int STAGES>
struct Slot {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ float scale_value(uint32_t byte) { return __uint_as_float(byte << 23); }

// Scales of this thread's two rows and of the tile's weight block, one 128-block after the other. Loads
// run ahead: the first are issued by `open`, and nothing waits for them before `take`.
class Scales {
 public:
  __device__ __forceinline__ explicit Scales(const GemmArguments& args) : args_(args) {}

  __device__ __forceinline__ void open(const Tile& tile, int row_in_tile) {
    const int last = args_.rows - 1, row = tile.row + row_in_tile;
    upper_ = static_cast<uint32_t>(min(row, last)) * args_.a_scale_stride;
    lower_ = static_cast<uint32_t>(min(row + 8, last)) * args_.a_scale_stride;
    const int line = min((args_.row_offset + tile.column) / 128, args_.n_blocks - 1);
    weight_ = tile.group * args_.b_scale_group + line * args_.b_scale_stride;
    load(0);
    next_weight_ = __ldg(args_.b_scale + weight_);
  }

  // Scales of block kb; blocks come in order. Rows of scales are padded to four bytes.
  __device__ __forceinline__ void take(int kb, float (&s)[2]) {
    if ((kb & 3) == 0) {
      word_upper_ = next_upper_;
      word_lower_ = next_lower_;
      if (kb + 4 < args_.k_blocks) load(kb + 4);
    }
    const float weight = scale_value(next_weight_);
    if (kb + 1 < args_.k_blocks) next_weight_ = __ldg(args_.b_scale + weight_ + kb + 1);
    s[0] = scale_value(word_upper_ & 255) * weight;
    s[1] = scale_value(word_lower_ & 255) * weight;
    word_upper_ >>= 8;
    word_lower_ >>= 8;
  }

 private:
  __device__ __forceinline__ void load(int kb) {
    next_upper_ = __ldg(reinterpret_cast<const uint32_t*>(args_.a_scale + upper_ + kb));
    next_lower_ = __ldg(reinterpret_cast<const uint32_t*>(args_.a_scale + lower_ + kb));
  }

  const GemmArguments& args_;
  uint32_t upper_ = 0, lower_ = 0, weight_ = 0;  // bytes from the first scale
  uint32_t next_upper_ = 0, next_lower_ = 0, next_weight_ = 0, word_upper_ = 0, word_lower_ = 0;
};

}  // namespace causeway
