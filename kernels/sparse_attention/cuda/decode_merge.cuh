// Decode: the second kernel, which merges the chunks of a row.
#pragma once
#include "decode_plan.cuh"
#include "hopper.cuh"

namespace causeway {

// Warps of a block: one piece of 32 columns each, of the same 8 heads.
template <int kKeys>
constexpr int kMergeWarps = kKeys == kChunk ? 4 : 8;

// Merges the chunks of a row, in order. Launched early: what the decode kernel waited for is there, its own results
// are waited for here. Reads wait neither for the weights nor for what the tables say: chunks that do not exist are
// read, and not used.
template <int kKeys>
__global__ void __launch_bounds__(32 * kMergeWarps<kKeys>, kKeys == kChunk ? 8 : 2)
    merge_chunks_kernel(const __grid_constant__ DecodeArgs a) {
  cudaTriggerProgrammaticLaunchCompletion();
  constexpr int kBatch = kKeys == kChunk ? 4 : 8;  // chunks whose loads are under way at once
  int lane = threadIdx.x & 31, t = lane & 3, blocks = a.tile_heads / 8;
  int row = a.tiles == 1 ? blockIdx.x : blockIdx.x / (unsigned)a.tiles, tile = blockIdx.x - row * a.tiles;
  int block = blockIdx.y, piece = blockIdx.z * kMergeWarps<kKeys> + threadIdx.x / 32;
  int line = 8 * block + (lane >> 2), head = tile * kHeadTile + line;
  RowFacts facts(a, row);
  int64_t slot = (int64_t)blockIdx.x * a.chunks;
  const uint4* partial = a.partial + (slot * blocks + block) * kLineBlock + piece * 32 + lane;
  int step = blocks * kLineBlock;  // between chunks
  const float2* stats = a.stats + slot * a.tile_heads + line;
  uint4 v[kBatch];
  float2 own[kBatch / 4];  // maximum and sum of chunks t, t + 4..
  auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kBatch / 4; ++i) {
      int c = first + 4 * i + t;
      if (c < a.chunks) own[i] = __ldcg(stats + (int64_t)c * a.tile_heads);
    }
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (first + c < a.chunks) v[c] = __ldcg(partial + c * step);
    }
  };
  cudaGridDependencySynchronize();  // also where there is nothing to do: a later kernel waits for this one only
  load(0);
  float sink = sink_of(a, head);
  int chunks = count_chunks<kKeys>(a, facts.limit(a));
  if (chunks <= 1) return;  // finished by its only block
  float top = kNegInf, total = 0.0f, sum[8] = {};
#pragma unroll 4
  for (int c = kBatch + t; c < chunks; c += 4) top = fmaxf(top, __ldcg(&stats[(int64_t)c * a.tile_heads].x));
#pragma unroll
  for (int i = 0; i < kBatch / 4; ++i) top = fmaxf(top, 4 * i + t < chunks ? own[i].x : kNegInf);
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  for (int first = 0; first < chunks; first += kBatch) {
    if (first > 0) partial += kBatch * step, load(first);
    float weights[kBatch / 4];
#pragma unroll
    for (int i = 0; i < kBatch / 4; ++i) {
      float nothing = own[i].y == own[i].y ? 0.0f : own[i].y;  // NaN stays: the maximum does not show it
      weights[i] = own[i].x == kNegInf ? nothing : exp2_fast(own[i].x - top);
    }
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (first + c >= chunks) break;
      float weight = __shfl_sync(~0u, weights[c / 4], (lane & ~3) | (c & 3));
      total = fmaf(weight, __shfl_sync(~0u, own[c / 4].y, (lane & ~3) | (c & 3)), total);
      const uint32_t words[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        sum[2 * u] = fmaf(weight, __uint_as_float(words[u] << 16), sum[2 * u]);
        sum[2 * u + 1] = fmaf(weight, __uint_as_float(words[u] & 0xffff0000u), sum[2 * u + 1]);
      }
    }
  }
  bool exists = head < a.heads;
  float factor = exists ? finish(a, row, head, top, total, sink, t == 0 && piece == 0) : 0.0f;
  uint32_t w[4];
#pragma unroll
  for (int u = 0; u < 4; ++u) w[u] = pack_bf16(sum[2 * u] * factor, sum[2 * u + 1] * factor);
  uint4 packed = quad_transpose(w[0], w[1], w[2], w[3]);
  if (exists) reinterpret_cast<uint4*>(a.o + ((int64_t)row * a.heads + head) * kDim + 32 * piece)[t] = packed;
}

}  // namespace causeway
