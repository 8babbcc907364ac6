// Blocks of threads that work together: places in each other's shared memory, and copies that reach both.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace causeway {

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// True for one thread of a whole warp.
__device__ __forceinline__ bool elect_one() {
  uint32_t chosen;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(chosen));
  return chosen != 0;
}

__device__ __forceinline__ void mbar_arrive_in(uint32_t barrier) {  // an address of `remote_address`
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Orders no memory: it is for barriers, and for how long shared memory lives.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// To the same place in every block of `mask`, whose own barriers (at the same place too) count the bytes.
__device__ __forceinline__ void load_3d_all(
    const CUtensorMap* map, uint32_t target, uint32_t barrier, int column, int row, int group, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(group), "h"(mask)
      : "memory");
}
// What leaves L2 first: bytes that are read once.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}
// As load_3d_all, with a policy of L2.
__device__ __forceinline__ void load_3d_all_once(const CUtensorMap* map, uint32_t target, uint32_t barrier, int column,
                                                 int row, int group, uint16_t mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6, %7;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(group), "h"(mask), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch_3d(const CUtensorMap* map, int column, int row, int group) {  // to L2
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map), "r"(column), "r"(row),
               "r"(group)
               : "memory");
}

}  // namespace causeway
