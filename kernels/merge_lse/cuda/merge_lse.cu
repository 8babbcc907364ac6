// merge_lse. Contract: kernels/merge_lse/api.py. A block per (row, head); partials in order.
#include "hopper.cuh"

namespace causeway {

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T v[kWidth];
};

// kWidth: values of one access; the host picks 1 where rows do not start at multiples of 4 values.
template <typename T, int kWidth>
__global__ void __launch_bounds__(128)
    merge_lse_kernel(const T* __restrict__ o, int64_t o_part, int64_t o_row, int64_t o_head,
                     const float* __restrict__ lse, int64_t lse_part, int64_t lse_row,
                     const float* __restrict__ sink, T* __restrict__ out, float* __restrict__ out_lse,
                     int parts, int heads, int dim) {
  int64_t row = blockIdx.x / heads;
  int head = blockIdx.x % heads;
  const float* own = lse + row * lse_row + head;
  float top = kNegInf, total = 0.0f;
  for (int p = 0; p < parts; ++p) top = fmaxf(top, own[p * lse_part]);
  bool empty = top == kNegInf;
  for (int p = 0; p < parts; ++p) total += empty ? 0.0f : expf(own[p * lse_part] - top);
  float extra = sink && !empty ? expf(sink[head] - top) : 0.0f;
  float factor = empty ? 0.0f : 1.0f / (total + extra);
  const T* from = o + row * o_row + head * o_head;
  T* to = out + (int64_t)blockIdx.x * dim;
  for (int column = threadIdx.x * kWidth; column < dim; column += blockDim.x * kWidth) {
    float sum[kWidth] = {};
#pragma unroll 4
    for (int p = 0; p < parts; ++p) {
      float part_lse = own[p * lse_part];
      if (part_lse == kNegInf) continue;
      float weight = expf(part_lse - top);
      auto x = *reinterpret_cast<const Vector<T, kWidth>*>(from + p * o_part + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] = fmaf(weight, (float)x.v[i], sum[i]);
    }
    Vector<T, kWidth> merged;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) merged.v[i] = (T)(sum[i] * factor);
    *reinterpret_cast<Vector<T, kWidth>*>(to + column) = merged;
  }
  if (threadIdx.x == 0) out_lse[blockIdx.x] = empty ? kNegInf : logf(total) + top;
}

}  // namespace causeway

extern "C" int causeway_merge_lse(const void* o, int bf16, int64_t o_part, int64_t o_row, int64_t o_head,
                                  const float* lse, int64_t lse_part, int64_t lse_row, const float* sink,
                                  void* out, float* out_lse, int parts, int64_t rows, int heads, int dim,
                                  cudaStream_t stream) {
  using namespace causeway;
  unsigned blocks = (unsigned)(rows * heads);
  auto run = [&](auto kernel, auto type) {
    using T = decltype(type);
    kernel<<<blocks, 128, 0, stream>>>(static_cast<const T*>(o), o_part, o_row, o_head, lse, lse_part, lse_row, sink,
                                       static_cast<T*>(out), out_lse, parts, heads, dim);
  };
  bool wide = (o_part | o_row | o_head | dim) % 4 == 0 && (uintptr_t)o % (bf16 ? 8 : 16) == 0;
  if (bf16) {
    run(wide ? merge_lse_kernel<__nv_bfloat16, 4> : merge_lse_kernel<__nv_bfloat16, 1>, __nv_bfloat16());
  } else {
    run(wide ? merge_lse_kernel<float, 4> : merge_lse_kernel<float, 1>, float());
  }
  return (int)cudaGetLastError();
}
