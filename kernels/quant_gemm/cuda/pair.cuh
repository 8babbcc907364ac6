// Tiles for many rows: S::kBlocks blocks of threads (a cluster) hold 128 rows each against the same columns, and each
// brings its share of the weight to all. Two warpgroups of 64 rows make a product of S::kProductColumns at a time; while
// one scales and adds, the other multiplies. Sums have the order of gemm.cuh, and so the same bits.
//
// One warp keeps a ring of stages full: rows, weight, scales. A stage is free when all blocks of the cluster have read it;
// a consumer frees its stage before it waits for the next one. One weight only: no groups.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>
#include <utility>

#include "cluster.cuh"
#include "copy_engine.cuh"
#include "hopper.cuh"
#include "pair_tiles.cuh"
#include "product.cuh"
#include "wgmma.cuh"
#include "wgmma_shared.cuh"

namespace causeway {

template <class Call, int... kNumbers>
__device__ __forceinline__ void each_of(Call& call, std::integer_sequence<int, kNumbers...>) {
  (call(std::integral_constant<int, kNumbers>()), ...);
}
// call(0), call(1), .. below End, as constants.
template <int End, class Call>
__device__ __forceinline__ void each_below(Call& call) {
  each_of(call, std::make_integer_sequence<int, End>());
}

template <class S>
__global__ void __cluster_dims__(S::kBlocks, 1, 1) __launch_bounds__(S::kThreads, 1)
    pair_kernel(const __grid_constant__ Maps maps, const __grid_constant__ GemmArguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];  // the swizzle asks for 1024
  const uint32_t stages = smem_address(shared);
  const uint32_t full = stages + S::kBarrierOffset, empty = full + S::kStages * 8;
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = S::kBlocks == 1 ? 0 : cluster_rank();

  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      mbar_init(full + i * 8, 1);
      mbar_init(empty + i * 8, S::kBlocks * S::kWarps);
    }
    mbar_fence_init();
  }
  __syncthreads();
  if constexpr (S::kBlocks > 1) cluster_sync();

  Slot<S::kStages> slot;
  PairWalk<S> walk(args, rank);
  Tile tile = walk.next();
  if (warp >= S::kWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    // One thread issues copies: where the compiler knows that, it issues them without a loop over threads.
    auto stage_bytes = [&] { return S::kBBytes + (tile.row < tile.row_end ? S::kABytes : 0); };
    auto load_rows = [&](int kb) {
      if (tile.row >= tile.row_end) return;  // the second block of the last rows
      load_2d(&maps.a, stages + slot.stage * S::kStageBytes, full + slot.stage * 8, kb * kBlockK - args.col_offset,
              tile.row);
    };
    auto load_weight = [&](int kb) {
      constexpr int kShare = S::kColumns / S::kBlocks;
      const uint32_t b = stages + slot.stage * S::kStageBytes + S::kABytes + rank * (kShare * kBlockK);
      const int column = kb * kBlockK - args.col_offset, line = tile.column + rank * kShare;
      if constexpr (S::kBlocks == 1) {
        load_3d(&maps.b, b, full + slot.stage * 8, column, line, 0);
      } else {
        load_3d_all(&maps.b, b, full + slot.stage * 8, column, line, 0, (1 << S::kBlocks) - 1);
      }
    };
    if (warp == S::kWarps) {
      // A weight does not come from the previous kernel: the ring may fill already.
      int ahead = min(S::kStages, args.k_blocks);
      if (elect_one()) {
        prefetch_map(&maps.b);
        prefetch_map(&maps.a);
        for (int kb = 0; kb < ahead; ++kb, slot.next()) load_weight(kb);
      }
      slot = Slot<S::kStages>();
      wait_for_previous();
      let_next_start();
      PairScales<S> scales(args, lane);
      scales.open(tile);
      while (tile.row_end >= 0) {
        const Tile next = walk.next();
        for (int kb = 0; kb < args.k_blocks; kb += 4) {
          scales.step(kb, next);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (kb + i == args.k_blocks) break;
            mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
            if (elect_one()) {
              load_rows(kb + i);
              if (kb + i >= ahead) load_weight(kb + i);
            }
            scales.write(kb, i, stages + S::kScaleOffset + slot.stage * S::kScaleBytes,
                         stages + S::kWeightScaleOffset + slot.stage * S::kWeightScaleBytes);
            __syncwarp();
            if (elect_one()) mbar_expect(full + slot.stage * 8, stage_bytes());
            slot.next();
          }
        }
        ahead = 0;
        tile = next;
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int group_row = warp / 4 * 64;
    const uint32_t released = S::kBlocks == 1 ? empty : remote_address(empty, lane % S::kBlocks);  // of each block
    const uint32_t staging = stages + S::kStagingOffset + warp * S::kStagingWarp;
    wait_for_previous();
    const uint32_t row_scale = stages + S::kScaleOffset + (warp * 16 + (lane / 4) * 2) * 4;
    float sum[S::kProducts][S::kParts], part[S::kParts];
    const uint32_t left = operand(stages + group_row * kBlockK), right = operand(stages + S::kABytes);
    auto start = [&](int product, int stage) {
      const uint32_t at = stage * (S::kStageBytes / 16);
      multiply_operands<S::kProductColumns>(part, left + at,
                                            right + at + product * (S::kProductColumns * kBlockK / 16));
    };
#pragma unroll
    for (int q = 0; q < S::kProducts; ++q) {
#pragma unroll
      for (int i = 0; i < S::kParts; ++i) sum[q][i] = 0.0f;
    }
    mbar_wait(full, 0);
    start(0, 0);

    // One block of K, whose first product is under way; and so is the next block's when it returns.
    auto block = [&](auto of_tile, auto of_ring) {
      constexpr bool kLast = decltype(of_tile)::value;  // of the tile
      constexpr int kStage = decltype(of_ring)::value;  // read where S::kWhole
      const int stage = S::kWhole ? kStage : slot.stage;
      const uint32_t release = released + stage * 8;
      const float2 of_rows = load_floats(row_scale + stage * S::kScaleBytes);
      const float2 of_weight = load_floats(stages + S::kWeightScaleOffset + stage * S::kWeightScaleBytes);
      float s[S::kGroups][2];
      const int lead = S::kGroup == 128 ? 0 : (args.row_offset + tile.column) & 127;
#pragma unroll
      for (int g = 0; g < S::kGroups; ++g) {
        const float w = lead + g * S::kGroup < 128 ? of_weight.x : of_weight.y;
        s[g][0] = of_rows.x * w;
        s[g][1] = of_rows.y * w;
      }
      Tile done = tile;
#pragma unroll
      for (int q = 0; q < S::kProducts; ++q) {
        wgmma_wait<0>();
        fence_regs(part);
        if (q + 1 == S::kProducts && lane < S::kBlocks) mbar_arrive_in(release);
#pragma unroll
        for (int i = 0; i < S::kParts; i += 4) {
          const float(&f)[2] = s[(q * S::kProductColumns + i * 2) / S::kGroup];
          sum[q][i] = fmaf(part[i], f[0], sum[q][i]);
          sum[q][i + 1] = fmaf(part[i + 1], f[0], sum[q][i + 1]);
          sum[q][i + 2] = fmaf(part[i + 2], f[1], sum[q][i + 2]);
          sum[q][i + 3] = fmaf(part[i + 3], f[1], sum[q][i + 3]);
        }
        int next_stage = stage;
        if (q + 1 == S::kProducts) {
          if constexpr (!S::kWhole) slot.next();
          if constexpr (S::kWhole && kStage + 1 == S::kStages) slot.parity ^= 1;
          next_stage = S::kWhole ? (kStage + 1) % S::kStages : slot.stage;
          if constexpr (kLast) tile = walk.next();
          if (!kLast || tile.row_end >= 0) mbar_wait(full + next_stage * 8, slot.parity);
        }
        // Without a further tile a product is made of anything: on one path only, the compiler would wait for it.
        start((q + 1) % S::kProducts, next_stage);
        if constexpr (kLast) {
          if (lane == 0) bulk_wait_read();
          __syncwarp();
          store_pair<S>(args, maps.out, done, sum[q], staging, warp, lane);
          done.column += S::kProductColumns;
#pragma unroll
          for (int i = 0; i < S::kParts; ++i) sum[q][i] = 0.0f;
        }
      }
    };
    using First = std::integral_constant<int, 0>;
    using Last = std::integral_constant<int, S::kStages - 1>;
    while (tile.row_end >= 0) {
      if constexpr (S::kWhole) {
        auto inner = [&](auto of_ring) { block(std::false_type(), of_ring); };
        for (int kb = S::kStages; kb < args.k_blocks; kb += S::kStages) {
          each_below<S::kStages - 1>(inner);
          inner(Last());
        }
        each_below<S::kStages - 1>(inner);
        block(std::true_type(), Last());
      } else {
        for (int kb = 0; kb + 1 < args.k_blocks; ++kb) block(std::false_type(), First());
        block(std::true_type(), First());
      }
    }
    wgmma_wait<0>();
    fence_regs(part);
    if (lane == 0) bulk_wait_read();
  }
  __syncwarp();
  if constexpr (S::kBlocks > 1) cluster_sync();  // the other's copies and arrivals come to an end
}

template <class S>
int launch_pair(const Maps& maps, const GemmArguments& args, const GateArguments&, int grid, cudaStream_t stream) {
  using Whole = WholeRings<S>;
  if (args.k_blocks % S::kStages == 0) return launch<Whole>(pair_kernel<Whole>, grid, stream, maps, args);
  return launch<S>(pair_kernel<S>, grid, stream, maps, args);
}

}  // namespace causeway
