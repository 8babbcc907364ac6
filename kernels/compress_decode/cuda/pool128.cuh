// Entries pooled from 128 rows by a cluster of D / 64 blocks.
//
// A block reads 64 channels of all rows; a warp pools 16 rows of them (a part), two at once in its
// halves. One warp joins the parts, so that only the norm's sums of squares cross blocks.
#pragma once
#include "../../qkv_norm_rope/cuda/cluster.cuh"
#include "pooling.cuh"

namespace causeway {

constexpr int kPool128Threads = 256, kPartRows = 16, kRowParts = 128 / kPartRows;

// What a thread pools: rows first + 2 i for i < 8, channels col .. col + 3.
struct PartOf {
  int part, first, col;

  __device__ explicit PartOf(int rank) {
    int lane = threadIdx.x % 32;
    part = threadIdx.x / 32, first = part * kPartRows + lane / 16, col = rank * 64 + lane % 16 * 4;
  }
};

// What a lane of the joining warp keeps for the end of an entry, out of its registers.
struct Waiting {
  float4 weight;  // as it lies in memory
  Ending end;
  Place at;
  bool stores;
};

// g waits in registers and u in shared memory, so that four blocks fit a processor.
struct Pool128Share {
  float4 u[8][kPool128Threads];
  float parts[3][kRowParts][64];  // top, total, sum
  Waiting waiting[32];
  float squares[2][8];  // of all blocks: in turns, as a block may be an entry ahead
  uint64_t squares_mail[2];
};
// Four channels that are read once, to registers and to shared memory.
__device__ __forceinline__ void stream_quad(const float* from, float (&v)[4]) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "l"(from)
               : "memory");
}
__device__ __forceinline__ void stream_quad_async(float4* to, const float* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(smem_address(to)), "l"(from)
               : "memory");
}
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(smem_address(to)), "l"(from),
               "n"(BYTES)
               : "memory");
}
__device__ __forceinline__ void copies_close() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// All but what was asked for behind the last `copies_close`.
__device__ __forceinline__ void copies_wait_closed() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// Row i of a thread: `row` points to its channels of u.
template <int D>
__device__ __forceinline__ void bring_row(Pool128Share& share, int i, const float* row, bool there,
                                          float (&g)[4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) g[c] = kNegInf;
  if (there) {
    stream_quad(row + D, g);
    stream_quad_async(&share.u[i][threadIdx.x], row);
  } else {
    share.u[i][threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

struct Part128 {
  float top[4], total[4], sum[4];
};

// The part of a warp; both halves get it.
__device__ __forceinline__ Part128 pool_part(const Pool128Share& share, const float (&g)[8][4]) {
  Part128 p;
  float top[4];
  copies_wait_all();  // each thread reads what it copied
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    p.top[c] = g[0][c];
#pragma unroll
    for (int i = 1; i < 8; ++i) p.top[c] = fmaxf(p.top[c], g[i][c]);
    p.top[c] = fmaxf(p.top[c], __shfl_xor_sync(kAll, p.top[c], 16));
    top[c] = finite_top(p.top[c]), p.total[c] = p.sum[c] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float u[4];
    load_values((const float*)&share.u[i][threadIdx.x], u);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float w = gate(g[i][c], top[c]);
      p.total[c] += w;
      p.sum[c] = fmaf(w, u[c], p.sum[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    p.total[c] += __shfl_xor_sync(kAll, p.total[c], 16);
    p.sum[c] += __shfl_xor_sync(kAll, p.sum[c], 16);
  }
  return p;
}

// To the warp that joins them: one half of the warp leaves the sums, the other the rest.
__device__ __forceinline__ void leave_part(Pool128Share& share, int part, const Part128& p) {
  bool second = threadIdx.x % 32 >= 16;
  int col = threadIdx.x % 16 * 4;
  float v[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) v[c] = second ? p.sum[c] : p.total[c];
  store_values(share.parts[second ? 2 : 1][part] + col, v);
  if (!second) store_values(share.parts[0][part] + col, p.top);
}

__device__ __forceinline__ void load_pair(const float* p, float (&v)[2]) {
  float2 x = *reinterpret_cast<const float2*>(p);
  v[0] = x.x, v[1] = x.y;
}

// Joins the parts of a lane's four channels: two of them itself, its other half the other two.
__device__ __forceinline__ void join_parts(const Pool128Share& share, float (&x)[4]) {
  bool second = threadIdx.x % 32 >= 16;
  int col = threadIdx.x % 16 * 4 + 2 * second;
  float tops[kRowParts][2], top[2], total[2], sum[2];
#pragma unroll
  for (int p = 0; p < kRowParts; ++p) load_pair(share.parts[0][p] + col, tops[p]);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    top[c] = tops[0][c];
#pragma unroll
    for (int p = 1; p < kRowParts; ++p) top[c] = fmaxf(top[c], tops[p][c]);
    top[c] = finite_top(top[c]);
    total[c] = sum[c] = 0.0f;
  }
#pragma unroll
  for (int p = 0; p < kRowParts; ++p) {
    float t[2], s[2];
    load_pair(share.parts[1][p] + col, t);
    load_pair(share.parts[2][p] + col, s);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float w = gate(tops[p][c], top[c]);
      total[c] = fmaf(w, t[c], total[c]), sum[c] = fmaf(w, s[c], sum[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float own = mean_of(sum[c], total[c]);
    float other = __shfl_xor_sync(kAll, own, 16);
    x[c] = second ? other : own, x[2 + c] = second ? own : other;
  }
}

template <int N>
__device__ __forceinline__ float sum_pairwise(const float* v) {
  if constexpr (N == 1) return *v;
  else return sum_pairwise<N / 2>(v) + sum_pairwise<N / 2>(v + N / 2);
}

// Number of this block in its cluster, in a register: reading it anew would be waited for.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Ahead of `await_inputs`.
__device__ __forceinline__ void open_pool128(Pool128Share& share) {
  if (threadIdx.x == 0) mail_open(&share.squares_mail[0]), mail_open(&share.squares_mail[1]);
  cluster_here();
}

// Main entries pooled from 128 rows: entries first, first + step .. below end, this block being number
// `rank` of its cluster, and all blocks of the cluster having the same entries. The next entry's rows
// are read while this one is finished. `source.load(entry, mine, share, g)` asks for them;
// `source.begin(share, g)` is what is left to do while the first ones are under way.
template <int D, class T, class Source>
__device__ __forceinline__ void pool128_entries(const Source& source, Pool128Share& share,
                                                const Finish& f, int rank, int64_t first, int64_t end,
                                                int64_t step) {
  constexpr int kBlocks = D / 64;
  const PartOf mine(rank);
  int lane = threadIdx.x % 32;
  bool joins = mine.part == 0;
  Waiting& own = share.waiting[lane];
  if (joins) {
    own.end.tail = mine.col >= D - kRope;
    if (f.weight_f32) copy_async<16>(&own.weight, (const float*)f.weight + mine.col);
    else copy_async<8>(&own.weight, (const __nv_bfloat16*)f.weight + mine.col);
    if (own.end.tail) {
      const float* freq = f.inv_freq + (mine.col - (D - kRope)) / 2;
      copy_async<4>(&own.end.freq[0], freq), copy_async<4>(&own.end.freq[1], freq + 1);
    }
  }
  copies_close();
  float g[8][4];
  source.load(first, mine, share, g);
  source.begin(share, g);
  if (joins) {
    copies_wait_closed();
    own.end.read_weight(&own.weight, f.weight_f32);
    cluster_all_here();  // every mailbox is open
  }
  uint32_t round = 0;
  for (int64_t entry = first; entry < end; entry += step, ++round) {
    uint64_t* mail = &share.squares_mail[round & 1];
    float* squares = share.squares[round & 1];
    if (joins) {  // while rows are under way
      int64_t slot = source.slot(entry);
      own.end.turn_at(source.position(entry));
      own.at = place_in(f.pages, slot), own.stores = slot >= 0;
      if (lane == 0) mail_expect(mail, 4 * kBlocks);
    }
    Part128 part = pool_part(share, g);
    if (entry + step < end) source.load(entry + step, mine, share, g);
    if (round) __syncthreads();  // the last entry's parts are joined
    leave_part(share, mine.part, part);
    __syncthreads();
    if (!joins) continue;
    float x[4];
    join_parts(share, x);
    hold<T>(x);
    float square = square_sum(x);
    if (lane < kBlocks) mail_send(&squares[rank], mail, lane, __float_as_uint(square));
    Waiting kept = own;
    mail_wait(mail, round / 2 & 1);
    float total = sum_pairwise<kBlocks>(squares);
    finish_main<T>(x, total, mine.col, D, kept.end, f, kept.at, kept.stores, entry, lane < 16, true);
  }
}

}  // namespace causeway
