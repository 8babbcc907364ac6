// Scales of a tile of gemm.cuh: a warp of their own multiplies those of the rows with those of the weight and leaves
// them beside the operands of a stage, so that no load from global memory stands in the way of the products.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gemm.h"
#include "hopper.cuh"
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
  __device__ __forceinline__ void open_rows(const Tile& tile) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      row_[j] = static_cast<uint32_t>(min(tile.row + lane_ + 32 * j, args_.rows - 1)) * args_.a_scale_stride;
    }
    load_rows(0);
  }

  // To the chunk that starts at block kb.
  __device__ __forceinline__ void step(int kb) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) word_[j][w] = next_word_[j][w];
    }
    byte_ = next_byte_;
    if (kb + kChunk <= last_) {
      load_rows(kb + kChunk);
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
        const float both = scale_value(word_[j][block / 4] >> (block % 4 * 8) & 255) * weight;
        const int row = lane_ + 32 * j;
        if (row < S::kRows) store_shared(address + (d * S::kRows + row) * 4, __float_as_uint(both));
      }
    }
  }

 private:
  static constexpr int kEach = (S::kRows + 31) / 32, kWords = kChunk / 4;
  static_assert(kChunk % S::kDepth == 0, "a stage's blocks lie in one chunk");

  __device__ __forceinline__ void load_weight(int kb) {
    next_byte_ = __ldg(args_.b_scale + weight_ + min(kb + lane_ % kChunk, last_));
  }
  __device__ __forceinline__ void load_rows(int kb) {  // rows of scales are padded to four bytes
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint8_t* word = args_.a_scale + row_[j] + min(kb + 4 * w, last_ & ~3);
        next_word_[j][w] = __ldg(reinterpret_cast<const uint32_t*>(word));
      }
    }
  }

  const GemmArguments& args_;
  int lane_, last_;
  uint32_t row_[kEach], weight_ = 0;  // bytes from the first scale
  uint32_t word_[kEach][kWords], next_word_[kEach][kWords], byte_ = 0, next_byte_ = 0;
};

}  // namespace causeway
