// SwiGLU of one gate and one up value, the same instructions wherever it is fused.
#pragma once

#include "codes.cuh"

namespace causeway {

// (silu(min(gate, limit)) * clamp(up, -limit, limit)) * factor; NaN stays NaN. Rounded products only, so
// that no compiler joins them to fused ones in one kernel and not in another.
__device__ __forceinline__ float swiglu_value(float gate, float up, float limit, float factor) {
  const float a = min_or_nan(gate, limit);
  const float b = max_or_nan(min_or_nan(up, limit), -limit);
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(a, -1.4426950408889634f)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__fadd_rn(1.0f, power)));
  return __fmul_rn(__fmul_rn(__fmul_rn(a, inverse), b), factor);
}

// Both values rounded to bfloat16.
__device__ __forceinline__ void round_to_bfloat16(float& a, float& b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(&pair);
  a = __uint_as_float(bits << 16);
  b = __uint_as_float(bits & 0xFFFF0000u);
}

}  // namespace causeway
