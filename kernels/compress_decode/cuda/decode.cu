// A decode step of a layer's compressors: every row is kept in its ring; rows that end a group pool it.
// Blocks run in any order, so rows that this launch writes are read from where they come from.
#include "pooling.cuh"

namespace causeway {

constexpr int kParts = 2;

struct Part {
  const float* ape;
  const int64_t* slots;
  int64_t column;  // of the part's first value in rows and state
  Finish finish;
  int index;
};
struct Decode {
  const float* rows;
  float* state;
  const int64_t *positions, *seq, *base;
  int64_t row_stride, state_stride, tokens;
  int ring;
  Part parts[kParts];
};

namespace {

// Rows of the same sequence right before row t of the step, at most `most`. Every lane gets it.
__device__ __forceinline__ int rows_before(const int64_t* seq, int64_t t, int most) {
  int64_t own = seq[t];
  int found = 0;
  while (found < most) {
    int64_t at = t - 1 - found - threadIdx.x % 32;
    int64_t name = seq[max(at, (int64_t)0)];
    unsigned other = __ballot_sync(kAll, at < 0 || name != own);
    found += other ? __ffs(other) - 1 : 32;
    if (other) break;
  }
  return min(found, most);
}

// The rows that end at position `last`, which is row t of the step: `rows(j, series)` of BACK rows.
template <int D, int SERIES, int BACK>
struct StepRows {
  const Decode& a;
  const Part& part;
  int64_t t, last, base;
  int at, before, col;  // at: ring row of `last`

  __device__ Quad operator()(int j, int series) const {
    constexpr int kRatio = BACK / SERIES;
    int back = BACK - 1 - j, row = at - back;
    bool fresh = back <= before;
    const float* from = fresh ? a.rows + (t - back) * a.row_stride
                              : a.state + (base + (row < 0 ? row + a.ring : row)) * a.state_stride;
    Quad q = load_quad<D, SERIES>(from + part.column, series, col, last >= back);
    float ape[4] = {};  // a group ends at `last`, so row j has place j % ratio
    if (fresh) load_values(part.ape + (j % kRatio * SERIES + series) * D + col, ape);
#pragma unroll
    for (int c = 0; c < 4; ++c) q.g[c] = __fadd_rn(q.g[c], ape[c]);
    return q;
  }
};

// Put four channels of series `series` of a row, g without ape yet, into the ring row at `to`.
template <int D, int SERIES>
__device__ __forceinline__ void keep(Quad q, const Part& part, float* to, int place, int series,
                                     int col) {
  float ape[4];
  load_values(part.ape + (place * SERIES + series) * D + col, ape);
#pragma unroll
  for (int c = 0; c < 4; ++c) q.g[c] = __fadd_rn(q.g[c], ape[c]);
  store_values(to + part.column + series * D + col, q.u);
  store_values(to + part.column + (SERIES + series) * D + col, q.g);
}

template <int D, bool INDEX, class T>
__device__ __forceinline__ void step4(const Decode& a, const Part& part, float* sums) {
  int64_t t = blockIdx.x, base = a.base[t], last = a.positions[t], slot = part.slots[t];
  int col = threadIdx.x * 4;
  bool holds = col < D;
  const float* row = a.rows + t * a.row_stride + part.column;
  Quad own[2] = {load_quad<D, 2>(row, 0, col, holds), load_quad<D, 2>(row, 1, col, holds)};
  int before = rows_before(a.seq, t, 7);
  if (base < 0 || (INDEX && threadIdx.x >= 32)) return;
  int at = (int)((uint32_t)last % (uint32_t)a.ring), place = (int)(last & 3);
  float* to = a.state + (base + at) * a.state_stride;
  if (place != 3) {
    if (holds) {
      keep<D, 2>(own[0], part, to, place, 0, col);
      keep<D, 2>(own[1], part, to, place, 1, col);
    }
    return;
  }
  int mine = col % D;
  StepRows<D, 2, 8> rows{a, part, t, last, base, at, before, mine};
  Quad q[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) q[j] = rows(j, j / 4);
  Ending end;
  end.read(part.finish, mine, D);
  end.turn_at(last - 3);
  if (holds) {
    keep<D, 2>(own[0], part, to, place, 0, col);
    keep<D, 2>(own[1], part, to, place, 1, col);
  }
  float x[4];
  pool8(q, x);
  if constexpr (INDEX) {
    hold<T>(x);
    finish_index<D, T>(x, end, part.finish, slot, t);
  } else {
    finish_main_block<D, T>(x, end, part.finish, slot, t, sums);
  }
}

// D / 4 threads; blockIdx.y is the part.
template <int D, int DI, class T>
__global__ void __launch_bounds__(D / 4) step4_kernel(const __grid_constant__ Decode a) {
  __shared__ float sums[D / 64];
  const Part& part = a.parts[blockIdx.y];
  if (part.index) step4<DI, true, T>(a, part, sums);
  else step4<D, false, T>(a, part, sums);
}

// A cluster of D / 64 blocks per row; a block has 64 channels.
template <int D, class T>
__global__ void __launch_bounds__(kPool128Threads) step128_kernel(const __grid_constant__ Decode a) {
  constexpr int kBlocks = D / 64;
  const Part& part = a.parts[0];
  int64_t t = blockIdx.x / kBlocks;
  int rank = blockIdx.x % kBlocks;
  int64_t base = a.base[t], last = a.positions[t], slot = part.slots[t];
  int col = rank * 64 + threadIdx.x % 16 * 4;
  // The last warp keeps the row: it has no part in the end of the entry.
  bool keeps = threadIdx.x >= kPool128Threads - 16;
  Quad own = load_quad<D, 1>(a.rows + t * a.row_stride + part.column, 0, col, keeps);
  int before = rows_before(a.seq, t, 127);
  if (base < 0) return;
  int at = (int)((uint32_t)last % (uint32_t)a.ring), place = (int)(last & 127);
  if (keeps) keep<D, 1>(own, part, a.state + (base + at) * a.state_stride, place, 0, col);
  if (place != 127) return;
  pool128_entry<D, T>(StepRows<D, 1, 128>{a, part, t, last, base, at, before, col}, rank, last - 127,
                      part.finish, slot, t);
}

template <int D, int DI, class T>
int launch(const Decode& a, int parts, int ratio, cudaStream_t stream) {
  if (ratio == 4)
    return launch_blocks(step4_kernel<D, DI, T>, a.tokens, parts, D / 4, 1, a, stream);
  return launch_blocks(step128_kernel<D, T>, a.tokens * (D / 64), 1, kPool128Threads, D / 64, a,
                       stream);
}

template <class T>
int dispatch(const Decode& a, int parts, int ratio, int dim, int index_dim, cudaStream_t stream) {
  if (dim == 512)
    return index_dim == 128 ? launch<512, 128, T>(a, parts, ratio, stream)
                            : launch<512, 64, T>(a, parts, ratio, stream);
  return index_dim == 128 ? launch<128, 128, T>(a, parts, ratio, stream)
                          : launch<128, 64, T>(a, parts, ratio, stream);
}

}  // namespace

extern "C" int causeway_compress_decode(const Decode* a, int parts, int ratio, int dim, int index_dim,
                                        int f32, void* stream) {
  return f32 ? dispatch<float>(*a, parts, ratio, dim, index_dim, (cudaStream_t)stream)
             : dispatch<__nv_bfloat16>(*a, parts, ratio, dim, index_dim, (cudaStream_t)stream);
}

}  // namespace causeway
