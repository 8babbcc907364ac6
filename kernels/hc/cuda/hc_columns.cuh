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

// The larger magnitudes of two pairs, NaN if one is; signs are anything.
__device__ __forceinline__ uint32_t peaks_of(uint32_t x, uint32_t y) {
  uint32_t peaks;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(peaks) : "r"(x), "r"(y));
  return peaks;
}

// The sum over the 16 lanes of a token, in the order of add_lanes and add_slabs.
__device__ __forceinline__ float add_half(float sum) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// The sums of four values over the kLanes lanes of a token, in the same order: a quarter of them gets each.
template <int kLanes>
__device__ __forceinline__ float add_four(const float (&value)[4], int lane) {
  const bool upper = lane & kLanes / 2, odd = lane & kLanes / 4;
  float two[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float sent = __shfl_xor_sync(~0u, upper ? value[n] : value[2 + n], kLanes / 2);
    two[n] = (upper ? value[2 + n] : value[n]) + sent;
  }
  const float sent = __shfl_xor_sync(~0u, odd ? two[0] : two[1], kLanes / 4);
  float sum = (odd ? two[1] : two[0]) + sent;
#pragma unroll
  for (int step = kLanes / 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
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
    const float gate = sigmoid(logit_of(args, add_four<16>(sums, lane), squares, affine)) + args.eps;
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

// Where the words of a tile lie, of one tile after the other, and their tag.
struct Turn {
  int at;
  uint32_t tag;
  __device__ __forceinline__ void next(int words) {
    at += words;
    if (at == kOwnedRing * words) at = 0, ++tag;
  }
};

// sum / dim as a division rounds it (tried with every dim and mantissa), in fewer instructions.
__device__ __forceinline__ float mean_of(const Arguments& args, float sum) {
  const float mean = sum * args.inverse_dim;
  const float rest = fmaf(-mean, static_cast<float>(args.dim), sum);
  return isinf(mean) ? mean : fmaf(rest, args.inverse_dim, mean);
}

// Keeps the address itself in registers: made anew each time it takes more instructions.
template <class T>
__device__ __forceinline__ T* kept(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// With a norm, where owners make the factors: each warp takes kPart tokens of a tile. It sends each token's
// squares over this block's columns to the group's blocks, keeps the rows, and norms those of kLag tiles before
// meanwhile. What moves on by a tile is counted, not made of its number: these warps have the most to do.
template <Mode kMode>
__device__ __forceinline__ void normed_tiles(const Arguments& args, char* memory, uint32_t full,
                                             const Share& share, int warp, int lane) {
  using L = Layout<kMode, true>;
  static_assert(kPart == 2, "add_four, and two tokens' peaks in a word");
  const uint32_t ready = full + (kMode == Mode::kPostPre ? L::kStages * 8 : 0);
  const uint32_t empty = full + 3 * L::kStages * 8;
  const int tiles = share.tiles, column = share.slab * kSlab + lane * 8;
  // Of a tile: eight lanes take two tokens' factors; for the norm each lane the squares of a slab.
  const OwnedWords words = owned_words_of(args, share, 0);
  const uint64_t* factors = kept(words.factors + warp * (kPart * kStreams) + lane % (kPart * kStreams));
  uint64_t* to = kept(words.squares + (warp * kPart + lane / 8 % kPart) * args.slabs + share.slab);
  const uint64_t* squares =
      kept(words.squares + warp * kPart * args.slabs + (lane < args.slabs ? lane : 0));
  const int tile_squares = kTile * args.slabs;
  Turn asked{0, words.tag}, sent = asked, normed = asked;
  const int64_t first = (int64_t)share.group * kTile + warp * kPart, step = (int64_t)args.groups * kTile;
  int left = (int)(args.tokens - first);  // tokens from the first one that is normed next on
  __nv_bfloat16* out = args.out + first * args.dim + column;
  uint8_t* codes = args.codes + first * args.code_row + column;
  uint8_t* scale = args.code_scale + (first + lane % 16) * args.code_scale_row + column / 128;
  const char* tile_rows = memory + warp * kPart * 128 + lane / 8 * kBoxBytes;
  float4* norm_weight = reinterpret_cast<float4*>(memory + L::kWeight) + lane * 2;
  keep_norm_weight(args, column, norm_weight);
  // A token's oldest row waits in shared memory, as much as there is room.
  uint4* aside = reinterpret_cast<uint4*>(memory + L::kAside) + warp * 32 + lane;
  uint4 held[kLag][kPart];
  int stage = 0;
  uint32_t phase = 0;
  // Words of the next tile are asked for one tile ahead: mostly they are there already.
  uint64_t next = load_word(factors);
  for (int i = 0; i < tiles + kLag; ++i) {
    uint64_t square[kPart];  // as `rows` and `sum`: where a turn does not make them nobody looks at them
    if (i >= kLag) {
#pragma unroll
      for (int t = 0; t < kPart; ++t) square[t] = load_word(squares + normed.at + t * args.slabs);
    }
    uint4 rows[kPart];
    float sum[kPart];
    if (i < tiles) {
      while (!__all_sync(~0u, has_tag(next, asked.tag))) next = load_word(factors + asked.at);
      const float mine = value_of(next);
      asked.next(kTile * kStreams);
      next = load_word(factors + asked.at);
      // The factors depend on the tile's data, so it has landed; the wait makes it visible.
      mbar_wait(ready + stage * 8, phase);
      const char* at = tile_rows + stage * kStageBytes;
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
        sum[t] = square_of(rows[t]);
      }
      __syncwarp();
      if (lane == 0) mbar_arrive(empty + stage * 8);
      if (++stage == L::kStages) stage = 0, phase ^= 1;
    }
    if (i >= kLag) {
      while (!__all_sync(~0u, has_tag(square[0], normed.tag) && has_tag(square[1], normed.tag))) {
#pragma unroll
        for (int t = 0; t < kPart; ++t) {
          load_again(square[t], squares + normed.at + t * args.slabs, normed.tag);
        }
      }
      normed.next(tile_squares);
    }
    // Lanes 0.. and 8.. get the squares of the new rows over this slab, 16.. and 24.. those of the old ones.
    const bool counts = lane < args.slabs;
    const float squares_of[4] = {sum[0], sum[1], counts ? value_of(square[0]) : 0.0f,
                                 counts ? value_of(square[1]) : 0.0f};
    const float total = add_four<32>(squares_of, lane);
    if (i < tiles) {
      if (lane % 8 == 0 && lane < 16) store_word(to + sent.at, total, sent.tag);
      sent.next(tile_squares);
    }
    if (i >= kLag) {
      const float factor = rsqrtf(mean_of(args, total) + args.rms_eps);
      const float4 weight[2] = {norm_weight[0], norm_weight[1]};
      uint32_t peaks[kPart];
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
        uint4& row = held[kLag - 1][t];
        row = norm_columns(t == 0 ? *aside : row, __shfl_sync(~0u, factor, 16 + t * 8), weight);
        if (t < left) __stcs(reinterpret_cast<uint4*>(out + t * args.dim), row);
        peaks[t] = peaks_of(peaks_of(row.x, row.y), peaks_of(row.z, row.w));
      }
      // Half a warp holds the 128 columns of a scale; a word holds the peaks of both tokens.
      constexpr uint32_t kMagnitudes = 0x7FFF7FFFu;
      uint32_t both = __vmaxu2(__byte_perm(peaks[0], peaks[1], 0x5410) & kMagnitudes,
                               __byte_perm(peaks[0], peaks[1], 0x7632) & kMagnitudes);
#pragma unroll
      for (int apart = 8; apart > 0; apart /= 2) both = __vmaxu2(both, __shfl_xor_sync(~0u, both, apart));
      const Scales scales(both);
      if (lane % 16 < kPart && lane % 16 < left) {
        *scale = static_cast<uint8_t>(lane % 16 == 0 ? scales.bytes : scales.bytes >> 16);
      }
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
        const uint2 code = code_columns(held[kLag - 1][t], scales.inverse[t]);
        if (t < left) __stcs(reinterpret_cast<uint2*>(codes + t * args.code_row), code);
      }
      left -= (int)step;
      out += step * args.dim;
      codes += step * args.code_row;
      scale += step * args.code_scale_row;
    }
#pragma unroll
    for (int t = 0; t < kPart; ++t) {
#pragma unroll
      for (int age = kLag - 1; age > 0; --age) held[age][t] = held[age - 1][t];
      if (t == 0) *aside = held[kLag - 1][t];
      held[0][t] = rows[t];
    }
  }
}

}  // namespace hc
}  // namespace causeway
