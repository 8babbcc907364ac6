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

// A serving warp makes the factors of this block's token of a tile and sends them to all blocks of the group. Lane
// s takes what slab s sent.
template <Mode kMode>
__device__ __forceinline__ void send_factors(const Arguments& args, const Share& share, int i, int lane) {
  const Words words = words_of(args, share, i);
  const Affine affine = load_affine<kMode>(args, lane / 8);
  const bool there = lane < args.slabs;
  const uint64_t* from = words.gates + (share.slab * args.slabs + (there ? lane : 0)) * kGateWords;
  Gates gates;
  gates.load(from);
  while (true) {
    const bool have = gates.have(words.tag);
    if (__all_sync(~0u, have)) break;
    if (!have) gates.load(from);
  }
  const auto value = [&](uint32_t bits) { return there ? __uint_as_float(bits) : 0.0f; };
  const float sums[4] = {value(gates.line[0][0]), value(gates.line[0][1]), value(gates.line[0][2]),
                         value(gates.line[1][0])};
  const float squares = add_lanes(value(gates.line[1][2]));
  const float factor = sigmoid(logit_of(args, add_four<32>(sums, lane), squares, affine)) + args.eps;
  const OwnedWords owned = owned_words_of(args, share, i);
  if (lane % 8 == 0) store_word(owned.factors + share.slab * kStreams + lane / 8, factor, owned.tag);
}

// A serving warp: post and the logits of comb of this block's token, of every third tile; where owners make the
// factors, these first. Lane 4 w + c takes line w of each fourth slab from c on, then makes what lies at place c
// of the sums.
template <Mode kMode, bool kNorm>
__device__ __forceinline__ void serve(const Arguments& args, uint32_t full, const Share& share, int who) {
  using L = Layout<kMode, kNorm>;
  const uint32_t sent = full + 2 * L::kStages * 8, served = full + L::kServed;
  const int lane = thread_again() % 32, line = lane / 4, place = lane % 4;
  const bool lasts = line >= kLasts / 2;  // words of one value
  int mix = lasts ? 7 + (line - kLasts / 2) * 8 + place * 2 : line * 4 + 4 + place;
  if (place == 3 || mix >= kMixes || (lasts && place == 1)) mix = kSquares;  // none
  const Affine affine = load_affine<kMode>(args, mix);
  constexpr int kLate = L::kDirect ? 0 : kServers;
  for (int i = who - kLate; i < share.tiles; i += kServers) {
    if (!L::kDirect && i + kLate < share.tiles) {
      // The other blocks' sums come when this block's do: asking earlier would only keep L2 busy.
      const int next = i + kLate;
      mbar_wait(sent + next % L::kStages * 8, next / L::kStages & 1);
      send_factors<kMode>(args, share, next, lane);
    }
    if (i < 0) continue;
    // The block has collapsed the tile, or this warp has made a later one's factors: mostly all words are there.
    if (L::kDirect) mbar_wait(full + L::kCollapsed + i % kServeLag * 8, i / kServeLag & 1);
    const Words words = words_of(args, share, i);
    const uint64_t* from = words.others + (share.slab * args.slabs + place) * kOthers + line * 2;
    // Slabs come in fours. All words are asked for before one is looked at.
    uint32_t found[kMostSlabs / 4][4] = {};
    bool all;
    do {
      all = true;
#pragma unroll
      for (int k = 0; k < kMostSlabs / 4; ++k) {
        if (4 * k < kLeastSlabs || 4 * k < args.slabs) load_line(found[k], from + 4 * k * kOthers);
      }
#pragma unroll
      for (int k = 0; k < kMostSlabs / 4; ++k) {
        const bool there = found[k][3] == words.tag && (!lasts || found[k][1] == words.tag);
        all = all && (there || (4 * k >= kLeastSlabs && 4 * k >= args.slabs));
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
      mbar_init(made + s * 8, kPost ? kMixers : 1);
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
      normed_tiles<kMode>(args, memory, full, share, warp - kMixWarps, thread % 32);
    }
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers<kNorm>::kOthers));
    if (warp == kMixWarps + kColumnWarps) {
      const bool leads = thread_again() % 32 == 0;
      for (int i = 0; leads && i < share.tiles; ++i) {
        const int stage = i % L::kStages;
        if (i >= L::kStages) mbar_wait(empty + stage * 8, (i / L::kStages - 1) & 1);
        if (kMode != Mode::kHead && i >= kServeLag && share.slab < kTile) {
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
      serve<kMode, kNorm>(args, full, share, who);
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
