// Decode: the second kernel, which merges the chunks of a row.
#pragma once
#include "decode_plan.cuh"
#include "hopper.cuh"

namespace causeway {

// Eight columns of a head, of the chunks seen so far. Chunks come in ascending order.
struct ColumnSum {
  float top, total = 0.0f, sum[8] = {};  // top: of all chunks

  __device__ __forceinline__ void add(float2 stats, uint4 v) {
    float weight = stats.x == kNegInf ? 0.0f : exp2_fast(stats.x - top);
    total = fmaf(weight, stats.y, total);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] = fmaf(weight, __uint_as_float(words[i] << 16), sum[2 * i]);
      sum[2 * i + 1] = fmaf(weight, __uint_as_float(words[i] & 0xffff0000u), sum[2 * i + 1]);
    }
  }
  __device__ __forceinline__ void store(const DecodeArgs& a, int64_t row, int head, int column) const {
    float factor = finish(a, row, head, top, total, column == 0);
    uint4 packed = make_uint4(pack_bf16(sum[0] * factor, sum[1] * factor), pack_bf16(sum[2] * factor, sum[3] * factor),
                              pack_bf16(sum[4] * factor, sum[5] * factor), pack_bf16(sum[6] * factor, sum[7] * factor));
    reinterpret_cast<uint4*>(a.o + (row * a.heads + head) * kDim)[column] = packed;
  }
};

constexpr int kMergeHeads = 4;  // of a block, where there are enough for all multiprocessors

// Merges the chunks of a row, 64 threads per head, 8 columns each, chunks in order. Launched early: what
// the decode kernel waited for is there, its own results are waited for here.
template <int kKeys>
__global__ void __launch_bounds__(64 * kMergeHeads) merge_chunks_kernel(const __grid_constant__ DecodeArgs a) {
  cudaTriggerProgrammaticLaunchCompletion();
  constexpr int kBatch = 8;  // chunks whose loads are under way at once
  extern __shared__ float2 shared_stats[];  // maximum and sum of each chunk, for each head
  int first = blockIdx.x * blockDim.y, row = first / a.heads, head = first % a.heads + threadIdx.y;
  int column = threadIdx.x;
  int chunks = count_chunks<kKeys>(a, RowFacts(a, row).limit(a));
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
  float2* stats = shared_stats + threadIdx.y * chunks;
  if (chunks <= 1) return;  // finished by its only block
  load(0);
  for (int c = threadIdx.x; c < chunks; c += 64) stats[c] = __ldcg(a.stats + slot + (int64_t)c * a.tile_heads);
  __syncthreads();
  ColumnSum columns = {kNegInf};
  for (int c = 0; c < chunks; ++c) columns.top = fmaxf(columns.top, stats[c].x);
  for (int first = 0; first < chunks; first += kBatch) {
    if (first > 0) load(first);
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (first + c >= chunks) break;
      columns.add(stats[first + c], v[c]);
    }
  }
  columns.store(a, row, head, column);
}

}  // namespace causeway
