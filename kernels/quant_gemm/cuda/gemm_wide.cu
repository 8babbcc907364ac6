// Tiles of one product at a time: many rows, and the gated ones.
#include "gemm_shapes.h"
#include "wide.cuh"

namespace causeway {
SHAPES_WIDE(CAUSEWAY_DEFINE_WIDE)
}  // namespace causeway
