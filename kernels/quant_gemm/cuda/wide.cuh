// Tiles that bring fewer bytes to a multiprocessor for each multiplication than those of gemm.cuh: 256 columns. A
// warpgroup has 64 rows and makes two products of 128 columns a stage, one after the other, each into sums
// of its own; while it scales and adds, the other one multiplies. Sums have the same order, and so the
// same bits.
//
// Gated: the products are those of 128 gate and of the 128 up columns that belong to them. A thread then holds
// both values of every hidden element, and the store makes SwiGLU and its FP8 form.
#pragma once

#include <cuda_runtime.h>

#include "copy_engine.cuh"
#include "gated.cuh"
#include "hopper.cuh"
#include "product.cuh"
#include "store.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"
#include "wgmma_shared.cuh"

namespace causeway {

constexpr int kHalfTile = 128;  // columns of a product

template <int TM, int WGS, int STAGES, bool GATED>
struct WideShape {
  static constexpr bool kGated = GATED, kTrades = WGS > 1, kTensorStore = true;
  // Of the output: a gated tile's 256 columns become 128.
  static constexpr int kRows = TM, kColumns = (GATED ? 1 : 2) * kHalfTile, kStages = STAGES;
  static constexpr int kParts = kHalfTile / 2;        // accumulators of a product in a thread
  static constexpr int kBoxRows = TM < 64 ? TM : 64;  // rows that one copy brings
  static constexpr int kBoxBytes = kBoxRows * kBlockK;
  static constexpr int kABytes = TM * kBlockK, kHalfBytes = kHalfTile * kBlockK;
  static constexpr int kStageBytes = kABytes + 2 * kHalfBytes;
  static constexpr int kWarps = WGS * 4, kActiveWarps = TM < 64 ? (TM + 15) / 16 : kWarps;
  static constexpr int kThreads = kWarps * 32 + (kTrades ? 128 : 64);
  static constexpr int kStagingWarp = GATED ? 2048 : 4096;  // bytes, see `swizzled`; one product at a time
  static constexpr int kStagingBytes = kActiveWarps * kStagingWarp;
  static constexpr int kBarrierOffset = STAGES * kStageBytes + kStagingBytes;
  static constexpr int kRunOn = TM < 64 ? 8192 : 0;  // a warpgroup reads 64 rows of A
  static constexpr int kSharedBytes = kBarrierOffset + control_bytes(STAGES) + kRunOn;

  static_assert(kSharedBytes <= 232448, "more shared memory than a block may have");
  static_assert(WGS <= 2 && (TM == 64 * WGS || (TM < 64 && WGS == 1)), "rows of a tile");
};

// Scales of the two products: this thread's two rows, and a block of the weight for each.
class WideScales {
 public:
  __device__ __forceinline__ explicit WideScales(const GemmArguments& args) : args_(args) {}

  // `apart`: weight blocks from the first product's to the second's.
  __device__ __forceinline__ void open(const Tile& tile, int row_in_tile, int apart) {
    const int row = tile.row + row_in_tile, last = args_.rows - 1;
    const int line = (args_.row_offset + tile.column) / 128;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_[i] = static_cast<uint32_t>(min(row + i * 8, last)) * args_.a_scale_stride;
      weight_[i] = tile.group * args_.b_scale_group +
                   min(line + i * apart, args_.n_blocks - 1) * args_.b_scale_stride;
      next_weight_[i] = __ldg(args_.b_scale + weight_[i]);
    }
    load(0);
  }

  // To block kb; blocks come in order. Rows of scales are padded to four bytes.
  __device__ __forceinline__ void step(int kb) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      word_[i] = (kb & 3) == 0 ? next_[i] : word_[i] >> 8;
      now_[i] = next_weight_[i];
      if (kb + 1 < args_.k_blocks) next_weight_[i] = __ldg(args_.b_scale + weight_[i] + kb + 1);
    }
    if ((kb & 3) == 0 && kb + 4 < args_.k_blocks) load(kb + 4);
  }

  __device__ __forceinline__ void take(int product, float (&s)[2]) const {
    const float weight = scale_value(now_[product]);
#pragma unroll
    for (int i = 0; i < 2; ++i) s[i] = scale_value(word_[i] & 255) * weight;
  }

 private:
  __device__ __forceinline__ void load(int kb) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next_[i] = __ldg(reinterpret_cast<const uint32_t*>(args_.a_scale + row_[i] + kb));
    }
  }

  const GemmArguments& args_;
  uint32_t row_[2], next_[2], word_[2], weight_[2], next_weight_[2], now_[2];
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1) wide_kernel(
    const __grid_constant__ Maps maps, const __grid_constant__ GemmArguments args,
    const __grid_constant__ GateArguments gate) {
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
  const int apart = S::kGated ? gate.up_row : kHalfTile;  // columns from the first product's to the second's
  // Rows come in boxes, and those without a row of the tile's group are left out.
  auto boxes = [](const Tile& tile) {
    return min((tile.row_end - tile.row + S::kBoxRows - 1) / S::kBoxRows, S::kRows / S::kBoxRows);
  };
  if (warp >= S::kWarps) {
    if constexpr (S::kTrades) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == S::kWarps) {  // the weight's producer
      if (lane == 0) prefetch_map(&maps.b);
      if (args.offsets != nullptr) wait_for_previous();
      Schedule<S> schedule(args);
      Tile tile = schedule.advance();
      if (lane == 0) queue.put_first(tile);
      auto load = [&](int kb) {
        const uint32_t barrier = full + slot.stage * 8;
        const uint32_t b = stages + slot.stage * S::kStageBytes + S::kABytes;
        const int column = kb * kBlockK - args.col_offset;
        mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
        load_3d(&maps.b, b, barrier, column, tile.column, tile.group);
        load_3d(&maps.b, b + S::kHalfBytes, barrier, column, tile.column + apart, tile.group);
      };
      while (tile.row_end >= 0) {
        const uint32_t bytes = 2 * S::kHalfBytes + boxes(tile) * S::kBoxBytes;  // the rows' bytes too
        if (lane == 0) {
          for (int kb = 0; kb + 1 < args.k_blocks; ++kb, slot.next()) {
            load(kb);
            mbar_expect(full + slot.stage * 8, bytes);
          }
          load(args.k_blocks - 1);
        }
        __syncwarp();
        const Tile next = schedule.advance();
        if (lane == 0) {
          queue.put_next(next);
          mbar_expect(full + slot.stage * 8, bytes);
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
          const int count = boxes(tile);
          for (int kb = 0; kb < args.k_blocks; ++kb, slot.next()) {
            const uint32_t a = stages + slot.stage * S::kStageBytes;
            mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
            for (int i = 0; i < count; ++i) {
              load_2d(&maps.a, a + i * S::kBoxBytes, full + slot.stage * 8, kb * kBlockK - args.col_offset,
                      tile.row + i * S::kBoxRows);
            }
          }
        }
        __syncwarp();
      }
    }
  } else {
    if constexpr (S::kTrades) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group_row = (warp / 4) * 64, first_row = warp * 16, row_in_tile = first_row + lane / 4;
    const bool active = warp < S::kActiveWarps;
    uint8_t* staging = shared + S::kStages * S::kStageBytes + warp * S::kStagingWarp;
    wait_for_previous();

    WideScales scales(args);
    float sum[2][S::kParts], part[S::kParts], s[2];
    auto start = [&](int product) {
      const uint32_t a = stages + slot.stage * S::kStageBytes;
      multiply<kHalfTile>(part, a + group_row * kBlockK, a + S::kABytes + product * S::kHalfBytes);
    };
    auto finish = [&](float(&into)[S::kParts], uint32_t release = 0) {
      wgmma_wait<0>();
      fence_regs(part);
      if (release != 0 && lane == 0) mbar_arrive(release);
      if (active) promote(into, part, s);
    };
    auto open = [&](const Tile& tile) {  // the first product is then under way
      if (tile.row_end >= 0) {
        scales.open(tile, row_in_tile, apart / 128);
        mbar_wait(full + slot.stage * 8, slot.parity);
      }
      start(0);  // of anything when there is no tile: on one path only, the compiler would wait for it
    };
    Tile tile = queue.take_first();
    open(tile);
    while (tile.row_end >= 0) {
      // A warpgroup without a row makes its first product all the same, of what the stage holds.
      const bool any = tile.row + group_row < tile.row_end;
      const bool both = any && (S::kGated || tile.column + apart < args.n);
#pragma unroll
      for (int i = 0; i < S::kParts; ++i) sum[0][i] = sum[1][i] = 0.0f;
      for (int kb = 0; kb < args.k_blocks; ++kb) {
        const bool last = kb + 1 == args.k_blocks;
        const uint32_t release = empty + slot.stage * 8;
        scales.step(kb);
        scales.take(0, s);
        if (both) {
          finish(sum[0]);
          start(1);
          scales.take(1, s);
          if constexpr (!S::kGated) {
            if (last && !args.out_is_float) {
              store_bfloat16<S>(args, maps.out, tile, sum[0], staging, first_row, lane);
            }
          }
        }
        // The next stage is waited for while this one's last product is made.
        slot.next();
        if (!last) mbar_wait(full + slot.stage * 8, slot.parity);
        if (both) {
          finish(sum[1], release);
        } else {
          finish(sum[0], release);
        }
        if (!last) start(0);
      }
      Tile done = tile;
      tile = queue.take_next();
      open(tile);
      if (!active || !any) continue;
      if constexpr (S::kGated) {
        const float2 row_weights = load_row_weights(args, gate, done, first_row, lane);
        store_gated<S>(args, gate, maps.out, done, row_weights, sum[0], sum[1], staging, first_row, lane);
      } else if (args.out_is_float) {
        store_float(args, done, sum[0], row_in_tile, lane);
        done.column += kHalfTile;
        if (both) store_float(args, done, sum[1], row_in_tile, lane);
      } else if (both) {
        done.column += kHalfTile;
        store_bfloat16<S>(args, maps.out, done, sum[1], staging, first_row, lane);
      } else {
        store_bfloat16<S>(args, maps.out, done, sum[0], staging, first_row, lane);
      }
    }
    wgmma_wait<0>();
    fence_regs(part);
    if (lane == 0) bulk_wait_read();
  }
}

template <class S>
int launch_wide(const Maps& maps, const GemmArguments& args, const GateArguments& gate, int grid,
                cudaStream_t stream) {
  return launch<S>(wide_kernel<S>, grid, stream, maps, args, gate);
}

}  // namespace causeway
