// Tiles for 65 to 128 rows, where what L2 sends to the multiprocessors and the bytes under way from memory are the
// bounds: two blocks of threads (a cluster) have 64 rows each against the same columns, and each brings half of the
// weight to both. A byte of the weight so leaves L2 once, and does not stay there. Sums have the order of gemm.cuh, and
// so the same bits.
//
// One thread brings the weight, one the rows, a warp the scales; a stage is free when both blocks have read it. With
// two warpgroups that multiply, each has every second tile: one stores while the other multiplies. One weight only.
#pragma once

#include <cuda_runtime.h>

#include "cluster.cuh"
#include "copy_engine.cuh"
#include "duo_ring.cuh"
#include "duo_tiles.cuh"
#include "hopper.cuh"
#include "product.cuh"
#include "wgmma.cuh"
#include "wgmma_shared.cuh"

namespace causeway {

// What a warpgroup does: products, sums, store.
template <class S>
class DuoGroup {
 public:
  __device__ __forceinline__ DuoGroup(const Maps& maps, const GemmArguments& args, const DuoRing<S>& ring,
                                      const DuoWalk<S>& walk, int rank, int warp, int lane)
      : maps_(maps),
        args_(args),
        ring_(ring),
        walk_(walk),
        turn_(warp / 4),
        member_(warp % 4),
        lane_(lane),
        others_empty_(remote_address(ring.empty, 1 - rank)),
        staging_(ring.staging + warp * S::kStagingWarp),
        scales_(ring.scales + (member_ * 16 + lane / 4 * 2) * 4) {}

  __device__ __forceinline__ void run() {
    if (S::kTakesTurns && turn_ == 1) skip();
    bool first = turn_ == 0;
    for (Tile tile = walk_.next(); tile.row_end >= 0; tile = walk_.next()) {
      if (S::kTakesTurns && !first) asm volatile("bar.sync %0, 256;" ::"r"(1 + turn_) : "memory");
      first = false;
      one(tile);
      if constexpr (S::kTakesTurns) skip();
    }
  }

 private:
  // The products of a block of K run while those of the one before are scaled and added. A tile is stored before the
  // group's next products begin: with products under way at the loop's end the compiler serialises all (C7514, C7518).
  __device__ __forceinline__ void one(const Tile& tile) {
    float sum[S::kParts], part[2][S::kParts];
#pragma unroll
    for (int i = 0; i < S::kParts; ++i) sum[i] = 0.0f;
    const int first = 128 - ((args_.row_offset + tile.column) & 127);  // columns in the first line of blocks
#pragma unroll
    for (int g = 0; g < S::kScaleGroups; ++g) line_[g] = S::kLines > 1 && g * S::kGroup >= first ? kLineBytes : 0;
    const int last = args_.k_blocks - 1;
    await();
    multiply<S::kProductColumns>(part[0], ring_.rows(stage_[kNow], 0), ring_.weight(stage_[kNow], 0));
    int kb = 0;  // its products are under way in part[0], and `kNow` its stage
    for (; kb + 2 <= last; kb += 2) {
      advance<S::kDepth - 1>(sum, part[0], part[1]);
      advance<0>(sum, part[1], part[0]);
    }
    if (kb < last) {
      advance<S::kDepth - 1, true>(sum, part[0], part[1]);
      finish(sum, part[1], S::kDepth - 1);
    } else {
      hand_over();
      finish(sum, part[0], 0);
    }
    if constexpr (S::kWoven) {
      named_barrier(1, 128);  // all warps' products have read the last stage
      const uint32_t staging = ring_.rows(stage_[kNow], 0) + member_ * S::kStagingWarp;
      store_pair<S>(args_, maps_.out, tile, sum, staging, member_, lane_);
      if (!is_last()) {  // else nobody asks for the stage, and the other block may end before the arrival is there
        if (lane_ == 0) bulk_wait_read();
        __syncwarp();
        leave(kNow);
      }
    } else {
      if (lane_ == 0) bulk_wait_read();
      __syncwarp();
      store_pair<S>(args_, maps_.out, tile, sum, staging_, member_, lane_);
    }
  }

  __device__ __forceinline__ bool is_last() const {
    DuoWalk<S> ahead = walk_;
    return ahead.next().row_end < 0;
  }

  // Waits for the next stage.
  __device__ __forceinline__ void await() {
    stage_[kBefore] = stage_[kNow];
    stage_[kNow] = next_.stage;
    mbar_wait(ring_.full + next_.stage * 8, next_.parity);
    next_.next();
  }

  // Starts the product of the next block, the D-th of its stage, and adds the one before. A warp waits while the tensor
  // cores take its instructions one by one: wide products gain by additions between them, narrow ones lose.
  template <int D, bool kLast = false>
  __device__ __forceinline__ void advance(float (&sum)[S::kParts], float (&before)[S::kParts],
                                          float (&next)[S::kParts]) {
    constexpr int kSteps = kBlockK / 32, kBehind = S::kWoven ? kSteps - 1 : 0;  // instructions
    if (D == 0) await();
    const uint32_t a = operand(ring_.rows(stage_[kNow], D)), b = operand(ring_.weight(stage_[kNow], D));
    fence_regs(next);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps - kBehind; ++k) WgmmaE4m3<S::kProductColumns>::run(next, a + k * 2, b + k * 2, k != 0);
    wgmma_commit();
    if (kLast) hand_over();
    take(D == 0 ? kBefore : kNow, D == 0 ? S::kDepth - 1 : 0);
    wgmma_wait<1>();
    fence_regs(before);
    if (D == 0) leave(kBefore);
    if constexpr (kBehind == 0) {
      add<0, 1>(sum, before);
    } else {
      add<0, kBehind>(sum, before);
      WgmmaE4m3<S::kProductColumns>::run(next, a + 2, b + 2, 1);
      add<1, kBehind>(sum, before);
      WgmmaE4m3<S::kProductColumns>::run(next, a + 4, b + 4, 1);
      add<2, kBehind>(sum, before);
      WgmmaE4m3<S::kProductColumns>::run(next, a + 6, b + 6, 1);
      wgmma_commit();
    }
  }

  // Adds the tile's last product, the d-th of its stage.
  __device__ __forceinline__ void finish(float (&sum)[S::kParts], float (&part)[S::kParts], int d) {
    take(kNow, d);
    wgmma_wait<0>();
    fence_regs(part);
    if (!S::kWoven) leave(kNow);
    add<0, 1>(sum, part);
  }

  // Reads the scales of the d-th block of a stage.
  __device__ __forceinline__ void take(int which, int d) {
#pragma unroll
    for (int g = 0; g < S::kScaleGroups; ++g) {
      s_[g] = load_floats(scales_ + stage_[which] * S::kScaleBytes + d * (S::kLines * kLineBytes) + line_[g]);
    }
  }

  // Frees a stage whose products are finished.
  __device__ __forceinline__ void leave(int which) {
    mbar_arrive(ring_.empty + stage_[which] * 8);
    __syncwarp();
    if (lane_ == 0) mbar_arrive_in(others_empty_ + stage_[which] * 8);
  }

  // Adds the PIECE-th of PIECES parts of a finished product.
  template <int PIECE, int PIECES>
  __device__ __forceinline__ void add(float (&sum)[S::kParts], const float (&part)[S::kParts]) {
    constexpr int kQuads = S::kParts / 4;
#pragma unroll
    for (int i = kQuads * PIECE / PIECES * 4; i < kQuads * (PIECE + 1) / PIECES * 4; i += 4) {
      const float2 f = s_[i * 2 / S::kGroup];
      sum[i] = fmaf(part[i], f.x, sum[i]);
      sum[i + 1] = fmaf(part[i + 1], f.x, sum[i + 1]);
      sum[i + 2] = fmaf(part[i + 2], f.y, sum[i + 2]);
      sum[i + 3] = fmaf(part[i + 3], f.y, sum[i + 3]);
    }
    if (PIECES > 1) fence_regs(sum);
  }

  // Past the other group's tile.
  __device__ __forceinline__ void skip() {
    const int stage = next_.stage + (args_.k_blocks + S::kDepth - 1) / S::kDepth;
    next_.parity ^= stage / S::kStages & 1;
    next_.stage = stage % S::kStages;
    walk_.next();
  }

  // Lets the other group start once all of this tile's stages are full: a barrier's parity tells neighbouring rounds
  // of the ring apart only.
  __device__ __forceinline__ void hand_over() {
    if constexpr (S::kTakesTurns) {
      if (!is_last()) asm volatile("bar.arrive %0, 256;" ::"r"(2 - turn_) : "memory");
    }
  }

  static constexpr int kNow = 0, kBefore = 1;  // stages
  static constexpr uint32_t kLineBytes = S::kBlockRows * 4;

  const Maps& maps_;
  const GemmArguments& args_;
  const DuoRing<S>& ring_;
  DuoWalk<S> walk_;
  int turn_, member_, lane_;
  uint32_t others_empty_, staging_, scales_;
  Slot<S::kStages> next_;
  int stage_[2] = {};
  uint32_t line_[S::kScaleGroups];  // bytes to the scales of the weight's line of blocks that holds the columns
  float2 s_[S::kScaleGroups];
};

template <class S>
__global__ void __cluster_dims__(S::kBlocks, 1, 1) __launch_bounds__(S::kThreads, 1)
    duo_kernel(const __grid_constant__ Maps maps, const __grid_constant__ GemmArguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];  // the swizzle asks for 1024
  const DuoRing<S> ring(smem_address(shared));
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = cluster_rank();
  const DuoWalk<S> walk(args, rank);
  if constexpr (S::kEarly) {
    if (warp == S::kWarps && walk.length() >= 48 && elect_one()) {
      const int column = DuoWalk<S>(walk).next().column + (S::kWoven ? 0 : rank * S::kShare);
      const int ahead = min(S::kStages * S::kDepth, args.k_blocks);
      for (int kb = S::kWoven ? rank : 0; kb < ahead; kb += S::kWoven ? S::kBlocks : 1) {
        prefetch_3d(&maps.b, kb * kBlockK - args.col_offset, column, 0);
      }
    }
  }
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  cluster_sync();

  if (warp >= S::kWarps) {
    if constexpr (S::kTakesTurns) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == S::kWarps) {
      if (elect_one()) {  // where the compiler knows that one thread issues copies, it needs no loop over threads
        prefetch_map(&maps.b);
        bring_weight<S>(maps.b, args, ring, walk, rank);
      }
    } else if (warp == S::kWarps + 1) {
      if (elect_one()) {
        prefetch_map(&maps.a);
        wait_for_previous();
        let_next_start();
        bring_rows<S>(maps.a, args, ring, walk);
      }
    } else if (warp == S::kWarps + 2) {
      bring_scales<S>(args, ring, walk, lane);
    }
  } else {
    if constexpr (S::kTakesTurns) asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    wait_for_previous();
    DuoGroup<S>(maps, args, ring, walk, rank, warp, lane).run();
  }
  bulk_wait_read();  // of who has stored
  __syncwarp();
  cluster_sync();  // the other's copies and arrivals come to an end
}

template <class S>
int launch_duo(const Maps& maps, const GemmArguments& args, const GateArguments&, int grid, cudaStream_t stream) {
  return launch<S>(duo_kernel<S>, grid, stream, maps, args);
}

}  // namespace causeway
