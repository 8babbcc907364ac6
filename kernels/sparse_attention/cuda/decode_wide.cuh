// Decode of more than 16 heads: a block works on 160 keys of a row for 64 heads.
//
// Five warpgroups have 32 keys each. One warp of each finds the keys; the warpgroups send for the entries one after the
// other, so that copies arrive in that order, and decode their keys as they come. The keys are two parts: 96 and 64.
// The first warpgroup makes the scores and probabilities of the first part while the second is under way, the last
// one those of the second. Warpgroups 0..3 own 128 output columns each, of all keys; the last one adds up, finishes
// what is one number a head. While the first scores are made, the second and the third find the next item.
#pragma once
#include "copy_engine.cuh"
#include "decode_plan.cuh"
#include "decode_read.cuh"
#include "hopper.cuh"
#include "pages.cuh"
#include "products.cuh"
#include "wgmma.cuh"

#include <cuda.h>

namespace causeway {

constexpr int kParts = 2;       // of the keys
constexpr int kFirstTiles = 3;  // of the first part
constexpr int kThreads = kTiles * 128;
constexpr int kQuerySubtile = kHeadTile * 128;
constexpr int kKeySubtile = kChunk * 128;

// Two numbers a head, of a part's scores. They take the place of `entries` that have been sent for by then: of the
// first 64 keys, all of the first part, and of the next 64, of both, which the second part's waits for.
struct PartLines {
  float base[kHeadTile];   // what its probabilities are relative to, base 2
  float total[kHeadTile];  // their sum
};

struct DecodeSmem {
  union {
    alignas(1024) uint8_t q[kHeadTile * kDim * 2];
    struct {  // once all products with the queries are over
      uint8_t first_p[2 * kQuerySubtile];  // probabilities of the first part
      uint8_t second_p[kQuerySubtile];
    };
  };
  uint8_t keys[kChunk * kDim * 2];
  union {
    const uint8_t* entries[kChunk];  // to be copied
    PartLines lines[kParts];
  };
  KeyTable<kChunk> table;
  Item next[2];      // of items in turn; row -1: there is none
  uint64_t queries;  // barrier: they have arrived
};
static_assert(sizeof(DecodeSmem) <= 227 * 1024);

// Box `part` of eight of an item's queries.
__device__ __forceinline__ void copy_queries(DecodeSmem& s, const CUtensorMap* map, const Item& it, int part) {
  uint32_t bar = smem_address(&s.queries), to = smem_address(s.q);
  mbar_expect(bar, kQuerySubtile);
  load_3d(map, to + part * kQuerySubtile, bar, 64 * part, it.tile * kHeadTile, it.row);
}

// Barriers of a block, in the order of their use.
enum Barrier : int {
  kListed = 1,                  // + warpgroup: its keys have been found, and those before have been sent for
  kDecoded = kListed + kTiles,  // + part: its keys are there
  kBase = kDecoded + kParts,    // what the first part's probabilities are relative to; its scores are made
  kScored = kBase + 1,          // the first half of the queries' columns is needed no more
  kReady = kScored + 1,         // + part: its probabilities are there
  kSums = kListed,              // of both parts' probabilities
  kFactors = kReady + kParts,   // of the result
  kTurn = kFactors + 1,         // + warpgroup: its products with a part's values are under way
};
static_assert(kTurn + kTiles - 3 < 16);

// Scores of a part, of 8 kColumns keys.
template <int kPart, int kColumns>
__device__ __forceinline__ void score(DecodeSmem& s, float (&z)[4 * kColumns]) {
  wgmma_fence();
  uint64_t q = desc_k_major(smem_address(s.q));
  uint64_t keys = desc_k_major(smem_address(s.keys) + kPart * kFirstTiles * kTileKeys * 128);
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    uint64_t queries = desc_advance(q, (k / 4) * kQuerySubtile + (k & 3) * 32);
    uint64_t values = desc_advance(keys, (k / 4) * kKeySubtile + (k & 3) * 32);
    if constexpr (kPart == 0) {
      mma_m64n96k16_ss(z, queries, values, k > 0);
    } else {
      mma_m64n64k16_ss(z, queries, values, k > 0);
      if (k == 15) wgmma_commit();
    }
  }
  wgmma_commit();
  if constexpr (kPart > 0) {  // the first part's probabilities wait for that room
    wgmma_wait<1>();
    named_barrier_arrive(kScored, 256);
  }
  wgmma_wait<0>();
  fence_regs(z);
}

// What the second part's probabilities are relative to, where those of the first are relative to `base`: the same. It
// need not be the largest: a sum has room for far more than 2^kSlack.
constexpr float kSlack = 40.0f;
__device__ __forceinline__ float next_base(float base, float top) {
  return top > base + kSlack || base == kNegInf ? top : base;
}

// The probabilities of a part, to shared memory.
template <int kPart, int kColumns>
__device__ __forceinline__ void weigh(DecodeSmem& s, const DecodeArgs& a, float (&z)[4 * kColumns]) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, t = lane & 3;
  int line = 16 * warp + (lane >> 2);
#pragma unroll
  for (int h = 0; h < kColumns / 4; ++h) {
    uint32_t exists = *reinterpret_cast<const uint32_t*>(&s.table.exists[4 * (kPart * kFirstTiles + h)]);
    if (exists == ~0u) continue;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (!(exists >> (8 * (i / 4) + 2 * t + (i & 1)) & 1)) z[16 * h + i] = kNegInf;
    }
  }
  float factor = a.scale * kLog2e, base[2] = {kNegInf, kNegInf};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) base[i] = fmaxf(base[i], fmaxf(z[4 * j + 2 * i], z[4 * j + 2 * i + 1]));
    base[i] = fmaxf(base[i], __shfl_xor_sync(~0u, base[i], 1));
    base[i] = fmaxf(base[i], __shfl_xor_sync(~0u, base[i], 2)) * factor;
  }
  if constexpr (kPart > 0) {
    named_barrier(kBase, 256);
#pragma unroll
    for (int i = 0; i < 2; ++i) base[i] = next_base(s.lines[0].base[line + 8 * i], base[i]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (t == 0) s.lines[kPart].base[line + 8 * i] = base[i];
  }
  if constexpr (kPart == 0) named_barrier_arrive(kBase, 256);
  uint32_t p[2][kColumns];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float shift = base[i] == kNegInf ? 0.0f : base[i];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float* x = z + 4 * j + 2 * i;
      x[0] = exp2_fast(fmaf(x[0], factor, -shift));
      x[1] = exp2_fast(fmaf(x[1], factor, -shift));
      p[i][j] = pack_bf16(x[0], x[1]);
    }
  }
  if constexpr (kPart == 0) named_barrier(kScored, 256);
  uint32_t to = smem_address(kPart == 0 ? s.first_p : s.second_p);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      store_shared(to + j / 8 * kQuerySubtile + swizzled(line + 8 * i, j & 7) + 4 * t, p[i][j]);
    }
  }
  fence_async_proxy();
}

// Their sum, which nobody waits for yet.
template <int kPart, int kColumns>
__device__ __forceinline__ void add_up(DecodeSmem& s, const float (&z)[4 * kColumns]) {
  int lane = threadIdx.x & 31, line = 16 * ((threadIdx.x >> 5) & 3) + (lane >> 2);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) total += z[4 * j + 2 * i] + z[4 * j + 2 * i + 1];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if ((lane & 3) == 0) s.lines[kPart].total[line + 8 * i] = total;
  }
}

// A head's maximum and sum: factor of its result, left where the first part's sum was.
__device__ __forceinline__ void finish_line(DecodeSmem& s, const DecodeArgs& a, const Item& it, int line, float sink) {
  int head = it.tile * kHeadTile + line;
  float base = s.lines[1].base[line], before = s.lines[0].base[line], total = s.lines[0].total[line];
  if (base != before) total *= exp2_fast(before - base);
  total += s.lines[1].total[line];
  if (head >= a.heads) return;
  if (it.chunks == 1) {
    s.lines[0].total[line] = finish(a, it.row, head, base, total, sink, true);
  } else {
    a.stats[(((int64_t)it.row * a.tiles + it.tile) * a.chunks + it.chunk) * a.tile_heads + line] =
        make_float2(base, total);
  }
}

// Warpgroups 1 and 2: item `number` or the next that exists (row -1: none). Where the thread's key of it is.
template <bool kPlain>
__device__ __forceinline__ Place find_next_place(Item& next, const DecodeArgs& a, Walk<kChunk>& walk, int number) {
  int at = threadIdx.x - 128;
  if (at >= kChunk) at = -1;
  Item it = walk.item(a, number);
  int64_t key;
  bool more = walk.find_existing(a, it, at, key);
  if (at == 0) next = more ? it : Item{-1};
  Place place = {-1, 0};
  if (!more || at < 0) return place;
  int in_row = it.chunk * kChunk + at;
  place = locate_key(a, it, in_row, key);
  if constexpr (!kPlain) prefetch_entry(a, in_row, place);
  return place;
}

// kPlain: pages other than fp8 ones at multiples of 16 bytes.
template <bool kPlain>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArgs a, const __grid_constant__ CUtensorMap query_map) {
  extern __shared__ __align__(1024) uint8_t smem[];
  DecodeSmem& s = *reinterpret_cast<DecodeSmem*>(smem);
  if (smem_address(smem) & 1023) __trap();
  int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0), lane = threadIdx.x & 31;
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32 % 4, 0);
  uint32_t keys = smem_address(s.keys), parity = 0;
  bool lists = warp == group % 4;  // not all of them on the same quarter of the processor
  bool finds = a.many && (group == 1 || group == 2);
  int own_key = kTileKeys * group + lane;  // of a thread that lists
  if (threadIdx.x == 0) {
    mbar_init(smem_address(&s.queries), 8);
    for (uint64_t& bar : s.table.listed) mbar_init(smem_address(&bar), 1);
    mbar_fence_init();
    asm volatile("prefetch.tensormap [%0];" ::"l"(&query_map) : "memory");
  }
  Walk<kChunk> walk;
  Item it = walk.item(a, blockIdx.x);
  if (lists) walk.warm(a, it, own_key);
  __syncthreads();
  cudaGridDependencySynchronize();  // launched early: the inputs are there from here on
  cudaTriggerProgrammaticLaunchCompletion();

  // Sends for this warpgroup's keys of an item, after the warpgroup before it. Shared memory is free.
  auto copy = [&] {
    named_barrier(kListed + group, group == 0 ? 128 : 256);
    if (!lists) it = s.next[parity];
    if constexpr (!kPlain) {
      if (it.row >= 0) send_group<kChunk>(s.entries, keys, 4 * group + warp);
    }
    if (group < kTiles - 1) named_barrier_arrive(kListed + group + 1, 256);
    if (group == 1 && warp == 3 && it.row >= 0) {
      if (lane < 8) copy_queries(s, &query_map, it, lane);
      __syncwarp();
    }
  };
  auto send = [&](Place place) {
    if (lists) {
      list_key<kPlain>(s.table, s.entries, a, place, own_key, it.chunk * kChunk + own_key, copy);
    } else {
      copy();
    }
  };
  Place place = {-1, 0};
  if (lists) {
    int64_t key = -1;
    if (!walk.find_existing(a, it, own_key, key)) it.row = -1;
    if (lane == 0) s.next[0] = it;  // the same from all warps that list
    if (it.row >= 0) place = locate_key(a, it, it.chunk * kChunk + own_key, key);
  }
  if (lists && it.row >= 0) {
    send(place);
  } else {
    copy();
  }
  while (it.row >= 0) {
    if constexpr (kPlain) {
      read_group<kChunk>(s.table, a, keys, 4 * group + warp, it.chunk, parity);
    } else {
      decode_group<kChunk>(s.table, keys, 4 * group + warp, parity);
    }
    fence_async_proxy();
    // What comes after the last product: the next item's copies, if there is one.
    auto go_on = [&] {
      parity ^= 1;
      it.row = -1;
      if (!a.many) return;
      __syncthreads();  // nobody reads this item's keys and probabilities any more
      it = s.next[parity];
      if (it.row >= 0) send(s.table.places[own_key]);
    };
    if (group == kTiles - 1) {
      float z[32];
      mbar_wait(smem_address(&s.queries), parity);
      named_barrier(kDecoded + 1, 256);
      score<1, 8>(s, z);
      int line = threadIdx.x % 128;
      float sink = it.chunks == 1 && line < kHeadTile ? sink_of(a, it.tile * kHeadTile + line) : kNegInf;
      weigh<1, 8>(s, a, z);
      named_barrier_arrive(kReady + 1, kThreads);
      add_up<1, 8>(s, z);
      named_barrier(kSums, 256);
      if (line < kHeadTile) finish_line(s, a, it, line, sink);
      if (it.chunks == 1) named_barrier_arrive(kFactors, kThreads);
      go_on();
    } else {
      if (group == 0) {
        float z[48];
        mbar_wait(smem_address(&s.queries), parity);
        named_barrier(kDecoded, 384);
        score<0, 12>(s, z);
        weigh<0, 12>(s, a, z);
        add_up<0, 12>(s, z);
        named_barrier_arrive(kSums, 256);
      } else {
        named_barrier_arrive(kDecoded + group / kFirstTiles, group < kFirstTiles ? 384 : 256);
        if (finds) place = find_next_place<kPlain>(s.next[parity ^ 1], a, walk, it.number + gridDim.x);
      }
      named_barrier(kReady, 512);
      // Columns 128 group..+127.
      float sum[64];
      int line = 16 * warp + lane / 4, lines = a.heads - it.tile * kHeadTile;
      uint64_t values = desc_mn_major(keys + 2 * group * kKeySubtile, kKeySubtile);
      auto multiply = [&](const void* probabilities, int first, int steps) {
        uint64_t p = desc_k_major(smem_address(probabilities));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < steps; ++k) {
          mma_m64n128k16_ss_t(sum, desc_advance(p, (k / 4) * kQuerySubtile + (k & 3) * 32),
                              desc_advance(values, (first + k) * 2048), first + k > 0);
        }
        wgmma_commit();
      };
      // One after the other, so that the first one is ready for the second part when that is there.
      if (group > 0) named_barrier(kTurn + group - 1, 256);
      multiply(s.first_p, 0, 6);
      if (group < kTiles - 2) named_barrier_arrive(kTurn + group, 256);
      named_barrier(kReady + 1, kThreads);
      if (finds && threadIdx.x - 128 < kChunk) s.table.places[threadIdx.x - 128] = place;  // all have been decoded
      wgmma_wait<0>();
      fence_regs(sum);
      float factor[2];  // of the first part's products, to be relative to what those of the second are relative to
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float before = s.lines[0].base[line + 8 * i], now = s.lines[1].base[line + 8 * i];
        factor[i] = before == now ? 1.0f : exp2_fast(before - now);
      }
      if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < 64; ++i) sum[i] *= factor[i / 2 & 1];
      }
      // Likewise: results are stored while others are made.
      if (group > 0) named_barrier(kTurn + group - 1, 256);
      multiply(s.second_p, 6, 4);
      if (group < kTiles - 2) named_barrier_arrive(kTurn + group, 256);
      wgmma_wait<0>();
      fence_regs(sum);
      bool finished = it.chunks == 1;
      if (finished) named_barrier(kFactors, kThreads);
      __nv_bfloat16* rows = a.o + ((int64_t)it.row * a.heads + it.tile * kHeadTile + line) * kDim + 128 * group;
      uint4* partial = partial_of(a, it, 2 * warp, 4 * group);
      float factors[2] = {s.lines[0].total[line], s.lines[0].total[line + 8]};
      auto store = [&](int half) {  // 64 columns
        const float(&part)[32] = reinterpret_cast<const float(&)[32]>(sum[32 * half]);
        if (finished) {
          store_output(part, factors[0], 0, line < lines ? rows + 64 * half : nullptr);
          store_output(part, factors[1], 1, line + 8 < lines ? rows + 8 * kDim + 64 * half : nullptr);
        } else {
          if (line < lines) store_partial(part, 0, partial + 64 * half);
          if (line + 8 < lines) store_partial(part, 1, partial + kLineBlock + 64 * half);
        }
      };
      store(0);
      if (!a.many) store(1);
      go_on();
      if (a.many) store(1);  // while the next item's entries come
    }
  }
}

}  // namespace causeway
