// Blocks of a cluster: their barrier, and stores to each other's shared memory.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace causeway {
namespace hc {

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// A shared-memory address of this block in the block `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t smem, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(smem), "r"(rank));
  return there;
}
// A store there that its barrier `bar` (also there) counts in bytes: no fence, no barrier of the cluster.
__device__ __forceinline__ void send(uint32_t there, uint32_t bar, float value) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
               "r"(__float_as_uint(value)), "r"(bar)
               : "memory");
}

// A whole warp waits for the first phase of a barrier.
__device__ __forceinline__ void wait_together(uint32_t bar) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(bar)
        : "memory");
  } while (!__all_sync(~0u, done));
}

}  // namespace hc
}  // namespace causeway
