// The kernel for few tokens: a group of blocks, a slab each, for up to 16 of them. Weights are read, and cut
// into parts where processors are free, before the kernel ahead ends. Block i sends each token's sums over
// slab i to the others (hc_words.cuh): every block makes the factors of all its group's tokens and collapses
// its own columns, exchanges their squares for the RMSNorm, and makes the FP8 form. Block t also makes post
// and comb of token t. The sums are those of hc_tiles.cuh in the same order, norm and codes those of
// kernels/quant_rows.
#pragma once
#include "hc_words.cuh"
#include "launch.cuh"

namespace causeway {
namespace hc {

constexpr int kFewThreads = kUnits * 32;
constexpr int kFirstPart = kUnits / 2;  // warps from here on wait for the parts of a token's sums
constexpr int kFewBlocks = 64;
constexpr int kClusters = 2, kClusterTokens = 4;
constexpr int kFewSums = kFewTile * kRecord;
constexpr int kTokenBytes = kStreams * kSlab * 2;

// Shared memory: streams as they came, `a`, the factors of hc_post, the norm's weight; the weight as it came
// and, when it has been cut, over it the streams that were made and the sums of the units; what other blocks
// send.
struct FewLayout {
  static constexpr int kA = kFewTile * kTokenBytes;
  static constexpr int kFactors = kA + kFewTile * kSlab * 4;
  static constexpr int kNorm = kFactors + kFewTile * 20 * 4;
  static constexpr int kRaw = kNorm + kSlab * 4;
  static constexpr int kMade = kRaw;
  static constexpr int kPartial = kMade + kFewTile * kTokenBytes;
  static constexpr int kRawRow = kSlab * 4 + 32;  // bytes; eight rows start in different banks
  static constexpr int kBars = kRaw + kStreams * 24 * kRawRow;
  static constexpr int kRoom = kBars + kStreams * 8;
  static_assert(kPartial + kUnits * kFewSums * 4 <= kBars, "what lies over the weight");
};

// The slab's weight of a stream on its way, by a warp. Loads of what each thread multiplies would touch eight
// rows each, which takes the processor twice as long.
template <Mode kMode>
__device__ __forceinline__ void bring_weight(const Arguments& args, char* memory, int slab, int stream,
                                             int lane) {
  constexpr int kRows = kMode == Mode::kHead ? kStreams : 24;
  const uint32_t bar = smem_address(memory + FewLayout::kBars) + stream * 8;
  if (lane == 0) {
    mbar_init(bar, 1);
    mbar_fence_init();
    expect_bytes(bar, kRows * kSlab * 4);
  }
  __syncwarp();
  if (lane >= kRows) return;
  bulk_copy(smem_address(memory + FewLayout::kRaw) + (stream * 24 + lane) * FewLayout::kRawRow,
            args.fn + ((int64_t)lane * kStreams + stream) * args.dim + slab * kSlab, kSlab * 4, bar);
}
// As load_raw_step, from shared memory.
template <Mode kMode>
__device__ __forceinline__ void take_raw(RawWeight& raw, const char* memory, int unit, int lane) {
  constexpr int kMixes = kMode == Mode::kHead ? kStreams : 24;
  const char* from = memory + FewLayout::kRaw + (unit / 4 * 24 + lane / 4) * FewLayout::kRawRow +
                     (unit % 4 * 64 + lane % 4 * 2) * 4;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const char* at = from + i * 8 * FewLayout::kRawRow + (step * 16 + half * 8) * 4;
        raw.row[i][step][half] = lane / 4 + 8 * i < kMixes ? *reinterpret_cast<const float2*>(at)
                                                           : make_float2(0.0f, 0.0f);
      }
    }
  }
}

// Where eight columns, a piece of 0..31, of a token's stream lie: those of eight tokens in different banks.
__device__ __forceinline__ int few_piece(int token, int stream, int piece) {
  return token * kTokenBytes + stream * kSlab * 2 + (piece ^ (token & 7)) * 16;
}

// The tokens' columns of this slab, and what hc_post needs, on their way to shared memory: a row a warp. The
// addresses are made ahead, while the kernel waits.
template <Mode kMode>
struct Columns {
  const __nv_bfloat16* x;  // row `warp`; the other rows of the warp are those of each fourth token behind
  const char *a, *factors;
  int64_t step;
  uint32_t x_to, a_to, factors_to;
  int left;
  bool has_a, is_float;

  __device__ __forceinline__ Columns(const Arguments& args, char* memory, const Group& group, int warp,
                                     int lane) {
    using L = FewLayout;
    const int token = warp / kStreams, stream = warp % kStreams;
    x = args.x + (group.first + token) * args.x_token + stream * args.x_stream + group.slab * kSlab + lane * 8;
    x_to = smem_address(memory + few_piece(token, stream, lane));
    step = args.x_token * (kUnits / kStreams);
    left = group.live - token;
    if constexpr (kMode == Mode::kPostPre) {
      const int own = kUnits - 1 - warp, size = args.a_is_float ? 4 : 2;
      has_a = own < group.live;
      is_float = args.a_is_float;
      a = reinterpret_cast<const char*>(args.a) +
          ((group.first + own) * args.a_token + group.slab * kSlab) * size + lane * 16;
      a_to = smem_address(memory + L::kA + own * kSlab * 4 + lane * 16);
      factors = reinterpret_cast<const char*>(lane == 0 ? args.post_in + (group.first + own) * 4
                                                        : args.comb_in + (group.first + own) * 16) +
                (lane == 0 ? 0 : lane - 1) * 16;
      factors_to = smem_address(memory + L::kFactors + (own * 20 + lane * 4) * 4);
      has_factors = has_a && lane < 5;
    }
  }
  __device__ __forceinline__ void bring() {
    if constexpr (kMode == Mode::kPostPre) {
      if (has_a) copy16_async(a_to, a, true);
      if (has_a && is_float) copy16_async(a_to + 512, a + 512, true);
      if (has_factors) copy16_async(factors_to, factors, true);
    }
#pragma unroll 1
    for (; left > 0; left -= kUnits / kStreams) {
      copy16_async(x_to, x, true);
      x_to = (x_to ^ kUnits / kStreams * 16) + kUnits / kStreams * kTokenBytes;  // as few_piece swaps them
      x += step;
    }
  }

 private:
  bool has_factors;
};

// hc_post: a thread makes two columns of all streams of a token.
__device__ __forceinline__ void make_columns(const Arguments& args, char* memory, const Group& group) {
  using L = FewLayout;
#pragma unroll 1
  for (int i = threadIdx.x; i < group.live * (kSlab / 2); i += kFewThreads) {
    const int token = i / (kSlab / 2), pair = i % (kSlab / 2), within = pair % 4 * 4;
    const float4* factors = reinterpret_cast<const float4*>(memory + L::kFactors) + token * 5;
    const char* from = memory + L::kA + token * kSlab * 4;
    uint32_t a;
    if (args.a_is_float) {
      const float2 wide = reinterpret_cast<const float2*>(from)[pair];
      a = pack_bf16(wide.x, wide.y);
    } else {
      a = reinterpret_cast<const uint32_t*>(from)[pair];
    }
    uint32_t old[kStreams];
    float4 comb[kStreams];
    const float4 post = factors[0];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      old[j] = *reinterpret_cast<const uint32_t*>(memory + few_piece(token, j, pair / 4) + within);
      comb[j] = factors[1 + j];
    }
    __nv_bfloat16* to =
        args.streams + (group.first + token) * kStreams * args.dim + group.slab * kSlab + pair * 2;
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      const float mix[kStreams] = {(&comb[0].x)[k], (&comb[1].x)[k], (&comb[2].x)[k], (&comb[3].x)[k]};
      const uint32_t made = mix_pair((&post.x)[k], mix, a, old);
      *reinterpret_cast<uint32_t*>(memory + L::kMade + few_piece(token, k, pair / 4) + within) = made;
      *reinterpret_cast<uint32_t*>(to + k * args.dim) = made;
    }
  }
}

// Has the weight cut here: the compiler would put that off until everyone waits for the products. `few` is
// never negative, so nothing is stored.
template <Mode kMode>
__device__ __forceinline__ void cut_here(const Step (&weight)[kSteps], int few, const char* memory) {
  uint32_t all = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      all ^= weight[step].first[0][i] ^ weight[step].first[1][i];
      if constexpr (kMode != Mode::kHead) all ^= weight[step].second[i];
    }
  }
  asm volatile(
      "{\n.reg .pred never;\nsetp.lt.s32 never, %0, 0;\n@never st.shared.b32 [%1], %2;\n}" ::"r"(few),
      "r"(smem_address(memory)), "r"(all)
      : "memory");
}

// post and comb of the token that this block finishes.
template <class Exchange>
__device__ __forceinline__ void finish_factors(const Arguments& args, const Exchange& exchange, int64_t token,
                                               int part, int warp, int lane) {
  const int record = lane <= kStreams ? lane : lane - 1;  // the squares are the fifth sum
  const Affine affine = load_affine<Mode::kPre>(args, record);
  const float sum = exchange.all_sums(part, warp, lane);
  if (part > 0) return;
  const float logit = logit_of(args, sum, __shfl_sync(~0u, sum, kStreams), affine);
  if (lane >= 5 && lane < 9) args.post[token * 4 + lane - 5] = 2.0f * sigmoid(logit);
  const float c = finish_comb_lanes(__shfl_sync(~0u, logit, 9 + lane % 16), args.iters, args.eps, lane);
  if (lane < 16) args.comb[token * 16 + lane] = c;
}

// Eight collapsed columns of a token normed and as FP8, as rms_norm_quant makes them. `weight`: the norm's,
// of the slab's columns.
__device__ __forceinline__ void store_normed(const Arguments& args, int64_t token, int slab,
                                             const char* weight, uint4 row, float factor, int lane) {
  float w[8];
  if (args.norm_is_float) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = reinterpret_cast<const float4*>(weight)[lane * 2 + i];
      w[4 * i] = four.x, w[4 * i + 1] = four.y, w[4 * i + 2] = four.z, w[4 * i + 3] = four.w;
    }
  } else {
    const uint4 packed = reinterpret_cast<const uint4*>(weight)[lane];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[2 * i] = low_half((&packed.x)[i]);
      w[2 * i + 1] = high_half((&packed.x)[i]);
    }
  }
  uint32_t peak = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t& word = (&row.x)[i];
    word = pack_bf16(low_half(word) * factor * w[2 * i], high_half(word) * factor * w[2 * i + 1]);
    peak = max(peak, max(word << 16 & 0x7FFFFFFFu, word & 0x7FFF0000u));
  }
  const int column = slab * kSlab + lane * 8;
  *reinterpret_cast<uint4*>(args.out + token * args.dim + column) = row;
  // Half a warp holds the 128 columns of a scale: the same instructions for both halves.
  const uint32_t left = __reduce_max_sync(~0u, lane < 16 ? peak : 0u);
  const uint32_t right = __reduce_max_sync(~0u, lane < 16 ? 0u : peak);
  const uint32_t byte = scale_byte(lane < 16 ? left : right);
  *reinterpret_cast<uint2*>(args.codes + token * args.code_row + column) =
      code_columns(row, inverse_scale(byte));
  if (lane % 16 == 0) {
    args.code_scale[token * args.code_scale_row + column / 128] = static_cast<uint8_t>(byte);
  }
}

template <Mode kMode, class Exchange>
__global__ void __launch_bounds__(kFewThreads, 1) few_kernel(const __grid_constant__ Arguments args) {
  using L = FewLayout;
  constexpr bool kHead = kMode == Mode::kHead;
  extern __shared__ __align__(1024) char memory[];
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
  const int64_t first = (int64_t)(blockIdx.x / args.slabs) * args.few;
  const Group group = {first, args.tokens - first < args.few ? (int)(args.tokens - first) : args.few,
                       (int)(blockIdx.x % args.slabs)};
  const bool norms = args.norm_weight != nullptr;
  float* partial = reinterpret_cast<float*>(memory + L::kPartial);
  Exchange exchange(args, group, memory + L::kRoom);

  // What no kernel ahead writes: weights.
  asm volatile("griddepcontrol.launch_dependents;");
  exchange.announce(!kHead, norms);
  if (warp % 4 == 0) bring_weight<kMode>(args, memory, group.slab, warp / 4, lane);
  const int size = args.norm_is_float ? 4 : 2;
  if (norms && thread < kSlab * size / 16) {
    copy16_async(smem_address(memory + L::kNorm) + thread * 16,
                 static_cast<const char*>(args.norm_weight) + group.slab * kSlab * size + thread * 16, true);
  }
  const Affine affine = load_affine<kMode>(args, lane < kStreams ? lane : kSquares);
  exchange.meet();
  __syncthreads();  // every warp sees the barriers
  Columns<kMode> columns(args, memory, group, warp, lane);
  auto bring_columns = [&] {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    exchange.start();
    columns.bring();
  };
  // A launch of few blocks mostly finds processors free while the kernel ahead runs, and has its weight cut
  // when that ends. In one of more blocks the columns do not wait for the weight.
  const bool early = gridDim.x <= kFewBlocks;
  if (!early) bring_columns();
  wait_together(smem_address(memory + L::kBars) + warp / 4 * 8);
  Step weight[kSteps];
  {
    RawWeight raw;
    take_raw<kMode>(raw, memory, warp, lane);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) split_step(weight[step], raw, step);
  }
  cut_here<kMode>(weight, args.few, memory);
  if (early) bring_columns();
  copies_wait_all();
  __syncthreads();
  const char* streams = memory;
  if constexpr (kMode == Mode::kPostPre) {
    make_columns(args, memory, group);
    streams += L::kMade;
    __syncthreads();
  }
  for (int half = 0; half * 8 < group.live; ++half) {
    // Rows of tokens that are not there hold anything: no other row depends on them.
    Sums sums = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t x[4];
      const int piece = warp % 4 * 8 + i * 4 + lane / 8;
      load_matrices(x, smem_address(streams + few_piece(half * 8 + lane % 8, warp / 4, piece)));
      mix_step<kMode>(sums, weight[i * 2], x[0], x[1]);
      mix_step<kMode>(sums, weight[i * 2 + 1], x[2], x[3]);
    }
    store_sums(add_up(sums), partial + warp * kFewSums + half * 8 * kRecord, lane);
  }
  __syncthreads();
  if (thread == kFewThreads - 1) exchange.leave();
  if (warp < group.live) {  // a warp for a token
    const float* from = partial + warp * kRecord + (lane < kRecord ? lane : 0);
    float sum = from[0] + from[kFewSums];
#pragma unroll
    for (int unit = 2; unit < kUnits; unit += 2) {
      sum += from[unit * kFewSums] + from[(unit + 1) * kFewSums];
    }
    exchange.template send_sums<kHead ? kStreams : 24>(warp, lane, sum);
    sum = exchange.gate_sums(warp, lane);
    const float squares = __shfl_sync(~0u, sum, kStreams);
    const float gate = sigmoid(logit_of(args, sum, squares, affine)) + args.eps;
    float4 pre;
    uint4 x[kStreams];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      (&pre.x)[s] = __shfl_sync(~0u, gate, s);
      x[s] = *reinterpret_cast<const uint4*>(streams + few_piece(warp, s, lane));
    }
    const uint4 collapsed = collapse_columns(pre, x);
    if (norms) {
      exchange.send_squares(warp, lane, add_lanes(square_of(collapsed)));
      const float total = add_lanes(exchange.squares(warp, lane));
      const float factor = rsqrtf(total / static_cast<float>(args.dim) + args.rms_eps);
      store_normed(args, first + warp, group.slab, memory + L::kNorm, collapsed, factor, lane);
    } else {
      *reinterpret_cast<uint4*>(args.out + (first + warp) * args.dim + group.slab * kSlab + lane * 8) =
          collapsed;
    }
  }
  if constexpr (!kHead) {
    if (group.finishes() && warp >= kFirstPart && warp < kFirstPart + Exchange::kPartWarps) {
      finish_factors(args, exchange, first + group.slab, warp - kFirstPart, warp, lane);
    }
  }
}

template <Mode kMode, class Exchange>
cudaError_t launch_few(const Arguments& args, cudaStream_t stream) {
  const auto kernel = few_kernel<kMode, Exchange>;
  const int bytes = FewLayout::kRoom + Exchange::room();
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code == cudaSuccess && Exchange::kCluster) {
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (code != cudaSuccess) return code;
  // While the kernel ahead ends this one reads weights; then it waits for the rest.
  const int64_t blocks = (args.tokens + args.few - 1) / args.few * args.slabs;
  return EarlyLaunch{blocks, kFewThreads, stream, bytes, Exchange::kCluster ? args.slabs : 1}.start(kernel,
                                                                                                    args);
}

template <Mode kMode>
cudaError_t start_few(Arguments args, cudaStream_t stream) {
  // Clusters are faster than words, but few of them run at once.
  if (args.slabs == ByCluster::kSlabs && args.tokens <= kClusterTokens * kClusters) {
    args.few = (int)((args.tokens + kClusters - 1) / kClusters);
    return launch_few<kMode, ByCluster>(args, stream);
  }
  // Groups enough for 64 blocks; if they had more than 8 tokens, as many as run at once.
  const int64_t groups = kFewBlocks / args.slabs, most = args.groups;
  args.few = (int)((args.tokens + groups - 1) / groups);
  if (args.few > 8) args.few = (int)((args.tokens + most - 1) / most);
  return launch_few<kMode, ByWords>(args, stream);
}

}  // namespace hc
}  // namespace causeway
