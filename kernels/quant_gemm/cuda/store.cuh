// Registers of a tile to the output, in float32 or bfloat16.
#pragma once

#include <cuda_bf16.h>

#include "copy_engine.cuh"
#include "hopper.cuh"
#include "tiles.cuh"

namespace causeway {

template <int kParts>
__device__ __forceinline__ void store_float(
    const GemmArguments& args, const Tile& tile, const float (&sum)[kParts], int row_in_tile,
    int lane) {
  float* out = static_cast<float*>(args.out);
  const bool even = (args.out_stride % 2 == 0) && (tile.column % 2 == 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile.row + row_in_tile + half * 8;
    if (row >= tile.row_end) continue;
    float* line = out + static_cast<int64_t>(row) * args.out_stride;
#pragma unroll
    for (int i = 0; i < kParts; i += 4) {
      const int column = tile.column + i * 2 + (lane & 3) * 2;
      const float a = sum[i + half * 2], b = sum[i + half * 2 + 1];
      if (even && column >= 0 && column + 2 <= args.n) {
        *reinterpret_cast<float2*>(line + column) = make_float2(a, b);
      } else {
        if (column >= 0 && column < args.n) line[column] = a;
        if (column + 1 >= 0 && column + 1 < args.n) line[column + 1] = b;
      }
    }
  }
}

// Through shared memory, so that a warp writes whole rows. The 16 rows belong to one warp alone.
template <class S>
__device__ __forceinline__ void store_bfloat16(
    const GemmArguments& args, const Tile& tile, const float (&sum)[S::kParts], uint8_t* staging,
    int first_row, int lane) {
  __syncwarp();
  const uint32_t target = smem_address(staging) +
                          ((lane & 7) + (lane & 8)) * S::kStagingRow + (lane >> 4) * 16;
#pragma unroll
  for (int i = 0; i < S::kParts; i += 8) {
    store_matrices(
        target + i * 4, pack_bf16(sum[i], sum[i + 1]), pack_bf16(sum[i + 2], sum[i + 3]),
        pack_bf16(sum[i + 4], sum[i + 5]), pack_bf16(sum[i + 6], sum[i + 7]));
  }
  __syncwarp();
  constexpr int kChunks = S::kColumns / 8;  // 16-byte chunks of a row
  constexpr int kRowsAtOnce = 32 / kChunks;
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out);
  const bool aligned = args.out_stride % 8 == 0 && (tile.column & 7) == 0;
  const int chunk = lane % kChunks;
  const int column = tile.column + chunk * 8;
#pragma unroll
  for (int pass = 0; pass < 16 / kRowsAtOnce; ++pass) {
    const int local = pass * kRowsAtOnce + lane / kChunks;
    const int row = tile.row + first_row + local;
    if (row >= tile.row_end) continue;
    const uint8_t* source = staging + local * S::kStagingRow + chunk * 16;
    __nv_bfloat16* line = out + static_cast<int64_t>(row) * args.out_stride;
    if (aligned && column >= 0 && column + 8 <= args.n) {
      *reinterpret_cast<uint4*>(line + column) = *reinterpret_cast<const uint4*>(source);
    } else {
      const __nv_bfloat16* values = reinterpret_cast<const __nv_bfloat16*>(source);
      for (int i = 0; i < 8; ++i) {
        if (column + i >= 0 && column + i < args.n) line[column + i] = values[i];
      }
    }
  }
}

}  // namespace causeway
