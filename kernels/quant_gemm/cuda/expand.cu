// Packed FP4 weights with 1x32 scales to e4m3 codes under 128x128 scales, both given: the code of a value
// is the value times 2^(sub - scale). The loader has proven that every such code is exact.

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;
constexpr int kSubBlock = 32;  // columns of a thread: 16 bytes in, 32 out

// The e4m3 codes of the magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 times `factor`.
__device__ __forceinline__ uint2 codes(float factor) {
  auto pair = [&](float low, float high) -> uint32_t {
    return __nv_cvt_float2_to_fp8x2(make_float2(low * factor, high * factor), __NV_SATFINITE, __NV_E4M3);
  };
  return make_uint2(pair(0.0f, 0.5f) | (pair(1.0f, 1.5f) << 16), pair(2.0f, 3.0f) | (pair(4.0f, 6.0f) << 16));
}

// Four nibbles (the lower half of `packed`) to four codes with their signs.
__device__ __forceinline__ uint32_t look_up(uint2 table, uint32_t packed) {
  const uint32_t magnitude = __byte_perm(table.x, table.y, packed & 0x7777u);
  const uint32_t sign = ((packed & 0x8u) << 4) | ((packed & 0x80u) << 8) | ((packed & 0x800u) << 12) |
                        ((packed & 0x8000u) << 16);
  return magnitude | sign;
}

__global__ void __launch_bounds__(kThreads) expand_kernel(
    const uint4* packed, const uint8_t* sub, const uint8_t* scale, uint4* out, const int64_t* offsets,
    const int n, const int sub_blocks, const int n_blocks, const int k_blocks) {
  const int64_t group = blockIdx.y;
  if (offsets != nullptr && offsets[group] == offsets[group + 1]) return;  // nobody reads it
  const uint32_t unit = blockIdx.x * kThreads + threadIdx.x;
  if (unit >= static_cast<uint32_t>(n) * sub_blocks) return;
  const int row = unit / sub_blocks, column = unit - row * sub_blocks;
  const int64_t at = group * n * sub_blocks + unit;
  const int line = scale[(group * n_blocks + row / 128) * k_blocks + column / (128 / kSubBlock)];
  const int shift = min(max(sub[at] - line, -126), 127);
  const uint2 table = codes(__uint_as_float(static_cast<uint32_t>(shift + 127) << 23));
  const uint4 in = packed[at];
  uint32_t words[8];
  const uint32_t halves[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[2 * i] = look_up(table, halves[i]);
    words[2 * i + 1] = look_up(table, halves[i] >> 16);
  }
  out[2 * at] = make_uint4(words[0], words[1], words[2], words[3]);
  out[2 * at + 1] = make_uint4(words[4], words[5], words[6], words[7]);
}

}  // namespace

// packed: [groups, n, k / 2] with the even column in the low nibble; sub: E8M0 [groups, n, k / 32]; scale:
// E8M0 [groups, n_blocks, k_blocks]; out: e4m3 [groups, n, k]; all contiguous, addresses at multiples of
// 16. Groups without rows in `offsets` (may be null) are left unwritten. Returns a cudaError_t.
extern "C" int causeway_expand_fp4(const void* packed, const void* sub, const void* scale, void* out,
                                   const int64_t* offsets, int groups, int n, int k, int n_blocks,
                                   int k_blocks, void* stream) {
  const int64_t units = static_cast<int64_t>(n) * (k / kSubBlock);
  const dim3 grid(static_cast<unsigned>((units + kThreads - 1) / kThreads), groups);
  expand_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(packed), static_cast<const uint8_t*>(sub),
      static_cast<const uint8_t*>(scale), static_cast<uint4*>(out), offsets, n, k / kSubBlock, n_blocks,
      k_blocks);
  return cudaGetLastError();
}
