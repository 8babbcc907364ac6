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

// Bytes from the first to a 16-byte chunk of a warp's 16 rows, which lie in parts of 64 columns (128 bytes a
// row) with the copy engine's 128-byte swizzle: no two rows of eight meet in a bank.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return (chunk >> 3) * 2048 + row * 128 + (((chunk ^ row) & 7) << 4);
}

// A warp's 16 rows of bfloat16 through shared memory, so that whole rows are written. `staging` belongs to the
// warp alone. The copy engine writes the rows while the warp goes on (large tiles, where all 16 belong
// to the tile); otherwise the warp writes them itself.
template <class S>
__device__ __forceinline__ void store_bfloat16(
    const GemmArguments& args, const CUtensorMap& out_map, const Tile& tile,
    const float (&sum)[S::kParts], uint8_t* staging, int first_row, int lane) {
  const uint32_t base = smem_address(staging);
  if constexpr (S::kTensorStore) {
    if (lane == 0) bulk_wait_read();
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < S::kParts; i += 8) {
    const int row = lane & 15, chunk = i / 4 + (lane >> 4);
    store_matrices(
        base + swizzled(row, chunk), pack_bf16(sum[i], sum[i + 1]), pack_bf16(sum[i + 2], sum[i + 3]),
        pack_bf16(sum[i + 4], sum[i + 5]), pack_bf16(sum[i + 6], sum[i + 7]));
  }
  const int first = tile.row + first_row;
  if constexpr (S::kTensorStore) {
    if (args.out_is_mapped && tile.column >= 0 && first + 16 <= tile.row_end) {  // it stores at no negative column
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < S::kParts / 32; ++i) {
          store_2d(&out_map, base + i * 2048, tile.column + i * 64, first);
        }
        bulk_commit();
      }
      return;
    }
  }
  __syncwarp();
  constexpr int kChunks = S::kParts / 4;  // 16-byte chunks of a row
  constexpr int kRowsAtOnce = 32 / kChunks;
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out);
  const bool aligned = args.out_stride % 8 == 0 && (tile.column & 7) == 0;
  const int chunk = lane % kChunks;
  const int column = tile.column + chunk * 8;
#pragma unroll S::kTensorStore ? 1 : 16 / kRowsAtOnce
  for (int pass = 0; pass < 16 / kRowsAtOnce; ++pass) {
    const int local = pass * kRowsAtOnce + lane / kChunks;
    const int row = first + local;
    if (row >= tile.row_end) continue;
    const uint8_t* source = staging + swizzled(local, chunk);
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
