// Entries pooled from rows that an index names: the chunk form of the compressor, one launch.
#include <algorithm>

#include "../../compress_decode/cuda/pool128.cuh"

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

// Ahead of `await_inputs`: what a block that makes entries from `first` on waits for, but row numbers.
__device__ __forceinline__ void ask_for_entries(const Chunk& a, int64_t first) {
  if (threadIdx.x == 32) ask_for(a.positions + first);
  if (threadIdx.x == 33 && a.slots) ask_for(a.slots + first);
  if (threadIdx.x == 34) ask_for(a.finish.inv_freq);
}

template <int D, class T>
__global__ void __launch_bounds__(D / 4, D == 512 ? 6 : 16) main4_kernel(const __grid_constant__ Chunk a) {
  __shared__ float sums[D / 64];
  ask_for_entries(a, blockIdx.x);
  if (threadIdx.x == 0) ask_for(a.row_index + blockIdx.x * a.index_stride);
  await_inputs();
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

constexpr int kIndexWarps = 4, kIndexBlocks = 132 * 4;

// Indexer keys, a warp per key and turn. The next key's rows are read while one is finished, and no more
// than that: with all rows asked for at once most keys would be complete only at the end.
template <int D, class T>
__global__ void __launch_bounds__(32 * kIndexWarps, 4) index4_kernel(const __grid_constant__ Chunk a) {
  __shared__ float4 waiting[8][32 * kIndexWarps];  // u: spares registers
  int64_t first = blockIdx.x + (int64_t)(threadIdx.x / 32) * gridDim.x;
  int64_t step = (int64_t)gridDim.x * kIndexWarps;
  if (threadIdx.x % 32 == 0 && first < a.entries) {
    ask_for(a.row_index + first * a.index_stride);
    ask_for(a.positions + first);
    if (a.slots) ask_for(a.slots + first);
  }
  if (threadIdx.x == 1) ask_for(a.finish.inv_freq);
  await_inputs();
  if (first >= a.entries) return;
  int col = threadIdx.x % (D / 4) * 4;
  int64_t row[8], position, slot;
  auto number = [&](int64_t entry) {
    const int64_t* index = a.row_index + entry * a.index_stride;
#pragma unroll
    for (int j = 0; j < 8; ++j) row[j] = index[j];
  };
  float g[8][4];
  auto bring = [&] {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* u = a.rows + row[j] * a.row_stride + j / 4 * D + col;
#pragma unroll
      for (int c = 0; c < 4; ++c) g[j][c] = kNegInf;
      if (row[j] >= 0) {
        copy16_async(smem_address(&waiting[j][threadIdx.x]), u, true);
        load_values(u + 2 * D, g[j]);
      } else {
        waiting[j][threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
  };
  number(first);
  position = a.positions[first], slot = slot_of(a, first);
  bring();
  Ending end;
  end.read(a.finish, col, D);
  float freq = a.finish.inv_freq[threadIdx.x % 32];
  for (int64_t entry = first;; entry += step) {
    int64_t next = entry + step;
    bool more = next < a.entries;
    if (more) number(next);
    end.turn_together(position, freq, col, D);
    copies_wait_all();  // each thread reads what it copied
    float x[4];
    pool8(
        g, [&](int j, float (&u)[4]) { load_values((const float*)&waiting[j][threadIdx.x], u); }, x);
    int64_t place = slot;
    if (more) {
      bring();
      position = a.positions[next], slot = slot_of(a, next);
    }
    hold<T>(x);
    finish_index<D, T>(x, end, a.finish, place, entry);
    if (!more) break;
  }
}

template <int D>
struct ChunkSource {
  const Chunk& a;

  __device__ __forceinline__ void load(int64_t entry, const PartOf& mine, Pool128Share& share,
                                       float (&g)[8][4]) const {
    const int64_t* index = a.row_index + entry * a.index_stride + mine.first;
    int64_t row[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) row[i] = index[2 * i];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      bring_row<D>(share, i, a.rows + row[i] * a.row_stride + mine.col, row[i] >= 0, g[i]);
  }
  __device__ void begin(const Pool128Share&, float (&)[8][4]) const {}
  __device__ int64_t position(int64_t entry) const { return a.positions[entry]; }
  __device__ int64_t slot(int64_t entry) const { return slot_of(a, entry); }
};

// ONE: a cluster makes one entry only.
template <int D, class T, bool ONE>
__global__ void __launch_bounds__(kPool128Threads, ONE ? 4 : 3)
    main128_kernel(const __grid_constant__ Chunk a) {
  __shared__ Pool128Share share;
  constexpr int kBlocks = D / 64;
  int rank = cluster_rank();
  int64_t first = blockIdx.x / kBlocks, step = gridDim.x / kBlocks;
  ask_for_entries(a, first);
  if (threadIdx.x < kRowParts) ask_for(a.row_index + first * a.index_stride + threadIdx.x * 16);
  open_pool128(share);
  await_inputs();
  pool128_entries<D, T>(ChunkSource<D>{a}, share, a.finish, rank, first, ONE ? first + 1 : a.entries,
                        ONE ? 1 : step);
}

// How many clusters of main128_kernel the machine holds: more of them would wait for the first to end.
template <int D, class T, bool ONE>
int clusters_at_once() {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(D / 64);
  config.blockDim = dim3(kPool128Threads);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {D / 64, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  cudaOccupancyMaxActiveClusters(&count, main128_kernel<D, T, ONE>, &config);
  return std::max(count, 1);
}

template <int D, class T>
int main_entries(const Chunk& a, int ratio, cudaStream_t stream) {
  if (ratio == 4) return EarlyLaunch{a.entries, D / 4, stream}.start(main4_kernel<D, T>, a);
  static const int single = clusters_at_once<D, T, true>(), most = clusters_at_once<D, T, false>();
  if (a.entries <= single)
    return EarlyLaunch{a.entries * (D / 64), kPool128Threads, stream, 0, D / 64, true}.start(
        main128_kernel<D, T, true>, a);
  // As many entries for each.
  int64_t turns = (a.entries + most - 1) / most, clusters = (a.entries + turns - 1) / turns;
  return EarlyLaunch{clusters * (D / 64), kPool128Threads, stream, 0, D / 64, true}.start(
      main128_kernel<D, T, false>, a);
}

template <int D, class T>
int index_entries(const Chunk& a, cudaStream_t stream) {
  int64_t blocks = std::min<int64_t>(a.entries, kIndexBlocks);
  return EarlyLaunch{blocks, 32 * kIndexWarps, stream}.start(index4_kernel<D, T>, a);
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
