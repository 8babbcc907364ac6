// Scales once more as float32, column by column in pieces of rows: how an optional backend reads them.
#pragma once

#include <cstdint>

namespace causeway {

struct ScaleColumns {
  float* data;  // [pieces, blocks, 2^shift], or null: nobody asked for them
  int blocks;
  int shift;

  // `byte` is 1..255, as quantised rows have it; 255 stands for NaN.
  __device__ __forceinline__ void write(int64_t row, int block, uint32_t byte) const {
    if (data == nullptr) return;
    const int64_t line = (row >> shift) * blocks + block;
    data[(line << shift) + (row & ((int64_t{1} << shift) - 1))] =
        __uint_as_float(byte == 255 ? 0x7FC00000u : byte << 23);
  }
};

}  // namespace causeway
