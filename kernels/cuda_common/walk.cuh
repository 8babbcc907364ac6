// How blocks of threads walk: over the tiles of a product, and around the ring of stages that feeds them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace causeway {

// A position in the ring of stages.
template <int STAGES>
struct Slot {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct TilePlace {
  int m, n;  // tile rows from the first, tile columns from the first
};

// The index-th of tiles_m x tiles_n tiles. Neighbours walk together: down one column after the other of a band that is
// `band` tiles wide, so that the rows' and the weight's operands are both read from L2 again.
__device__ __forceinline__ TilePlace place_in_bands(int index, int tiles_m, int tiles_n, int band_width) {
  const int band = index / (band_width * tiles_m);
  const int width = min(band_width, tiles_n - band * band_width);
  const int inside = index - band * band_width * tiles_m, m = inside / width;
  return {m, band * band_width + inside - m * width};
}

}  // namespace causeway
