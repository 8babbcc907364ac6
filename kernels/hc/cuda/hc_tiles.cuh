// The kernels for many tokens. A block mixes its slab of one tile of 16 tokens after the other; every tile
// stays in shared memory until the factors of its tokens are known, then the block collapses its columns.
// Block t of a group owns token t of each tile: all blocks send it their sums, it sends back the factors.
// Both ways a value travels with a tag in one 64-bit word, so that no fence and no flag is needed.
// No role may need more registers than it has: there is no cache left for what would be spilled.
#pragma once
#include "hc_tile.cuh"

namespace causeway {
namespace hc {

// hc_post on 128 columns of one token of the tile in shared memory, in place.
__device__ __forceinline__ void make_streams(char* stage, const char* side, int token, int half,
                                             int lane) {
  const int piece = half * 16 + lane / 2, within = lane % 2 * 8;
  const float* factors = reinterpret_cast<const float*>(side + kTile * kStreamBytes);
  uint2 a = *reinterpret_cast<const uint2*>(side + token * kStreamBytes + half * 256 + lane * 8);
  uint2 x[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    x[j] = *reinterpret_cast<const uint2*>(stage + piece_at(token, j, piece) + within);
  }
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    float post = factors[token * kStreams + k], comb[kStreams];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) comb[j] = factors[kTile * kStreams + token * 16 + j * 4 + k];
    uint32_t near[kStreams] = {x[0].x, x[1].x, x[2].x, x[3].x};
    uint32_t far[kStreams] = {x[0].y, x[1].y, x[2].y, x[3].y};
    *reinterpret_cast<uint2*>(stage + piece_at(token, k, piece) + within) =
        make_uint2(mix_pair(post, comb, a.x, near), mix_pair(post, comb, a.y, far));
  }
}

// Mixing warps: the sums of each tile over this block's columns, to the tokens' owners.
template <Mode kMode>
__device__ __forceinline__ void mix_tiles(const Arguments& args, char* memory, uint32_t ready,
                                          const Share share) {
  using L = Layout<kMode>;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  float* partial = reinterpret_cast<float*>(memory + L::kPartial);
  Step weight[2][kSteps];
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    RawWeight raw;
    load_raw<kMode>(raw, args, share.slab, warp * 2 + unit, lane);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) split_step(weight[unit][step], raw, step);
  }
  // The first half of this lane's columns; the other one lies where bit 2 of the piece is flipped. The
  // second unit is the next box.
  const int from = piece_at(lane / 4, warp / 2, warp % 2 * 16 + lane % 4);
  for (int i = 0; i < share.tiles; ++i) {
    const int stage = i % L::kStages;
    mbar_wait(ready + stage * 8, i / L::kStages & 1);
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const char* at = memory + stage * kStageBytes + half * 8 * kStreams * 128 + unit * kBoxBytes;
        Sums sums = {};
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const uint4 x = *reinterpret_cast<const uint4*>(at + (from ^ side * 64));
          mix_step<kMode>(sums, weight[unit][side * 2], x.x, x.y);
          mix_step<kMode>(sums, weight[unit][side * 2 + 1], x.z, x.w);
        }
        store_sums(add_up(sums), partial + (warp * 2 + unit) * kSums + half * 8 * kRecord, lane);
      }
    }
    named_barrier(1, kMixers);
    const Words words = words_of(args, share, i);
    for (int at = thread; at < kSums; at += kMixers) {
      float sum = partial[at];
#pragma unroll
      for (int unit = 1; unit < kUnits; ++unit) sum += partial[unit * kSums + at];
      const int token = at / kRecord, record = at % kRecord;
      store_word(words.sums + (token * args.slabs + share.slab) * kRecord + record, sum, words.tag);
    }
    named_barrier(1, kMixers);
  }
}

// Warps that make the streams of a tile (hc_post_pre) and collapse one whose factors have come.
template <Mode kMode>
__device__ __forceinline__ void column_tiles(const Arguments& args, const Maps& maps, char* memory,
                                             uint32_t full, const Share share, int warp, int lane) {
  using L = Layout<kMode>;
  const uint32_t made = full + L::kStages * 8, empty = made + L::kStages * 8;
  auto first_token = [&](int i) { return (int64_t)(share.group + i * args.groups) * kTile; };
  for (int i = 0; i < share.tiles + L::kLag; ++i) {
    if constexpr (kMode == Mode::kPostPre) {
      if (i < share.tiles) {
        const int stage = i % L::kStages;
        mbar_wait(full + stage * 8, i / L::kStages & 1);
#pragma unroll 1
        for (int n = 0; n < kPart * 2; ++n) {
          make_streams(memory + stage * kStageBytes, memory + L::kSide + i % kSides * kSideBytes,
                       warp * kPart + n / 2, n % 2, lane);
        }
        fence_async_proxy();  // the copy engine reads this, and writes here next
        __syncwarp();
        if (lane == 0) {
          mbar_arrive(made + stage * 8);
          const uint32_t from = smem_address(memory + stage * kStageBytes) + warp * kPart * kStreams * 128;
#pragma unroll
          for (int box = 0; box < kBoxes; ++box) {
            store_box(&maps.streams, from + box * kBoxBytes, share.slab * kSlab + box * kBoxColumns,
                      (int)first_token(i) + warp * kPart);
          }
          stores_end();
        }
      }
    }
    const int j = i - L::kLag;
    if (j < 0) continue;
    const int stage = j % L::kStages;
    const Words words = words_of(args, share, j);
    uint64_t word;  // 16 lanes: four tokens' factors
    do {
      word = load_word(words.factors + warp * 16 + lane % 16);
    } while (!__all_sync(~0u, (uint32_t)(word >> 32) == words.tag));
    const float mine = __uint_as_float((uint32_t)word);
    // The factors depend on the tile's data, so it has landed; the wait makes the copies visible.
    mbar_wait(full + stage * 8, j / L::kStages & 1);
#pragma unroll 1
    for (int t = 0; t < kPart; ++t) {
      float4 pre;
#pragma unroll
      for (int s = 0; s < kStreams; ++s) (&pre.x)[s] = __shfl_sync(~0u, mine, t * 4 + s);
      const int token = warp * kPart + t;
      const char* at = memory + stage * kStageBytes;
      uint4 x[kStreams];
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        x[s] = *reinterpret_cast<const uint4*>(at + piece_at(token, s, lane));
      }
      if (first_token(j) + token < args.tokens) {
        *reinterpret_cast<uint4*>(args.out + (first_token(j) + token) * args.dim +
                                  share.slab * kSlab + lane * 8) = collapse_columns(pre, x);
      }
    }
    __syncwarp();
    if (lane == 0) {
      if constexpr (kMode == Mode::kPostPre) stores_have_read<L::kLag>();
      mbar_arrive(empty + stage * 8);
    }
  }
  // The block's shared memory is given up when it ends: no store may still read it.
  if constexpr (kMode == Mode::kPostPre) {
    if (lane == 0) stores_have_read<0>();
  }
}

// A serving warp: finishes this block's token of every third tile.
template <Mode kMode>
__device__ __forceinline__ void serve_tiles(const Arguments& args, const Share share, int who,
                                            int lane) {
  const int record = lane < kRecord ? lane : kRecord - 1;
  const Affine affine = load_affine<kMode>(args, record);
  for (int i = who; i < share.tiles; i += kServers) {
    const Words words = words_of(args, share, i);
    const uint64_t* from = words.sums + share.slab * args.slabs * kRecord + record;
    float sum = 0.0f;
#pragma unroll 1
    for (int left = args.slabs; left > 0; left -= kTogether, from += kTogether * kRecord) {
      uint64_t word[kTogether];
      bool all;
      do {
        all = true;
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (k < left) word[k] = load_word(from + k * kRecord);
        }
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          all = all && (k >= left || (uint32_t)(word[k] >> 32) == words.tag);
        }
      } while (!__all_sync(~0u, all));
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k < left) sum += __uint_as_float((uint32_t)word[k]);
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

// comb of every token from the logits that lie there.
__global__ void __launch_bounds__(128) comb_kernel(float* comb, int64_t tokens, int iters, float eps) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int64_t token = (int64_t)blockIdx.x * 128 + threadIdx.x;
  if (token >= tokens) return;
  float4 rows[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) rows[j] = reinterpret_cast<const float4*>(comb + token * 16)[j];
  float c[16];
#pragma unroll
  for (int n = 0; n < 16; ++n) c[n] = (&rows[n / 4].x)[n % 4];
  finish_comb(c, iters, eps);
  store_comb(comb + token * 16, c);
}

template <Mode kMode>
__global__ void __launch_bounds__(kAllThreads, 1) hc_kernel(const __grid_constant__ Arguments args,
                                                               const __grid_constant__ Maps maps) {
  using L = Layout<kMode>;
  extern __shared__ __align__(1024) char memory[];
  __shared__ Share shared;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const uint32_t full = smem_address(memory + L::kFull);
  const uint32_t made = full + L::kStages * 8, empty = made + L::kStages * 8;
  const int all = (int)((args.tokens + kTile - 1) / kTile);
  if (thread == 0) {
    shared.group = blockIdx.x / args.slabs;
    shared.slab = blockIdx.x % args.slabs;
    shared.tiles = (all - shared.group + args.groups - 1) / args.groups;
    shared.epoch = *reinterpret_cast<volatile unsigned*>(args.flags);
    for (int s = 0; s < L::kStages; ++s) {
      mbar_init(full + s * 8, 1);
      mbar_init(made + s * 8, kColumnWarps);
      mbar_init(empty + s * 8, kColumnWarps);
    }
    mbar_fence_init();
  }
  __syncthreads();
  if (warp < kMixWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");
    mix_tiles<kMode>(args, memory, kMode == Mode::kPostPre ? made : full, shared);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
    const Share share = shared;
    if (warp < kMixWarps + kColumnWarps) {
      column_tiles<kMode>(args, maps, memory, full, share, warp - kMixWarps, lane);
    } else if (warp == kMixWarps + kColumnWarps) {
      for (int i = 0; lane == 0 && i < share.tiles; ++i) {
        const int stage = i % L::kStages;
        if (i >= L::kStages) mbar_wait(empty + stage * 8, (i / L::kStages - 1) & 1);
        if (kMode == Mode::kPostPre && i >= kSides) {
          mbar_wait(made + (i - kSides) % L::kStages * 8, (i - kSides) / L::kStages & 1);
        }
        load_tile<kMode>(args, maps, smem_address(memory + stage * kStageBytes),
                         smem_address(memory + L::kSide + i % kSides * kSideBytes), full + stage * 8,
                         (int64_t)(share.group + i * args.groups) * kTile, share.slab);
      }
    } else if (share.slab < kTile) {
      serve_tiles<kMode>(args, share, warp - kMixWarps - kColumnWarps - 1, lane);
    }
  }
  __syncwarp();
  __syncthreads();
  // The last block moves the epoch on: the next launch meets no tag of this one.
  asm volatile("griddepcontrol.launch_dependents;");
  if (thread == 0) {
    __threadfence();
    if (atomicInc(args.flags + 1, gridDim.x - 1) == gridDim.x - 1) {
      args.flags[0] = shared.epoch + all / kRing + 2;
      __threadfence();
    }
  }
}

}  // namespace hc
}  // namespace causeway
