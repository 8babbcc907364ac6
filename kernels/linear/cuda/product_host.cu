// The C entry of plain products.
#include "dense_host.cuh"
#include "product_shapes.h"

namespace causeway {

#define DECLARE(index, rows, warpgroups, columns, stages, split, side, rope, blocks)             \
  int CAUSEWAY_PRODUCT(index)(const CUtensorMap&, const CUtensorMap&, const DenseArguments&, int, \
                              cudaStream_t);
SHAPES_WHOLE(DECLARE)
SHAPES_SPLIT(DECLARE)

}  // namespace causeway

namespace {

using namespace causeway;

#define ENTRY(index, rows, warpgroups, columns, stages, split, side, rope, blocks) \
  {rows, columns, CAUSEWAY_PRODUCT(index)},
const DenseTile kTiles[] = {SHAPES_WHOLE(ENTRY) SHAPES_SPLIT(ENTRY)};

}  // namespace

// See start_product in dense_host.cuh.
extern "C" int causeway_product(int tile, const void* a, int64_t a_stride, int64_t a_group,
                                const void* b, int64_t b_stride, int64_t k,
                                const DenseArguments* args, int multiprocessors, void* stream) {
  return start_product(kTiles[tile], a, a_stride, a_group, b, b_stride, k, *args, multiprocessors,
                       stream);
}
