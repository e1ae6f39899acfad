// Which part of a state a block takes (state_part.cuh): from the order and the alignment of the pool, and how much
// there is to do.
#pragma once

#include "state_part.cuh"

namespace la2::simt {

// From so many blocks of 32 KiB on they win over blocks of 16 KiB, which spread few states over more SMs. One H200,
// float32, H = 64, D = 128: 128 blocks 3.7 us against 3.0, 1024 blocks 12.8 against 12.6, 32768 blocks 522 against 534.
constexpr int64_t kManyBlocks = 1024;

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
  const bool is_many = kIsFloat && states >= kManyBlocks / ((dim_v + 63) / 64);
  if (is_vector(state.stride_e, state.stride_d)) {
    if constexpr (kIsFloat) {
      if (is_many && dim_k <= 64) return body(Wrapped<ColumnsPart<T, P, 64, 16, 16, true>>());
      if (is_many && dim_k <= 128) return body(Wrapped<ColumnsPart<T, P, 128, 16, 16, true>>());
    }
    if (dim_k <= 64) return body(Wrapped<ColumnsPart<T, P, 64, 8, 8, true>>());
    if (dim_k <= 128) return body(Wrapped<ColumnsPart<T, P, 128, 8, 8, true>>());
    return body(Wrapped<ColumnsPart<T, P, 256, 8, 8, true>>());
  }
  if (is_vector(state.stride_d, state.stride_e)) {
    if constexpr (kIsFloat) {
      if (is_many && dim_k <= 64) return body(Wrapped<RowsPart<T, P, 64, 16>>());
      if (is_many && dim_k <= 128) return body(Wrapped<RowsPart<T, P, 128, 16>>());
    }
    if (dim_k <= 64) return body(Wrapped<RowsPart<T, P, 64, 8>>());
    if (dim_k <= 128) return body(Wrapped<RowsPart<T, P, 128, 8>>());
    return body(Wrapped<RowsPart<T, P, 256, sizeof(P) == 8 ? 4 : 8>>());
  }
  return body(Wrapped<ColumnsPart<T, P, 256, 8, 8, false>>());
}

}  // namespace la2::simt
