// The kernels for few tokens: a warp per 128 columns of a slab, then a block per token and 1024 columns.
// The sums are those of hc_tiles.cuh in the same order.
#pragma once
#include "hc_math.cuh"

namespace causeway {
namespace hc {

constexpr int kColumns = 1024;  // of a block that finishes a token
constexpr int kFinishThreads = kColumns / 8 + 32;  // the last warp makes comb meanwhile
constexpr int kMaxSlabs = 28;

// Sums of one warp's columns for 16 tokens, to ring [tile, slab, warp, kTile, kRecord].
template <Mode kMode>
__global__ void __launch_bounds__(32) few_mix_kernel(const Arguments args) {
  int slab = blockIdx.x / kWarps, warp = blockIdx.x % kWarps, lane = threadIdx.x;
  int64_t first = (int64_t)blockIdx.y * kTile;
  Weight weight;
  load_weight<kMode>(weight, args, slab, warp, lane);
  int stream = warp / 2, column = slab * kSlab + (warp % 2) * 128 + lane % 4 * 2;
  float post[2], comb[2][kStreams];
  if constexpr (kMode == Mode::kPostPre) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t token = first + half * 8 + lane / 4;
      bool live = token < args.tokens;
      post[half] = live ? args.post_in[token * 4 + stream] : 0.0f;
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        comb[half][j] = live ? args.comb_in[token * 16 + j * 4 + stream] : 0.0f;
      }
    }
  }
  auto pair = [&](int half, int at) -> uint32_t {
    int64_t token = first + half * 8 + lane / 4;
    if (token >= args.tokens) return 0u;
    const __nv_bfloat16* x = args.x + token * args.x_token + at;
    if constexpr (kMode != Mode::kPostPre) {
      return *reinterpret_cast<const uint32_t*>(x + stream * args.x_stream);
    } else {
      uint32_t old[kStreams];
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        old[j] = *reinterpret_cast<const uint32_t*>(x + j * args.x_stream);
      }
      uint32_t a = *reinterpret_cast<const uint32_t*>(args.a + token * args.a_token + at);
      uint32_t mixed = mix_pair(post[half], comb[half], a, old);
      *reinterpret_cast<uint32_t*>(args.streams + (token * kStreams + stream) * args.dim + at) = mixed;
      return mixed;
    }
  };
  float* to = args.ring + (((int64_t)blockIdx.y * args.slabs + slab) * kWarps + warp) * kSums;
  mix<kMode>(weight, to, lane, [&](int half, int step, uint32_t& b0, uint32_t& b1) {
    b0 = pair(half, column + step * 16);
    b1 = pair(half, column + step * 16 + 8);
  });
}

template <Mode kMode>
__global__ void __launch_bounds__(kFinishThreads) few_finish_kernel(const Arguments args) {
  __shared__ float slab_sums[kMaxSlabs][32];
  __shared__ float logits[16];
  __shared__ float4 pre;
  int64_t token = blockIdx.x;
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int column = blockIdx.y * kColumns + thread * 8;
  bool mine = thread < kColumns / 8;
  const __nv_bfloat16* streams = kMode == Mode::kPostPre ? args.streams : args.x;
  int64_t token_step = kMode == Mode::kPostPre ? (int64_t)kStreams * args.dim : args.x_token;
  int64_t stream_step = kMode == Mode::kPostPre ? args.dim : args.x_stream;
  uint4 x[kStreams] = {};
  if (mine) {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      x[s] = *reinterpret_cast<const uint4*>(streams + token * token_step + s * stream_step + column);
    }
  }
  const float* sums = args.ring + token / kTile * args.slabs * kWarps * kSums + token % kTile * kRecord;
  if (lane < 25) {
    for (int slab = warp; slab < args.slabs; slab += kFinishThreads / 32) {
      const float* from = sums + slab * kWarps * kSums + lane;
      float part[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) part[w] = from[w * kSums];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) part[0] += part[w];
      slab_sums[slab][lane] = part[0];
    }
  }
  __syncthreads();
  if (warp == 0) {
    float sum = 0.0f;
    for (int slab = 0; slab < args.slabs; ++slab) sum += slab_sums[slab][lane];
    float squares = __shfl_sync(~0u, sum, 4);
    int row = lane < 4 ? lane : lane - 1;
    if (lane < 4) {
      (&pre.x)[lane] = sigmoid(logit_of(args, sum, squares, row)) + args.eps;
    } else if (kMode != Mode::kHead && blockIdx.y == 0 && lane > 4 && lane < 25) {
      float logit = logit_of(args, sum, squares, row);
      if (row < 8) {
        args.post[token * 4 + row - 4] = 2.0f * sigmoid(logit);
      } else {
        logits[row - 8] = logit;
      }
    }
  }
  __syncthreads();
  if (mine) {
    *reinterpret_cast<uint4*>(args.out + token * args.dim + column) = collapse_columns(pre, x);
  } else if (kMode != Mode::kHead && blockIdx.y == 0 && lane == 0) {
    finish_comb(logits, args.comb + token * 16, args.iters, args.eps);
  }
}

}  // namespace hc
}  // namespace causeway
