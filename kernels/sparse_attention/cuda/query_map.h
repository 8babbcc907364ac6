// The copy engine's view of the queries: boxes of 64 heads x 64 columns of a row, swizzled. Heads that do not
// exist are read as zeros. And of rows of keys: boxes of 32 rows x 64 columns.
#pragma once
#include <cstdint>

#include "tensor_map.cuh"

namespace causeway {

inline int map_queries(CUtensorMap& map, const void* q, int64_t q_row, int64_t q_head, int rows, int heads) {
  // A dimension of size 1 may have any stride; the copy engine wants a sound one.
  int64_t head = heads > 1 ? q_head : 512, row = rows > 1 ? q_row : head * heads;
  return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, q, {512, heads, rows}, {head * 2, row * 2}, {64, 64, 1});
}

inline int map_keys(CUtensorMap& map, const void* keys, int64_t stride, int64_t rows) {
  int64_t row = rows > 1 ? stride : 512;
  return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, keys, {512, rows}, {row * 2}, {64, 32});
}

}  // namespace causeway
