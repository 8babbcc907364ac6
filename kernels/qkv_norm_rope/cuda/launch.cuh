// How the row ops start: beside the end of the kernel ahead of them in the stream, in clusters or not.
#pragma once
#include "hopper.cuh"

namespace causeway {

// What the kernel ahead wrote may be read, and what it reads be written, only behind this; the kernel
// behind may start from here on, so never more than two kernels of a stream overlap.
__device__ __forceinline__ void await_inputs() {
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
}
// Ahead of it: asks L2 for bytes that are read later. Nothing is seen of them yet.
__device__ __forceinline__ void ask_for(const void* bytes) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes));
}

// `even`: clusters spread over the processors. As they are placed without it, one processor is full of
// them while another has none.
template <class Kernel, class Args>
int launch_blocks(Kernel kernel, int64_t blocks, int y, int threads, int cluster, const Args& args,
                  cudaStream_t stream, int shared_bytes = 0, bool even = false) {
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffff) return (int)cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((unsigned)blocks, (unsigned)y);
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = (size_t)shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[3] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {(unsigned)cluster, 1, 1};
  attributes[2].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
  attributes[2].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicyLoadBalancing;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? even ? 3 : 2 : 1;
  cudaError_t code = cudaLaunchKernelEx(&config, kernel, args);
  return (int)(code == cudaSuccess ? cudaGetLastError() : code);
}

}  // namespace causeway
