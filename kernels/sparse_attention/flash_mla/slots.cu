// Slots of a decode step as FlashMLA takes them: int32, -1 = none, padded to whole tiles of 64.

#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    slots_kernel(const int64_t* ring, int64_t ring_row, int ring_count, int32_t* ring_out,
                 int ring_padded, const int32_t* index, int64_t index_row, int count,
                 const int64_t* row_seq, const int64_t* num_entries, const int32_t* table,
                 int64_t table_row, int per_page, int32_t* out, int padded) {
    const int64_t row = blockIdx.x;
    const int first = blockIdx.y * kThreads + threadIdx.x;
    const int step = gridDim.y * kThreads;
    for (int i = first; i < ring_padded; i += step)
        ring_out[row * ring_padded + i] =
            i < ring_count ? static_cast<int32_t>(ring[row * ring_row + i]) : -1;
    if (padded == 0) return;
    const int64_t seq = row_seq[row], visible = seq < 0 ? 0 : num_entries[row];
    for (int i = first; i < padded; i += step) {
        const int64_t entry = i < count ? index[row * index_row + i] : -1;
        int32_t slot = -1;
        if (entry >= 0 && entry < visible) {
            const int32_t page = table[seq * table_row + entry / per_page];
            if (page >= 0) slot = page * per_page + static_cast<int32_t>(entry % per_page);
        }
        out[row * padded + i] = slot;
    }
}

}  // namespace

extern "C" int causeway_decode_slots(const int64_t* ring, int64_t ring_row, int ring_count,
                                     int32_t* ring_out, int ring_padded, const int32_t* index,
                                     int64_t index_row, int count, const int64_t* row_seq,
                                     const int64_t* num_entries, const int32_t* table,
                                     int64_t table_row, int per_page, int32_t* out, int padded,
                                     int rows, cudaStream_t stream) {
    const int most = ring_padded > padded ? ring_padded : padded;
    const int parts = most <= 8 * kThreads ? 1 : (most + 8 * kThreads - 1) / (8 * kThreads);
    slots_kernel<<<dim3(rows, parts < 64 ? parts : 64), kThreads, 0, stream>>>(
        ring, ring_row, ring_count, ring_out, ring_padded, index, index_row, count, row_seq,
        num_entries, table, table_row, per_page, out, padded);
    return cudaGetLastError();
}
