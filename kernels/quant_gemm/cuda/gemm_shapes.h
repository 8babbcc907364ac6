// Every tile shape that is compiled; kernels/quant_gemm/tuning.py names them by their index here.
// X(index, rows, warpgroups, columns, stages)
#pragma once

#define SHAPES_SMALL(X)     \
  X(0, 16, 1, 16, 24)    \
  X(1, 16, 1, 32, 24)    \
  X(2, 16, 1, 64, 16)    \
  X(3, 16, 1, 128, 10)   \
  X(4, 64, 1, 16, 16)    \
  X(5, 64, 1, 32, 16)    \
  X(6, 64, 1, 64, 12)    \
  X(7, 64, 1, 128, 8)

#define SHAPES_LARGE(X)     \
  X(8, 128, 2, 32, 10)   \
  X(9, 128, 2, 64, 8)    \
  X(10, 128, 2, 128, 6)

#define CAUSEWAY_SHAPE_NAME(index) gemm_shape_##index

#define CAUSEWAY_DEFINE_SHAPE(index, rows, warpgroups, columns, stages)                  \
  int CAUSEWAY_SHAPE_NAME(index)(const CUtensorMap& a, const CUtensorMap& b,                      \
                                 const GemmArguments& args, int grid, cudaStream_t stream) {      \
    return launch_gemm<Shape<rows, warpgroups, columns, stages>>(a, b, args, grid, stream); \
  }
