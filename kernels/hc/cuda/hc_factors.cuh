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
  float norm = rsqrtf(__fdividef(squares, (float)(kStreams * args.dim)) + args.norm_eps);
  return fmaf(__fmul_rn(sum, norm), f.scale, f.base);
}

__device__ __forceinline__ float reciprocal(float v) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

__device__ __forceinline__ float sigmoid(float v) { return reciprocal(1.0f + __expf(-v)); }

// comb from its logits: row softmax plus eps, columns, then iters - 1 times rows and columns. Instead of
// the matrix only its row and column factors change: c[j][k] = c0[j][k] / (p[j] t[k]); dividing a row by its
// sum plus eps adds eps p[j] to the sum without p[j], which is the new p[j]. A sum starts with its own column
// and goes on to those whose number differs in bit 0, bit 1 and both. One thread makes one matrix.
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
  for (int n = 0; n < iters; ++n) {
    if (n > 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        p[j] *= eps;
#pragma unroll
        for (int i = 0; i < 4; ++i) p[j] = fmaf(c[j * 4 + (j ^ i)], q[j ^ i], p[j]);
        r[j] = reciprocal(p[j]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      t[k] *= eps;
#pragma unroll
      for (int i = 0; i < 4; ++i) t[k] = fmaf(c[(k ^ i) * 4 + k], r[k ^ i], t[k]);
      q[k] = reciprocal(t[k]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) c[j * 4 + k] *= r[j] * q[k];
  }
}

// The same, with the same bits, by a warp: lane i (mod 16) brings logit i and gets entry i, lane j (mod 4)
// keeps row and column j. For one matrix it is faster: a warp alone sends one instruction in two cycles.
__device__ __forceinline__ float finish_comb_lanes(float logit, int iters, float eps, int lane) {
  float top = fmaxf(logit, __shfl_xor_sync(~0u, logit, 1));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  float c = __expf(logit - top);
  float total = c + __shfl_xor_sync(~0u, c, 1);
  total += __shfl_xor_sync(~0u, total, 2);
  c = fmaf(c, reciprocal(total), eps);
  const int own = lane % 4;
  float row[4], column[4], p = 1.0f, t = 1.0f, r = 1.0f, q = 1.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    row[i] = __shfl_sync(~0u, c, own * 4 + (own ^ i));
    column[i] = __shfl_sync(~0u, c, (own ^ i) * 4 + own);
  }
  const auto phase = [&](float& sum, float& inverse, const float (&entry)[4], float factor) {
    float others[4];
#pragma unroll
    for (int i = 1; i < 4; ++i) others[i] = __shfl_xor_sync(~0u, factor, i);
    sum = fmaf(entry[0], factor, sum * eps);
#pragma unroll
    for (int i = 1; i < 4; ++i) sum = fmaf(entry[i], others[i], sum);
    inverse = reciprocal(sum);
  };
  for (int n = 0; n < iters; ++n) {
    if (n > 0) phase(p, r, row, q);
    phase(t, q, column, r);
  }
  return c * (__shfl_sync(~0u, r, lane / 4 % 4) * q);
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

// Squares of eight columns. Those of a slab, a warp's, are added by add_lanes, the slabs' again, a lane
// each and zeros for those that are not there: the order of rms_norm_quant.
__device__ __forceinline__ float square_of(const uint4& row) {
  float sum = 0.0f;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float low = low_half((&row.x)[word]), high = high_half((&row.x)[word]);
    sum = fmaf(low, low, sum);
    sum = fmaf(high, high, sum);
  }
  return sum;
}
__device__ __forceinline__ float add_lanes(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// The FP8 form of 128 columns, as quant_rows makes it: the scale byte from the bits of the largest
// magnitude (as integers a NaN is above infinity), eight columns' codes from their values.
__device__ __forceinline__ uint32_t scale_byte(uint32_t peak) {
  const uint32_t bits =
      __float_as_uint(fmaxf(__uint_as_float(peak), 1e-4f) * static_cast<float>(1.0 / 448.0));
  return peak > 0x7F800000u ? 255u : min((bits >> 23) + ((bits & 0x7FFFFFu) != 0 ? 1u : 0u), 255u);
}
// What code_columns multiplies by, twice as bf16: a power of two, or NaN.
__device__ __forceinline__ uint32_t inverse_scale(uint32_t byte) {
  return (byte == 255 ? 0x7FC0u : (254 - byte) << 7) * 0x10001u;
}
__device__ __forceinline__ uint2 code_columns(const uint4& row, uint32_t inverse) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Exact, but for what is too small for a code.
    uint32_t word;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(word) : "r"((&row.x)[i]), "r"(inverse));
    pairs[i] = __nv_cvt_float2_to_fp8x2(make_float2(low_half(word), high_half(word)), __NV_SATFINITE,
                                        __NV_E4M3);
  }
  return make_uint2(pairs[0] | (pairs[1] << 16), pairs[2] | (pairs[3] << 16));
}

// Of two magnitudes in bf16 the scale bytes, see scale_byte: the exponent of what is 448 = 1.75 * 2^8 times less,
// rounded up, at least that of 1e-4; 255 where a magnitude is not finite. And what code_columns multiplies by: a
// NaN for 255.
struct Scales {
  uint32_t bytes, inverse[2];
  __device__ __forceinline__ explicit Scales(uint32_t peaks) {
    const uint32_t wild = (peaks + 0x00800080u) >> 15 & 0x00010001u;
    const uint32_t up = (peaks + 0x001F001Fu) >> 7 & 0x01FF01FFu;
    bytes = (__vmaxu2(up, 0x00710071u) - 0x00080008u) | wild * 255;
    // Exponents of 2^(254 - byte) plus one, with a bit of the mantissa behind; of a NaN the subtraction may borrow.
    const uint32_t exponents = (bytes ^ 0x00FF00FFu) * 128 + wild * 64;
    inverse[0] = __byte_perm(exponents, 0, 0x1010) - 0x00800080u;
    inverse[1] = __byte_perm(exponents, 0, 0x3232) - 0x00800080u;
  }
};

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
