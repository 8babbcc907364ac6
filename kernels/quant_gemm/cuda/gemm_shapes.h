// Every tile shape that is compiled; kernels/quant_gemm/tuning.py names them by their index here.
// Tiles of gemm.cuh: X(index, rows, warpgroups, columns, stages). Tiles of wide.cuh: X(index, rows, warpgroups,
// stages, gated).
#pragma once

#define SHAPES_SMALL(X)  \
  X(0, 16, 1, 16, 24)    \
  X(1, 16, 1, 32, 24)    \
  X(2, 16, 1, 64, 16)    \
  X(3, 16, 1, 128, 10)   \
  X(4, 64, 1, 16, 16)    \
  X(5, 64, 1, 32, 16)    \
  X(6, 64, 1, 64, 12)    \
  X(7, 64, 1, 128, 8)

#define SHAPES_LARGE(X)  \
  X(8, 128, 2, 32, 10)   \
  X(9, 128, 2, 64, 8)    \
  X(10, 128, 2, 128, 6)

#define SHAPES_WIDE(X)     \
  X(11, 128, 2, 4, false)  \
  X(12, 16, 1, 6, true)    \
  X(13, 64, 1, 5, true)    \
  X(14, 128, 2, 4, true)

#define CAUSEWAY_SHAPE_NAME(index) gemm_shape_##index

#define CAUSEWAY_SHAPE_SIGNATURE(index)                                                     \
  int CAUSEWAY_SHAPE_NAME(index)(const Maps& maps, const GemmArguments& args,               \
                                 const GateArguments& gate, int grid, cudaStream_t stream)

#define CAUSEWAY_DEFINE_SHAPE(index, rows, warpgroups, columns, stages)                        \
  CAUSEWAY_SHAPE_SIGNATURE(index) {                                                            \
    return launch_gemm<Shape<rows, warpgroups, columns, stages>>(maps, args, gate, grid, stream); \
  }
#define CAUSEWAY_DEFINE_WIDE(index, rows, warpgroups, stages, gated)                           \
  CAUSEWAY_SHAPE_SIGNATURE(index) {                                                            \
    return launch_wide<WideShape<rows, warpgroups, stages, gated>>(maps, args, gate, grid, stream); \
  }
