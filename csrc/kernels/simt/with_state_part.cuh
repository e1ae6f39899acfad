// Which part of a state a block takes (state_part.cuh): from the order and the alignment of the pool, and how much
// there is to do.
#pragma once

#include "state_part.cuh"

namespace la2::simt {

// float32 states of up to 128 by 128, which for a few blocks take slices of 32 columns, are taken in slices of 64 from
// so many blocks on. One H200, H = 64, us, slices of 32 and 64: 1 row 2.6 and 2.8, 8 rows 12.4 and 12.6, 16 36.5
// and 35.4, 256 544 and 517. Up to 64 by 64 always: 1 row 2.2 and 1.9.
constexpr int64_t kManyBlocks = 2048;

// A type to be handed over by value.
template <class Part>
struct Wrapped {
  using Type = Part;
};

// body(Wrapped<Part>()) for a launch that touches so many `states` of [D, E].
template <class T, class P, class Body>
cudaError_t with_state_part(const MutableState& state, int64_t dim_k, int64_t dim_v, int64_t states, const Body& body) {
  constexpr int kVec = 16 / sizeof(P);
  constexpr bool kIsFloat = sizeof(P) == 4;
  auto is_vector = [&](int64_t inner, int64_t outer) {  // vector accesses along the dim whose stride is `inner`
    return inner == 1 && (state.stride_s | state.stride_h | outer) % kVec == 0 &&
           reinterpret_cast<uintptr_t>(state.data) % 16 == 0;
  };
  constexpr int kLanes = kIsFloat ? 16 : 8;  // 64 columns; of float64 16
  const bool is_many = kIsFloat && states >= kManyBlocks / ((dim_v + 63) / 64);
  if (is_vector(state.stride_e, state.stride_d)) {
    if (dim_k <= 64) return body(Wrapped<ColumnsPart<T, P, 64, 8, kLanes, true>>());
    if (dim_k <= 128 && is_many) return body(Wrapped<ColumnsPart<T, P, 128, 8, kLanes, true>>());
    if (dim_k <= 128) return body(Wrapped<ColumnsPart<T, P, 128, 8, 8, true>>());
    return body(Wrapped<ColumnsPart<T, P, 256, 8, 8, true>>());
  }
  if (is_vector(state.stride_d, state.stride_e)) {
    if (dim_k <= 64) return body(Wrapped<RowsPart<T, P, 64, 8>>());
    if (dim_k <= 128) return body(Wrapped<RowsPart<T, P, 128, 8>>());
    return body(Wrapped<RowsPart<T, P, 256, sizeof(P) == 8 ? 4 : 8>>());
  }
  return body(Wrapped<ColumnsPart<T, P, 256, 8, 8, false>>());
}

}  // namespace la2::simt
