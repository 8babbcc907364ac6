// Host side of a library of bf16 products: makes the tensor maps of one product, starts the chosen tile.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "dense.h"

namespace causeway {

constexpr int kMapError = 10000;  // + the driver's CUresult

inline int encode_bf16(CUtensorMap& map, const void* data, int rank, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const cuuint32_t* box) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult state;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &state);
    return error == cudaSuccess && state == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(found)
               : nullptr;
  }();
  if (function == nullptr) return kMapError;
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = function(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kMapError + static_cast<int>(result);
}

// Maps of both operands, and the rows that one copy brings. a: bf16 [groups, rows, k] with a_group and
// a_stride bytes between groups and rows; b: bf16 [groups * n, k] with b_stride bytes between rows;
// strides and addresses are multiples of 16. Returns 0 or 10000 + a CUresult.
inline int encode_operands(CUtensorMap& a_map, CUtensorMap& b_map, DenseArguments& args, int tile_rows,
                           int tile_columns, const void* a, int64_t a_stride, int64_t a_group,
                           const void* b, int64_t b_stride, int64_t k) {
  args.box_rows = std::min(args.rows, tile_rows);  // zeros beyond the last row would come slowly
  const cuuint64_t width = static_cast<cuuint64_t>(k);
  const cuuint64_t a_sizes[3] = {width, static_cast<cuuint64_t>(args.rows),
                                 static_cast<cuuint64_t>(args.groups)};
  const cuuint64_t a_strides[2] = {static_cast<cuuint64_t>(a_stride),
                                   static_cast<cuuint64_t>(a_group)};
  const cuuint32_t a_box[3] = {64, static_cast<cuuint32_t>(args.box_rows), 1};
  const int a_error = encode_bf16(a_map, a, 3, a_sizes, a_strides, a_box);
  if (a_error != 0) return a_error;
  const cuuint64_t b_sizes[2] = {width, static_cast<cuuint64_t>(args.n) * args.groups};
  const cuuint64_t b_strides[1] = {static_cast<cuuint64_t>(b_stride)};
  const cuuint32_t b_box[2] = {64, static_cast<cuuint32_t>(tile_columns)};
  return encode_bf16(b_map, b, 2, b_sizes, b_strides, b_box);
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
