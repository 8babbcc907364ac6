// Tiles for few rows: a cluster shares K.
#include "dense.cuh"
#include "product_shapes.h"

namespace causeway {
SHAPES_SPLIT(CAUSEWAY_DEFINE_PRODUCT)
}  // namespace causeway
