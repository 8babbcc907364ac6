// The kernel for few tokens: a cluster of 16 blocks for eight tokens. Block i mixes slab i of all eight
// (of more than 16 slabs, two), and sends each token's sums to the block that finishes it: factors,
// collapsed row, RMSNorm, FP8 form. The sums are those of hc_tiles.cuh in the same order, norm and codes
// those of kernels/quant_rows.
#pragma once
#include "hc_math.cuh"

namespace causeway {
namespace hc {

constexpr int kFewTile = 8;  // tokens of a cluster
constexpr int kCluster = 16;
constexpr int kFewThreads = kWarps * 32;
constexpr int kFinishers = 256;  // threads that collapse a row, columns 8 t .. of every 2048
constexpr int kMaxSlabs = 32;
constexpr int kFewSums = kFewTile * kRecord;

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void store_remote(uint32_t smem, uint32_t rank, float value) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(smem), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}

// Shared memory: partial sums, slab sums, then the norm's weight, a's row and the streams' rows.
template <int kUnits>
struct FewLayout {
  static constexpr int kSlabSums = kUnits * kWarps * kFewSums * 4;
  static constexpr int kBars = kSlabSums + kMaxSlabs * kRecord * 4;
  static constexpr int kRest = kBars + 128;
  static int bytes(int dim) { return kRest + dim * (4 + 2 + 2 * kStreams); }
};

template <Mode kMode, int kUnits, int kChunks>
__global__ void __launch_bounds__(kFewThreads, 1) few_kernel(const __grid_constant__ Arguments args) {
  using L = FewLayout<kUnits>;
  constexpr bool kPost = kMode == Mode::kPostPre;
  extern __shared__ __align__(128) char memory[];
  __shared__ float norm_partial[kFinishers / 32];
  float* partial = reinterpret_cast<float*>(memory);
  float* slab_sums = reinterpret_cast<float*>(memory + L::kSlabSums);
  uint32_t bar = smem_address(memory + L::kBars);
  const char* norm_weight = memory + L::kRest;
  const char* a_row = norm_weight + args.dim * 4;
  const char* rows = a_row + args.dim * 2;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int rank = blockIdx.x % kCluster;
  const int64_t first = (int64_t)(blockIdx.x / kCluster) * kFewTile;
  const int live = args.tokens - first < kFewTile ? (int)(args.tokens - first) : kFewTile;
  const bool finishes = rank < live;
  const int64_t token = first + rank;

  asm volatile("griddepcontrol.launch_dependents;");
  if (thread == 0 && finishes) {
    mbar_init(bar, 1);
    mbar_fence_init();
    const uint32_t weight_bytes =
        args.norm_weight == nullptr ? 0 : args.dim * (args.norm_is_float ? 4 : 2);
    expect_bytes(bar, args.dim * 2 * (kStreams + (kPost ? 1 : 0)) + weight_bytes);
    if (weight_bytes) bulk_copy(smem_address(norm_weight), args.norm_weight, weight_bytes, bar);
  }
  cluster_arrive();  // before a block writes to another, all must run
  // What no kernel ahead writes: weights, and what goes with the mixes.
  RawWeight raw;
  if (rank * kUnits < args.slabs) load_raw<kMode>(raw, args, rank * kUnits, warp, lane);
  const int record = lane < kRecord ? lane : kRecord - 1;
  const Affine affine = load_affine<kMode>(args, record);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (thread == 0 && finishes) {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      bulk_copy(smem_address(rows + s * args.dim * 2), args.x + token * args.x_token + s * args.x_stream,
                args.dim * 2, bar);
    }
    if constexpr (kPost) {
      bulk_copy(smem_address(a_row), args.a + token * args.a_token, args.dim * 2, bar);
    }
  }
  float4 post_in = {};
  float4 comb_in[kStreams] = {};
  if constexpr (kPost) {
    if (finishes) {
      post_in = __ldcg(reinterpret_cast<const float4*>(args.post_in) + token);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        comb_in[j] = __ldcg(reinterpret_cast<const float4*>(args.comb_in) + token * 4 + j);
      }
    }
  }

#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const int slab = rank * kUnits + unit;
    if (slab >= args.slabs) break;
    if (unit > 0) load_raw<kMode>(raw, args, slab, warp, lane);
    const int64_t mine = first + lane / 4;
    const int stream = warp / 4, column = slab * kSlab + warp % 4 * 64 + lane_column(lane);
    uint4 x[2] = {};
    if (mine < args.tokens) {
      const __nv_bfloat16* from = args.x + mine * args.x_token + column;
      if constexpr (kPost) {
        float post = __ldcg(args.post_in + mine * 4 + stream), comb[kStreams];
#pragma unroll
        for (int j = 0; j < kStreams; ++j) comb[j] = __ldcg(args.comb_in + mine * 16 + j * 4 + stream);
        uint4 a[2], old[2][kStreams];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[half] = *reinterpret_cast<const uint4*>(args.a + mine * args.a_token + column + half * 32);
#pragma unroll
          for (int j = 0; j < kStreams; ++j) {
            old[half][j] = *reinterpret_cast<const uint4*>(from + j * args.x_stream + half * 32);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) x[half] = mix_columns(post, comb, a[half], old[half]);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[half] = *reinterpret_cast<const uint4*>(from + stream * args.x_stream + half * 32);
        }
      }
    }
    Sums sums = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Step weight;
      split_step(weight, raw, step);
      const uint32_t* words = &x[step / 2].x;
      mix_step<kMode>(sums, weight, words[step % 2 * 2], words[step % 2 * 2 + 1]);
    }
    store_sums(sums, partial + (unit * kWarps + warp) * kFewSums, lane);
  }
  __syncthreads();
  cluster_wait();
  for (int i = thread; i < kUnits * kFewSums; i += kFewThreads) {
    const int unit = i / kFewSums, at = i % kFewSums, slab = rank * kUnits + unit;
    if (slab >= args.slabs || at / kRecord >= live) continue;
    const float* from = partial + unit * kWarps * kFewSums + at;
    float sum = from[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += from[w * kFewSums];
    store_remote(smem_address(slab_sums + slab * kRecord + at % kRecord), at / kRecord, sum);
  }
  cluster_arrive();
  // Meanwhile the new streams, which nobody waits for.
  uint4 x[kChunks][kStreams];
  if (finishes && thread < kFinishers) {
    mbar_wait(bar, 0);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = c * 2048 + thread * 8;
      if (column >= args.dim) {
#pragma unroll
        for (int s = 0; s < kStreams; ++s) x[c][s] = make_uint4(0, 0, 0, 0);
        continue;
      }
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        x[c][s] = *reinterpret_cast<const uint4*>(rows + (s * args.dim + column) * 2);
      }
      if constexpr (kPost) {
        const uint4 a = *reinterpret_cast<const uint4*>(a_row + column * 2);
        uint4 mixed[kStreams];
#pragma unroll
        for (int k = 0; k < kStreams; ++k) {
          float comb[kStreams];
#pragma unroll
          for (int j = 0; j < kStreams; ++j) comb[j] = (&comb_in[j].x)[k];
          mixed[k] = mix_columns((&post_in.x)[k], comb, a, x[c]);
        }
#pragma unroll
        for (int k = 0; k < kStreams; ++k) {
          x[c][k] = mixed[k];
          *reinterpret_cast<uint4*>(args.streams + (token * kStreams + k) * args.dim + column) = mixed[k];
        }
      }
    }
  }
  cluster_wait();
  if (!finishes || warp > kFinishers / 32) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int slab = 0; slab < args.slabs; ++slab) sum += slab_sums[slab * kRecord + record];
  const float squares = __shfl_sync(~0u, sum, 4);
  const float logit = logit_of(args, sum, squares, affine);
  if (warp == kFinishers / 32) {  // one warp makes what hc_post needs
    if constexpr (kMode != Mode::kHead) {
      if (lane > 4 && lane < 9) args.post[token * 4 + lane - 5] = 2.0f * sigmoid(logit);
      float c[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) c[i] = __shfl_sync(~0u, logit, 9 + i);
      finish_comb(c, args.iters, args.eps);
      if (lane == 0) store_comb(args.comb + token * 16, c);
    }
    return;
  }
  const float gate = sigmoid(logit) + args.eps;
  float4 pre;
#pragma unroll
  for (int s = 0; s < kStreams; ++s) (&pre.x)[s] = __shfl_sync(~0u, gate, s);
  float square = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int column = c * 2048 + thread * 8;
    x[c][0] = collapse_columns(pre, x[c]);
    if (args.norm_weight == nullptr) {
      if (column < args.dim) *reinterpret_cast<uint4*>(args.out + token * args.dim + column) = x[c][0];
      continue;
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float low = low_half((&x[c][0].x)[word]), high = high_half((&x[c][0].x)[word]);
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
      const uint32_t word = (&x[c][0].x)[i / 2];
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

template <Mode kMode, int kUnits, int kChunks>
cudaError_t launch_few(const Arguments& args, cudaStream_t stream) {
  const auto kernel = few_kernel<kMode, kUnits, kChunks>;
  const int bytes = FewLayout<kUnits>::bytes(args.dim);
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
  config.gridDim = dim3((unsigned)((args.tokens + kFewTile - 1) / kFewTile) * kCluster);
  config.blockDim = dim3(kFewThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <Mode kMode>
cudaError_t start_few(const Arguments& args, cudaStream_t stream) {
  return args.dim == 4096 ? launch_few<kMode, 1, 2>(args, stream)
                          : launch_few<kMode, 2, 4>(args, stream);
}

}  // namespace hc
}  // namespace causeway
