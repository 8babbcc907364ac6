// The store of a gated tile: SwiGLU of gate and up, its FP8 form with one scale per row and 128 columns. The
// bits are those of a product stored in bfloat16 and `swiglu_quant` after it.
#pragma once

#include "../../quant_rows/cuda/swiglu.cuh"
#include "copy_engine.cuh"
#include "hopper.cuh"
#include "store.cuh"
#include "tiles.cuh"

namespace causeway {

// Routing weights of the rows lane / 4 and lane / 4 + 8 of the warp's 16.
__device__ __forceinline__ float2 load_row_weights(const GemmArguments& args, const GateArguments& gated,
                                                   const Tile& tile, int first_row, int lane) {
  if (gated.row_weight == nullptr) return make_float2(1.0f, 1.0f);
  const int upper = tile.row + first_row + lane / 4, last = args.rows - 1;
  return make_float2(__ldg(gated.row_weight + min(upper, last)), __ldg(gated.row_weight + min(upper + 8, last)));
}

// `gate` and `up` hold rows lane / 4 and lane / 4 + 8 of the warp's 16: values i, i + 1 of every four are the
// first one's. `gate` is overwritten.
template <class S>
__device__ __forceinline__ void store_gated(
    const GemmArguments& args, const GateArguments& gated, const CUtensorMap& out_map,
    const Tile& tile, float2 row_weights, float (&gate)[S::kParts], float (&up)[S::kParts], uint8_t* staging,
    int first_row, int lane) {
  const int upper = tile.row + first_row + lane / 4;
  float peak[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < S::kParts; i += 2) {
    const int half = (i >> 1) & 1;
    float a = gate[i], b = gate[i + 1], c = up[i], d = up[i + 1];
    round_to_bfloat16(a, b);
    round_to_bfloat16(c, d);
    gate[i] = swiglu_value(a, c, gated.limit, half == 0 ? row_weights.x : row_weights.y);
    gate[i + 1] = swiglu_value(b, d, gated.limit, half == 0 ? row_weights.x : row_weights.y);
    round_to_bfloat16(gate[i], gate[i + 1]);
    peak[half] = max_or_nan(peak[half], max_or_nan(fabsf(gate[i]), fabsf(gate[i + 1])));
  }
  if (lane == 0) bulk_wait_read();
  __syncwarp();
  const int block = tile.column / 128;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    peak[half] = max_or_nan(peak[half], __shfl_xor_sync(0xFFFFFFFFu, peak[half], 1));
    peak[half] = max_or_nan(peak[half], __shfl_xor_sync(0xFFFFFFFFu, peak[half], 2));
    const uint32_t byte = scale_byte(__float_as_uint(peak[half]));
    const float inverse = inverse_scale(byte);
    const int row = upper + half * 8;
    if ((lane & 3) == 0 && row < tile.row_end) {
      gated.scale[row * gated.scale_stride + block] = static_cast<uint8_t>(byte);
      gated.columns.write(row, block, byte);
    }
    const int local = lane / 4 + half * 8;
#pragma unroll
    for (int i = 2 * half; i < S::kParts; i += 4) {  // columns i / 4 * 8 + (lane & 3) * 2 and the next
      *reinterpret_cast<uint16_t*>(staging + swizzled(local, i / 8) + (i / 4 & 1) * 8 + (lane & 3) * 2) =
          static_cast<uint16_t>(code_pair(gate[i], gate[i + 1], inverse));
    }
  }
  const int first = tile.row + first_row;
  if (first + 16 <= tile.row_end) {
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      store_2d(&out_map, smem_address(staging), tile.column, first);
      bulk_commit();
    }
    return;
  }
  __syncwarp();
  const int chunk = lane & 7, column = tile.column + chunk * 16;
#pragma unroll 1
  for (int pass = 0; pass < 4; ++pass) {
    const int local = pass * 4 + lane / 8, row = first + local;
    if (row < tile.row_end && column < args.n) {  // n is a multiple of 16
      *reinterpret_cast<uint4*>(gated.q + row * gated.q_stride + column) =
          *reinterpret_cast<const uint4*>(staging + swizzled(local, chunk));
    }
  }
}

}  // namespace causeway
