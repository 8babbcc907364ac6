// Kernels that start beside the end of the kernel ahead of them in the stream (programmatic dependent
// launch), in clusters or not: how the host starts them, and what they owe their neighbours.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace causeway {

// What the kernel ahead wrote may be read, and what it reads be written, only behind this.
__device__ __forceinline__ void wait_for_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// The kernel behind may start from here on. Called after `wait_for_previous`, so that never more than two
// kernels of a stream overlap (three around `swiglu_quant`, which lets the next one start earlier).
__device__ __forceinline__ void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Both at once.
__device__ __forceinline__ void await_inputs() {
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
}

struct EarlyLaunch {
  int64_t blocks;  // with none, nothing is started
  int threads;     // of a block
  cudaStream_t stream;
  int shared_bytes = 0;  // dynamic ones; more than 48 KB must have been allowed for the kernel
  int cluster = 1;       // blocks of one
  // Clusters spread over the processors. As they are placed without it, one processor is full of them
  // while another has none.
  bool even = false;
  int y = 1, z = 1;  // further sides of the grid

  template <class... Parameters, class... Arguments>
  cudaError_t start(void (*kernel)(Parameters...), const Arguments&... arguments) const {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchAttribute attributes[3] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {(unsigned)cluster, 1, 1};
    attributes[2].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    attributes[2].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicyLoadBalancing;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks, (unsigned)y, (unsigned)z);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cluster == 1 ? 1 : even ? 3 : 2;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
  }
};

}  // namespace causeway
