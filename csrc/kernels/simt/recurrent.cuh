// Tokens one after the other against a pool of states: S = lambda S + k v^T, out = scale q^T S. decode: one token a
// row, in place. verify: several, the pool is not changed. commit: several, no outputs.
//
// Nothing but memory traffic counts: every state element is read once and written at most once. A block takes all of D
// for a slice of E of one state, so that the sum over D stays inside it: no second pass, no atomics. All its loads are
// in flight before the first is used, and the state stays in registers for all tokens (state_part.cuh).
#pragma once

#include <cuda_runtime.h>

#include "../params.h"
#include "../ptx/cp_async.cuh"
#include "../ptx/launch_order.cuh"
#include "../ptx/prefetch.cuh"
#include "indices.cuh"
#include "state_part.cuh"

namespace la2::simt {

// Tokens whose sums wait in shared memory for each other: the outputs of as many are written at once.
constexpr int kTokensAtOnce = 8;

// Where a block works. Grid: slices x heads x rows, slices fastest.
template <class Part>
__device__ __forceinline__ Place find_place(const RecurrentParams& params, unsigned block = blockIdx.x) {
  // 32-bit, since the grid is: a 64-bit division here would be a good part of the block's time.
  const unsigned num_slices = (static_cast<unsigned>(params.dim_v) + Part::kSlice - 1) / Part::kSlice;
  const unsigned heads = static_cast<unsigned>(params.heads);
  Place place;
  place.first_col = static_cast<int>(block % num_slices) * Part::kSlice;
  place.cols = min(static_cast<int>(params.dim_v) - place.first_col, Part::kSlice);
  place.head = block / num_slices % heads;
  place.row = block / num_slices / heads;
  return place;
}

// Negative or past the pool: padding.
__device__ __forceinline__ int64_t slot_of_row(const RecurrentParams& params, int64_t row) {
  const bool has_indices = params.state_indices != nullptr;
  return has_indices ? index_at({params.state_indices, params.indices_are_int64}, row) : row;
}

// The tokens of this row that count.
__device__ __forceinline__ int tokens_of(const RecurrentParams& params, const Place& place) {
  if (params.num_accepted.data == nullptr) return static_cast<int>(params.tokens);
  return static_cast<int>(clamped_index(params.num_accepted, place.row, params.tokens));
}

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& rows, const Place& place, int64_t token) {
  return static_cast<const T*>(rows.data) + place.row * rows.stride_b + place.head * rows.stride_h +
         token * rows.stride_n;
}
template <class T>
__device__ __forceinline__ T* out_row(const MutableRows& out, const Place& place, int64_t token) {
  return static_cast<T*>(out.data) + place.row * out.stride_b + place.head * out.stride_h + token * out.stride_n +
         place.first_col;
}

template <class Acc>
__device__ __forceinline__ Acc slope_of_place(const Slopes& s, const Place& place) {
  return s.data == nullptr ? Acc(0) : static_cast<const Acc*>(s.data)[place.row * s.stride_s + place.head * s.stride_h];
}

// By one thread: exp in float64 is slow where a GPU has few such units. A barrier must follow.
template <class Acc>
__device__ __forceinline__ void leave_decay(Acc* sDecay, Acc slope) {
  if (threadIdx.x == 0) *sDecay = static_cast<Acc>(decay_power<Acc>(slope, 1));
}

// Padding: zeros where outputs are wanted.
template <class T>
__device__ __forceinline__ void zero_outputs(const RecurrentParams& params, const Place& place) {
  if (params.out.data == nullptr) return;
  for (int i = threadIdx.x; i < place.cols * static_cast<int>(params.tokens); i += blockDim.x)
    out_row<T>(params.out, place, i / place.cols)[i % place.cols] = T(0.0f);
}

// Adds up what the threads left in `sums` [tokens, kParts, kSlice]. A barrier must come first.
template <class Part>
__device__ __forceinline__ void write_outputs(const MutableRows& out, double scale, const Place& place, int first,
                                              int tokens, const typename Part::Acc* sums) {
  using Acc = typename Part::Acc;
  for (int i = threadIdx.x; i < tokens * Part::kSlice; i += Part::kThreads) {
    const int t = i / Part::kSlice, e = i % Part::kSlice;
    if (e >= place.cols) continue;
    const Acc sum = sum_tree<Part::kParts, Part::kSlice>(sums + t * Part::kParts * Part::kSlice + e);
    from_acc(out_row<typename Part::T>(out, place, first + t)[e], static_cast<Acc>(scale) * sum);
  }
}

// Where a block's operands lie, in elements: what can be computed while the kernel before is still at work. With one
// row it is a tenth of what decode takes.
struct Offsets {
  int64_t index, slope, q, k, v, out, state;  // state: in any slot

  __device__ __forceinline__ Offsets(const RecurrentParams& p, const Place& at)
      : index(at.row),
        slope(at.row * p.slope.stride_s + at.head * p.slope.stride_h),
        q(at.row * p.q.stride_b + at.head * p.q.stride_h),
        k(at.row * p.k.stride_b + at.head * p.k.stride_h),
        v(at.row * p.v.stride_b + at.head * p.v.stride_h + at.first_col),
        out(at.row * p.out.stride_b + at.head * p.out.stride_h + at.first_col),
        state(at.head * p.state.stride_h + at.first_col * p.state.stride_e) {}

  // Never. Asked before the wait for the kernel before: else ptxas has all of this behind it, but not across a branch.
  __device__ __forceinline__ bool is_wrong() const { return (index | slope | q | k | v | out | state) < 0; }
};

// By one thread: the states of a later block are wanted in L2. Of a state, which lies in one piece, as much of its
// memory as a slice of it has, in the order of memory: a slice of rows is no one piece.
template <class Part>
__device__ __forceinline__ void prefetch_states(const RecurrentParams& params, unsigned block) {
  if (block >= gridDim.x) return;
  using P = typename Part::P;
  const Place place = find_place<Part>(params, block);
  const int64_t slot = slot_of_row(params, place.row);
  if (slot < 0 || slot >= params.slots) return;
  const int dim_k = static_cast<int>(params.dim_k);
  const P* const state =
      static_cast<const P*>(params.state.data) + slot * params.state.stride_s + place.head * params.state.stride_h;
  ptx::prefetch_into_l2(state + place.first_col * dim_k, static_cast<uint32_t>(place.cols * dim_k * sizeof(P)));
}

// kAsksAhead: a block asks for the states of the one that is `ahead` later (above). A kernel of its own: with that code
// in it, though it be skipped, ptxas has the loads of the token wait for the slope.
template <class Part, bool kAsksAhead>
__global__ void __launch_bounds__(Part::kThreads, Part::kMinBlocks)
    la2_recurrent_one_simt_kernel(const __grid_constant__ RecurrentParams params, const unsigned ahead) {
  using T = typename Part::T;
  using Acc = typename Part::Acc;
  __shared__ Acc sums[Part::kParts * Part::kSlice];
  __shared__ Acc sDecay;

  const Place place = find_place<Part>(params);
  const Offsets at(params, place);
  const bool has_out = params.out.data != nullptr;
  Part part(params.dim_k, place.cols);
  if (at.is_wrong()) return;
  ptx::wait_for_previous_kernel();
  const int64_t slot = slot_of_row(params, at.index);
  const Acc slope = params.slope.data == nullptr ? Acc(0) : static_cast<const Acc*>(params.slope.data)[at.slope];
  typename Part::Token token;  // first: it does not wait for the slot's number
  token.load(part, has_out ? static_cast<const T*>(params.q.data) + at.q : nullptr,
             static_cast<const T*>(params.k.data) + at.k, static_cast<const T*>(params.v.data) + at.v);
  if (slot < 0 || slot >= params.slots) return zero_outputs<T>(params, place);
  const StateView<typename Part::P> state(params.state, at.state + slot * params.state.stride_s);
  part.load(state);
  if constexpr (kAsksAhead) {
    static_assert(Part::kThreads > 32);
    if (threadIdx.x == 32) prefetch_states<Part>(params, blockIdx.x + ahead);
  }
  // With the loads on their way: earlier, the next kernel's start gets in between (one sequence: 0.1 us).
  ptx::launch_dependents();
  leave_decay(&sDecay, slope);
  __syncthreads();

  if (params.silu != 0) take_silu_of_token(token, params.silu);
  const auto sum = part.take(token, sDecay);
  if (params.writes_state) part.store(state);
  if (!has_out) return;
  part.leave(sum, sums);
  __syncthreads();
  const int e = static_cast<int>(threadIdx.x);
  static_assert(Part::kSlice <= Part::kThreads);
  if (e >= Part::kSlice || e >= place.cols) return;
  const Acc out = static_cast<Acc>(params.scale) * sum_tree<Part::kParts, Part::kSlice>(sums + e);
  from_acc(static_cast<T*>(params.out.data)[at.out + e], out);
}

extern __shared__ __align__(16) unsigned char token_memory[];

// The tokens of a block in shared memory, as they are in global memory: q and k of each [kMaxDimK], then v [kSlice].
template <class Part>
struct TokenRows {
  using T = typename Part::T;
  static constexpr int kElements = 2 * Part::kMaxDimK + Part::kSlice;

  __device__ __forceinline__ const T* q(int t) const { return all + t * kElements; }
  __device__ __forceinline__ const T* k(int t) const { return q(t) + Part::kMaxDimK; }
  __device__ __forceinline__ const T* v(int t) const { return k(t) + Part::kMaxDimK; }

  // Copies are under way afterwards: ptx::cp_async_wait_all and a barrier must follow.
  __device__ __forceinline__ void fetch(const RecurrentParams& params, const Place& place, int count) {
    const int dim_k = static_cast<int>(params.dim_k);
    if (params.out.data != nullptr) copy(0, row_of<T>(params.q, place, 0), params.q.stride_n, dim_k, count);
    copy(Part::kMaxDimK, row_of<T>(params.k, place, 0), params.k.stride_n, dim_k, count);
    copy(2 * Part::kMaxDimK, row_of<T>(params.v, place, 0) + place.first_col, params.v.stride_n, place.cols, count);
  }

  T* all;

 private:
  // Rows of 16-bit elements are aligned (ops/arguments.cpp), and dims are multiples of 8; others go by elements.
  __device__ __forceinline__ void copy(int to, const T* from, int64_t stride, int dim, int count) {
    constexpr int kUnit = sizeof(T) == 2 ? 8 : 1;
    const int units = dim / kUnit;
    for (int i = threadIdx.x; i < units * count; i += Part::kThreads) {
      const int t = i / units, element = i % units * kUnit;
      T* const sTo = all + t * kElements + to + element;
      const T* const gFrom = from + t * stride + element;
      if constexpr (sizeof(T) == 2)
        ptx::cp_async_16(static_cast<uint32_t>(__cvta_generic_to_shared(sTo)), gFrom, true);
      else
        *sTo = *gFrom;
    }
  }
};

template <class Part>
__global__ void __launch_bounds__(Part::kThreads, Part::kMinBlocks)
    la2_recurrent_simt_kernel(const __grid_constant__ RecurrentParams params) {
  using T = typename Part::T;
  using Acc = typename Part::Acc;
  __shared__ Acc sums[kTokensAtOnce * Part::kParts * Part::kSlice];
  __shared__ Acc sDecay;
  TokenRows<Part> rows{reinterpret_cast<T*>(token_memory)};

  Place place = find_place<Part>(params);
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  place.slot = slot_of_row(params, place.row);
  const int count = tokens_of(params, place);
  const bool has_out = params.out.data != nullptr;
  rows.fetch(params, place, count);
  const Acc slope = slope_of_place<Acc>(params.slope, place);
  Part part(params.dim_k, place.cols);
  const bool is_live = place.slot >= 0 && place.slot < params.slots;
  const StateView<typename Part::P> state(params.state, place, is_live ? place.slot : 0);
  if (is_live && count > 0) part.load(state);
  leave_decay(&sDecay, slope);
  ptx::cp_async_wait_all();
  __syncthreads();
  if (!is_live) return zero_outputs<T>(params, place);
  if (count == 0) return;

  const Acc decay = sDecay;
  for (int first = 0; first < count; first += kTokensAtOnce) {
    const int tokens = min(count - first, kTokensAtOnce);
    for (int t = 0; t < tokens; ++t) {
      typename Part::Token token;
      token.load(part, has_out ? rows.q(first + t) : nullptr, rows.k(first + t), rows.v(first + t));
      const auto sum = part.take(token, decay);
      if (has_out) part.leave(sum, sums + t * Part::kParts * Part::kSlice);
    }
    if (!has_out) continue;
    __syncthreads();
    write_outputs<Part>(params.out, params.scale, place, first, tokens, sums);
    __syncthreads();
  }
  if (params.writes_state) part.store(state);
}

}  // namespace la2::simt
