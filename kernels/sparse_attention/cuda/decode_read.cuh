// Decode: how a warp reads its keys of a tile from their pages and makes bfloat16 rows of them.
#pragma once
#include "decode_plan.cuh"
#include "hopper.cuh"
#include "pages.cuh"

namespace causeway {

constexpr int kWarpKeys = 20;  // of a tile
constexpr int kPartKeys = kTileKeys / 2;
constexpr int kTileBytes = kTileKeys * kDim * 2;
constexpr int kKeySubtile = kTileKeys * 128;

// 16 bytes, zeros where `p` is null; volatile: all reads of a tile are issued where they are written.
__device__ __forceinline__ uint4 load_now(const uint8_t* p, int at) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u64 p, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p + at), "l"(p));
  return v;
}

__device__ __forceinline__ const uint8_t* shuffle_pointer(const uint8_t* p, int lane) {
  return reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, (unsigned long long)p, lane));
}

__device__ __forceinline__ const Pages& pages_of(const DecodeArgs& a, int at) {
  return at < a.window ? a.ring : a.entries.pages;
}

// Row of the tile that is key k = 0..19 of a warp: ten in each part.
__device__ __forceinline__ int warp_row(int warp, int k) {
  return (k < kWarpKeys / 2 ? 0 : kPartKeys - kWarpKeys / 2) + warp * (kWarpKeys / 2) + k;
}

// Place of columns 8 c..+7 of row r in a subtile of keys.
__device__ __forceinline__ uint32_t swizzled(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

// A warp's 20 entries: lane l has bytes 16 l..+15 of each, lane 4 i + q bytes 512 + 16 q..+15 of entry 8 j + i.
struct WarpEntries {
  uint4 raw[kWarpKeys], rest[3];
  uint2 scales;  // of the entry that this lane lists
  bool any_large;

  __device__ __forceinline__ void load(const DecodeArgs& a, Place place, int at) {
    int lane = threadIdx.x & 31;
    const uint8_t* mine = nullptr;
    scales = make_uint2(0, 0);
    if (place.page >= 0) {
      const Pages& p = pages_of(a, at);
      const uint8_t* page = p.pool + (int64_t)place.page * p.stride;
      mine = page + (int64_t)place.offset * kFp8Payload;
      scales = __ldg(reinterpret_cast<const uint2*>(scales_of(p, page, place.offset)));
    }
#pragma unroll
    for (int k = 0; k < kWarpKeys; ++k) raw[k] = load_now(shuffle_pointer(mine, k), 16 * lane);
#pragma unroll
    for (int j = 0; j < 3; ++j) rest[j] = load_now(shuffle_pointer(mine, 8 * j + lane / 4), 512 + 16 * (lane & 3));
    uint32_t limit = kLargestScale * 0x01010101u;
    any_large = __any_sync(~0u, __vcmpgtu4(scales.x, limit) | (__vcmpgtu4(scales.y, limit) & 0xffffffu));
  }

  // Entries k = first..+9 become bfloat16 rows.
  __device__ __forceinline__ void decode(uint32_t tile, int first) const {
    int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, block = lane / 4, q = lane & 3, odd = block & 1;
    bool codes = lane < 28;
#pragma unroll
    for (int k = first; k < first + kWarpKeys / 2; ++k) {
      uint32_t low = __shfl_sync(~0u, scales.x, k), high = __shfl_sync(~0u, scales.y, k);
      uint32_t scale = ((lane < 16 ? low : high) >> (8 * (block & 3))) & 255u;
      // Odd blocks start with their second half: 8 lanes of a store meet 8 different banks.
      bool swap = odd && codes;
      uint4 v = raw[k], out[2];
      if (swap) v = make_uint4(v.z, v.w, v.x, v.y);
      decode_codes(v, scale, any_large, out);
      int r = warp_row(warp, k);
      uint32_t to = tile + block * kKeySubtile;
      store_shared(to + swizzled(r, codes ? 2 * q + odd : q), codes ? out[0] : raw[k]);
      if (codes) store_shared(to + swizzled(r, 2 * q + 1 - odd), out[1]);
    }
#pragma unroll
    for (int j = first == 0 ? 0 : 2; j < (first == 0 ? 2 : 3); ++j) {
      int k = 8 * j + lane / 4;
      if (k < kWarpKeys) store_shared(tile + 7 * kKeySubtile + swizzled(warp_row(warp, k), 4 + q), rest[j]);
    }
  }
};

// A warp's 20 entries of any format, without haste.
__device__ __forceinline__ void read_entries(const DecodeArgs& a, Place place, int at, uint32_t tile) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, q = lane & 3;
  for (int first = 0; first < 24; first += 8) {
    int k = first + lane / 4, page = __shfl_sync(~0u, place.page, k), offset = __shfl_sync(~0u, place.offset, k);
    int key_at = __shfl_sync(~0u, at, k);
    if (k >= kWarpKeys) continue;
    int r = warp_row(warp, k);
    auto put = [&](int column, uint4 v) {
      store_shared(tile + (column >> 6) * kKeySubtile + swizzled(r, (column >> 3) & 7), v);
    };
    if (page >= 0) {
      const Pages& p = pages_of(a, key_at);
      decode_entry(p, p.pool + (int64_t)page * p.stride, offset, q, is_aligned(p), put);
    } else {
      for (int i = 0; i < 16; ++i) put(8 * (q + 4 * i), make_uint4(0, 0, 0, 0));
    }
  }
}

__device__ __forceinline__ void prefetch_entry(const DecodeArgs& a, int at, Place place) {
  if (place.page < 0) return;
  const Pages& p = pages_of(a, at);
  const uint8_t* page = p.pool + (int64_t)place.page * p.stride;
  const uint8_t* entry = page + (int64_t)place.offset * kFp8Payload;
#pragma unroll
  for (int i = 0; i < 5; ++i) asm volatile("prefetch.global.L2 [%0];" ::"l"(entry + min(128 * i, kFp8Payload - 16)));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(scales_of(p, page, place.offset)));
}

}  // namespace causeway
