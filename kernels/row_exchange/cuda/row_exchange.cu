// Copies of rows between buffers, several lists of rows in one launch.
#include <cuda_runtime.h>

#include <cstdint>

namespace causeway {

constexpr int kSegments = 24, kThreads = 256, kUnits = 8;  // units per thread

// `rows` rows of `units` pieces of `unit` bytes each; row i comes from row from_index[i], or i, and goes
// to row to_index[i], or i.
struct Segment {
  const char* from;
  char* to;
  const int64_t *from_index, *to_index;
  int64_t from_stride, to_stride, rows, first_block;
  uint32_t units;
  int unit;
};
struct Segments {
  Segment list[kSegments];
  int count;
};

namespace {

template <class Unit>
__device__ __forceinline__ void copy(const Segment& s, int64_t block) {
  int64_t first = block * (kThreads * kUnits), total = s.rows * s.units;
  int64_t row0 = first / s.units;
  uint32_t rest = (uint32_t)(first - row0 * s.units) + threadIdx.x;
  Unit values[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    uint32_t at = rest + i * kThreads, down = at / s.units;
    int64_t row = row0 + down;
    if (first + threadIdx.x + i * kThreads < total) {
      if (s.from_index) row = s.from_index[row];
      values[i] = reinterpret_cast<const Unit*>(s.from + row * s.from_stride)[at - down * s.units];
    }
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    uint32_t at = rest + i * kThreads, down = at / s.units;
    int64_t row = row0 + down;
    if (first + threadIdx.x + i * kThreads < total) {
      if (s.to_index) row = s.to_index[row];
      reinterpret_cast<Unit*>(s.to + row * s.to_stride)[at - down * s.units] = values[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ Segments segments) {
  int64_t block = blockIdx.x;
  int chosen = 0;
  for (int i = 1; i < segments.count; ++i)
    if (block >= segments.list[i].first_block) chosen = i;
  const Segment& s = segments.list[chosen];
  block -= s.first_block;
  switch (s.unit) {
    case 16: return copy<uint4>(s, block);
    case 8: return copy<uint2>(s, block);
    case 4: return copy<uint32_t>(s, block);
    case 2: return copy<uint16_t>(s, block);
    default: return copy<uint8_t>(s, block);
  }
}

}  // namespace

// `first_block` of the segments is filled in here.
extern "C" int causeway_copy_rows(Segments* segments, void* stream) {
  int64_t blocks = 0;
  for (int i = 0; i < segments->count; ++i) {
    Segment& s = segments->list[i];
    s.first_block = blocks;
    blocks += (s.rows * s.units + kThreads * kUnits - 1) / (kThreads * kUnits);
  }
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffff) return (int)cudaErrorInvalidConfiguration;
  copy_kernel<<<(unsigned)blocks, kThreads, 0, (cudaStream_t)stream>>>(*segments);
  return (int)cudaGetLastError();
}

}  // namespace causeway
