// A decode step of a layer's compressors: every row is kept in its ring; rows that end a group pool it.
// Blocks run in any order, so rows that this launch writes are read from where they come from.
#include "pool128.cuh"

namespace causeway {

constexpr int kParts = 2;

struct Part {
  const float* ape;
  const int64_t* slots;
  int64_t column;  // of the part's first value in rows and state
  Finish finish;
  int index;
};
struct Decode {
  const float* rows;
  float* state;
  const int64_t *positions, *seq, *base;
  int64_t row_stride, state_stride, tokens;
  int ring;
  Part parts[kParts];
};

namespace {

// Rows of the same sequence right before row t of the step, at most `most`. Every lane gets it.
__device__ __forceinline__ int rows_before(const int64_t* seq, int64_t t, int most) {
  int64_t own = seq[t];
  int found = 0;
  while (found < most) {
    int64_t at = t - 1 - found - threadIdx.x % 32;
    int64_t name = seq[max(at, (int64_t)0)];
    unsigned other = __ballot_sync(kAll, at < 0 || name != own);
    found += other ? __ffs(other) - 1 : 32;
    if (other) break;
  }
  return min(found, most);
}

__device__ __forceinline__ void add_ape(float (&g)[4], const float* ape) {
  float more[4];
  load_values(ape, more);
#pragma unroll
  for (int c = 0; c < 4; ++c) g[c] = __fadd_rn(g[c], more[c]);
}

// The rows that end at position `last`, which is row t of the step and ends a group.
template <int D, int SERIES, int BACK>
struct StepRows {
  const Decode& a;
  const Part& part;
  int64_t t, last, base;
  int at, before, col;  // at: ring row of `last`
  const char* ring;     // these channels of its first row, once `find_ring` was called

  // The address is opaque, or the compiler would make every row's from the start.
  __device__ __forceinline__ void find_ring() {
    ring = reinterpret_cast<const char*>(a.state + base * a.state_stride + part.column + col);
    asm volatile("" : "+l"(ring));
  }
  // Nothing lies before position 0; rows of this step are read from where they come from, without ape.
  __device__ __forceinline__ bool exists(int j) const { return last >= BACK - 1 - j; }
  __device__ __forceinline__ bool is_raw(int j) const {
    return BACK - 1 - j > 0 && BACK - 1 - j <= before && exists(j);
  }
  // Channels of u of row j; readable also where there is none. PLAIN: all rows are the ring's, which takes
  // a third of the instructions, and no load starts before them.
  template <bool PLAIN>
  __device__ __forceinline__ const float* address(int j) const {
    int back = BACK - 1 - j, row = at - back;
    row += row < 0 ? a.ring : 0;
    if constexpr (PLAIN) {
      uint64_t stride = (uint64_t)a.state_stride * 4;
      return reinterpret_cast<const float*>(ring + (uint64_t)(uint32_t)row * stride);
    }
    const int64_t channel = part.column + col;
    bool raw = back <= before || !exists(j);
    int64_t index = raw ? t - min(back, before) : base + row;
    return (raw ? a.rows : a.state) + index * (raw ? a.row_stride : a.state_stride) + channel;
  }
  // Row j as it lies there. Nothing here waits for a load.
  template <bool PLAIN>
  __device__ __forceinline__ Quad read(int j, int series) const {
    return load_quad<D, SERIES>(address<PLAIN>(j) - col, series, col, true);
  }
  __device__ __forceinline__ void add_ape(float (&g)[4], int j, int series) const {
    causeway::add_ape(g, part.ape + (j % (BACK / SERIES) * SERIES + series) * D + col);
  }
  // What `read` left out.
  __device__ __forceinline__ void complete(Quad& q, int j, int series) const {
    if (!exists(j)) {
#pragma unroll
      for (int c = 0; c < 4; ++c) q.u[c] = 0.0f, q.g[c] = kNegInf;
    } else if (is_raw(j)) {
      add_ape(q.g, j, series);
    }
  }
  __device__ __forceinline__ bool plain() const { return before == 0 && last >= BACK - 1; }
};

// Ahead of `await_inputs`: numbers of row t and constants that all blocks wait for.
__device__ __forceinline__ void ask_for_step(const Decode& a, const Part& part, int64_t t, int col) {
  switch (threadIdx.x) {
    case 0: ask_for(a.base + t); break;
    case 1: ask_for(a.positions + t); break;
    case 2: ask_for(a.seq + t); break;
    case 3: ask_for(part.slots + t); break;
    case 4: ask_for(part.finish.inv_freq); break;
    case 5: ask_for((const char*)part.finish.weight + (part.finish.weight_f32 ? 4 : 2) * col); break;
    default: break;
  }
}

template <int D, int SERIES>
__device__ __forceinline__ void put_quad(const Quad& q, float* row, int series, int col) {
  store_values(row + series * D + col, q.u);
  store_values(row + (SERIES + series) * D + col, q.g);
}

template <int D, bool INDEX, class T>
__device__ __forceinline__ void step4(const Decode& a, const Part& part, float* sums) {
  using Rows = StepRows<D, 2, 8>;
  int64_t t = blockIdx.x, base = a.base[t], last = a.positions[t], slot = part.slots[t];
  int col = threadIdx.x * 4;
  bool holds = col < D;
  int mine = col % D;
  const float* row = a.rows + t * a.row_stride + part.column;
  Quad own[2] = {load_quad<D, 2>(row, 0, mine, true), load_quad<D, 2>(row, 1, mine, true)};
  int before = rows_before(a.seq, t, 7);
  if (base < 0 || (INDEX && threadIdx.x >= 32)) return;
  int at = (int)((uint32_t)last % (uint32_t)a.ring), place = (int)(last & 3);
  float* to = a.state + (base + at) * a.state_stride + part.column;
  const float* ape = part.ape + place * 2 * D + mine;
  if (place != 3) {
    add_ape(own[0].g, ape);
    add_ape(own[1].g, ape + D);
    if (holds) {
      put_quad<D, 2>(own[0], to, 0, mine);
      put_quad<D, 2>(own[1], to, 1, mine);
    }
    return;
  }
  Rows rows{a, part, t, last, base, at, before, mine};
  rows.find_ring();
  Quad q[8];
  if (rows.plain()) {
#pragma unroll
    for (int j = 0; j < 7; ++j) q[j] = rows.template read<true>(j, j / 4);
  } else {
#pragma unroll
    for (int j = 0; j < 7; ++j) q[j] = rows.template read<false>(j, j / 4);
  }
  Ending end;
  end.read(part.finish, mine, D);
  add_ape(own[0].g, ape);
  add_ape(own[1].g, ape + D);
  end.turn_at(last - 3);
  if (holds) {
    put_quad<D, 2>(own[0], to, 0, mine);
    put_quad<D, 2>(own[1], to, 1, mine);
  }
  q[7] = own[1];
  if (!rows.plain()) {
#pragma unroll
    for (int j = 0; j < 7; ++j) rows.complete(q[j], j, j / 4);
  }
  float x[4];
  pool8(q, x);
  if constexpr (INDEX) {
    hold<T>(x);
    finish_index<D, T>(x, end, part.finish, slot, t);
  } else {
    finish_main_block<D, T>(x, end, part.finish, slot, t, sums);
  }
}

// D / 4 threads; blockIdx.y is the part.
template <int D, int DI, class T>
__global__ void __launch_bounds__(D / 4) step4_kernel(const __grid_constant__ Decode a) {
  __shared__ float sums[D / 64];
  const Part& part = a.parts[blockIdx.y];
  ask_for_step(a, part, blockIdx.x, 0);
  await_inputs();
  if (part.index) step4<DI, true, T>(a, part, sums);
  else step4<D, false, T>(a, part, sums);
}

// Row t's entry for pool128_entries, which also keeps row t: threads whose last row is that one have it
// and its ape in shared memory, u where pooling expects it: neither the ring's rows nor pooling waits.
template <int D>
struct StepSource {
  StepRows<D, 1, 128> rows;
  const float4 *own_g, *own_ape;
  int64_t place;  // page slot
  bool keeps;

  template <bool PLAIN>
  __device__ __forceinline__ void load_rows(int first, Pool128Share& share, float (&g)[8][4]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int j = first + 2 * i;
      if (i < 7 || !keeps)
        bring_row<D>(share, i, rows.template address<PLAIN>(j), PLAIN || rows.exists(j), g[i]);
    }
  }
  __device__ __forceinline__ void load(int64_t, const PartOf& mine, Pool128Share& share,
                                       float (&g)[8][4]) const {
    if (rows.plain()) {
      load_rows<true>(mine.first, share, g);
      return;
    }
    load_rows<false>(mine.first, share, g);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (rows.is_raw(mine.first + 2 * i)) rows.add_ape(g[i], mine.first + 2 * i, 0);
  }
  __device__ __forceinline__ void begin(const Pool128Share& share, float (&g)[8][4]) const {
    if (!keeps) return;
    copies_wait_closed();
    float u[4];
    load_values((const float*)&share.u[7][threadIdx.x], u);
    load_values((const float*)own_g, g[7]);
    add_ape(g[7], (const float*)own_ape);
    float* to = rows.a.state + (rows.base + rows.at) * rows.a.state_stride;
    to += rows.part.column + rows.col;
    store_values(to, u);
    store_values(to + D, g[7]);
  }
  __device__ int64_t position(int64_t) const { return rows.last - 127; }
  __device__ int64_t slot(int64_t) const { return place; }
};

// A cluster of D / 64 blocks per row.
template <int D, class T>
__global__ void __launch_bounds__(kPool128Threads, 4) step128_kernel(const __grid_constant__ Decode a) {
  __shared__ Pool128Share share;
  __shared__ float4 own_rest[2][16];  // g and ape of row t
  const Part& part = a.parts[0];
  int64_t t = blockIdx.x / (D / 64);
  int rank = cluster_rank();
  const PartOf mine(rank);
  bool keeps = mine.first + 14 == 127;
  ask_for_step(a, part, t, rank * 64);
  if (keeps) ask_for(part.ape + 127 * D + mine.col);
  open_pool128(share);
  await_inputs();
  // All numbers at once, and ahead of anything that takes longer.
  int64_t base = a.base[t], last = a.positions[t], slot = mine.part == 0 ? part.slots[t] : -1;
  bool follows = t > 0 && a.seq[t - 1] == a.seq[t];
  float4 *own_g = &own_rest[0][threadIdx.x % 16], *own_ape = &own_rest[1][threadIdx.x % 16];
  if (keeps) {
    const float* own = a.rows + t * a.row_stride + part.column + mine.col;
    stream_quad_async(&share.u[7][threadIdx.x], own);
    stream_quad_async(own_g, own + D);
    stream_quad_async(own_ape, part.ape + 127 * D + mine.col);
  }
  if (base < 0) {
    copies_wait_all();
    return;
  }
  int before = follows ? rows_before(a.seq, t, 127) : 0;
  int at = (int)(a.ring & (a.ring - 1) ? (uint32_t)last % (uint32_t)a.ring : last & (a.ring - 1));
  int place = (int)(last & 127);
  if (place != 127) {
    if (!keeps) return;
    Quad own;
    copies_wait_all();
    load_values((const float*)&share.u[7][threadIdx.x], own.u);
    load_values((const float*)own_g, own.g);
    add_ape(own.g, part.ape + place * D + mine.col);
    put_quad<D, 1>(own, a.state + (base + at) * a.state_stride + part.column, 0, mine.col);
    return;
  }
  StepSource<D> source{{a, part, t, last, base, at, before, mine.col}, own_g, own_ape, slot, keeps};
  source.rows.find_ring();
  pool128_entries<D, T>(source, share, part.finish, rank, t, t + 1, 1);
}

template <int D, int DI, class T>
int launch(const Decode& a, int parts, int ratio, cudaStream_t stream) {
  if (ratio == 4) {
    EarlyLaunch steps{a.tokens, D / 4, stream};
    steps.y = parts;
    return steps.start(step4_kernel<D, DI, T>, a);
  }
  return EarlyLaunch{a.tokens * (D / 64), kPool128Threads, stream, 0, D / 64, true}.start(
      step128_kernel<D, T>, a);
}

template <class T>
int dispatch(const Decode& a, int parts, int ratio, int dim, int index_dim, cudaStream_t stream) {
  if (dim == 512)
    return index_dim == 128 ? launch<512, 128, T>(a, parts, ratio, stream)
                            : launch<512, 64, T>(a, parts, ratio, stream);
  return index_dim == 128 ? launch<128, 128, T>(a, parts, ratio, stream)
                          : launch<128, 64, T>(a, parts, ratio, stream);
}

}  // namespace

extern "C" int causeway_compress_decode(const Decode* a, int parts, int ratio, int dim, int index_dim,
                                        int f32, void* stream) {
  return f32 ? dispatch<float>(*a, parts, ratio, dim, index_dim, (cudaStream_t)stream)
             : dispatch<__nv_bfloat16>(*a, parts, ratio, dim, index_dim, (cudaStream_t)stream);
}

}  // namespace causeway
