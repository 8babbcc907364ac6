// Every tile shape that is compiled; kernels/quant_gemm/tuning.py names them by their index here, which is their
// place in the order SMALL, LARGE, WIDE, PAIR, HALF, OVERLAP, DUO, GROUP. Tiles of gemm.cuh: X(index, rows,
// warpgroups, columns, stages, blocks of K in a stage). Tiles of wide.cuh: X(index, rows, warpgroups, stages, gated).
#pragma once

#define SHAPES_SMALL(X)    \
  X(0, 16, 1, 16, 12, 4)   \
  X(1, 16, 1, 32, 8, 4)    \
  X(2, 16, 1, 64, 10, 2)   \
  X(3, 16, 1, 128, 11, 1)  \
  X(4, 64, 1, 16, 10, 2)   \
  X(5, 64, 1, 32, 8, 2)    \
  X(6, 64, 1, 64, 12, 1)   \
  X(7, 64, 1, 128, 8, 1)

#define SHAPES_LARGE(X)    \
  X(8, 128, 2, 32, 5, 2)   \
  X(9, 128, 2, 64, 8, 1)   \
  X(10, 128, 2, 128, 6, 1)

#define SHAPES_WIDE(X)     \
  X(11, 128, 2, 4, false)  \
  X(12, 16, 1, 6, true)    \
  X(13, 64, 1, 5, true)    \
  X(14, 128, 2, 4, true)

// Tiles of pair.cuh: X(index, blocks, columns, columns of a product, stages).
#define SHAPES_PAIR(X)      \
  X(15, 2, 256, 128, 4)     \
  X(16, 1, 256, 128, 4)     \
  X(17, 2, 192, 192, 4)     \
  X(18, 2, 96, 96, 7)

#define SHAPES_HALF(X)     \
  X(19, 32, 1, 16, 8, 4)   \
  X(20, 32, 1, 32, 12, 2)  \
  X(21, 32, 1, 64, 8, 2)   \
  X(22, 32, 1, 128, 10, 1)

// Tiles of overlap.cuh: X(index, columns, stages, stages of the weight that are brought before the rows').
#define SHAPES_OVERLAP(X)  \
  X(23, 96, 5, 3)          \
  X(24, 128, 5, 3)

// Tiles of duo.cuh: X(index, columns, stages, blocks of K in a stage, warpgroups, early, woven).
#define SHAPES_DUO(X)                  \
  X(25, 32, 8, 2, 1, false, false)     \
  X(26, 64, 6, 2, 1, false, false)     \
  X(27, 96, 5, 2, 1, true, false)      \
  X(28, 112, 10, 1, 1, true, true)     \
  X(29, 128, 8, 1, 1, false, false)    \
  X(30, 128, 8, 1, 2, true, false)

// Tiles of group.cuh: X(index, gated).
#define SHAPES_GROUP(X)    \
  X(31, false)             \
  X(32, true)

#define CAUSEWAY_SHAPE_NAME(index) gemm_shape_##index

#define CAUSEWAY_SHAPE_SIGNATURE(index)                                                     \
  int CAUSEWAY_SHAPE_NAME(index)(const Maps& maps, const GemmArguments& args,               \
                                 const GateArguments& gate, int grid, cudaStream_t stream)

#define CAUSEWAY_DEFINE_SHAPE(index, rows, warpgroups, columns, stages, depth)                 \
  CAUSEWAY_SHAPE_SIGNATURE(index) {                                                            \
    return launch_gemm<Shape<rows, warpgroups, columns, stages, depth>>(maps, args, gate, grid, stream); \
  }
#define CAUSEWAY_DEFINE_WIDE(index, rows, warpgroups, stages, gated)                           \
  CAUSEWAY_SHAPE_SIGNATURE(index) {                                                            \
    return launch_wide<WideShape<rows, warpgroups, stages, gated>>(maps, args, gate, grid, stream); \
  }
#define CAUSEWAY_DEFINE_PAIR(index, blocks, columns, product, stages)                              \
  CAUSEWAY_SHAPE_SIGNATURE(index) {                                                            \
    using Pair = PairShape<blocks, columns, product, stages>;                                  \
    return launch_pair<Pair>(maps, args, gate, grid, stream);                                  \
  }
#define CAUSEWAY_DEFINE_OVERLAP(index, columns, stages, early)                                     \
  CAUSEWAY_SHAPE_SIGNATURE(index) {                                                            \
    return launch_overlap<OverlapShape<columns, stages, early>>(maps, args, gate, grid, stream); \
  }
#define CAUSEWAY_DEFINE_DUO(index, ...)                                                        \
  CAUSEWAY_SHAPE_SIGNATURE(index) {                                                            \
    using Duo = DuoShape<__VA_ARGS__>;                                                         \
    return launch_duo<Duo>(maps, args, gate, grid, stream);                                    \
  }
#define CAUSEWAY_DEFINE_GROUP(index, gated)                                                      \
  CAUSEWAY_SHAPE_SIGNATURE(index) {                                                            \
    return launch_group<GroupShape<gated>>(maps, args, gate, grid, stream);                    \
  }
