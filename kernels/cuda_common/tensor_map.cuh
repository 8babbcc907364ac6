// Tensor maps: how the copy engine sees a tensor. On the host.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace causeway {

constexpr int kMapError = 10000;  // + the driver's CUresult

// The driver's function, by its address: a library with a tie to the driver could not be loaded without one.
inline decltype(&cuTensorMapEncodeTiled) find_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                             cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// Sizes and a copy's box in values, innermost first; strides in bytes, of all but the innermost. What lies beyond a size
// is read as zero. Address and strides are multiples of 16. Returns 0 or 10000 + a CUresult.
template <int RANK>
int encode_map(CUtensorMap& map, CUtensorMapDataType type, const void* data, const int64_t (&sizes)[RANK],
               const int64_t (&strides)[RANK - 1], const int (&box)[RANK],
               CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  static const auto encode = find_map_encoder();
  if (encode == nullptr) return kMapError;
  cuuint64_t extent[RANK], stride[RANK - 1];
  cuuint32_t part[RANK], step[RANK];
  for (int i = 0; i < RANK; ++i) {
    extent[i] = static_cast<cuuint64_t>(sizes[i]);
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(strides[i - 1]);
    part[i] = static_cast<cuuint32_t>(box[i]);
    step[i] = 1;
  }
  const CUresult result = encode(&map, type, RANK, const_cast<void*>(data), extent, stride, part, step,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kMapError + static_cast<int>(result);
}

}  // namespace causeway
