// Decode: how a warp reads its keys of a tile from their pages and makes bfloat16 rows of them.
#pragma once
#include "decode_plan.cuh"
#include "hopper.cuh"
#include "pages.cuh"

namespace causeway {

constexpr int kWarpKeys = 20;  // of a tile
constexpr int kPartKeys = kTileKeys / 2;
constexpr int kPartEntries = 10;  // of a warp, decoded in one go
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

__device__ __forceinline__ uint4 load_shared(uint32_t smem) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(smem)
               : "memory");
  return v;
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the latest kLater groups of this thread have landed.
template <int kLater>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

__device__ __forceinline__ const uint8_t* shuffle_pointer(const uint8_t* p, int lane) {
  return reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, (unsigned long long)p, lane));
}

__device__ __forceinline__ const Pages& pages_of(const DecodeArgs& a, int at) {
  return at < a.window ? a.ring : a.entries.pages;
}

// Row of the tile that is key k = 0..19 of a warp: ten in each part. Rows of a warp are 4 apart, so that the swizzle
// leaves two addresses and constant offsets.
__device__ __forceinline__ int warp_row(int warp, int k) { return 4 * k + warp; }

// Place of columns 8 c..+7 of row r in a subtile of keys.
__device__ __forceinline__ uint32_t swizzled(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

// A warp's fp8 entries. Lane l copies bytes 16 l..+15 of each to shared memory without waiting, to one of the two
// places that their values will have; lane 4 i + q bytes 512 + 16 q..+15 of entry 8 j + i. Rotary values are then where
// they belong; codes are decoded in place, group by group in the order of arrival. (Reads into registers would
// share a scoreboard: the first decoded entry would wait for the last one.)
template <int kKeys>
struct WarpEntries {
  uint2 scales;  // of the entry that this lane lists

  template <typename RowOf>
  __device__ __forceinline__ void load(const DecodeArgs& a, Place place, int at, uint32_t tile, RowOf row_of) {
    int lane = threadIdx.x & 31, block = lane / 4, q = lane & 3;
    const uint8_t* nowhere = reinterpret_cast<const uint8_t*>(a.q);  // readable; nothing is read
    const uint8_t* mine = nowhere;
    scales = make_uint2(0, 0);
    if (place.page >= 0) {
      const Pages& p = pages_of(a, at);
      const uint8_t* page = p.pool + (int64_t)place.page * p.stride;
      mine = page + (int64_t)place.offset * kFp8Payload;
      scales = __ldg(reinterpret_cast<const uint2*>(scales_of(p, page, place.offset)));
    }
#pragma unroll
    for (int first = 0; first < kKeys; first += kGroup) {
#pragma unroll
      for (int k = first; k < first + kGroup; ++k) {
        const uint8_t* from = shuffle_pointer(mine, k);
        copy16_async(tile + block * kKeySubtile + swizzled(row_of(k), raw_column()), from + 16 * lane, from != nowhere);
      }
#pragma unroll
      for (int j = rests_before(first); j < rests_before(first + kGroup); ++j) {
        int k = 8 * j + block;
        const uint8_t* from = shuffle_pointer(mine, k);
        if (k >= kKeys) continue;
        copy16_async(tile + 7 * kKeySubtile + swizzled(row_of(k), 4 + q), from + 512 + 16 * q, from != nowhere);
      }
      copies_commit();
    }
  }

  // Entries kFirst..+9 become bfloat16 rows row_of(k).
  template <int kFirst, typename RowOf>
  __device__ __forceinline__ void decode(uint32_t tile, RowOf row_of) const {
    int lane = threadIdx.x & 31, block = lane / 4, q = lane & 3, odd = block & 1;
    bool codes = lane < 28;
    uint32_t limit = kLargestScale * 0x01010101u, to = tile + block * kKeySubtile;
    bool any_large = __any_sync(~0u, __vcmpgtu4(scales.x, limit) | (__vcmpgtu4(scales.y, limit) & 0xffffffu));
    auto decode_group = [&](int first) {
      uint4 raw[kGroup], out[2];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) raw[k] = load_shared(to + swizzled(row_of(first + k), raw_column()));
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        uint32_t low = __shfl_sync(~0u, scales.x, first + k), high = __shfl_sync(~0u, scales.y, first + k);
        uint32_t scale = ((lane < 16 ? low : high) >> (8 * (block & 3))) & 255u;
        uint4 v = raw[k];
        if (odd) v = make_uint4(v.z, v.w, v.x, v.y);
        decode_codes(v, scale, any_large, out);
        if (!codes) continue;
        store_shared(to + swizzled(row_of(first + k), raw_column()), out[0]);
        store_shared(to + swizzled(row_of(first + k), 2 * q + 1 - odd), out[1]);
      }
    };
    static_assert(kPartEntries == 2 * kGroup);
    copies_wait<(kKeys - kFirst) / kGroup - 1>();
    decode_group(kFirst);
    copies_wait<(kKeys - kFirst) / kGroup - 2>();
    decode_group(kFirst + kGroup);
  }

 private:
  static constexpr int kGroup = 5;  // entries whose arrival is waited for together
  // Rests that the entries before `k` need (the last of them may hold some of a later part's).
  static constexpr __device__ int rests_before(int k) { return (k + 7) / 8; }
  // Codes of odd blocks lie in the second half of their values' place: 8 lanes of an access meet 8 different banks.
  static __device__ __forceinline__ int raw_column() {
    int lane = threadIdx.x & 31, q = lane & 3;
    return lane < 28 ? 2 * q + (lane / 4 & 1) : q;
  }
};

// A warp's kKeys entries of any format, without haste.
template <int kKeys, typename RowOf>
__device__ __forceinline__ void read_entries(const DecodeArgs& a, Place place, int at, uint32_t tile, RowOf row_of) {
  int lane = threadIdx.x & 31, q = lane & 3;
  for (int first = 0; first < kKeys; first += 8) {
    int k = first + lane / 4, page = __shfl_sync(~0u, place.page, k), offset = __shfl_sync(~0u, place.offset, k);
    int key_at = __shfl_sync(~0u, at, k);
    if (k >= kKeys) continue;
    int r = row_of(k);
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
