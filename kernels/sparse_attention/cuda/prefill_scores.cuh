// Scores and probabilities: one warpgroup, whose queries stay in registers for the whole row.
#pragma once
#include "copy_engine.cuh"
#include "prefill_tile.cuh"

namespace causeway {

constexpr float kSlack = 8.0f;  // powers of two
constexpr int kAhead = 24;      // products of 32 that go ahead of the values of the tile before

// bf16, A in registers, B K-major in smem.
__device__ __forceinline__ void mma_m64n64k16_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_PLACES_32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
      : WGMMA_SUMS_32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// K-major operand in 8 x 8 matrices of 128 bytes, not swizzled; bytes from one to the next along K, along MN.
__device__ __forceinline__ uint64_t desc_plain(uint32_t smem, uint32_t along_k, uint32_t along_mn) {
  return (uint64_t)((smem & 0x3ffff) >> 4) | ((uint64_t)(along_k >> 4) << 16) | ((uint64_t)(along_mn >> 4) << 32);
}

__device__ __forceinline__ void load_queries(uint32_t (&q)[4], uint32_t tile, int k) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, r = 16 * warp + (lane & 15);
  uint32_t at = tile + (k / 4) * kSubtile + r * 128 + (((2 * (k & 3) + (lane >> 4)) ^ (r & 7)) << 4);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(q[0]), "=r"(q[1]), "=r"(q[2]), "=r"(q[3])
               : "r"(at)
               : "memory");
}

// Asked for where it is needed: a register held all the time would be one too many.
__device__ __forceinline__ int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread & 127;
}
__device__ __forceinline__ bool first_lane() { return (fresh_thread() & 31) == 0; }

__device__ void score(PrefillSmem& s, const PrefillArgs& a) {
  uint32_t full = smem_address(s.full), empty = smem_address(s.empty), memory = smem_address(s.tiles);
  uint32_t p_full = smem_address(s.p_full), p_empty = smem_address(s.p_empty);
  uint32_t factor_full = smem_address(&s.factor_full);
  Place slot;
  uint32_t step = 0;
  uint32_t q[kHeld][4];
  int parity = 0;
  for (Walk walk(a); walk.row < a.rows; walk.next(a)) {
    float top[2] = {kNegInf, kNegInf}, total[2] = {0.0f, 0.0f};
    mbar_wait(full + slot.at * 8, slot.round);
    int count = s.num_tiles[slot.at];
    if (count > 0) {
      uint32_t more[4], tile = memory + slot.at * kTileBytes;
      load_queries(more, tile, kHeld);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) load_queries(q[k], tile, k);
      // Matrices of 8 x 8 as they came: two of a row of matrices are 128 bytes apart, two rows 256. A warp
      // writes the rows that its own products read.
      uint32_t to = smem_address(s.q_left) + fresh_thread() / 32 * 512 + fresh_thread() % 32 * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) store_shared(to + (i & 1) * 256 + (i >> 1) * 128, more[i]);
      fence_async_proxy();
      named_barrier(1, 128);
    }
    __syncwarp();
    if (first_lane()) {
      for (int half = 0; half < 2; ++half) mbar_arrive_many(empty + (2 * slot.at + half) * 8, 2);
    }
    slot.next(kSlots);
    if (count == 0) {
      // The factors' place is free once the row before is through, which may have been the last step.
      for (int i = 0; i < 2; ++i) mbar_wait(p_empty + (step + i & 1) * 8, (step + i >> 1 & 1) ^ 1);
      int thread = fresh_thread(), t = thread & 3, line = thread / 32 * 16 + thread % 32 / 4;
      if (t == 0) {
        for (int i = 0; i < 2; ++i) {
          s.factor[line + 8 * i] = 0.0f;
          int head = walk.head() + line + 8 * i;
          if (head < a.heads) a.lse[(int64_t)walk.row * a.heads + head] = kNegInf;
        }
      }
      if (first_lane()) s.state[step & 1][thread / 32] = kLast;
      __syncwarp();
      if (first_lane()) mbar_arrive(p_full + (step & 1) * 8), mbar_arrive(factor_full);
      ++step;
      continue;
    }
    uint64_t q_last = desc_k_major(smem_address(s.q_last[parity]));
    parity ^= 1;
    for (int n = 0; n < count; ++n) {
      float z[32];
      mbar_wait(full + slot.at * 8, slot.round);
      fence_async_proxy();
      uint64_t keys = desc_k_major(memory + slot.at * kTileBytes);
      fence_regs(z);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 32; ++k) {
        uint32_t at = (k / 4) * kSubtile + (k & 3) * 32;
        if (k < kHeld) {
          mma_m64n64k16_rs(z, q[k], desc_advance(keys, at), k > 0);
        } else {
          uint64_t left = desc_plain(smem_address(s.q_left), 128, 256);
          mma_m64n64k16_ss(z, k == kHeld ? left : desc_advance(q_last, (k & 3) * 32), desc_advance(keys, at), 1);
        }
        // The values of the tile before come behind these products: there is work for the tensor
        // cores while the probabilities of this one are made.
        if (k == kAhead - 1 && n > 0 && first_lane()) mbar_arrive(p_full + (~step & 1) * 8);
      }
      wgmma_commit();
      uint2 mask = *reinterpret_cast<const uint2*>(s.mask[slot.at]);
      bool partial = (mask.x & mask.y) != ~0u, last = n + 1 == count;
      mbar_wait(p_empty + (step & 1) * 8, (step >> 1 & 1) ^ 1);
      wgmma_wait<0>();
      fence_regs(z);
      int thread = fresh_thread(), t = thread & 3, line = thread / 32 * 16 + thread % 32 / 4;
      if (partial) {
        mask = *reinterpret_cast<const uint2*>(s.mask[slot.at]);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          int key = 8 * (j >> 1) + 2 * t + (j & 1);
          if (!((key < 32 ? mask.x : mask.y) >> (key & 31) & 1)) {
            z[4 * (j >> 1) + (j & 1)] = z[4 * (j >> 1) + 2 + (j & 1)] = kNegInf;
          }
        }
      }
      slot.next(kSlots);
      // A maximum is replaced where a score exceeds it by kSlack: probabilities may be as large as 2^kSlack,
      // and what was summed is multiplied a few times a row only.
      float best[2] = {kNegInf, kNegInf};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        best[0] = fmaxf(best[0], fmaxf(z[4 * j], z[4 * j + 1]));
        best[1] = fmaxf(best[1], fmaxf(z[4 * j + 2], z[4 * j + 3]));
      }
      int state = kTile | (last ? kLast : 0);
      if (__any_sync(~0u, best[0] * a.scale > top[0] + kSlack || best[1] * a.scale > top[1] + kSlack)) {
        state |= kShrink;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 1));
          best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 2)) * a.scale;
          float now = best[i] > top[i] + kSlack ? best[i] : top[i];
          float shrink = now == kNegInf ? 0.0f : exp2_fast(top[i] - now);
          top[i] = now;
          total[i] *= shrink;
          if (t == 0) s.shrink[step & 1][line + 8 * i] = shrink;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float shift = top[i] == kNegInf ? 0.0f : top[i];
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          float& x = z[4 * (j >> 1) + 2 * i + (j & 1)];
          x = exp2_fast(fmaf(x, a.scale, -shift));
        }
      }
      // Lane l gives row l % 8 of matrix l / 8: of heads 8 (l / 8 % 2) on, and of keys 8 (l / 16) on.
      int r = (line & 48) + (thread & 15);
      uint32_t to = smem_address(s.p[step & 1]) + r * 128;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t p[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          float x = z[4 * (j + u / 2) + 2 * (u & 1)], y = z[4 * (j + u / 2) + 2 * (u & 1) + 1];
          total[u & 1] += x + y;
          p[u] = pack_bf16(x, y);
        }
        store_matrices(to + (((j + (thread >> 4 & 1)) ^ (r & 7)) << 4), p[0], p[1], p[2], p[3]);
      }
      if (first_lane()) s.state[step & 1][thread / 32] = (uint8_t)state;
      fence_async_proxy();
      __syncwarp();
      if (last && first_lane()) mbar_arrive(p_full + (step & 1) * 8);
      ++step;
    }
    // The factors' place is free once the row before is through: two tiles ago, but not one.
    if (count == 1) mbar_wait(p_empty + (step & 1) * 8, (step >> 1 & 1) ^ 1);
    int thread = fresh_thread(), t = thread & 3, line = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int head = walk.head() + line + 8 * i;
      float sum = total[i], extra = 0.0f;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      // A row of NaN has no maximum either, but a sum of NaN.
      bool real = head < a.heads, empty_row = top[i] == kNegInf && sum == 0.0f;
      if (a.sink && real && !empty_row) extra = exp2_fast(__ldg(a.sink + head) * kLog2e - top[i]);
      if (t == 0) {
        s.factor[line + 8 * i] = empty_row ? 0.0f : __fdividef(1.0f, sum + extra);
        if (real) a.lse[(int64_t)walk.row * a.heads + head] = empty_row ? kNegInf : (top[i] + __log2f(sum)) * kLn2;
      }
    }
    __syncwarp();
    if (first_lane()) mbar_arrive(factor_full);
  }
}

}  // namespace causeway
