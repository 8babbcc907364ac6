// E8M0 scales as DeepGEMM reads them: float32, the rows' scales column by column. Launched so that it may start while
// the kernel ahead ends, and lets the product behind it start as early (which waits for all of it before it reads).

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWord = 4;  // scales read at once: rows of scales start at multiples of 16 bytes

__device__ float scale_value(uint32_t byte) {
    // 0 is the smallest scale, 2^-127 (subnormal in float32); 255 stands for NaN.
    const uint32_t bits = byte == 0 ? 0x00400000u : byte == 255 ? 0x7FC00000u : byte << 23;
    return __uint_as_float(bits);
}

// Blocks of the first part take 256 rows of one word each; the rest walks the weight's scales.
__global__ void __launch_bounds__(kThreads)
    scales_kernel(const uint8_t* rows, int64_t row_stride, int count, int columns, float* rows_out,
                  int64_t out_stride, const uint8_t* weight, int64_t weight_count,
                  float* weight_out, int row_blocks, int row_parts) {
    causeway::await_inputs();
    if (blockIdx.x < row_parts) {
        const int row = (blockIdx.x % row_blocks) * kThreads + threadIdx.x;
        const int column = blockIdx.x / row_blocks * kWord;
        if (row >= count) return;
        const uint32_t word =
            *reinterpret_cast<const uint32_t*>(rows + int64_t{row} * row_stride + column);
#pragma unroll
        for (int i = 0; i < kWord; ++i)
            if (column + i < columns)
                rows_out[(column + i) * out_stride + row] = scale_value(word >> (8 * i) & 255);
        return;
    }
    const int64_t at = int64_t{blockIdx.x - row_parts} * kThreads + threadIdx.x;
    if (at < weight_count) weight_out[at] = scale_value(weight[at]);
}

}  // namespace

// rows: [count, columns] bytes, their rows row_stride apart; rows_out: [columns, out_stride] floats;
// weight: weight_count bytes without gaps; weight_out: as many floats.
extern "C" int causeway_scales_to_float(const uint8_t* rows, int64_t row_stride, int count,
                                        int columns, float* rows_out, int64_t out_stride,
                                        const uint8_t* weight, int64_t weight_count,
                                        float* weight_out, cudaStream_t stream) {
    const int row_blocks = (count + kThreads - 1) / kThreads;
    const int row_parts = row_blocks * ((columns + kWord - 1) / kWord);
    const int64_t blocks = row_parts + (weight_count + kThreads - 1) / kThreads;
    return causeway::EarlyLaunch{blocks, kThreads, stream}.start(
        scales_kernel, rows, row_stride, count, columns, rows_out, out_stride, weight, weight_count,
        weight_out, row_blocks, row_parts);
}
