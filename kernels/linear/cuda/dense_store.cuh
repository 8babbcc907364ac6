// Sums of a tile to the output: float32, bf16, or e4m3 codes with a scale per row and 128 columns.
#pragma once

#include <cuda_bf16.h>

#include "copy_engine.cuh"
#include "../../quant_rows/cuda/codes.cuh"
#include "dense_tiles.cuh"
#include "hopper.cuh"

namespace causeway {

__device__ __forceinline__ float rounded(float value) {
  return __bfloat162float(__float2bfloat16_rn(value));
}

// First element of a row of the tile's group.
template <typename T>
__device__ __forceinline__ T* output_line(const DenseArguments& args, const Tile& tile, int row) {
  return static_cast<T*>(args.out) + static_cast<int64_t>(row) * args.out_stride +
         static_cast<int64_t>(tile.group) * args.n;
}

// Accumulators kFirst .. kFirst + kCount - 1 of a thread: columns kFirst * 2 .. of the tile.
template <int kFirst, int kCount, int kParts>
__device__ __forceinline__ void emit_float(
    const DenseArguments& args, const Tile& tile, const float (&sum)[kParts], int row_in_tile,
    int lane) {
  const bool even = args.out_stride % 2 == 0 && args.n % 2 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile.row + row_in_tile + half * 8;
    if (row >= args.rows) continue;
    float* line = output_line<float>(args, tile, row);
#pragma unroll
    for (int i = kFirst; i < kFirst + kCount; i += 4) {
      const int column = tile.column + i * 2 + (lane & 3) * 2;
      const float a = sum[i + half * 2], b = sum[i + half * 2 + 1];
      if (even) {
        if (column < args.n) *reinterpret_cast<float2*>(line + column) = make_float2(a, b);
      } else {
        if (column < args.n) line[column] = a;
        if (column + 1 < args.n) line[column + 1] = b;
      }
    }
  }
}

// The same through shared memory, so that a warp writes whole rows. The 16 rows belong to one warp.
template <class S, int kFirst, int kCount>
__device__ __forceinline__ void emit_bfloat16(
    const DenseArguments& args, const Tile& tile, const float (&sum)[S::kParts], uint8_t* staging,
    int first_row, int lane) {
  __syncwarp();
  const uint32_t target = smem_address(staging) + (lane & 15) * S::kStagingRow + (lane >> 4) * 16;
#pragma unroll
  for (int i = kFirst; i < kFirst + kCount; i += 8) {
    store_matrices(
        target + (i - kFirst) * 4, pack_bf16(sum[i], sum[i + 1]), pack_bf16(sum[i + 2], sum[i + 3]),
        pack_bf16(sum[i + 4], sum[i + 5]), pack_bf16(sum[i + 6], sum[i + 7]));
  }
  __syncwarp();
  constexpr int kChunks = kCount / 4;  // 16-byte chunks of a row
  constexpr int kRowsAtOnce = 32 / kChunks;
  const bool aligned = args.out_stride % 8 == 0 && args.n % 8 == 0;
  const int chunk = lane % kChunks;
  const int column = tile.column + kFirst * 2 + chunk * 8;
#pragma unroll
  for (int pass = 0; pass < 16 / kRowsAtOnce; ++pass) {
    const int local = pass * kRowsAtOnce + lane / kChunks;
    const int row = tile.row + first_row + local;
    if (row >= args.rows || column >= args.n) continue;
    const uint8_t* source = staging + local * S::kStagingRow + chunk * 16;
    __nv_bfloat16* line = output_line<__nv_bfloat16>(args, tile, row);
    if (aligned) {
      *reinterpret_cast<uint4*>(line + column) = *reinterpret_cast<const uint4*>(source);
    } else {
      const __nv_bfloat16* values = reinterpret_cast<const __nv_bfloat16*>(source);
      for (int i = 0; i < 8; ++i) {
        if (column + i < args.n) line[column + i] = values[i];
      }
    }
  }
}

// A tile of 128 columns as codes: four neighbouring lanes hold a row, and so a whole scale block.
template <class S>
__device__ __forceinline__ void emit_codes(
    const DenseArguments& args, const Tile& tile, const float (&sum)[S::kParts], uint8_t* staging,
    int first_row, int lane) {
  static_assert(S::kColumns == 128 && S::kStagingRow >= 128 + 16, "one block of columns");
  float peak[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < S::kParts; ++i) {
    peak[i / 2 % 2] = max_or_nan(peak[i / 2 % 2], fabsf(rounded(sum[i])));
  }
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      peak[half] = max_or_nan(peak[half], __shfl_xor_sync(0xFFFFFFFFu, peak[half], step));
    }
    const uint32_t byte = scale_byte(__float_as_uint(peak[half]));
    const float inverse = inverse_scale(byte);
    const int local = lane / 4 + half * 8, row = tile.row + first_row + local;
    uint8_t* line = staging + local * S::kStagingRow + (lane & 3) * 2;
#pragma unroll
    for (int i = half * 2; i < S::kParts; i += 4) {
      *reinterpret_cast<uint16_t*>(line + (i / 4) * 8) =
          static_cast<uint16_t>(code_pair(rounded(sum[i]), rounded(sum[i + 1]), inverse));
    }
    if ((lane & 3) == 0 && row < args.rows) {
      const int block = (tile.group * args.n + tile.column) / 128;
      args.scale[row * args.scale_stride + block] = static_cast<uint8_t>(byte);
      args.columns.write(row, block, byte);
    }
  }
  __syncwarp();
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const int local = pass * 4 + lane / 8, row = tile.row + first_row + local;
    if (row >= args.rows) continue;
    uint8_t* line = output_line<uint8_t>(args, tile, row) + tile.column;
    *reinterpret_cast<uint4*>(line + (lane & 7) * 16) =
        *reinterpret_cast<const uint4*>(staging + local * S::kStagingRow + (lane & 7) * 16);
  }
}

// Four neighbouring columns of one row, already summed over the segments. For codes the caller is a
// whole warp with the 128 columns of a row.
__device__ __forceinline__ void store_quad(
    const DenseArguments& args, const Tile& tile, int row, int column, float4 v, int lane) {
  if (args.out_kind == kOutCodes) {
    v = make_float4(rounded(v.x), rounded(v.y), rounded(v.z), rounded(v.w));
    float peak = max_or_nan(max_or_nan(fabsf(v.x), fabsf(v.y)), max_or_nan(fabsf(v.z), fabsf(v.w)));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      peak = max_or_nan(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, step));
    }
    const uint32_t byte = scale_byte(__float_as_uint(peak));
    const float inverse = inverse_scale(byte);
    const uint32_t codes = code_pair(v.x, v.y, inverse) | (code_pair(v.z, v.w, inverse) << 16);
    *reinterpret_cast<uint32_t*>(output_line<uint8_t>(args, tile, row) + column) = codes;
    if (lane == 0) {
      const int block = (tile.group * args.n + column) / 128;
      args.scale[row * args.scale_stride + block] = static_cast<uint8_t>(byte);
      args.columns.write(row, block, byte);
    }
    return;
  }
  if (column >= args.n) return;
  const bool whole = args.out_stride % 4 == 0 && args.n % 4 == 0;
  if (args.out_kind == kOutFloat) {
    float* line = output_line<float>(args, tile, row) + column;
    if (whole) {
      *reinterpret_cast<float4*>(line) = v;
    } else {
      const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < args.n) line[i] = values[i];
      }
    }
  } else {
    __nv_bfloat16* line = output_line<__nv_bfloat16>(args, tile, row) + column;
    const uint32_t low = pack_bf16(v.x, v.y), high = pack_bf16(v.z, v.w);
    if (whole) {
      *reinterpret_cast<uint2*>(line) = make_uint2(low, high);
    } else {
      const uint32_t words[2] = {low, high};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < args.n) {
          line[i] = __ushort_as_bfloat16(static_cast<uint16_t>(words[i / 2] >> (16 * (i & 1))));
        }
      }
    }
  }
}

}  // namespace causeway
