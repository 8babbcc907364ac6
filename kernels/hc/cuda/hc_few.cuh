// The kernel for few tokens: a cluster of 16 blocks for 16 tokens. Block i mixes slab i of all of them (of
// more than 16 slabs, two), and sends each token's sums, and the streams it made, to the block that
// finishes the token: factors, collapsed row, RMSNorm, FP8 form. The sums are those of hc_tiles.cuh in the
// same order, norm and codes those of kernels/quant_rows.
#pragma once
#include "hc_cluster.cuh"
#include "hc_factors.cuh"

namespace causeway {
namespace hc {

constexpr int kFewTile = 16;  // tokens of a cluster, at most
constexpr int kClusters = 4;  // up to which a cluster takes only eight
constexpr int kCluster = 16;
constexpr int kFewThreads = kUnits * 32;
constexpr int kFinishers = 256;  // threads that collapse a row, columns 8 t .. of every 2048
constexpr int kMaxSlabs = 32;
constexpr int kFewSums = kFewTile * kRecord;

// Shared memory: partial sums of a slab, slab sums, barriers, the second slab's weights, then the norm's
// weight and the streams' rows.
template <int kSlabs>
struct FewLayout {
  static constexpr int kSlabSums = kUnits * kFewSums * 4;
  static constexpr int kBars = kSlabSums + kMaxSlabs * kRecord * 4;
  static constexpr int kWeight = kBars + 128;
  static constexpr int kRest = kWeight + (kSlabs > 1 ? kStreams * 24 * kPieceBytes : 0);
  static int bytes(int dim) { return kRest + dim * (4 + 2 * kStreams); }
};

// Eight columns of the finished sub-layer's row: bf16, or float32 rounded to it.
template <bool kWide>
__device__ __forceinline__ uint4 load_result(const Arguments& args, int64_t token, int column) {
  const int64_t at = token * args.a_token + column;
  if constexpr (!kWide) return *reinterpret_cast<const uint4*>(args.a + at);
  const float4* wide = reinterpret_cast<const float4*>(reinterpret_cast<const float*>(args.a) + at);
  uint4 narrow;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 four = wide[i];
    (&narrow.x)[2 * i] = pack_bf16(four.x, four.y);
    (&narrow.x)[2 * i + 1] = pack_bf16(four.z, four.w);
  }
  return narrow;
}

// Sixteen columns of a stream, from `column` and 32 further: as they are, or made by hc_post and then kept
// in global memory and in the finishing block's rows.
template <Mode kMode, bool kWide>
__device__ __forceinline__ void load_columns(uint4 (&x)[2], const Arguments& args, int64_t token,
                                             int stream, int column, uint32_t rows, uint32_t bar,
                                             uint32_t finisher) {
  const __nv_bfloat16* from = args.x + token * args.x_token + column;
  if constexpr (kMode != Mode::kPostPre) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x[half] = *reinterpret_cast<const uint4*>(from + stream * args.x_stream + half * 32);
    }
    return;
  }
  float post = __ldcg(args.post_in + token * 4 + stream), comb[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) comb[j] = __ldcg(args.comb_in + token * 16 + j * 4 + stream);
  uint4 a[2], old[2][kStreams];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    a[half] = load_result<kWide>(args, token, column + half * 32);
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      old[half][j] = *reinterpret_cast<const uint4*>(from + j * args.x_stream + half * 32);
    }
  }
  const uint32_t there = remote_address(rows + (stream * args.dim + column) * 2, finisher);
  bar = remote_address(bar, finisher);
  __nv_bfloat16* to = args.streams + (token * kStreams + stream) * args.dim + column;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    x[half] = mix_columns(post, comb, a[half], old[half]);
    send(there + half * 64, bar, x[half]);
    *reinterpret_cast<uint4*>(to + half * 32) = x[half];
  }
}

// kSlabs: slabs of a block; kChunks: of 2048 columns in a row; kWide: `a` holds float32.
template <Mode kMode, int kSlabs, int kChunks, bool kWide>
__global__ void __launch_bounds__(kFewThreads, 1) few_kernel(const __grid_constant__ Arguments args) {
  using L = FewLayout<kSlabs>;
  constexpr bool kPost = kMode == Mode::kPostPre;
  constexpr int kMixes = kMode == Mode::kHead ? kStreams : 24;
  extern __shared__ __align__(1024) char memory[];
  __shared__ float norm_partial[kFinishers / 32];
  float* partial = reinterpret_cast<float*>(memory);
  float* slab_sums = reinterpret_cast<float*>(memory + L::kSlabSums);
  const uint32_t row_bar = smem_address(memory + L::kBars), weight_bar = row_bar + 8;
  const uint32_t sum_bar = row_bar + 16;  // slab sums, and the streams that hc_post made
  const char* norm_weight = memory + L::kRest;
  char* rows = memory + L::kRest + args.dim * 4;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int rank = blockIdx.x % kCluster;
  const int64_t first = (int64_t)(blockIdx.x / kCluster) * args.few;
  const int live = args.tokens - first < args.few ? (int)(args.tokens - first) : args.few;
  // The last blocks finish the first tokens: they may have no slab to mix.
  const int mine = kCluster - 1 - rank;
  const bool finishes = mine < live;
  const int64_t token = first + mine;

  asm volatile("griddepcontrol.launch_dependents;");
  // The second slab's columns come to L2 while the first is mixed.
  const auto prefetch = [&](const auto* row, int column) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + (rank * kSlabs + 1) * kSlab + column));
  };
  // What no kernel ahead writes: weights, and what goes with the mixes.
  const uint32_t norm_bytes =
      args.norm_weight == nullptr ? 0 : args.dim * (args.norm_is_float ? 4 : 2);
  const uint32_t row_bytes = kPost ? 0 : args.dim * 2 * kStreams;
  const bool second = kSlabs > 1 && rank * kSlabs + 1 < args.slabs;
  if (warp == 0) {
    if (lane == 0) {
      mbar_init(row_bar, 1);
      mbar_init(weight_bar, 1);
      mbar_init(sum_bar, 1);
      mbar_fence_init();
      if (second) expect_bytes(weight_bar, kStreams * kMixes * kSlab * 4);
      if (finishes) {
        expect_bytes(row_bar, norm_bytes + row_bytes);
        expect_bytes(sum_bar, args.slabs * kRecord * 4 + (kPost ? args.dim * 2 * kStreams : 0));
      }
      if (finishes && norm_bytes) {
        bulk_copy(smem_address(norm_weight), args.norm_weight, norm_bytes, row_bar);
      }
    }
    __syncwarp();
    for (int i = lane; second && i < kStreams * kMixes; i += 32) {
      const int stream = i / kMixes, row = i % kMixes;
      bulk_copy(smem_address(memory + L::kWeight + (stream * 24 + row) * kPieceBytes),
                args.fn + ((int64_t)row * kStreams + stream) * args.dim + (rank * kSlabs + 1) * kSlab,
                kSlab * 4, weight_bar);
    }
  }
  __syncwarp();
  cluster_arrive();  // before a block writes to another, all must run
  RawWeight raw;
  if (rank * kSlabs < args.slabs) load_raw<kMode>(raw, args, rank * kSlabs, warp, lane);
  const int record = lane < kRecord ? lane : kRecord - 1;
  const Affine affine = load_affine<kMode>(args, record);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (second && lane < live) {
    prefetch(args.x + (first + lane) * args.x_token + warp / 4 * args.x_stream, warp % 4 * 64);
    if constexpr (kPost) {  // a line holds 64 columns, or 32
      const int64_t row = (first + lane) * args.a_token;
      if constexpr (kWide) {
        if (warp < 8) prefetch(reinterpret_cast<const float*>(args.a) + row, warp * 32);
      } else if (warp < 4) {
        prefetch(args.a + row, warp * 64);
      }
    }
  }
  if (!kPost && thread == 0 && finishes) {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      bulk_copy(smem_address(rows + s * args.dim * 2), args.x + token * args.x_token + s * args.x_stream,
                args.dim * 2, row_bar);
    }
  }
  cluster_wait();
  const int stream = warp / 4, column = warp % 4 * 64 + lane_column(lane);
#pragma unroll
  for (int n = 0; n < kSlabs; ++n) {
    const int slab = rank * kSlabs + n;
    if (slab >= args.slabs) break;
    uint4 x[2][2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int other = half * 8 + lane / 4;  // whose columns this lane feeds to the products
      if (other < live) {
        load_columns<kMode, kWide>(x[half], args, first + other, stream, slab * kSlab + column,
                            smem_address(rows), sum_bar, kCluster - 1 - other);
      }
    }
    if (n > 0) {
      mbar_wait(weight_bar, 0);
      load_raw_shared<kMode>(raw, memory + L::kWeight, warp, lane);
      __syncthreads();  // the partial sums of the slab before have been read
    }
    Sums sums[2] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Step weight;
      split_step(weight, raw, step);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t* words = &x[half][step / 2].x;
        if (half == 0 || live > 8) {
          mix_step<kMode>(sums[half], weight, words[step % 2 * 2], words[step % 2 * 2 + 1]);
        }
      }
    }
    store_sums(add_up(sums[0]), partial + warp * kFewSums, lane);
    if (live > 8) store_sums(add_up(sums[1]), partial + warp * kFewSums + 8 * kRecord, lane);
    __syncthreads();
    if (thread < live * kRecord) {
      float sum = partial[thread];
#pragma unroll
      for (int unit = 1; unit < kUnits; ++unit) sum += partial[unit * kFewSums + thread];
      const uint32_t at = smem_address(slab_sums + slab * kRecord + thread % kRecord);
      const uint32_t finisher = kCluster - 1 - thread / kRecord;
      send(remote_address(at, finisher), remote_address(sum_bar, finisher), sum);
    }
  }
  if (!finishes || warp > kFinishers / 32) return;
  mbar_wait(row_bar, 0);
  mbar_wait(sum_bar, 0);
  float sum = 0.0f;
#pragma unroll 8
  for (int slab = 0; slab < args.slabs; ++slab) sum += slab_sums[slab * kRecord + record];
  const float squares = __shfl_sync(~0u, sum, kSquares);
  const float logit = logit_of(args, sum, squares, affine);
  if (warp == kFinishers / 32) {  // one warp makes what hc_post needs
    if constexpr (kMode != Mode::kHead) {
      if (lane >= 4 && lane < 8) args.post[token * 4 + lane - 4] = 2.0f * sigmoid(logit);
      float c[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) c[i] = __shfl_sync(~0u, logit, 8 + i);
      finish_comb(c, args.iters, args.eps);
      if (lane == 0) store_comb(args.comb + token * 16, c);
    }
    return;
  }
  const float gate = sigmoid(logit) + args.eps;
  float4 pre;
#pragma unroll
  for (int s = 0; s < kStreams; ++s) (&pre.x)[s] = __shfl_sync(~0u, gate, s);
  uint4 collapsed[kChunks];
  float square = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int column = c * 2048 + thread * 8;
    collapsed[c] = make_uint4(0, 0, 0, 0);
    if (column >= args.dim) continue;
    uint4 x[kStreams];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      x[s] = *reinterpret_cast<const uint4*>(rows + (s * args.dim + column) * 2);
    }
    collapsed[c] = collapse_columns(pre, x);
    if (args.norm_weight == nullptr) {
      *reinterpret_cast<uint4*>(args.out + token * args.dim + column) = collapsed[c];
      continue;
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float low = low_half((&collapsed[c].x)[word]), high = high_half((&collapsed[c].x)[word]);
      square = fmaf(low, low, square);
      square = fmaf(high, high, square);
    }
  }
  if (args.norm_weight == nullptr) return;
  // From here on as rms_norm_quant.
#pragma unroll
  for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
  if (lane == 0) norm_partial[warp] = square;
  named_barrier(1, kFinishers);
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kFinishers / 32; ++w) total += norm_partial[w];
  const float factor = rsqrtf(total / static_cast<float>(args.dim) + args.rms_eps);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int column = c * 2048 + thread * 8;
    if (column / 256 * 256 >= args.dim) break;  // a whole warp
    float v[8];
    uint4 packed;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float weight =
          args.norm_is_float
              ? reinterpret_cast<const float*>(norm_weight)[column + i]
              : __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(norm_weight)[column + i]);
      const uint32_t word = (&collapsed[c].x)[i / 2];
      v[i] = (i % 2 ? high_half(word) : low_half(word)) * factor * weight;
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      (&packed.x)[word] = pack_bf16(v[2 * word], v[2 * word + 1]);
      v[2 * word] = low_half((&packed.x)[word]);
      v[2 * word + 1] = high_half((&packed.x)[word]);
    }
    *reinterpret_cast<uint4*>(args.out + token * args.dim + column) = packed;
    store_codes(args, token, column, v);
  }
}

template <Mode kMode, int kSlabs, int kChunks, bool kWide>
cudaError_t launch_few(const Arguments& args, cudaStream_t stream) {
  const auto kernel = few_kernel<kMode, kSlabs, kChunks, kWide>;
  const int bytes = FewLayout<kSlabs>::bytes(args.dim);
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code == cudaSuccess) {
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (code != cudaSuccess) return code;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kCluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  // The kernel may start while the one ahead ends: it reads weights, then waits for the rest.
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)((args.tokens + args.few - 1) / args.few) * kCluster);
  config.blockDim = dim3(kFewThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <Mode kMode, bool kWide>
cudaError_t start_wide(const Arguments& args, cudaStream_t stream) {
  return args.slabs <= kCluster ? launch_few<kMode, 1, 2, kWide>(args, stream)
                                : launch_few<kMode, 2, 4, kWide>(args, stream);
}

template <Mode kMode>
cudaError_t start_few(Arguments args, cudaStream_t stream) {
  args.few = args.tokens <= 8 * kClusters ? 8 : kFewTile;
  if constexpr (kMode == Mode::kPostPre) {
    if (args.a_is_float) return start_wide<kMode, true>(args, stream);
  }
  return start_wide<kMode, false>(args, stream);
}

}  // namespace hc
}  // namespace causeway
