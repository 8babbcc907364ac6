// merge_lse. Contract: kernels/merge_lse/api.py. A warp per (row, head); partials in order.
#include "hopper.cuh"

namespace causeway {

constexpr int kWarps = 4;  // of a block

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T v[kWidth];
};

// kWidth: values of one access, 16 bytes; the host picks 1 where rows do not start at such multiples.
template <typename T, int kWidth>
__global__ void __launch_bounds__(32 * kWarps)
    merge_lse_kernel(const T* __restrict__ o, int64_t o_part, int64_t o_row, int64_t o_head,
                     const float* __restrict__ lse, int64_t lse_part, int64_t lse_row,
                     const float* __restrict__ sink, T* __restrict__ out, float* __restrict__ out_lse,
                     int parts, int64_t items, int heads, int dim) {
  constexpr int kBatch = 4, kSpan = 2;  // reads under way: partials x accesses
  int64_t item = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
  if (item >= items) return;
  int64_t row = item / heads;
  int head = (int)(item % heads), lane = threadIdx.x % 32;
  const float* own = lse + row * lse_row + head;
  const T* from = o + row * o_row + head * o_head;
  T* to = out + item * dim;
  float first = lane < parts ? own[lane * lse_part] : kNegInf, top = first;
  // Reads do not wait for the weights: a partial without keys is read, and not used.
  Vector<T, kWidth> x[kBatch][kSpan];
  auto load = [&](int start, int p) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int k = 0; k < kSpan; ++k) {
        int column = start + (32 * k + lane) * kWidth;
        if (p + b < parts && column < dim) {
          x[b][k] = *reinterpret_cast<const Vector<T, kWidth>*>(from + (p + b) * o_part + column);
        }
      }
    }
  };
  load(0, 0);
  for (int p = 32 + lane; p < parts; p += 32) top = fmaxf(top, own[p * lse_part]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  first = first == kNegInf ? 0.0f : expf(first - top);
  auto weight_of = [&](int p) {  // 0: no keys
    if (p < 32) return __shfl_sync(~0u, first, p);
    float value = own[p * lse_part];
    return value == kNegInf ? 0.0f : expf(value - top);
  };
  float total = 0.0f;
  for (int p = 0; p < parts; ++p) total += weight_of(p);
  bool empty = total == 0.0f;  // else at least one, or NaN: the maximum does not show that
  float extra = sink && !empty ? expf(sink[head] - top) : 0.0f;
  float factor = empty ? 0.0f : 1.0f / (total + extra);
  for (int start = 0; start < dim; start += 32 * kWidth * kSpan) {
    float sum[kSpan][kWidth] = {};
    for (int p = 0; p < parts; p += kBatch) {
      if (start + p > 0) load(start, p);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        float weight = p + b < parts ? weight_of(p + b) : 0.0f;
        if (weight == 0.0f) continue;
#pragma unroll
        for (int k = 0; k < kSpan; ++k) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sum[k][i] = fmaf(weight, (float)x[b][k].v[i], sum[k][i]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kSpan; ++k) {
      int column = start + (32 * k + lane) * kWidth;
      Vector<T, kWidth> merged;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) merged.v[i] = (T)(sum[k][i] * factor);
      if (column < dim) *reinterpret_cast<Vector<T, kWidth>*>(to + column) = merged;
    }
  }
  if (lane == 0) out_lse[item] = empty ? kNegInf : logf(total) + top;
}

}  // namespace causeway

extern "C" int causeway_merge_lse(const void* o, int bf16, int64_t o_part, int64_t o_row, int64_t o_head,
                                  const float* lse, int64_t lse_part, int64_t lse_row, const float* sink,
                                  void* out, float* out_lse, int parts, int64_t rows, int heads, int dim,
                                  cudaStream_t stream) {
  using namespace causeway;
  int64_t items = rows * heads;
  unsigned blocks = (unsigned)((items + kWarps - 1) / kWarps);
  auto run = [&](auto kernel, auto type) {
    using T = decltype(type);
    kernel<<<blocks, 32 * kWarps, 0, stream>>>(static_cast<const T*>(o), o_part, o_row, o_head, lse, lse_part, lse_row,
                                               sink, static_cast<T*>(out), out_lse, parts, items, heads, dim);
  };
  int width = bf16 ? 8 : 4;
  bool wide = (o_part | o_row | o_head | dim) % width == 0 && (uintptr_t)o % 16 == 0;
  if (bf16) {
    run(wide ? merge_lse_kernel<__nv_bfloat16, 8> : merge_lse_kernel<__nv_bfloat16, 1>, __nv_bfloat16());
  } else {
    run(wide ? merge_lse_kernel<float, 4> : merge_lse_kernel<float, 1>, float());
  }
  return (int)cudaGetLastError();
}
