// Values: two warpgroups, each with half of the output's columns.
#pragma once
#include "prefill_tile.cuh"
#include "products.cuh"

namespace causeway {

__device__ void sum_values(PrefillSmem& s, const PrefillArgs& a, int group) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  int line = 16 * warp + (lane >> 2);  // this thread's heads: line and line + 8
  uint32_t empty = smem_address(s.empty), memory = smem_address(s.tiles);
  uint32_t p_full = smem_address(s.p_full), p_empty = smem_address(s.p_empty);
  Place slot;
  uint32_t step = 0;
  float acc[2][64];  // of 128 columns each
  uint32_t round = 0;
  for (Walk walk(a); walk.row < a.rows; walk.next(a), round ^= 1) {
    slot.next(kSlots);  // the queries
    int state = 0;
    for (int n = 0;; ++n) {
      mbar_wait(p_full + (step & 1) * 8, step >> 1 & 1);
      state = s.state[step & 1][warp];
      if (state & kTile) {
        if (n > 0 && (state & kShrink)) {
          float shrink[2] = {s.shrink[step & 1][line], s.shrink[step & 1][line + 8]};
#pragma unroll
          for (int j = 0; j < 64; ++j) acc[0][j] *= shrink[j / 2 & 1], acc[1][j] *= shrink[j / 2 & 1];
        }
        fence_async_proxy();
        uint64_t p = desc_k_major(smem_address(s.p[step & 1]));
        uint64_t values = desc_mn_major(memory + slot.at * kTileBytes + group * 4 * kSubtile, kSubtile);
        fence_regs(acc[0]);
        fence_regs(acc[1]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            mma_m64n128k16_ss_t(acc[c], desc_advance(p, k * 32), desc_advance(values, c * 2 * kSubtile + k * 2048),
                                n > 0 || k > 0);
          }
          if (k & 1) wgmma_commit();
        }
        // The keys of a half are free for others as soon as they are multiplied.
        wgmma_wait<1>();
        if (lane == 0) mbar_arrive(empty + 2 * slot.at * 8);
        wgmma_wait<0>();
        fence_regs(acc[0]);
        fence_regs(acc[1]);
        if (lane == 0) mbar_arrive(empty + (2 * slot.at + 1) * 8);
        slot.next(kSlots);
      }
      if (state & kLast) break;
      __syncwarp();
      if (lane == 0) mbar_arrive(p_empty + (step & 1) * 8);
      ++step;
    }
    mbar_wait(smem_address(&s.factor_full), round);
    float factor[2] = {s.factor[line], s.factor[line + 8]};
    __syncwarp();
    if (lane == 0) mbar_arrive(p_empty + (step & 1) * 8);
    ++step;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int head = walk.head() + line + 8 * i;
      if (factor[i] == 0.0f) {  // no keys
#pragma unroll
        for (int j = 0; j < 16; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) acc[c][4 * j + 2 * i] = acc[c][4 * j + 2 * i + 1] = 0.0f;
        }
      }
      __nv_bfloat16* to = a.o + ((int64_t)walk.row * a.heads + head) * kDim + group * 256;
#pragma unroll
      for (int c = 0; c < 2; ++c) store_output(acc[c], factor[i], i, head < a.heads ? to + c * 128 : nullptr);
    }
  }
}

}  // namespace causeway
