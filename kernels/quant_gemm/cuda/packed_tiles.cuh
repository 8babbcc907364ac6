// What packed.cuh is made of: the shape of its tiles, scales, the way from packed weights to the tensor cores' registers,
// and the store.
#pragma once

#include <cuda_bf16.h>

#include "e2m1.cuh"
#include "hopper.cuh"
#include "tiles.cuh"

namespace causeway {

constexpr int kSubColumns = 32;    // of a weight, that share a scale
constexpr int kBlocksAtOnce = 4;   // of 128 columns, whose 1x32 scales are 16 bytes of a row
constexpr uint32_t kIndexZero = -kLowestShift;
constexpr int kTableEntries = 32;  // one for any shift that the scales' words may hold; a power of two

// A stage has two blocks of 128 columns, so that the copy engine brings 128 bytes of a packed row.
template <int TM, int HALVES, int STAGES>
struct PackedShape {
  static constexpr int kRows = TM, kColumns = 64 * HALVES, kBlocks = 2, kStages = STAGES;
  static constexpr int kParts = TM / 2;  // accumulators of a thread for 64 weight rows
  static constexpr int kPitch = kBlocks * kBlockK / 2;  // bytes of a packed row in a stage: the copy's swizzle
  static constexpr int kBoxBytes = TM * kBlockK;       // the rows of one block
  static constexpr int kRowBytes = kBlocks * kBoxBytes, kPackedBytes = kColumns * kPitch;
  static constexpr int kSubBytes = kColumns * kBlocksAtOnce * kBlockK / kSubColumns;
  static constexpr int kStageBytes = kRowBytes + kPackedBytes + kSubBytes;
  // Behind the ring: for each stage four words of the weight's scales, and the rows'; the table; barriers.
  static constexpr int kScaleBytes = kBlocksAtOnce * 4 + kBlocks * TM * 4;
  static constexpr int kScaleOffset = STAGES * kStageBytes;
  static constexpr int kTableOffset = kScaleOffset + STAGES * kScaleBytes;
  static constexpr int kBarrierOffset = kTableOffset + kTableEntries * 8;
  static constexpr int kSharedBytes = kBarrierOffset + control_bytes(STAGES);
  static constexpr int kWarps = 4, kThreads = (kWarps + 2) * 32;

  static_assert(kStageBytes % 1024 == 0 && kRowBytes % 1024 == 0, "swizzled tiles start at multiples of 1024");
  static_assert(kSharedBytes <= 115712, "more shared memory than half a multiprocessor has");
};

__device__ __forceinline__ void load_matrices(uint32_t (&words)[8], int first, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[first]), "=r"(words[first + 1]), "=r"(words[first + 2]), "=r"(words[first + 3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

// 16 packed rows of a warp to its registers of four steps of 32 columns. `shift`: for each of the thread's two rows
// four bytes, the steps' factors 2^(byte + kLowestShift). `Normal`: all of them give normal codes.
template <bool Normal>
__device__ __forceinline__ void unpack_rows(
    uint32_t (&a)[16], const uint32_t (&words)[8], const uint32_t (&shift)[2], uint32_t table) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t index = select_bytes(shift[r], 0, 0x4440 + step);
      E2m1Table codes;
      if constexpr (Normal) {
        codes = e2m1_normal_table(index);
      } else {
        const uint2 entry = load_shared_8(table + index % kTableEntries * 8);
        codes = {entry.x, entry.y};
      }
      unpack_e2m1(codes, words[step * 2 + r], a[step * 4 + r], a[step * 4 + 2 + r]);
    }
  }
}

__device__ __forceinline__ void keep_registers(uint32_t (&a)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// The rows' producer's other work: the scales of a stage. Loads run four blocks ahead.
template <class S>
class PackedScales {
 public:
  __device__ __forceinline__ PackedScales(const GemmArguments& args, int lane) : args_(args), lane_(lane) {}

  __device__ __forceinline__ void open(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = min(tile.row + lane_ + 32 * i, args_.rows - 1);
      row_[i] = static_cast<uint32_t>(row) * args_.a_scale_stride;
    }
    weight_ = tile.group * args_.b_scale_group + tile.column / 128 * args_.b_scale_stride;
    load(0);
  }

  // To the four blocks from kb on.
  __device__ __forceinline__ void step(int kb) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) word_[i] = next_[i];
    weight_word_ = next_weight_;
    if (kb + kBlocksAtOnce < args_.k_blocks) load(kb + kBlocksAtOnce);
  }

  // Of a stage whose first block is i of the four.
  __device__ __forceinline__ void write(int i, uint32_t address) const {
    // What to take from the bytes of four 1x32 scales to index the table.
    if (i == 0 && lane_ < kBlocksAtOnce) {
      const uint32_t line = weight_word_ >> (8 * lane_) & 255;
      store_shared(address + lane_ * 4, (line - kIndexZero) * 0x01010101u);
    }
    address += kBlocksAtOnce * 4;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
      const float weight = scale_value(weight_word_ >> (8 * (i + b)) & 255);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int row = lane_ + 32 * j;
        const float both = scale_value(word_[j] >> (8 * (i + b)) & 255) * weight;
        if (row < S::kRows) store_shared(address + (b * S::kRows + row) * 4, __float_as_uint(both));
      }
    }
  }

 private:
  static constexpr int kEach = (S::kRows + 31) / 32;

  __device__ __forceinline__ void load(int kb) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      next_[i] = __ldg(reinterpret_cast<const uint32_t*>(args_.a_scale + row_[i] + kb));
    }
    next_weight_ = __ldg(reinterpret_cast<const uint32_t*>(args_.b_scale + weight_ + kb));
  }

  const GemmArguments& args_;
  const int lane_;
  uint32_t row_[kEach], word_[kEach], next_[kEach], weight_ = 0, weight_word_ = 0, next_weight_ = 0;
};

// A thread's sums of weight rows `column` and 8 further on; of the batch's rows two neighbours in every eight.
template <int kParts>
__device__ __forceinline__ void store_sums(
    const GemmArguments& args, const Tile& tile, const float (&sum)[kParts], int column, int lane) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int row = tile.row + i / 4 * 8 + lane % 4 * 2 + i % 2, at = column + i / 2 % 2 * 8;
    if (row >= tile.row_end || at >= args.n) continue;
    const int64_t place = row * args.out_stride + at;
    if (args.out_is_float) {
      static_cast<float*>(args.out)[place] = sum[i];
    } else {
      static_cast<__nv_bfloat16*>(args.out)[place] = __float2bfloat16_rn(sum[i]);
    }
  }
}

}  // namespace causeway
