// The products of few tokens: rows, wgmma's operand A, come from registers. With both operands in shared memory
// a chain of small products takes twice as long, though 48 of A's 64 rows may not be there. Same bits.
#pragma once

#include "../../linear/cuda/dense.cuh"

namespace causeway {
namespace gate {

constexpr int kExperts = 16;  // of a block

// What a block keeps of a segment: all of 1792 columns with 16 rows. Two blocks fit a processor, so that the
// next launch asks for its weight while this one runs.
template <int ROWS, int STAGES>
struct Shape : DenseShape<ROWS, 1, kExperts, STAGES, true, 1, false, 1> {
  using Base = DenseShape<ROWS, 1, kExperts, STAGES, true, 1, false, 1>;
  static constexpr int kBarriers = Base::kWayOut;  // no block of a cluster sends anything here
  static constexpr int kSharedBytes = kBarriers + STAGES * 16;
  static_assert(kSharedBytes <= 233472 / 2 - 1024, "two blocks");
};

// D[64, 16] (+)= A[64, 16] B[16, 16]^T in f32; a thread of warp w holds, of rows 16 w + lane / 4 and 8 further
// on, the columns lane % 4 * 2 (a[0], a[1]) and 8 further on (a[2], a[3]). B: see `operand_bf16`.
__device__ __forceinline__ void multiply_16(float (&d)[8], const uint32_t (&a)[4], uint32_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %13, 0;\nmov.b64 b, {%12, 0x40000040};\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, b, p, 1, 1, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add));
}

// The sums of the block's segment, which has a step at least. A step's rows are fetched while the two before
// it are multiplied.
template <class S>
__device__ __forceinline__ void multiply(float (&acc)[S::kParts], const Place<S>& place, int warp, int lane) {
  uint32_t rows[3][kStepK / 16][4] = {};
  const uint32_t line = (warp * 16 + lane % 16) * (kStepK * 2);
  const int steps = place.last_step - place.first_step;
  Slot<S::kStages> fetched, started;
  uint32_t previous = 0;
  auto fetch = [&](uint32_t(&to)[kStepK / 16][4]) {
    mbar_wait(place.full + fetched.stage * 8, fetched.parity);
    if (warp < S::kActiveWarps) {
#pragma unroll
      for (int k = 0; k < kStepK / 16; ++k) {
        const int piece = (k * 2 + lane / 16) ^ (lane & 7);  // as the copy engine swizzles them
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[k][0]), "=r"(to[k][1]), "=r"(to[k][2]), "=r"(to[k][3])
                     : "r"(place.stage(fetched.stage) + line + piece * 16)
                     : "memory");
      }
    }
    fetched.next();
  };
  fetch(rows[0]);
  if (steps > 1) fetch(rows[1]);
  for (int step = 0; step < steps;) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (step == steps) break;
      fence_regs(acc);
      wgmma_fence();
      const uint32_t weight = operand_bf16(place.stage(started.stage) + S::kABytes);
#pragma unroll
      for (int k = 0; k < kStepK / 16; ++k) multiply_16(acc, rows[i][k], weight + k * 2, step + k);
      wgmma_commit();
      wgmma_wait<1>();  // the step before is done
      if (step > 0 && lane == 0) mbar_arrive(previous);
      previous = place.empty + started.stage * 8;
      started.next();
      if (step + 2 < steps) fetch(rows[(i + 2) % 3]);
      ++step;
    }
  }
  wgmma_wait<0>();
  fence_regs(acc);
}

}  // namespace gate
}  // namespace causeway
