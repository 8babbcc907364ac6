// C[M, N] = sum over 128-wide blocks kb, ascending, of sa[M, kb] * sb[N / 128, kb] * (A B^T of the block).
//
// A: e4m3 [M, K], one power-of-two scale byte (E8M0) per row and 128 columns. B: e4m3 [G, N, K] with one
// scale byte per 128 x 128 block. Without `offsets` G is 1; with them the rows offsets[g] .. offsets[g+1]
// of A meet B[g] (experts). Each block product is made by the tensor cores, whose own sums are short; it
// is scaled and added to a float32 sum in registers (one fused multiply-add: a power-of-two product is
// exact). Every element walks K alone and in the same order, so its bits depend neither on the tile
// shape nor on other rows.
//
// Two producer warps keep a ring of stages full by bulk tensor copies, one the rows, one the weight; WGS
// warpgroups of 64 rows each consume it. Blocks are persistent and walk tiles in an order that shares
// operands in L2.
//
// A kernel starts before the one ahead of it in the stream has ended, and then reads weights already:
// they must not be written by the kernel directly ahead.
#pragma once

#include <cuda_runtime.h>

#include "copy_engine.cuh"
#include "hopper.cuh"
#include "product.cuh"
#include "store.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"
#include "wgmma_e4m3.cuh"

namespace causeway {

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1) gemm_kernel(
    const __grid_constant__ Maps maps, const __grid_constant__ GemmArguments args) {
  constexpr int kParts = S::kParts;
  extern __shared__ __align__(1024) uint8_t shared[];  // the swizzle asks for 1024
  const uint32_t stages = smem_address(shared);
  const uint32_t full = stages + S::kBarrierOffset, empty = full + S::kStages * 8;
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  TileQueue<S::kStages> queue(shared + S::kBarrierOffset);

  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      mbar_init(full + i * 8, 1);
      mbar_init(empty + i * 8, S::kWarps);
    }
    mbar_init(queue.opened(), 1);
    mbar_fence_init();
  }
  __syncthreads();

  Slot<S::kStages> slot;
  if (warp >= S::kWarps) {
    if constexpr (S::kTrades) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == S::kWarps) {  // the weight's producer
      if (lane == 0) prefetch_map(&maps.b);
      // A weight does not come from the previous kernel: the ring may fill already. The tiles of
      // groups are known only after it.
      if (args.offsets != nullptr) wait_for_previous();
      Schedule<S> schedule(args);
      Tile tile = schedule.advance();
      if (lane == 0) queue.put_first(tile);
      auto load = [&](int kb) {
        mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
        load_3d(&maps.b, stages + slot.stage * S::kStageBytes + S::kABytes, full + slot.stage * 8,
                kb * kBlockK - args.col_offset, tile.column, tile.group);
      };
      while (tile.row_end >= 0) {
        if (lane == 0) {
          for (int kb = 0; kb + 1 < args.k_blocks; ++kb, slot.next()) {
            load(kb);
            mbar_expect(full + slot.stage * 8, S::kStageBytes);  // the rows' bytes too
          }
          load(args.k_blocks - 1);
        }
        __syncwarp();
        const Tile next = schedule.advance();
        if (lane == 0) {
          queue.put_next(next);
          mbar_expect(full + slot.stage * 8, S::kStageBytes);
          slot.next();
        }
        __syncwarp();
        tile = next;
      }
    } else if (warp == S::kWarps + 1) {  // the rows' producer
      if (lane == 0) prefetch_map(&maps.a);
      // The tiles of one weight are known before the previous kernel ends.
      if (args.offsets != nullptr) wait_for_previous();
      Schedule<S> schedule(args);
      Tile tile = schedule.advance();
      wait_for_previous();
      let_next_start();
      for (; tile.row_end >= 0; tile = schedule.advance()) {
        if (lane == 0) {
          for (int kb = 0; kb < args.k_blocks; ++kb, slot.next()) {
            const uint32_t a = stages + slot.stage * S::kStageBytes;
            mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
            load_2d(&maps.a, a, full + slot.stage * 8, kb * kBlockK - args.col_offset, tile.row);
          }
        }
        __syncwarp();
      }
    }
  } else {
    if constexpr (S::kTrades) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group_offset = (warp / 4) * 64 * kBlockK;
    const int first_row = warp * 16, row_in_tile = first_row + lane / 4;
    const bool active = warp < S::kActiveWarps;
    uint8_t* staging = shared + S::kStages * S::kStageBytes + warp * S::kStagingWarp;
    wait_for_previous();

    // The product of block kb runs while the one of kb - 1 is scaled and added; the first product of
    // the next tile runs while this tile is stored.
    Scales scales(args);
    float sum[kParts], part[2][kParts], s[2];
    uint32_t previous = 0;
    auto start = [&](float(&into)[kParts]) {
      const uint32_t a = stages + slot.stage * S::kStageBytes;
      mbar_wait(full + slot.stage * 8, slot.parity);
      multiply<S::kColumns>(into, a + group_offset, a + S::kABytes);
    };
    auto step = [&]() {
      previous = empty + slot.stage * 8;
      slot.next();
    };
    auto finish = [&](float(&from)[kParts]) {
      fence_regs(from);
      if (lane == 0) mbar_arrive(previous);
      if (active) promote(sum, from, s);
    };
    Tile tile = queue.take_first();
    bool more = tile.row_end >= 0;
    if (more) {
      scales.open(tile, row_in_tile);
      start(part[0]);
      step();
    }
    while (more) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) sum[i] = 0.0f;
      int kb = 0;  // its product is under way in part[0]
      for (; kb + 2 < args.k_blocks; kb += 2) {
        start(part[1]);
        wgmma_wait<1>();
        scales.take(kb, s);
        finish(part[0]);
        step();
        start(part[0]);
        wgmma_wait<1>();
        scales.take(kb + 1, s);
        finish(part[1]);
        step();
      }
      const Tile done = tile;
      if (kb + 2 == args.k_blocks) {
        start(part[1]);
        wgmma_wait<1>();
        scales.take(kb, s);
        finish(part[0]);
        step();
        scales.take(kb + 1, s);
        tile = queue.take_next();
        more = tile.row_end >= 0;
        if (more) {
          scales.open(tile, row_in_tile);
          start(part[0]);
        } else {
          wgmma_commit();  // of nothing, so that the wait below is the same
        }
        wgmma_wait<1>();
        finish(part[1]);
        if (more) step();
      } else {
        wgmma_wait<0>();
        scales.take(kb, s);
        finish(part[0]);
        tile = queue.take_next();
        more = tile.row_end >= 0;
        if (more) {
          scales.open(tile, row_in_tile);
          start(part[0]);
          step();
        }
      }
      if (active) {
        if (args.out_is_float) {
          store_float(args, done, sum, row_in_tile, lane);
        } else {
          store_bfloat16<S>(args, maps.out, done, sum, staging, first_row, lane);
        }
      }
    }
    if constexpr (S::kTensorStore) {
      if (lane == 0) bulk_wait_read();
    }
  }
}

template <class S>
int launch_gemm(const Maps& maps, const GemmArguments& args, const GateArguments&, int grid,
                cudaStream_t stream) {
  return launch<S>(gemm_kernel<S>, grid, stream, maps, args);
}

}  // namespace causeway
