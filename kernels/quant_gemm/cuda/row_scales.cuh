// What the loaders of scales in the tiles' files share: the bytes of rows on their way through a warp's registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gemm.h"

namespace causeway {

// E8M0 scales of rows l, l + 32, .. of a tile in lane l (the last row's where there are no more), four blocks of K a
// word. Loads run one chunk of WORDS words ahead.
template <int EACH, int WORDS>
class RowScales {
 public:
  __device__ __forceinline__ void open(const GemmArguments& args, int first, int lane) {
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      row_[j] = static_cast<uint32_t>(min(first + lane + 32 * j, args.rows - 1)) * args.a_scale_stride;
    }
    load(args, 0);
  }

  // Asks for the chunk that starts at block kb; lines of scales are padded to four bytes.
  __device__ __forceinline__ void load(const GemmArguments& args, int kb) {
    const int last = args.k_blocks - 1;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
#pragma unroll
      for (int w = 0; w < WORDS; ++w) {
        const int at = WORDS == 1 ? kb : min(kb + 4 * w, last & ~3);
        next_[j][w] = __ldg(reinterpret_cast<const uint32_t*>(args.a_scale + row_[j] + at));
      }
    }
  }

  // To the chunk asked for last.
  __device__ __forceinline__ void step() {
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
#pragma unroll
      for (int w = 0; w < WORDS; ++w) word_[j][w] = next_[j][w];
    }
  }

  // Of this lane's j-th row and a block of the chunk.
  __device__ __forceinline__ uint32_t byte(int j, int block) const {
    return word_[j][block / 4] >> 8 * (block % 4) & 255;
  }

 private:
  uint32_t row_[EACH];  // bytes from the first scale
  uint32_t word_[EACH][WORDS], next_[EACH][WORDS];
};

}  // namespace causeway
