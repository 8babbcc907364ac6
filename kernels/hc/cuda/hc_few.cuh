// The kernels for few tokens: a warp per 64 columns of a slab, then a block per token and 1024 columns.
// The sums are those of hc_tiles.cuh in the same order.
#pragma once
#include "hc_math.cuh"

namespace causeway {
namespace hc {

constexpr int kColumns = 1024;         // of a block that finishes a token
constexpr int kFinishThreads = 16 * 32;
constexpr int kMaxSlabs = 28;

// Sums of one warp's columns for 16 tokens, to ring [tile, slab, warp, kTile, kRecord].
template <Mode kMode>
__global__ void __launch_bounds__(32) few_mix_kernel(const Arguments args) {
  asm volatile("griddepcontrol.launch_dependents;");
  int slab = blockIdx.x / kWarps, warp = blockIdx.x % kWarps, lane = threadIdx.x;
  int64_t first = (int64_t)blockIdx.y * kTile;
  int column = slab * kSlab + (warp % 4) * 64 + lane % 4 * 2;
  uint32_t x[2][kSteps][2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int64_t token = first + half * 8 + lane / 4;
    if (token < args.tokens) {
      const __nv_bfloat16* from = args.x + token * args.x_token + warp / 4 * args.x_stream + column;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        x[half][step][0] = *reinterpret_cast<const uint32_t*>(from + step * 16);
        x[half][step][1] = *reinterpret_cast<const uint32_t*>(from + step * 16 + 8);
      }
    }
  }
  Weight weight;
  load_weight<kMode>(weight, args, slab, warp, lane);
  float* to = args.ring + (((int64_t)blockIdx.y * args.slabs + slab) * kWarps + warp) * kSums;
  mix<kMode>(weight, to, lane, [&](int half, int step, uint32_t& b0, uint32_t& b1) {
    b0 = x[half][step][0];
    b1 = x[half][step][1];
  });
}

// The factors of a token, and 1024 columns of its collapsed row.
template <Mode kMode>
__global__ void __launch_bounds__(kFinishThreads) few_finish_kernel(const Arguments args) {
  __shared__ float slab_sums[kMaxSlabs][32];
  __shared__ float logits[16];
  __shared__ float4 pre;
  int64_t token = blockIdx.x;
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int column = blockIdx.y * kColumns + thread * 8;
  bool collapses = thread < kColumns / 8;
  uint4 x[kStreams] = {};
  if (collapses) {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      x[s] = *reinterpret_cast<const uint4*>(args.x + token * args.x_token + s * args.x_stream + column);
    }
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const float* sums = args.ring + token / kTile * args.slabs * kWarps * kSums + token % kTile * kRecord;
  if (lane < 25) {
    for (int slab = warp; slab < args.slabs; slab += kFinishThreads / 32) {
      const float* from = sums + slab * kWarps * kSums + lane;
      float part[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) part[w] = __ldcg(from + w * kSums);
#pragma unroll
      for (int w = 1; w < kWarps; ++w) part[0] += part[w];
      slab_sums[slab][lane] = part[0];
    }
  }
  __syncthreads();
  // Warp 0 makes pre; the last warp, in one block of a token, what hc_post needs.
  bool rest = kMode != Mode::kHead && blockIdx.y == 0 && warp == kFinishThreads / 32 - 1;
  if (warp == 0 || rest) {
    float sum = 0.0f;
#pragma unroll 4
    for (int slab = 0; slab < args.slabs; ++slab) sum += slab_sums[slab][lane < 25 ? lane : 0];
    float squares = __shfl_sync(~0u, sum, 4);
    if (warp == 0 && lane < 4) {
      (&pre.x)[lane] = sigmoid(logit_of(args, sum, squares, lane)) + args.eps;
    } else if (rest && lane > 4 && lane < 25) {
      float logit = logit_of(args, sum, squares, lane - 1);
      if (lane < 9) {
        args.post[token * 4 + lane - 5] = 2.0f * sigmoid(logit);
      } else {
        logits[lane - 9] = logit;
      }
    }
  }
  __syncthreads();
  if (collapses) {
    *reinterpret_cast<uint4*>(args.out + token * args.dim + column) = collapse_columns(pre, x);
  } else if (rest) {
    finish_comb(logits, args.comb + token * 16, lane < 4, args.iters, args.eps);
  }
}

}  // namespace hc
}  // namespace causeway
