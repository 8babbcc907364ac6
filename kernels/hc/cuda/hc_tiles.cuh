// The kernel for many tokens. In step i a block mixes tile i, leaves its sums in a ring in global memory and
// collapses tile i - kLag, which still lies in shared memory. Meanwhile serving warps tell the group, wait
// for it and make the factors; the bulk copy engine brings tile i + 2.
#pragma once
#include "hc_math.cuh"

namespace causeway {
namespace hc {

constexpr int kThreads = kWarps * 32;
constexpr int kServers = 4;  // each looks after every fourth tile
constexpr int kAllThreads = kThreads + kServers * 32;
constexpr int kRing = 8;     // tiles whose sums and factors are kept
constexpr int kBatch = 8;    // combs that a serving warp finishes at once
constexpr int kSides = 2;    // of a and the factors, which are free once the streams are made
constexpr int kStreamBytes = kSlab * 2;
constexpr int kTokenBytes = kStreams * kStreamBytes + 16;  // shifts tokens by four banks
constexpr int kFactorBytes = (kStreams + 16) * 4;
constexpr int kSideBytes = kTile * (kStreamBytes + kFactorBytes);

// Named barriers; 0 is __syncthreads. One of kStored for each serving warp, one of kReady for each tile.
constexpr int kMain = 1, kStored = 2, kReady = kStored + kServers;

template <Mode kMode>
struct Layout {
  static constexpr int kStages = kMode == Mode::kPostPre ? 5 : 6;  // tiles of streams
  static constexpr int kLag = kStages - 2;  // steps from a mix to its collapse
  static constexpr int kSide = kStages * kTile * kTokenBytes;
  static constexpr int kPartial = kSide + (kMode == Mode::kPostPre ? kSides * kSideBytes : 0);
  static constexpr int kPre = kPartial + kWarps * kSums * 4;           // [kRing][kTile][4] f32
  static constexpr int kLogits = kPre + kRing * kTile * kStreams * 4;  // [kServers][kBatch][16] f32
  static constexpr int kFull = kLogits + kServers * kBatch * 16 * 4;   // an mbarrier per stage
  static constexpr int kBytes = kFull + kStages * 8;
  static_assert(kBytes <= 227 * 1024, "shared memory of one block");
};

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ void arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// `bytes` (a multiple of 16) global -> shared by the copy engine, counted by `bar`.
__device__ __forceinline__ void bulk_copy(uint32_t smem, const void* global, uint32_t bytes,
                                          uint32_t bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          smem),
      "l"(global), "r"(bytes), "r"(bar)
      : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

// One warp asks for a tile. Rows beyond the last token keep what shared memory held: nothing reads
// their results.
template <Mode kMode>
__device__ __forceinline__ void load_tile(const Arguments& args, char* stage, char* side, uint32_t full,
                                          int64_t first, int slab, int lane) {
  int64_t left = args.tokens - first;
  int live = left < kTile ? (int)left : kTile;
  constexpr bool kPost = kMode == Mode::kPostPre;
  if (lane == 0) {
    expect_bytes(full, live * (kStreams * kStreamBytes + (kPost ? kStreamBytes + kFactorBytes : 0)));
  }
  __syncwarp();
  uint32_t to = smem_address(stage);
  for (int i = lane; i < live * kStreams; i += 32) {
    int token = i / kStreams, stream = i % kStreams;
    bulk_copy(to + token * kTokenBytes + stream * kStreamBytes,
              args.x + (first + token) * args.x_token + stream * args.x_stream + slab * kSlab,
              kStreamBytes, full);
  }
  if constexpr (kPost) {
    to = smem_address(side);
    if (lane < live) {
      bulk_copy(to + lane * kStreamBytes, args.a + (first + lane) * args.a_token + slab * kSlab,
                kStreamBytes, full);
    } else if (lane == 30) {
      bulk_copy(to + kTile * kStreamBytes, args.post_in + first * 4, live * 16, full);
    } else if (lane == 31) {
      bulk_copy(to + kTile * (kStreamBytes + 16), args.comb_in + first * 16, live * 64, full);
    }
  }
}

// hc_post on one token of the tile in shared memory, in place.
__device__ __forceinline__ void make_streams(const Arguments& args, char* stage, const char* side,
                                             int64_t first, int slab, int token, int lane) {
  char* mine = stage + token * kTokenBytes + lane * 16;
  const float* factors =
      reinterpret_cast<const float*>(side + kTile * kStreamBytes);
  uint4 a = *reinterpret_cast<const uint4*>(side + token * kStreamBytes + lane * 16);
  uint4 x[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) x[j] = *reinterpret_cast<const uint4*>(mine + j * kStreamBytes);
  bool live = first + token < args.tokens;
  __nv_bfloat16* to =
      args.streams + ((first + token) * kStreams * args.dim) + slab * kSlab + lane * 8;
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    float post = factors[token * kStreams + k];
    float comb[kStreams];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) comb[j] = factors[kTile * kStreams + token * 16 + j * 4 + k];
    uint4 mixed;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      uint32_t old[kStreams] = {(&x[0].x)[word], (&x[1].x)[word], (&x[2].x)[word], (&x[3].x)[word]};
      (&mixed.x)[word] = mix_pair(post, comb, (&a.x)[word], old);
    }
    *reinterpret_cast<uint4*>(mine + k * kStreamBytes) = mixed;
    if (live) *reinterpret_cast<uint4*>(to + (int64_t)k * args.dim) = mixed;
  }
}

// The collapsed row of one token, this block's columns.
__device__ __forceinline__ void collapse(const Arguments& args, const char* stage, const float* pre,
                                         int64_t first, int slab, int token, int lane) {
  if (first + token >= args.tokens) return;
  const char* from = stage + token * kTokenBytes + lane * 16;
  uint4 x[kStreams];
#pragma unroll
  for (int s = 0; s < kStreams; ++s) x[s] = *reinterpret_cast<const uint4*>(from + s * kStreamBytes);
  float4 factor = *reinterpret_cast<const float4*>(pre + token * kStreams);
  *reinterpret_cast<uint4*>(args.out + (first + token) * args.dim + slab * kSlab + lane * 8) =
      collapse_columns(factor, x);
}

// A serving warp: for every fourth tile it publishes this block's sums, waits for the group's, makes the
// factors of the tile's tokens and, for one of them, all that hc_post needs.
template <Mode kMode>
__device__ __forceinline__ void serve(const Arguments& args, float* pre, float* logits, int group,
                                      int slab, int tiles, int who) {
  int lane = threadIdx.x % 32, token = lane % kTile, half = lane / kTile;
  logits += who * kBatch * 16;
  bool own = kMode != Mode::kHead && slab < kTile;
  auto token_of = [&](int tile) { return (int64_t)(group + tile * args.groups) * kTile + slab; };
  auto finish = [&](int tile) {  // the combs of this warp's tiles up to `tile` since the last batch
    __syncwarp();
    int at = tile / kServers / kBatch * kBatch + lane / 4;  // counts this warp's tiles
    int64_t row = token_of(at * kServers + who);
    bool live = at * kServers + who <= tile && row < args.tokens;
    finish_comb(logits + lane / 4 * 16, args.comb + (live ? row : 0) * 16, live, args.iters, args.eps);
    __syncwarp();
  };
  for (int i = who; i < tiles; i += kServers) {
    named_barrier(kStored + who, kThreads + 32);
    if (lane == 0) {
      unsigned* flag = args.flags + group * kRing + i % kRing;
      unsigned target = (unsigned)args.slabs * (unsigned)(i / kRing + 1);
      __threadfence();
      atomicAdd(flag, 1u);
      while (load_acquire(flag) < target) {
      }
      __threadfence();
    }
    __syncwarp();
    const float* sums = args.ring + (group * kRing + i % kRing) * args.slabs * kSums;
    // Two lanes a token: the sums of pre, and the squares.
    float4 sum = {};
    const float4* from = reinterpret_cast<const float4*>(sums + token * kRecord + half * 4);
#pragma unroll 8
    for (int s = 0; s < args.slabs; ++s) {
      float4 v = __ldcg(from + s * (kSums / 4));
      sum.x += v.x;
      sum.y += v.y;
      sum.z += v.z;
      sum.w += v.w;
    }
    float squares = __shfl_sync(~0u, sum.x, token + kTile);
    if (half == 0) {
      float4 factor;
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        (&factor.x)[j] = sigmoid(logit_of(args, (&sum.x)[j], squares, j)) + args.eps;
      }
      reinterpret_cast<float4*>(pre)[i % kRing * kTile + token] = factor;
    }
    __syncwarp();
    arrive(kReady + i % kRing, kThreads + 32);
    if (!own) continue;
    float mix = 0.0f;
#pragma unroll 8
    for (int s = 0; s < args.slabs; ++s) {
      mix += __ldcg(sums + s * kSums + slab * kRecord + (lane < 25 ? lane : 0));
    }
    squares = __shfl_sync(~0u, mix, 4);
    if (lane > 4 && lane < 25 && token_of(i) < args.tokens) {
      float logit = logit_of(args, mix, squares, lane - 1);
      if (lane < 9) {
        args.post[token_of(i) * 4 + lane - 5] = 2.0f * sigmoid(logit);
      } else {
        logits[i / kServers % kBatch * 16 + lane - 9] = logit;
      }
    }
    if (i / kServers % kBatch == kBatch - 1 || i + kServers >= tiles) finish(i);
  }
}

template <Mode kMode>
__global__ void __launch_bounds__(kAllThreads, 1) hc_kernel(const Arguments args) {
  using L = Layout<kMode>;
  extern __shared__ __align__(16) char memory[];
  float* partial = reinterpret_cast<float*>(memory + L::kPartial);
  float* pre = reinterpret_cast<float*>(memory + L::kPre);
  int group = blockIdx.x / args.slabs, slab = blockIdx.x % args.slabs;
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int tiles = ((int)((args.tokens + kTile - 1) / kTile) - group + args.groups - 1) / args.groups;
  uint32_t full = smem_address(memory + L::kFull);
  if (thread == 0) {
    for (int s = 0; s < L::kStages; ++s) mbar_init(full + s * 8, 1);
    mbar_fence_init();
  }
  __syncthreads();
  if (warp >= kWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
    serve<kMode>(args, pre, reinterpret_cast<float*>(memory + L::kLogits), group, slab, tiles,
                 warp - kWarps);
    __syncthreads();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
    auto first_token = [&](int i) { return (int64_t)(group + i * args.groups) * kTile; };
    auto stage_of = [&](int i) { return memory + (i % L::kStages) * (kTile * kTokenBytes); };
    auto side_of = [&](int i) { return memory + L::kSide + (i % kSides) * kSideBytes; };
    auto load = [&](int i) {
      load_tile<kMode>(args, stage_of(i), side_of(i), full + (i % L::kStages) * 8, first_token(i), slab,
                       lane);
    };
    if (warp == 0) {
      load(0);
      if (tiles > 1) load(1);
    }
    Weight weight;
    load_weight<kMode>(weight, args, slab, warp, lane);
    const int from_column = warp / 4 * kStreamBytes + ((warp % 4) * 64 + lane % 4 * 2) * 2;

    for (int i = 0; i < tiles + L::kLag; ++i) {
      if (i < tiles) {
        mbar_wait(full + (i % L::kStages) * 8, i / L::kStages & 1);
        if constexpr (kMode == Mode::kPostPre) {
          make_streams(args, stage_of(i), side_of(i), first_token(i), slab, warp, lane);
          named_barrier(kMain, kThreads);
        }
        const char* from = stage_of(i) + lane / 4 * kTokenBytes + from_column;
        mix<kMode>(weight, partial + warp * kSums, lane,
                   [&](int half, int step, uint32_t& b0, uint32_t& b1) {
                     const char* at = from + half * 8 * kTokenBytes + step * 32;
                     b0 = *reinterpret_cast<const uint32_t*>(at);
                     b1 = *reinterpret_cast<const uint32_t*>(at + 16);
                   });
        named_barrier(kMain, kThreads);
        if (thread < kSums) {
          float sum = partial[thread];
#pragma unroll
          for (int w = 1; w < kWarps; ++w) sum += partial[w * kSums + thread];
          int slot = (group * kRing + i % kRing) * args.slabs + slab;
          __stcg(args.ring + slot * kSums + thread, sum);
        }
        __syncwarp();
        arrive(kStored + i % kServers, kThreads + 32);
      }
      int j = i - L::kLag;
      if (j >= 0) {
        named_barrier(kReady + j % kRing, kThreads + 32);
        collapse(args, stage_of(j), pre + j % kRing * kTile * kStreams, first_token(j), slab, warp, lane);
        __syncwarp();
      }
      if (i + 1 < tiles) {
        // The next step overwrites the partial sums, the copy engine what was collapsed.
        if constexpr (kMode == Mode::kPostPre) fence_async_proxy();
        named_barrier(kMain, kThreads);
        if (warp == 0 && i + 2 < tiles) load(i + 2);
      }
    }
    __syncthreads();
  }
  if (thread == 0) {
    __threadfence();
    unsigned* finished = args.flags + args.groups * kRing;
    // The last block leaves the flags as the next launch needs them.
    if (atomicInc(finished, gridDim.x - 1) == gridDim.x - 1) {
      for (int i = 0; i < args.groups * kRing; ++i) args.flags[i] = 0;
      __threadfence();
    }
  }
}

}  // namespace hc
}  // namespace causeway
