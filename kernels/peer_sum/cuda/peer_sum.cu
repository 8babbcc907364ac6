// Sums over ranks by tagged words in each other's memory; see kernels/peer_sum/api.py.
#include <cstdint>
#include <cuda_runtime.h>

#include "launch.cuh"

namespace causeway {

constexpr int kMostRanks = 8, kThreads = 256;

struct PeerSum {
  float* x;
  uint4* boxes[kMostRanks];
  int* rounds;
  int64_t words, box;  // of the sum; of one sender's box
  int rank, size;
};

namespace {

// Volatile: not cached, and the compiler asks again. That the 8 bytes of a value and its tag arrive together
// is what NCCL's low-latency protocol relies on too.
__device__ __forceinline__ void leave(uint4* at, uint4 word) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word.x),
               "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}

__device__ __forceinline__ uint4 look(const uint4* at) {
  uint4 word;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(at)
               : "memory");
  return word;
}

// A thread has one word of two values. All blocks of a sum fit on the chip at once, so a block that
// waits for its fellows on other ranks keeps none of them from starting.
__global__ void __launch_bounds__(kThreads, 8) sum_kernel(const __grid_constant__ PeerSum a) {
  await_inputs();
  const int64_t word = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  const uint32_t tag = (uint32_t)a.rounds[blockIdx.x] + 1;
  const int64_t round = (int64_t)(tag % 2) * a.size;  // first sender's box of this round
  if (word < a.words) {
    float2* own = reinterpret_cast<float2*>(a.x) + word;
    const float2 mine = *own;
    const uint4 sent = {__float_as_uint(mine.x), tag, __float_as_uint(mine.y), tag};
    for (int i = 1; i < a.size; ++i) {  // every rank begins with another one
      const int to = (a.rank + i) % a.size;
      leave(a.boxes[to] + (round + a.rank) * a.box + word, sent);
    }
    float2 sum = {0.0f, 0.0f};
    for (int from = 0; from < a.size; ++from) {
      float2 part = mine;
      if (from != a.rank) {
        const uint4* at = a.boxes[a.rank] + (round + from) * a.box + word;
        uint4 got = look(at);
        while (got.y != tag || got.w != tag) got = look(at);
        part = {__uint_as_float(got.x), __uint_as_float(got.z)};
      }
      sum = from == 0 ? part : float2{sum.x + part.x, sum.y + part.y};
    }
    *own = sum;
  }
  __syncthreads();  // everyone has read the round
  if (threadIdx.x == 0) a.rounds[blockIdx.x] = (int)tag;
}

}  // namespace

extern "C" int causeway_peer_sum(const PeerSum* arguments, void* stream) {
  const int64_t blocks = (arguments->words + kThreads - 1) / kThreads;
  return EarlyLaunch{blocks, kThreads, (cudaStream_t)stream}.start(sum_kernel, *arguments);
}

}  // namespace causeway
