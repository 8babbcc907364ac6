// Host side of a library of bf16 products: makes the tensor maps of one product, starts the chosen tile.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "dense.h"
#include "tensor_map.cuh"

namespace causeway {

// Maps of both operands, and the rows that one copy brings. a: bf16 [groups, rows, k] with a_group and
// a_stride bytes between groups and rows; b: bf16 [groups * n, k] with b_stride bytes between rows;
// strides and addresses are multiples of 16. Returns 0 or 10000 + a CUresult.
inline int encode_operands(CUtensorMap& a_map, CUtensorMap& b_map, DenseArguments& args, int tile_rows,
                           int tile_columns, const void* a, int64_t a_stride, int64_t a_group,
                           const void* b, int64_t b_stride, int64_t k) {
  args.box_rows = std::min(args.rows, tile_rows);  // zeros beyond the last row would come slowly
  constexpr CUtensorMapDataType kBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int a_error = encode_map(a_map, kBf16, a, {k, args.rows, args.groups}, {a_stride, a_group},
                                 {64, args.box_rows, 1});
  if (a_error != 0) return a_error;
  return encode_map(b_map, kBf16, b, {k, static_cast<int64_t>(args.n) * args.groups}, {b_stride},
                    {64, tile_columns});
}

// Starts a product of the operands of `encode_operands`. Returns 0, a cudaError_t, or 10000 + a CUresult.
inline int start_product(const DenseTile& tile, const void* a, int64_t a_stride, int64_t a_group,
                         const void* b, int64_t b_stride, int64_t k, DenseArguments args,
                         int multiprocessors, void* stream) {
  CUtensorMap a_map, b_map;
  const int error = encode_operands(a_map, b_map, args, tile.rows, tile.columns, a, a_stride, a_group, b,
                                    b_stride, k);
  if (error != 0) return error;
  return tile.launch(a_map, b_map, args, multiprocessors, static_cast<cudaStream_t>(stream));
}

}  // namespace causeway
