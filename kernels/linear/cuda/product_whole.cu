// Tiles whose blocks walk all of K.
#include "dense.cuh"
#include "product_shapes.h"

namespace causeway {
SHAPES_WHOLE(CAUSEWAY_DEFINE_PRODUCT)
}  // namespace causeway
