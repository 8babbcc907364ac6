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
#include "tensor_map.cuh"

namespace causeway {
namespace hc {

template <Mode kMode, bool kNorm>
int launch(const Arguments& args, cudaStream_t stream) {
  constexpr int kBytes = Layout<kMode, kNorm>::kBytes;
  constexpr CUtensorMapDataType kBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto kernel = hc_kernel<kMode, kNorm>;
  const int64_t dim = args.dim;
  Maps maps;
  int code = encode_map(maps.x, kBf16, args.x, {dim, args.tokens, kStreams}, {args.x_token * 2, args.x_stream * 2},
                        {kBoxColumns, kTile, kStreams});
  if constexpr (kMode == Mode::kPostPre) {
    if (code == 0) {
      code = encode_map(maps.a, kBf16, args.a, {dim, args.tokens}, {args.a_token * 2}, {kSlab, kTile},
                        CU_TENSOR_MAP_SWIZZLE_NONE);
    }
    if (code == 0) {
      code = encode_map(maps.streams, kBf16, args.streams, {dim, args.tokens, kStreams}, {dim * kStreams * 2, dim * 2},
                        {kBoxColumns, kTile, kStreams});
    }
  }
  if (code == 0) {
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  }
  if (code != 0) return code;
  kernel<<<args.groups * args.slabs, kAllThreads, kBytes, stream>>>(args, maps);
  code = cudaGetLastError();
  if (code != 0 || kMode == Mode::kHead) return code;
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
int run(const causeway::hc::Arguments& args, bool few, cudaStream_t stream) {
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
// Returns 0, a cudaError_t, or 10000 + a CUresult.
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
