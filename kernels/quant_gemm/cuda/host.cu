// The C entry of the library: makes the tensor maps of one product and starts the chosen tile.

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "gemm.h"
#include "gemm_shapes.h"
#include "packed_shapes.h"
#include "tensor_map.cuh"

namespace causeway {

#define DECLARE(index, ...) CAUSEWAY_SHAPE_SIGNATURE(index);
SHAPES_SMALL(DECLARE)
SHAPES_LARGE(DECLARE)
SHAPES_WIDE(DECLARE)
SHAPES_PAIR(DECLARE)
SHAPES_HALF(DECLARE)
SHAPES_OVERLAP(DECLARE)
SHAPES_DUO(DECLARE)
SHAPES_GROUP(DECLARE)

#define DECLARE_PACKED(index, ...) CAUSEWAY_PACKED_SIGNATURE(index);
SHAPES_PACKED(DECLARE_PACKED)

}  // namespace causeway

namespace {

using namespace causeway;

struct TileShape {
  int rows, columns;
  int box_rows, box_columns;  // that one copy brings
  int out_columns;            // of bfloat16 that one copy stores
  int blocks;                 // of threads that make a tile together
  GemmLauncher launch;
};

#define ENTRY(index, rows, warpgroups, columns, ...) \
  {rows, columns, rows, columns, 64, 1, CAUSEWAY_SHAPE_NAME(index)},
#define WIDE_ENTRY(index, rows, warpgroups, stages, gated) \
  {rows, gated ? 128 : 256, rows < 64 ? rows : 64, 128, 64, 1, CAUSEWAY_SHAPE_NAME(index)},
#define PAIR_ENTRY(index, blocks, columns, product, ...)                                        \
  {128 * blocks, columns, 128, columns / blocks, product % 64 == 0 ? 64 : 32, blocks, CAUSEWAY_SHAPE_NAME(index)},
#define OVERLAP_ENTRY(index, columns, ...) \
  {128, columns, 128, columns, columns % 64 == 0 ? 64 : 32, 1, CAUSEWAY_SHAPE_NAME(index)},
#define DUO_ENTRY(index, columns, stages, depth, groups, early, woven)                                              \
  {128, columns, 64, woven ? columns : columns / 2, columns % 64 == 0 ? 64 : columns % 32 == 0 ? 32 : 16, 2,        \
   CAUSEWAY_SHAPE_NAME(index)},
#define GROUP_ENTRY(index, gated) {256, gated ? 128 : 256, 64, 128, 64, 2, CAUSEWAY_SHAPE_NAME(index)},
const TileShape kTiles[] = {SHAPES_SMALL(ENTRY) SHAPES_LARGE(ENTRY) SHAPES_WIDE(WIDE_ENTRY)
                            SHAPES_PAIR(PAIR_ENTRY) SHAPES_HALF(ENTRY) SHAPES_OVERLAP(OVERLAP_ENTRY)
                            SHAPES_DUO(DUO_ENTRY) SHAPES_GROUP(GROUP_ENTRY)};

struct PackedTile {
  int rows, columns;
  PackedLauncher launch;
};

#define PACKED_ENTRY(index, rows, halves, stages) {rows, 64 * halves, packed_shape_##index},
const PackedTile kPackedTiles[] = {SHAPES_PACKED(PACKED_ENTRY)};

constexpr int kBlock = 128;
constexpr CUtensorMapDataType kBytes = CU_TENSOR_MAP_DATA_TYPE_UINT8;

// The output in parts of 16 rows and 128 bytes, as a warp stages it. Float32, and what the copy engine cannot
// address, has no map.
int encode_out(CUtensorMap& map, GemmArguments& args, const GateArguments& gate, int columns) {
  const bool gated = gate.q != nullptr;
  const void* data = gated ? gate.q : args.out;
  const int64_t stride = gated ? gate.q_stride : args.out_stride * 2;
  args.out_is_mapped =
      !args.out_is_float && stride % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  if (!args.out_is_mapped) return 0;
  const CUtensorMapSwizzle swizzle = columns == 16   ? CU_TENSOR_MAP_SWIZZLE_32B
                                     : columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                     : CU_TENSOR_MAP_SWIZZLE_128B;
  return encode_map(map, gated ? kBytes : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, {args.n, args.rows}, {stride},
                    {gated ? 128 : columns, 16}, swizzle);
}

}  // namespace

// a: e4m3 [rows, k] with a_stride bytes between rows; b: e4m3 [groups, b_rows, k] with b_stride and b_group
// bytes; strides and addresses are multiples of 16. `gate` is for gated tiles, else its `q` is null.
// Returns 0, a cudaError_t, or 10000 + a CUresult.
extern "C" int causeway_gemm(int tile, const void* a, int64_t a_stride, const void* b, int64_t b_stride,
                             int64_t b_group, int64_t b_rows, int64_t k, GemmArguments* args,
                             const GateArguments* gate, int multiprocessors, void* stream) {
  const TileShape& shape = kTiles[tile];
  Maps maps = {};
  const int a_error =
      encode_map(maps.a, kBytes, a, {k, args->rows}, {a_stride}, {kBlock, shape.box_rows});
  if (a_error != 0) return a_error;
  const int b_error = encode_map(maps.b, kBytes, b, {k, b_rows, args->groups}, {b_stride, b_group},
                                 {kBlock, shape.box_columns, 1});
  if (b_error != 0) return b_error;
  const int out_error = encode_out(maps.out, *args, *gate, shape.out_columns);
  if (out_error != 0) return out_error;

  int grid = multiprocessors;
  if (args->offsets == nullptr) {
    const int lead = args->row_offset % shape.columns;
    const int64_t tiles = static_cast<int64_t>((args->n + lead + shape.columns - 1) / shape.columns) *
                          ((args->rows + shape.rows - 1) / shape.rows);
    grid = static_cast<int>(std::min<int64_t>(grid / shape.blocks, tiles)) * shape.blocks;
  }
  return shape.launch(maps, *args, *gate, grid, static_cast<cudaStream_t>(stream));
}

// a: e4m3 [rows, k] with a_stride bytes between rows; packed: FP4 [groups, b_rows, k / 2] in the order of e2m1.cuh;
// sub: E8M0 [groups, b_rows, k / 32]; both contiguous; k is a multiple of 512; addresses and a_stride are of 16.
// Returns 0, a cudaError_t, or 10000 + a CUresult.
extern "C" int causeway_gemm_packed(int tile, const void* a, int64_t a_stride, const void* packed, const void* sub,
                                    int64_t b_rows, int64_t k, const GemmArguments* args, int multiprocessors,
                                    void* stream) {
  const PackedTile& shape = kPackedTiles[tile];
  PackedMaps maps = {};
  const int a_error = encode_map(maps.rows, kBytes, a, {k, args->rows}, {a_stride}, {kBlock, shape.rows});
  if (a_error != 0) return a_error;
  // Both of a weight's tensors: bytes of a row, and of a row that one copy brings.
  auto encode_weight = [&](CUtensorMap& map, const void* data, int64_t bytes, int box_bytes,
                           CUtensorMapSwizzle swizzle) {
    return encode_map(map, kBytes, data, {bytes, b_rows, args->groups}, {bytes, bytes * b_rows},
                      {box_bytes, shape.columns, 1}, swizzle);
  };
  const int packed_error =
      encode_weight(maps.packed, packed, k / 2, 128, CU_TENSOR_MAP_SWIZZLE_128B);  // two blocks
  if (packed_error != 0) return packed_error;
  const int sub_error = encode_weight(maps.sub, sub, k / 32, 16, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (sub_error != 0) return sub_error;
  return shape.launch(maps, *args, multiprocessors, static_cast<cudaStream_t>(stream));
}
