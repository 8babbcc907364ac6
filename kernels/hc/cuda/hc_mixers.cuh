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
  const int row = token * kStreams;
  char* at[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    at[j] = tile + (row + j) * 128 + ((lane / 4 ^ (row + j)) & 7) * 16 + lane % 4 * 4;
  }
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    const uint32_t a = *reinterpret_cast<const uint32_t*>(side + box * 128);
    uint32_t x[kStreams];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) x[j] = *reinterpret_cast<const uint32_t*>(at[j] + box * kBoxBytes);
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      const float mine[kStreams] = {(&comb[0].x)[k], (&comb[1].x)[k], (&comb[2].x)[k], (&comb[3].x)[k]};
      *reinterpret_cast<uint32_t*>(at[k] + box * kBoxBytes) = mix_pair((&post.x)[k], mine, a, x);
    }
  }
}

// Sums of 16 tokens over a unit: mixes 0..7, 8..15, 16..23 in two parts that the caller adds; squares of
// tokens lane / 4 and 8 further.
struct TileSums {
  float mix[4][4];
  float square[2];
};

// One step on columns `low` and `high` of tokens lane / 4 and 8 further. The products are those of
// mix_step, with tokens for rows, in the same order.
template <Mode kMode>
__device__ __forceinline__ void mix_tile_step(TileSums& sums, const Step& weight, const uint32_t (&low)[2],
                                              const uint32_t (&high)[2]) {
  const auto product = [&](int to, uint32_t b0, uint32_t b1) {
    mma(sums.mix[to], low[0], low[1], high[0], high[1], b0, b1);
  };
#pragma unroll
  for (int part = 2; part >= 0; --part) {
    const uint32_t* first = weight.first[part];
    product(0, first[0], first[2]);
    if constexpr (kMode != Mode::kHead) {
      const uint32_t* second = weight.second;
      product(1, first[1], first[3]);
      if (part == 2) product(2, second[4], second[5]);
      if (part == 1) product(3, second[1], second[3]);
      if (part == 0) product(2, second[0], second[2]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& square = sums.square[half];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const uint32_t pair = word ? high[half] : low[half];
      square = fmaf(low_half(pair), low_half(pair), square);
      square = fmaf(high_half(pair), high_half(pair), square);
    }
  }
}

// The sums of a warp's unit to `to`: [16 tokens, 24 mixes], then [16] squares. The second unit's are added
// to the first one's, which the same lane has put there.
template <Mode kMode, bool kSecond>
__device__ __forceinline__ void store_tile_sums(const TileSums& sums, float* to, int lane) {
  const int row = lane / 4, quad = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float square = sums.square[half];
    square += __shfl_xor_sync(~0u, square, 1);
    square += __shfl_xor_sync(~0u, square, 2);
    if (quad == 0) {
      float& at = to[kTile * kMixes + half * 8 + row];
      at = kSecond ? at + square : square;
    }
#pragma unroll
    for (int i = 0; i < (kMode == Mode::kHead ? 1 : 3); ++i) {
      float2& at = *reinterpret_cast<float2*>(to + (half * 8 + row) * kMixes + i * 8 + quad * 2);
      float2 pair = make_float2(sums.mix[i][half * 2], sums.mix[i][half * 2 + 1]);
      if (i == 2) pair = make_float2(pair.x + sums.mix[3][half * 2], pair.y + sums.mix[3][half * 2 + 1]);
      at = kSecond ? make_float2(at.x + pair.x, at.y + pair.y) : pair;
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
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  float* partial = reinterpret_cast<float*>(memory + L::kPartial);
  float* mine = partial + warp * kUnitSums;
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
  // Half of the warps add up a tile's sums while the others go on to the next one. A thread adds four: four
  // mixes of a token, or the squares of four tokens.
  const int adder = thread % (kMixers / 2);
  const bool squares = adder >= kTile * kMixes / 4;
  const int token = squares ? adder * 4 - kTile * kMixes : adder * 4 / kMixes;
  const int word = (token * args.slabs + share.slab) * kRecord + (squares ? kSquares : adder * 4 % kMixes);
  const bool adds = adder < kAdders && (kMode != Mode::kHead || squares || adder * 4 % kMixes == 0);
  const int tiles = share.tiles;
  for (int i = 0; i < tiles; ++i) {
    const int stage = i % L::kStages;
    char* tile = memory + stage * kStageBytes;
    mbar_wait(full + stage * 8, i / L::kStages & 1);
    if constexpr (kPost) {
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        make_streams(tile, memory + L::kSide + i % kSides * kSideBytes, warp * 2 + n, lane);
      }
      fence_async_proxy();  // the copy engine reads this, and writes here next
      __syncwarp();
      if (lane == 0) mbar_arrive(made + stage * 8);
      mbar_wait(made + stage * 8, i / L::kStages & 1);
      if (thread == 0) {
        const int first = (share.group + i * args.groups) * kTile;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          store_box(&maps.streams, smem_address(tile) + box * kBoxBytes,
                    share.slab * kSlab + box * kBoxColumns, first);
        }
        stores_end();
        stores_have_read<1>();
        if (i > 0) mbar_arrive(empty + (i - 1) % L::kStages * 8);
      }
      __syncwarp();
    }
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      TileSums sums = {};
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const char* at = tile + unit * kBoxBytes + (from ^ side * 64);
        const uint4 x = *reinterpret_cast<const uint4*>(at);
        const uint4 y = *reinterpret_cast<const uint4*>(at + 8 * kStreams * 128);
        mix_tile_step<kMode>(sums, weight[unit][side * 2], {x.x, y.x}, {x.y, y.y});
        mix_tile_step<kMode>(sums, weight[unit][side * 2 + 1], {x.z, y.z}, {x.w, y.w});
      }
      if (unit == 0) {
        // The partial sums of the tile before have been read by all.
        if (i > 0) mbar_wait(sent + (i - 1) % L::kStages * 8, (i - 1) / L::kStages & 1);
        store_tile_sums<kMode, false>(sums, mine, lane);
      } else {
        store_tile_sums<kMode, true>(sums, mine, lane);
      }
    }
    if (warp / (kMixWarps / 2) != i % 2) {
      barrier_arrive(1 + i % 2, kMixers);
      continue;
    }
    named_barrier(1 + i % 2, kMixers);
    if (adds) {
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
      uint64_t* to = words.sums + word;
      if (squares) {
#pragma unroll
        for (int n = 0; n < 4; ++n) store_word(to + n * args.slabs * kRecord, (&sum.x)[n], words.tag);
      } else {
        store_words(to, make_float2(sum.x, sum.y), words.tag);
        store_words(to + 2, make_float2(sum.z, sum.w), words.tag);
      }
    }
    __syncwarp();
    if (lane == 0) mbar_arrive(sent + stage * 8);
  }
  // The block's shared memory is given up when it ends: no store may still read it.
  if constexpr (kPost) {
    if (thread == 0) stores_have_read<0>();
  }
}

}  // namespace hc
}  // namespace causeway
