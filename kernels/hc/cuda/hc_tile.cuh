// A tile of hc_tiles.cuh: how it lies in shared memory, how it gets there, and the words that blocks send.
#pragma once
#include <cuda.h>

#include "hc_factors.cuh"

namespace causeway {
namespace hc {

constexpr int kTile = 16;  // tokens
constexpr int kMixes = 24;
constexpr int kUnitSums = kTile * (kMixes + 1);  // of a warp: the mixes of each token, then the squares
constexpr int kAdders = kUnitSums / 4;           // threads that add up four sums each
constexpr int kMixWarps = 8;  // two units each
constexpr int kPartialBytes = kMixWarps * kUnitSums * 4;  // of a tile
constexpr int kMixers = kMixWarps * 32;
constexpr int kColumnWarps = 8;  // collapse kPart tokens of a tile each
constexpr int kPart = kTile / kColumnWarps;
constexpr int kServers = 3;      // finish the tokens that the block owns, each every third tile
constexpr int kAllThreads = kMixers + (kColumnWarps + 1 + kServers) * 32;
constexpr int kServeLag = 8;  // tiles that are loaded at most before a tile's post and comb are made
constexpr int kLag = 2;       // tiles that are collapsed before the norm of a tile
constexpr int kRing = 16;     // tiles whose words are kept
constexpr int kOwnedRing = 10;  // if owners make the factors: those of all stages, kLag and two more
constexpr int kSides = 2;  // of a and the factors, which are free once the streams are made
constexpr int kStreamBytes = kSlab * 2;
// A tile lies as four boxes of 64 columns. A row of 128 bytes holds those of a stream of a token, its 16-byte
// pieces swapped by the row's number: eight tokens at the same columns lie in different banks.
constexpr int kBoxColumns = 64;
constexpr int kBoxes = kSlab / kBoxColumns;
constexpr int kBoxBytes = kTile * kStreams * kBoxColumns * 2;
constexpr int kStageBytes = kBoxes * kBoxBytes;
constexpr int kFactorBytes = (kStreams + 16) * 4;
constexpr int kSideBytes = kTile * (kStreamBytes + kFactorBytes);

// Registers of a thread of the mixing warps, the column warps, the others: neither of the first two may spill.
template <bool kNorm>
struct Registers {
  static constexpr int kMix = kNorm ? 152 : 160, kColumns = kNorm ? 64 : 56, kOthers = 48;
  static_assert((kMixWarps * kMix + kColumnWarps * kColumns + 4 * kOthers) * 32 <=
                    65536 / kAllThreads / 8 * 8 * kAllThreads,
                "registers that a block starts with");
};

template <Mode kMode, bool kNorm>
struct Layout {
  // Every block makes all factors itself: one hop instead of two, but more words. With a norm the column warps
  // have no time for that: there each token's owner makes them.
  static constexpr bool kDirect = !kNorm;
  static constexpr int kStages = kMode == Mode::kPostPre ? 5 : 6;  // tiles of streams
  static constexpr int kPartials = 2;  // tiles whose sums lie there
  // When a block mixes tile i, all have loaded i - kStages, so have served tile i - kStages - kServeLag.
  static_assert(kRing > kStages + kServeLag && kServeLag > kStages && kOwnedRing > kStages + kLag,
                "no block sends words of a tile whose slot another one still reads");
  static constexpr int kSide = kStages * kStageBytes;
  static constexpr int kPartial = kSide + (kMode == Mode::kPostPre ? kSides * kSideBytes : 0);
  static constexpr int kWeight = kPartial + kPartials * kPartialBytes;  // of the norm
  static constexpr int kAside = kWeight + (kNorm ? kSlab * 4 : 0);  // rows of half of the tokens, see normed_tiles
  static constexpr int kFull = kAside + (kNorm ? kTile / 2 * kStreamBytes : 0);
  // Per stage: loaded; streams made; sums sent; free. Of kServeLag tiles: collapsed; post and comb made.
  static constexpr int kCollapsed = 4 * kStages * 8, kServed = kCollapsed + kServeLag * 8;
  static constexpr int kBytes = kFull + kServed + kServeLag * 8;
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

// The thread's number, read again: no role has a register to keep it in.
__device__ __forceinline__ int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// What a block works on. Each role reads it from shared memory: registers are for the loops.
struct Share {
  int group, slab, tiles;
  uint32_t epoch;
};

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The word again unless it has the tag: a load without a branch, so that several are under way at once.
__device__ __forceinline__ void load_again(uint64_t& word, const uint64_t* p, uint32_t tag) {
  asm volatile(
      "{\n.reg .pred missing;\n.reg .b32 low, high;\nmov.b64 {low, high}, %0;\n"
      "setp.ne.u32 missing, high, %2;\n@missing ld.relaxed.gpu.global.u64 %0, [%1];\n}\n"
      : "+l"(word)
      : "l"(p), "r"(tag)
      : "memory");
}
__device__ __forceinline__ bool has_tag(uint64_t word, uint32_t tag) { return (uint32_t)(word >> 32) == tag; }
__device__ __forceinline__ float value_of(uint64_t word) { return __uint_as_float((uint32_t)word); }

__device__ __forceinline__ void load_line(uint32_t (&line)[4], const uint64_t* p) {
  uint64_t low, high;
  asm volatile(
      "{\n.reg .b128 all;\nld.relaxed.gpu.global.b128 all, [%2];\nmov.b128 {%0, %1}, all;\n}\n"
      : "=l"(low), "=l"(high)
      : "l"(p)
      : "memory");
  line[0] = (uint32_t)low;
  line[1] = (uint32_t)(low >> 32);
  line[2] = (uint32_t)high;
  line[3] = (uint32_t)(high >> 32);
}
// Three values and a tag.
__device__ __forceinline__ void store_line(uint64_t* p, float x, float y, float z, uint32_t tag) {
  const uint64_t low = (uint64_t)__float_as_uint(y) << 32 | __float_as_uint(x);
  const uint64_t high = (uint64_t)tag << 32 | __float_as_uint(z);
  asm volatile(
      "{\n.reg .b128 all;\nmov.b128 all, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], all;\n}\n" ::"l"(p),
      "l"(low), "l"(high)
      : "memory");
}

// What all blocks need of a token's sums over a slab: a line of three values and a tag, two words of one.
struct Gates {
  uint32_t line[2][4];  // pre 0, 1, 2, tag; pre 3, tag, squares, tag
  __device__ __forceinline__ void load(const uint64_t* p) {
    load_line(line[0], p);
    load_line(line[1], p + 2);
  }
  __device__ __forceinline__ bool have(uint32_t tag) const {
    return line[0][3] == tag && line[1][1] == tag && line[1][3] == tag;
  }
};
constexpr int kGateWords = 4;  // of 64 bits
// What only the token's owner needs: of mixes 4 i + 4 .. + 7 three values in line i < 5, the last one in word
// kLasts + i; the squares again in the last word.
constexpr int kOthers = 16, kLasts = 10;

// Where the words of tile i lie if every block makes all factors: gates for all blocks of the group, [group,
// slot, token, slab, kGateWords]; sums for the owner of each token, [group, slot, token, slab, kOthers]. Gates
// have a place of their own: a value of theirs is never where another launch, of other widths, looks for a tag.
struct Words {
  uint64_t *gates, *others;
  uint32_t tag;
};
__device__ __forceinline__ Words words_of(const Arguments& args, const Share& share, int i) {
  uint64_t* ring = reinterpret_cast<uint64_t*>(args.ring);
  const int64_t slot = (share.group * kRing + i % kRing) * kTile * args.slabs;
  const int64_t most = (int64_t)args.blocks * kRing * kTile;
  return {ring + slot * kGateWords, ring + most * kGateWords + slot * kOthers, share.epoch + i / kRing + 1};
}

// What blocks send besides where owners make the factors, in a place behind: factors [group, slot, token, stream];
// behind all of them, squares of the collapsed rows [group, slot, token, slab].
struct OwnedWords {
  uint64_t *factors, *squares;
  uint32_t tag;
};
__device__ __forceinline__ OwnedWords owned_words_of(const Arguments& args, const Share& share, int i) {
  const int64_t most = (int64_t)args.blocks * kRing * kTile;
  uint64_t* factors = reinterpret_cast<uint64_t*>(args.ring) + most * (kGateWords + kOthers);
  const int slot = share.group * kOwnedRing + i % kOwnedRing, slots = args.groups * kOwnedRing;
  return {factors + slot * kTile * kStreams,
          factors + slots * kTile * kStreams + slot * kTile * args.slabs, share.epoch + i / kOwnedRing + 1};
}

// What the copy engine reads and writes: boxes of 64 columns and all streams; of a, all columns.
struct Maps {
  CUtensorMap x, a, streams;
};

// What passes through once shall not push the words of other blocks out of L2.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void load_box(uint32_t smem, const CUtensorMap* map, int column, int token,
                                         uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem),
      "l"(map), "r"(bar), "r"(column), "r"(token), "r"(0), "l"(evict_first())
      : "memory");
}
__device__ __forceinline__ void load_rows(uint32_t smem, const CUtensorMap* map, int column, int token,
                                          uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem),
      "l"(map), "r"(bar), "r"(column), "r"(token), "l"(evict_first())
      : "memory");
}
__device__ __forceinline__ void store_box(const CUtensorMap* map, uint32_t smem, int column, int token) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint"
      " [%0, {%2, %3, %4}], [%1], %5;" ::"l"(map),
      "r"(smem), "r"(column), "r"(token), "r"(0), "l"(evict_first())
      : "memory");
}
__device__ __forceinline__ void stores_end() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the latest kPending groups of stores have read shared memory.
template <int kPending>
__device__ __forceinline__ void stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// One thread asks for a tile. Rows beyond the last token become zeros.
template <Mode kMode>
__device__ __forceinline__ void load_tile(const Arguments& args, const Maps& maps, uint32_t stage,
                                          uint32_t side, uint32_t full, int64_t first, int slab) {
  constexpr bool kPost = kMode == Mode::kPostPre;
  int64_t left = args.tokens - first;
  int live = left < kTile ? (int)left : kTile;
  expect_bytes(full, kStageBytes + (kPost ? kTile * kStreamBytes + live * kFactorBytes : 0));
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    load_box(stage + box * kBoxBytes, &maps.x, slab * kSlab + box * kBoxColumns, (int)first, full);
  }
  if constexpr (kPost) {
    load_rows(side, &maps.a, slab * kSlab, (int)first, full);
    side += kTile * kStreamBytes;
    bulk_copy(side, args.post_in + first * 4, live * 16, full);
    bulk_copy(side + kTile * 16, args.comb_in + first * 16, live * 64, full);
  }
}

}  // namespace hc
}  // namespace causeway
