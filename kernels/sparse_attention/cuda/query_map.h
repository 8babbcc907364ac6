// The copy engine's view of the queries: boxes of 64 heads x 64 columns of a row, swizzled. Heads that do not
// exist are read as zeros.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace causeway {

constexpr int kMapError = 10000;  // + the driver's CUresult

inline int map_queries(CUtensorMap& map, const void* q, int64_t q_row, int64_t q_head, int rows, int heads) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return kMapError;
  // A dimension of size 1 may have any stride; the copy engine wants a sound one.
  int64_t head = heads > 1 ? q_head : 512, row = rows > 1 ? q_row : head * heads;
  cuuint64_t sizes[3] = {512, (cuuint64_t)heads, (cuuint64_t)rows};
  cuuint64_t strides[2] = {(cuuint64_t)head * 2, (cuuint64_t)row * 2};
  cuuint32_t box[3] = {64, 64, 1}, steps[3] = {1, 1, 1};
  CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(q), sizes, strides, box, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kMapError + (int)result;
}

}  // namespace causeway
