// Blocks of a cluster: stores to each other's shared memory.
#pragma once
#include "hopper.cuh"

namespace causeway {
namespace hc {

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
