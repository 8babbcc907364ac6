// Grouped output projection: RoPE undone on the way in, optionally FP8 codes on the way out. The C entry.
#include "../../linear/cuda/dense.cuh"
#include "../../linear/cuda/dense_host.cuh"
#include "grouped_shapes.h"

namespace {

using namespace causeway;

#define ENTRY(index, rows, warpgroups, columns, stages, split, side, rope, blocks) \
  {rows, columns,                                                                  \
   launch_dense<DenseShape<rows, warpgroups, columns, stages, split, side, rope, blocks>>},
const DenseTile kTiles[] = {GROUPED_SHAPES(ENTRY)};

}  // namespace

// See start_product in dense_host.cuh.
extern "C" int causeway_grouped_output(
    int tile, const void* a, int64_t a_stride, int64_t a_group, const void* b, int64_t b_stride,
    int64_t k, const DenseArguments* args, int multiprocessors, void* stream) {
  return start_product(kTiles[tile], a, a_stride, a_group, b, b_stride, k, *args, multiprocessors,
                       stream);
}
