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

// The sum over the 16 lanes of a token, in the order of add_lanes and add_slabs.
__device__ __forceinline__ float add_half(float sum) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// The same of four values: lanes 4 v .. of a token get value v.
__device__ __forceinline__ float add_four(const float (&value)[4], int lane) {
  const bool upper = lane & 8, odd = lane & 4;
  float two[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float sent = __shfl_xor_sync(~0u, upper ? value[n] : value[2 + n], 8);
    two[n] = (upper ? value[2 + n] : value[n]) + sent;
  }
  const float sent = __shfl_xor_sync(~0u, odd ? two[0] : two[1], 4);
  float sum = (odd ? two[1] : two[0]) + sent;
  sum += __shfl_xor_sync(~0u, sum, 2);
  return sum + __shfl_xor_sync(~0u, sum, 1);
}

// The gates of a token from slabs `lane` % 16 and 16 further, which need not be there.
struct Asked {
  Gates gates[2];
  __device__ __forceinline__ void ask(const uint64_t* from, bool second) {
    gates[0].load(from);
    if (second) gates[1].load(from + 16 * kGateWords);
  }
  // Until all lanes have theirs. What is there is not asked for again: L2 has enough to do.
  __device__ __forceinline__ void wait(const uint64_t* from, bool second, uint32_t tag) {
    while (true) {
      const bool first = gates[0].have(tag), other = !second || gates[1].have(tag);
      if (__all_sync(~0u, first && other)) break;
      if (!first) gates[0].load(from);
      if (!other) gates[1].load(from + 16 * kGateWords);
    }
  }
  __device__ __forceinline__ float sum(int line, int at, bool second) const {
    return __uint_as_float(gates[0].line[line][at]) +
           (second ? __uint_as_float(gates[1].line[line][at]) : 0.0f);
  }
};

// Where every block makes all factors: each warp takes two tokens of a tile, half a warp each, and makes their
// factors from all blocks' sums. A lane collapses eight columns and those 128 further.
template <Mode kMode>
__device__ __forceinline__ void direct_tiles(const Arguments& args, const char* memory, uint32_t full,
                                             const Share& share) {
  using L = Layout<kMode, false>;
  static_assert(kPart == 2, "half a warp for a token");
  const uint32_t sent = full + 2 * L::kStages * 8, empty = sent + L::kStages * 8;
  const int thread = thread_again() - kMixers, lane = thread % 32;
  const int tiles = share.tiles, slab = lane % 16, token = thread / 16;
  const bool second = slab + 16 < args.slabs;
  const Words words = words_of(args, share, 0);
  const Affine affine = load_affine<kMode>(args, slab / 4);
  const int column = share.slab * kSlab + slab * 8;
  const int64_t first = (int64_t)share.group * kTile + token, step = (int64_t)args.groups * kTile;
  const char* tile_rows = memory + slab / 8 * kBoxBytes + token * 128 + ((slab ^ token) & 7) * 16;
  Asked asked;
  for (int i = 0; i < tiles; ++i) {
    const int stage = i % L::kStages;
    const uint64_t* from = words.gates + ((i % kRing * kTile + token) * args.slabs + slab) * kGateWords;
    // The others' sums come when this block's do: asking earlier would only keep L2 busy.
    mbar_wait(sent + stage * 8, i / L::kStages & 1);
    asked.ask(from, second);
    asked.wait(from, second, words.tag + i / kRing);
    const float sums[4] = {asked.sum(0, 0, second), asked.sum(0, 1, second), asked.sum(0, 2, second),
                           asked.sum(1, 0, second)};
    const float squares = add_half(asked.sum(1, 2, second));
    const float gate = sigmoid(logit_of(args, add_four(sums, lane), squares, affine)) + args.eps;
    float4 pre;
#pragma unroll
    for (int s = 0; s < kStreams; ++s) (&pre.x)[s] = __shfl_sync(~0u, gate, (lane & 16) + s * 4);
    const int64_t row = first + i * step;
    __nv_bfloat16* out = args.out + row * args.dim + column;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const char* at = tile_rows + stage * kStageBytes + n * 2 * kBoxBytes;
      uint4 x[kStreams];
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        x[s] = *reinterpret_cast<const uint4*>(at + s * kTile * 128);
      }
      const uint4 columns = collapse_columns(pre, x);
      if (row < args.tokens) __stcs(reinterpret_cast<uint4*>(out + n * 128), columns);
    }
    __syncwarp();
    if (lane == 0) {
      mbar_arrive(empty + stage * 8);
      mbar_arrive(full + L::kCollapsed + i % kServeLag * 8);
    }
  }
}

// The sum of each of two values over all lanes, in the order of add_lanes: value v in lanes 16 v ..
__device__ __forceinline__ float add_two(const float (&value)[kPart], int lane) {
  const bool upper = lane & 16;
  const float sent = __shfl_xor_sync(~0u, upper ? value[0] : value[1], 16);
  float sum = (upper ? value[1] : value[0]) + sent;
#pragma unroll
  for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// Where owners make the factors: each warp takes kPart tokens of a tile. With a norm it sends each token's
// squares over this block's columns to the group's blocks, keeps the rows, and norms those of kLag tiles before
// meanwhile.
template <Mode kMode, bool kNorm>
__device__ __forceinline__ void owned_tiles(const Arguments& args, char* memory, uint32_t full,
                                            const Share& share, int warp, int lane) {
  using L = Layout<kMode, kNorm>;
  static_assert(kPart == 2, "add_two, and two tokens' peaks in a word");
  const uint32_t ready = full + (kMode == Mode::kPostPre ? L::kStages * 8 : 0);
  const uint32_t empty = full + 3 * L::kStages * 8;
  const int tiles = share.tiles, column = share.slab * kSlab + lane * 8;
  // Of a tile: eight lanes take two tokens' factors; for the norm each lane the squares of a slab.
  const OwnedWords words = owned_words_of(args, share, 0);
  const auto tag_of = [&](int i) { return words.tag + i / kOwnedRing; };
  const auto factor_at = [&](int i) {
    return words.factors + i % kOwnedRing * (kTile * kStreams) + warp * (kPart * kStreams) +
           lane % (kPart * kStreams);
  };
  const auto squares_at = [&](int i, int token, int slab) {
    return words.squares + ((i % kOwnedRing * kTile + warp * kPart + token) * args.slabs + slab);
  };
  const int lane_slab = lane < args.slabs ? lane : 0;
  const int64_t first = (int64_t)share.group * kTile + warp * kPart, step = (int64_t)args.groups * kTile;
  const char* tile_rows = memory + warp * kPart * 128 + lane / 8 * kBoxBytes;
  float4* norm_weight = reinterpret_cast<float4*>(memory + L::kWeight) + lane * 2;
  if constexpr (kNorm) keep_norm_weight(args, column, norm_weight);
  uint4 held[kLag][kPart];
  // Words of the next tile are asked for one tile ahead: mostly they are there already.
  uint64_t next = load_word(factor_at(0));
  for (int i = 0; i < tiles + kNorm * kLag; ++i) {
    uint64_t square[kPart];
    if (kNorm && i >= kLag) {
#pragma unroll
      for (int t = 0; t < kPart; ++t) square[t] = load_word(squares_at(i - kLag, t, lane_slab));
    }
    uint4 rows[kPart];
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
      float sum[kPart];
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
        float4 pre;
        uint4 x[kStreams];
#pragma unroll
        for (int s = 0; s < kStreams; ++s) {
          (&pre.x)[s] = __shfl_sync(~0u, mine, t * kStreams + s);
          x[s] = *reinterpret_cast<const uint4*>(at + (s * kTile + t) * 128 +
                                                 ((lane ^ (warp * kPart + t)) & 7) * 16);
        }
        rows[t] = collapse_columns(pre, x);
        if constexpr (kNorm) {
          sum[t] = square_of(rows[t]);
        } else {
          if (token + t < args.tokens) __stcs(reinterpret_cast<uint4*>(out), rows[t]);
          out += args.dim;
        }
      }
      __syncwarp();
      if (lane == 0) mbar_arrive(empty + stage * 8);
      if constexpr (kNorm) {
        const float mine_of_slab = add_two(sum, lane);
        if (lane % 16 == 0) store_word(squares_at(i, lane / 16, share.slab), mine_of_slab, tag_of(i));
      }
    }
    if (kNorm && i >= kLag) {
      const uint32_t tag = tag_of(i - kLag);
      while (!__all_sync(~0u, has_tag(square[0], tag) && has_tag(square[1], tag))) {
#pragma unroll
        for (int t = 0; t < kPart; ++t) load_again(square[t], squares_at(i - kLag, t, lane_slab), tag);
      }
      float sum[kPart];
#pragma unroll
      for (int t = 0; t < kPart; ++t) sum[t] = lane < args.slabs ? value_of(square[t]) : 0.0f;
      const float factor = rsqrtf(add_two(sum, lane) / static_cast<float>(args.dim) + args.rms_eps);
      const int64_t token = first + (i - kLag) * step;
      __nv_bfloat16* out = args.out + token * args.dim + column;
      const float4 weight[2] = {norm_weight[0], norm_weight[1]};
      uint32_t peaks[kPart];
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
        uint4& row = held[kLag - 1][t];
        row = norm_columns(row, __shfl_sync(~0u, factor, t * 16), weight);
        if (token + t < args.tokens) __stcs(reinterpret_cast<uint4*>(out), row);
        out += args.dim;
        const uint32_t pair = peak_pair(row);
        peaks[t] = __vmaxu2(pair, pair >> 16);
      }
      // Half a warp holds the 128 columns of a scale; a word holds the peaks of both tokens.
      uint32_t both = __byte_perm(peaks[0], peaks[1], 0x5410);
#pragma unroll
      for (int step = 8; step > 0; step /= 2) both = __vmaxu2(both, __shfl_xor_sync(~0u, both, step));
      const uint32_t byte[kPart] = {scale_byte(both << 16), scale_byte(both & 0xFFFF0000u)};
      if (lane % 16 < kPart && token + lane % 16 < args.tokens) {
        args.code_scale[(token + lane % 16) * args.code_scale_row + column / 128] =
            static_cast<uint8_t>(lane % 16 == 0 ? byte[0] : byte[1]);
      }
      uint8_t* codes = args.codes + token * args.code_row + column;
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
        const uint2 code = code_columns(held[kLag - 1][t], byte[t]);
        if (token + t < args.tokens) __stcs(reinterpret_cast<uint2*>(codes), code);
        codes += args.code_row;
      }
    }
    if constexpr (kNorm) {
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
#pragma unroll
        for (int age = kLag - 1; age > 0; --age) held[age][t] = held[age - 1][t];
        held[0][t] = rows[t];
      }
    }
  }
}

}  // namespace hc
}  // namespace causeway
