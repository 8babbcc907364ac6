// Every tile of a plain product; kernels/linear/tuning.py names them by their index here.
// X(index, rows, warpgroups, columns, stages, split, side, rope, blocks)
#pragma once

#define SHAPES_WHOLE(X)                     \
  X(0, 16, 1, 64, 12, false, 1, false, 1)   \
  X(1, 16, 1, 128, 10, false, 1, false, 1)  \
  X(2, 64, 1, 64, 10, false, 1, false, 1)   \
  X(3, 64, 1, 128, 8, false, 1, false, 1)   \
  X(4, 128, 2, 64, 8, false, 1, false, 1)   \
  X(5, 128, 2, 128, 6, false, 1, false, 1)  \
  X(6, 128, 2, 192, 5, false, 1, false, 1)

#define SHAPES_SPLIT(X)                     \
  X(7, 16, 1, 16, 16, true, 1, false, 2)    \
  X(8, 16, 1, 32, 14, true, 1, false, 2)    \
  X(9, 16, 1, 64, 9, true, 1, false, 2)     \
  X(10, 64, 1, 16, 8, true, 1, false, 2)    \
  X(11, 64, 1, 32, 7, true, 1, false, 2)    \
  X(12, 64, 1, 64, 5, true, 1, false, 2)    \
  X(13, 128, 2, 32, 4, true, 1, false, 2)   \
  X(14, 128, 2, 64, 3, true, 1, false, 2)   \
  X(15, 128, 2, 128, 5, true, 1, false, 1)  \
  X(16, 32, 1, 32, 10, true, 1, false, 2)   \
  X(17, 32, 1, 64, 8, true, 1, false, 2)    \
  X(18, 64, 1, 128, 3, true, 1, false, 2)

#define CAUSEWAY_PRODUCT(index) product_shape_##index

#define CAUSEWAY_DEFINE_PRODUCT(index, rows, warpgroups, columns, stages, split, side, rope, blocks) \
  int CAUSEWAY_PRODUCT(index)(const CUtensorMap& a, const CUtensorMap& b,                            \
                              const DenseArguments& args, int multiprocessors, cudaStream_t stream) { \
    return launch_dense<                                                                             \
        DenseShape<rows, warpgroups, columns, stages, split, side, rope, blocks>>(                   \
        a, b, args, multiprocessors, stream);                                                        \
  }
