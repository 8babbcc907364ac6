// The kernel for many tokens. In step i a block mixes tile i and leaves its sums in a ring in global memory,
// fetches the sums of all slabs of tile i - 2, and collapses tile i - 3, which still lies in shared memory.
#pragma once
#include "hc_math.cuh"

namespace causeway {
namespace hc {

constexpr int kThreads = kWarps * 32;
constexpr int kServers = 4;  // warps that talk to the other blocks of the group
constexpr int kAllThreads = kThreads + kServers * 32;
constexpr int kLag = 3;     // steps from a mix to its collapse
constexpr int kStages = 5;  // tiles of streams in shared memory: mixing, kLag waiting, one on its way
constexpr int kSides = 2;   // of a and the factors, which leave once the streams are made
constexpr int kRing = 8;    // more than the steps two blocks of a group can be apart, twice over
constexpr int kBatch = 16;  // combs that a serving warp finishes while as many others come in
constexpr int kStreamBytes = kSlab * 2;
constexpr int kTokenBytes = kStreams * kStreamBytes + 16;  // shifts tokens by four banks
constexpr int kFactorBytes = 80;                           // 4 post, 16 comb
constexpr int kSideBytes = kTile * (kStreamBytes + kFactorBytes);
constexpr int kSharedSums = 8 * kTile;  // floats of a slab that all blocks need: pre and squares

// Named barriers; 0 is __syncthreads. kStored and kReady have one for each serving warp.
constexpr int kMain = 1, kStored = 2, kReady = kStored + kServers;

template <Mode kMode>
struct Layout {
  static constexpr int kSide = kStages * kTile * kTokenBytes;
  static constexpr int kPartial = kSide + (kMode == Mode::kPostPre ? kSides * kSideBytes : 0);
  static constexpr int kPre = kPartial + kWarps * kSums * 4;   // [kTile][4] f32
  static constexpr int kLogits = kPre + kTile * kStreams * 4;  // [2 * kBatch][16] f32
  static constexpr int kFetched = kLogits + 2 * kBatch * 16 * 4;  // [slabs] shared sums, records
  static constexpr int bytes(int slabs) { return kFetched + slabs * (kSharedSums + kRecord) * 4; }
};

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ void arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void copy16(uint32_t smem, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(global) : "memory");
}

template <Mode kMode>
__device__ __forceinline__ void load_tile(const Arguments& args, char* stage, char* side, int64_t first,
                                          int slab) {
  constexpr int kPieces = kStreamBytes / 16;
  uint32_t to = smem_address(stage);
#pragma unroll 2
  for (int k = 0; k < kTile * kStreams * kPieces / kThreads; ++k) {
    int i = k * kThreads + threadIdx.x;
    int token = i / (kStreams * kPieces), stream = i / kPieces % kStreams, piece = i % kPieces;
    bool valid = first + token < args.tokens;
    int64_t row = valid ? first + token : first;
    const __nv_bfloat16* from =
        args.x + row * args.x_token + stream * args.x_stream + slab * kSlab + piece * 8;
    copy16_async(to + token * kTokenBytes + stream * kStreamBytes + piece * 16, from, valid);
  }
  if constexpr (kMode == Mode::kPostPre) {
    to = smem_address(side);
#pragma unroll
    for (int k = 0; k < kTile * kPieces / kThreads; ++k) {
      int i = k * kThreads + threadIdx.x, token = i / kPieces, piece = i % kPieces;
      bool valid = first + token < args.tokens;
      int64_t row = valid ? first + token : first;
      copy16_async(to + token * kStreamBytes + piece * 16,
                   args.a + row * args.a_token + slab * kSlab + piece * 8, valid);
      if (piece < 5) {
        const float* from =
            piece == 0 ? args.post_in + row * 4 : args.comb_in + row * 16 + piece * 4 - 4;
        copy16_async(to + kTile * kStreamBytes + token * kFactorBytes + piece * 16, from, valid);
      }
    }
  }
}

// hc_post on one token of the tile in shared memory, in place.
__device__ __forceinline__ void make_streams(const Arguments& args, char* stage, const char* side,
                                             int64_t first, int slab, int token, int lane) {
  char* mine = stage + token * kTokenBytes + lane * 16;
  const float* factors =
      reinterpret_cast<const float*>(side + kTile * kStreamBytes + token * kFactorBytes);
  uint4 a = *reinterpret_cast<const uint4*>(side + token * kStreamBytes + lane * 16);
  uint4 x[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) x[j] = *reinterpret_cast<const uint4*>(mine + j * kStreamBytes);
  bool live = first + token < args.tokens;
  __nv_bfloat16* to =
      args.streams + ((first + token) * kStreams * args.dim) + slab * kSlab + lane * 8;
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    float post = factors[k];
    float comb[kStreams];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) comb[j] = factors[4 + j * 4 + k];
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

// Combs of the tiles from..to of this group, whose logits lie in shared memory: a lane each.
template <Mode kMode>
__device__ __forceinline__ void finish_batch(const Arguments& args, const float* logits, int group,
                                             int slab, int64_t from, int64_t to) {
  int64_t tile = from + threadIdx.x % 32;
  int64_t token = (group + tile * args.groups) * kTile + slab;
  if (kMode == Mode::kHead || slab >= kTile || tile >= to || token >= args.tokens) return;
  finish_comb(logits + tile % (2 * kBatch) * 16, args.comb + token * 16, args.iters, args.eps);
}

// A serving warp: for every fourth tile it publishes this block's sums, waits for the group's and says
// so; now and then it finishes combs. Fences take longer than a step, hence four warps.
template <Mode kMode>
__device__ __forceinline__ void serve(const Arguments& args, const float* logits, int group, int slab,
                                      int64_t tiles, int who) {
  for (int64_t i = who; i < tiles; i += kServers) {
    named_barrier(kStored + who, kThreads + 32);
    if (threadIdx.x % 32 == 0) {
      unsigned* flag = args.flags + group * kRing + i % kRing;
      unsigned target = (unsigned)args.slabs * (unsigned)(i / kRing + 1);
      __threadfence();
      atomicAdd(flag, 1u);
      while (load_acquire(flag) < target) {
      }
      __threadfence();
    }
    __syncwarp();
    arrive(kReady + who, kThreads + 32);
    int64_t done = i - kLag + 1;  // tiles whose logits are written
    if (done > 0 && done % kBatch == 0) {
      finish_batch<kMode>(args, logits, group, slab, done - kBatch, done);
      __syncwarp();
    }
  }
}

// Combs that `serve` left: their logits are complete once the block has met.
template <Mode kMode>
__device__ __forceinline__ void finish_rest(const Arguments& args, const float* logits, int group,
                                            int slab, int64_t tiles) {
  int64_t done = tiles > kLag ? (tiles - kLag) / kBatch * kBatch : 0;
  for (; done < tiles; done += kBatch) {
    finish_batch<kMode>(args, logits, group, slab, done, tiles < done + kBatch ? tiles : done + kBatch);
  }
}

template <Mode kMode>
__global__ void __launch_bounds__(kAllThreads, 1) hc_kernel(const Arguments args) {
  using L = Layout<kMode>;
  extern __shared__ __align__(16) char memory[];
  float* partial = reinterpret_cast<float*>(memory + L::kPartial);
  float* pre = reinterpret_cast<float*>(memory + L::kPre);
  float* logits = reinterpret_cast<float*>(memory + L::kLogits);
  float* fetched = reinterpret_cast<float*>(memory + L::kFetched);
  float* record = fetched + args.slabs * kSharedSums;
  int group = blockIdx.x / args.slabs, slab = blockIdx.x % args.slabs;
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int64_t all_tiles = (args.tokens + kTile - 1) / kTile;
  int64_t tiles = (all_tiles - group + args.groups - 1) / args.groups;
  if (warp >= kWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    serve<kMode>(args, logits, group, slab, tiles, warp - kWarps);
    __syncthreads();
    if (warp == kWarps) finish_rest<kMode>(args, logits, group, slab, tiles);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    auto first_token = [&](int64_t i) { return (group + i * args.groups) * kTile; };
    auto stage_of = [&](int64_t i) { return memory + (i % kStages) * (kTile * kTokenBytes); };
    auto side_of = [&](int64_t i) { return memory + L::kSide + (i % kSides) * kSideBytes; };
    auto sums_of = [&](int64_t i) {
      return args.ring + ((int64_t)group * kRing + i % kRing) * args.slabs * kSums;
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i < tiles) load_tile<kMode>(args, stage_of(i), side_of(i), first_token(i), slab);
      commit_copies();
      if (i == 0) commit_copies();  // no sums yet
    }
    Weight weight;
    load_weight<kMode>(weight, args, slab, warp, lane);
    const int from_column = warp / 2 * kStreamBytes + ((warp % 2) * 128 + lane % 4 * 2) * 2;

    // Copies are committed in this order: .., streams i, sums i - 3, streams i + 1, (step i) sums i - 2, ..
    for (int64_t i = 0; i < tiles + kLag; ++i) {
      int64_t j = i - kLag;
      if (i < tiles) {
        wait_copies<2>();
        named_barrier(kMain, kThreads);
        if constexpr (kMode == Mode::kPostPre) {
          for (int token = warp; token < kTile; token += kWarps) {
            make_streams(args, stage_of(i), side_of(i), first_token(i), slab, token, lane);
          }
          named_barrier(kMain, kThreads);
        }
        const char* from = stage_of(i) + lane / 4 * kTokenBytes + from_column;
        mix<kMode>(weight, partial + warp * kSums, lane,
                   [&](int half, int step, uint32_t& b0, uint32_t& b1) {
                     const char* at = from + half * 8 * kTokenBytes + step * 32;
                     b0 = *reinterpret_cast<const uint32_t*>(at);
                     b1 = *reinterpret_cast<const uint32_t*>(at + 16);
                   });
      }
      wait_copies<1>();
      named_barrier(kMain, kThreads);
      for (int at = thread; i < tiles && at < kSums; at += kThreads) {
        float sum = partial[at];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) sum += partial[w * kSums + at];
        __stcg(sums_of(i) + slab * kSums + at, sum);
      }
      // The last two warps make the factors of all tokens of tile j; warp 0, all sums of one of them.
      bool own = kMode != Mode::kHead && slab < kTile && thread < 24;
      if (j >= 0 && (own || thread >= kThreads - kTile * kStreams)) {
        int at = thread - (kThreads - kTile * kStreams);
        int token = own ? slab : at / kStreams, row = own ? (thread < 4 ? thread : thread + 1) : at % kStreams;
        const float* from = own ? record + row : fetched + token * 8 + row;
        const float* squares = fetched + token * 8 + 4;
        int step = own ? kRecord : kSharedSums;
        float sum = 0.0f, square = 0.0f;
#pragma unroll 4
        for (int s = 0; s < args.slabs; ++s) {
          sum += from[s * step];
          square += squares[s * kSharedSums];
        }
        int64_t at_token = first_token(j) + token;
        if (!own) {
          pre[at] = sigmoid(logit_of(args, sum, square, row)) + args.eps;
        } else if (thread >= 4 && at_token < args.tokens) {
          float logit = logit_of(args, sum, square, thread);
          if (thread < 8) {
            args.post[at_token * 4 + thread - 4] = 2.0f * sigmoid(logit);
          } else {
            logits[j % (2 * kBatch) * 16 + thread - 8] = logit;
          }
        }
      }
      __syncwarp();
      if (i < tiles) arrive(kStored + i % kServers, kThreads + 32);
      named_barrier(kMain, kThreads);
      if (j >= 0) {
        for (int token = warp; token < kTile; token += kWarps) {
          collapse(args, stage_of(j), pre, first_token(j), slab, token, lane);
        }
      }
      int64_t ready = i - 2;
      if (ready < 0 || ready >= tiles) {
        named_barrier(kMain, kThreads);
      } else {
        named_barrier(kReady + ready % kServers, kThreads + 32);
        const float* sums = sums_of(ready);
        uint32_t to = smem_address(fetched);
        for (int piece = thread; piece < args.slabs * kTile * 2; piece += kThreads) {
          const float* from = sums + piece / 2 * kRecord + piece % 2 * 4;
          copy16(to + piece * 16, from);
        }
        if (kMode != Mode::kHead && slab < kTile && thread < args.slabs * 7) {
          const float* from = sums + thread / 7 * kSums + slab * kRecord + thread % 7 * 4;
          copy16(smem_address(record) + thread * 16, from);
        }
      }
      commit_copies();
      if (i + 2 < tiles) {
        load_tile<kMode>(args, stage_of(i + 2), side_of(i + 2), first_token(i + 2), slab);
      }
      commit_copies();
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
