// Every tile of the grouped output projection; kernels/grouped_output/cuda_impl.py names them by index.
// X(index, rows, warpgroups, columns, stages, split, side, rope, blocks)
#pragma once

#define GROUPED_SHAPES(X)                 \
  X(0, 16, 1, 64, 9, true, 2, true, 2)    \
  X(1, 32, 1, 64, 8, true, 2, true, 2)    \
  X(2, 64, 1, 64, 5, true, 2, true, 2)    \
  X(3, 128, 2, 64, 3, true, 2, true, 2)   \
  X(4, 16, 1, 128, 5, true, 1, true, 2)   \
  X(5, 32, 1, 128, 4, true, 1, true, 2)   \
  X(6, 64, 1, 128, 3, true, 1, true, 2)   \
  X(7, 128, 2, 128, 5, true, 1, true, 1)  \
  X(8, 128, 2, 128, 6, false, 1, true, 1)
