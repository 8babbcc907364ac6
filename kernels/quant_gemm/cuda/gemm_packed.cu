// Tiles that read packed FP4 weights: few rows.
#include "packed.cuh"
#include "packed_shapes.h"

namespace causeway {
SHAPES_PACKED(CAUSEWAY_DEFINE_PACKED)
}  // namespace causeway
