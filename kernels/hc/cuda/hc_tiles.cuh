// The kernels for many tokens. A block mixes its slab of one tile of 16 tokens after the other; every tile
// stays in shared memory until the factors of its tokens are known, then the block collapses its columns.
// Block t of a group owns token t of each tile: all blocks send it their sums, it makes post and comb. Without
// a norm each block also gets the others' sums for the collapse and makes all factors itself; else the owner
// sends them back. A value travels with a tag in one word, so that no fence and no flag is needed.
// No role in the tile's way may need more registers than it has: there is no cache left for what would be spilled.
#pragma once
#include "hc_columns.cuh"
#include "hc_mixers.cuh"

namespace causeway {
namespace hc {

// A serving warp: post and the logits of comb of this block's token, of every third tile. Lane 4 w + c takes
// line w of each fourth slab from c on, then makes what lies at place c of the sums.
template <Mode kMode>
__device__ __forceinline__ void serve_others(const Arguments& args, uint32_t full, const Share& share,
                                             int who) {
  using L = Layout<kMode, false>;
  const uint32_t served = full + L::kServed;
  const int lane = thread_again() % 32, line = lane / 4, place = lane % 4;
  const bool lasts = line >= kLasts / 2;  // words of one value
  int mix = lasts ? 7 + (line - kLasts / 2) * 8 + place * 2 : line * 4 + 4 + place;
  if (place == 3 || mix >= kMixes || (lasts && place == 1)) mix = kSquares;  // none
  const Affine affine = load_affine<kMode>(args, mix);
  for (int i = who; i < share.tiles; i += kServers) {
    // The block has collapsed the tile: mostly all words are there.
    mbar_wait(full + L::kCollapsed + i % kServeLag * 8, i / kServeLag & 1);
    const Words words = words_of(args, share, i);
    const uint64_t* from = words.others + (share.slab * args.slabs + place) * kOthers + line * 2;
    uint32_t found[kMostSlabs / 4][4];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int k = 0; k < kMostSlabs / 4; ++k) {
        found[k][0] = found[k][1] = found[k][2] = 0;
        if (place + 4 * k < args.slabs) {
          load_line(found[k], from + 4 * k * kOthers);
          all = all && found[k][3] == words.tag && (!lasts || found[k][1] == words.tag);
        }
      }
    } while (!__all_sync(~0u, all));
    if (lane == 0) mbar_arrive(served + i % kServeLag * 8);
    float sum[3];  // in the order of add_slabs
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      const auto value = [&](int k) { return __uint_as_float(found[k][n]); };
      sum[n] = ((value(0) + value(4)) + (value(2) + value(6))) + ((value(1) + value(5)) + value(3));
      sum[n] += __shfl_xor_sync(~0u, sum[n], 2);
      sum[n] += __shfl_xor_sync(~0u, sum[n], 1);
    }
    const float squares = __shfl_sync(~0u, sum[2], 28);
    const float logit = logit_of(args, place == 0 ? sum[0] : place == 1 ? sum[1] : sum[2], squares, affine);
    const int64_t row = (int64_t)(share.group + i * args.groups) * kTile + share.slab;
    if (row < args.tokens && mix < kMixes) {
      if (mix < 8) args.post[row * 4 + mix - 4] = 2.0f * sigmoid(logit);
      if (mix >= 8) args.comb[row * 16 + mix - 8] = logit;  // for comb_kernel
    }
  }
}

// The same where owners make the factors, too: these go back to all blocks. Lane r takes record r of eight
// slabs at once.
template <Mode kMode, bool kNorm>
__device__ __forceinline__ void serve_factors(const Arguments& args, uint32_t full, const Share& share,
                                              int who) {
  using L = Layout<kMode, kNorm>;
  const uint32_t sent = full + 2 * L::kStages * 8;
  const int lane = thread_again() % 32, record = lane < kMixes ? lane : kSquares;
  const Affine affine = load_affine<kMode>(args, record);
  for (int i = who; i < share.tiles; i += kServers) {
    // The other blocks' sums come when this block's do: asking earlier would only keep L2 busy.
    mbar_wait(sent + i % L::kStages * 8, i / L::kStages & 1);
    const OwnedWords words = owned_words_of(args, share, i);
    const uint64_t* from = words.sums + share.slab * args.slabs * kRecord + record;
    // In the order of add_slabs: slabs that differ in bit 4 of their number first, then in bit 3, ..
    float sums[2][2];  // of slabs that differ in bit 0, by bit 1
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int low = n % 2 * 2 + n / 2;  // bits 2 and 1
      const auto slab_of = [&](int k) { return k / 2 * 8 + low * 2 + k % 2; };
      uint64_t word[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        word[k] = (uint64_t)words.tag << 32;
        if (slab_of(k) < kLeastSlabs || slab_of(k) < args.slabs) {
          word[k] = load_word(from + slab_of(k) * kRecord);
        }
      }
      while (true) {
        bool all = true;
#pragma unroll
        for (int k = 0; k < 8; ++k) all = all && has_tag(word[k], words.tag);
        if (__all_sync(~0u, all)) break;
#pragma unroll
        for (int k = 0; k < 8; ++k) load_again(word[k], from + slab_of(k) * kRecord, words.tag);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float mine =
            (value_of(word[k]) + value_of(word[k + 4])) + (value_of(word[k + 2]) + value_of(word[k + 6]));
        sums[n / 2][k] = n % 2 == 0 ? mine : sums[n / 2][k] + mine;
      }
    }
    const float sum = (sums[0][0] + sums[1][0]) + (sums[0][1] + sums[1][1]);
    const float squares = __shfl_sync(~0u, sum, kSquares);
    const float logit = logit_of(args, sum, squares, affine);
    if (lane < kStreams) {
      store_word(words.factors + share.slab * kStreams + lane, sigmoid(logit) + args.eps, words.tag);
    }
    const int64_t row = (int64_t)(share.group + i * args.groups) * kTile + share.slab;
    if (row < args.tokens) {
      if (lane >= 4 && lane < 8) args.post[row * 4 + lane - 4] = 2.0f * sigmoid(logit);
      if (lane >= 8 && lane < 24) args.comb[row * 16 + lane - 8] = logit;  // for comb_kernel
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
  using L = Layout<kMode, kNorm>;
  constexpr bool kPost = kMode == Mode::kPostPre;
  extern __shared__ __align__(1024) char memory[];
  __shared__ Share share;
  const int thread = threadIdx.x, warp = thread / 32;
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
      mbar_init(made + s * 8, kMixers);
      mbar_init(sent + s * 8, kMixWarps / 2);
      mbar_init(empty + s * 8, kColumnWarps + kPost);
    }
    for (int i = 0; i < kServeLag; ++i) {
      mbar_init(full + L::kCollapsed + i * 8, kColumnWarps);
      mbar_init(full + L::kServed + i * 8, 1);
    }
    mbar_fence_init();
  }
  __syncthreads();
  if (warp < kMixWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers<kNorm>::kMix));
    mix_tiles<kMode, kNorm>(args, maps, memory, full, share);
  } else if (warp < kMixWarps + kColumnWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers<kNorm>::kColumns));
    if constexpr (L::kDirect) {
      direct_tiles<kMode>(args, memory, full, share);
    } else {
      owned_tiles<kMode, kNorm>(args, memory, full, share, warp - kMixWarps, thread % 32);
    }
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers<kNorm>::kOthers));
    if (warp == kMixWarps + kColumnWarps) {
      const bool leads = thread_again() % 32 == 0;
      for (int i = 0; leads && i < share.tiles; ++i) {
        const int stage = i % L::kStages;
        if (i >= L::kStages) mbar_wait(empty + stage * 8, (i / L::kStages - 1) & 1);
        if (L::kDirect && kMode != Mode::kHead && i >= kServeLag && share.slab < kTile) {
          mbar_wait(full + L::kServed + i % kServeLag * 8, (i / kServeLag - 1) & 1);
        }
        if (kPost && i >= kSides) {
          mbar_wait(made + (i - kSides) % L::kStages * 8, (i - kSides) / L::kStages & 1);
        }
        load_tile<kMode>(args, maps, smem_address(memory + stage * kStageBytes),
                         smem_address(memory + L::kSide + i % kSides * kSideBytes), full + stage * 8,
                         (int64_t)(share.group + i * args.groups) * kTile, share.slab);
      }
    } else if (kMode != Mode::kHead && share.slab < kTile) {
      const int who = thread_again() / 32 - kMixWarps - kColumnWarps - 1;
      if constexpr (L::kDirect) {
        serve_others<kMode>(args, full, share, who);
      } else {
        serve_factors<kMode, kNorm>(args, full, share, who);
      }
    }
  }
  __syncwarp();
  __syncthreads();
  // The last block moves the epoch on: the next launch meets no tag of this one.
  asm volatile("griddepcontrol.launch_dependents;");
  if (thread_again() == 0) {
    __threadfence();
    if (atomicInc(args.flags + 1, gridDim.x - 1) == gridDim.x - 1) {
      args.flags[0] = share.epoch + all / (L::kDirect ? kRing : kOwnedRing) + 2;
      __threadfence();
    }
  }
}

}  // namespace hc
}  // namespace causeway
