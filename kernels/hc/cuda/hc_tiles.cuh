// The kernels for many tokens. A block mixes its slab of one tile of 16 tokens after the other; every tile
// stays in shared memory until the factors of its tokens are known, then the block collapses its columns.
// Block t of a group owns token t of each tile: all blocks send it their sums, it sends back the factors.
// Both ways a value travels with a tag in one 64-bit word, so that no fence and no flag is needed.
// No role may need more registers than it has: there is no cache left for what would be spilled.
#pragma once
#include "hc_columns.cuh"
#include "hc_mixers.cuh"

namespace causeway {
namespace hc {

// A serving warp: finishes this block's token of every third tile.
template <Mode kMode>
__device__ __forceinline__ void serve_tiles(const Arguments& args, uint32_t full, const Share& share,
                                            int who, int lane) {
  using L = Layout<kMode>;
  const uint32_t sent = full + 2 * L::kStages * 8;
  const int record = lane < (kMode == Mode::kHead ? kStreams : kMixes) ? lane : kSquares;
  const Affine affine = load_affine<kMode>(args, record);
  for (int i = who; i < share.tiles; i += kServers) {
    // The other blocks' sums come when this block's do: asking earlier would only keep L2 busy.
    mbar_wait(sent + i % L::kStages * 8, i / L::kStages & 1);
    const Words words = words_of(args, share, i);
    const uint64_t* from = words.sums + share.slab * args.slabs * kRecord + record;
    float sum = 0.0f;
#pragma unroll 1
    for (int left = args.slabs; left > 0; left -= kTogether, from += kTogether * kRecord) {
      uint64_t word[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) word[k] = load_word(from + k * kRecord);
      while (true) {
        bool all = true;
#pragma unroll
        for (int k = 0; k < kTogether; ++k) all = all && (k >= left || has_tag(word[k], words.tag));
        if (__all_sync(~0u, all)) break;
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          load_again(word[k], from + k * kRecord, words.tag);
        }
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k < left) sum += value_of(word[k]);
      }
    }
    const float squares = __shfl_sync(~0u, sum, kSquares);
    const float logit = logit_of(args, sum, squares, affine);
    if (lane < kStreams) {
      store_word(words.factors + share.slab * kStreams + lane, sigmoid(logit) + args.eps, words.tag);
    }
    if constexpr (kMode != Mode::kHead) {
      const int64_t row = (int64_t)(share.group + i * args.groups) * kTile + share.slab;
      if (row < args.tokens) {
        if (lane >= 4 && lane < 8) args.post[row * 4 + lane - 4] = 2.0f * sigmoid(logit);
        if (lane >= 8 && lane < 24) args.comb[row * 16 + lane - 8] = logit;  // for comb_kernel
      }
    }
  }
}

// comb of every token from the logits that lie there; in further lines of blocks, where somebody wants them, the
// scales of its FP8 row by columns, four to a thread.
__global__ void __launch_bounds__(128) comb_kernel(const __grid_constant__ Arguments args) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int64_t token = (int64_t)blockIdx.x * 128 + threadIdx.x;
  if (token >= args.tokens) return;
  if (blockIdx.y > 0) {
    const int block = (blockIdx.y - 1) * 4;
    const uint32_t word = *reinterpret_cast<const uint32_t*>(args.code_scale + token * args.code_scale_row + block);
#pragma unroll
    for (int i = 0; i < 4; ++i) args.code_columns.write(token, block + i, word >> (8 * i) & 255);
    return;
  }
  float* comb = args.comb;
  float4 rows[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) rows[j] = reinterpret_cast<const float4*>(comb + token * 16)[j];
  float c[16];
#pragma unroll
  for (int n = 0; n < 16; ++n) c[n] = (&rows[n / 4].x)[n % 4];
  finish_comb(c, args.iters, args.eps);
  store_comb(comb + token * 16, c);
}

template <Mode kMode, bool kNorm>
__global__ void __launch_bounds__(kAllThreads, 1) hc_kernel(const __grid_constant__ Arguments args,
                                                               const __grid_constant__ Maps maps) {
  using L = Layout<kMode>;
  constexpr bool kPost = kMode == Mode::kPostPre;
  extern __shared__ __align__(1024) char memory[];
  __shared__ Share share;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const uint32_t full = smem_address(memory + L::kFull);
  const uint32_t made = full + L::kStages * 8, sent = made + L::kStages * 8, empty = sent + L::kStages * 8;
  const int all = (int)((args.tokens + kTile - 1) / kTile);
  if (thread == 0) {
    share.group = blockIdx.x / args.slabs;
    share.slab = blockIdx.x % args.slabs;
    share.tiles = (all - share.group + args.groups - 1) / args.groups;
    share.epoch = *reinterpret_cast<volatile unsigned*>(args.flags);
    for (int s = 0; s < L::kStages; ++s) {
      mbar_init(full + s * 8, 1);
      mbar_init(made + s * 8, kMixWarps);
      mbar_init(sent + s * 8, kMixWarps / 2);
      mbar_init(empty + s * 8, kColumnWarps + kPost);
    }
    mbar_fence_init();
  }
  __syncthreads();
  if (warp < kMixWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers<kNorm>::kMix));
    mix_tiles<kMode>(args, maps, memory, full, share);
  } else if (warp < kMixWarps + kColumnWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers<kNorm>::kColumns));
    column_tiles<kMode, kNorm>(args, memory, full, share, warp - kMixWarps, lane);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers<kNorm>::kOthers));
    if (warp == kMixWarps + kColumnWarps) {
      for (int i = 0; lane == 0 && i < share.tiles; ++i) {
        const int stage = i % L::kStages;
        if (i >= L::kStages) mbar_wait(empty + stage * 8, (i / L::kStages - 1) & 1);
        if (kPost && i >= kSides) {
          mbar_wait(made + (i - kSides) % L::kStages * 8, (i - kSides) / L::kStages & 1);
        }
        load_tile<kMode>(args, maps, smem_address(memory + stage * kStageBytes),
                         smem_address(memory + L::kSide + i % kSides * kSideBytes), full + stage * 8,
                         (int64_t)(share.group + i * args.groups) * kTile, share.slab);
      }
    } else if (share.slab < kTile) {
      serve_tiles<kMode>(args, full, share, warp - kMixWarps - kColumnWarps - 1, lane);
    }
  }
  __syncwarp();
  __syncthreads();
  // The last block moves the epoch on: the next launch meets no tag of this one.
  asm volatile("griddepcontrol.launch_dependents;");
  if (thread == 0) {
    __threadfence();
    if (atomicInc(args.flags + 1, gridDim.x - 1) == gridDim.x - 1) {
      args.flags[0] = share.epoch + all / kRing + 2;
      __threadfence();
    }
  }
}

}  // namespace hc
}  // namespace causeway
