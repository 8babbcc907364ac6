// One block's product on the tensor cores, its scaled addition to the sums, and the launch: what both kinds
// of tiles share.
#pragma once

#include <cuda_runtime.h>

#include "hopper.cuh"
#include "launch.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"
#include "wgmma_shared.cuh"

namespace causeway {

template <int kParts>
__device__ __forceinline__ void promote(
    float (&sum)[kParts], const float (&part)[kParts], const float (&s)[2]) {
#pragma unroll
  for (int i = 0; i < kParts; i += 4) {
    sum[i] = fmaf(part[i], s[0], sum[i]);
    sum[i + 1] = fmaf(part[i + 1], s[0], sum[i + 1]);
    sum[i + 2] = fmaf(part[i + 2], s[1], sum[i + 2]);
    sum[i + 3] = fmaf(part[i + 3], s[1], sum[i + 3]);
  }
}

// Starts 64 rows x 128 deep times Columns, from two operands (see `operand`).
template <int Columns>
__device__ __forceinline__ void multiply_operands(float (&part)[Columns / 2], uint32_t left, uint32_t right) {
  fence_regs(part);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kBlockK / 32; ++k) {
    WgmmaE4m3<Columns>::run(part, left + k * 2, right + k * 2, k != 0);
  }
  wgmma_commit();
}

// The same from the addresses of the operands' first bytes.
template <int Columns>
__device__ __forceinline__ void multiply(float (&part)[Columns / 2], uint32_t a, uint32_t b) {
  multiply_operands<Columns>(part, operand(a), operand(b));
}

// Starts a kernel that may begin while the one ahead of it in the stream ends; returns a cudaError_t.
template <class S, typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int grid, cudaStream_t stream, const Arguments&... arguments) {
  static const cudaError_t configured = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (configured != cudaSuccess) return configured;
  return EarlyLaunch{grid, S::kThreads, stream, S::kSharedBytes}.start(kernel, arguments...);
}

}  // namespace causeway
