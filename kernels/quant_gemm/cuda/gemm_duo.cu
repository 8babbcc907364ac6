// Tiles of two blocks that share the weight: 65 to 128 rows.
#include "duo.cuh"
#include "gemm_shapes.h"

namespace causeway {
SHAPES_DUO(CAUSEWAY_DEFINE_DUO)
}  // namespace causeway
