// Tiles of two blocks that share an expert's weight: many rows of many weights, plain and gated.
#include "gemm_shapes.h"
#include "group.cuh"

namespace causeway {
SHAPES_GROUP(CAUSEWAY_DEFINE_GROUP)
}  // namespace causeway
