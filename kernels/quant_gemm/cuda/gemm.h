// What one GEMM launch is told; see gemm.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace causeway {

struct GemmArguments {
  const uint8_t* a_scale;    // [rows, k_blocks], E8M0, less than 4 GiB
  const uint8_t* b_scale;    // [groups, n_blocks, k_blocks], E8M0, less than 4 GiB
  void* out;                 // [rows, n], bf16 or float32
  int64_t out_stride;        // elements
  const int64_t* offsets;    // [groups + 1] rows, on the device; null for one weight
  uint32_t a_scale_stride;   // bytes, a multiple of 4
  uint32_t b_scale_stride;   // bytes between lines of blocks
  uint32_t b_scale_group;    // bytes between groups
  int rows;
  int groups;
  int n;
  int n_blocks;
  int k_blocks;
  int row_offset;            // rows of the first scale block that lie before the weight
  int col_offset;            // likewise for columns
  int out_is_float;
};

// Starts one tile shape on `grid` blocks; returns a cudaError_t.
using GemmLauncher = int (*)(const CUtensorMap&, const CUtensorMap&, const GemmArguments&, int, cudaStream_t);

}  // namespace causeway
