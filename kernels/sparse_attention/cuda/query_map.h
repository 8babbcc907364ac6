// The copy engine's view of the queries: boxes of 64 heads x 64 columns of a row, swizzled. Heads that do not
// exist are read as zeros. And of rows of keys: boxes of 32 rows x 64 columns.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace causeway {

constexpr int kMapError = 10000;  // + the driver's CUresult

// bfloat16, 512 values a row.
template <int kRank>
int map_tiles(CUtensorMap& map, const void* base, const cuuint64_t (&sizes)[kRank],
              const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return kMapError;
  cuuint32_t steps[kRank];
  for (int i = 0; i < kRank; ++i) steps[i] = 1;
  CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(base), sizes, strides, box,
                           steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kMapError + (int)result;
}

inline int map_queries(CUtensorMap& map, const void* q, int64_t q_row, int64_t q_head, int rows, int heads) {
  // A dimension of size 1 may have any stride; the copy engine wants a sound one.
  int64_t head = heads > 1 ? q_head : 512, row = rows > 1 ? q_row : head * heads;
  return map_tiles<3>(map, q, {512, (cuuint64_t)heads, (cuuint64_t)rows}, {(cuuint64_t)head * 2, (cuuint64_t)row * 2},
                      {64, 64, 1});
}

inline int map_keys(CUtensorMap& map, const void* keys, int64_t stride, int64_t rows) {
  return map_tiles<2>(map, keys, {512, (cuuint64_t)rows}, {(cuuint64_t)(rows > 1 ? stride : 512) * 2}, {64, 32});
}

}  // namespace causeway
