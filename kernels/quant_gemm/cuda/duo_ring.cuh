// The ring of stages of duo.cuh, and those who fill it.
#pragma once

#include <cuda_runtime.h>

#include "cluster.cuh"
#include "copy_engine.cuh"
#include "duo_tiles.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "tiles.cuh"

namespace causeway {

// The ring of a block of threads in its shared memory: stages of rows and weight, and its barriers.
template <class S>
struct DuoRing {
  uint32_t stages, staging, scales, full, empty;

  __device__ __forceinline__ explicit DuoRing(uint32_t base)
      : stages(base),
        staging(base + S::kStagingOffset),
        scales(base + S::kScaleOffset),
        full(base + S::kBarrierOffset),
        empty(full + S::kStages * 8) {}

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < S::kStages; ++i) {
      mbar_init(full + i * 8, 1 + 32);    // the weight's thread, all lanes that wrote scales
      mbar_init(empty + i * 8, 128 + 4);  // all lanes that read scales, a lane of each of the other block's warps
    }
    mbar_fence_init();
  }
  __device__ __forceinline__ uint32_t rows(int stage, int d) const {
    return stages + stage * S::kStageBytes + d * S::kABytes;
  }
  __device__ __forceinline__ uint32_t weight(int stage, int d) const {
    return stages + stage * S::kStageBytes + S::kDepth * S::kABytes + d * S::kBBytes;
  }
};

// The weight to both: this block's half of the columns, or every second block of K. It does not come from the previous
// kernel: the ring may fill already.
template <class S>
__device__ __forceinline__ void bring_weight(const CUtensorMap& map, const GemmArguments& args, const DuoRing<S>& ring,
                                             DuoWalk<S> walk, int rank) {
  const uint64_t once = evict_first();
  Slot<S::kStages> slot;
  for (Tile tile = walk.next(); tile.row_end >= 0; tile = walk.next()) {
    for (int kb = 0; kb < args.k_blocks; kb += S::kDepth, slot.next()) {
      const uint32_t barrier = ring.full + slot.stage * 8;
      mbar_wait(ring.empty + slot.stage * 8, slot.parity ^ 1);
      mbar_expect(barrier, min(S::kDepth, args.k_blocks - kb) * S::kBlockBytes);  // the rows' and the other's too
#pragma unroll
      for (int d = 0; d < S::kDepth; ++d) {
        if (S::kDepth > 1 && kb + d >= args.k_blocks) break;
        if (S::kWoven && (kb + d) % S::kBlocks != rank) continue;
        const int first = S::kWoven ? 0 : rank * S::kShare;
        load_3d_all_once(&map, ring.weight(slot.stage, d) + first * kBlockK, barrier,
                         (kb + d) * kBlockK - args.col_offset, tile.column + first, 0, (1 << S::kBlocks) - 1, once);
      }
    }
  }
}

template <class S>
__device__ __forceinline__ void bring_rows(const CUtensorMap& map, const GemmArguments& args, const DuoRing<S>& ring,
                                           DuoWalk<S> walk) {
  Slot<S::kStages> slot;
  for (Tile tile = walk.next(); tile.row_end >= 0; tile = walk.next()) {
    for (int kb = 0; kb < args.k_blocks; kb += S::kDepth, slot.next()) {
      mbar_wait(ring.empty + slot.stage * 8, slot.parity ^ 1);
#pragma unroll
      for (int d = 0; d < S::kDepth; ++d) {
        if (S::kDepth > 1 && kb + d >= args.k_blocks) break;
        load_2d(&map, ring.rows(slot.stage, d), ring.full + slot.stage * 8, (kb + d) * kBlockK - args.col_offset,
                tile.row);
      }
    }
  }
}

template <class S>
__device__ __forceinline__ void bring_scales(const GemmArguments& args, const DuoRing<S>& ring, DuoWalk<S> walk,
                                             int lane) {
  constexpr int kChunk = DuoScales<S>::kChunk;
  Slot<S::kStages> slot;
  DuoScales<S> scales(args, lane);
  Tile tile = walk.next();
  if (tile.row_end >= 0) scales.open_weight(tile);
  wait_for_previous();
  while (tile.row_end >= 0) {
    scales.open_rows(tile);
    for (int chunk = 0; chunk < args.k_blocks; chunk += kChunk) {
      scales.step(chunk);
#pragma unroll
      for (int i = 0; i < kChunk; i += S::kDepth) {
        if (chunk + i < args.k_blocks) {
          mbar_wait(ring.empty + slot.stage * 8, slot.parity ^ 1);
          scales.write(i, ring.scales + slot.stage * S::kScaleBytes);
          mbar_arrive(ring.full + slot.stage * 8);
          slot.next();
        }
      }
    }
    tile = walk.next();
    if (tile.row_end >= 0) scales.open_weight(tile);
  }
}

}  // namespace causeway
