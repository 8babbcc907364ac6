// The kernel for many tokens. A block mixes its slab of one tile of 16 tokens after the other; every tile
// stays in shared memory until the factors of its tokens are known, then the block collapses its columns.
// Block t of a group owns token t of each tile: all blocks send it their sums, it sends back the factors.
// Both ways a value travels with a tag in one 64-bit word, so that no fence and no flag is needed.
#pragma once
#include "hc_math.cuh"

namespace causeway {
namespace hc {

constexpr int kTile = 16;  // tokens
constexpr int kSums = kRecord * kTile;
constexpr int kMixers = kWarps * 32;
constexpr int kColumnWarps = 4;  // make the streams, collapse; four tokens of a tile each
constexpr int kServers = 3;      // finish the tokens that the block owns, each every third tile
constexpr int kAllThreads = kMixers + (kColumnWarps + 1 + kServers) * 32;
constexpr int kRing = 8;   // tiles whose words are kept; more than there are stages
constexpr int kSides = 2;  // of a and the factors, which are free once the streams are made
constexpr int kStreamBytes = kSlab * 2;
constexpr int kTokenBytes = kStreams * kStreamBytes;
constexpr int kStageBytes = kTile * kTokenBytes;
constexpr int kFactorBytes = (kStreams + 16) * 4;
constexpr int kSideBytes = kTile * (kStreamBytes + kFactorBytes);

template <Mode kMode>
struct Layout {
  static constexpr int kStages = kMode == Mode::kPostPre ? 5 : 6;  // tiles of streams
  static constexpr int kLag = kMode == Mode::kPostPre ? 2 : 0;  // tiles from streams made to collapsed
  static constexpr int kSide = kStages * kStageBytes;
  static constexpr int kPartial = kSide + (kMode == Mode::kPostPre ? kSides * kSideBytes : 0);
  static constexpr int kFull = kPartial + kWarps * kSums * 4;  // per stage: loaded, made, free
  static constexpr int kBytes = kFull + 3 * kStages * 8;
  static_assert(kBytes <= 227 * 1024, "shared memory of one block");
};

__device__ __forceinline__ uint64_t load_word(const uint64_t* p) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(p) : "memory");
  return word;
}
__device__ __forceinline__ void store_word(uint64_t* p, float value, uint32_t tag) {
  uint64_t word = (uint64_t)tag << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(word) : "memory");
}

// Where the words of tile i lie: sums for the owner of each token, [group, slot, token, slab, record];
// factors behind all of them, [group, slot, token, stream].
struct Words {
  uint64_t *sums, *factors;
  uint32_t tag;
};
__device__ __forceinline__ Words words_of(const Arguments& args, int group, int i, uint32_t epoch) {
  uint64_t* ring = reinterpret_cast<uint64_t*>(args.ring);
  int slot = group * kRing + i % kRing;
  return {ring + (int64_t)slot * args.slabs * kSums,
          ring + (int64_t)args.groups * kRing * args.slabs * kSums + slot * kTile * kStreams,
          epoch + i / kRing + 1};
}

// One warp asks for a tile. Rows beyond the last token keep what shared memory held: nothing reads
// their results.
template <Mode kMode>
__device__ __forceinline__ void load_tile(const Arguments& args, uint32_t stage, uint32_t side,
                                          uint32_t full, int64_t first, int slab, int lane) {
  int64_t left = args.tokens - first;
  int live = left < kTile ? (int)left : kTile;
  constexpr bool kPost = kMode == Mode::kPostPre;
  if (lane == 0) {
    expect_bytes(full, live * (kTokenBytes + (kPost ? kStreamBytes + kFactorBytes : 0)));
  }
  __syncwarp();
  for (int i = lane; i < live * kStreams; i += 32) {
    int token = i / kStreams, stream = i % kStreams;
    bulk_copy(stage + token * kTokenBytes + stream * kStreamBytes,
              args.x + (first + token) * args.x_token + stream * args.x_stream + slab * kSlab,
              kStreamBytes, full);
  }
  if constexpr (kPost) {
    if (lane < live) {
      bulk_copy(side + lane * kStreamBytes, args.a + (first + lane) * args.a_token + slab * kSlab,
                kStreamBytes, full);
    } else if (lane == 30) {
      bulk_copy(side + kTile * kStreamBytes, args.post_in + first * 4, live * 16, full);
    } else if (lane == 31) {
      bulk_copy(side + kTile * (kStreamBytes + 16), args.comb_in + first * 16, live * 64, full);
    }
  }
}

// hc_post on 128 columns of one token of the tile in shared memory, in place.
__device__ __forceinline__ void make_streams(const Arguments& args, char* stage, const char* side,
                                             int64_t first, int slab, int token, int half, int lane) {
  char* mine = stage + token * kTokenBytes + half * 256 + lane * 8;
  const float* factors = reinterpret_cast<const float*>(side + kTile * kStreamBytes);
  uint2 a = *reinterpret_cast<const uint2*>(side + token * kStreamBytes + half * 256 + lane * 8);
  uint2 x[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) x[j] = *reinterpret_cast<const uint2*>(mine + j * kStreamBytes);
  bool live = first + token < args.tokens;
  __nv_bfloat16* to =
      args.streams + ((first + token) * kStreams * args.dim) + slab * kSlab + half * 128 + lane * 4;
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    float post = factors[token * kStreams + k], comb[kStreams];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) comb[j] = factors[kTile * kStreams + token * 16 + j * 4 + k];
    uint32_t near[kStreams] = {x[0].x, x[1].x, x[2].x, x[3].x};
    uint32_t far[kStreams] = {x[0].y, x[1].y, x[2].y, x[3].y};
    uint2 mixed = {mix_pair(post, comb, a.x, near), mix_pair(post, comb, a.y, far)};
    *reinterpret_cast<uint2*>(mine + k * kStreamBytes) = mixed;
    if (live) *reinterpret_cast<uint2*>(to + (int64_t)k * args.dim) = mixed;
  }
}

// Mixing warps: the sums of each tile over this block's columns, to the tokens' owners.
template <Mode kMode>
__device__ __forceinline__ void mix_tiles(const Arguments& args, char* memory, uint32_t ready, int group,
                                          int slab, int tiles, uint32_t epoch) {
  using L = Layout<kMode>;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  float* partial = reinterpret_cast<float*>(memory + L::kPartial);
  Step weight[kSteps];
  {
    RawWeight raw;
    load_raw<kMode>(raw, args, slab, warp, lane);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) split_step(weight[step], raw, step);
  }
  // Neighbouring tokens read the two halves of their columns in opposite order: no bank twice.
  const bool odd = lane / 4 % 2;
  const int from = lane / 4 * kTokenBytes + warp / 4 * kStreamBytes + warp % 4 * 128 + lane % 4 * 16;
  const int token = thread / kRecord, record = thread % kRecord;
  for (int i = 0; i < tiles; ++i) {
    const int stage = i % L::kStages;
    mbar_wait(ready + stage * 8, i / L::kStages & 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const char* at = memory + stage * kStageBytes + half * 8 * kTokenBytes + from;
      uint4 near = *reinterpret_cast<const uint4*>(at + (odd ? 64 : 0));
      uint4 far = *reinterpret_cast<const uint4*>(at + (odd ? 0 : 64));
      Sums sums = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t* mine = step < 2 ? &near.x : &far.x;
        const uint32_t* other = step < 2 ? &far.x : &near.x;
        const int word = step % 2 * 2;
        mix_step<kMode>(sums, weight[step], odd ? other[word] : mine[word],
                        odd ? other[word + 1] : mine[word + 1]);
      }
      store_sums(sums, partial + warp * kSums + half * 8 * kRecord, lane);
    }
    named_barrier(1, kMixers);
    if (thread < kSums) {
      float sum = partial[thread];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += partial[w * kSums + thread];
      const Words words = words_of(args, group, i, epoch);
      store_word(words.sums + (token * args.slabs + slab) * kRecord + record, sum, words.tag);
    }
    named_barrier(1, kMixers);
  }
}

// Warps that make the streams of a tile (hc_post_pre) and collapse one whose factors have come.
template <Mode kMode>
__device__ __forceinline__ void column_tiles(const Arguments& args, char* memory, uint32_t full, int group,
                                             int slab, int tiles, uint32_t epoch, int warp, int lane) {
  using L = Layout<kMode>;
  const uint32_t made = full + L::kStages * 8, empty = made + L::kStages * 8;
  auto first_token = [&](int i) { return (int64_t)(group + i * args.groups) * kTile; };
  auto factors_of = [&](int i) {  // 16 lanes: four tokens' factors
    return words_of(args, group, i, epoch).factors + warp * 16 + lane % 16;
  };
  for (int i = 0; i < tiles + L::kLag; ++i) {
    if constexpr (kMode == Mode::kPostPre) {
      if (i < tiles) {
        const int stage = i % L::kStages;
        mbar_wait(full + stage * 8, i / L::kStages & 1);
#pragma unroll 1
        for (int n = 0; n < 8; ++n) {
          make_streams(args, memory + stage * kStageBytes, memory + L::kSide + i % kSides * kSideBytes,
                       first_token(i), slab, warp * 4 + n / 2, n % 2, lane);
        }
        fence_async_proxy();  // the copy engine writes here next
        __syncwarp();
        if (lane == 0) mbar_arrive(made + stage * 8);
      }
    }
    const int j = i - L::kLag;
    if (j < 0) continue;
    const int stage = j % L::kStages;
    const uint64_t* from = factors_of(j);
    const uint32_t tag = epoch + j / kRing + 1;
    uint64_t word;
    do {
      word = load_word(from);
    } while (!__all_sync(~0u, (uint32_t)(word >> 32) == tag));
    const float mine = __uint_as_float((uint32_t)word);
    // The factors depend on the tile's data, so it has landed; the wait makes the copies visible.
    mbar_wait(full + stage * 8, j / L::kStages & 1);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      float4 pre;
#pragma unroll
      for (int s = 0; s < kStreams; ++s) (&pre.x)[s] = __shfl_sync(~0u, mine, t * 4 + s);
      const int token = warp * 4 + t;
      const char* at = memory + stage * kStageBytes + token * kTokenBytes + lane * 16;
      uint4 x[kStreams];
#pragma unroll
      for (int s = 0; s < kStreams; ++s) x[s] = *reinterpret_cast<const uint4*>(at + s * kStreamBytes);
      if (first_token(j) + token < args.tokens) {
        *reinterpret_cast<uint4*>(args.out + (first_token(j) + token) * args.dim + slab * kSlab +
                                  lane * 8) = collapse_columns(pre, x);
      }
    }
    __syncwarp();
    if (lane == 0) mbar_arrive(empty + stage * 8);
  }
}

// A serving warp: finishes this block's token of every third tile.
template <Mode kMode>
__device__ __forceinline__ void serve_tiles(const Arguments& args, int group, int slab, int tiles,
                                            uint32_t epoch, int who, int lane) {
  const int record = lane < kRecord ? lane : kRecord - 1;
  const Affine affine = load_affine<kMode>(args, record);
  for (int i = who; i < tiles; i += kServers) {
    const Words words = words_of(args, group, i, epoch);
    const uint64_t* from = words.sums + slab * args.slabs * kRecord + record;
    float sum = 0.0f;
    for (int s = 0; s < args.slabs; s += 4) {  // slabs: a multiple of four
      uint64_t word[4];
      bool all;
      do {
        all = true;
#pragma unroll
        for (int k = 0; k < 4; ++k) word[k] = load_word(from + (s + k) * kRecord);
#pragma unroll
        for (int k = 0; k < 4; ++k) all = all && (uint32_t)(word[k] >> 32) == words.tag;
      } while (!__all_sync(~0u, all));
#pragma unroll
      for (int k = 0; k < 4; ++k) sum += __uint_as_float((uint32_t)word[k]);
    }
    const float squares = __shfl_sync(~0u, sum, 4);
    const float logit = logit_of(args, sum, squares, affine);
    if (lane < kStreams) {
      store_word(words.factors + slab * kStreams + lane, sigmoid(logit) + args.eps, words.tag);
    }
    if constexpr (kMode != Mode::kHead) {
      const int64_t row = (int64_t)(group + i * args.groups) * kTile + slab;
      float c[16];
#pragma unroll
      for (int n = 0; n < 16; ++n) c[n] = __shfl_sync(~0u, logit, 9 + n);
      if (row >= args.tokens) continue;
      if (lane > 4 && lane < 9) args.post[row * 4 + lane - 5] = 2.0f * sigmoid(logit);
      finish_comb(c, args.iters, args.eps);
      if (lane == 0) store_comb(args.comb + row * 16, c);
    }
  }
}

template <Mode kMode>
__global__ void __launch_bounds__(kAllThreads, 1) hc_kernel(const __grid_constant__ Arguments args) {
  using L = Layout<kMode>;
  extern __shared__ __align__(128) char memory[];
  const int group = blockIdx.x / args.slabs, slab = blockIdx.x % args.slabs;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int all = (int)((args.tokens + kTile - 1) / kTile);
  const int tiles = (all - group + args.groups - 1) / args.groups;
  const uint32_t full = smem_address(memory + L::kFull);
  const uint32_t made = full + L::kStages * 8, empty = made + L::kStages * 8;
  const uint32_t epoch = *reinterpret_cast<volatile unsigned*>(args.flags);
  if (thread == 0) {
    for (int s = 0; s < L::kStages; ++s) {
      mbar_init(full + s * 8, 1);
      mbar_init(made + s * 8, kColumnWarps);
      mbar_init(empty + s * 8, kColumnWarps);
    }
    mbar_fence_init();
  }
  __syncthreads();
  if (warp < kWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 96;");
    mix_tiles<kMode>(args, memory, kMode == Mode::kPostPre ? made : full, group, slab, tiles, epoch);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");
    if (warp < kWarps + kColumnWarps) {
      column_tiles<kMode>(args, memory, full, group, slab, tiles, epoch, warp - kWarps, lane);
    } else if (warp == kWarps + kColumnWarps) {
      for (int i = 0; i < tiles; ++i) {
        const int stage = i % L::kStages;
        if (i >= L::kStages) mbar_wait(empty + stage * 8, (i / L::kStages - 1) & 1);
        if (kMode == Mode::kPostPre && i >= kSides) {
          mbar_wait(made + (i - kSides) % L::kStages * 8, (i - kSides) / L::kStages & 1);
        }
        load_tile<kMode>(args, smem_address(memory + stage * kStageBytes),
                         smem_address(memory + L::kSide + i % kSides * kSideBytes), full + stage * 8,
                         (int64_t)(group + i * args.groups) * kTile, slab, lane);
      }
    } else if (slab < kTile) {
      serve_tiles<kMode>(args, group, slab, tiles, epoch, warp - kWarps - kColumnWarps - 1, lane);
    }
  }
  __syncthreads();
  // The last block moves the epoch on: the next launch meets no tag of this one.
  if (thread == 0) {
    __threadfence();
    if (atomicInc(args.flags + 1, gridDim.x - 1) == gridDim.x - 1) {
      args.flags[0] = epoch + all / kRing + 2;
      __threadfence();
    }
  }
}

}  // namespace hc
}  // namespace causeway
