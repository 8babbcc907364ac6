// Tiles of 128 rows and at most 128 columns for many rows of few columns: a warpgroup of 64 rows holds the products of
// two blocks of K, so that the next one runs while one is scaled and added. Sums have the order of gemm.cuh, and so the
// same bits.
//
// One warp keeps a ring of stages full; three bring the scales of all of K, a tile ahead. One weight only: no groups.
#pragma once

#include <cuda_runtime.h>

#include "cluster.cuh"
#include "copy_engine.cuh"
#include "hopper.cuh"
#include "pair_tiles.cuh"
#include "product.cuh"
#include "wgmma.cuh"
#include "wgmma_shared.cuh"

namespace causeway {

template <int BN, int STAGES, int EARLY>
struct OverlapShape {
  static constexpr int kBlocks = 1, kBlockRows = 128, kRows = 128;
  static constexpr int kColumns = BN, kStages = STAGES, kEarly = EARLY;  // stages of the weight before the rows'
  static constexpr int kProductColumns = BN, kProducts = 1, kParts = BN / 2;
  static constexpr int kGroup = largest_common(BN, 128), kGroups = BN / kGroup;  // columns that share a scale
  static constexpr int kABytes = kBlockRows * kBlockK, kBBytes = BN * kBlockK;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kWarps = 8, kScaleWarps = 3, kThreads = (kWarps + 1 + kScaleWarps) * 32;
  static constexpr int kUnit = BN % 64 == 0 ? 64 : 32;  // columns that one copy stores
  static constexpr int kUnitBytes = 16 * kUnit * 2, kStagingWarp = BN / kUnit * kUnitBytes;
  static constexpr int kMostK = 128;  // blocks; tuning.py: OVERLAP_BLOCKS
  // Behind the ring: staging of the store, barriers, and of two tiles the rows' scales (four blocks a word) and two
  // lines of the weight's.
  static constexpr int kStagingOffset = STAGES * kStageBytes;
  static constexpr int kBarrierOffset = kStagingOffset + kWarps * kStagingWarp;
  static constexpr int kScaleOffset = kBarrierOffset + 128;
  static constexpr int kWeightScaleOffset = kMostK * kBlockRows, kScaleBytes = kWeightScaleOffset + 2 * kMostK;
  static constexpr int kSharedBytes = kScaleOffset + 2 * kScaleBytes;

  static_assert(kSharedBytes <= 232448, "more shared memory than a block may have");
  static_assert((2 * STAGES + 4) * 8 <= 128 && BN * kBlockK % 1024 == 0, "barriers, swizzled tiles");
};

__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// The scales of a tile, by three warps: bytes of the weight's two lines, and of each row a word for four blocks. Rows
// past the last repeat it.
template <class S>
__device__ __forceinline__ void bring_weight_scales(const GemmArguments& args, const Tile& tile, uint8_t* to, int at) {
  const int first = (args.row_offset + tile.column) / 128;
  for (int i = at; i < args.k_blocks; i += S::kScaleWarps * 32) {
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      const uint32_t line = static_cast<uint32_t>(min(first + l, args.n_blocks - 1)) * args.b_scale_stride;
      to[S::kWeightScaleOffset + l * S::kMostK + i] = __ldg(args.b_scale + line + i);
    }
  }
}
template <class S>
__device__ __forceinline__ void bring_row_scales(const GemmArguments& args, const Tile& tile, uint32_t to, int warp,
                                                 int lane) {
  const int words = (args.k_blocks + 3) / 4;
#pragma unroll 3
  for (int w = warp; w < words; w += S::kScaleWarps) {
#pragma unroll
    for (int r = 0; r < S::kBlockRows; r += 32) {
      const uint32_t row = static_cast<uint32_t>(min(tile.row + r + lane, args.rows - 1)) * args.a_scale_stride;
      const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(args.a_scale + row) + w);
      store_shared(to + (w * S::kBlockRows + r + lane) * 4, word);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    overlap_kernel(const __grid_constant__ Maps maps, const __grid_constant__ GemmArguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];  // the swizzle asks for 1024
  const uint32_t stages = smem_address(shared);
  const uint32_t full = stages + S::kBarrierOffset, empty = full + S::kStages * 8;
  const uint32_t scaled = empty + S::kStages * 8, unscaled = scaled + 16;
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  if (warp == S::kWarps && elect_one()) {
    prefetch_map(&maps.b);
    prefetch_map(&maps.a);
    prefetch_map(&maps.out);
    for (int i = 0; i < S::kStages; ++i) {
      mbar_init(full + i * 8, 1);
      mbar_init(empty + i * 8, S::kWarps);
    }
    for (int i = 0; i < 2; ++i) {
      mbar_init(scaled + i * 8, S::kScaleWarps * 32);
      mbar_init(unscaled + i * 8, S::kWarps * 32);
    }
    mbar_fence_init();
  }
  __syncthreads();

  PairWalk<S> walk(args, 0);
  Tile tile = walk.next();
  Slot<S::kStages> slot;
  if (warp >= S::kWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == S::kWarps) {
      if (elect_one()) {
        auto load_rows = [&](int kb) {
          load_2d(&maps.a, stages + slot.stage * S::kStageBytes, full + slot.stage * 8, kb * kBlockK - args.col_offset,
                  tile.row);
        };
        auto load_weight = [&](int kb) {
          mbar_expect(full + slot.stage * 8, S::kStageBytes);
          load_3d(&maps.b, stages + slot.stage * S::kStageBytes + S::kABytes, full + slot.stage * 8,
                  kb * kBlockK - args.col_offset, tile.column, 0);
        };
        // A weight does not come from the previous kernel: the ring may fill already. But few stages: the first rows
        // come behind them.
        int early = min(S::kEarly, args.k_blocks);
        for (int kb = 0; kb < early; ++kb, slot.next()) load_weight(kb);
        slot = Slot<S::kStages>();
        wait_for_previous();
        let_next_start();
        while (tile.row_end >= 0) {
          for (int kb = 0; kb < args.k_blocks; ++kb, slot.next()) {
            mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
            if (kb >= early) load_weight(kb);
            load_rows(kb);
          }
          early = 0;
          tile = walk.next();
        }
      }
    } else {
      const int mine = warp - S::kWarps - 1;
      bring_weight_scales<S>(args, tile, shared + S::kScaleOffset, mine * 32 + lane);
      wait_for_previous();
      for (int t = 0; tile.row_end >= 0; ++t) {
        const int buffer = t & 1;
        if (t > 0) {
          mbar_wait(unscaled + buffer * 8, t >> 1 & 1 ^ 1);
          bring_weight_scales<S>(args, tile, shared + S::kScaleOffset + buffer * S::kScaleBytes, mine * 32 + lane);
        }
        bring_row_scales<S>(args, tile, stages + S::kScaleOffset + buffer * S::kScaleBytes, mine, lane);
        mbar_arrive(scaled + buffer * 8);
        tile = walk.next();
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    wait_for_previous();
    const int group_row = warp / 4 * 64;
    const uint32_t staging = stages + S::kStagingOffset + warp * S::kStagingWarp;
    float sum[S::kParts], part[2][S::kParts], s[S::kGroups][2];
    uint32_t words[4];  // of four blocks: two rows, two lines of the weight
    auto scales = [&](int kb, uint32_t from) {
      if ((kb & 3) == 0) {
        const uint32_t row_scale = from + (kb * 32 + warp * 16 + lane / 4) * 4;
        words[0] = load_word(row_scale);
        words[1] = load_word(row_scale + 32);
        words[2] = load_word(from + S::kWeightScaleOffset + kb);
        if (S::kGroups > 1) words[3] = load_word(from + S::kWeightScaleOffset + S::kMostK + kb);
      }
      float f[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        f[i] = __uint_as_float((words[i] & 255) << 23);
        words[i] >>= 8;
      }
      const int lead = S::kGroup == 128 ? 0 : (args.row_offset + tile.column) & 127;
#pragma unroll
      for (int g = 0; g < S::kGroups; ++g) {
        const float w = lead + g * S::kGroup < 128 ? f[2] : f[3];
        s[g][0] = f[0] * w;
        s[g][1] = f[1] * w;
      }
    };
    auto start = [&](float(&into)[S::kParts]) {
      mbar_wait(full + slot.stage * 8, slot.parity);
      const uint32_t a = stages + slot.stage * S::kStageBytes;
      multiply<S::kProductColumns>(into, a + group_row * kBlockK, a + S::kABytes);
    };
    auto finish = [&](float(&from)[S::kParts], int stage) {
      fence_regs(from);
      if (lane == 0) mbar_arrive(empty + stage * 8);
#pragma unroll
      for (int i = 0; i < S::kParts; i += 4) {
        const float(&f)[2] = s[(i * 2) / S::kGroup];
        sum[i] = fmaf(from[i], f[0], sum[i]);
        sum[i + 1] = fmaf(from[i + 1], f[0], sum[i + 1]);
        sum[i + 2] = fmaf(from[i + 2], f[1], sum[i + 2]);
        sum[i + 3] = fmaf(from[i + 3], f[1], sum[i + 3]);
      }
    };
    for (int t = 0; tile.row_end >= 0; ++t) {
      const uint32_t from = stages + S::kScaleOffset + (t & 1) * S::kScaleBytes;
      // Starts the next block's product, then waits for the one under way and adds it.
      auto step = [&](float(&into)[S::kParts], float(&ready)[S::kParts], int kb) {
        const int stage = slot.stage;
        slot.next();
        start(into);
        scales(kb, from);
        wgmma_wait<1>();
        finish(ready, stage);
      };
#pragma unroll
      for (int i = 0; i < S::kParts; ++i) sum[i] = 0.0f;
      start(part[0]);
      mbar_wait(scaled + (t & 1) * 8, t >> 1 & 1);
      int kb = 0;
      for (; kb + 2 < args.k_blocks; kb += 2) {
        step(part[1], part[0], kb);
        step(part[0], part[1], kb + 1);
      }
      if (kb + 1 < args.k_blocks) {
        step(part[1], part[0], kb);
        scales(kb + 1, from);
        wgmma_wait<0>();
        finish(part[1], slot.stage);
      } else {
        scales(kb, from);
        wgmma_wait<0>();
        finish(part[0], slot.stage);
      }
      slot.next();
      mbar_arrive(unscaled + (t & 1) * 8);
      if (lane == 0) bulk_wait_read();
      __syncwarp();
      store_pair<S>(args, maps.out, tile, sum, staging, warp, lane);
      tile = walk.next();
    }
    if (lane == 0) bulk_wait_read();
  }
}

template <class S>
int launch_overlap(const Maps& maps, const GemmArguments& args, const GateArguments&, int grid, cudaStream_t stream) {
  if (args.k_blocks > S::kMostK) return cudaErrorInvalidValue;
  return launch<S>(overlap_kernel<S>, grid, stream, maps, args);
}

}  // namespace causeway
