// index_score on fp8 tensor cores. Contract: kernels/index_score/api.py.
//
// Queries are bfloat16. Each (row, head) becomes e4m3 with a power-of-two scale that joins the head's
// weight; what e4m3 cannot hold goes to a second e4m3 term (never needed for FP4-rounded queries),
// which is multiplied only where a row has one, so a row's bits depend on that row alone.
// Keys are e4m3 with one power-of-two scale each, applied to the finished sum.
//
// A warpgroup holds 64 keys in registers (the A operand) and walks over the rows of its tile, two in one
// product, whose queries stay in shared memory. Bytes of a key go to registers in the order they lie in
// memory; the queries are stored in the matching order, and a dot product does not care.
#include <cuda_fp8.h>

#include "keys.cuh"
#include "launch.cuh"
#include "product.cuh"
#include "wgmma.cuh"

namespace causeway {

constexpr int kTermStep = kTermBytes >> 4;  // in a descriptor

template <int kRows>
struct Shape {
  static constexpr int kGroups = kRows == 8 ? 4 : 3;  // warpgroups
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kDepth = kRows == 8 ? 2 : kRows == 4 ? 6 : 3;  // tiles of a warp: read or on their way
};

template <int kRows>
struct ScoreSmem {
  alignas(1024) uint8_t q[2][kRows][kTermBytes];
  WarpKeys ring[Shape<kRows>::kThreads / 32][Shape<kRows>::kDepth];
  alignas(16) float w[kRows][kHeads];  // halved, in the order of weight_place
  int second[kRows];
  int limit[kRows];  // entries the row may see
  int seq[kRows];
};

// Lane t of a quad gets heads 8j + 2t and 8j + 2t + 1 of a product: 16 weights, 4 of them in one read.
__device__ __forceinline__ int weight_place(int head) {
  int j = head >> 3, t = (head >> 1) & 3;
  return ((j >> 1) * 4 + t) * 4 + (j & 1) * 2 + (head & 1);
}

// Queries on their way: of a few (row, head), 8 lanes each.
template <int kRows>
struct Queries {
  static constexpr int kStep = Shape<kRows>::kThreads / 8, kBatch = kRows == 1 ? 2 : 4;
  uint4 raw[kBatch][2];
  float weights[kBatch];

  __device__ __forceinline__ void fetch(const ScoreArgs& a, int first, int start) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      int i = start + b * kStep, row = i / kHeads, head = i % kHeads;
      bool real = i < kRows * kHeads && first + row < a.rows;
      const uint4* source = reinterpret_cast<const uint4*>(a.q + (int64_t)(first + row) * a.q_row +
                                                           head * a.q_head + (threadIdx.x & 7) * 16);
      raw[b][0] = real ? __ldg(source) : make_uint4(0, 0, 0, 0);
      raw[b][1] = real ? __ldg(source + 1) : make_uint4(0, 0, 0, 0);
      weights[b] = real ? __ldg(a.w + (int64_t)(first + row) * a.w_row + head) : 0.0f;
    }
  }

  // -> e4m3 terms in shared memory; whether any value needs the second one.
  __device__ __forceinline__ bool store(ScoreSmem<kRows>& s, const ScoreArgs& a, int start) const {
    int segment = threadIdx.x & 7, t = segment & 3;
    bool any = false;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      int i = start + b * kStep, row = i / kHeads, head = i % kHeads;
      if (i >= kRows * kHeads) break;
      float x[16];
      float top = 0.0f;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint32_t words[4] = {raw[b][part].x, raw[b][part].y, raw[b][part].z, raw[b][part].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[8 * part + 2 * j] = __uint_as_float(words[j] << 16);
          x[8 * part + 2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
        }
      }
#pragma unroll
      for (int j = 0; j < 16; ++j) top = fmaxf(top, fabsf(x[j]));
#pragma unroll
      for (int d = 1; d < 8; d <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      // top * 2^-shift in [128, 256): below e4m3's largest value, 448.
      int shift = max((int)(__float_as_uint(top) >> 23) - 127, -110) - 7;
      float down = __uint_as_float((uint32_t)(127 - shift) << 23);
      bool rest = false;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t terms[2] = {0, 0};
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          float2 v = make_float2(x[4 * j + 2 * pair] * down, x[4 * j + 2 * pair + 1] * down);
          uint32_t code = __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3);
          __half2_raw half = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)code, __NV_E4M3);
          float2 held = __half22float2(*reinterpret_cast<__half2*>(&half));
          float2 left = make_float2(v.x - held.x, v.y - held.y);
          rest |= left.x != 0.0f || left.y != 0.0f;
          terms[0] |= code << (16 * pair);
          terms[1] |= (uint32_t)__nv_cvt_float2_to_fp8x2(left, __NV_SATFINITE, __NV_E4M3) << (16 * pair);
        }
        int at = head * kDim + (((j + (segment & 4)) ^ (head & 7)) << 4) + t * 4;
        *reinterpret_cast<uint32_t*>(&s.q[0][row][at]) = terms[0];
        *reinterpret_cast<uint32_t*>(&s.q[1][row][at]) = terms[1];
      }
      if (rest) s.second[row] = 1;
      any |= rest;
      if (segment == 0) {
        float weight = weights[b];
        if (a.w_scale != 0.0f) weight = __bfloat162float(__float2bfloat16_rn(weight)) * a.w_scale;
        s.w[row][weight_place(head)] = weight * __uint_as_float((uint32_t)(126 + shift) << 23);
      }
    }
    return any;
  }
};

// Starts the product of the keys with one row of queries (32 sums a thread), or two (64). `queries`: the low
// word of their descriptor; the high one never changes, which spares 64-bit sums.
template <int kDots>
__device__ __forceinline__ void start_dots(float (&dots)[kDots], const KeyTile& k, uint32_t queries,
                                           int accumulate) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t a0 = k.words[0][2 * step], a1 = k.words[1][2 * step];
    uint32_t a2 = k.words[0][2 * step + 1], a3 = k.words[1][2 * step + 1];
    uint64_t here = (uint64_t)(uint32_t)(desc_k_major(0) >> 32) << 32 | (queries + step * (32 >> 4));
    if constexpr (kDots == 64) {
      mma_m64n128k32_e4m3_rs(dots, a0, a1, a2, a3, here, step > 0 || accumulate);
    } else {
      mma_m64n64k32_e4m3_rs(dots, a0, a1, a2, a3, here, step > 0 || accumulate);
    }
  }
  wgmma_commit();
}

// Exact, NaN stays NaN, and an addition runs at twice the rate of a maximum.
__device__ __forceinline__ float twice_relu(float x) { return x + fabsf(x); }

// This thread's share of sum_h relu(dot) * w for its two keys, from its 32 sums of one row; the weights in
// memory are halved.
__device__ __forceinline__ void weigh(const float* dots, const float* w, float& low, float& high) {
  const float4* quads = reinterpret_cast<const float4*>(w) + (threadIdx.x & 3);
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float4 four = quads[4 * (j >> 1)];
    float2 x = j & 1 ? make_float2(four.z, four.w) : make_float2(four.x, four.y);
    a = fmaf(twice_relu(dots[4 * j]), x.x, a);
    c = fmaf(twice_relu(dots[4 * j + 2]), x.x, c);
    b = fmaf(twice_relu(dots[4 * j + 1]), x.y, b);
    d = fmaf(twice_relu(dots[4 * j + 3]), x.y, d);
  }
  low = a + b;
  high = c + d;
}

// Sums over the 4 lanes of a quad; lane t ends up with value t of the four.
__device__ __forceinline__ float reduce_four(const float (&v)[4]) {
  int t = threadIdx.x & 3;
  float a = (t & 1 ? v[1] : v[0]) + __shfl_xor_sync(~0u, t & 1 ? v[0] : v[1], 1);
  float b = (t & 1 ? v[3] : v[2]) + __shfl_xor_sync(~0u, t & 1 ? v[2] : v[3], 1);
  return (t & 2 ? b : a) + __shfl_xor_sync(~0u, t & 2 ? a : b, 2);
}

// To the place of `entry`. `limit`: entries the row may see; below 0: no row of this run, nothing is written.
__device__ __forceinline__ void put(const ScoreArgs& a, float* place, int limit, int entry, float value,
                                    float scale) {
  int end = a.fill && limit >= 0 ? a.width : limit;
  if (entry >= end) return;
  bool shown = entry < limit && scale == scale;
  *place = shown ? value * scale : kNegInf;
}

// Product with the second terms of a row, one after the other (queries that were never rounded).
__device__ __forceinline__ void both_terms(float (&dots)[32], const KeyTile& keys, uint32_t first,
                                           uint32_t second, bool has_second) {
  start_dots(dots, keys, first, 0);
  wgmma_wait<0>();
  if (has_second) {
    start_dots(dots, keys, second, 1);
    wgmma_wait<0>();
  }
  fence_regs(dots);
}

// Scores of 64 keys against all rows of the tile, two at a time: lane t of a quad writes for row t & 1 and
// half t >> 1 of the keys, while the next product runs. `limit`: those of this lane's rows. out: its first row.
template <int kRows, bool kSecond>
__device__ __forceinline__ void score_tile(const ScoreArgs& a, const ScoreSmem<kRows>& s,
                                           const KeyTile& keys, uint32_t queries, float* out,
                                           const int (&limit)[kRows / 2], int entry) {
  bool upper = threadIdx.x & 2;
  float scale = upper ? keys.scale[1] : keys.scale[0];
  entry += upper ? 8 : 0;
  out += entry;
  float v[4];
  auto put_pair = [&](int pair) {
    put(a, out, limit[pair], entry, reduce_four(v), scale);
    out += 2 * a.out_row;
  };
#pragma unroll
  for (int pair = 0; pair < kRows / 2; ++pair) {
    if constexpr (kSecond) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int row = 2 * pair + r;
        float dots[32];
        both_terms(dots, keys, queries + row * kTermStep, queries + (kRows + row) * kTermStep,
                   __shfl_sync(~0u, s.second[row], 0));
        weigh(dots, s.w[row], v[r], v[2 + r]);
      }
      put_pair(pair);
    } else {
      float dots[64];
      start_dots(dots, keys, queries + 2 * pair * kTermStep, 0);
      // Always true, which the compiler does not know: without the branch it puts this between the instructions of
      // the product, which then wait for it.
      if (pair > 0 && a.rows > 0) put_pair(pair - 1);
      wgmma_wait<0>();
      fence_regs(dots);
      weigh(dots, s.w[2 * pair], v[0], v[2]);
      weigh(dots + 32, s.w[2 * pair + 1], v[1], v[3]);
    }
  }
  if constexpr (!kSecond) put_pair(kRows / 2 - 1);
}

// The same for one row, with the same bits.
template <int kRows, bool kSecond>
__device__ __forceinline__ void score_row(const ScoreArgs& a, const ScoreSmem<kRows>& s,
                                          const KeyTile& keys, uint32_t queries, float* out, int row,
                                          int limit, int entry) {
  float dots[32], v[2];
  if constexpr (kSecond) {
    both_terms(dots, keys, queries + row * kTermStep, queries + (kRows + row) * kTermStep,
               __shfl_sync(~0u, s.second[row], 0));
  } else {
    start_dots(dots, keys, queries + row * kTermStep, 0);
    wgmma_wait<0>();
    fence_regs(dots);
  }
  weigh(dots, s.w[row], v[0], v[1]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    v[half] += __shfl_xor_sync(~0u, v[half], 1);
    v[half] += __shfl_xor_sync(~0u, v[half], 2);
    if ((threadIdx.x & 3) == half) put(a, out + entry + 8 * half, limit, entry + 8 * half, v[half], keys.scale[half]);
  }
}

// What a block works on: rows from `first` on, tile `begin` of its first warpgroup, the next one further.
struct Work {
  int first, count, begin, stride;
};

// Rows of one sequence, and the entries that any of them may see.
struct Run {
  int from, to, limit;
};

template <int kRows>
__device__ __forceinline__ Run run_from(const ScoreSmem<kRows>& s, int from, int count) {
  int limit = s.limit[from], to = from + 1;
  for (; to < count && s.seq[to] == s.seq[from]; ++to) limit = max(limit, s.limit[to]);
  return {from, __shfl_sync(~0u, to, 0), __shfl_sync(~0u, limit, 0)};
}

// Scores of all runs; the keys of the first are on their way.
template <int kRows, bool kTogether, bool kSecond>
__device__ __forceinline__ void score_runs(const ScoreArgs& a, ScoreSmem<kRows>& s,
                                           KeyStream<Shape<kRows>::kDepth, kTogether>& stream, uint32_t queries,
                                           const Work& work, Run run) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, key = 16 * warp + (lane >> 2);
  while (true) {
    int from = run.from, to = run.to, limit = run.limit;
    KeyTile keys;
    if (kRows == 1 || (kRows == 4 && to - from == 1)) {
      float* out = a.out + (int64_t)(work.first + from) * a.out_row;
      for (int tile = work.begin; tile < limit; tile += work.stride) {
        stream.take(keys, a, tile);
        score_row<kRows, kSecond>(a, s, keys, queries, out, from, limit, tile + key);
      }
    } else if constexpr (kRows > 1) {
      int parity = lane & 1, limits[kRows / 2];
#pragma unroll
      for (int pair = 0; pair < kRows / 2; ++pair) {
        int row = 2 * pair + parity;
        limits[pair] = row >= from && row < to ? s.limit[row] : -1;
      }
      float* out = a.out + (int64_t)(work.first + parity) * a.out_row;
      for (int tile = work.begin; tile < limit; tile += work.stride) {
        stream.take(keys, a, tile);
        score_tile<kRows, kSecond>(a, s, keys, queries, out, limits, tile + key);
      }
    }
    stream.close();
    for (int tile = work.begin; a.fill && tile < a.width; tile += work.stride) {
      if (tile < limit) continue;
      for (int row = from + warp; row < to; row += 4) {
        float* out = a.out + (int64_t)(work.first + row) * a.out_row;
        if (tile + lane < a.width) out[tile + lane] = kNegInf;
        if (tile + 32 + lane < a.width) out[tile + 32 + lane] = kNegInf;
      }
    }
    if (to >= work.count) return;
    run = run_from(s, to, work.count);
    stream.open(a, s.seq[run.from], work.begin, run.limit);
  }
}

template <int kRows, bool kTogether>
__global__ void __launch_bounds__(Shape<kRows>::kThreads, kRows == 1 ? 2 : 1)
    index_score_kernel(const ScoreArgs a) {
  constexpr int kGroups = Shape<kRows>::kGroups;
  // May start while the kernel ahead ends; the one behind (the selection) may do so as well.
  await_inputs();
  extern __shared__ uint8_t raw[];
  ScoreSmem<kRows>& s =
      *reinterpret_cast<ScoreSmem<kRows>*>(raw + ((1024 - (smem_address(raw) & 1023)) & 1023));
  int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
  // The first tiles of rows are not cut. Parts of the others that have work, the first ones, come first.
  int block = (int)blockIdx.x, behind = max(block - a.coarse, 0), rest = max(a.tiles - a.coarse, 1);
  int tile = block < a.coarse ? block : a.coarse + behind % rest, part = behind / rest;
  int parts = block < a.coarse ? 1 : a.fine;
  Work work = {tile * kRows, min(kRows, a.rows - tile * kRows), (part * kGroups + group) * kTile,
               parts * kGroups * kTile};
  Queries<kRows> queries;
  int start = threadIdx.x >> 3;
  if constexpr (kRows > 1) queries.fetch(a, work.first, start);
  int row = kRows == 1 ? 0 : (int)threadIdx.x, seq = -1, limit = 0;
  if (row < work.count) {
    int64_t own = a.row_seq[work.first + row], seen = a.num_entries[work.first + row];
    seq = (int)max(own, (int64_t)-1);
    limit = own < 0 ? 0 : (int)min(max(seen, (int64_t)0), (int64_t)a.width);
  }
  KeyStream<Shape<kRows>::kDepth, kTogether> stream;
  stream.ring = s.ring[threadIdx.x >> 5];
  stream.stride = work.stride;
  Run run = {0, 1, limit};
  if constexpr (kRows == 1) {
    if (!a.fill && part * kGroups * kTile >= limit) return;
    queries.fetch(a, work.first, start);
    stream.open(a, seq, work.begin, limit);
  }
  if (threadIdx.x < kRows) s.limit[threadIdx.x] = limit, s.seq[threadIdx.x] = seq, s.second[threadIdx.x] = 0;
  __syncthreads();
  if constexpr (kRows > 1) {
    run = run_from(s, 0, work.count);
    stream.open(a, s.seq[0], work.begin, run.limit);
  }
  bool second = queries.store(s, a, start);
  for (start += queries.kBatch * queries.kStep; start < kRows * kHeads; start += queries.kBatch * queries.kStep) {
    queries.fetch(a, work.first, start);
    second |= queries.store(s, a, start);
  }
  fence_async_proxy();
  uint32_t low = (uint32_t)desc_k_major(smem_address(s.q));
  if (__syncthreads_or(second)) {
    score_runs<kRows, kTogether, true>(a, s, stream, low, work, run);
  } else {
    score_runs<kRows, kTogether, false>(a, s, stream, low, work, run);
  }
}

template <int kRows>
int launch(ScoreArgs a, cudaStream_t stream) {
  // A warp's 16 keys lie together, at addresses that 16 bytes divide.
  bool together = ((uintptr_t)a.pool | (uintptr_t)a.page_stride | (uintptr_t)a.per_page) % 16 == 0;
  auto kernel = together ? index_score_kernel<kRows, true> : index_score_kernel<kRows, false>;
  int bytes = sizeof(ScoreSmem<kRows>) + 1024;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  a.tiles = (a.rows + kRows - 1) / kRows;
  int blocks = a.coarse + (a.tiles - a.coarse) * a.fine;
  return EarlyLaunch{blocks, Shape<kRows>::kThreads, stream, bytes}.start(kernel, a);
}

}  // namespace causeway

extern "C" int causeway_index_score(const void* q, int64_t q_row, int64_t q_head, const float* w,
                                    int64_t w_row, const uint8_t* pool, int64_t page_stride, int per_page,
                                    const int32_t* block_table, int64_t table_row, const int64_t* row_seq,
                                    const int64_t* num_entries, float* out, int64_t out_row, int rows,
                                    int width, int fill, float w_scale, int tile_rows, int coarse, int fine,
                                    cudaStream_t stream) {
  int shift = per_page & (per_page - 1) ? -1 : __builtin_ctz((unsigned)per_page);
  causeway::ScoreArgs a = {static_cast<const __nv_bfloat16*>(q), q_row,   q_head,      w,   w_row,   pool,
                           page_stride, per_page, shift, block_table, table_row, row_seq, num_entries, out,
                           out_row, rows, width, fill, w_scale, coarse, fine, 0};
  if (tile_rows == 1) return causeway::launch<1>(a, stream);
  if (tile_rows == 4) return causeway::launch<4>(a, stream);
  if (tile_rows == 8) return causeway::launch<8>(a, stream);
  return (int)cudaErrorInvalidValue;
}
