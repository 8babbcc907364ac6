// The column warps of hc_tiles.cuh: they collapse the tiles whose factors have come; RMSNorm and FP8 form.
#pragma once
#include "hc_tile.cuh"

namespace causeway {
namespace hc {

// Puts there what a lane multiplies its eight columns of a normed row by. (All warps write the same.)
__device__ __forceinline__ void keep_norm_weight(const Arguments& args, int column, float4* to) {
#pragma unroll
  for (int half = 0; half < 2; ++half, column += 4) {
    float4 weight;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      (&weight.x)[i] =
          args.norm_is_float
              ? __ldg(static_cast<const float*>(args.norm_weight) + column + i)
              : __bfloat162float(__ldg(static_cast<const __nv_bfloat16*>(args.norm_weight) + column + i));
    }
    to[half] = weight;
  }
}

// Eight columns of a collapsed row normed, as rms_norm_quant makes them.
__device__ __forceinline__ uint4 norm_columns(const uint4& row, float factor, const float4 (&weight)[2]) {
  uint4 normed;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const uint32_t pair = (&row.x)[word];
    const float* two = &weight[word / 2].x + word % 2 * 2;
    (&normed.x)[word] = pack_bf16(low_half(pair) * factor * two[0], high_half(pair) * factor * two[1]);
  }
  return normed;
}

// The largest magnitude in each half of a lane's words, as integers: a NaN is above infinity.
__device__ __forceinline__ uint32_t peak_pair(const uint4& row) {
  constexpr uint32_t kMagnitude = 0x7FFF7FFFu;
  return __vmaxu2(__vmaxu2(row.x & kMagnitude, row.y & kMagnitude),
                  __vmaxu2(row.z & kMagnitude, row.w & kMagnitude));
}

// Four values of each lane -> one: halves of the lanes that differ in bit kBit of their number keep two
// values each, quarters one; value v stays where that bit and the next lower one are v.
template <int kBit, typename T, typename Join>
__device__ __forceinline__ T deal_four(const T (&value)[kPart], int lane, Join join) {
  const bool upper = lane & kBit, odd = lane & kBit / 2;
  T two[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const T sent = __shfl_xor_sync(~0u, upper ? value[n] : value[2 + n], kBit);
    two[n] = join(upper ? value[2 + n] : value[n], sent);
  }
  return join(odd ? two[1] : two[0], __shfl_xor_sync(~0u, odd ? two[0] : two[1], kBit / 2));
}

// The sum of each of four values over all lanes, in the order of add_lanes: value v in lanes 8 v ..
__device__ __forceinline__ float add_four(const float (&value)[kPart], int lane) {
  float sum = deal_four<16>(value, lane, [](float a, float b) { return a + b; });
#pragma unroll
  for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// Each warp takes kPart tokens of a tile. With a norm it sends each token's squares over this block's
// columns to the group's blocks, and norms the tile before meanwhile, whose rows it has kept.
template <Mode kMode, bool kNorm>
__device__ __forceinline__ void column_tiles(const Arguments& args, char* memory, uint32_t full,
                                             const Share& share, int warp, int lane) {
  using L = Layout<kMode, kNorm>;
  static_assert(kPart == 4, "deal_four, and rows of a warp that start at multiples of eight");
  const uint32_t ready = full + (kMode == Mode::kPostPre ? L::kStages * 8 : 0);
  const uint32_t empty = full + 3 * L::kStages * 8;
  const int tiles = share.tiles, column = share.slab * kSlab + lane * 8;
  // Of a tile: 16 lanes take four tokens' factors; for the norm each lane the squares of a slab.
  const Words words = words_of(args, share, 0);
  const auto tag_of = [&](int i) { return words.tag + i / kRing; };
  const auto factor_at = [&](int i) {
    return words.factors + i % kRing * (kTile * kStreams) + warp * (kPart * kStreams) + lane % 16;
  };
  const auto squares_at = [&](int i, int token, int slab) {
    return words.squares + ((i % kRing * kTile + warp * kPart + token) * args.slabs + slab);
  };
  const int lane_slab = lane < args.slabs ? lane : 0;
  const int64_t first = (int64_t)share.group * kTile + warp * kPart, step = (int64_t)args.groups * kTile;
  char* tile_rows = memory + warp * kPart * kStreams * 128 + lane / 8 * kBoxBytes;
  char* held = memory + L::kHeld + warp * kPart * kStreamBytes + lane * 16;
  float4* norm_weight = reinterpret_cast<float4*>(memory + L::kWeight) + lane * 2;
  if constexpr (kNorm) keep_norm_weight(args, column, norm_weight);
  // Words of the next tile are asked for one tile ahead: mostly they are there already.
  uint64_t next = load_word(factor_at(0));
  for (int i = 0; i < tiles + kNorm; ++i) {
    uint64_t square[kPart];
    if (kNorm && i > 0) {
#pragma unroll
      for (int t = 0; t < kPart; ++t) square[t] = load_word(squares_at(i - 1, t, lane_slab));
    }
    if (i < tiles) {
      const int stage = i % L::kStages;
      while (!__all_sync(~0u, has_tag(next, tag_of(i)))) next = load_word(factor_at(i));
      const float mine = value_of(next);
      next = load_word(factor_at(i + 1));
      // The factors depend on the tile's data, so it has landed; the wait makes it visible.
      mbar_wait(ready + stage * 8, i / L::kStages & 1);
      const char* at = tile_rows + stage * kStageBytes;
      const int64_t token = first + i * step;
      __nv_bfloat16* out = args.out + token * args.dim + column;
      const int live = args.tokens - token < kPart ? (int)(args.tokens - token) : kPart;
      float sum[kPart];
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
        float4 pre;
        uint4 x[kStreams];
#pragma unroll
        for (int s = 0; s < kStreams; ++s) {
          const int row = t * kStreams + s;
          (&pre.x)[s] = __shfl_sync(~0u, mine, row);
          x[s] = *reinterpret_cast<const uint4*>(at + row * 128 + ((lane ^ row) & 7) * 16);
        }
        const uint4 row = collapse_columns(pre, x);
        if constexpr (kNorm) {
          *reinterpret_cast<uint4*>(held + (i % kHeldTiles * kTile + t) * kStreamBytes) = row;
          sum[t] = square_of(row);
        } else {
          if (t < live) __stcs(reinterpret_cast<uint4*>(out), row);
          out += args.dim;
        }
      }
      __syncwarp();
      if (lane == 0) mbar_arrive(empty + stage * 8);
      if constexpr (kNorm) {
        const float mine_of_slab = add_four(sum, lane);
        if (lane % 8 == 0) store_word(squares_at(i, lane / 8, share.slab), mine_of_slab, tag_of(i));
      }
    }
    if (kNorm && i > 0) {
      const uint32_t tag = tag_of(i - 1);
      while (true) {
        bool all = true;
#pragma unroll
        for (int t = 0; t < kPart; ++t) all = all && has_tag(square[t], tag);
        if (__all_sync(~0u, all)) break;
#pragma unroll
        for (int t = 0; t < kPart; ++t) load_again(square[t], squares_at(i - 1, t, lane_slab), tag);
      }
      float sum[kPart];
#pragma unroll
      for (int t = 0; t < kPart; ++t) sum[t] = lane < args.slabs ? value_of(square[t]) : 0.0f;
      const float factor = rsqrtf(add_four(sum, lane) / static_cast<float>(args.dim) + args.rms_eps);
      const int64_t token = first + (i - 1) * step;
      const int live = args.tokens - token < kPart ? (int)(args.tokens - token) : kPart;
      __nv_bfloat16* out = args.out + token * args.dim + column;
      uint4 normed[kPart];
      uint32_t pairs[kPart];
      const float4 weight[2] = {norm_weight[0], norm_weight[1]};
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
        const uint4 row =
            *reinterpret_cast<const uint4*>(held + ((i - 1) % kHeldTiles * kTile + t) * kStreamBytes);
        normed[t] = norm_columns(row, __shfl_sync(~0u, factor, t * 8), weight);
        pairs[t] = peak_pair(normed[t]);
        if (t < live) __stcs(reinterpret_cast<uint4*>(out), normed[t]);
        out += args.dim;
      }
      // Half a warp holds the 128 columns of a scale; its lanes 4 t .. get that of token t.
      const auto larger = [](uint32_t a, uint32_t b) { return __vmaxu2(a, b); };
      uint32_t pair = deal_four<8>(pairs, lane, larger);
      pair = __vmaxu2(pair, __shfl_xor_sync(~0u, pair, 2));
      pair = __vmaxu2(pair, __shfl_xor_sync(~0u, pair, 1));
      const uint32_t byte = scale_byte(max(pair << 16, pair & 0xFFFF0000u));
      const int whose = lane / 4 % 4;
      if (lane % 4 == 0 && whose < live) {
        args.code_scale[(token + whose) * args.code_scale_row + column / 128] = static_cast<uint8_t>(byte);
      }
      uint8_t* codes = args.codes + token * args.code_row + column;
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
        const uint32_t scale = __shfl_sync(~0u, byte, (lane & 16) + t * 4);
        if (t < live) __stcs(reinterpret_cast<uint2*>(codes), code_columns(normed[t], scale));
        codes += args.code_row;
      }
    }
  }
}

}  // namespace hc
}  // namespace causeway
