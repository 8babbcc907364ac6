// Every tile of packed.cuh that is compiled: X(index, rows, halves of 64 weight rows, stages).
// kernels/quant_gemm/tuning.py names them by their index here.
#pragma once

#include "gemm.h"

#define SHAPES_PACKED(X) \
  X(0, 8, 1, 10)         \
  X(1, 16, 2, 5)         \
  X(2, 32, 2, 4)         \
  X(3, 48, 2, 3)

namespace causeway {

// Tensor maps of the rows, the packed weights, and their 1x32 scales.
struct PackedMaps {
  CUtensorMap rows, packed, sub;
};

using PackedLauncher = int (*)(const PackedMaps&, const GemmArguments&, int, cudaStream_t);

}  // namespace causeway

#define CAUSEWAY_PACKED_SIGNATURE(index)                                                         \
  int packed_shape_##index(const PackedMaps& maps, const GemmArguments& args, int multiprocessors, \
                           cudaStream_t stream)
#define CAUSEWAY_DEFINE_PACKED(index, rows, halves, stages)                                      \
  CAUSEWAY_PACKED_SIGNATURE(index) {                                                           \
    return launch_packed<PackedShape<rows, halves, stages>>(maps, args, multiprocessors, stream); \
  }
