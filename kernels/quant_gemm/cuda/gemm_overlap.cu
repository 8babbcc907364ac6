// Tiles whose products run ahead of the sums: one weight, many rows.
#include "gemm_shapes.h"
#include "overlap.cuh"

namespace causeway {
SHAPES_OVERLAP(CAUSEWAY_DEFINE_OVERLAP)
}  // namespace causeway
