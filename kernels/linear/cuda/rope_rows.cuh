// Inverse RoPE of a step of 64 columns in shared memory, by the warpgroup that multiplies those rows next.
#pragma once

#include <cuda_bf16.h>

#include "dense_tiles.cuh"
#include "hopper.cuh"

namespace causeway {

// (sin, cos) for angles below 2^20 and somewhat beyond, to about a float32 ulp of one. The first
// product's remainder is exact: it is a multiple of 2^-23 and below one.
__device__ __forceinline__ void sine_cosine(float angle, float& sine, float& cosine) {
  const float turns = rintf(angle * 0.636619772f);
  float r = fmaf(turns, -1.57079637050628662f, angle);  // pi/2 as float32, and the rest of it
  r = fmaf(turns, 4.37113900018624e-8f, r);
  const float z = r * r;
  const float s =
      fmaf(r * z, fmaf(z, fmaf(z, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f), r);
  const float c = fmaf(
      z * z, fmaf(z, fmaf(z, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f),
      fmaf(z, -0.5f, 1.0f));
  const int quadrant = static_cast<int>(turns) & 3;
  const bool swap = (quadrant & 1) != 0;
  sine = swap ? c : s;
  cosine = swap ? s : c;
  if ((quadrant & 2) != 0) sine = -sine;
  if (((quadrant + 1) & 2) != 0) cosine = -cosine;
}

__device__ __forceinline__ uint32_t rotate_back(uint32_t pair, float cosine, float sine) {
  const float even = __uint_as_float(pair << 16), odd = __uint_as_float(pair & 0xFFFF0000u);
  return pack_bf16(__fadd_rn(__fmul_rn(even, cosine), __fmul_rn(odd, sine)),
                   __fsub_rn(__fmul_rn(odd, cosine), __fmul_rn(even, sine)));
}

// What a thread of a warpgroup needs to turn its part of 64 rows: four pairs of every 16th row.
template <int kRows>
class Rotation {
 public:
  static constexpr int kOwn = (kRows < 64 ? kRows : 64) / 16;

  // The angles' positions: rows first .. of the tensor, for the warpgroup's own rows.
  __device__ __forceinline__ void open(const DenseArguments& args, int first, int thread) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = min(first + i * 16 + thread / 8, args.rows - 1);
      position_[i] = __ll2float_rn(args.positions[row]);
    }
  }

  // Sines and cosines of its row i; apart from `open`, so that they can be made while products run.
  template <int i>
  __device__ __forceinline__ void prepare(const DenseArguments& args, int thread) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float frequency = __ldg(args.inv_freq + thread % 8 * 4 + j);
      sine_cosine(__fmul_rn(position_[i], frequency), sine_[i][j], cosine_[i][j]);
    }
  }

  __device__ __forceinline__ void prepare_all(const DenseArguments& args, int thread) {
    prepare<0>(args, thread);
    if constexpr (kOwn > 1) prepare<1>(args, thread);
    if constexpr (kOwn > 2) {
      prepare<2>(args, thread);
      prepare<3>(args, thread);
    }
  }

  // Rows of 128 bytes behind the 128-byte swizzle: 16-byte chunk c of row r lies at c ^ (r & 7).
  __device__ __forceinline__ void turn(uint8_t* rows, int thread) const {
    const int row = thread / 8;
    uint4* line = reinterpret_cast<uint4*>(rows) + row * 8 + ((thread ^ row) & 7);
    uint4 v[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) v[i] = line[i * 128];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      v[i].x = rotate_back(v[i].x, cosine_[i][0], sine_[i][0]);
      v[i].y = rotate_back(v[i].y, cosine_[i][1], sine_[i][1]);
      v[i].z = rotate_back(v[i].z, cosine_[i][2], sine_[i][2]);
      v[i].w = rotate_back(v[i].w, cosine_[i][3], sine_[i][3]);
      line[i * 128] = v[i];
    }
  }

 private:
  static_assert(kOwn == 1 || kOwn == 2 || kOwn == 4, "16, 32 or 64 rows of a warpgroup");
  float position_[kOwn], sine_[kOwn][4], cosine_[kOwn][4];
};

}  // namespace causeway
