// The mixing warps of hc_tiles.cuh: they make the streams of a tile (hc_post_pre), multiply it by the
// weights that they hold in registers, and send the sums to the tokens' owners.
#pragma once
#include "hc_tile.cuh"

namespace causeway {
namespace hc {

// hc_post on one token of the tile in shared memory, in place: two columns of each box a lane.
__device__ __forceinline__ void make_streams(char* tile, const char* side, int token, int lane) {
  const float4* factors = reinterpret_cast<const float4*>(side + kTile * kStreamBytes);
  const float4 post = factors[token];
  float4 comb[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) comb[j] = factors[kTile + token * kStreams + j];
  side += token * kStreamBytes + lane * 4;
  char* at = tile + token * 128 + ((lane / 4 ^ token) & 7) * 16 + lane % 4 * 4;
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    const uint32_t a = *reinterpret_cast<const uint32_t*>(side + box * 128);
    uint32_t x[kStreams];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      x[j] = *reinterpret_cast<const uint32_t*>(at + box * kBoxBytes + j * kTile * 128);
    }
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      const float mine[kStreams] = {(&comb[0].x)[k], (&comb[1].x)[k], (&comb[2].x)[k], (&comb[3].x)[k]};
      *reinterpret_cast<uint32_t*>(at + box * kBoxBytes + k * kTile * 128) =
          mix_pair((&post.x)[k], mine, a, x);
    }
  }
}

// Sums of 16 tokens over a unit: mixes 0..7, 8..15, 16..23 in two parts that the caller adds; squares of
// tokens lane / 4 and 8 further.
struct TileSums {
  float mix[4][4];
  float square[2];
};

// One step: x[0] and x[2] are pairs of columns of token lane / 4, x[1] and x[3] of the one 8 further. The
// products are those of mix_step, with tokens for rows, in the same order.
template <Mode kMode>
__device__ __forceinline__ void mix_tile_step(TileSums& sums, const Step& weight, const uint32_t (&x)[4]) {
  const auto product = [&](int to, uint32_t b0, uint32_t b1) {
    mma(sums.mix[to], x[0], x[1], x[2], x[3], b0, b1);
  };
#pragma unroll
  for (int part = 1; part >= 0; --part) {
    const uint32_t* first = weight.first[part];
    product(0, first[0], first[2]);
    if constexpr (kMode != Mode::kHead) {
      product(1, first[1], first[3]);
      product(2 + part, weight.second[part], weight.second[2 + part]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& square = sums.square[half];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const uint32_t pair = x[word * 2 + half];
      square = fmaf(low_half(pair), low_half(pair), square);
      square = fmaf(high_half(pair), high_half(pair), square);
    }
  }
}

// The sums of a warp's two units to `to`: [16 tokens, 24 mixes], then [16] squares.
template <Mode kMode>
__device__ __forceinline__ void store_tile_sums(const TileSums (&sums)[2], float* to, int lane) {
  const int row = lane / 4, quad = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float square[2];
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      square[unit] = sums[unit].square[half];
      square[unit] += __shfl_xor_sync(~0u, square[unit], 1);
      square[unit] += __shfl_xor_sync(~0u, square[unit], 2);
    }
    if (quad == 0) to[kTile * kMixes + half * 8 + row] = square[0] + square[1];
#pragma unroll
    for (int i = 0; i < (kMode == Mode::kHead ? 1 : 3); ++i) {
      float2 pair[2];
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
        const float* mix = sums[unit].mix[i] + half * 2;
        pair[unit] = make_float2(mix[0], mix[1]);
        if (i == 2) pair[unit] = make_float2(mix[0] + mix[4], mix[1] + mix[5]);
      }
      *reinterpret_cast<float2*>(to + (half * 8 + row) * kMixes + i * 8 + quad * 2) =
          make_float2(pair[0].x + pair[1].x, pair[0].y + pair[1].y);
    }
  }
}

// The mixing warps' work: sums of each tile over this block's columns, to the tokens' owners.
template <Mode kMode, bool kNorm>
__device__ __forceinline__ void mix_tiles(const Arguments& args, const Maps& maps, char* memory,
                                          uint32_t full, const Share& share) {
  using L = Layout<kMode, kNorm>;
  constexpr bool kPost = kMode == Mode::kPostPre;
  const uint32_t made = full + L::kStages * 8, sent = made + L::kStages * 8, empty = sent + L::kStages * 8;
  const int warp = threadIdx.x / 32;
  Step weight[2][kSteps];
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      // With hc_post a branch: no load moves up over it, so that not all of them take registers at once.
      if (kPost && unit == 1 && step == 2) mbar_wait(empty, 1);
      RawWeight raw;
      load_raw_step<kMode>(raw, args, share.slab, thread_again() / 32 * 2 + unit, thread_again() % 32, step);
      split_step(weight[unit][step], raw, step);
    }
  }
  // This lane's row of a step's matrices: columns 0..7 of tokens 0..7, then of 8..15, columns 8..15. Other
  // steps lie where bits of the piece are flipped; the second unit is the next box.
  const int row = threadIdx.x % 16;
  const uint32_t from = smem_address(memory) + warp % 2 * 2 * kBoxBytes +
                        (warp / 2 * kTile + row) * 128 + ((threadIdx.x % 32 / 16 ^ row) & 7) * 16;
  const int tiles = share.tiles;
  for (int i = 0; i < tiles; ++i) {
    const int stage = i % L::kStages;
    mbar_wait(full + stage * 8, i / L::kStages & 1);
    if constexpr (kPost) {
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        make_streams(memory + stage * kStageBytes, memory + L::kSide + i % kSides * kSideBytes, warp * 2 + n,
                     thread_again() % 32);
      }
      fence_async_proxy();  // the copy engine reads this, and writes here next
      mbar_arrive(made + stage * 8);  // each lane for itself: racecheck follows that
      mbar_wait(made + stage * 8, i / L::kStages & 1);
      if (thread_again() == 0) {
        const int first = (share.group + i * args.groups) * kTile;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          store_box(&maps.streams, smem_address(memory + stage * kStageBytes + box * kBoxBytes),
                    share.slab * kSlab + box * kBoxColumns, first);
        }
        stores_end();
        stores_have_read<1>();
        if (i > 0) mbar_arrive(empty + (i - 1) % L::kStages * 8);
      }
      __syncwarp();
    }
    TileSums sums[2] = {};
    const uint32_t at = from + stage * kStageBytes;
    uint32_t x[2][4];  // of a step of one unit, and the next one
    load_matrices(x[0], at);
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
      const int next = n + 1;
      if (next < 2 * kSteps) load_matrices(x[next % 2], (at ^ next / 2 * 32) + next % 2 * kBoxBytes);
      mix_tile_step<kMode>(sums[n % 2], weight[n % 2][n / 2], x[n % 2]);
    }
    // The sums that lie there have been read by all.
    const int old = i - L::kPartials;
    if (old >= 0) mbar_wait(sent + old % L::kStages * 8, old / L::kStages & 1);
    float* partial = reinterpret_cast<float*>(memory + L::kPartial + i % L::kPartials * kPartialBytes);
    const int thread = thread_again(), lane = thread % 32;
    store_tile_sums<kMode>(sums, partial + thread / 32 * kUnitSums, lane);
    // Half of the warps add up a tile's sums while the others go on to the next one.
    if (thread / (kMixers / 2) != i % 2) {
      barrier_arrive(1 + i % 2, kMixers);
      continue;
    }
    named_barrier(1 + i % 2, kMixers);
    // A thread adds four: four mixes of a token, or the squares of four tokens.
    const int adder = thread % (kMixers / 2);
    const bool squares = adder >= kTile * kMixes / 4;
    const int token = squares ? adder * 4 - kTile * kMixes : adder * 4 / kMixes;
    if (adder < kAdders && (kMode != Mode::kHead || squares || adder * 4 % kMixes == 0)) {
      const float4* fours = reinterpret_cast<const float4*>(partial) + adder;
      float4 sum = fours[0];
#pragma unroll
      for (int other = 1; other < kMixWarps; ++other) {
        const float4 more = fours[other * kAdders];
        sum.x += more.x;
        sum.y += more.y;
        sum.z += more.z;
        sum.w += more.w;
      }
      const Words words = words_of(args, share, i);
      const int at = token * args.slabs + share.slab, four = adder % (kMixes / 4);
      uint64_t *gates = words.gates + at * kGateWords, *others = words.others + at * kOthers;
      if (squares) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          store_word(gates + n * args.slabs * kGateWords + 3, (&sum.x)[n], words.tag);
          if (kMode != Mode::kHead) {
            store_word(others + (n * args.slabs + 1) * kOthers - 1, (&sum.x)[n], words.tag);
          }
        }
      } else {
        store_line(four == 0 ? gates : others + (four - 1) * 2, sum.x, sum.y, sum.z, words.tag);
        store_word(four == 0 ? gates + 2 : others + kLasts + four - 1, sum.w, words.tag);
      }
    }
    __syncwarp();
    if (lane == 0) mbar_arrive(sent + stage * 8);
  }
  // The block's shared memory is given up when it ends: no store may still read it.
  if constexpr (kPost) {
    if (threadIdx.x == 0) stores_have_read<0>();
  }
}

}  // namespace hc
}  // namespace causeway
