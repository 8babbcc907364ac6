// Decode: how a warp reads eight keys from their pages and makes bfloat16 rows of them.
#pragma once
#include "decode_plan.cuh"
#include "hopper.cuh"
#include "pages.cuh"

namespace causeway {

constexpr int kGroupKeys = 8;  // decoded by a warp: the rows of one swizzle pattern, 1 KB of each subtile of columns

__device__ __forceinline__ uint4 load_shared(uint32_t smem) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(smem)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_shared_pair(uint32_t smem) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(smem) : "memory");
  return v;
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int kBytes>
__device__ __forceinline__ void copy_bulk(uint32_t smem, const void* global, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
               "l"(global), "n"(kBytes), "r"(bar)
               : "memory");
}
__device__ __forceinline__ void copy16(uint32_t smem, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(global) : "memory");
}
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t permute_bytes(uint32_t x) {
  uint32_t r;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(r) : "r"(x), "n"(kSelector));
  return r;
}

__device__ __forceinline__ const Pages& pages_of(const DecodeArgs& a, int at) {
  return at < a.window ? a.ring : a.entries.pages;
}

// Place of columns 8 c..+7 of row r in a subtile of keys.
__device__ __forceinline__ uint32_t swizzled(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

// 8 e4m3 codes -> 8 bfloat16 values times 2^-120 (see spread_codes; the permutation puts copies of a code's sign above
// it). Decoding is bound by the integer pipe: the shift is a multiplication, which is not made there.
__device__ __forceinline__ uint4 spread_eight(uint2 codes) {
  auto half = [](uint32_t x) {
    asm("mul.lo.u32 %0, %0, 16;" : "+r"(x));
    return x & 0x87f087f0u;
  };
  return make_uint4(half(permute_bytes<0x9180>(codes.x)), half(permute_bytes<0xb3a2>(codes.x)),
                    half(permute_bytes<0x9180>(codes.y)), half(permute_bytes<0xb3a2>(codes.y)));
}
__device__ __forceinline__ uint4 multiply_eight(uint4 v, uint32_t factor) {
  return make_uint4(multiply_bf16x2(v.x, factor), multiply_bf16x2(v.y, factor), multiply_bf16x2(v.z, factor),
                    multiply_bf16x2(v.w, factor));
}

// What the threads of a block know of an item's keys.
template <int kKeys>
struct KeyTable {
  static constexpr int kGroups = kKeys / kGroupKeys;
  union {
    Place places[kKeys];  // until the copies are sent, or where there are none
    alignas(16) uint2 scales[kKeys];
  };
  uint64_t listed[kGroups];  // barriers: scales (or places) and `exists` are there
  uint8_t exists[kGroups];   // keys of a group
};

// Key `key` of an item, by the thread that lists it: where its entry is. The thread's warp lists 32 keys. `sent` is
// called while the scales are under way.
template <bool kPlain, int kKeys, typename Sent>
__device__ __forceinline__ void list_key(KeyTable<kKeys>& table, const uint8_t** entries, const DecodeArgs& a,
                                         Place place, int key, int in_row, Sent sent) {
  int lane = threadIdx.x & 31, group = key / kGroupKeys;
  uint32_t exists = __ballot_sync(~0u, place.page >= 0) >> (lane & ~(kGroupKeys - 1)) & 255u;
  uint2 scales = make_uint2(0, 0);
  const uint8_t* entry = nullptr;
  if (!kPlain && place.page >= 0) {
    const Pages& p = pages_of(a, in_row);
    const uint8_t* page = p.pool + (int64_t)place.page * p.stride;
    entry = page + (int64_t)place.offset * kFp8Payload;
    asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];"
                 : "=r"(scales.x), "=r"(scales.y)
                 : "l"(scales_of(p, page, place.offset)));
  }
  if (key < kKeys) {
    entries[key] = entry;
    if (kPlain) table.places[key] = place;
    if ((lane & 7) == 0) table.exists[group] = exists;
  }
  __syncwarp();
  sent();
  if (!kPlain && key < kKeys) table.scales[key] = scales;
  __syncwarp();
  if ((lane & 7) == 0 && key < kKeys) mbar_arrive(smem_address(&table.listed[group]));
}

// A warp, for the eight keys of its group: entry r goes, as it is, to the group's kilobyte of subtile r. The warp that
// asks is the one that waits. (The copy engine takes 16 to 30 cycles for an entry, whoever asks for it.)
template <int kKeys>
__device__ __forceinline__ void send_group(const uint8_t* const* entries, uint32_t keys, int group) {
  constexpr int kSubtile = kKeys * 128;
  int lane = threadIdx.x & 31;
  uint32_t at = keys + group * 1024;
  entries += group * kGroupKeys;
  const uint8_t* entry[kGroupKeys];
#pragma unroll
  for (int r = 0; r < kGroupKeys; ++r) entry[r] = entries[r];
  const uint8_t* rest = entries[lane / 4];
#pragma unroll
  for (int r = 0; r < kGroupKeys; ++r) {
    if (entry[r]) copy16(at + r * kSubtile + 16 * lane, entry[r] + 16 * lane);
  }
  if (rest) copy16(at + lane / 4 * kSubtile + 512 + 16 * (lane & 3), rest + 512 + 16 * (lane & 3));
}

// A warp, for the eight keys of its group: fp8 entries become bfloat16 rows. Nobody else touches the group's memory.
template <int kKeys>
__device__ __forceinline__ void decode_group(const KeyTable<kKeys>& table, uint32_t keys, int group, uint32_t parity) {
  constexpr int kSubtile = kKeys * 128;
  int lane = threadIdx.x & 31, block = lane / 8, chunk = lane & 7;
  uint32_t at = keys + group * 1024, to = at + block * kSubtile;
  copies_wait_all();
  mbar_wait(smem_address(&table.listed[group]), parity);
  __syncwarp();
  const uint8_t* scales = reinterpret_cast<const uint8_t*>(&table.scales[kGroupKeys * group]);
  uint32_t present = table.exists[group];  // keys that do not have finite values: nobody's weight but zero meets them
  uint32_t words[2 * kGroupKeys];  // those of a row in two words: all lanes read the same ones, two rows at once
#pragma unroll
  for (int i = 0; i < kGroupKeys / 2; ++i) {
    uint4 rows = reinterpret_cast<const uint4*>(scales)[i];
    words[4 * i] = rows.x, words[4 * i + 1] = rows.y, words[4 * i + 2] = rows.z, words[4 * i + 3] = rows.w;
  }
  uint32_t select = 0x4440 + block;  // a byte, and zeros
  auto factor_of = [&](int r, int half) {
    return min(__byte_perm(words[2 * r + half], 0, select) + 120u, 254u) * 0x00800080u;
  };
  auto place_of = [&](int r, int half) { return ((to + chunk * 16) ^ (r << 4)) + 4 * half * kSubtile + r * 128; };
  auto load = [&](int r, int half) { return load_shared_pair(at + r * kSubtile + 256 * half + 8 * lane); };
  auto write = [&](int r, uint2 codes, int half) {
    uint4 v = multiply_eight(spread_eight(codes), factor_of(r, half));
    if (half == 0 || block < 3) store_shared(place_of(r, half), v);
  };
  uint4 rotary[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) rotary[i] = load_shared(to + 4 * i * kSubtile + kNope + 16 * chunk);
  uint2 codes[kGroupKeys][2];
#pragma unroll
  for (int r = 0; r < kGroupKeys; ++r) codes[r][0] = load(r, 0), codes[r][1] = load(r, 1);
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kGroupKeys; ++r) {
    write(r, codes[r][0], 0);
    write(r, codes[r][1], 1);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int r = 4 * i + block;
    if (!(present >> r & 1)) rotary[i] = make_uint4(0, 0, 0, 0);
    store_shared(at + 7 * kSubtile + r * 128 + ((chunk ^ r) << 4), rotary[i]);
  }
  // Lane 4 r + p looks at the scales of blocks 2 p and 2 p + 1 of row r; the eighth byte is no scale.
  uint32_t pair = reinterpret_cast<const uint16_t*>(scales)[lane];
  bool large = (pair & 255u) > kLargestScale || ((lane & 3) < 3 && pair >> 8 > kLargestScale);
  if (!__any_sync(~0u, large)) return;
  // Factors that are no bfloat16: what is left of them.
#pragma unroll 1
  for (int i = 0; i < 2 * kGroupKeys; ++i) {
    int r = i / 2, half = i & 1;
    uint32_t scale = scales[8 * r + 4 * half + block];
    uint32_t factor = scale > kLargestScale ? (scale - 7u) * 0x00800080u : 0x3f803f80u;
    if (half == 0 || block < 3) store_shared(place_of(r, half), multiply_eight(load_shared(place_of(r, half)), factor));
  }
}

// The same for entries of any format, without haste.
template <int kKeys>
__device__ __forceinline__ void read_group(const KeyTable<kKeys>& table, const DecodeArgs& a, uint32_t keys, int group,
                                           int chunk, uint32_t parity) {
  constexpr int kSubtile = kKeys * 128;
  int lane = threadIdx.x & 31, q = lane & 3, r = lane / 4, key = kGroupKeys * group + r;
  mbar_wait(smem_address(&table.listed[group]), parity);
  Place place = table.places[key];
  auto put = [&](int column, uint4 v) {
    store_shared(keys + group * 1024 + (column >> 6) * kSubtile + swizzled(r, (column >> 3) & 7), v);
  };
  if (place.page >= 0) {
    const Pages& p = pages_of(a, chunk * kKeys + key);
    decode_entry(p, p.pool + (int64_t)place.page * p.stride, place.offset, q, is_aligned(p), put);
  } else {
    for (int i = 0; i < 16; ++i) put(8 * (q + 4 * i), make_uint4(0, 0, 0, 0));
  }
}

__device__ __forceinline__ void prefetch_entry(const DecodeArgs& a, int at, Place place) {
  if (place.page < 0) return;
  const Pages& p = pages_of(a, at);
  const uint8_t* page = p.pool + (int64_t)place.page * p.stride;
  const uint8_t* entry = page + (int64_t)place.offset * kFp8Payload;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(entry), "n"(kFp8Payload) : "memory");
  asm volatile("prefetch.global.L2 [%0];" ::"l"(scales_of(p, page, place.offset)));
}

// kThreads threads, while others multiply: item `number` or the next that exists (row -1: none), and its keys' places.
template <int kKeys, int kThreads, bool kPlain>
__device__ __forceinline__ void find_next(Item& next, Place* places, const DecodeArgs& a, Walk<kKeys>& walk,
                                          int number) {
  int at = threadIdx.x % kThreads;
  Item it = walk.item(a, number);
  int64_t key;
  bool more = walk.find_existing(a, it, at, key);
  if (at == 0) next = more ? it : Item{-1};
  if (!more) return;
  for (bool first = true; at < kKeys; at += kThreads, first = false) {
    int in_row = it.chunk * kKeys + at;
    if (!first) key = listed_key(a, it.row, in_row);
    Place place = locate_key(a, it, in_row, key);
    places[at] = place;
    if constexpr (!kPlain) prefetch_entry(a, in_row, place);
  }
}

}  // namespace causeway
