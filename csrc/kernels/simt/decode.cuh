// One token a row against the pool of states, in place: S = lambda S + k v^T, out = scale q^T S.
//
// Nothing but memory traffic counts: every state element is read once and written once. A block takes 16 KiB of one
// state, all of D for a slice of E, so that the sum over D stays inside it: no second pass, no atomics. All its loads
// are in flight before the first is used. Two kernels for the two orders a state comes in:
//
//   columns (KV, stride_e == 1, and any other strides): 8 threads cover 128 bytes of a row, 16 rows of D at once; the
//   sum
//           over D runs over the threads of a column;
//   rows    (VK, stride_d == 1): a warp covers D of one column of E; the sum over D runs over its lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../core/decay.h"
#include "../params.h"
#include "element.cuh"
#include "vec.cuh"

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

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / 32;
constexpr int kMaxDim = 256;

// The state of a block: kLoads 16-byte vectors a thread.
template <class T_, int kMaxDimK, bool kVector_>
struct DecodeColumns {
  using T = T_;
  using Acc = typename Accumulation<T>::Type;
  static constexpr bool kVector = kVector_;  // stride_e == 1 and every row starts at a multiple of 16 bytes
  static constexpr int kVec = 16 / sizeof(Acc);
  static constexpr int kLanes = 8;  // threads beside each other in a row
  static constexpr int kRowStep = kDecodeThreads / kLanes;
  static constexpr int kLoads = kMaxDimK / kRowStep;
  static constexpr int kSlice = kLanes * kVec;  // columns of E
};

template <class T_, int kVecsPerLane_>
struct DecodeRows {
  using T = T_;
  using Acc = typename Accumulation<T>::Type;
  static constexpr int kVec = 16 / sizeof(Acc);
  static constexpr int kVecsPerLane = kVecsPerLane_;  // of the 32 lanes across D
  static constexpr int kCols = 8 / kVecsPerLane;      // columns of E of a warp: eight loads a thread
  static constexpr int kSlice = kDecodeWarps * kCols;
};

// What a block needs of its token.
template <class Acc, int kSlice>
struct DecodeToken {
  alignas(16) Acc q[kMaxDim];  // zeros from D on
  alignas(16) Acc k[kMaxDim];
  alignas(16) Acc v[kSlice];
  Acc decay;
};

// ---- the token ------------------------------------------------------------------------------------------------------

// Where the block works. Grid: slices x heads x rows, slices fastest.
struct DecodePlace {
  int64_t row, head;
  int first_col, cols;
  int64_t slot;
  bool is_live;  // false: padding
};

template <int kSlice>
__device__ __forceinline__ DecodePlace find_decode_place(const DecodeParams& params) {
  // 32-bit, since the grid is: a 64-bit division here would be a good part of the block's time.
  const unsigned num_slices = (static_cast<unsigned>(params.dim_v) + kSlice - 1) / kSlice;
  const unsigned heads = static_cast<unsigned>(params.heads);
  DecodePlace place;
  place.first_col = static_cast<int>(blockIdx.x % num_slices) * kSlice;
  place.cols = min(static_cast<int>(params.dim_v) - place.first_col, kSlice);
  place.head = blockIdx.x / num_slices % heads;
  place.row = blockIdx.x / num_slices / heads;
  place.slot = place.row;
  if (params.state_indices != nullptr) {
    place.slot = params.indices_are_int64 ? static_cast<const int64_t*>(params.state_indices)[place.row]
                                          : static_cast<const int32_t*>(params.state_indices)[place.row];
  }
  place.is_live = place.slot >= 0 && place.slot < params.slots;
  return place;
}

// This thread's share of q, k and v on its way to shared memory: fetched first, so that the copies' latency passes
// beside the state's.
template <class T, class Acc>
struct TokenFetch {
  static constexpr int kTurns = kMaxDim / kDecodeThreads;
  T q[kTurns], k[kTurns], v;
  Acc slope;

  __device__ __forceinline__ void start(const DecodeParams& params, const DecodePlace& place) {
    const int thread = threadIdx.x;
    const T* gQ = static_cast<const T*>(params.q.data) + place.row * params.q.stride_b + place.head * params.q.stride_h;
    const T* gK = static_cast<const T*>(params.k.data) + place.row * params.k.stride_b + place.head * params.k.stride_h;
    const T* gV = static_cast<const T*>(params.v.data) + place.row * params.v.stride_b +
                  place.head * params.v.stride_h + place.first_col;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int d = thread + i * kDecodeThreads;
      q[i] = d < params.dim_k ? gQ[d] : T(0.0f);
      k[i] = d < params.dim_k ? gK[d] : T(0.0f);
    }
    v = thread < place.cols ? gV[thread] : T(0.0f);
    slope = 0;
    if (params.slope.data != nullptr) {
      slope = static_cast<const Acc*>(
          params.slope.data)[place.row * params.slope.stride_s + place.head * params.slope.stride_h];
    }
  }

  // A barrier must follow.
  template <int kSlice>
  __device__ __forceinline__ void finish(DecodeToken<Acc, kSlice>& token) const {
    const int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      token.q[thread + i * kDecodeThreads] = to_acc(q[i]);
      token.k[thread + i * kDecodeThreads] = to_acc(k[i]);
    }
    if (thread < kSlice) token.v[thread] = to_acc(v);
    // By one thread: exp in float64 is slow where a GPU has few such units.
    if (thread == 0) token.decay = static_cast<Acc>(decay_power<Acc>(slope, 1));
  }
};

template <class T>
__device__ __forceinline__ T* out_row(const DecodeParams& params, const DecodePlace& place) {
  return static_cast<T*>(params.out.data) + place.row * params.out.stride_b + place.head * params.out.stride_h +
         place.first_col;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

template <class Cfg>
__global__ void __launch_bounds__(kDecodeThreads)
    la2_decode_columns_simt_kernel(const __grid_constant__ DecodeParams params) {
  using T = typename Cfg::T;
  using Acc = typename Cfg::Acc;
  __shared__ DecodeToken<Acc, Cfg::kSlice> token;
  __shared__ Acc partial[kDecodeWarps][Cfg::kSlice];

  const DecodePlace place = find_decode_place<Cfg::kSlice>(params);
  TokenFetch<T, Acc> fetch;
  fetch.start(params, place);

  const int first_dim = threadIdx.x / Cfg::kLanes;
  const int col = threadIdx.x % Cfg::kLanes * Cfg::kVec;
  const bool in_cols = place.is_live && col < place.cols;
  const MutableState& state = params.state;
  Acc* gS = static_cast<Acc*>(state.data) + place.slot * state.stride_s + place.head * state.stride_h +
            (place.first_col + col) * state.stride_e + first_dim * state.stride_d;

  Vec<Acc> s[Cfg::kLoads] = {};
#pragma unroll
  for (int i = 0; i < Cfg::kLoads; ++i) {
    if (in_cols && first_dim + i * Cfg::kRowStep < params.dim_k) {
      const Acc* from = gS + i * Cfg::kRowStep * state.stride_d;
      if (Cfg::kVector) {
        s[i] = load_vec(from);
      } else {
#pragma unroll
        for (int e = 0; e < Cfg::kVec; ++e) s[i].x[e] = from[e * state.stride_e];
      }
    }
  }
  fetch.finish(token);
  __syncthreads();

  const Vec<Acc> v = load_vec(&token.v[col]);
  const Acc decay = token.decay;
  Acc out[Cfg::kVec] = {};
#pragma unroll
  for (int i = 0; i < Cfg::kLoads; ++i) {
    const int d = first_dim + i * Cfg::kRowStep;
    if (in_cols && d < params.dim_k) {
      const Acc q = token.q[d], k = token.k[d];
#pragma unroll
      for (int e = 0; e < Cfg::kVec; ++e) {
        s[i].x[e] = decay * s[i].x[e] + k * v.x[e];
        out[e] += q * s[i].x[e];
      }
      Acc* to = gS + i * Cfg::kRowStep * state.stride_d;
      if (Cfg::kVector) {
        store_global(to, s[i]);
      } else {
#pragma unroll
        for (int e = 0; e < Cfg::kVec; ++e) to[e * state.stride_e] = s[i].x[e];
      }
    }
  }

#pragma unroll
  for (int e = 0; e < Cfg::kVec; ++e) {
#pragma unroll
    for (int distance = Cfg::kLanes; distance < 32; distance *= 2) {
      out[e] += __shfl_xor_sync(0xffffffffu, out[e], distance);
    }
    if (threadIdx.x % 32 < Cfg::kLanes) partial[threadIdx.x / 32][col + e] = out[e];
  }
  __syncthreads();
  if (threadIdx.x < place.cols) {
    Acc sum = 0;
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) sum += partial[warp][threadIdx.x];
    from_acc(out_row<T>(params, place)[threadIdx.x], place.is_live ? static_cast<Acc>(params.scale) * sum : Acc(0));
  }
}

template <class Cfg>
__global__ void __launch_bounds__(kDecodeThreads)
    la2_decode_rows_simt_kernel(const __grid_constant__ DecodeParams params) {
  using T = typename Cfg::T;
  using Acc = typename Cfg::Acc;
  __shared__ DecodeToken<Acc, Cfg::kSlice> token;

  const DecodePlace place = find_decode_place<Cfg::kSlice>(params);
  TokenFetch<T, Acc> fetch;
  fetch.start(params, place);

  const int lane = threadIdx.x % 32;
  const int first_col = threadIdx.x / 32 * Cfg::kCols;  // of this warp, within the slice
  const MutableState& state = params.state;
  Acc* gS = static_cast<Acc*>(state.data) + place.slot * state.stride_s + place.head * state.stride_h +
            (place.first_col + first_col) * state.stride_e + lane * Cfg::kVec;
  auto is_inside = [&](int col, int i) {
    return place.is_live && first_col + col < place.cols && (lane + 32 * i) * Cfg::kVec < params.dim_k;
  };

  Vec<Acc> s[Cfg::kCols][Cfg::kVecsPerLane] = {};
#pragma unroll
  for (int col = 0; col < Cfg::kCols; ++col) {
#pragma unroll
    for (int i = 0; i < Cfg::kVecsPerLane; ++i) {
      if (is_inside(col, i)) {
        s[col][i] = load_vec(gS + col * state.stride_e + 32 * i * Cfg::kVec);
      }
    }
  }
  fetch.finish(token);
  __syncthreads();

  const Acc decay = token.decay;
  Acc out[Cfg::kCols] = {};
#pragma unroll
  for (int i = 0; i < Cfg::kVecsPerLane; ++i) {
    const int d = (lane + 32 * i) * Cfg::kVec;
    const Vec<Acc> q = load_vec(&token.q[d]);
    const Vec<Acc> k = load_vec(&token.k[d]);
#pragma unroll
    for (int col = 0; col < Cfg::kCols; ++col) {
      if (is_inside(col, i)) {
        const Acc v = token.v[first_col + col];
#pragma unroll
        for (int w = 0; w < Cfg::kVec; ++w) {
          s[col][i].x[w] = decay * s[col][i].x[w] + k.x[w] * v;
          out[col] += q.x[w] * s[col][i].x[w];
        }
        store_global(gS + col * state.stride_e + 32 * i * Cfg::kVec, s[col][i]);
      }
    }
  }

#pragma unroll
  for (int col = 0; col < Cfg::kCols; ++col) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      out[col] += __shfl_xor_sync(0xffffffffu, out[col], distance);
    }
    if (lane == col && first_col + col < place.cols) {
      from_acc(out_row<T>(params, place)[first_col + col],
               place.is_live ? static_cast<Acc>(params.scale) * out[col] : Acc(0));
    }
  }
}

}  // namespace la2::simt
