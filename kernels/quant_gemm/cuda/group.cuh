// Tiles for many rows of many weights (experts), plain or gated. Two blocks of threads (a cluster) work on one unit at a
// time: where an expert has 256 rows, 128 in each block against the same 256 columns, of which each brings half to
// both; what is left of it in other ways (see `Kind`), so that no warpgroup is ever without a row. Two warpgroups make a
// product of 128 columns at a time; while one scales and adds, the other multiplies. Sums have the order of gemm.cuh, and
// so the same bits.
//
// One warp keeps a ring of stages full of rows and weights, another one brings the scales. A stage is free when both
// blocks have read it. In a split unit the stages are the first and the second warpgroup's in turn, and the other one
// frees them unread.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cluster.cuh"
#include "copy_engine.cuh"
#include "gated.cuh"
#include "group_tiles.cuh"
#include "hopper.cuh"
#include "pair_tiles.cuh"
#include "product.cuh"
#include "store.cuh"
#include "wgmma.cuh"
#include "wgmma_shared.cuh"

namespace causeway {

template <class S>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(S::kThreads, 1)
    group_kernel(const __grid_constant__ Maps maps, const __grid_constant__ GemmArguments args,
                 const __grid_constant__ GateArguments gate) {
  extern __shared__ __align__(1024) uint8_t shared[];  // the swizzle asks for 1024
  const uint32_t stages = smem_address(shared);
  const uint32_t full = stages + S::kBarrierOffset, empty = full + S::kStages * 8;
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = cluster_rank();
  TileQueue<S::kStages> queue(shared + S::kBarrierOffset);

  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      mbar_init(full + i * 8, 2);  // copies and scales
      mbar_init(empty + i * 8, 2 * S::kWarps);
    }
    mbar_init(queue.opened(), 1);
    mbar_fence_init();
  }
  __syncthreads();
  cluster_sync();

  Slot<S::kStages> slot;
  const int apart = S::kGated ? gate.up_row : S::kHalf;  // columns from the first product's to the second's
  if (warp >= S::kWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (warp == S::kWarps) {  // copies
      if (elect_one()) {
        prefetch_map(&maps.b);
        prefetch_map(&maps.a);
      }
      wait_for_previous();
      let_next_start();
      GroupWalk<S> walk(args, rank);
      Tile tile = walk.next();
      if (lane == 0) queue.put_first(tile);
      while (tile.row_end >= 0) {
        const Tile next = walk.next();
        const int kind = kind_of(tile), turns = kind == kSplit ? 2 : 1, group = weight_of(tile);
        const int boxes = min((tile.row_end - tile.row + S::kBoxRows - 1) / S::kBoxRows, S::kRows / S::kBoxRows);
        for (int kb = 0; kb < args.k_blocks; ++kb) {
          for (int turn = 0; turn < turns; ++turn, slot.next()) {
            const uint32_t barrier = full + slot.stage * 8;
            mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
            if (elect_one()) {
              const uint32_t a = stages + slot.stage * S::kStageBytes, b = a + S::kABytes;
              const int depth = kb * kBlockK - args.col_offset, line = tile.column + turn * S::kColumns;
              if (boxes > 0) load_2d(&maps.a, a, barrier, depth, tile.row);
              if (boxes > 1) load_2d(&maps.a, a + S::kBoxBytes, barrier, depth, tile.row + S::kBoxRows);
              if (kind == kPaired) {
                load_3d_all(&maps.b, b + rank * S::kHalfBytes, barrier, depth, line + rank * apart, group, 3);
              } else {
                load_3d(&maps.b, b, barrier, depth, line, group);
                load_3d(&maps.b, b + S::kHalfBytes, barrier, depth, line + apart, group);
              }
            }
            if (kb + 1 == args.k_blocks && turn + 1 == turns) {
              if (lane == 0) queue.put_next(next);
              __syncwarp();
            }
            if (elect_one()) mbar_expect(barrier, 2 * S::kHalfBytes + boxes * S::kBoxBytes);
          }
        }
        tile = next;
      }
    } else if (warp == S::kWarps + 1) {  // scales
      wait_for_previous();
      GroupWalk<S> walk(args, rank);
      Tile tile = walk.next();
      GroupScales<S> scales(args, apart, lane);
      if (tile.row_end >= 0) scales.open(tile);
      while (tile.row_end >= 0) {
        const Tile next = walk.next();
        const int turns = kind_of(tile) == kSplit ? 2 : 1;
        for (int chunk = 0; chunk < args.k_blocks; chunk += 4) {
          scales.step(chunk, next);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (chunk + i == args.k_blocks) break;
#pragma unroll 1
            for (int turn = 0; turn < turns; ++turn, slot.next()) {
              mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
              scales.write(chunk, i, turn, stages + S::kScaleOffset + slot.stage * S::kScaleBytes,
                           stages + S::kWeightScaleOffset + slot.stage * S::kWeightScaleBytes);
              __syncwarp();
              if (elect_one()) mbar_arrive(full + slot.stage * 8);
            }
          }
        }
        tile = next;
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int team = warp / 4;  // warpgroup
    const uint32_t released = remote_address(empty, lane % 2);  // of each block
    uint8_t* staging = shared + S::kStagingOffset + warp * S::kStagingWarp;
    const uint32_t row_scales = stages + S::kScaleOffset + (warp % 4 * 16 + lane / 4 * 2) * 4;
    wait_for_previous();

    float sum[2][S::kParts], part[S::kParts];
    Tile tile = queue.take_first();
    bool split = false;
    int group_row = 0;  // first row of this warpgroup in the tile
    auto start = [&](int product) {
      const uint32_t a = stages + slot.stage * S::kStageBytes;
      multiply<S::kHalf>(part, a + group_row * kBlockK, a + S::kABytes + product * S::kHalfBytes);
    };
    auto release = [&] {
      if (lane < 2) mbar_arrive_in(released + slot.stage * 8);
    };
    auto skip = [&] {  // a stage of the other warpgroup
      mbar_wait(full + slot.stage * 8, slot.parity);
      release();
      slot.next();
    };
    auto open = [&] {  // the tile, up to its first stage
      split = kind_of(tile) == kSplit;
      group_row = split ? 0 : team * 64;
      if (tile.row_end < 0) return;
      if (split && team == 1) {
        tile.column += S::kColumns;
        if (tile.column >= args.n) tile.row_end = tile.row;
        skip();
      }
      mbar_wait(full + slot.stage * 8, slot.parity);
    };
    auto clear = [&](float(&of)[S::kParts]) {
#pragma unroll
      for (int i = 0; i < S::kParts; ++i) of[i] = 0.0f;
    };
    auto store = [&](const Tile& of, const float(&values)[S::kParts], int first_row) {
      if (of.row + first_row >= of.row_end) return;
      if (args.out_is_float) {
        store_float(args, of, values, first_row + lane / 4, lane);
      } else {
        store_bfloat16<S>(args, maps.out, of, values, staging, first_row, lane);
      }
    };
    clear(sum[0]);
    clear(sum[1]);
    open();
    start(0);  // of anything when there is no tile: on one path only, the compiler would wait for it

    // One block of K, whose first product is under way; and so is the next block's when it returns.
    auto block = [&](auto of_tile) {
      constexpr bool kLast = decltype(of_tile)::value;  // of the tile
      const float2 of_rows = load_floats(row_scales + group_row * 4 + slot.stage * S::kScaleBytes);
      const float2 of_weight = load_floats(stages + S::kWeightScaleOffset + slot.stage * S::kWeightScaleBytes);
      const int first_row = group_row + warp % 4 * 16;
      Tile done = tile;
      [[maybe_unused]] float2 row_weights;
      if constexpr (kLast && S::kGated) row_weights = load_row_weights(args, gate, tile, first_row, lane);
      {
        const float s[2] = {of_rows.x * of_weight.x, of_rows.y * of_weight.x};
        wgmma_wait<0>();
        fence_regs(part);
        promote(sum[0], part, s);
      }
      start(1);
      if constexpr (kLast && !S::kGated) {
        store(done, sum[0], first_row);
        done.column += S::kHalf;
        clear(sum[0]);
      }
      {
        const float s[2] = {of_rows.x * of_weight.y, of_rows.y * of_weight.y};
        wgmma_wait<0>();
        fence_regs(part);
        release();
        promote(sum[1], part, s);
      }
      slot.next();
      if (split && !(kLast && team == 1)) skip();
      if constexpr (kLast) {
        tile = queue.take_next();
        open();
      } else {
        mbar_wait(full + slot.stage * 8, slot.parity);
      }
      start(0);
      if constexpr (kLast) {
        if constexpr (S::kGated) {
          if (done.row + first_row < done.row_end) {
            store_gated<S>(args, gate, maps.out, done, row_weights, sum[0], sum[1], staging, first_row, lane);
          }
          clear(sum[0]);
        } else {
          store(done, sum[1], first_row);
        }
        clear(sum[1]);
      }
    };
    while (tile.row_end >= 0) {
      for (int kb = 0; kb + 1 < args.k_blocks; ++kb) block(std::false_type());
      block(std::true_type());
    }
    wgmma_wait<0>();
    fence_regs(part);
    if (lane == 0) bulk_wait_read();
  }
  __syncwarp();
  cluster_sync();  // the other's copies and arrivals come to an end
}

template <class S>
int launch_group(const Maps& maps, const GemmArguments& args, const GateArguments& gate, int grid,
                 cudaStream_t stream) {
  if (args.offsets == nullptr) return cudaErrorInvalidValue;  // tiles of many weights only
  return launch<S>(group_kernel<S>, grid / 2 * 2, stream, maps, args, gate);
}

}  // namespace causeway
