// Rows to FP8 (e4m3) with one power-of-two scale byte (E8M0) per row and 128 columns, alone or behind
// the op that makes the rows: SwiGLU, RMSNorm. Half a warp owns a block of 128 columns, eight a lane.

#include <cuda_runtime.h>

#include <type_traits>

#include "codes.cuh"
#include "launch.cuh"
#include "swiglu.cuh"

namespace {

using namespace causeway;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Values of rows as they are.
template <typename T>
struct Plain {
  static constexpr int kUnroll = 4;
  static constexpr bool kEarly = false;
  using Loaded = Raw<T>;
  const T* x;
  int64_t stride;
  const float* amax;  // [rows, blocks] block maxima to use instead of the rows' own, or null
  int64_t amax_stride;

  __device__ __forceinline__ Loaded load(int64_t row, int column, int k, bool wide) const {
    return load8(x + row * stride, column, k, wide);
  }
  __device__ __forceinline__ void values(const Loaded& raw, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = raw[i];
  }
  __device__ __forceinline__ uint32_t peak(
      const float (&v)[8], int64_t row, int block, int blocks) const {
    if (amax == nullptr) return block_peak(v);
    return block < blocks ? __float_as_uint(amax[row * amax_stride + block]) & 0x7FFFFFFFu : 0u;
  }
};

// (silu(min(g, limit)) * clamp(u, -limit, limit)) * weight, rounded to T.
template <typename T>
struct SwiGLU {
  static constexpr int kUnroll = sizeof(T) == 2 ? 4 : 2;
  // The product behind it reads its weight, which is older than the product ahead, while that one ends.
  static constexpr bool kEarly = true;
  struct Loaded {
    Raw<T> gate, up;
    float factor;  // 1 without a weight, which changes nothing
  };
  const T *g, *u;
  int64_t g_stride, u_stride;
  const float* weight;  // [rows] or null
  float limit;

  __device__ __forceinline__ Loaded load(int64_t row, int column, int k, bool wide) const {
    return {load8(g + row * g_stride, column, k, wide), load8(u + row * u_stride, column, k, wide),
            weight == nullptr ? 1.0f : __ldg(weight + row)};
  }
  __device__ __forceinline__ void values(const Loaded& raw, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = swiglu_value(raw.gate[i], raw.up[i], limit, raw.factor);
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) round_to_bfloat16(v[i], v[i + 1]);
    }
  }
  __device__ __forceinline__ uint32_t peak(const float (&v)[8], int64_t, int, int) const {
    return block_peak(v);
  }
};

// A warp holds 256 columns, or few of them at the ends of a row.
template <typename Source>
__global__ void __launch_bounds__(kThreads) rows_kernel(
    const Source source, const Output out, const uint32_t items, const uint32_t chunks, const int k,
    const int blocks, const int col_offset, const bool wide) {
  if constexpr (Source::kEarly) let_next_start();
  await_inputs();
  const uint32_t item = blockIdx.x * kWarps + threadIdx.x / 32;
  if (item >= items) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = item / chunks;
  const int at = static_cast<int>(item % chunks) * 256 + lane * 8, block = at / 128;
  const typename Source::Loaded raw = source.load(row, at - col_offset, k, wide);
  float v[8];
  source.values(raw, v);
  const uint32_t byte = scale_byte(source.peak(v, row, block, blocks));
  if (block >= blocks) return;
  write8(v, byte, out, row, at - col_offset, k, wide);
  if (lane % 16 == 0) write_scale(byte, out, row, block);
}

// Many rows: a warp has Unroll times 256 columns of one row, a block of threads those of eight rows. Their scales
// meet in shared memory: eight rows' bytes take eight stores, and eight rows of float32 columns are 32 bytes in a
// line, where a store of every warp's own would cost memory as much as one of 32 bytes.
template <typename Source, int Unroll>
__global__ void __launch_bounds__(kThreads) tall_kernel(
    const Source source, const Output out, const int64_t rows, const uint32_t chunks, const int k, const bool wide) {
  constexpr int kBlocks = 2 * Unroll;  // of 128 columns
  using Bytes = std::conditional_t<Unroll == 4, uint2, uint32_t>;
  static_assert(sizeof(Bytes) == kBlocks && kWarps == 8, "a row's scales are one word");
  __shared__ alignas(8) uint8_t bytes[kWarps][kBlocks];
  if constexpr (Source::kEarly) let_next_start();
  await_inputs();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = blockIdx.x / chunks * int64_t{kWarps};
  const int64_t row = min(first_row + warp, rows - 1);  // past the last one: that again
  const int first_block = static_cast<int>(blockIdx.x % chunks) * kBlocks, first = first_block * 128 + lane * 8;
  typename Source::Loaded raw[Unroll];
#pragma unroll
  for (int i = 0; i < Unroll; ++i) raw[i] = source.load(row, first + i * 256, k, wide);
#pragma unroll
  for (int i = 0; i < Unroll; ++i) {
    const int at = first + i * 256;
    float v[8];
    source.values(raw[i], v);
    const uint32_t byte = scale_byte(source.peak(v, row, at / 128, k / 128));
    write8(v, byte, out, row, at, k, wide);
    if (lane % 16 == 0) bytes[warp][2 * i + lane / 16] = static_cast<uint8_t>(byte);
  }
  __syncthreads();
  const int of = threadIdx.x % kWarps, block = threadIdx.x / kWarps;
  if (first_row + of >= rows) return;
  if (block < kBlocks) out.columns.write(first_row + of, first_block + block, bytes[of][block]);
  if (block == kBlocks) {
    *reinterpret_cast<Bytes*>(out.scale + (first_row + of) * out.scale_stride + first_block) =
        *reinterpret_cast<const Bytes*>(bytes[of]);
  }
}

template <int Unroll, typename Source>
int start_tall(const Source& source, const Output& out, int64_t rows, int k, bool wide, cudaStream_t stream) {
  const int64_t chunks = k / (256 * Unroll);
  return EarlyLaunch{(rows + kWarps - 1) / kWarps * chunks, kThreads, stream}.start(
      tall_kernel<Source, Unroll>, source, out, rows, static_cast<uint32_t>(chunks), k, wide);
}

// Few rows: many warps with little work each. Many rows: more loads in flight in every warp.
template <typename Source>
int start_rows(const Source& source, const Output& out, int64_t rows, int k, int col_offset, bool wide,
               cudaStream_t stream) {
  if (rows * k >= (1 << 20) && col_offset == 0) {
    constexpr int kMost = Source::kUnroll;
    if (k % (256 * kMost) == 0) return start_tall<kMost>(source, out, rows, k, wide, stream);
    if (k % 512 == 0) return start_tall<2>(source, out, rows, k, wide, stream);
  }
  const int blocks = (col_offset + k + 127) / 128;
  const int64_t chunks = (blocks + 1) / 2, items = rows * chunks;
  if (items > INT32_MAX) return cudaErrorInvalidValue;
  return EarlyLaunch{(items + kWarps - 1) / kWarps, kThreads, stream}.start(
      rows_kernel<Source>, source, out, static_cast<uint32_t>(items), static_cast<uint32_t>(chunks), k, blocks,
      col_offset, wide);
}

__device__ __forceinline__ float add_lanes(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  return value;
}

// One block of threads a row; thread t holds columns 8 t .. of every 2048. The squares of 256 columns, a
// warp's, are added first, then these sums: kernels/hc, which has them in different blocks, does the same.
template <typename T, typename W, int Chunks>
__global__ void __launch_bounds__(kThreads, Chunks == 4 ? 5 : 0) norm_kernel(
    const T* __restrict__ x, const int64_t x_stride, const W* __restrict__ weight, T* __restrict__ normed,
    const int64_t normed_stride, const Output out, const int k, const float eps) {
  await_inputs();
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = (k + 127) / 128;
  __shared__ float partial[kWarps * Chunks];
  __shared__ uint8_t bytes[16 * Chunks];
  float v[Chunks][8];
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    float sum = 0.0f;
    const Raw<T> raw = load8(x + row * x_stride, c * 2048 + threadIdx.x * 8, k, true);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[c][i] = raw[i];
      sum = fmaf(v[c][i], v[c][i], sum);
    }
    sum = add_lanes(sum);
    if (lane == 0) partial[c * kWarps + warp] = sum;
  }
  __syncthreads();
  const float total = add_lanes(lane < kWarps * Chunks ? partial[lane] : 0.0f);
  const float factor = rsqrtf(total / static_cast<float>(k) + eps);
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int column = c * 2048 + threadIdx.x * 8;
    const Raw<W> scale = load8(weight, column, k, true);
    alignas(16) T rounded[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      rounded[i] = from_float<T>(v[c][i] * factor * scale[i]);
      v[c][i] = to_float(rounded[i]);
    }
    if (column < k) {
      uint4* target = reinterpret_cast<uint4*>(normed + row * normed_stride + column);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
        target[i] = reinterpret_cast<const uint4*>(rounded)[i];
      }
    }
    const uint32_t byte = scale_byte(block_peak(v[c]));
    write8(v[c], byte, out, row, column, k, true);
    if (lane % 16 == 0) bytes[column / 128] = static_cast<uint8_t>(byte);
  }
  __syncthreads();
  if (threadIdx.x < blocks) write_scale(bytes[threadIdx.x], out, row, threadIdx.x);
}

template <typename T, typename W>
int start_norm(const void* x, int64_t x_stride, const void* weight, void* normed, int64_t normed_stride,
               const Output& out, int64_t rows, int k, float eps, cudaStream_t stream) {
  const T* rows_in = static_cast<const T*>(x);
  const W* factors = static_cast<const W*>(weight);
  T* target = static_cast<T*>(normed);
  const int chunks = (k + 2047) / 2048;
  if (chunks < 1 || chunks > 4) return cudaErrorInvalidValue;
  const auto kernel = chunks == 1   ? norm_kernel<T, W, 1>
                      : chunks == 2 ? norm_kernel<T, W, 2>
                                    : norm_kernel<T, W, 4>;
  return EarlyLaunch{rows, kThreads, stream}.start(kernel, rows_in, x_stride, factors, target,
                                                   normed_stride, out, k, eps);
}

Output output(void* q, int64_t q_stride, void* scale, int64_t scale_stride, float* columns, int shift, int k) {
  return {static_cast<uint8_t*>(q), static_cast<uint8_t*>(scale), q_stride, scale_stride,
          {columns, (k + 127) / 128, shift}};
}

}  // namespace

// Strides in elements; q and scale strides in bytes. `columns` (may be null): in pieces of 2^shift rows. `wide`: every
// row starts on 16 bytes, k is a multiple of 8 and col_offset is 0. Each entry returns a cudaError_t.
extern "C" int causeway_quant_rows(
    const void* x, int x_is_float, int64_t x_stride, const float* amax, int64_t amax_stride, void* q,
    int64_t q_stride, void* scale, int64_t scale_stride, float* columns, int shift, int64_t rows, int k,
    int col_offset, int wide, void* stream) {
  const Output out = output(q, q_stride, scale, scale_stride, columns, shift, col_offset + k);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (x_is_float) {
    const Plain<float> source{static_cast<const float*>(x), x_stride, amax, amax_stride};
    return start_rows(source, out, rows, k, col_offset, wide != 0, s);
  }
  const Plain<__nv_bfloat16> source{static_cast<const __nv_bfloat16*>(x), x_stride, amax, amax_stride};
  return start_rows(source, out, rows, k, col_offset, wide != 0, s);
}

extern "C" int causeway_swiglu_quant(
    const void* g, const void* u, int is_float, int64_t g_stride, int64_t u_stride,
    const float* row_weight, float limit, void* q, int64_t q_stride, void* scale, int64_t scale_stride,
    float* columns, int shift, int64_t rows, int k, int wide, void* stream) {
  const Output out = output(q, q_stride, scale, scale_stride, columns, shift, k);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (is_float) {
    const SwiGLU<float> source{static_cast<const float*>(g), static_cast<const float*>(u), g_stride,
                               u_stride, row_weight, limit};
    return start_rows(source, out, rows, k, 0, wide != 0, s);
  }
  const SwiGLU<__nv_bfloat16> source{static_cast<const __nv_bfloat16*>(g),
                                     static_cast<const __nv_bfloat16*>(u), g_stride, u_stride,
                                     row_weight, limit};
  return start_rows(source, out, rows, k, 0, wide != 0, s);
}

// x, weight and normed start every row on 16 bytes; k is a multiple of 8 and at most 8192.
extern "C" int causeway_rms_norm_quant(
    const void* x, int x_is_float, int64_t x_stride, const void* weight, int weight_is_float, float eps,
    void* normed, int64_t normed_stride, void* q, int64_t q_stride, void* scale, int64_t scale_stride,
    float* columns, int shift, int64_t rows, int k, void* stream) {
  const Output out = output(q, q_stride, scale, scale_stride, columns, shift, k);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (x_is_float) {
    return weight_is_float ? start_norm<float, float>(x, x_stride, weight, normed, normed_stride, out,
                                                      rows, k, eps, s)
                           : start_norm<float, __nv_bfloat16>(x, x_stride, weight, normed,
                                                              normed_stride, out, rows, k, eps, s);
  }
  return weight_is_float ? start_norm<__nv_bfloat16, float>(x, x_stride, weight, normed, normed_stride,
                                                            out, rows, k, eps, s)
                         : start_norm<__nv_bfloat16, __nv_bfloat16>(
                               x, x_stride, weight, normed, normed_stride, out, rows, k, eps, s);
}
