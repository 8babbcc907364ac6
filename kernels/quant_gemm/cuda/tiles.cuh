// Tile shapes of the GEMM, the order in which blocks walk tiles, and the scales of a tile.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "hopper.cuh"
#include "walk.cuh"

namespace causeway {

constexpr int kBlockK = 128;

// A ring of `stages`: two barriers each (full, empty), one for the first tile, and the tiles to come (see
// `TileQueue`). The barriers take whole 16 bytes.
__host__ __device__ constexpr int barrier_bytes(int stages) { return (stages + 1) * 16; }
__host__ __device__ constexpr int control_bytes(int stages) { return barrier_bytes(stages) + (stages + 1) * 16; }

// A tile of TM rows by BN columns, made by WGS warpgroups from a ring of STAGES, each of DEPTH blocks of K.
template <int TM, int WGS, int BN, int STAGES, int DEPTH>
struct Shape {
  static constexpr int kRows = TM, kColumns = BN, kStages = STAGES, kDepth = DEPTH;
  static constexpr int kABytes = TM * kBlockK, kBBytes = BN * kBlockK;  // of one block of K
  static constexpr int kBlockBytes = kABytes + kBBytes;
  static constexpr int kStageBytes = DEPTH * kBlockBytes;
  static constexpr int kWarps = WGS * 4;
  static constexpr int kActiveWarps = TM < 64 * WGS ? (TM + 15) / 16 : kWarps;  // others own no row
  // Two consumer warpgroups need more registers than an even split gives them: the producer is then a
  // warpgroup of its own that hands registers over (setmaxnreg).
  static constexpr bool kTrades = WGS > 1;
  static constexpr int kThreads = kWarps * 32 + (kTrades ? 128 : 96);
  static constexpr int kParts = BN / 2;             // accumulators of a thread
  static constexpr bool kTensorStore = WGS > 1 && BN == 128;
  static constexpr int kStagingWarp = BN <= 64 ? 2048 : 4096;  // bytes, see `swizzled`
  static constexpr int kStagingBytes = kActiveWarps * kStagingWarp;
  // A warpgroup reads 64 rows of A; where a tile has fewer, it runs on into what follows.
  static constexpr int kRunOn = TM < 64 && kABytes + DEPTH * kBBytes < 8192 ? 8192 : 0;
  // A warp of its own brings the scales of a stage's rows times those of its weight blocks (see `StageScales`), but
  // for the largest tiles, which have no room for them: there each thread reads its own (`Scales`).
  static constexpr bool kScaleWarp = TM < 64 || BN < 128;
  static constexpr int kScaleBytes = kScaleWarp ? DEPTH * TM * 4 : 0;
  static constexpr int kScaleOffset = STAGES * kStageBytes + kStagingBytes;
  static constexpr int kBarrierOffset = kScaleOffset + STAGES * kScaleBytes;
  static constexpr int kSharedBytes = kBarrierOffset + control_bytes(STAGES) + kRunOn;

  static_assert(kSharedBytes <= 232448, "more shared memory than a block may have");
  static_assert(kScaleWarp || DEPTH == 1, "a thread reads the scales of one block");
  static_assert(TM % 16 == 0 && WGS <= 2 && (TM == 64 * WGS || WGS == 1), "rows of a tile");
};

struct alignas(16) Tile {
  int row;      // first row
  int row_end;  // end of the rows that belong to the same weight; negative: no tile, the walk is over
  int column;   // first column, may be negative (before a slice that starts inside a block)
  int group;
};

// A unit of work among the groups of rows that it belongs to.
struct GroupUnit {
  int group;
  int row, row_end;  // the group's
  int index;         // among the group's units
};

// Finds units of work: the rows of every group make some, one group after the other. Whole warps call it: a lane holds two
// neighbouring groups, so that a warp looks at 64 groups at once.
class GroupWindow {
 public:
  // One group of all rows.
  __device__ __forceinline__ void hold(int rows, int units) {
    start_ = 0;
    middle_ = stop_ = rows;
    end_ = units;
  }
  // The groups of `args.offsets`; `units`: of a number of rows.
  template <class Units>
  __device__ __forceinline__ void load(const GemmArguments& args, const Units& units) {
    const int lane = threadIdx.x % 32, group = window_ + 2 * lane;
    start_ = static_cast<int>(args.offsets[min(group, args.groups)]);
    middle_ = static_cast<int>(args.offsets[min(group + 1, args.groups)]);
    stop_ = static_cast<int>(args.offsets[min(group + 2, args.groups)]);
    end_ = units(middle_ - start_) + units(stop_ - middle_);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kAll, end_, step);
      if (lane >= step) end_ += before;
    }
    end_ += base_;
  }
  // Unit `at`, if there is one; units are asked for in ascending order.
  template <class Units>
  __device__ __forceinline__ bool find(int at, const GemmArguments& args, const Units& units, GroupUnit& unit) {
    uint32_t found;
    while ((found = __ballot_sync(kAll, at < end_)) == 0) {
      window_ += kWindow;
      if (args.offsets == nullptr || window_ >= args.groups) return false;
      base_ = __shfl_sync(kAll, end_, 31);
      load(args, units);
    }
    const int lane = __ffs(found) - 1;
    const int middle = __shfl_sync(kAll, middle_, lane), stop = __shfl_sync(kAll, stop_, lane);
    const int start = __shfl_sync(kAll, start_, lane), end = __shfl_sync(kAll, end_, lane);
    const int upper = end - units(stop - middle);  // where the units of the lane's second group begin
    const bool second = at >= upper;
    unit = {window_ + 2 * lane + second, second ? middle : start, second ? stop : middle,
            at - (second ? upper : upper - units(middle - start))};
    return true;
  }

 private:
  static constexpr uint32_t kAll = 0xFFFFFFFFu;
  static constexpr int kWindow = 64;  // groups

  int window_ = 0, base_ = 0;                        // first group of the window, units before it
  int start_ = 0, middle_ = 0, stop_ = 0, end_ = 0;  // rows of the lane's groups; units up to their end
};

// The tiles of one block of threads, in order; made after the kernel that writes the offsets, by whole warps.
template <class S>
class Schedule {
 public:
  __device__ __forceinline__ explicit Schedule(const GemmArguments& args)
      : args_(args), next_(blockIdx.x), lead_(args.row_offset % S::kColumns) {
    tiles_n_ = (args.n + lead_ + S::kColumns - 1) / S::kColumns;
    if (args.offsets == nullptr) {
      window_.hold(args.rows, tiles(args.rows));
    } else {
      window_.load(args, [this](int rows) { return tiles(rows); });
    }
  }

  __device__ __forceinline__ Tile advance() {
    GroupUnit unit;
    if (!window_.find(next_, args_, [this](int rows) { return tiles(rows); }, unit)) return {0, -1, 0, 0};
    const int tiles_m = (unit.row_end - unit.row + S::kRows - 1) / S::kRows;
    TilePlace at = {0, unit.index};
    if (tiles_m > 1) at = place_in_bands(unit.index, tiles_m, tiles_n_, kBand);
    next_ += gridDim.x;
    return {unit.row + at.m * S::kRows, unit.row_end, at.n * S::kColumns - lead_, unit.group};
  }

 private:
  static constexpr int kBand = S::kColumns > 128 ? 8 : 16;  // column tiles

  __device__ __forceinline__ int tiles(int rows) const {
    return (rows + S::kRows - 1) / S::kRows * tiles_n_;
  }

  const GemmArguments& args_;
  int next_, lead_, tiles_n_;
  GroupWindow window_;
};

// Tiles from the weight's producer to the consumers. Tile t + 1 is written with the last block of tile t, so whoever
// has waited for that block may read it; the consumers read tile t only after they have released the last
// block of tile t - 1, and every tile takes at least one stage: STAGES + 1 entries are enough.
template <int STAGES>
class TileQueue {
 public:
  // The barrier and the entries lie behind the ring's own 2 * STAGES barriers.
  __device__ __forceinline__ explicit TileQueue(uint8_t* control)
      : opened_(smem_address(control) + 2 * STAGES * 8),
        entries_(reinterpret_cast<Tile*>(control + barrier_bytes(STAGES))) {}

  __device__ __forceinline__ uint32_t opened() const { return opened_; }
  __device__ __forceinline__ void put_first(const Tile& tile) {
    entries_[0] = tile;
    mbar_arrive(opened_);
  }
  __device__ __forceinline__ void put_next(const Tile& tile) {
    step();
    entries_[at_] = tile;
  }
  __device__ __forceinline__ Tile take_first() {
    mbar_wait(opened_, 0);
    return entries_[0];
  }
  __device__ __forceinline__ Tile take_next() {
    step();
    return entries_[at_];
  }

 private:
  __device__ __forceinline__ void step() { at_ = at_ == STAGES ? 0 : at_ + 1; }

  uint32_t opened_;
  Tile* entries_;
  int at_ = 0;
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
