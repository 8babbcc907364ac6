// Few rows against packed FP4 weights: the grouped product of gemm.cuh with the same bits, read at half its bytes.
//
// The roles of wgmma are swapped. Weights are its operand A, in registers: a warpgroup takes the packed tile from
// shared memory (ldmatrix), looks eight values a word up in a table of the eight magnitudes (prmt), and multiplies 64
// of its rows at a time; rows of the batch are operand B. The codes are those of the FP8 form, in the same order
// of K and the same steps of 32, so every product and sum is the same.
//
// A tile is S::kRows rows of the batch by S::kColumns weight rows. One warp keeps the packed weights and, every fourth
// block, their 1x32 scales coming; another the rows, with their scales times the weight's, ready to use. Two
// blocks of threads share a multiprocessor: while one waits for a product or opens a tile, the other unpacks.
#pragma once

#include <cuda_runtime.h>

#include "copy_engine.cuh"
#include "hopper.cuh"
#include "packed_shapes.h"
#include "packed_tiles.cuh"
#include "product.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"
#include "wgmma_e4m3_registers.cuh"

namespace causeway {

template <class S>
__global__ void __launch_bounds__(S::kThreads, 2) packed_kernel(
    const __grid_constant__ PackedMaps maps, const __grid_constant__ GemmArguments args) {
  constexpr int kHalves = S::kColumns / 64, kParts = S::kParts;
  extern __shared__ __align__(1024) uint8_t shared[];  // the swizzle asks for 1024
  const uint32_t stages = smem_address(shared), scales = stages + S::kScaleOffset;
  const uint32_t table = stages + S::kTableOffset;
  const uint32_t full = stages + S::kBarrierOffset, empty = full + S::kStages * 8;
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  TileQueue<S::kStages> queue(shared + S::kBarrierOffset);

  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      mbar_init(full + i * 8, 1 + 32);  // the weight's producer, and all lanes that wrote scales
      mbar_init(empty + i * 8, S::kWarps * 32);
    }
    mbar_init(queue.opened(), 1);
    mbar_fence_init();
  }
  if (threadIdx.x < kTableEntries) {
    const uint32_t exponent = 127 + kLowestShift + threadIdx.x;
    const E2m1Table codes = e2m1_table(__uint_as_float(exponent << 23));
    store_shared(table + threadIdx.x * 8, codes.low);
    store_shared(table + threadIdx.x * 8 + 4, codes.high);
  }
  __syncthreads();

  Slot<S::kStages> slot;
  if (warp == S::kWarps) {  // the weight's producer
    if (lane == 0) prefetch_map(&maps.packed);
    if (lane == 0) prefetch_map(&maps.sub);
    if (!args.offsets_are_old) wait_for_previous();
    Schedule<S> schedule(args);
    Tile tile = schedule.advance();
    if (lane == 0) queue.put_first(tile);
    auto load = [&](int kb) {  // and the bytes that it brings
      const uint32_t barrier = full + slot.stage * 8;
      const uint32_t at = stages + slot.stage * S::kStageBytes + S::kRowBytes;
      mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
      load_3d(&maps.packed, at, barrier, kb * (kBlockK / 2), tile.column, tile.group);
      if (kb % kBlocksAtOnce != 0) return S::kRowBytes + S::kPackedBytes;  // the rows' bytes too
      load_3d(&maps.sub, at + S::kPackedBytes, barrier, kb * (kBlockK / kSubColumns), tile.column, tile.group);
      return S::kStageBytes;
    };
    while (tile.row_end >= 0) {
      int bytes = 0;
      if (lane == 0) {
        for (int kb = 0; kb + S::kBlocks < args.k_blocks; kb += S::kBlocks, slot.next()) {
          bytes = load(kb);
          mbar_expect(full + slot.stage * 8, bytes);
        }
        bytes = load(args.k_blocks - S::kBlocks);
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
    if (lane == 0) prefetch_map(&maps.rows);
    wait_for_previous();
    let_next_start();
    Schedule<S> schedule(args);
    PackedScales<S> scale(args, lane);
    for (Tile tile = schedule.advance(); tile.row_end >= 0; tile = schedule.advance()) {
      scale.open(tile);
      for (int kb = 0; kb < args.k_blocks; kb += kBlocksAtOnce) {
        scale.step(kb);
#pragma unroll
        for (int i = 0; i < kBlocksAtOnce; i += S::kBlocks, slot.next()) {
          mbar_wait(empty + slot.stage * 8, slot.parity ^ 1);
          scale.write(i, scales + slot.stage * S::kScaleBytes);
          if (lane == 0) {
#pragma unroll
            for (int b = 0; b < S::kBlocks; ++b) {
              load_2d(&maps.rows, stages + slot.stage * S::kStageBytes + b * S::kBoxBytes, full + slot.stage * 8,
                      (kb + i + b) * kBlockK, tile.row);
            }
          }
          mbar_arrive(full + slot.stage * 8);
        }
      }
    }
  } else {
    wait_for_previous();
    // Row and 16-byte chunk that this lane names to ldmatrix, with the copy engine's swizzle: matrices 0 and 1 are the
    // warp's two times eight rows of one step of 32 columns, 2 and 3 of the next.
    const int named = warp * 16 + lane % 16, group_row = warp * 16 + lane / 4;
    const uint32_t chunk_at = named * S::kPitch + (((lane / 16) ^ (named & 7)) << 4);
    float sum[kHalves][kParts], part[kParts];
    uint32_t a[2][16], shift[kHalves][kBlocksAtOnce][2];
    int before = 0;  // the stage of the product under way

    // `block`: of the stage's.
    auto start = [&](uint32_t(&from)[16], int block) {
      fence_regs(part);
      keep_registers(from);
      wgmma_fence();
      const uint32_t right = operand(stages + slot.stage * S::kStageBytes + block * S::kBoxBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) WgmmaE4m3Registers<S::kRows>::run(part, from + 4 * k, right + k * 2, k != 0);
      wgmma_commit();
    };
    auto finish = [&](uint32_t(&from)[16], float(&into)[kParts], int block, bool release) {
      const uint32_t first = scales + before * S::kScaleBytes + kBlocksAtOnce * 4;
      const uint32_t at = first + block * S::kRows * 4 + lane % 4 * 8;
      uint2 s[S::kRows / 8];
#pragma unroll
      for (int i = 0; i < S::kRows / 8; ++i) s[i] = load_shared_8(at + i * 32);
      wgmma_wait<0>();
      fence_regs(part);
      keep_registers(from);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const uint2 pair = s[i / 4];
        into[i] = fmaf(part[i], __uint_as_float(i % 2 ? pair.y : pair.x), into[i]);
      }
      if (release) mbar_arrive(empty + before * 8);
    };
    // Scales of four blocks as table indices; whether all of the warp's give normal codes. Weights without a value
    // may have any: their codes are zero.
    auto read_shifts = [&]() {
      const uint32_t at = stages + slot.stage * S::kStageBytes + S::kRowBytes + S::kPackedBytes;
      const uint4 line = load_shared_16(scales + slot.stage * S::kScaleBytes);
      const uint32_t lines[4] = {line.x, line.y, line.z, line.w};
      uint32_t normal = 0x80808080u;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint4 sub = load_shared_16(at + (h * 64 + group_row + r * 8) * 16);
          const uint32_t subs[4] = {sub.x, sub.y, sub.z, sub.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            shift[h][i][r] = subs[i] - lines[i];
            normal &= shift[h][i][r] + (128 + kLowestShift - kLowestNormal) * 0x01010101u;
          }
        }
      }
      return __all_sync(0xFFFFFFFFu, normal == 0x80808080u) != 0;
    };

    for (Tile tile = queue.take_first(); tile.row_end >= 0; tile = queue.take_next()) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) sum[h][i] = 0.0f;
      }
      for (int kb = 0; kb < args.k_blocks; kb += kBlocksAtOnce) {
        bool normal = false;
#pragma unroll
        for (int unit = 0; unit < kBlocksAtOnce * kHalves; ++unit) {  // 64 weight rows of one block
          const int i = unit / kHalves, h = unit % kHalves, block = i % S::kBlocks;
          const bool opens = h == 0 && block == 0, closes = h == kHalves - 1 && block == S::kBlocks - 1;
          if (opens) mbar_wait(full + slot.stage * 8, slot.parity);
          if (unit == 0) normal = read_shifts();
          const uint32_t half = slot.stage * S::kStageBytes + S::kRowBytes + h * 64 * S::kPitch;
          const uint32_t at = (stages + half + chunk_at) ^ (block * 64);
          uint32_t words[8];
          load_matrices(words, 0, at);
          load_matrices(words, 4, at ^ 32);
          if (normal) {
            unpack_rows<true>(a[unit % 2], words, shift[h][i], table);
          } else {
            unpack_rows<false>(a[unit % 2], words, shift[h][i], table);
          }
          const int last = unit - 1;
          if (unit > 0) finish(a[last % 2], sum[last % kHalves], last / kHalves % S::kBlocks, opens);
          start(a[unit % 2], block);
          before = slot.stage;
          if (closes) slot.next();
        }
        finish(a[1], sum[kHalves - 1], S::kBlocks - 1, true);
      }
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        store_sums(args, tile, sum[h], tile.column + h * 64 + group_row, lane);
      }
    }
  }
}

template <class S>
int launch_packed(const PackedMaps& maps, const GemmArguments& args, int multiprocessors, cudaStream_t stream) {
  static const cudaError_t configured = cudaFuncSetAttribute(
      packed_kernel<S>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (configured != cudaSuccess) return configured;
  return launch<S>(packed_kernel<S>, 2 * multiprocessors, stream, maps, args);
}

}  // namespace causeway
