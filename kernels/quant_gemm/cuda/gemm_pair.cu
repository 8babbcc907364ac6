// Tiles of two blocks that share a weight: many rows.
#include "gemm_shapes.h"
#include "pair.cuh"

namespace causeway {
SHAPES_PAIR(CAUSEWAY_DEFINE_PAIR)
}  // namespace causeway
