// The router for bf16 rows and weight. Contract: kernels/moe_gate/api.py.
//
// Few tokens: one launch. A block multiplies all rows with 16 experts' weight over one of the four segments
// that kernels/linear cuts K into, and asks for all of that weight before the kernel ahead has ended. The
// sums travel through global memory as 64-bit words of value and tag: a word with this launch's tag is there,
// so nobody waits on a fence, a flag or the blocks of a cluster. The last blocks take a token each: all threads
// add the segments in order and make scores, one warp chooses.
// Many tokens: the product of kernels/linear writes logits, a warp chooses for a token. An element's sum has
// the same bits in all tiles of that product (kernels/linear/cuda/dense.cuh), and here.
#include "../../linear/cuda/dense.cuh"
#include "../../linear/cuda/dense_host.cuh"
#include "choose.cuh"
#include "launch.cuh"

namespace causeway {
namespace gate {

constexpr int kExperts = 16;  // of a block
constexpr int kRowWarps = 8;  // of a block that chooses for many tokens

// Rows, and stages of the ring: those of all of a segment where 7168 columns fit.
template <int kRows, int kStages>
using Shape = DenseShape<kRows, 1, kExperts, kStages, true, 1, false, 1>;

__device__ __forceinline__ uint64_t word_of(float value, uint32_t tag) {
  return static_cast<uint64_t>(tag) << 32 | __float_as_uint(value);
}
__device__ __forceinline__ void store_words(uint64_t* to, float a, float b, uint32_t tag) {
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(word_of(a, tag)),
               "l"(word_of(b, tag))
               : "memory");
}
__device__ __forceinline__ void load_words(uint64_t& a, uint64_t& b, const uint64_t* from) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
}

// What marks the words of this launch: every launch adds 65536 to the counter, in parts (`leave`).
__device__ __forceinline__ uint32_t launch_tag(const Arguments& args) {
  uint64_t count;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(count) : "l"(args.counter) : "memory");
  return static_cast<uint32_t>(count >> 16) + 1;
}
// A block that has not left yet keeps the sum of the parts below 65536: it reads the tag of this launch.
__device__ __forceinline__ void leave(const Arguments& args) {
  const uint64_t part = blockIdx.x == 0 ? 65536 - (gridDim.x - 1) : 1;
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(args.counter), "l"(part) : "memory");
}

// The sums of one segment and 16 experts, on their way.
template <class S>
__device__ __forceinline__ void send_segment(uint8_t* shared, const DenseArguments& product,
                                             const Arguments& args, const Place<S>& place, int warp,
                                             int lane, uint32_t tag) {
  if (place.first_step >= place.last_step) return;
  Products<S> products(shared, product, place, warp);
  float acc[S::kParts];
  products.start(acc, place.first_step, true);
  products.next(true);
  for (int step = place.first_step + 1; step < place.last_step; ++step) {
    products.start(acc, step, false);
    products.next(false);
  }
  products.finish(acc);
  const int segment = blockIdx.x % kSegments;
  const int column = static_cast<int>(blockIdx.x) / kSegments * kExperts + (lane & 3) * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + lane / 4;
    if (row >= S::kRows || row >= product.rows) continue;
    uint64_t* line = args.words + (row * kSegments + segment) * args.pitch + column;
#pragma unroll
    for (int i = half * 2; i < S::kParts; i += 4) {
      store_words(line + i / 4 * 8, acc[i], acc[i + 1], tag);
    }
  }
}

// Two neighbouring logits of a row as soon as all segments' words are there; added as the product does.
__device__ __forceinline__ float2 receive(const uint64_t* from, int pitch, int segments, uint32_t tag) {
  uint64_t a[kSegments], b[kSegments];
  bool there;
  do {
    there = true;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      if (s < segments) load_words(a[s], b[s], from + s * pitch);
    }
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      if (s < segments) {
        there = there && static_cast<uint32_t>(a[s] >> 32) == tag;
        there = there && static_cast<uint32_t>(b[s] >> 32) == tag;
      }
    }
  } while (!there);
  float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int s = 0; s < kSegments; ++s) {
    if (s < segments) {
      sum.x += __uint_as_float(static_cast<uint32_t>(a[s]));
      sum.y += __uint_as_float(static_cast<uint32_t>(b[s]));
    }
  }
  return sum;
}

// kPer: experts of a lane.
template <class S, int kPer>
__global__ void __launch_bounds__(S::kThreads, 1) few_kernel(
    const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
    const __grid_constant__ DenseArguments product, const __grid_constant__ Arguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];  // the swizzle asks for 1024
  const int warp = __shfl_sync(kAll, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Place<S> place(smem_address(shared), product);
  if (threadIdx.x == 0) place.init();
  __syncthreads();
  if (warp == S::kWarps) {
    if (lane == 0) bring_weight<S>(&b_map, product, place);
  } else if (warp == S::kWarps + 1) {
    if (lane == 0) bring_rows<S>(&a_map, product, place);
  }
  __syncwarp();
  wait_for_previous();  // an earlier launch may still read the words and add to the counter
  const uint32_t tag = launch_tag(args);
  if (warp < S::kWarps) send_segment<S>(shared, product, args, place, warp, lane, tag);

  // The ring is free once the block's products are done. The last blocks choose: all others have started.
  float* scores = reinterpret_cast<float*>(shared);
  uint32_t* keys = reinterpret_cast<uint32_t*>(scores + kMostExperts);
  const int segments = (product.k_steps + product.segment_steps - 1) / product.segment_steps;
  for (int row = gridDim.x - 1 - blockIdx.x; row < product.rows; row += gridDim.x) {
    int expert = args.table == nullptr || warp > 0 ? 0 : listed(args, row, lane);
    __syncthreads();
    for (int e = threadIdx.x * 2; e < 32 * kPer; e += S::kThreads * 2) {
      float2 key = make_float2(0.0f, 0.0f);
      uint32_t first = 0, second = 0;
      if (e < args.experts) {
        if (args.bias != nullptr) {
          key.x = __ldg(args.bias + e);
          if (e + 1 < args.experts) key.y = __ldg(args.bias + e + 1);
        }
        const float2 logit =
            receive(args.words + row * kSegments * args.pitch + e, args.pitch, segments, tag);
        scores[e] = score_of(logit.x);
        first = key_of(scores[e] + key.x);
        scores[e + 1] = score_of(logit.y);
        if (e + 1 < args.experts) second = key_of(scores[e + 1] + key.y);
      }
      *reinterpret_cast<uint2*>(keys + e) = make_uint2(first, second);
    }
    __syncthreads();
    if (warp == 0) {
      if (args.table == nullptr) {
        uint32_t key[kPer];
#pragma unroll
        for (int j = 0; j < kPer; j += 4) {
          const uint4 four = *reinterpret_cast<const uint4*>(keys + lane * kPer + j);
          key[j] = four.x, key[j + 1] = four.y, key[j + 2] = four.z, key[j + 3] = four.w;
        }
        expert = choose_in_turn<kPer>(key, args.k, lane);
      }
      store_row(args, row, lane, expert, lane < args.k && expert >= 0 ? scores[expert] : 0.0f);
    }
  }
  __syncthreads();  // every thread has read the tag
  if (threadIdx.x == 0) leave(args);
}

// Values kPer * lane .. of `count`, zeros behind them. The row starts at a multiple of 16 bytes where the
// count is a multiple of four.
template <int kPer>
__device__ __forceinline__ void load_lane(float (&value)[kPer], const float* row, int count, int lane) {
#pragma unroll
  for (int j = 0; j < kPer; j += 4) {
    const int first = lane * kPer + j;
    if (count % 4 == 0) {
      float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (first < count) four = *reinterpret_cast<const float4*>(row + first);
      value[j] = four.x, value[j + 1] = four.y, value[j + 2] = four.z, value[j + 3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) value[j + i] = first + i < count ? row[first + i] : 0.0f;
    }
  }
}

template <int kPer>
__global__ void __launch_bounds__(kRowWarps * 32) choose_kernel(const __grid_constant__ Arguments args) {
  __shared__ uint64_t room[kRowWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + warp;
  wait_for_previous();
  let_next_start();
  if (row >= args.tokens) return;
  const float* logits = args.logits + row * args.experts;
  int expert;
  if (args.table != nullptr) {
    expert = listed(args, row, lane);
  } else {
    float logit[kPer], bias[kPer];
    load_lane<kPer>(logit, logits, args.experts, lane);
    load_lane<kPer>(bias, args.bias, args.bias == nullptr ? 0 : args.experts, lane);
    uint32_t key[kPer];
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const uint32_t real = key_of(score_of(logit[j]) + bias[j]);
      key[j] = lane * kPer + j < args.experts ? real : 0u;
    }
    expert = choose<kPer>(key, args.k, lane, room[warp]);
  }
  store_row(args, row, lane, expert, lane < args.k && expert >= 0 ? score_of(logits[expert]) : 0.0f);
}

template <class S, int kPer>
int launch_few(const CUtensorMap& a_map, const CUtensorMap& b_map, const DenseArguments& product,
               const Arguments& args, cudaStream_t stream) {
  static const cudaError_t configured = cudaFuncSetAttribute(
      few_kernel<S, kPer>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (configured != cudaSuccess) return configured;
  const int64_t tiles = (args.experts + kExperts - 1) / kExperts;
  return EarlyLaunch{tiles * kSegments, S::kThreads, stream, S::kSharedBytes}.start(
      few_kernel<S, kPer>, a_map, b_map, product, args);
}

// Experts of a lane: kernels exist for 4, 8, 12 and 16.
template <class Function>
int with_lanes(int experts, Function&& function) {
  switch ((experts + 127) / 128) {
    case 1: return function(std::integral_constant<int, 4>{});
    case 2: return function(std::integral_constant<int, 8>{});
    case 3: return function(std::integral_constant<int, 12>{});
    case 4: return function(std::integral_constant<int, 16>{});
    default: return cudaErrorInvalidValue;
  }
}

template <class S>
int run_few(const void* x, int64_t x_stride, const void* weight, int64_t weight_stride, int64_t dim,
            DenseArguments product, const Arguments& args, cudaStream_t stream) {
  CUtensorMap a_map, b_map;
  const int error = encode_operands(a_map, b_map, product, S::kRows, S::kColumns, x, x_stride, x_stride,
                                    weight, weight_stride, dim);
  if (error != 0) return error;
  return with_lanes(args.experts, [&](auto lanes) {
    return launch_few<S, decltype(lanes)::value>(a_map, b_map, product, args, stream);
  });
}

}  // namespace gate
}  // namespace causeway

// Up to 64 rows: x bf16 [rows, dim] and weight bf16 [experts, dim] with strides in bytes, as
// `encode_operands` wants them. Returns 0, a cudaError_t, or 10000 + a CUresult.
extern "C" int causeway_moe_gate_few(const void* x, int64_t x_stride, const void* weight,
                                     int64_t weight_stride, int64_t dim,
                                     const causeway::DenseArguments* product,
                                     const causeway::gate::Arguments* args, void* stream) {
  using namespace causeway::gate;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto run = product->rows <= 16   ? run_few<Shape<16, 28>>
                   : product->rows <= 32 ? run_few<Shape<32, 28>>
                                         : run_few<Shape<64, 20>>;
  if (product->rows > 64) return cudaErrorInvalidValue;
  return run(x, x_stride, weight, weight_stride, dim, *product, *args, queue);
}

// From logits on. Returns a cudaError_t.
extern "C" int causeway_moe_gate_choose(const causeway::gate::Arguments* args, void* stream) {
  using namespace causeway::gate;
  return with_lanes(args->experts, [&](auto lanes) {
    const int64_t blocks = (args->tokens + kRowWarps - 1) / kRowWarps;
    return causeway::EarlyLaunch{blocks, kRowWarps * 32, static_cast<cudaStream_t>(stream)}.start(
        choose_kernel<decltype(lanes)::value>, *args);
  });
}
