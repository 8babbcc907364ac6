// C[M, N] = A B^T for bf16 A [M, K] and B [N, K] (or groups of both), summed in float32.
//
// K is cut into kSegments segments of whole 64-column steps, by K alone. The tensor cores sum a segment
// in ascending order; the sums of the segments are added in ascending order. Every tile shape does that,
// so an element's bits depend on its row, its weight row and K, and on nothing else. Two ways:
//  - persistent blocks walk all of K; a finished segment is added to a second set of registers, and a
//    tile is stored piece by piece while the next tile's first products run;
//  - for few rows a cluster of blocks shares a tile, one segment each, so that the whole machine reads
//    the weight; the sums meet through distributed shared memory.
//
// A thread keeps a ring of stages full of weight by bulk tensor copies, another one of rows. For the
// grouped output projection the warpgroups undo RoPE on the last step of each head in shared memory,
// just before they multiply it.
//
// A kernel starts before the one ahead of it in the stream has ended, and then reads weights already
// (`weight_early`): they must not be written by the kernel directly ahead.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "copy_engine.cuh"
#include "dense_store.cuh"
#include "dense_tiles.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "rope_rows.cuh"
#include "wgmma.cuh"
#include "wgmma_shared.cuh"

namespace causeway {

__device__ __forceinline__ void store_remote(uint32_t address, float a, float b) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b)
               : "memory");
}

// Where a block stands: its ring, its barriers, and its share of K.
template <class S>
struct Place {
  uint32_t stages, full, empty;
  int first_step, last_step;  // of every tile
  int side;                   // columns of this block from the tile's first

  __device__ __forceinline__ Place(uint32_t shared, const DenseArguments& args) {
    stages = shared;
    full = shared + S::kBarriers;
    empty = full + S::kStages * 8;
    first_step = 0;
    last_step = args.k_steps;
    side = 0;
    if constexpr (S::kSplit) {
      const int rank = blockIdx.x % S::kCluster;
      first_step = min(args.k_steps, rank % kSegments * args.segment_steps);
      last_step = min(args.k_steps, first_step + args.segment_steps);
      side = rank / kSegments * S::kColumns;
    }
  }

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < S::kStages; ++i) {
      mbar_init(full + i * 8, 1);
      mbar_init(empty + i * 8, S::kWarps);
    }
    mbar_fence_init();
  }
  __device__ __forceinline__ uint32_t stage(int i) const { return stages + i * S::kStageBytes; }
};

template <class S>
__device__ __forceinline__ void bring_weight(
    const CUtensorMap* map, const DenseArguments& args, const Place<S>& place) {
  prefetch_map(map);
  if (!args.weight_early) wait_for_previous();
  Schedule<S> schedule(args);
  Tile tile;
  Slot<S::kStages> slot;
  const int bytes = S::kBBytes + args.box_rows * kStepK * 2;  // of both operands
  while (schedule.advance(tile)) {
    const int row = tile.group * args.n + tile.column + place.side;
    for (int step = place.first_step; step < place.last_step; ++step, slot.next()) {
      const uint32_t barrier = place.full + slot.stage * 8;
      mbar_wait(place.empty + slot.stage * 8, slot.parity ^ 1);
      mbar_expect(barrier, bytes);
      load_2d(map, place.stage(slot.stage) + S::kABytes, barrier, step * kStepK, row);
    }
  }
}

template <class S>
__device__ __forceinline__ void bring_rows(
    const CUtensorMap* map, const DenseArguments& args, const Place<S>& place) {
  prefetch_map(map);
  wait_for_previous();
  let_next_start();
  Schedule<S> schedule(args);
  Tile tile;
  Slot<S::kStages> slot;
  while (schedule.advance(tile)) {
    for (int step = place.first_step; step < place.last_step; ++step, slot.next()) {
      const uint32_t barrier = place.full + slot.stage * 8;
      mbar_wait(place.empty + slot.stage * 8, slot.parity ^ 1);
      load_3d(map, place.stage(slot.stage), barrier, step * kStepK, tile.row, tile.group);
    }
  }
}

// The consumers' ring: starts the products of a step, and gives back the stage of the step before.
template <class S>
class Products {
 public:
  Rotation<S::kRows> rotation;

  __device__ __forceinline__ Products(
      uint8_t* shared, const DenseArguments& args, const Place<S>& place, int warp)
      : shared_(shared), args_(args), place_(place), group_(warp / 4), thread_(threadIdx.x % 128) {}

  __device__ __forceinline__ int thread() const { return thread_; }  // of the warpgroup

  __device__ __forceinline__ void start(float (&acc)[S::kParts], int step, bool fresh) {
    const int a = slot_.stage * S::kStageBytes;
    mbar_wait(place_.full + slot_.stage * 8, slot_.parity);
    if constexpr (S::kRope) {
      if ((step + 1) % args_.head_steps == 0) {
        rotation.turn(shared_ + a + group_ * kOwnBytes, thread_);
        fence_async_proxy();
        if (group_ == 0) {
          named_barrier(1, 128);
        } else {
          named_barrier(2, 128);
        }
      }
    }
    fence_regs(acc);
    wgmma_fence();
    const uint32_t left = operand(place_.stages + a + group_ * kOwnBytes);
    const uint32_t right = operand(place_.stages + a + S::kABytes);
#pragma unroll
    for (int k = 0; k < kStepK / 16; ++k) {
      WgmmaBf16<S::kColumns>::run(acc, left + k * 2, right + k * 2, k != 0 || !fresh);
    }
    wgmma_commit();
  }
  // After `start`: the products of the step before are done, unless this step is the segment's first.
  __device__ __forceinline__ void next(bool fresh) {
    wgmma_wait<1>();
    if (!fresh) give_back();
    previous_ = place_.empty + slot_.stage * 8;
    slot_.next();
  }
  __device__ __forceinline__ void finish(float (&acc)[S::kParts]) {
    wgmma_wait<0>();
    fence_regs(acc);
    give_back();
  }

 private:
  static constexpr int kOwnBytes = 64 * kStepK * 2;  // of the rows that a warpgroup reads
  __device__ __forceinline__ void give_back() {
    if (threadIdx.x % 32 == 0) mbar_arrive(previous_);
  }
  uint8_t* shared_;
  const DenseArguments& args_;
  const Place<S>& place_;
  Slot<S::kStages> slot_;
  uint32_t previous_ = 0;
  int group_, thread_;
};

// One piece of a finished tile: kEmitColumns columns, or all of them as codes with the first piece.
template <class S, int kPiece>
__device__ __forceinline__ void emit(
    const DenseArguments& args, const Tile& tile, const float (&sum)[S::kParts], uint8_t* staging,
    int first_row, int lane) {
  constexpr int kCount = S::kEmitColumns / 2, kFirst = kPiece * kCount;
  if (args.out_kind == kOutFloat) {
    emit_float<kFirst, kCount>(args, tile, sum, first_row + lane / 4, lane);
  } else if (args.out_kind == kOutBfloat16) {
    emit_bfloat16<S, kFirst, kCount>(args, tile, sum, staging, first_row, lane);
  } else if constexpr (S::kRope && S::kColumns == 128 && kPiece == 0) {
    emit_codes<S>(args, tile, sum, staging, first_row, lane);
  }
}

template <int N>
using Number = std::integral_constant<int, N>;

template <class S>
__device__ __forceinline__ void multiply_persistent(
    uint8_t* shared, const DenseArguments& args, const Place<S>& place, int warp, int lane) {
  const int first_row = warp * 16;
  const bool active = warp < S::kActiveWarps;
  uint8_t* staging = shared + S::kWayOut + (active ? first_row * S::kStagingRow : 0);
  Schedule<S> schedule(args);
  Products<S> products(shared, args, place, warp);
  Tile tile, done;
  float sum[S::kParts], acc[S::kParts];
  wait_for_previous();
  if (!schedule.advance(tile)) return;
  constexpr int kPieces = S::kColumns / S::kEmitColumns;
  static_assert(kPieces <= 3 && kPieces <= kLeastSteps, "pieces");
  static_assert(!S::kRope || kPieces + 4 < 8, "the angles are ready before a head's last step");
  const int own_row = warp / 4 * 64;
  int step = 0;
  // A step of the first segment, with other work while its products run.
  auto step_with = [&](auto&& work) {
    products.start(acc, step, step == 0);
    work();
    products.next(step == 0);
    ++step;
  };
  auto first_steps = [&](auto&& piece) {
    step = 0;
    if constexpr (S::kRope) products.rotation.open(args, tile.row + own_row, products.thread());
    step_with([&] { piece(Number<0>{}); });
    if constexpr (kPieces > 1) step_with([&] { piece(Number<1>{}); });
    if constexpr (kPieces > 2) step_with([&] { piece(Number<2>{}); });
    if constexpr (S::kRope) {
      step_with([&] { products.rotation.template prepare<0>(args, products.thread()); });
      step_with([&] { products.rotation.template prepare<1>(args, products.thread()); });
      step_with([&] { products.rotation.template prepare<2>(args, products.thread()); });
      step_with([&] { products.rotation.template prepare<3>(args, products.thread()); });
    }
  };
  auto store = [&](auto number) {
    if (active) emit<S, decltype(number)::value>(args, done, sum, staging, first_row, lane);
  };
  first_steps([](auto) {});
  while (true) {
#pragma unroll
    for (int i = 0; i < S::kParts; ++i) sum[i] = 0.0f;
    for (int last = args.segment_steps;; last += args.segment_steps) {
      last = min(last, args.k_steps);
      for (; step < last; ++step) {
        products.start(acc, step, false);
        products.next(false);
      }
      products.finish(acc);
#pragma unroll
      for (int i = 0; i < S::kParts; ++i) sum[i] += acc[i];
      if (last == args.k_steps) break;
      products.start(acc, step, true);
      products.next(true);
      ++step;
    }
    done = tile;
    if (!schedule.advance(tile)) break;
    first_steps(store);  // this tile is stored while the next one's first products run
  }
  store(Number<0>{});
  if constexpr (kPieces > 1) store(Number<1>{});
  if constexpr (kPieces > 2) store(Number<2>{});
}

// One segment of one tile. Its sums go to the blocks that own the rows: row r to block r % kCluster.
template <class S>
__device__ __forceinline__ void multiply_segment(
    uint8_t* shared, const DenseArguments& args, const Place<S>& place, int warp, int lane) {
  if (place.first_step >= place.last_step) {
    cluster_wait();
    return;
  }
  Schedule<S> schedule(args);
  Tile tile;
  schedule.advance(tile);
  Products<S> products(shared, args, place, warp);
  if constexpr (S::kRope) {
    wait_for_previous();
    products.rotation.open(args, tile.row + warp / 4 * 64, products.thread());
    products.rotation.prepare_all(args, products.thread());
  }
  float acc[S::kParts];
  products.start(acc, place.first_step, true);
  products.next(true);
  for (int step = place.first_step + 1; step < place.last_step; ++step) {
    products.start(acc, step, false);
    products.next(false);
  }
  products.finish(acc);
  cluster_wait();  // all blocks have started, and so have shared memory
  const int rank = blockIdx.x % S::kCluster;
  const uint32_t part = place.stages + S::kWayOut + (lane & 3) * 8 +
                        (rank % kSegments * S::kSide + rank / kSegments) * S::kColumns * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int local = warp * 16 + half * 8 + lane / 4;
    if (local >= S::kRows || tile.row + local >= args.rows) continue;
    const uint32_t line =
        remote_address(part + local / S::kCluster * S::kOwnedRow, local % S::kCluster);
#pragma unroll
    for (int i = half * 2; i < S::kParts; i += 4) store_remote(line + (i / 4) * 32, acc[i], acc[i + 1]);
  }
}

// The rows that this block owns: their segments' sums, added and stored.
template <class S>
__device__ __forceinline__ void add_segments(const uint8_t* shared, const DenseArguments& args) {
  constexpr int kQuads = S::kColumns * S::kSide / 4;
  Schedule<S> schedule(args);
  Tile tile;
  if (!schedule.advance(tile)) return;
  const int quad = threadIdx.x % kQuads, lane = threadIdx.x % 32;
  const int segments = (args.k_steps + args.segment_steps - 1) / args.segment_steps;
  const int rows = min(S::kRows, args.rows - tile.row);
  for (int owned = threadIdx.x / kQuads;; owned += S::kThreads / kQuads) {
    const int local = blockIdx.x % S::kCluster + S::kCluster * owned;
    if (local >= rows) return;
    const float4* part =
        reinterpret_cast<const float4*>(shared + S::kWayOut + owned * S::kOwnedRow) + quad;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      if (s < segments) {
        const float4 v = part[s * kQuads];
        sum.x += v.x;
        sum.y += v.y;
        sum.z += v.z;
        sum.w += v.w;
      }
    }
    store_quad(args, tile, tile.row + local, tile.column + quad * 4, sum, lane);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) dense_kernel(
    const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
    const __grid_constant__ DenseArguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];  // the swizzle asks for 1024
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Place<S> place(smem_address(shared), args);
  if (threadIdx.x == 0) place.init();
  __syncthreads();
  if constexpr (S::kSplit) cluster_arrive();

  if (warp >= S::kWarps) {
    if constexpr (S::kTrades) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == S::kWarps) {
      if (lane == 0) bring_weight<S>(&b_map, args, place);
    } else if (warp == S::kWarps + 1) {
      if (lane == 0) bring_rows<S>(&a_map, args, place);
    }
    __syncwarp();
    if constexpr (S::kSplit) cluster_wait();
  } else {
    if constexpr (S::kTrades) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    if constexpr (S::kSplit) {
      multiply_segment<S>(shared, args, place, warp, lane);
    } else {
      multiply_persistent<S>(shared, args, place, warp, lane);
    }
  }
  if constexpr (S::kSplit) {
    cluster_arrive();
    wait_for_previous();  // it may still read what is written now
    cluster_wait();  // all sums have come; none leaves for another block any more
    add_segments<S>(shared, args);
  }
}

template <class S>
int launch_dense(const CUtensorMap& a_map, const CUtensorMap& b_map, const DenseArguments& args,
                 int multiprocessors, cudaStream_t stream) {
  static const cudaError_t configured = cudaFuncSetAttribute(
      dense_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (configured != cudaSuccess) return configured;
  constexpr int kWide = S::kColumns * S::kSide;
  int64_t blocks = static_cast<int64_t>((args.rows + S::kRows - 1) / S::kRows) *
                   ((args.n + kWide - 1) / kWide) * args.groups;
  if (blocks > INT32_MAX / 16) return cudaErrorInvalidValue;
  blocks = S::kSplit ? blocks * S::kCluster
                     : std::min<int64_t>(blocks, static_cast<int64_t>(multiprocessors) * S::kBlocks);
  return EarlyLaunch{blocks, S::kThreads, stream, S::kSharedBytes, S::kSplit ? S::kCluster : 1}.start(
      dense_kernel<S>, a_map, b_map, args);
}

}  // namespace causeway
