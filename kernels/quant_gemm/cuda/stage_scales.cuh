// Scales of a tile of gemm.cuh: a warp of their own multiplies those of the rows with those of the weight and leaves
// them beside the operands of a stage, so that no load from global memory stands in the way of the products.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gemm.h"
#include "hopper.cuh"
#include "row_scales.cuh"
#include "tiles.cuh"

namespace causeway {

// Loads run one chunk of blocks ahead: of a row four blocks a word, of the weight a lane each block. Whole warps
// call it.
template <class S>
class StageScales {
 public:
  static constexpr int kChunk = S::kRows > 64 ? 8 : 16;  // blocks; as many as registers allow

  __device__ __forceinline__ explicit StageScales(const GemmArguments& args)
      : args_(args), lane_(threadIdx.x % 32), last_(args.k_blocks - 1) {}

  // The weight's part may be opened before the kernel ahead has ended, the rows' may not.
  __device__ __forceinline__ void open_weight(const Tile& tile) {
    const int line = min((args_.row_offset + tile.column) / 128, args_.n_blocks - 1);
    weight_ = tile.group * args_.b_scale_group + line * args_.b_scale_stride;
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

  // Of the stage that starts at block `first` of the chunk: floats [depth][rows].
  __device__ __forceinline__ void write(int first, uint32_t address) const {
#pragma unroll
    for (int d = 0; d < S::kDepth; ++d) {
      const int block = first + d;
      const float weight = scale_value(__shfl_sync(0xFFFFFFFFu, byte_, block));
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const float both = scale_value(rows_.byte(j, block)) * weight;
        const int row = lane_ + 32 * j;
        if (row < S::kRows) store_shared(address + (d * S::kRows + row) * 4, __float_as_uint(both));
      }
    }
  }

 private:
  static constexpr int kEach = (S::kRows + 31) / 32;
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
