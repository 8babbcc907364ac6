// From a token's logits to its experts and their weights. One warp serves a token.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "hopper.cuh"

namespace causeway {
namespace gate {

constexpr int kMostExperts = 512;
constexpr uint32_t kAll = 0xFFFFFFFFu;

// Filled by kernels/moe_gate/cuda_impl.py, field by field.
struct Arguments {
  const float* logits;       // many tokens: [tokens, experts]
  uint64_t* words;           // few tokens: [tokens, segments, pitch], see gate.cu
  uint64_t* counter;         // few tokens: 65536 times the launches that have ended
  const float* bias;         // [experts] or null
  const void* table;         // hash routing: [vocab, k] int64 or int32, or null
  const int64_t* token_ids;  // [tokens]
  int64_t* ids;              // [tokens, k]
  float* weights;            // [tokens, k]
  int64_t table_stride;      // elements
  int64_t vocab;
  int64_t tokens;
  int experts;
  int k;
  int table_is_wide;
  int pitch;  // words of a token and a segment
  float route_scale;
};

// sqrt(softplus(logit)), or exp(logit / 2) below -20 with the logit at least -160: within 3e-7 of it. One
// exponential of a number that is not positive serves both; softplus is max(logit, 0) + log1p(u) with
// u = exp(-|logit|), and log1p(u) = 2 atanh(u / (2 + u)) has a short polynomial. No branch; NaN stays NaN.
__device__ __forceinline__ float score_of(float logit) {
  constexpr float kLog2eLow = 1.9259629911266175e-8f;  // log2(e) less its float32 value
  constexpr float kRound = 12582912.0f;                // 1.5 * 2^23: added, it rounds to an integer
  const bool low = logit < -20.0f;
  // Not below -80: a smaller power of two than 2^-126 would wrap around, and adds nothing to a softplus.
  const float y = fmaxf(low ? 0.5f * logit : -fabsf(logit), -80.0f);
  const float shifted = fmaf(y, kLog2e, kRound), power = shifted - kRound;
  const float rest = fmaf(y, kLog2eLow, fmaf(y, kLog2e, -power));
  const float u = __int_as_float(__float_as_int(exp2_fast(rest)) + (__float_as_int(shifted) << 23));
  float inverse, root;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(2.0f + u));
  const float s = u * inverse, z = s * s;
  float tail = 0.11619438230991364f;  // of atanh(s) / s = 1 + z / 3 + z^2 / 5 + .., fitted up to 1 / 9
  tail = fmaf(tail, z, 0.10851678997278214f);
  tail = fmaf(tail, z, 0.14296290278434753f);
  tail = fmaf(tail, z, 0.19999851286411285f);
  tail = fmaf(tail, z, 0.3333333432674408f);
  const float soft = fmaf(2.0f, fmaf(tail * z, s, s), fmaxf(logit, 0.0f));
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(soft));
  return logit != logit ? logit : low ? u : root;
}

// Orders as the value does; NaN is above all; never 0, which stands for an expert that is gone.
__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0xFFFFFFFFu;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The k largest keys one after the other; see `choose`.
template <int kPer>
__device__ __forceinline__ int choose_in_turn(uint32_t (&key)[kPer], int k, int lane) {
  int mine = 0;
  for (int i = 0; i < k; ++i) {
    uint32_t top = key[0];
#pragma unroll
    for (int j = 1; j < kPer; ++j) top = max(top, key[j]);
    const uint32_t best = __reduce_max_sync(kAll, top);
    const int owner = __ffs(static_cast<int>(__ballot_sync(kAll, top == best))) - 1;
    int slot = 0;
#pragma unroll
    for (int j = kPer - 1; j >= 0; --j) slot = key[j] == best ? j : slot;
    slot = __shfl_sync(kAll, slot, owner);
    const int gone = lane == owner ? slot : -1;
#pragma unroll
    for (int j = 0; j < kPer; ++j) key[j] = j == gone ? 0u : key[j];
    if (lane == i) mine = owner * kPer + slot;
  }
  return mine;
}

// Lane i < k gets the expert with the (i + 1)-th largest key, ties to the smaller expert. Lane l holds the
// keys of experts kPer * l .. : among equals the first lane, and in it the first key, is the smallest. No
// chosen key is below the k-th largest of the lanes' largest ones: few keys are left, and a lane ranks one.
template <int kPer>
__device__ __forceinline__ int choose(uint32_t (&key)[kPer], int k, int lane, uint64_t* room) {
  uint32_t rest = key[0], bar = 0;
#pragma unroll
  for (int j = 1; j < kPer; ++j) rest = max(rest, key[j]);
  for (int i = 0; i < k; ++i) {
    bar = __reduce_max_sync(kAll, rest);
    const int owner = __ffs(static_cast<int>(__ballot_sync(kAll, rest == bar))) - 1;
    rest = lane == owner ? 0u : rest;
  }
  int count = 0;
#pragma unroll
  for (int j = 0; j < kPer; ++j) count += key[j] >= bar ? 1 : 0;
  int place = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAll, place, step);
    place += lane >= step ? before : 0;
  }
  const int left = __shfl_sync(kAll, place, 31);
  if (bar == 0 || left > 32) return choose_in_turn<kPer>(key, k, lane);  // of all lanes
  place -= count;
  __syncwarp();  // what lies in the room has been read
  // Ordered as 64-bit numbers: the key above the expert's distance from the end.
  uint32_t at = smem_address(room + place);
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const uint32_t low = 0xFFFFFFFFu - (lane * kPer + j);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ge.u32 p, %1, %2;\n@p st.shared.v2.b32 [%0], {%3, %1};\n"
        "@p add.u32 %0, %0, 8;\n}"
        : "+r"(at)
        : "r"(key[j]), "r"(bar), "r"(low)
        : "memory");
  }
  __syncwarp();
  const uint64_t mine = lane < left ? room[lane] : 0;
  int rank = 0;
  for (int i = 0; i < left; ++i) rank += room[i] > mine ? 1 : 0;
  __syncwarp();
  if (rank < k) room[rank] = mine;  // lanes from `left` on rank behind all, and left >= k
  __syncwarp();
  return lane < k ? static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(room[lane])) : 0;
}

// Lane i < k gets column i of the token's row of the table; -1 for an expert, or a token, out of range.
__device__ __forceinline__ int listed(const Arguments& args, int64_t row, int lane) {
  if (lane >= args.k) return 0;
  const int64_t token = args.token_ids[row];
  if (token < 0 || token >= args.vocab) return -1;
  const int64_t at = token * args.table_stride + lane;
  const int64_t expert = args.table_is_wide ? static_cast<const int64_t*>(args.table)[at]
                                            : static_cast<const int32_t*>(args.table)[at];
  return expert < 0 || expert >= args.experts ? -1 : static_cast<int>(expert);
}

// Stores a row: lane i < k holds its (i + 1)-th choice and its score, the other lanes anything. With a
// negative choice the row's weights are NaN: no host sync could tell.
__device__ __forceinline__ void store_row(const Arguments& args, int64_t row, int lane, int expert,
                                          float score) {
  const bool wrong = __any_sync(kAll, lane < args.k && expert < 0);
  float total = 0.0f;
  int rank = 0;
  for (int i = 0; i < args.k; ++i) {
    const int other = __shfl_sync(kAll, expert, i);
    total += __shfl_sync(kAll, score, i);
    rank += other < expert || (other == expert && i < lane) ? 1 : 0;
  }
  if (lane >= args.k) return;
  const int64_t at = row * args.k + rank;
  args.ids[at] = wrong ? rank : expert;
  args.weights[at] = wrong ? __int_as_float(0x7FFFFFFF)
                           : __fmul_rn(__fdiv_rn(score, total), args.route_scale);
}

}  // namespace gate
}  // namespace causeway
