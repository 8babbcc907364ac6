// What one launch of the bf16 product is told; see dense.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../../quant_rows/cuda/scale_columns.cuh"

namespace causeway {

enum OutKind : int { kOutFloat = 0, kOutBfloat16 = 1, kOutCodes = 2 };

struct DenseArguments {
  void* out;                 // [rows, groups * n]: float32, bf16, or e4m3 codes
  int64_t out_stride;        // elements
  uint8_t* scale;            // codes: E8M0 byte of each row and 128 columns
  int64_t scale_stride;      // bytes
  ScaleColumns columns;
  const int64_t* positions;  // rope: [rows]
  const float* inv_freq;     // rope: [32]
  int rows;
  int box_rows;       // rows that one tensor copy brings: the tile's, or all if there are fewer
  int n;              // columns of a group
  int groups;
  int k_steps;        // 64 columns of K each, the last one padded with zeros
  int segment_steps;  // steps of one of the sums that are added at the end
  int head_steps;     // rope: steps of a head; its last one is rotated
  int out_kind;
  int weight_early;   // the weight is older than the kernel ahead in the stream
};

// Starts one tile shape; returns a cudaError_t. The grid is the launcher's own choice.
using DenseLauncher = int (*)(const CUtensorMap&, const CUtensorMap&, const DenseArguments&,
                              int multiprocessors, cudaStream_t);

struct DenseTile {
  int rows, columns;  // what one tensor copy brings of each operand
  DenseLauncher launch;
};

}  // namespace causeway
