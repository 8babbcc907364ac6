// hc_pre, hc_head and hc_post_pre for bf16 streams, four of them: each stream value is read once.
// Contracts: kernels/hc/api.py and kernels/hc_post_pre/api.py.
//
// A block owns 256 columns of every stream and keeps the mixing weight of those 1024 values in
// registers for its whole life: tensor-core fragments of three bf16 parts that add up to the f32 weight,
// so every product is exact. The blocks of all slabs of a row form a group; groups walk over tiles of 16
// tokens (hc_tiles.cuh). Few tokens are spread over more and smaller blocks (hc_few.cuh).
// Sums run in a fixed order (tensor core over 64 columns, warps, slabs) that no other token touches and
// that both kernels share.
#include "hc_few.cuh"
#include "hc_tiles.cuh"

namespace causeway {
namespace hc {

// The sums of 64 tokens fit in the ring.
constexpr int kFewTokens = 64;

template <Mode kMode>
cudaError_t launch_few(const Arguments& args, cudaStream_t stream) {
  unsigned tiles = (unsigned)((args.tokens + kTile - 1) / kTile);
  few_mix_kernel<kMode><<<dim3(args.slabs * kWarps, tiles), 32, 0, stream>>>(args);
  // The second kernel starts while the first runs, loads its streams and waits for the sums.
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)args.tokens, args.dim / kColumns);
  config.blockDim = dim3(kFinishThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, few_finish_kernel<kMode>, args);
}

template <Mode kMode>
cudaError_t launch(const Arguments& args, cudaStream_t stream) {
  constexpr int kBytes = Layout<kMode>::kBytes;
  cudaError_t code =
      cudaFuncSetAttribute(hc_kernel<kMode>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (code != cudaSuccess) return code;
  hc_kernel<kMode><<<args.groups * args.slabs, kAllThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
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

// mode: 0 hc_pre, 1 hc_head, 2 hc_post_pre. comb: null for hc_head. Returns a CUDA error code.
extern "C" int causeway_hc(int mode, const void* x, int64_t x_token, int64_t x_stream, const void* a,
                           int64_t a_token, const void* post_in, const void* comb_in, const void* fn,
                           const void* scale, const void* base, void* streams, void* out, void* post,
                           void* comb, void* ring, void* flags, int64_t tokens, int dim,
                           int groups, int iters, float eps, float norm_eps, void* stream) {
  using namespace causeway::hc;
  Arguments args;
  args.x = static_cast<const __nv_bfloat16*>(x);
  args.a = static_cast<const __nv_bfloat16*>(a);
  args.post_in = static_cast<const float*>(post_in);
  args.comb_in = static_cast<const float*>(comb_in);
  args.fn = static_cast<const float*>(fn);
  args.scale = static_cast<const float*>(scale);
  args.base = static_cast<const float*>(base);
  args.streams = static_cast<__nv_bfloat16*>(streams);
  args.out = static_cast<__nv_bfloat16*>(out);
  args.post = static_cast<float*>(post);
  args.comb = static_cast<float*>(comb);
  args.ring = static_cast<float*>(ring);
  args.flags = static_cast<unsigned*>(flags);
  args.x_token = x_token;
  args.x_stream = x_stream;
  args.a_token = a_token;
  args.tokens = tokens;
  args.dim = dim;
  args.slabs = dim / kSlab;
  args.groups = groups;
  args.iters = iters;
  args.eps = eps;
  args.norm_eps = norm_eps;
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  cudaError_t code;
  if (tokens <= kFewTokens && mode != 2) {
    code = mode == 0 ? launch_few<Mode::kPre>(args, queue) : launch_few<Mode::kHead>(args, queue);
  } else {
    code = mode == 0   ? launch<Mode::kPre>(args, queue)
           : mode == 1 ? launch<Mode::kHead>(args, queue)
                       : launch<Mode::kPostPre>(args, queue);
  }
  return static_cast<int>(code);
}
