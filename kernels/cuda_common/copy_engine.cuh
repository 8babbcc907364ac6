// Hopper's instructions for what goes to a product and comes from it: the bulk tensor copy engine, and the store of 8x8
// matrices to shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "hopper.cuh"

namespace causeway {

__device__ __forceinline__ void load_2d(
    const CUtensorMap* map, uint32_t target, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

__device__ __forceinline__ void load_3d(
    const CUtensorMap* map, uint32_t target, uint32_t barrier, int column, int row, int group) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(group)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Four matrices of 8 x 8; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(
    uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
      "r"(b), "r"(c), "r"(d)
      : "memory");
}

// Shared to global memory by the copy engine. Ordinary writes to the source need `fence_async_proxy` before; it
// may be written again after `bulk_wait_read`, by the thread that stored.
__device__ __forceinline__ void store_2d(const CUtensorMap* map, uint32_t source, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(source), "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

}  // namespace causeway
