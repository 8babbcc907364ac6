// Decode: the second kernel, which merges the chunks of a row.
#pragma once
#include "decode_plan.cuh"
#include "hopper.cuh"

namespace causeway {

// Merges the chunks of a row, 64 threads per head, 8 columns each, chunks in order. Launched early: what
// the decode kernel waited for is there, its own results are waited for here.
__global__ void __launch_bounds__(64) merge_chunks_kernel(const __grid_constant__ DecodeArgs a) {
  constexpr int kBatch = 8;  // chunks whose loads are under way at once
  extern __shared__ float2 stats[];  // maximum and sum of each chunk
  int row = blockIdx.x / a.heads, head = blockIdx.x % a.heads, column = threadIdx.x;
  int64_t seq;
  int chunks = count_chunks(a, seen_entries(a, row, seq));
  int64_t slot = ((int64_t)row * a.tiles + head / kHeadTile) * a.chunks * a.tile_heads + head % kHeadTile;
  const uint4* partial = reinterpret_cast<const uint4*>(a.partial + slot * kDim) + column;
  uint4 v[kBatch];
  auto load = [&](int first) {
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (first + c < chunks) v[c] = __ldcg(partial + (int64_t)(first + c) * a.tile_heads * (kDim / 8));
    }
  };
  cudaGridDependencySynchronize();  // also where there is nothing to do: a later kernel waits for this one only
  if (chunks <= 1) return;          // finished by its only block
  load(0);
  for (int c = threadIdx.x; c < chunks; c += 64) stats[c] = __ldcg(a.stats + slot + (int64_t)c * a.tile_heads);
  __syncthreads();
  float top = kNegInf, total = 0.0f, sum[8] = {};
  for (int c = 0; c < chunks; ++c) top = fmaxf(top, stats[c].x);
  for (int first = 0; first < chunks; first += kBatch) {
    if (first > 0) load(first);
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (first + c >= chunks) break;
      float2 own = stats[first + c];
      float weight = own.x == kNegInf ? 0.0f : exp2_fast(own.x - top);
      total = fmaf(weight, own.y, total);
      const uint32_t words[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[2 * i] = fmaf(weight, __uint_as_float(words[i] << 16), sum[2 * i]);
        sum[2 * i + 1] = fmaf(weight, __uint_as_float(words[i] & 0xffff0000u), sum[2 * i + 1]);
      }
    }
  }
  float factor = finish(a, row, head, top, total, column == 0);
  uint4 packed = make_uint4(pack_bf16(sum[0] * factor, sum[1] * factor), pack_bf16(sum[2] * factor, sum[3] * factor),
                            pack_bf16(sum[4] * factor, sum[5] * factor), pack_bf16(sum[6] * factor, sum[7] * factor));
  reinterpret_cast<uint4*>(a.o + ((int64_t)row * a.heads + head) * kDim)[column] = packed;
}

}  // namespace causeway
