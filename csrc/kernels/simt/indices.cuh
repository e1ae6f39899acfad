// Numbers that the device alone knows: offsets and slots, brought into range.
#pragma once

#include <stdint.h>

#include "../params.h"

namespace la2::simt {

__device__ __forceinline__ int64_t index_at(const Indices& indices, int64_t i) {
  return indices.is_int64 ? static_cast<const int64_t*>(indices.data)[i] : static_cast<const int32_t*>(indices.data)[i];
}
__device__ __forceinline__ int64_t clamped_index(const Indices& indices, int64_t i, int64_t most) {
  const int64_t value = index_at(indices, i);
  return value < 0 ? 0 : value > most ? most : value;
}
__device__ __forceinline__ int64_t slot_within(int64_t slot, int64_t slots) {
  return slot >= 0 && slot < slots ? slot : -1;
}

}  // namespace la2::simt
