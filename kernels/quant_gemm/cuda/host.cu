// The C entry of the library: makes the tensor maps of one product and starts the chosen tile.

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "gemm.h"
#include "gemm_shapes.h"

namespace causeway {

#define DECLARE(index, rows, warpgroups, columns, stages) \
  int CAUSEWAY_SHAPE_NAME(index)(                                  \
      const CUtensorMap&, const CUtensorMap&, const GemmArguments&, int, cudaStream_t);
SHAPES_SMALL(DECLARE)
SHAPES_LARGE(DECLARE)

}  // namespace causeway

namespace {

using namespace causeway;

struct TileShape {
  int rows, columns;
  GemmLauncher launch;
};

#define ENTRY(index, rows, warpgroups, columns, stages) \
  {rows, columns, CAUSEWAY_SHAPE_NAME(index)},
const TileShape kTiles[] = {SHAPES_SMALL(ENTRY) SHAPES_LARGE(ENTRY)};

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(function)
             : nullptr;
}

constexpr int kBlock = 128;
constexpr int kMapError = 10000;  // + the driver's CUresult

int encode(CUtensorMap& map, const void* data, int rank, const cuuint64_t* sizes,
           const cuuint64_t* strides, const cuuint32_t* box) {
  static const Encode function = find_encode();
  if (function == nullptr) return kMapError;
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = function(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rank, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kMapError + static_cast<int>(result);
}

}  // namespace

// a: e4m3 [rows, k] with a_stride bytes between rows; b: e4m3 [groups, n, k] with b_stride and b_group
// bytes; strides and addresses are multiples of 16. Returns 0, a cudaError_t, or 10000 + a CUresult.
extern "C" int causeway_gemm(int tile, const void* a, int64_t a_stride, const void* b, int64_t b_stride,
                             int64_t b_group, int64_t k, const GemmArguments* args,
                             int multiprocessors, void* stream) {
  const TileShape& shape = kTiles[tile];
  CUtensorMap a_map, b_map;
  const cuuint64_t a_sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(args->rows)};
  const cuuint64_t a_strides[1] = {static_cast<cuuint64_t>(a_stride)};
  const cuuint32_t a_box[2] = {kBlock, static_cast<cuuint32_t>(shape.rows)};
  const int a_error = encode(a_map, a, 2, a_sizes, a_strides, a_box);
  if (a_error != 0) return a_error;
  const cuuint64_t b_sizes[3] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(args->n),
                                 static_cast<cuuint64_t>(args->groups)};
  const cuuint64_t b_strides[2] = {static_cast<cuuint64_t>(b_stride),
                                   static_cast<cuuint64_t>(b_group)};
  const cuuint32_t b_box[3] = {kBlock, static_cast<cuuint32_t>(shape.columns), 1};
  const int b_error = encode(b_map, b, 3, b_sizes, b_strides, b_box);
  if (b_error != 0) return b_error;

  int grid = multiprocessors;
  if (args->offsets == nullptr) {
    const int lead = args->row_offset % shape.columns;
    const int64_t tiles = static_cast<int64_t>((args->n + lead + shape.columns - 1) / shape.columns) *
                          ((args->rows + shape.rows - 1) / shape.rows);
    grid = static_cast<int>(std::min<int64_t>(grid, tiles));
  }
  return shape.launch(a_map, b_map, *args, grid, static_cast<cudaStream_t>(stream));
}
