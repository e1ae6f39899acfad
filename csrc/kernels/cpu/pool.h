// States of a pool in the accumulation type, whatever they are in memory.
#pragma once

#include "work.h"

namespace la2::cpu {
namespace {

// One head's state in the pool, or a slice of it, [rows, cols] from column `first`, and its copy in the accumulation
// type: kernels work on that.
template <class T>
struct PoolSlice {
  const MutableState& state;
  int64_t head;
  int rows, first, cols;
  StateView<T> copy;  // contiguous, [rows, cols] or its transpose

  void load(int64_t slot) const {
    if (state.is_bf16) {
      each<uint16_t>(slot, [](T& x, const uint16_t& stored) { x = from_bf16(stored); });
    } else {
      each<T>(slot, [](T& x, const T& stored) { x = stored; });
    }
  }
  void store(int64_t slot) const {
    if (state.is_bf16) {
      each<uint16_t>(slot, [](const T& x, uint16_t& stored) { stored = to_bf16(x); });
    } else {
      each<T>(slot, [](const T& x, T& stored) { stored = x; });
    }
  }

 private:
  // Along the axis that is contiguous in the pool.
  template <class Stored, class Body>
  LA2_INLINE void each(int64_t slot, const Body& body) const {
    const int64_t at = slot * state.stride_s + head * state.stride_h + first * state.stride_e;
    const StateView<Stored> from{static_cast<Stored*>(state.data) + at, state.stride_d, state.stride_e};
    if (from.stride_col == 1 && copy.stride_col == 1) {
      for (int row = 0; row < rows; ++row)
        for (int col = 0; col < cols; ++col) body(copy.at(row, 0)[col], from.at(row, 0)[col]);
    } else if (from.stride_row == 1 && copy.stride_row == 1) {
      for (int col = 0; col < cols; ++col)
        for (int row = 0; row < rows; ++row) body(copy.at(0, col)[row], from.at(0, col)[row]);
    } else {
      for (int col = 0; col < cols; ++col)
        for (int row = 0; row < rows; ++row) body(*copy.at(row, col), *from.at(row, col));
    }
  }

  static LA2_INLINE T from_bf16(uint16_t stored) {
    const uint32_t bits = static_cast<uint32_t>(stored) << 16;
    float x;
    __builtin_memcpy(&x, &bits, sizeof(x));
    return static_cast<T>(x);
  }
  static LA2_INLINE uint16_t to_bf16(T value) {  // to nearest, ties to even
    const float x = static_cast<float>(value);
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof(x));
    return x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

}  // namespace
}  // namespace la2::cpu
