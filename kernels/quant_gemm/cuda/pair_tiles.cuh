// What pair.cuh is made of: the shape of its tiles, their order, their scales, and the store.
#pragma once

#include <cuda_bf16.h>

#include "copy_engine.cuh"
#include "hopper.cuh"
#include "row_scales.cuh"
#include "store.cuh"
#include "tiles.cuh"

namespace causeway {

constexpr int largest_common(int a, int b) { return b == 0 ? a : largest_common(b, a % b); }

// A tile of BN columns for 128 rows in each of BLOCKS blocks of threads; a product of the tensor cores has PN columns.
template <int BLOCKS, int BN, int PN, int STAGES>
struct PairShape {
  static constexpr int kBlocks = BLOCKS, kBlockRows = 128, kRows = kBlocks * kBlockRows;  // kRows: of all blocks
  static constexpr int kColumns = BN, kStages = STAGES;
  static constexpr bool kWhole = false;
  static constexpr int kProductColumns = PN, kProducts = BN / PN, kParts = PN / 2;
  static constexpr int kGroup = largest_common(BN, 128), kGroups = BN / kGroup;  // columns that share a scale
  static constexpr int kABytes = kBlockRows * kBlockK, kBBytes = BN * kBlockK;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kWarps = 8, kThreads = (kWarps + 4) * 32;
  static constexpr int kUnit = PN % 64 == 0 ? 64 : 32;  // columns that one copy stores
  static constexpr int kUnitBytes = 16 * kUnit * 2, kStagingWarp = PN / kUnit * kUnitBytes;
  // Behind the ring: staging of the store, the stages' scales, barriers.
  static constexpr int kStagingOffset = STAGES * kStageBytes;
  static constexpr int kScaleBytes = kBlockRows * 4, kWeightScaleBytes = 8;
  static constexpr int kScaleOffset = kStagingOffset + kWarps * kStagingWarp;
  static constexpr int kWeightScaleOffset = kScaleOffset + STAGES * kScaleBytes;
  static constexpr int kBarrierOffset = kWeightScaleOffset + STAGES * kWeightScaleBytes;
  static constexpr int kSharedBytes = kBarrierOffset + STAGES * 16;

  static_assert(kSharedBytes <= 232448, "more shared memory than a block may have");
  static_assert(BN % PN == 0 && PN * kBlockK % 1024 == 0 && BN / BLOCKS * kBlockK % 1024 == 0, "swizzled tiles");
};

// The same for a K of whole rings: every tile begins in the first stage, so that the compiler knows each block's.
template <class S>
struct WholeRings : S {
  static constexpr bool kWhole = true;
};

// The tiles in the order in which pairs of blocks walk them: bands of columns, so that neighbours share both
// operands in L2.
template <class S>
class PairWalk {
 public:
  __device__ __forceinline__ explicit PairWalk(const GemmArguments& args, int rank)
      : args_(args), rank_(rank), at_(blockIdx.x / S::kBlocks) {}

  // The next tile of this block of threads; its `row_end` is negative after the last.
  __device__ __forceinline__ Tile next() {
    const int lead = args_.row_offset % S::kColumns;
    const int tiles_n = (args_.n + lead + S::kColumns - 1) / S::kColumns;
    const int tiles_m = (args_.rows + S::kRows - 1) / S::kRows;
    if (at_ >= tiles_n * tiles_m) return {0, -1, 0, 0};
    const int band = at_ / (kBand * tiles_m), inside = at_ - band * kBand * tiles_m;
    const int width = min(kBand, tiles_n - band * kBand);
    const int m = inside / width, n = band * kBand + inside - m * width;
    at_ += gridDim.x / S::kBlocks;
    return {m * S::kRows + rank_ * S::kBlockRows, args_.rows, n * S::kColumns - lead, 0};
  }

 private:
  static constexpr int kBand = 2048 / S::kColumns;

  const GemmArguments& args_;
  int rank_, at_;
};

// The scales of every stage as float32: the rows' so that rows r and r + 8 are neighbours, and those of the two lines of
// the weight's blocks that a tile may meet. A whole warp calls it; loads run four blocks ahead.
template <class S>
class PairScales {
 public:
  __device__ __forceinline__ PairScales(const GemmArguments& args, int lane) : args_(args), lane_(lane) {}

  // Loads the first scales of a tile. Those of the tile before are then in `step`'s last words.
  __device__ __forceinline__ void open(const Tile& tile) {
    rows_.open(args_, tile.row, lane_);
    const int line = (args_.row_offset + tile.column) / 128 + lane_ / 16;
    weight_ = static_cast<uint32_t>(min(line, args_.n_blocks - 1)) * args_.b_scale_stride;
    load_weight(0);
  }

  // To the four blocks from kb on of the tile; `next` comes after it.
  __device__ __forceinline__ void step(int kb, const Tile& next) {
    rows_.step();
    if ((kb & 15) == 0) {
      weight_byte_ = next_weight_;
      if (kb + 16 < args_.k_blocks) load_weight(kb + 16);
    }
    if (kb + 4 < args_.k_blocks) {
      rows_.load(args_, kb + 4);
    } else if (next.row_end >= 0) {
      open(next);
    }
  }

  // Writes the scales of block kb + i.
  __device__ __forceinline__ void write(int kb, int i, uint32_t rows, uint32_t weight) const {
    const uint32_t at = rows + ((lane_ & 16) + (lane_ & 7) * 2 + (lane_ >> 3 & 1)) * 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) store_shared(at + r * 128, rows_.byte(r, i) << 23);
    const uint32_t byte = __shfl_sync(0xFFFFFFFFu, weight_byte_, (lane_ & 1) * 16 + (kb & 15) + i);
    if (lane_ < 2) store_shared(weight + lane_ * 4, byte << 23);
  }

 private:
  __device__ __forceinline__ void load_weight(int kb) {
    next_weight_ = __ldg(args_.b_scale + weight_ + min(kb + lane_ % 16, args_.k_blocks - 1));
  }

  const GemmArguments& args_;
  int lane_;
  RowScales<4, 1> rows_;
  uint32_t weight_, next_weight_, weight_byte_;
};

__device__ __forceinline__ float2 load_floats(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

// Bytes from the first to a 16-byte chunk of a warp's 16 rows in units of `Unit` columns with the copy engine's swizzle.
template <int Unit>
__device__ __forceinline__ uint32_t staged(int row, int chunk) {
  if constexpr (Unit == 64) return swizzled(row, chunk);
  if constexpr (Unit == 16) return (chunk >> 1) * 512 + row * 32 + (((chunk ^ row >> 2) & 1) << 4);
  return (chunk >> 2) * 1024 + row * 64 + (((chunk ^ row >> 1) & 3) << 4);
}

// A warp's 16 rows of one product, in bfloat16 through its staging buffer by the copy engine, which leaves out what
// lies outside the output. Float32, and what has no map, goes the plain way.
template <class S>
__device__ __forceinline__ void store_pair(const GemmArguments& args, const CUtensorMap& out_map, const Tile& tile,
                                           const float (&sum)[S::kParts], uint32_t staging, int warp, int lane) {
  const int first = tile.row + warp * 16;
  if (first >= tile.row_end) return;
  if (args.out_is_float) {
    store_float(args, tile, sum, warp * 16 + lane / 4, lane);
    return;
  }
  if (!args.out_is_mapped || tile.column < 0) {  // the copy engine stores at no negative column
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out);
#pragma unroll
    for (int i = 0; i < S::kParts; ++i) {
      const int row = first + lane / 4 + (i & 2) * 4, column = tile.column + i / 4 * 8 + (lane & 3) * 2 + (i & 1);
      if (row < tile.row_end && column >= 0 && column < args.n) {
        out[row * args.out_stride + column] = __float2bfloat16(sum[i]);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < S::kParts; i += 8) {
    store_matrices(staging + staged<S::kUnit>(lane & 15, i / 4 + (lane >> 4)), pack_bf16(sum[i], sum[i + 1]),
                   pack_bf16(sum[i + 2], sum[i + 3]), pack_bf16(sum[i + 4], sum[i + 5]),
                   pack_bf16(sum[i + 6], sum[i + 7]));
  }
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < S::kProductColumns / S::kUnit; ++i) {
      store_2d(&out_map, staging + i * S::kUnitBytes, tile.column + i * S::kUnit, first);
    }
    bulk_commit();
  }
}

}  // namespace causeway
