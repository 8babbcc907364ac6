// C[M, N] = sum over 128-wide blocks kb, ascending, of sa[M, kb] * sb[N / 128, kb] * (A B^T of the block).
//
// A: e4m3 [M, K], one power-of-two scale byte (E8M0) per row and 128 columns. B: e4m3 [G, N, K] with one
// scale byte per 128 x 128 block. Without `offsets` G is 1; with them the rows offsets[g] .. offsets[g+1]
// of A meet B[g] (experts). Each block product is made by the tensor cores, whose own sums are short; it
// is scaled and added to a float32 sum in registers (one fused multiply-add: a power-of-two product is
// exact). Every element walks K alone and in the same order, so its bits depend neither on the tile
// shape nor on other rows.
//
// Two producer warps keep a ring of stages full by bulk tensor copies, one the rows, one the weight, and a third
// brings the scales; WGS warpgroups of 64 rows each consume it. Blocks are persistent and walk tiles in an order that
// shares operands in L2.
//
// A kernel starts before the one ahead of it in the stream has ended, and then reads weights already:
// they must not be written by the kernel directly ahead, nor, where that one is `swiglu_quant`, by the one before it.
#pragma once

#include <cuda_runtime.h>

#include "cluster.cuh"
#include "copy_engine.cuh"
#include "hopper.cuh"
#include "product.cuh"
#include "stage_scales.cuh"
#include "store.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"
#include "wgmma_shared.cuh"

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
      mbar_init(full + i * 8, S::kScaleWarp ? 1 + 32 : 1);  // the weight's producer, all lanes that wrote scales
      mbar_init(empty + i * 8, S::kScaleWarp ? S::kWarps * 32 : S::kWarps);  // who read scales there, or a lane a warp
    }
    mbar_init(queue.opened(), 1);
    mbar_fence_init();
  }
  __syncthreads();

  Slot<S::kStages> slot;
  const int last = (args.k_blocks - 1) / S::kDepth * S::kDepth;  // first block of the last stage of a tile
  if (warp >= S::kWarps) {
    if constexpr (S::kTrades) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == S::kWarps) {  // the weight's producer
      if (lane == 0) prefetch_map(&maps.b);
      // A weight does not come from the previous kernel: the ring may fill already. The tiles of
      // groups are known only after it.
      if (args.offsets != nullptr && !args.offsets_are_old) wait_for_previous();
      Schedule<S> schedule(args);
      Tile tile = schedule.advance();
      if (lane == 0) queue.put_first(tile);
      // One thread issues copies: where the compiler knows that, it issues them without a loop over threads.
      auto load = [&](int kb) {
        mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
        const uint32_t b = stages + slot.stage * S::kStageBytes + S::kDepth * S::kABytes;
        if (elect_one()) {
#pragma unroll
          for (int d = 0; d < S::kDepth; ++d) {
            if (kb + d < args.k_blocks) {
              load_3d(&maps.b, b + d * S::kBBytes, full + slot.stage * 8,
                      (kb + d) * kBlockK - args.col_offset, tile.column, tile.group);
            }
          }
        }
      };
      while (tile.row_end >= 0) {
        for (int kb = 0; kb < last; kb += S::kDepth, slot.next()) {
          load(kb);
          if (elect_one()) mbar_expect(full + slot.stage * 8, S::kStageBytes);  // the rows' bytes too
        }
        load(last);
        const Tile next = schedule.advance();
        if (lane == 0) queue.put_next(next);
        __syncwarp();
        if (elect_one()) mbar_expect(full + slot.stage * 8, (args.k_blocks - last) * S::kBlockBytes);
        slot.next();
        tile = next;
      }
    } else if (warp == S::kWarps + 1) {  // the rows' producer
      if (lane == 0) prefetch_map(&maps.a);
      // The tiles of one weight are known before the previous kernel ends.
      if (args.offsets != nullptr && !args.offsets_are_old) wait_for_previous();
      Schedule<S> schedule(args);
      Tile tile = schedule.advance();
      wait_for_previous();
      let_next_start();
      for (; tile.row_end >= 0; tile = schedule.advance()) {
        for (int kb = 0; kb < args.k_blocks; kb += S::kDepth, slot.next()) {
          const uint32_t a = stages + slot.stage * S::kStageBytes;
          mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
          if (elect_one()) {
#pragma unroll
            for (int d = 0; d < S::kDepth; ++d) {
              if (kb + d < args.k_blocks) {
                load_2d(&maps.a, a + d * S::kABytes, full + slot.stage * 8, (kb + d) * kBlockK - args.col_offset,
                        tile.row);
              }
            }
          }
        }
      }
    } else if (S::kScaleWarp && warp == S::kWarps + 2) {  // the scales' producer
      if (args.offsets != nullptr && !args.offsets_are_old) wait_for_previous();
      Schedule<S> schedule(args);
      StageScales<S> scales(args);
      Tile tile = schedule.advance();
      bool more = tile.row_end >= 0;
      if (more) scales.open_weight(tile);
      wait_for_previous();
      while (more) {
        scales.open_rows(tile);
        for (int chunk = 0; chunk < args.k_blocks; chunk += StageScales<S>::kChunk) {
          scales.step(chunk);
#pragma unroll
          for (int i = 0; i < StageScales<S>::kChunk; i += S::kDepth) {
            if (chunk + i < args.k_blocks) {
              mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
              scales.write(i, stages + S::kScaleOffset + slot.stage * S::kScaleBytes);
              mbar_arrive(full + slot.stage * 8);
              slot.next();
            }
          }
        }
        tile = schedule.advance();
        more = tile.row_end >= 0;
        if (more) scales.open_weight(tile);
      }
    }
  } else {
    if constexpr (S::kTrades) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group_offset = (warp / 4) * 64 * kBlockK;
    const int first_row = warp * 16, row_in_tile = first_row + lane / 4;
    const bool active = warp < S::kActiveWarps;
    uint8_t* staging = shared + S::kStages * S::kStageBytes + warp * S::kStagingWarp;
    const float* scales = reinterpret_cast<const float*>(shared + S::kScaleOffset) + row_in_tile;
    Scales own_scales(args);

    // The products of a stage run while those of the one before are scaled and added; the first ones of the
    // next tile run while this tile is stored. A stage that K does not fill is multiplied as a whole, and what
    // lies beyond K is not added.
    float sum[kParts], part[2][S::kDepth][kParts], s[S::kDepth][2];
    int previous = 0;  // stage of the products under way
    auto start = [&](float(&into)[S::kDepth][kParts]) {
      const uint32_t a = stages + slot.stage * S::kStageBytes;
      mbar_wait(full + slot.stage * 8, slot.parity);
#pragma unroll
      for (int d = 0; d < S::kDepth; ++d) {
        multiply<S::kColumns>(into[d], a + d * S::kABytes + group_offset,
                              a + S::kDepth * S::kABytes + d * S::kBBytes);
      }
    };
    auto step = [&]() {
      previous = slot.stage;
      slot.next();
    };
    auto open = [&](const Tile& tile) {
      if constexpr (!S::kScaleWarp) own_scales.open(tile, row_in_tile);
    };
    // The scales of the stage whose products are under way: before the wait for them, or after it.
    auto take_early = [&]() {
      if constexpr (S::kScaleWarp) {
        if (!active) return;
#pragma unroll
        for (int d = 0; d < S::kDepth; ++d) {
          const float* from = scales + previous * (S::kScaleBytes / 4) + d * S::kRows;
          s[d][0] = from[0];
          s[d][1] = from[8];
        }
      }
    };
    auto take_late = [&](int kb) {
      if constexpr (!S::kScaleWarp) own_scales.take(kb, s[0]);
    };
    auto finish = [&](float(&from)[S::kDepth][kParts], int kb) {
#pragma unroll
      for (int d = 0; d < S::kDepth; ++d) fence_regs(from[d]);
      if (S::kScaleWarp || lane == 0) mbar_arrive(empty + previous * 8);
      if (!active) return;
#pragma unroll
      for (int d = 0; d < S::kDepth; ++d) {
        if (S::kDepth == 1 || kb + d < args.k_blocks) promote(sum, from[d], s[d]);
      }
    };
    Tile tile = queue.take_first();
    bool more = tile.row_end >= 0;
    wait_for_previous();
    if (more) {
      open(tile);
      start(part[0]);
      step();
    }
    while (more) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) sum[i] = 0.0f;
      int kb = 0;  // its stage's products are under way in part[0]
      for (; kb + S::kDepth < last; kb += 2 * S::kDepth) {
        start(part[1]);
        take_early();
        wgmma_wait<S::kDepth>();
        take_late(kb);
        finish(part[0], kb);
        step();
        start(part[0]);
        take_early();
        wgmma_wait<S::kDepth>();
        take_late(kb + S::kDepth);
        finish(part[1], kb + S::kDepth);
        step();
      }
      const Tile done = tile;
      if (kb < last) {
        start(part[1]);
        take_early();
        wgmma_wait<S::kDepth>();
        take_late(kb);
        finish(part[0], kb);
        step();
        take_early();
        take_late(last);
        tile = queue.take_next();
        more = tile.row_end >= 0;
        if (more) {
          open(tile);
          start(part[0]);
        } else {
#pragma unroll
          for (int d = 0; d < S::kDepth; ++d) wgmma_commit();  // of nothing, so that the wait below is the same
        }
        wgmma_wait<S::kDepth>();
        finish(part[1], last);
        if (more) step();
      } else {
        take_early();
        wgmma_wait<0>();
        take_late(last);
        finish(part[0], last);
        tile = queue.take_next();
        more = tile.row_end >= 0;
        if (more) {
          open(tile);
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
