// Tiles for few rows: the weight streams through, so many narrow column tiles.
#include "gemm.cuh"
#include "gemm_shapes.h"

namespace causeway {
SHAPES_SMALL(CAUSEWAY_DEFINE_SHAPE)
SHAPES_HALF(CAUSEWAY_DEFINE_SHAPE)
}  // namespace causeway
