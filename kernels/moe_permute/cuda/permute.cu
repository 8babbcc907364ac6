// Rows to their experts' order: a stable counting sort of the choices by one cluster of blocks, then the
// copies. Integers only. Contract: kernels/moe_permute/api.py.
#include "hopper.cuh"
#include "launch.cuh"

namespace causeway {

struct Permute {
  const int64_t* ids;     // [tokens * choices]
  const float* weights;   // [tokens, choices], rows apart
  int64_t *offsets, *place;
  float* row_weight;
  const unsigned char *rows, *scales;  // bytes of the rows that are copied; scales may be null
  unsigned char *rows_out, *scales_out;
  int64_t weight_stride, row_stride, scale_stride, row_out_stride, scale_out_stride;
  int64_t tokens, first_expert;
  int choices, local, row_bytes, scale_bytes;  // row_bytes and all strides of rows: multiples of 16
};

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kBlocks = 16, kThreads = 1024, kWarps = kThreads / 32;  // of the sort
constexpr int kUnroll = 6;  // steps of a warp whose numbers are read at once
constexpr int kCopyThreads = 256;

// Exclusive sums over one warp's `count` values, in place.
__device__ __forceinline__ void scan_warp(int* values, int count, int lane) {
  int running = 0;
  for (int first = 0; first < count; first += 32) {
    int at = first + lane, own = at < count ? values[at] : 0, sum = own;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      int before = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += before;
    }
    if (at < count) values[at] = running + sum - own;
    running += __shfl_sync(kAll, sum, 31);
  }
}

// Every warp has a contiguous part of the choices. counts[w][e]: of expert e in warp w's part, then the
// place of its next one.
__global__ void __launch_bounds__(kThreads) sort_kernel(const __grid_constant__ Permute a) {
  extern __shared__ int shared[];
  const int bins = a.local + 1;  // the last one: experts of other ranks
  int* counts = shared;
  int* of_blocks = counts + kWarps * bins;  // [kBlocks][bins], filled by all blocks
  int* starts = of_blocks + kBlocks * bins;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = blockIdx.x;
  const int64_t count = a.tokens * a.choices;
  const int64_t part = (count + kBlocks * kThreads - 1) / (kBlocks * kThreads) * 32;
  const int64_t first = (rank * kWarps + warp) * part, last = min(first + part, count);
  auto read = [&](int64_t at, int64_t (&id)[kUnroll]) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      id[i] = at + i * 32 + lane < last ? a.ids[at + i * 32 + lane] : -1;
  };
  int* own = counts + warp * bins;
  for (int i = lane; i < bins; i += 32) own[i] = 0;
  await_inputs();
  __syncwarp();
  for (int64_t at = first; at < last; at += 32 * kUnroll) {
    int64_t id[kUnroll];
    read(at, id);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      uint64_t expert = (uint64_t)(id[i] - a.first_expert);
      if (id[i] >= 0 && expert < (uint64_t)a.local) atomicAdd(own + expert, 1);
    }
  }
  __syncthreads();
  cluster_arrive();  // all blocks run: they may be sent to
  for (int e = threadIdx.x; e < a.local; e += kThreads) {
    int sum = 0;
#pragma unroll 8
    for (int w = 0; w < kWarps; ++w) {
      int more = counts[w * bins + e];
      counts[w * bins + e] = sum;
      sum += more;
    }
    starts[e] = sum;
  }
  __syncthreads();
  cluster_wait();
  for (int i = threadIdx.x; i < a.local * kBlocks; i += kThreads) {
    int e = i / kBlocks, to = i % kBlocks;
    uint32_t address = remote_address(smem_address(of_blocks + rank * bins + e), to);
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(starts[e]) : "memory");
  }
  cluster_arrive();
  cluster_wait();
  // of_blocks[b][e] -> rows of e ahead of block b; starts[e] -> all rows of e.
  for (int e = threadIdx.x; e < a.local; e += kThreads) {
    int sum = 0, before = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (b == rank) before = sum;
      sum += of_blocks[b * bins + e];
    }
    of_blocks[e] = before;
    starts[e] = sum;
  }
  if (threadIdx.x == 0) starts[a.local] = 0;
  __syncthreads();
  if (warp == 0) scan_warp(starts, bins, lane);
  __syncthreads();
  if (rank == 0)
    for (int e = threadIdx.x; e < bins; e += kThreads) a.offsets[e] = starts[e];
  for (int e = lane; e < a.local; e += 32) own[e] += starts[e] + of_blocks[e];
  __syncwarp();
  for (int64_t at = first; at < last; at += 32 * kUnroll) {
    int64_t id[kUnroll];
    read(at, id);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      uint64_t expert = (uint64_t)(id[i] - a.first_expert);
      int e = id[i] >= 0 && expert < (uint64_t)a.local ? (int)expert : a.local;
      unsigned same = __match_any_sync(kAll, e), ahead = same & ((1u << lane) - 1);
      int where = own[e] + __popc(ahead);
      __syncwarp();
      if (ahead == 0 && e < a.local) own[e] = where + __popc(same);
      __syncwarp();
      if (at + i * 32 + lane < last) a.place[at + i * 32 + lane] = e < a.local ? where : -1;
    }
  }
}

// A block copies the row of a token as often as it was chosen here.
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(const __grid_constant__ Permute a) {
  await_inputs();
  const int64_t token = blockIdx.x;
  const int lane = threadIdx.x % 32;
  const int64_t mine = lane < a.choices ? a.place[token * a.choices + lane] : -1;
  const unsigned here = __ballot_sync(kAll, mine >= 0);
  if (here == 0) return;
  const int vectors = a.row_bytes / 16;
  const uint4* from = reinterpret_cast<const uint4*>(a.rows + token * a.row_stride);
  for (int first = 0; first < vectors; first += 2 * kCopyThreads) {
    const int one = first + threadIdx.x, two = one + kCopyThreads;
    uint4 x = make_uint4(0, 0, 0, 0), y = x;
    if (one < vectors) x = __ldg(from + one);
    if (two < vectors) y = __ldg(from + two);
    for (unsigned left = here; left; left &= left - 1) {
      const int64_t to = __shfl_sync(kAll, mine, __ffs(left) - 1);
      uint4* row = reinterpret_cast<uint4*>(a.rows_out + to * a.row_out_stride);
      if (one < vectors) row[one] = x;
      if (two < vectors) row[two] = y;
    }
  }
  for (int first = threadIdx.x - lane; first < a.scale_bytes; first += kCopyThreads) {
    const int at = first + lane;
    const unsigned char byte = at < a.scale_bytes ? a.scales[token * a.scale_stride + at] : 0;
    for (unsigned left = here; left; left &= left - 1) {
      const int64_t to = __shfl_sync(kAll, mine, __ffs(left) - 1);
      if (at < a.scale_bytes) a.scales_out[to * a.scale_out_stride + at] = byte;
    }
  }
  if (threadIdx.x < 32 && mine >= 0) a.row_weight[mine] = a.weights[token * a.weight_stride + lane];
}

}  // namespace

extern "C" int causeway_moe_permute(const Permute* a, void* stream) {
  const int bytes = ((kWarps + kBlocks) * (a->local + 1) + a->local + 1) * (int)sizeof(int);
  static const cudaError_t allowed[] = {
      cudaFuncSetAttribute(sort_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
      cudaFuncSetAttribute(sort_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024)};
  for (cudaError_t code : allowed)
    if (code != cudaSuccess) return (int)code;
  const auto queue = (cudaStream_t)stream;
  const cudaError_t code = EarlyLaunch{kBlocks, kThreads, queue, bytes, kBlocks}.start(sort_kernel, *a);
  if (code != cudaSuccess) return code;
  return EarlyLaunch{a->tokens, kCopyThreads, queue}.start(copy_kernel, *a);
}

}  // namespace causeway
