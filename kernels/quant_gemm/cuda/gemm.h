// What one GEMM launch is told; see gemm.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../../quant_rows/cuda/scale_columns.cuh"

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
  int out_is_mapped;         // the tensor map of the output is made
  int offsets_are_old;       // the kernel directly ahead writes neither them nor the weights
};

// What a product with SwiGLU in its store is told besides. Of GemmArguments `out` is unused there, and `n` is the
// hidden columns; the output's map is made of `q`. The weight has the gate's rows from 0 and the up's from
// `up_row` on.
struct GateArguments {
  uint8_t* q;                // [rows, n] e4m3; address and stride are multiples of 16
  int64_t q_stride;          // bytes
  uint8_t* scale;            // [rows, n / 128], E8M0
  int64_t scale_stride;      // bytes
  ScaleColumns columns;
  const float* row_weight;   // [rows] or null
  float limit;
  int up_row;                // a multiple of 128
};

// Tensor maps of the rows, the weight, and the output.
struct Maps {
  CUtensorMap a, b, out;
};

// Starts one tile shape on `grid` blocks; returns a cudaError_t.
using GemmLauncher = int (*)(const Maps&, const GemmArguments&, const GateArguments&, int, cudaStream_t);

}  // namespace causeway
