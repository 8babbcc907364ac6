// Packed FP4 weights with 1x32 scales to e4m3 codes under 128x128 scales, both given: the code of a value
// is the value times 2^(sub - scale). The loader has proven that every such code is exact.

#include <cuda_runtime.h>

#include <cstdint>

#include "e2m1.cuh"

namespace {

using namespace causeway;

constexpr int kThreads = 256;
constexpr int kSubBlock = 32;  // columns of a thread: 16 bytes in, 32 out

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
  const E2m1Table table = e2m1_table(__uint_as_float(static_cast<uint32_t>(shift + 127) << 23));
  const uint4 in = packed[at];
  uint32_t words[8];
  const uint32_t quarters[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack_e2m1(table, quarters[i], words[i], words[4 + i]);
  out[2 * at] = make_uint4(words[0], words[1], words[2], words[3]);
  out[2 * at + 1] = make_uint4(words[4], words[5], words[6], words[7]);
}

}  // namespace

// packed: [groups, n, k / 2] in the order of e2m1.cuh; sub: E8M0 [groups, n, k / 32]; scale:
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
