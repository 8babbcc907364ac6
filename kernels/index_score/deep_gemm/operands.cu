// What DeepGEMM's fp8_mqa_logits takes, from what index_score takes: e4m3 queries with the scale of
// each (row, head) in the head's weight, keys of one sequence without pages, and the facts by which
// the host decides.

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace {

constexpr int kHeads = 64;
constexpr int kDim = 128;
constexpr int kThreads = 256;
constexpr int kLanes = 8;  // threads of one (row, head), 16 values each

// Zero at first. facts[0]: largest num_entries; facts[1]: 1 where a query is not exact in e4m3;
// facts[2]: blocks of the table from the first one on that is not here.
__global__ void facts_kernel(const int64_t* num_entries, int rows, const int32_t* table, int blocks,
                             int32_t* facts) {
    const int at = blockIdx.x * kThreads + threadIdx.x;
    if (at < rows) atomicMax(&facts[0], static_cast<int32_t>(num_entries[at]));
    if (at < blocks && table[at] < 0) atomicMax(&facts[2], blocks - at);
}

__global__ void __launch_bounds__(kThreads)
    queries_kernel(const __nv_bfloat16* q, int64_t q_row, int64_t q_head, const float* w,
                   int64_t w_row, const int64_t* row_seq, const int64_t* num_entries, int rows,
                   uint4* codes, float* weights, int32_t* starts, int32_t* ends, int32_t* facts) {
    const int64_t pair = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
    const int segment = threadIdx.x % kLanes;
    const int64_t row = pair / kHeads;
    const int head = static_cast<int>(pair % kHeads);
    if (row >= rows) return;  // whole warps: 64 heads of 8 threads
    const uint4* source =
        reinterpret_cast<const uint4*>(q + row * q_row + head * q_head + segment * 16);
    float x[16];
    float top = 0.0f;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        const uint4 v = __ldg(source + part);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            x[8 * part + 2 * j] = __uint_as_float(words[j] << 16);
            x[8 * part + 2 * j + 1] = __uint_as_float(words[j] & 0xFFFF0000u);
        }
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) top = fmaxf(top, fabsf(x[j]));
#pragma unroll
    for (int d = 1; d < kLanes; d <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    // The largest value comes to lie in [128, 256), below e4m3's 448.
    const int shift = max(static_cast<int>(__float_as_uint(top) >> 23) - 127, -110) - 7;
    const float down = __uint_as_float(static_cast<uint32_t>(127 - shift) << 23);
    uint32_t words[4];
    bool exact = true;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        words[j] = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 v = make_float2(x[4 * j + 2 * half] * down, x[4 * j + 2 * half + 1] * down);
            const uint32_t code = __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3);
            const __half2_raw raw =
                __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(code), __NV_E4M3);
            const float2 held = __half22float2(__half2(raw));
            exact &= held.x == v.x && held.y == v.y;  // false for NaN
            words[j] |= code << (16 * half);
        }
    }
    if (!exact) atomicMax(&facts[1], 1);
    codes[pair * kLanes + segment] = make_uint4(words[0], words[1], words[2], words[3]);
    if (segment == 0) {
        const float up = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
        weights[pair] = w[row * w_row + head] * up;
        if (head == 0) {
            starts[row] = 0;
            ends[row] = row_seq[row] < 0 ? 0 : static_cast<int32_t>(max(num_entries[row], int64_t{0}));
        }
    }
}

// One warp per entry; entries from `count` on become zeros.
__global__ void __launch_bounds__(kThreads)
    keys_kernel(const uint8_t* pool, int64_t page_stride, int per_page, const int32_t* table,
                int count, int padded, uint32_t* keys, float* scales) {
    const int entry = (blockIdx.x * kThreads + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (entry >= padded) return;
    uint32_t word = 0;
    float scale = 0.0f;
    if (entry < count) {
        const int offset = entry % per_page;
        const uint8_t* page = pool + int64_t{table[entry / per_page]} * page_stride;
        word = *reinterpret_cast<const uint32_t*>(page + int64_t{offset} * kDim + 4 * lane);
        scale = *reinterpret_cast<const float*>(page + int64_t{per_page} * kDim + 4 * offset);
    }
    keys[int64_t{entry} * 32 + lane] = word;
    if (lane == 0) scales[entry] = scale;
}

// What a row does not see becomes -inf, and poison (+inf) from the width on; one block per row.
__global__ void __launch_bounds__(kThreads)
    hide_kernel(float* scores, int64_t stride, const int32_t* ends, int rows, int width, int padded) {
    const int row = blockIdx.x;
    float* out = scores + int64_t{row} * stride;
    // The last row has no memory behind `padded`.
    const int64_t last = row + 1 < rows ? stride : padded;
    for (int64_t i = ends[row] + threadIdx.x; i < last; i += kThreads)
        out[i] = i < width ? -INFINITY : INFINITY;
}

}  // namespace

extern "C" int causeway_index_queries(const __nv_bfloat16* q, int64_t q_row, int64_t q_head,
                                      const float* w, int64_t w_row, const int64_t* row_seq,
                                      const int64_t* num_entries, int rows, const int32_t* table,
                                      int blocks, uint4* codes, float* weights, int32_t* starts,
                                      int32_t* ends, int32_t* facts, cudaStream_t stream) {
    const int most = rows > blocks ? rows : blocks;
    facts_kernel<<<(most + kThreads - 1) / kThreads, kThreads, 0, stream>>>(num_entries, rows, table,
                                                                           blocks, facts);
    const int64_t threads = int64_t{rows} * kHeads * kLanes;
    queries_kernel<<<static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0,
                     stream>>>(q, q_row, q_head, w, w_row, row_seq, num_entries, rows, codes, weights,
                               starts, ends, facts);
    return cudaGetLastError();
}

extern "C" int causeway_index_keys(const uint8_t* pool, int64_t page_stride, int per_page,
                                   const int32_t* table, int count, int padded, uint32_t* keys,
                                   float* scales, cudaStream_t stream) {
    const int blocks = (padded + kThreads / 32 - 1) / (kThreads / 32);
    keys_kernel<<<blocks, kThreads, 0, stream>>>(pool, page_stride, per_page, table, count, padded,
                                                 keys, scales);
    return cudaGetLastError();
}

extern "C" int causeway_index_hide(float* scores, int64_t stride, const int32_t* ends, int rows,
                                   int width, int padded, cudaStream_t stream) {
    hide_kernel<<<rows, kThreads, 0, stream>>>(scores, stride, ends, rows, width, padded);
    return cudaGetLastError();
}
