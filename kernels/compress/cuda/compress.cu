// Entries pooled from rows that an index names: the chunk form of the compressor, one launch.
#include "../../compress_decode/cuda/pooling.cuh"

namespace causeway {

struct Chunk {
  const float* rows;
  const int64_t *row_index, *positions, *slots;
  int64_t row_stride, index_stride, entries;
  Finish finish;
};

namespace {

template <int D, int SERIES>
struct IndexedRows {
  const Chunk& a;
  const int64_t* index;
  int col;

  __device__ Quad operator()(int j, int series) const {
    int64_t row = index[j];
    return load_quad<D, SERIES>(a.rows + row * a.row_stride, series, col, row >= 0);
  }
};

__device__ __forceinline__ int64_t slot_of(const Chunk& a, int64_t entry) {
  return a.slots ? a.slots[entry] : -1;
}

template <int D, class T>
__global__ void __launch_bounds__(D / 4, D == 512 ? 6 : 16) main4_kernel(const __grid_constant__ Chunk a) {
  __shared__ float sums[D / 64];
  int64_t entry = blockIdx.x, position = a.positions[entry], slot = slot_of(a, entry);
  int col = threadIdx.x * 4;
  IndexedRows<D, 2> rows{a, a.row_index + entry * a.index_stride, col};
  Quad q[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) q[j] = rows(j, j / 4);
  Ending end;
  end.read(a.finish, col, D);
  end.turn_at(position);
  float x[4];
  pool8(q, x);
  finish_main_block<D, T>(x, end, a.finish, slot, entry, sums);
}

constexpr int kIndexWarps = 4;

// A warp per indexer key.
template <int D, class T>
__global__ void __launch_bounds__(32 * kIndexWarps, 6) index4_kernel(const __grid_constant__ Chunk a) {
  int64_t entry = (int64_t)blockIdx.x * kIndexWarps + threadIdx.x / 32;
  if (entry >= a.entries) return;
  int64_t position = a.positions[entry], slot = slot_of(a, entry);
  int col = threadIdx.x % (D / 4) * 4;
  IndexedRows<D, 2> rows{a, a.row_index + entry * a.index_stride, col};
  Quad q[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) q[j] = rows(j, j / 4);
  Ending end;
  end.read(a.finish, col, D);
  end.turn_at(position);
  float x[4];
  pool8(q, x);
  hold<T>(x);
  finish_index<D, T>(x, end, a.finish, slot, entry);
}

template <int D, class T>
__global__ void __launch_bounds__(kPool128Threads, 3) main128_kernel(const __grid_constant__ Chunk a) {
  constexpr int kBlocks = D / 64;
  int64_t entry = blockIdx.x / kBlocks;
  int rank = blockIdx.x % kBlocks, col = rank * 64 + threadIdx.x % 16 * 4;
  pool128_entry<D, T>(IndexedRows<D, 1>{a, a.row_index + entry * a.index_stride, col}, rank,
                      a.positions[entry], a.finish, slot_of(a, entry), entry);
}

template <int D, class T>
int main_entries(const Chunk& a, int ratio, cudaStream_t stream) {
  if (ratio == 4) return launch_blocks(main4_kernel<D, T>, a.entries, 1, D / 4, 1, a, stream);
  return launch_blocks(main128_kernel<D, T>, a.entries * (D / 64), 1, kPool128Threads, D / 64, a,
                       stream);
}

template <int D, class T>
int index_entries(const Chunk& a, cudaStream_t stream) {
  int64_t blocks = (a.entries + kIndexWarps - 1) / kIndexWarps;
  return launch_blocks(index4_kernel<D, T>, blocks, 1, 32 * kIndexWarps, 1, a, stream);
}

template <class T>
int dispatch(const Chunk& a, int ratio, int dim, int index, cudaStream_t stream) {
  if (index) return dim == 128 ? index_entries<128, T>(a, stream) : index_entries<64, T>(a, stream);
  return dim == 512 ? main_entries<512, T>(a, ratio, stream) : main_entries<128, T>(a, ratio, stream);
}

}  // namespace

extern "C" int causeway_compress(const Chunk* a, int ratio, int dim, int index, int f32,
                                 void* stream) {
  return f32 ? dispatch<float>(*a, ratio, dim, index, (cudaStream_t)stream)
             : dispatch<__nv_bfloat16>(*a, ratio, dim, index, (cudaStream_t)stream);
}

}  // namespace causeway
