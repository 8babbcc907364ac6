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
        others_empty_(in_block(ring.empty, 1 - rank)),
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
    constexpr bool kEach = S::kDepth == 1;  // a stage is one block: else two, and the second frees it
    float sum[S::kParts], part[2][S::kParts];
#pragma unroll
    for (int i = 0; i < S::kParts; ++i) sum[i] = 0.0f;
    const int first = 128 - ((args_.row_offset + tile.column) & 127);  // columns in the first line of blocks
#pragma unroll
    for (int g = 0; g < S::kScaleGroups; ++g) line_[g] = S::kLines > 1 && g * S::kGroup >= first ? kLineBytes : 0;
    const int last = args_.k_blocks - 1;
    await();
    start(part[0], 0);
    int kb = 0;  // its products are under way in part[0], and `kNow` its stage
    for (; kb + 2 <= last; kb += 2) {
      if (kEach) await();
      start(part[1], S::kDepth - 1);
      take(kEach ? kBefore : kNow, 0);
      wgmma_wait<1>();
      add(sum, part[0], kEach ? kBefore : kNone);
      await();
      start(part[0], 0);
      take(kBefore, S::kDepth - 1);
      wgmma_wait<1>();
      add(sum, part[1], kBefore);
    }
    if (kb < last) {
      if (kEach) await();
      start(part[1], S::kDepth - 1);
      hand_over();
      take(kEach ? kBefore : kNow, 0);
      wgmma_wait<1>();
      add(sum, part[0], kEach ? kBefore : kNone);
      take(kNow, S::kDepth - 1);
      wgmma_wait<0>();
      add(sum, part[1], kNow);
    } else {
      hand_over();
      take(kNow, 0);
      wgmma_wait<0>();
      add(sum, part[0], kNow);
    }
    if (lane_ == 0) bulk_wait_read();
    __syncwarp();
    store_pair<S>(args_, maps_.out, tile, sum, staging_, member_, lane_);
  }

  // Waits for the next stage.
  __device__ __forceinline__ void await() {
    stage_[kBefore] = stage_[kNow];
    stage_[kNow] = next_.stage;
    mbar_wait(ring_.full + next_.stage * 8, next_.parity);
    next_.next();
  }

  // Starts the product of the d-th block of the stage.
  __device__ __forceinline__ void start(float (&part)[S::kParts], int d) {
    multiply<S::kProductColumns>(part, ring_.rows(stage_[kNow], d), ring_.weight(stage_[kNow], d));
  }

  // Reads the scales of the d-th block of a stage.
  __device__ __forceinline__ void take(int which, int d) {
#pragma unroll
    for (int g = 0; g < S::kScaleGroups; ++g) {
      s_[g] = load_floats(scales_ + stage_[which] * S::kScaleBytes + d * (S::kLines * kLineBytes) + line_[g]);
    }
  }

  // Adds a finished product, and frees its stage if it is the last of it.
  __device__ __forceinline__ void add(float (&sum)[S::kParts], float (&part)[S::kParts], int freed) {
    fence_regs(part);
    if (freed != kNone) {
      mbar_arrive(ring_.empty + stage_[freed] * 8);
      __syncwarp();
      if (lane_ == 0) mbar_arrive_in(others_empty_ + stage_[freed] * 8);
    }
#pragma unroll
    for (int i = 0; i < S::kParts; i += 4) {
      const float2 f = s_[i * 2 / S::kGroup];
      sum[i] = fmaf(part[i], f.x, sum[i]);
      sum[i + 1] = fmaf(part[i + 1], f.x, sum[i + 1]);
      sum[i + 2] = fmaf(part[i + 2], f.y, sum[i + 2]);
      sum[i + 3] = fmaf(part[i + 3], f.y, sum[i + 3]);
    }
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
      DuoWalk<S> ahead = walk_;
      if (ahead.next().row_end >= 0) asm volatile("bar.arrive %0, 256;" ::"r"(2 - turn_) : "memory");
    }
  }

  static constexpr int kNow = 0, kBefore = 1, kNone = -1;  // stages
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
      const int column = DuoWalk<S>(walk).next().column + rank * S::kShare;
      const int ahead = min(S::kStages * S::kDepth, args.k_blocks);
      for (int kb = 0; kb < ahead; ++kb) prefetch_3d(&maps.b, kb * kBlockK - args.col_offset, column, 0);
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
