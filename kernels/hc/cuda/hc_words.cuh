// How blocks of a group give each other sums: through global memory, or within a cluster. Both ways a
// token's sums over a slab go to all blocks as far as the collapse needs them (pre and the squares), else to
// the block that makes post and comb. The squares of the collapsed row go to all blocks, for the norm.
#pragma once
#include "hc_cluster.cuh"
#include "hc_factors.cuh"

namespace causeway {
namespace hc {

constexpr int kFewTile = 16;    // tokens of a group, at most
constexpr int kParts = 5;       // of a token's sums: pre and squares, the others
constexpr int kPartSums = 5;
constexpr int kAllSums = kParts * kPartSums;
constexpr int kMaxSlabs = 32;  // that lines have room for
constexpr int kLine = kMaxSlabs + 4;  // floats of a sum's slabs in shared memory; rows start in other banks

// What a group works on.
struct Group {
  int64_t first;  // token
  int live, slab;
  __device__ __forceinline__ bool finishes() const { return slab < live; }
};

// The sums over the slabs that lie at `line`, kLeast to kMost of them, in steps of four: slabs that differ in
// bit 4 of their number first, then in bits 3, 2, 1 and 0. (hc_tiles.cuh adds in this order, too.)
template <int kLeast, int kMost>
__device__ __forceinline__ float add_slabs(const float* line, int slabs) {
  float4 four[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    four[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (i * 4 < kLeast || (i * 4 < kMost && i * 4 < slabs)) four[i] = reinterpret_cast<const float4*>(line)[i];
  }
#pragma unroll
  for (int step = 4; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < step; ++i) {
      four[i].x += four[i + step].x;
      four[i].y += four[i + step].y;
      four[i].z += four[i + step].z;
      four[i].w += four[i + step].w;
    }
  }
  return (four[0].x + four[0].z) + (four[0].y + four[0].w);
}

// 64-bit words of a value and a tag in global memory. A word with this launch's tag is there, so nobody waits
// on a fence or a flag. They lie in `ring`: [token, slab, kSlabWords], the parts of the sums with a word of
// padding each, then the squares of the collapsed columns.
struct ByWords {
  static constexpr bool kCluster = false;
  static constexpr int kPartWarps = kParts;  // that wait for a token's sums
  static constexpr int kSlabWords = 32, kSquareWord = kParts * (kPartSums + 1);
  static constexpr int kPairs = (kPartSums + 1) / 2;  // of a part's words; a load brings one
  static constexpr int kTurns = (kMostSlabs * kPairs + 31) / 32;  // loads of a lane
  static constexpr int kRoom = (kUnits * kPartSums * kLine + kAllSums) * 4;
  static int room() { return kRoom; }
  const Arguments& args;
  const Group& group;
  float* lines;  // of the warps
  uint32_t tag;

  __device__ __forceinline__ ByWords(const Arguments& args, const Group& group, char* room)
      : args(args), group(group), lines(reinterpret_cast<float*>(room)) {}
  __device__ __forceinline__ void announce(bool, bool) {}
  __device__ __forceinline__ void meet() {}
  // After the kernel ahead has ended. Every launch adds 65536 to the counter, in parts: see `leave`.
  __device__ __forceinline__ void start() {
    uint64_t count;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(count) : "l"(args.flags) : "memory");
    tag = (uint32_t)(count >> 16) + 1;
  }
  // A block that has not left yet keeps the sum of the parts below 65536: it reads the tag of this launch.
  __device__ __forceinline__ void leave() const {
    const uint64_t part = blockIdx.x == 0 ? 65536 - (gridDim.x - 1) : 1;
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(args.flags), "l"(part) : "memory");
  }
  __device__ __forceinline__ uint64_t* sums_of(int64_t token) const {
    return reinterpret_cast<uint64_t*>(args.ring) + token * args.slabs * kSlabWords;
  }
  __device__ __forceinline__ uint64_t word(uint32_t bits) const { return (uint64_t)tag << 32 | bits; }
  __device__ __forceinline__ bool ours(uint64_t word) const { return (uint32_t)(word >> 32) == tag; }
  static __device__ __forceinline__ void load(uint64_t (&word)[2], const uint64_t* from) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(word[0]), "=l"(word[1])
                 : "l"(from)
                 : "memory");
  }

  // The sums of a token over this slab: lane i holds that at record i.
  template <int kMixes>
  __device__ __forceinline__ void send_sums(int token, int lane, float sum) const {
    if (lane >= kMixes && lane != kSquares) return;
    const int i = lane < kStreams ? lane : lane == kSquares ? kStreams : lane + 1;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(sums_of(group.first + token) +
                                                              group.slab * kSlabWords + i + i / kPartSums),
                 "l"(word(__float_as_uint(sum)))
                 : "memory");
  }
  // A part of a token's sums: lane i gets the i-th. Neighbouring lanes ask for the words of a slab: a load
  // that touches as many lines as it has lanes takes the processor several times as long.
  __device__ __forceinline__ float receive(int token, int part, int warp, int lane) const {
    const uint64_t* from = sums_of(group.first + token) + part * (kPartSums + 1);
    const int left = args.slabs * kPairs - lane;
    uint64_t words[kTurns][2];
    bool there;
    do {
      there = true;
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        const int pair = i * 32 + lane;
        if (i * 32 < left) load(words[i], from + pair / kPairs * kSlabWords + pair % kPairs * 2);
      }
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        if (i * 32 >= left) continue;
        there = there && ours(words[i][0]) && (ours(words[i][1]) || (i * 32 + lane) % kPairs == kPairs - 1);
      }
    } while (!__all_sync(~0u, there));
    float* line = lines + warp * kPartSums * kLine;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      if (i * 32 >= left) continue;
      const int slab = (i * 32 + lane) / kPairs, sum = (i * 32 + lane) % kPairs * 2;
      line[sum * kLine + slab] = __uint_as_float((uint32_t)words[i][0]);
      if (sum + 1 < kPartSums) line[(sum + 1) * kLine + slab] = __uint_as_float((uint32_t)words[i][1]);
    }
    __syncwarp();
    const float sum = add_slabs<16, kMostSlabs>(line + (lane < kPartSums ? lane : 0) * kLine, args.slabs);
    __syncwarp();
    return sum;
  }
  __device__ __forceinline__ float gate_sums(int token, int lane) const {
    return receive(token, 0, token, lane);
  }
  // All sums of the token that this block finishes: lane i of the first of kPartWarps warps gets the i-th.
  __device__ __forceinline__ float all_sums(int part, int warp, int lane) const {
    float* sums = lines + kUnits * kPartSums * kLine;
    const float mine = receive(group.slab, part, warp, lane);
    if (lane < kPartSums) sums[part * kPartSums + lane] = mine;
    named_barrier(3, kPartWarps * 32);
    return sums[lane < kAllSums ? lane : 0];
  }
  // The squares of a token's collapsed columns of this slab; then lane i gets those of slab i, or zero.
  __device__ __forceinline__ void send_squares(int token, int lane, float squares) const {
    if (lane > 0) return;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(sums_of(group.first + token) +
                                                              group.slab * kSlabWords + kSquareWord),
                 "l"(word(__float_as_uint(squares)))
                 : "memory");
  }
  __device__ __forceinline__ float squares(int token, int lane) const {
    const uint64_t* from = sums_of(group.first + token) + lane * kSlabWords + kSquareWord;
    uint64_t word = 0;
    bool there;
    do {
      there = true;
      if (lane < args.slabs) {
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
        there = ours(word);
      }
    } while (!__all_sync(~0u, there));
    return __uint_as_float((uint32_t)word);
  }
};

// Stores to the other blocks' shared memory that their barriers count: a group is a cluster.
struct ByCluster {
  static constexpr bool kCluster = true;
  static constexpr int kPartWarps = 1;
  static constexpr int kSlabs = 16;
  static constexpr int kGateLines = 32;  // bytes of barriers before
  static constexpr int kOtherLines = kGateLines + kFewTile * kPartSums * kLine * 4;
  static constexpr int kSquaresAt = kOtherLines + (kAllSums - kPartSums) * kLine * 4;
  static int room() { return kSquaresAt + kFewTile * kSlabs * 4; }
  const Arguments& args;
  const Group& group;
  uint32_t gate_bar, other_bar, square_bar;
  char* room_at;

  __device__ __forceinline__ ByCluster(const Arguments& args, const Group& group, char* room)
      : args(args), group(group), room_at(room) {
    gate_bar = smem_address(room);
    other_bar = gate_bar + 8;
    square_bar = gate_bar + 16;
  }
  // One thread says what will come. Before a block sends to another, both must have come here.
  __device__ __forceinline__ void announce(bool mixes, bool norms) {
    if (threadIdx.x == 0) {
      mbar_init(gate_bar, 1);
      mbar_init(other_bar, 1);
      mbar_init(square_bar, 1);
      mbar_fence_init();
      expect_bytes(gate_bar, group.live * args.slabs * kPartSums * 4);
      if (group.finishes() && mixes) expect_bytes(other_bar, args.slabs * (kAllSums - kPartSums) * 4);
      if (norms) expect_bytes(square_bar, group.live * args.slabs * 4);
    }
    __syncwarp();
    cluster_arrive();
  }
  __device__ __forceinline__ void meet() { cluster_wait(); }
  __device__ __forceinline__ void start() {}
  __device__ __forceinline__ void leave() const {}

  template <int kMixes>
  __device__ __forceinline__ void send_sums(int token, int lane, float sum) const {
    // Half a warp serves the 16 blocks: lane b sends to block b.
    const int block = lane % 16;
    const uint32_t bar = remote_address(gate_bar, block);
#pragma unroll
    for (int i = 0; i < kPartSums; i += 2) {
      const int which = i + lane / 16;
      const float gate = __shfl_sync(~0u, sum, which < kStreams ? which : kSquares);
      if (which < kPartSums && block < args.slabs) {
        const int at = kGateLines + ((token * kPartSums + which) * kLine + group.slab) * 4;
        send(remote_address(smem_address(room_at + at), block), bar, gate);
      }
    }
    if (lane >= kStreams && lane < kMixes) {
      const int at = kOtherLines + ((lane - kStreams) * kLine + group.slab) * 4;
      send(remote_address(smem_address(room_at + at), token), remote_address(other_bar, token), sum);
    }
  }
  __device__ __forceinline__ float gate_sums(int token, int lane) const {
    wait_together(gate_bar);
    const float* lines = reinterpret_cast<const float*>(room_at + kGateLines) + token * kPartSums * kLine;
    return add_slabs<kSlabs, kSlabs>(lines + (lane < kPartSums ? lane : 0) * kLine, args.slabs);
  }
  __device__ __forceinline__ float all_sums(int, int, int lane) const {
    wait_together(gate_bar);
    wait_together(other_bar);
    named_barrier(3, kPartWarps * 32);  // one warp: tells the compiler that its lanes go on together
    const int other = (lane < kAllSums ? lane : kAllSums - 1) - kPartSums;
    const float* gates = reinterpret_cast<const float*>(room_at + kGateLines);
    const float* others = reinterpret_cast<const float*>(room_at + kOtherLines);
    return add_slabs<kSlabs, kSlabs>(
        other < 0 ? gates + (group.slab * kPartSums + lane) * kLine : others + other * kLine, args.slabs);
  }
  __device__ __forceinline__ void send_squares(int token, int lane, float squares) const {
    if (lane >= kSlabs) return;
    const int at = kSquaresAt + (token * kSlabs + group.slab) * 4;
    send(remote_address(smem_address(room_at + at), lane), remote_address(square_bar, lane), squares);
  }
  __device__ __forceinline__ float squares(int token, int lane) const {
    wait_together(square_bar);
    const float* from = reinterpret_cast<const float*>(room_at + kSquaresAt) + token * kSlabs;
    return lane < kSlabs ? from[lane] : 0.0f;
  }
};

}  // namespace hc
}  // namespace causeway
