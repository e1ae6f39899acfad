// Which part of a state a block takes (state_part.cuh): from the order and the alignment of the pool, and how much
// there is to do.
#pragma once

#include "state_part.cuh"

namespace la2::simt {

// float32 states in few slices of 64 columns are taken in slices of 32, which spread them over more SMs; many are not.
// One H200, H = 64, D = 128, us, slices of 32 and 64. One token: 1 row 2.6 and 2.8, 8 rows 12.4 and 12.6, 16 36.5 and
// 35.4, 256 544 and 517. Where tokens are several the larger slice has 16 rows of D to a thread (64 rows and 8 tokens
// to verify: 150 us) and not 8 (162).
constexpr int64_t many_slices(bool is_one_token) { return is_one_token ? 2048 : 1024; }

// A type to be handed over by value.
template <class Part>
struct Wrapped {
  using Type = Part;
};

// body(Wrapped<Part>()) for a launch that touches so many `states` of [D, E], for one token each or for several.
template <class T, class P, bool kIsOneToken, class Body>
cudaError_t with_state_part(const MutableState& state, int64_t dim_k, int64_t dim_v, int64_t states, const Body& body) {
  constexpr int kVec = 16 / sizeof(P);
  constexpr bool kIsFloat = sizeof(P) == 4;
  auto is_vector = [&](int64_t inner, int64_t outer) {  // vector accesses along the dim whose stride is `inner`
    return inner == 1 && (state.stride_s | state.stride_h | outer) % kVec == 0 &&
           reinterpret_cast<uintptr_t>(state.data) % 16 == 0;
  };
  const bool is_many = states >= many_slices(kIsOneToken) / ((dim_v + 63) / 64);
  if (is_vector(state.stride_e, state.stride_d)) {
    if constexpr (kIsFloat) {
      constexpr int kRows = kIsOneToken ? 8 : 16;
      if ((kIsOneToken || is_many) && dim_k <= 64) return body(Wrapped<ColumnsPart<T, P, 64, kRows, 16, true>>());
      if (is_many && dim_k <= 128) return body(Wrapped<ColumnsPart<T, P, 128, kRows, 16, true>>());
    }
    if constexpr (!kIsFloat || !kIsOneToken)
      if (dim_k <= 64) return body(Wrapped<ColumnsPart<T, P, 64, 8, 8, true>>());
    if (dim_k <= 128) return body(Wrapped<ColumnsPart<T, P, 128, 8, 8, true>>());
    return body(Wrapped<ColumnsPart<T, P, 256, 8, 8, true>>());
  }
  if (is_vector(state.stride_d, state.stride_e)) {
    if constexpr (kIsFloat && !kIsOneToken) {
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
