// From a token's sums to its factors, from factors to the collapsed row and its FP8 form.
#pragma once
#include <cuda_fp8.h>

#include "hc_math.cuh"

namespace causeway {
namespace hc {

// Scale and base of the mix whose sum lies at `record` of a token's sums.
struct Affine {
  float scale, base;
};
template <Mode kMode>
__device__ __forceinline__ Affine load_affine(const Arguments& args, int record) {
  constexpr int kMixes = kMode == Mode::kHead ? kStreams : 24;
  if (record >= kMixes) return {0.0f, 0.0f};
  return {__ldg(args.scale + (record < 4 ? 0 : record < 8 ? 1 : 2)), __ldg(args.base + record)};
}

// Argument of a factor's sigmoid (or of comb's softmax) from its sum.
__device__ __forceinline__ float logit_of(const Arguments& args, float sum, float squares, Affine f) {
  float norm = rsqrtf(squares / (float)(kStreams * args.dim) + args.norm_eps);
  return fmaf(__fmul_rn(sum, norm), f.scale, f.base);
}

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

__device__ __forceinline__ float reciprocal(float v) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

// comb from its logits: row softmax plus eps, columns, then iters - 1 times rows and columns. Instead of
// the matrix only its row and column factors change: c[j][k] = c0[j][k] / (p[j] t[k]); dividing a row by its
// sum plus eps adds eps p[j] to the sum without p[j], which is the new p[j]. One thread makes one matrix.
__device__ __forceinline__ void finish_comb(float (&c)[16], int iters, float eps) {
  float p[4], t[4], r[4], q[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float* row = c + j * 4;
    float top = fmaxf(fmaxf(row[0], row[1]), fmaxf(row[2], row[3]));
#pragma unroll
    for (int k = 0; k < 4; ++k) row[k] = __expf(row[k] - top);
    float inverse = reciprocal((row[0] + row[1]) + (row[2] + row[3]));
#pragma unroll
    for (int k = 0; k < 4; ++k) row[k] = fmaf(row[k], inverse, eps);
    p[j] = t[j] = r[j] = q[j] = 1.0f;
  }
  for (int i = 0; i < iters; ++i) {
    if (i > 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* row = c + j * 4;
        p[j] = fmaf(row[1], q[1], fmaf(row[0], q[0], eps * p[j])) + fmaf(row[3], q[3], row[2] * q[2]);
        r[j] = reciprocal(p[j]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      t[k] = fmaf(c[4 + k], r[1], fmaf(c[k], r[0], eps * t[k])) + fmaf(c[12 + k], r[3], c[8 + k] * r[2]);
      q[k] = reciprocal(t[k]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) c[j * 4 + k] *= r[j] * q[k];
  }
}

__device__ __forceinline__ void store_comb(float* comb, const float (&c)[16]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    reinterpret_cast<float4*>(comb)[j] = make_float4(c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]);
  }
}

// Eight columns of a collapsed row from those of the streams.
__device__ __forceinline__ uint4 collapse_columns(const float4& factor, const uint4 (&x)[kStreams]) {
  float value[8] = {};
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    float f = (&factor.x)[s];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      value[2 * word] = fmaf(f, low_half((&x[s].x)[word]), value[2 * word]);
      value[2 * word + 1] = fmaf(f, high_half((&x[s].x)[word]), value[2 * word + 1]);
    }
  }
  return {pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3]), pack_bf16(value[4], value[5]),
          pack_bf16(value[6], value[7])};
}

// Eight columns of a row to FP8; half a warp holds the 128 columns of a scale. Bits of quant_rows.
__device__ __forceinline__ void store_codes(const Arguments& args, int64_t token, int column,
                                            const float (&v)[8]) {
  uint32_t peak = 0;  // as integers a NaN is above infinity
#pragma unroll
  for (int i = 0; i < 8; ++i) peak = max(peak, __float_as_uint(v[i]) & 0x7FFFFFFFu);
  const int lane = threadIdx.x % 32;
  peak = __reduce_max_sync(lane < 16 ? 0x0000FFFFu : 0xFFFF0000u, peak);
  const uint32_t bits =
      __float_as_uint(fmaxf(__uint_as_float(peak), 1e-4f) * static_cast<float>(1.0 / 448.0));
  const uint32_t byte =
      peak > 0x7F800000u ? 255u : min((bits >> 23) + ((bits & 0x7FFFFFu) != 0 ? 1u : 0u), 255u);
  const float inverse = __uint_as_float(byte == 255 ? 0x7FC00000u : (254 - byte) << 23);
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __nv_cvt_float2_to_fp8x2(make_float2(v[2 * i] * inverse, v[2 * i + 1] * inverse),
                                        __NV_SATFINITE, __NV_E4M3);
  }
  *reinterpret_cast<uint2*>(args.codes + token * args.code_row + column) =
      make_uint2(pairs[0] | (pairs[1] << 16), pairs[2] | (pairs[3] << 16));
  if (lane % 16 == 0) {
    args.code_scale[token * args.code_scale_row + column / 128] = static_cast<uint8_t>(byte);
  }
}

// `bytes` (a multiple of 16) global -> shared by the copy engine, counted by `bar`.
__device__ __forceinline__ void bulk_copy(uint32_t smem, const void* global, uint32_t bytes,
                                          uint32_t bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          smem),
      "l"(global), "r"(bytes), "r"(bar)
      : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

}  // namespace hc
}  // namespace causeway
