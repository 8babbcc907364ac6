// Numbers sent to other blocks of a cluster: each block has a mailbox whose barrier counts the bytes.
#pragma once
#include "hopper.cuh"

namespace causeway {

__device__ __forceinline__ void cluster_here() {  // no memory is ordered by it
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_all_here() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// One thread, before `cluster_here`: the barrier for rounds of `bytes` each, and the first round.
__device__ __forceinline__ void mail_open(uint64_t* bar) {
  mbar_init(smem_address(bar), 1);
  mbar_fence_init();
}
// One thread of the block, once per round, at any time before it waits.
__device__ __forceinline__ void mail_expect(uint64_t* bar, int bytes) {
  mbar_expect(smem_address(bar), bytes);
}
// After `cluster_all_here`: 4 bytes into block `rank`'s copy of `box`, counted by its `bar`.
__device__ __forceinline__ void mail_send(const void* box, const uint64_t* bar, int rank,
                                          uint32_t value) {
  const uint32_t to = remote_address(smem_address(box), rank), counter = remote_address(smem_address(bar), rank);
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   to),
               "r"(value), "r"(counter)
               : "memory");
}
__device__ __forceinline__ void mail_wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n}\n" ::"r"(smem_address(bar)),
      "r"(parity)
      : "memory");
}

// A warp that others wait for at `named_barrier`, and that does not wait itself.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace causeway
