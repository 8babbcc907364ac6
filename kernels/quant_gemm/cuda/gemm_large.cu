// Tiles for many rows.
#include "gemm.cuh"
#include "gemm_shapes.h"

namespace causeway {
SHAPES_LARGE(CAUSEWAY_DEFINE_SHAPE)
}  // namespace causeway
