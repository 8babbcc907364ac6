// hc_pre, hc_head and hc_post_pre for bf16 streams, four of them: each stream value is read once.
// Contracts: kernels/hc/api.py, kernels/hc_post_pre/api.py and kernels/hc_norm/api.py.
//
// A block owns 256 columns of every stream and multiplies them by two bf16 parts that make up 17 bits
// of the f32 weight. Many tokens: the blocks of all slabs of a row form a group, groups
// walk over tiles of 16 tokens (hc_tiles.cuh). Few tokens: a group that takes up to 16 at once (hc_few.cuh).
// Sums run in a fixed order (tensor core over 64 columns, warps, slabs) that no other token touches and
// that both kernels share.
#include "hc_few.cuh"
#include "hc_tiles.cuh"
#include "launch.cuh"

namespace causeway {
namespace hc {

// A map of bf16 values: columns, then `rank` - 1 dimensions with strides in elements.
cudaError_t encode(CUtensorMap* map, const void* values, int rank, const uint64_t* sizes,
                   const int64_t* strides, const uint32_t* box) {
  static const auto call = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                              cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
        code == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  if (call == nullptr) return cudaErrorNotSupported;
  cuuint64_t bytes[2] = {};
  const cuuint32_t ones[3] = {1, 1, 1};
  for (int i = 1; i < rank; ++i) bytes[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * 2;
  const CUresult result =
      call(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(values), sizes, bytes, box, ones,
           CU_TENSOR_MAP_INTERLEAVE_NONE,
           box[0] == kBoxColumns ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <Mode kMode, bool kNorm>
cudaError_t launch(const Arguments& args, cudaStream_t stream) {
  constexpr int kBytes = Layout<kMode, kNorm>::kBytes;
  const auto kernel = hc_kernel<kMode, kNorm>;
  const uint64_t sizes[3] = {(uint64_t)args.dim, (uint64_t)args.tokens, kStreams};
  const uint32_t box[3] = {kBoxColumns, kTile, kStreams}, a_box[2] = {kSlab, kTile};
  const int64_t x_strides[2] = {args.x_token, args.x_stream};
  const int64_t new_strides[2] = {(int64_t)args.dim * kStreams, args.dim};
  Maps maps;
  cudaError_t code = encode(&maps.x, args.x, 3, sizes, x_strides, box);
  if constexpr (kMode == Mode::kPostPre) {
    if (code == cudaSuccess) code = encode(&maps.a, args.a, 2, sizes, &args.a_token, a_box);
    if (code == cudaSuccess) code = encode(&maps.streams, args.streams, 3, sizes, new_strides, box);
  }
  if (code == cudaSuccess) {
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  }
  if (code != cudaSuccess) return code;
  kernel<<<args.groups * args.slabs, kAllThreads, kBytes, stream>>>(args, maps);
  code = cudaGetLastError();
  if (code != cudaSuccess || kMode == Mode::kHead) return code;
  EarlyLaunch behind{(args.tokens + 127) / 128, 128, stream};
  if (args.code_columns.data != nullptr) behind.y = 1 + args.dim / 512;
  return behind.start(comb_kernel, args);
}

}  // namespace hc
}  // namespace causeway

// Multiprocessors of the current device: blocks that run at once, which the groups rely on.
extern "C" int causeway_hc_blocks() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return count;
}

namespace {

template <causeway::hc::Mode kMode>
cudaError_t run(const causeway::hc::Arguments& args, bool few, cudaStream_t stream) {
  if (few) return causeway::hc::start_few<kMode>(args, stream);
  if (args.norm_weight != nullptr) {
    if constexpr (kMode != causeway::hc::Mode::kHead) {
      return causeway::hc::launch<kMode, true>(args, stream);
    }
    return cudaErrorInvalidValue;
  }
  return causeway::hc::launch<kMode, false>(args, stream);
}

}  // namespace

// mode: 0 hc_pre, 1 hc_head, 2 hc_post_pre. comb: null for hc_head. few: one launch for up to 64 tokens, then
// `a` may be float32. With norm_weight (modes 0 and 2) also the RMSNorm and the FP8 form: `out` is the
// normed row.
// Returns a CUDA error code.
extern "C" int causeway_hc(int mode, int few, const void* x, int64_t x_token, int64_t x_stream,
                           const void* a, int64_t a_token, int a_is_float, const void* post_in,
                           const void* comb_in, const void* fn, const void* scale, const void* base,
                           const void* norm_weight, int norm_is_float, void* streams, void* out,
                           void* post, void* comb, void* codes, int64_t code_row, void* code_scale,
                           int64_t code_scale_row, void* code_columns, int code_shift, void* ring,
                           void* flags, int64_t tokens, int dim, int groups, int blocks, int iters,
                           float eps, float norm_eps, float rms_eps,
                           void* stream) {
  using namespace causeway::hc;
  if (a_is_float && !few) return cudaErrorInvalidValue;
  Arguments args;
  args.x = static_cast<const __nv_bfloat16*>(x);
  args.a = static_cast<const __nv_bfloat16*>(a);
  args.post_in = static_cast<const float*>(post_in);
  args.comb_in = static_cast<const float*>(comb_in);
  args.fn = static_cast<const float*>(fn);
  args.scale = static_cast<const float*>(scale);
  args.base = static_cast<const float*>(base);
  args.norm_weight = norm_weight;
  args.streams = static_cast<__nv_bfloat16*>(streams);
  args.out = static_cast<__nv_bfloat16*>(out);
  args.post = static_cast<float*>(post);
  args.comb = static_cast<float*>(comb);
  args.ring = static_cast<float*>(ring);
  args.flags = static_cast<unsigned*>(flags);
  args.codes = static_cast<uint8_t*>(codes);
  args.code_scale = static_cast<uint8_t*>(code_scale);
  args.code_columns = {static_cast<float*>(code_columns), dim / 128, code_shift};
  args.x_token = x_token;
  args.x_stream = x_stream;
  args.a_token = a_token;
  args.code_row = code_row;
  args.code_scale_row = code_scale_row;
  args.tokens = tokens;
  args.dim = dim;
  args.slabs = dim / kSlab;
  args.groups = groups;
  args.blocks = blocks;
  args.iters = iters;
  args.few = 0;
  args.norm_is_float = norm_is_float;
  args.a_is_float = a_is_float;
  args.eps = eps;
  args.norm_eps = norm_eps;
  args.rms_eps = rms_eps;
  args.inverse_dim = 1.0f / static_cast<float>(dim);
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (mode) {
    case 0:
      return run<Mode::kPre>(args, few != 0, queue);
    case 1:
      return run<Mode::kHead>(args, few != 0, queue);
    case 2:
      return run<Mode::kPostPre>(args, few != 0, queue);
    default:
      return cudaErrorInvalidValue;
  }
}
