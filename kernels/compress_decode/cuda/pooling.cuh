// Gated pooling of rows and the end of an entry: norm, RoPE, rounding, pages. Shared by the decode step
// and by the chunk form, so that an entry has the same bits from both.
//
// A thread holds four neighbouring channels. Sums of squares run over 64 channels (16 lanes) first, then
// over the groups of 64 in ascending order, whoever holds them.
#pragma once
#include "../../qkv_norm_rope/cuda/cluster.cuh"
#include "../../qkv_norm_rope/cuda/latents.cuh"
#include "../../qkv_norm_rope/cuda/row_math.cuh"
#include "launch.cuh"

namespace causeway {

// What is done to the entries of one compressor.
struct Finish {
  const void* weight;
  const float* inv_freq;
  void* out;  // rows [E, D], or null
  Pages pages;
  float eps, index_scale;
  int weight_f32, quantize;
};

struct Quad {
  float u[4], g[4];
};

// Channels col .. col + 3 of series S of a row [u | g] with SERIES * D values each; a row that is not
// there has u = 0 and g = -inf.
template <int D, int SERIES>
__device__ __forceinline__ Quad load_quad(const float* row, int series, int col, bool there) {
  Quad q;
#pragma unroll
  for (int c = 0; c < 4; ++c) q.u[c] = 0.0f, q.g[c] = kNegInf;
  if (there) {
    load_values(row + series * D + col, q.u);
    load_values(row + (SERIES + series) * D + col, q.g);
  }
  return q;
}

__device__ __forceinline__ float gate(float g, float top) { return exp2_fast((g - top) * kLog2e); }
__device__ __forceinline__ float finite_top(float top) { return top == kNegInf ? 0.0f : top; }
// The weighted mean; `total` is zero (no row), or 1 at least.
__device__ __forceinline__ float mean_of(float sum, float total) {
  return __fdividef(sum, total == 0.0f ? 1.0f : total);
}

// Four channels of an entry from eight rows: four of the previous group, four of the own one.
// `value(j, u)` gives u of row j.
template <class Value>
__device__ __forceinline__ void pool8(const float (&g)[8][4], const Value& value, float (&x)[4]) {
  float top[4], total[4], sum[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    top[c] = g[0][c];
#pragma unroll
    for (int j = 1; j < 8; ++j) top[c] = fmaxf(top[c], g[j][c]);
    top[c] = finite_top(top[c]);
    total[c] = sum[c] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float u[4];
    value(j, u);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float w = gate(g[j][c], top[c]);
      total[c] += w;
      sum[c] = fmaf(w, u[c], sum[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) x[c] = mean_of(sum[c], total[c]);
}
__device__ __forceinline__ void pool8(const Quad (&q)[8], float (&x)[4]) {
  float g[8][4];
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) g[j][c] = q[j].g[c];
  pool8(
      g,
      [&](int j, float (&u)[4]) {
#pragma unroll
        for (int c = 0; c < 4; ++c) u[c] = q[j].u[c];
      },
      x);
}

// ---- entries of 128 rows: a cluster of D / 64 blocks -------------------------------------------
//
// A block reads whole rows, which mostly lie side by side; a warp pools 64 channels of 16 rows (a part),
// two rows at once in its halves. Parts go to the block that joins them for its 64 channels.

constexpr int kPool128Threads = 256, kPartRows = 16, kRowParts = 128 / kPartRows;

template <int D>
constexpr int kBlockRows = 128 * 64 / D;

// What a thread pools: rows first + 2 i for i < 8, channels col .. col + 3.
template <int D>
struct PartOf {
  static constexpr int kBlocks = D / 64;  // of a cluster; as many warps of a block have the same rows
  int section, part, first, col;

  __device__ explicit PartOf(int rank) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    section = warp % kBlocks, part = rank * (8 / kBlocks) + warp / kBlocks;
    first = part * kPartRows + lane / 16, col = section * 64 + lane % 16 * 4;
  }
};

// g waits in registers and u in shared memory, so that three blocks fit a processor.
struct Pool128Share {
  float4 u[8][kPool128Threads];
  float parts[3][kRowParts][64];  // top, total, sum of this block's channels
  float squares[8];
  uint64_t parts_mail, squares_mail;
};
// Four channels that are read once, to registers and to shared memory.
__device__ __forceinline__ void stream_quad(const float* from, float (&v)[4]) {
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "l"(from)
               : "memory");
}
__device__ __forceinline__ void stream_quad_async(float4* to, const float* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(smem_address(to)), "l"(from)
               : "memory");
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
template <int D, class Source>
__device__ __forceinline__ Part128 pool_part(const Source& source, const PartOf<D>& mine,
                                             const Pool128Share& share, float (&g)[8][4]) {
  Part128 p;
  float top[4];
  copies_wait_all();  // each thread reads what it copied
  source.complete(mine, share, g);
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

// To the block of these channels: one half of the warp sends the sums, the other the rest.
__device__ __forceinline__ void send_part(Pool128Share& share, int part, int rank, const Part128& p) {
  bool second = threadIdx.x % 32 >= 16;
  int col = threadIdx.x % 16 * 4;
  float v[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) v[c] = second ? p.sum[c] : p.total[c];
  mail_send4(&share.parts[second ? 2 : 1][part][col], &share.parts_mail, rank, v);
  if (!second) mail_send4(&share.parts[0][part][col], &share.parts_mail, rank, p.top);
}

// Joins the parts of 64 channels: the lanes of a warp get four channels each, its two halves the same.
__device__ __forceinline__ void join_parts(const Pool128Share& share, float (&x)[4]) {
  constexpr int kHalf = kRowParts / 2;
  int col = threadIdx.x % 16 * 4, first = threadIdx.x % 32 / 16 * kHalf;
  float tops[kHalf][4], top[4], total[4], sum[4];
#pragma unroll
  for (int p = 0; p < kHalf; ++p) load_values(&share.parts[0][first + p][col], tops[p]);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    top[c] = tops[0][c];
#pragma unroll
    for (int p = 1; p < kHalf; ++p) top[c] = fmaxf(top[c], tops[p][c]);
    top[c] = finite_top(fmaxf(top[c], __shfl_xor_sync(kAll, top[c], 16)));
    total[c] = sum[c] = 0.0f;
  }
#pragma unroll
  for (int p = 0; p < kHalf; ++p) {
    float t[4], s[4];
    load_values(&share.parts[1][first + p][col], t);
    load_values(&share.parts[2][first + p][col], s);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float w = gate(tops[p][c], top[c]);
      total[c] = fmaf(w, t[c], total[c]), sum[c] = fmaf(w, s[c], sum[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    total[c] += __shfl_xor_sync(kAll, total[c], 16);
    sum[c] += __shfl_xor_sync(kAll, sum[c], 16);
    x[c] = mean_of(sum[c], total[c]);
  }
}

// Sum of squares over the 16 lanes that hold 64 channels.
__device__ __forceinline__ float square_sum(const float (&x)[4]) {
  float sum = x[0] * x[0];
#pragma unroll
  for (int c = 1; c < 4; ++c) sum = fmaf(x[c], x[c], sum);
  return sum_lanes<16>(sum);
}

// What the end of an entry needs besides its values, for channels col .. col + 3: read early, so that no
// load is waited for after the pooling.
struct Ending {
  float weight[4], freq[2];
  float2 turn[2];  // (cos, sin) of the two rotary pairs
  bool tail;       // whether these channels rotate

  __device__ __forceinline__ void read(const Finish& f, int col, int dim) {
    tail = col >= dim - kRope;
    if (f.weight_f32) load_values((const float*)f.weight + col, weight);
    else load_values((const __nv_bfloat16*)f.weight + col, weight);
    freq[0] = freq[1] = 0.0f;
    if (tail) {
      freq[0] = f.inv_freq[(col - (dim - kRope)) / 2];
      freq[1] = f.inv_freq[(col - (dim - kRope)) / 2 + 1];
    }
  }
  __device__ __forceinline__ void turn_at(int64_t position) {
    if (!tail) return;
    turn[0] = cos_sin(__fmul_rn((float)position, freq[0]));
    turn[1] = cos_sin(__fmul_rn((float)position, freq[1]));
  }
  // The same where a warp has all pairs: a lane makes the one of its number, whose frequency `own` is.
  __device__ __forceinline__ void turn_together(int64_t position, float own, int col, int dim) {
    float2 mine = cos_sin(__fmul_rn((float)position, own));
    int pair = max(col - (dim - kRope), 0) / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      turn[i].x = __shfl_sync(kAll, mine.x, pair + i);
      turn[i].y = __shfl_sync(kAll, mine.y, pair + i);
    }
  }
};

// Norm and RoPE of four channels whose row has `total` as its sum of squares.
template <class T>
__device__ __forceinline__ void norm_rope(float (&x)[4], float total, int dim, const Ending& end,
                                          float eps) {
  float factor = rsqrtf(total / (float)dim + eps);
#pragma unroll
  for (int c = 0; c < 4; ++c) x[c] = as_held<T>(__fmul_rn(__fmul_rn(x[c], factor), end.weight[c]));
  if (end.tail) {
    rotate(x, end.turn);
    hold<T>(x);
  }
}

// The place of a slot; nothing stores where that is negative.
__device__ __forceinline__ Place place_in(const Pages& pages, int64_t slot) {
  if (pages.format == kNoPages) return {nullptr, 0};
  return quick_place_of(pages, max(slot, (int64_t)0));
}

// The end of a latent; all lanes of a warp call it, `live` ones write.
template <class T>
__device__ __forceinline__ void finish_main(float (&x)[4], float total, int col, int dim,
                                            const Ending& end, const Finish& f, const Place& at,
                                            bool stores, int64_t entry, bool live) {
  norm_rope<T>(x, total, dim, end, f.eps);
  finish_latent(x, col, dim, end.tail, f.quantize, f.pages, at, live && stores);
  if (live && f.out) store_values((T*)f.out + entry * dim + col, x);
}

// The end of an indexer key of D channels in the first D / 4 lanes of a warp; all its lanes call it.
template <int D, class T>
__device__ __forceinline__ void finish_index(float (&x)[4], const Ending& end, const Finish& f,
                                             int64_t slot, int64_t entry) {
  constexpr int kLanes = D / 4;
  int lane = threadIdx.x % 32, col = lane % kLanes * 4;
  bool live = lane < kLanes;
  float total = square_sum(x);
  if constexpr (D == 128) total += __shfl_xor_sync(kAll, total, 16);
  norm_rope<T>(x, total, D, end, f.eps);
  if (f.quantize) {
    float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll
    for (int step = 1; step < kLanes; step <<= 1) {
      float sign = lane & step ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = fmaf(sign, x[i], __shfl_xor_sync(kAll, x[i], step));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = as_held<T>(__fmul_rn(x[i], f.index_scale));
    int byte = fp4_byte(max_lanes<8>(largest_bits(x)));
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = on_fp4_grid(x[i], byte);
  }
  int byte = index_byte(max_lanes<kLanes>(largest_bits(x)));
  if (live && f.out) store_values((T*)f.out + entry * D + col, x);
  if (!live || f.pages.format == kNoPages || slot < 0) return;
  Place at = quick_place_of(f.pages, slot);
  unsigned char* start = at.page + (int64_t)at.offset * f.pages.payload;
  if (f.pages.format == kFp8Index) {
    uint32_t codes[1];
    encode(x, byte, codes);
    put_codes(start + col, codes);
    if (lane == 0)
      *reinterpret_cast<float*>(at.page + f.pages.scale_offset +
                                at.offset * f.pages.scale_bytes) = scale_value(byte);
  } else {
    put_plain(start, col, x, f.pages.format == kBf16Rows);
  }
}

// A main entry of D channels in D / 4 threads, 64 per half-warp; `sums` holds D / 64 floats.
template <int D, class T>
__device__ __forceinline__ void finish_main_block(float (&x)[4], const Ending& end, const Finish& f,
                                                  int64_t slot, int64_t entry, float* sums) {
  int col = threadIdx.x * 4;
  Place at = place_in(f.pages, slot);
  hold<T>(x);
  float part = square_sum(x);
  if (threadIdx.x % 16 == 0) sums[threadIdx.x / 16] = part;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < D / 64; ++i) total += sums[i];
  finish_main<T>(x, total, col, D, end, f, at, slot >= 0, entry, true);
}

// What a lane of warp 0 keeps for the end of an entry, out of its registers.
struct Waiting {
  Ending end;
  Place at;
  bool stores;
};

// Main entries pooled from 128 rows: entries first, first + step .. below end, this block being number
// `rank` of its cluster, and all blocks of the cluster having the same entries. The next entry's rows are
// read while this one is finished. `source.load(entry, mine, share, g)` brings them; when they are there,
// `source.complete(mine, share, g)` may still change them.
template <int D, class T, class Source>
__device__ __forceinline__ void pool128_entries(const Source& source, Pool128Share& share,
                                                const Finish& f, int rank, int64_t first, int64_t end,
                                                int64_t step) {
  constexpr int kBlocks = D / 64, kFinished = 1;
  __shared__ Waiting waiting[32];
  const PartOf<D> mine(rank);
  int lane = threadIdx.x % 32, col = rank * 64 + lane % 16 * 4;
  bool finishes = threadIdx.x < 32;
  float g[8][4];
  source.load(first, mine, share, g);
  if (threadIdx.x == 0) mail_open(&share.parts_mail), mail_open(&share.squares_mail);
  cluster_here();
  if (finishes) waiting[lane].end.read(f, col, D);
  cluster_all_here();  // every mailbox is open
  uint32_t round = 0;
  for (int64_t entry = first; entry < end; entry += step, ++round) {
    if (finishes) {  // while rows are under way
      Waiting& own = waiting[lane];
      int64_t slot = source.slot(entry);
      own.end.turn_at(source.position(entry));
      own.at = place_in(f.pages, slot), own.stores = slot >= 0;
      if (lane == 0) {
        mail_expect(&share.parts_mail, sizeof(share.parts));
        mail_expect(&share.squares_mail, 4 * kBlocks);
      }
    }
    Part128 part = pool_part(source, mine, share, g);
    bool more = entry + step < end;
    // Warp 0 finished the last entry: so every block has joined that one's parts.
    if (!finishes && round) named_barrier(kFinished, kPool128Threads);
    send_part(share, mine.part, mine.section, part);
    if (more) source.load(entry + step, mine, share, g);
    if (!finishes) continue;
    mail_wait(&share.parts_mail, round & 1);
    float x[4];
    join_parts(share, x);
    hold<T>(x);
    float square = square_sum(x);
    if (lane < kBlocks)
      mail_send(&share.squares[rank], &share.squares_mail, lane, __float_as_uint(square));
    Waiting own = waiting[lane];
    mail_wait(&share.squares_mail, round & 1);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) total += share.squares[i];
    finish_main<T>(x, total, col, D, own.end, f, own.at, own.stores, entry, lane < 16);
    if (more) named_barrier_arrive(kFinished, kPool128Threads);
  }
}

}  // namespace causeway
