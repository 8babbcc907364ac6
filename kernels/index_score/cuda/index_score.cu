// index_score on fp8 tensor cores. Contract: kernels/index_score/api.py.
//
// Queries are bfloat16. Each (row, head) becomes e4m3 with a power-of-two scale that joins the head's
// weight; what e4m3 cannot hold goes to a second e4m3 term (never needed for FP4-rounded queries),
// which is multiplied only where a row has one, so a row's bits depend on that row alone.
// Keys are e4m3 with one power-of-two scale each, applied to the finished sum.
//
// A warpgroup holds 64 keys in registers (the A operand) and walks over the rows of its tile, whose
// queries stay in shared memory. Bytes of a key go to registers in the order they lie in memory; the
// queries are stored in the matching order, and a dot product does not care.
#include <cuda_fp8.h>

#include "keys.cuh"
#include "wgmma.cuh"

namespace causeway {

template <int kRows>
struct ScoreSmem {
  static constexpr int kDepth = kRows == 4 ? 6 : 3;  // tiles in flight where one row meets its keys
  alignas(1024) uint8_t q[2][kRows][kTermBytes];
  WarpKeys ring[kThreads / 32][kDepth];
  float w[kRows][kHeads];
  int second[kRows];
  int limit[kRows];  // entries the row may see
  int seq[kRows];
};

// Queries of the tile's rows -> e4m3 terms in shared memory; 8 lanes per (row, head).
template <int kRows>
__device__ bool load_queries(ScoreSmem<kRows>& s, const ScoreArgs& a, int first) {
  int segment = threadIdx.x & 7;
  bool any = false;
  for (int i = threadIdx.x >> 3; i < kRows * kHeads; i += kThreads / 8) {
    int row = i / kHeads, head = i % kHeads;
    bool real = first + row < a.rows;
    float x[16];
    float top = 0.0f;
    const uint4* source = reinterpret_cast<const uint4*>(a.q + (int64_t)(first + row) * a.q_row +
                                                         head * a.q_head + segment * 16);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint4 v = real ? __ldg(source + part) : make_uint4(0, 0, 0, 0);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
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
    int t = segment & 3, swizzle = head & 7;
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
      int word = j + (segment & 4);
      int at = head * kDim + ((word ^ swizzle) << 4) + t * 4;
      *reinterpret_cast<uint32_t*>(&s.q[0][row][at]) = terms[0];
      *reinterpret_cast<uint32_t*>(&s.q[1][row][at]) = terms[1];
    }
    if (rest) s.second[row] = 1;
    any |= rest;
    if (segment == 0) {
      float weight = real ? a.w[(int64_t)(first + row) * a.w_row + head] : 0.0f;
      if (a.w_scale != 0.0f) weight = __bfloat162float(__float2bfloat16_rn(weight)) * a.w_scale;
      s.w[row][head] = weight * __uint_as_float((uint32_t)(126 + shift) << 23);
    }
  }
  return any;
}

__device__ __forceinline__ void start_dots(float (&dots)[32], const KeyTile& k, uint32_t queries,
                                           int accumulate) {
  uint64_t b = desc_k_major(queries);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    mma_m64n64k32_e4m3_rs(dots, k.words[0][2 * step], k.words[1][2 * step], k.words[0][2 * step + 1],
                          k.words[1][2 * step + 1], desc_advance(b, step * 32),
                          step > 0 || accumulate);
  }
  wgmma_commit();
}

// Exact, NaN stays NaN, and an addition runs at twice the rate of a maximum.
__device__ __forceinline__ float twice_relu(float x) { return x + fabsf(x); }

// This thread's share of sum_h relu(dot) * w for its two keys; the weights in memory are halved.
__device__ __forceinline__ void weigh(const float (&dots)[32], const float* w, float& low, float& high) {
  const float2* pairs = reinterpret_cast<const float2*>(w) + (threadIdx.x & 3);
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float2 x = pairs[4 * j];
    a = fmaf(twice_relu(dots[4 * j]), x.x, a);
    b = fmaf(twice_relu(dots[4 * j + 1]), x.y, b);
    c = fmaf(twice_relu(dots[4 * j + 2]), x.x, c);
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

template <int kRows>
__device__ __forceinline__ void put(const ScoreArgs& a, const ScoreSmem<kRows>& s, int first, int row,
                                    int entry, float value, bool shown) {
  if (entry >= a.width) return;
  bool visible = entry < s.limit[row];
  if (!visible && !a.fill) return;
  if (!visible || !shown) value = kNegInf;
  a.out[(int64_t)(first + row) * a.out_row + entry] = value;
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
}

// Scores of 64 keys against rows [from, to) of the tile. Without second terms the product of the next
// row runs while a row is weighed.
template <int kRows, bool kSecond>
__device__ __forceinline__ void score_tile(const ScoreArgs& a, const ScoreSmem<kRows>& s,
                                           const KeyTile& keys, uint32_t q_base, int first, int from,
                                           int to, int entry) {
  int t = threadIdx.x & 3;
  bool here[2] = {keys.scale[0] == keys.scale[0], keys.scale[1] == keys.scale[1]};
  float dots[2][32], low[4], high[4];
  if constexpr (!kSecond) start_dots(dots[0], keys, q_base, 0);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if constexpr (kSecond) {
      both_terms(dots[row & 1], keys, q_base + row * kTermBytes, q_base + (kRows + row) * kTermBytes,
                 __shfl_sync(~0u, s.second[row], 0));
    } else if (row + 1 < kRows) {
      start_dots(dots[(row + 1) & 1], keys, q_base + (row + 1) * kTermBytes, 0);
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    fence_regs(dots[row & 1]);
    weigh(dots[row & 1], s.w[row], low[row & 3], high[row & 3]);
    if ((row & 3) == 3) {
      float v[2] = {reduce_four(low), reduce_four(high)};
      int mine = row - 3 + t;
      if (mine >= from && mine < to) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          put<kRows>(a, s, first, mine, entry + 8 * half, v[half] * keys.scale[half], here[half]);
        }
      }
    }
  }
}

// The same for one row, with the same bits.
template <int kRows, bool kSecond>
__device__ __forceinline__ void score_row(const ScoreArgs& a, const ScoreSmem<kRows>& s,
                                          const KeyTile& keys, uint32_t q_base, int first, int row,
                                          int entry) {
  float dots[32], v[2];
  if constexpr (kSecond) {
    both_terms(dots, keys, q_base + row * kTermBytes, q_base + (kRows + row) * kTermBytes,
               __shfl_sync(~0u, s.second[row], 0));
  } else {
    start_dots(dots, keys, q_base + row * kTermBytes, 0);
    wgmma_wait<0>();
  }
  fence_regs(dots);
  weigh(dots, s.w[row], v[0], v[1]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    v[half] += __shfl_xor_sync(~0u, v[half], 1);
    v[half] += __shfl_xor_sync(~0u, v[half], 2);
    if ((threadIdx.x & 3) == half) {
      put<kRows>(a, s, first, row, entry + 8 * half, v[half] * keys.scale[half],
                 keys.scale[half] == keys.scale[half]);
    }
  }
}

// One row against all its keys: memory decides, so each warp keeps several tiles on their way.
template <int kRows, bool kSecond>
__device__ __forceinline__ void stream_row(const ScoreArgs& a, ScoreSmem<kRows>& s, uint32_t q_base,
                                           const int32_t* table, int first, int row, int begin, int stride,
                                           int limit, bool aligned) {
  constexpr int kDepth = ScoreSmem<kRows>::kDepth;
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  WarpKeys* ring = s.ring[threadIdx.x >> 5];
  bool together = aligned && a.per_page % 16 == 0;
  int own = 16 * warp + (together ? 0 : lane & 15);
  auto start = [&](WarpKeys& to, Place place) {
    if (together) {
      start_page_keys(to, a, place);
    } else {
      start_keys(to, a, place, aligned);
    }
  };
  Place place[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) place[d] = find_key(a, table, begin + d * stride + own, limit);
#pragma unroll
  for (int d = 0; d < kDepth - 1; ++d) {
    if (begin + d * stride < limit) start(ring[d], place[d]);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  Place next = place[kDepth - 1];
  int slot = 0, ahead = kDepth - 1;
  for (int tile = begin; tile < limit; tile += stride) {
    if (tile + (kDepth - 1) * stride < limit) start(ring[ahead], next);
    asm volatile("cp.async.commit_group;\ncp.async.wait_group %0;" ::"n"(kDepth - 1) : "memory");
    next = find_key(a, table, tile + kDepth * stride + own, limit);
    __syncwarp();
    KeyTile keys;
    read_keys(keys, ring[slot]);
    __syncwarp();
    score_row<kRows, kSecond>(a, s, keys, q_base, first, row, tile + 16 * warp + (lane >> 2));
    slot = slot + 1 == kDepth ? 0 : slot + 1;
    ahead = ahead + 1 == kDepth ? 0 : ahead + 1;
  }
  copies_wait_all();
  __syncwarp();
}

template <int kRows, bool kSecond>
__device__ __forceinline__ void score_runs(const ScoreArgs& a, ScoreSmem<kRows>& s,
                                           uint32_t q_base, int first, int count) {
  bool aligned = ((uintptr_t)a.pool | (uintptr_t)a.page_stride) % 16 == 0;
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
  int stride = gridDim.y * kGroups * kTile, begin = (blockIdx.y * kGroups + group) * kTile;
  for (int from = 0, to; from < count; from = to) {  // runs of rows of one sequence
    int limit = s.limit[from];
    for (to = from + 1; to < count && s.seq[to] == s.seq[from]; ++to) limit = max(limit, s.limit[to]);
    to = __shfl_sync(~0u, to, 0);
    limit = __shfl_sync(~0u, limit, 0);
    const int32_t* table = a.block_table + (int64_t)max(s.seq[from], 0) * a.table_row;
    if (kRows == 1 || (kRows == 4 && to - from == 1)) {
      stream_row<kRows, kSecond>(a, s, q_base, table, first, from, begin, stride, limit, aligned);
    } else if constexpr (kRows > 1) {
      KeyTile keys, next;
      load_keys(keys, a, table, begin, limit, aligned);
      for (int tile = begin; tile < limit; tile += stride) {
        load_keys(next, a, table, tile + stride, limit, aligned);
        score_tile<kRows, kSecond>(a, s, keys, q_base, first, from, to, tile + 16 * warp + (lane >> 2));
        keys = next;
      }
    }
    if (!a.fill) continue;
    int tile = begin < limit ? begin + (limit - begin + stride - 1) / stride * stride : begin;
    for (; tile < a.width; tile += stride) {
      for (int row = from + warp; row < to; row += 4) {
        float* out = a.out + (int64_t)(first + row) * a.out_row;
        if (tile + lane < a.width) out[tile + lane] = kNegInf;
        if (tile + 32 + lane < a.width) out[tile + 32 + lane] = kNegInf;
      }
    }
  }
}

template <int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 2 : 1) index_score_kernel(const ScoreArgs a) {
  // May start while the kernel ahead ends; the one behind (the selection) may do so as well.
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
  extern __shared__ uint8_t raw[];
  ScoreSmem<kRows>& s =
      *reinterpret_cast<ScoreSmem<kRows>*>(raw + ((1024 - (smem_address(raw) & 1023)) & 1023));
  uint32_t q_base = smem_address(s.q);
  int first = blockIdx.x * kRows, count = min(kRows, a.rows - first);
  bool second = false;
  if (threadIdx.x < kRows) {
    int row = threadIdx.x;
    bool real = row < count;
    int64_t seq = real ? a.row_seq[first + row] : -1;
    int64_t limit = real ? a.num_entries[first + row] : 0;
    s.second[row] = 0;
    s.seq[row] = (int)max(seq, (int64_t)-1);
    s.limit[row] = seq < 0 ? 0 : (int)min(max(limit, (int64_t)0), (int64_t)a.width);
  }
  __syncthreads();
  second = load_queries<kRows>(s, a, first);
  fence_async_proxy();
  if (__syncthreads_or(second)) {
    score_runs<kRows, true>(a, s, q_base, first, count);
  } else {
    score_runs<kRows, false>(a, s, q_base, first, count);
  }
}

template <int kRows>
int launch(const ScoreArgs& a, int parts, cudaStream_t stream) {
  auto kernel = index_score_kernel<kRows>;
  int bytes = sizeof(ScoreSmem<kRows>) + 1024;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((a.rows + kRows - 1) / kRows, parts);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return (int)cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace causeway

extern "C" int causeway_index_score(const void* q, int64_t q_row, int64_t q_head, const float* w,
                                    int64_t w_row, const uint8_t* pool, int64_t page_stride, int per_page,
                                    const int32_t* block_table, int64_t table_row, const int64_t* row_seq,
                                    const int64_t* num_entries, float* out, int64_t out_row, int rows,
                                    int width, int fill, float w_scale, int tile_rows, int parts,
                                    cudaStream_t stream) {
  int shift = per_page & (per_page - 1) ? -1 : __builtin_ctz((unsigned)per_page);
  causeway::ScoreArgs a = {static_cast<const __nv_bfloat16*>(q), q_row,   q_head,      w,   w_row,   pool,
                           page_stride, per_page, shift, block_table, table_row, row_seq, num_entries, out,
                           out_row, rows, width, fill, w_scale};
  if (tile_rows == 1) return causeway::launch<1>(a, parts, stream);
  if (tile_rows == 4) return causeway::launch<4>(a, parts, stream);
  if (tile_rows == 8) return causeway::launch<8>(a, parts, stream);
  return (int)cudaErrorInvalidValue;
}
