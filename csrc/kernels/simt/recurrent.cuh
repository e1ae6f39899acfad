// Tokens one after the other against a pool of states: S = lambda S + k v^T, out = scale q^T S. decode: one token a
// row, in place. verify: several, the pool is not changed. commit: several, no outputs.
//
// Nothing but memory traffic counts: every state element is read once and written at most once. A block takes 16 KiB of
// one state, all of D for a slice of E, so that the sum over D stays inside it: no second pass, no atomics. All its
// loads are in flight before the first is used, and the part stays in registers for all tokens: what several tokens
// give is bit for bit what as many calls of one would. Two kernels for the two orders a state comes in:
//
//   columns (KV, stride_e == 1, and any other strides): 8 threads cover 128 bytes of a row, 16 rows of D at once; the
//   sum over D runs over the threads of a column; rows    (VK, stride_d == 1): a warp covers D of one column of E; the
//   sum over D runs over its lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../core/decay.h"
#include "../params.h"
#include "../ptx/launch_order.cuh"
#include "indices.cuh"
#include "pool.cuh"

namespace la2::simt {

// ---- config ---------------------------------------------------------------------------------------------------------

template <class T>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<double> {
  using Type = double;
};

constexpr int kRecurrentThreads = 128;
constexpr int kRecurrentWarps = kRecurrentThreads / 32;
constexpr int kMaxDim = 256;

// P: the state's element in memory. kGroup: tokens in shared memory at once; 1: there is one token.
// Of a block's part of a state a thread has kLoads vectors.
template <class T_, class P_, int kMaxDimK_, bool kVector_, int kGroup_>
struct RecurrentColumns {
  using T = T_;
  using P = P_;
  using Acc = typename Accumulation<T>::Type;
  static constexpr bool kVector = kVector_;  // stride_e == 1 and every row starts at a multiple of a vector
  static constexpr int kMaxDimK = kMaxDimK_, kGroup = kGroup_;
  static constexpr int kVec = 16 / sizeof(Acc);
  static constexpr int kLanes = 8;  // threads beside each other in a row
  static constexpr int kRowStep = kRecurrentThreads / kLanes;
  static constexpr int kLoads = kMaxDimK / kRowStep;
  static constexpr int kSlice = kLanes * kVec;  // columns of E
};

template <class T_, class P_, int kVecsPerLane_, int kGroup_>
struct RecurrentRows {
  using T = T_;
  using P = P_;
  using Acc = typename Accumulation<T>::Type;
  static constexpr int kVec = 16 / sizeof(Acc);
  static constexpr int kVecsPerLane = kVecsPerLane_;  // of the 32 lanes across D
  static constexpr int kMaxDimK = 32 * kVec * kVecsPerLane, kGroup = kGroup_;
  static constexpr int kCols = 8 / kVecsPerLane;  // columns of E of a warp: eight loads a thread
  static constexpr int kSlice = kRecurrentWarps * kCols;
};

// What a block needs of a token.
template <class Cfg>
struct Token {
  using Acc = typename Cfg::Acc;
  alignas(16) Acc q[Cfg::kMaxDimK];  // zeros from D on
  alignas(16) Acc k[Cfg::kMaxDimK];
  alignas(16) Acc v[Cfg::kSlice];
};
template <class Cfg>
struct TokenGroup {
  Token<Cfg> tokens[Cfg::kGroup];
  typename Cfg::Acc decay;
};

// ---- the tokens -----------------------------------------------------------------------------------------------------

// Where the block works. Grid: slices x heads x rows, slices fastest.
struct Place {
  int64_t row, head;
  int first_col, cols;
  int64_t slot;
  bool is_live;  // false: padding
};

template <int kSlice>
__device__ __forceinline__ Place find_place(const RecurrentParams& params) {
  // 32-bit, since the grid is: a 64-bit division here would be a good part of the block's time.
  const unsigned num_slices = (static_cast<unsigned>(params.dim_v) + kSlice - 1) / kSlice;
  const unsigned heads = static_cast<unsigned>(params.heads);
  Place place;
  place.first_col = static_cast<int>(blockIdx.x % num_slices) * kSlice;
  place.cols = min(static_cast<int>(params.dim_v) - place.first_col, kSlice);
  place.head = blockIdx.x / num_slices % heads;
  place.row = blockIdx.x / num_slices / heads;
  place.slot = place.row;
  if (params.state_indices != nullptr)
    place.slot = index_at({params.state_indices, params.indices_are_int64}, place.row);
  place.is_live = place.slot >= 0 && place.slot < params.slots;
  return place;
}

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& rows, const Place& place, int64_t token) {
  return static_cast<const T*>(rows.data) + place.row * rows.stride_b + place.head * rows.stride_h +
         token * rows.stride_n;
}
template <class T>
__device__ __forceinline__ T* out_row(const RecurrentParams& params, const Place& place, int64_t token) {
  const MutableRows& out = params.out;
  return static_cast<T*>(out.data) + place.row * out.stride_b + place.head * out.stride_h + token * out.stride_n +
         place.first_col;
}

template <class Acc>
__device__ __forceinline__ Acc slope_of_place(const RecurrentParams& params, const Place& place) {
  const Slopes& s = params.slope;
  return s.data == nullptr ? Acc(0) : static_cast<const Acc*>(s.data)[place.row * s.stride_s + place.head * s.stride_h];
}

// A thread's share of a group's q, k and v on its way to shared memory: all fetched before any is stored, so that the
// latencies pass beside each other's and, of the first group, beside the state's. Rows of 16-bit elements are aligned
// (ops/arguments.cpp) and go 16 bytes at a time, others by elements. Dims from D and E on become zero.
template <class Cfg>
class GroupFetch {
 public:
  using T = typename Cfg::T;
  using Acc = typename Cfg::Acc;

  __device__ __forceinline__ void start(const RecurrentParams& params, const Place& place, int first, int count) {
    if (params.q.data != nullptr) q_.start(rows_of(params.q, params, place, first, count));
    k_.start(rows_of(params.k, params, place, first, count));
    v_.start(values_of(params, place, first, count));
    if (first == 0) slope_ = slope_of_place<Acc>(params, place);
  }

  // The same arguments again. A barrier must follow. The decay comes with the first group.
  __device__ __forceinline__ void finish(TokenGroup<Cfg>& group, const RecurrentParams& params, const Place& place,
                                         int first, int count) const {
    if (params.q.data != nullptr) q_.finish(group.tokens[0].q, rows_of(params.q, params, place, first, count));
    k_.finish(group.tokens[0].k, rows_of(params.k, params, place, first, count));
    v_.finish(group.tokens[0].v, values_of(params, place, first, count));
    // By one thread: exp in float64 is slow where a GPU has few such units.
    if (first == 0 && threadIdx.x == 0) group.decay = static_cast<Acc>(decay_power<Acc>(slope_, 1));
  }

 private:
  static constexpr int kUnit = sizeof(T) == 2 ? 8 : 1;  // elements that move at once
  struct alignas(kUnit * sizeof(T)) Unit {
    T x[kUnit];
  };
  // `dim` elements of `count` tokens in global memory.
  struct Source {
    const T* data;
    int64_t stride;
    int dim, count;
  };
  __device__ __forceinline__ static Source rows_of(const Rows& rows, const RecurrentParams& params, const Place& place,
                                                   int first, int count) {
    return {row_of<T>(rows, place, first), rows.stride_n, static_cast<int>(params.dim_k), count};
  }
  __device__ __forceinline__ static Source values_of(const RecurrentParams& params, const Place& place, int first,
                                                     int count) {
    return {row_of<T>(params.v, place, first) + place.first_col, params.v.stride_n, place.cols, count};
  }

  // kDim elements of each token, one behind the other in units. Many units a thread would need too many registers:
  // those are fetched when they are stored, a few at once.
  template <int kDim>
  class Part {
   public:
    __device__ __forceinline__ void start(const Source& from) {
      if constexpr (kInRegisters) fetch<kTurns>(units_, from, 0);
    }
    __device__ __forceinline__ void finish(Acc* of_first_token, const Source& from) const {
      if constexpr (kInRegisters) {
        store<kTurns>(of_first_token, units_, 0);
      } else {
#pragma unroll 1
        for (int turn = 0; turn < kTurns; turn += kAtOnce) {
          Unit units[kAtOnce];
          fetch<kAtOnce>(units, from, turn);
          store<kAtOnce>(of_first_token, units, turn);
        }
      }
    }

   private:
    static constexpr int kUnits = Cfg::kGroup * kDim / kUnit;
    static constexpr int kTurns = (kUnits + kRecurrentThreads - 1) / kRecurrentThreads;
    static constexpr bool kInRegisters = kTurns <= 2;
    static constexpr int kAtOnce = 4;

    template <int kCount>
    __device__ __forceinline__ static void fetch(Unit (&units)[kCount], const Source& from, int first_turn) {
#pragma unroll
      for (int turn = 0; turn < kCount; ++turn) {
        const int i = threadIdx.x + (first_turn + turn) * kRecurrentThreads;
        const int t = i / (kDim / kUnit), element = i % (kDim / kUnit) * kUnit;
        units[turn] = Unit{};
        if (t < from.count && element < from.dim)
          units[turn] = *reinterpret_cast<const Unit*>(from.data + t * from.stride + element);
      }
    }
    template <int kCount>
    __device__ __forceinline__ static void store(Acc* of_first_token, const Unit (&units)[kCount], int first_turn) {
#pragma unroll
      for (int turn = 0; turn < kCount; ++turn) {
        const int i = threadIdx.x + (first_turn + turn) * kRecurrentThreads;
        if (i >= kUnits) continue;
        Acc* to = of_first_token + i / (kDim / kUnit) * static_cast<int>(sizeof(Token<Cfg>) / sizeof(Acc)) +
                  i % (kDim / kUnit) * kUnit;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) to[e] = to_acc(units[turn].x[e]);
      }
    }

    Unit units_[kInRegisters ? kTurns : 1];
  };

  Part<Cfg::kMaxDimK> q_, k_;
  Part<Cfg::kSlice> v_;
  Acc slope_;
};

// The tokens of this row that count.
__device__ __forceinline__ int tokens_of(const RecurrentParams& params, const Place& place) {
  if (params.num_accepted.data == nullptr) return static_cast<int>(params.tokens);
  return static_cast<int>(clamped_index(params.num_accepted, place.row, params.tokens));
}

// Padding: zeros where outputs are wanted.
template <class T>
__device__ __forceinline__ void zero_outputs(const RecurrentParams& params, const Place& place) {
  if (params.out.data == nullptr) return;
  for (int i = threadIdx.x; i < place.cols * static_cast<int>(params.tokens); i += kRecurrentThreads)
    out_row<T>(params, place, i / place.cols)[i % place.cols] = T(0.0f);
}

// Where this thread's part of a state begins: `col` columns and `dim` dims into the slice.
template <class P, class AnyState, class AnyPlace>
__device__ __forceinline__ P* state_part(const AnyState& state, int64_t slot, const AnyPlace& place, int col, int dim) {
  return static_cast<P*>(state.data) + slot * state.stride_s + place.head * state.stride_h +
         (place.first_col + col) * state.stride_e + dim * state.stride_d;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// body(token in shared memory, its index) for all tokens of a row, in groups; end_of_group(first, count) behind each.
template <class Cfg, class Body, class EndOfGroup>
__device__ __forceinline__ void for_each_token(TokenGroup<Cfg>& group, const RecurrentParams& params,
                                               const Place& place, int count, const Body& body,
                                               const EndOfGroup& end_of_group) {
  if constexpr (Cfg::kGroup == 1) {  // in shared memory already
    body(group.tokens[0], 0);
    end_of_group(0, 1);
  } else {
    for (int first = 0; first < count; first += Cfg::kGroup) {
      const int tokens = min(count - first, Cfg::kGroup);
      if (first > 0) {
        GroupFetch<Cfg> fetch;
        fetch.start(params, place, first, tokens);
        __syncthreads();  // everyone is done with the last ones
        fetch.finish(group, params, place, first, tokens);
        __syncthreads();
      }
      for (int t = 0; t < tokens; ++t) body(group.tokens[t], t);
      end_of_group(first, tokens);
    }
  }
}

template <class Cfg>
__global__ void __launch_bounds__(kRecurrentThreads, Cfg::kGroup == 1      ? 4
                                                     : Cfg::kMaxDimK > 128 ? 2
                                                                           : 3)
    la2_recurrent_columns_simt_kernel(const __grid_constant__ RecurrentParams params) {
  using T = typename Cfg::T;
  using P = typename Cfg::P;
  using Acc = typename Cfg::Acc;
  __shared__ TokenGroup<Cfg> group;
  __shared__ Acc partial[kRecurrentWarps][Cfg::kGroup][Cfg::kSlice];

  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const Place place = find_place<Cfg::kSlice>(params);
  const int count = Cfg::kGroup == 1 ? 1 : tokens_of(params, place);
  GroupFetch<Cfg> fetch;
  fetch.start(params, place, 0, min(count, Cfg::kGroup));
  if (!place.is_live) return zero_outputs<T>(params, place);
  if (count == 0) return;

  const int first_dim = threadIdx.x / Cfg::kLanes;
  const int col = threadIdx.x % Cfg::kLanes * Cfg::kVec;
  const bool in_cols = col < place.cols;
  const MutableState& state = params.state;
  P* const gS = state_part<P>(state, place.slot, place, col, first_dim);
  const int dims = in_cols ? static_cast<int>(params.dim_k) : 0;
  auto is_inside = [&](int i) { return first_dim + i * Cfg::kRowStep < dims; };
  // f(i) for the vectors of this thread that exist.
  auto for_each_vec = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < Cfg::kLoads; ++i)
      if (is_inside(i)) f(i);
  };
  Vec<Acc> s[Cfg::kLoads] = {};
  for_each_vec([&](int i) { load_part<Cfg::kVector>(s[i], gS + i * Cfg::kRowStep * state.stride_d, state.stride_e); });
  fetch.finish(group, params, place, 0, min(count, Cfg::kGroup));
  __syncthreads();
  const Acc decay = group.decay;

  auto take = [&](const Token<Cfg>& token, int t) {
    const Vec<Acc> v = load_vec(&token.v[col]);
    Acc out[Cfg::kVec] = {};
#pragma unroll
    for (int i = 0; i < Cfg::kLoads; ++i) {  // what is outside of the state is zero and stays so
      const Acc q = token.q[first_dim + i * Cfg::kRowStep], k = token.k[first_dim + i * Cfg::kRowStep];
#pragma unroll
      for (int e = 0; e < Cfg::kVec; ++e) {
        s[i].x[e] = decay * s[i].x[e] + k * v.x[e];
        out[e] += q * s[i].x[e];
      }
      if (Cfg::kGroup == 1 && params.writes_state && is_inside(i))
        store_part<Cfg::kVector>(gS + i * Cfg::kRowStep * state.stride_d, s[i], state.stride_e);
    }
    if (params.out.data == nullptr) return;
#pragma unroll
    for (int e = 0; e < Cfg::kVec; ++e) {
#pragma unroll
      for (int distance = Cfg::kLanes; distance < 32; distance *= 2)
        out[e] += __shfl_xor_sync(0xffffffffu, out[e], distance);
      if (threadIdx.x % 32 < Cfg::kLanes) partial[threadIdx.x / 32][t][col + e] = out[e];
    }
  };
  auto write_outputs = [&](int first, int tokens) {
    if (params.out.data == nullptr) return;
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * Cfg::kSlice; i += kRecurrentThreads) {
      const int t = i / Cfg::kSlice, e = i % Cfg::kSlice;
      if (e >= place.cols) continue;
      Acc sum = 0;
#pragma unroll
      for (int warp = 0; warp < kRecurrentWarps; ++warp) sum += partial[warp][t][e];
      from_acc(out_row<T>(params, place, first + t)[e], static_cast<Acc>(params.scale) * sum);
    }
  };
  for_each_token(group, params, place, count, take, write_outputs);
  if (Cfg::kGroup > 1 && params.writes_state)
    for_each_vec(
        [&](int i) { store_part<Cfg::kVector>(gS + i * Cfg::kRowStep * state.stride_d, s[i], state.stride_e); });
}

template <class Cfg>
__global__ void __launch_bounds__(kRecurrentThreads, Cfg::kGroup == 1      ? 4
                                                     : Cfg::kMaxDimK > 128 ? 2
                                                                           : 3)
    la2_recurrent_rows_simt_kernel(const __grid_constant__ RecurrentParams params) {
  using T = typename Cfg::T;
  using P = typename Cfg::P;
  using Acc = typename Cfg::Acc;
  __shared__ TokenGroup<Cfg> group;

  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const Place place = find_place<Cfg::kSlice>(params);
  const int count = Cfg::kGroup == 1 ? 1 : tokens_of(params, place);
  GroupFetch<Cfg> fetch;
  fetch.start(params, place, 0, min(count, Cfg::kGroup));
  if (!place.is_live) return zero_outputs<T>(params, place);
  if (count == 0) return;

  const int lane = threadIdx.x % 32;
  const int first_col = threadIdx.x / 32 * Cfg::kCols;  // of this warp, within the slice
  const MutableState& state = params.state;
  P* const gS = state_part<P>(state, place.slot, place, first_col, lane * Cfg::kVec);
  const int dims = static_cast<int>(params.dim_k);
  auto is_inside = [&](int col, int i) { return first_col + col < place.cols && (lane + 32 * i) * Cfg::kVec < dims; };
  // f(col, i) for the vectors of this thread that exist.
  auto for_each_vec = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < Cfg::kVecsPerLane; ++i)
#pragma unroll
      for (int col = 0; col < Cfg::kCols; ++col)
        if (is_inside(col, i)) f(col, i);
  };
  Vec<Acc> s[Cfg::kCols][Cfg::kVecsPerLane] = {};
  for_each_vec([&](int col, int i) { s[col][i] = load_state_vec(gS + col * state.stride_e + 32 * i * Cfg::kVec); });
  fetch.finish(group, params, place, 0, min(count, Cfg::kGroup));
  __syncthreads();
  const Acc decay = group.decay;

  int taken = 0;
  auto take = [&](const Token<Cfg>& token, int) {
    Acc out[Cfg::kCols] = {};
#pragma unroll
    for (int i = 0; i < Cfg::kVecsPerLane; ++i) {
      const int d = (lane + 32 * i) * Cfg::kVec;
      const Vec<Acc> q = load_vec(&token.q[d]), k = load_vec(&token.k[d]);
#pragma unroll
      for (int col = 0; col < Cfg::kCols; ++col) {
        const Acc v = token.v[first_col + col];  // what is outside of the state is zero and stays so
#pragma unroll
        for (int w = 0; w < Cfg::kVec; ++w) {
          s[col][i].x[w] = decay * s[col][i].x[w] + k.x[w] * v;
          out[col] += q.x[w] * s[col][i].x[w];
        }
        if (Cfg::kGroup == 1 && params.writes_state && is_inside(col, i))
          store_state_vec(gS + col * state.stride_e + 32 * i * Cfg::kVec, s[col][i]);
      }
    }
    const int t = taken++;
    if (params.out.data == nullptr) return;
#pragma unroll
    for (int col = 0; col < Cfg::kCols; ++col) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) out[col] += __shfl_xor_sync(0xffffffffu, out[col], distance);
      if (lane == col && first_col + col < place.cols)
        from_acc(out_row<T>(params, place, t)[first_col + col], static_cast<Acc>(params.scale) * out[col]);
    }
  };
  for_each_token(group, params, place, count, take, [](int, int) {});
  if (Cfg::kGroup > 1 && params.writes_state)
    for_each_vec([&](int col, int i) { store_state_vec(gS + col * state.stride_e + 32 * i * Cfg::kVec, s[col][i]); });
}

}  // namespace la2::simt
