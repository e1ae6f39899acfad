// The requests of an extend that are no work for the trilinear kernels: of one token (a decode step from slot to slot),
// of none (the state moves), padding and the rows behind the last request (zero).
//
// As in recurrent.cuh a block takes 16 KiB of one state, all of D for a slice of E, columns or rows of it; the blocks
// of longer requests go at once, or copy the initial state to `dense`, where its slot may be written before it is read.
#pragma once

#include "../ptx/launch_order.cuh"
#include "extend.h"
#include "indices.cuh"
#include "recurrent.cuh"

namespace la2::simt {

// Blocks in place of a request that share the rows behind the last one, for each head and slice.
__host__ __device__ inline int64_t tail_blocks(int64_t tokens) { return tokens < 2048 ? 1 : 8; }

// What a block does with its part of a state.
struct ExtendWork {
  Place place;                            // row: the token (of one); slot: where the state is read
  int64_t request, write_slot;            // of the pool, or of `dense`
  int64_t zero_row, zero_end, zero_step;  // rows that become zero
  bool has_token, reads, writes, to_dense;
};

template <int kSlice>
__device__ __forceinline__ ExtendWork find_extend_work(const ExtendParams& params, const ExtendTables& tables,
                                                       bool wants_dense) {
  const unsigned num_slices = (static_cast<unsigned>(params.dim_v) + kSlice - 1) / kSlice;
  const unsigned heads = static_cast<unsigned>(params.heads);
  ExtendWork work{};
  Place& place = work.place;
  place.first_col = static_cast<int>(blockIdx.x % num_slices) * kSlice;
  place.cols = min(static_cast<int>(params.dim_v) - place.first_col, kSlice);
  place.head = blockIdx.x / num_slices % heads;
  const int64_t request = work.request = blockIdx.x / num_slices / heads;
  if (request >= params.requests) {
    const int64_t end = index_at(params.cu_seqlens, params.requests);
    work.zero_step = tail_blocks(params.tokens);
    work.zero_row = max(end, int64_t{0}) + request - params.requests;
    work.zero_end = params.tokens;
    return work;
  }
  const int64_t begin = tables.begins[request], length = tables.lengths[request];
  const int64_t read_slot = tables.read_slots[request], write_slot = tables.write_slots[request];
  if (read_slot == kPadding) {
    work.zero_step = 1;
    work.zero_row = begin;
    work.zero_end = begin + length;
    return work;
  }
  place.row = begin;
  place.slot = read_slot;
  work.write_slot = write_slot;
  work.reads = read_slot >= 0;
  work.writes = write_slot >= 0;
  if (length == 1) {
    work.has_token = true;
  } else if (length == 0) {
    work.writes = work.writes && read_slot != write_slot;
    work.reads = work.reads && work.writes;
  } else {
    work.write_slot = wants_dense ? tables.dense_slots[request] : -1;
    work.writes = work.to_dense = work.write_slot >= 0;
    work.reads = work.reads && work.writes;
  }
  return work;
}

// The block's columns of rows that are zero.
template <class T>
__device__ __forceinline__ void zero_rows(const ExtendParams& params, const ExtendWork& work) {
  constexpr int kVec = 16 / sizeof(T);  // dims are multiples of 8; slices start at multiples of 16 bytes
  const Place& place = work.place;
  const int units = (place.cols + kVec - 1) / kVec;
  const int64_t rows_at_once = blockDim.x / units;
  const int row = threadIdx.x / units, col = threadIdx.x % units * kVec;
  if (row >= rows_at_once) return;
  T* const out = static_cast<T*>(params.out.data) + place.head * params.out.stride_h + place.first_col + col;
  for (int64_t r = work.zero_row + row * work.zero_step; r < work.zero_end; r += rows_at_once * work.zero_step)
    *reinterpret_cast<uint4*>(out + r * params.out.stride_n) = {0, 0, 0, 0};
}

// The rows as decode's, one a token; of slopes this request's.
template <class Acc>
__device__ __forceinline__ RecurrentParams decode_params(const ExtendParams& params, const ExtendWork& work) {
  RecurrentParams p{};
  p.dim_k = params.dim_k;
  p.q = {params.q.data, params.q.stride_n, params.q.stride_h, 0};
  p.k = {params.k.data, params.k.stride_n, params.k.stride_h, 0};
  p.v = {params.v.data, params.v.stride_n, params.v.stride_h, 0};
  p.out = {params.out.data, params.out.stride_n, params.out.stride_h, 0};
  p.slope = params.slope;
  p.slope.stride_s = 0;
  if (p.slope.data != nullptr)
    p.slope.data = static_cast<const Acc*>(params.slope.data) + work.request * params.slope.stride_s;
  return p;
}

// store(where it goes, of which state) for a state that moves as it is.
template <class P, class Acc, class Store>
__device__ __forceinline__ void move_to(const ExtendParams& params, const ExtendWork& work, const MutableState& dense,
                                        int col, int dim, const Store& store) {
  if (work.to_dense)
    store(state_part<Acc>(dense, work.write_slot, work.place, col, dim), dense);
  else
    store(state_part<P>(params.state, work.write_slot, work.place, col, dim), params.state);
}

// Grid: slices x heads x (requests + tail_blocks), slices fastest. `dense` has the pool's order.
template <class Cfg>
__global__ void __launch_bounds__(kRecurrentThreads)
    la2_extend_columns_simt_kernel(const __grid_constant__ ExtendParams params,
                                   const __grid_constant__ ExtendTables tables,
                                   const __grid_constant__ MutableState dense) {
  using T = typename Cfg::T;
  using P = typename Cfg::P;
  using Acc = typename Cfg::Acc;
  __shared__ TokenGroup<Cfg> group;
  __shared__ Acc partial[kRecurrentWarps][Cfg::kSlice];

  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const ExtendWork work = find_extend_work<Cfg::kSlice>(params, tables, dense.data != nullptr);
  const Place& place = work.place;
  if (work.zero_step != 0) return zero_rows<T>(params, work);
  const int first_dim = threadIdx.x / Cfg::kLanes;
  const int col = threadIdx.x % Cfg::kLanes * Cfg::kVec;
  const bool in_cols = col < place.cols;
  const MutableState& state = params.state;
  // f(i) for the vectors of this thread that exist.
  auto for_each_vec = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < Cfg::kLoads; ++i) {
      if (in_cols && first_dim + i * Cfg::kRowStep < params.dim_k) f(i);
    }
  };
  Vec<Acc> s[Cfg::kLoads] = {};
  auto load = [&] {
    if (!work.reads) return;
    const P* from = state_part<P>(state, place.slot, place, col, first_dim);
    for_each_vec(
        [&](int i) { load_part<Cfg::kVector>(s[i], from + i * Cfg::kRowStep * state.stride_d, state.stride_e); });
  };
  if (!work.has_token) {
    if (!work.writes) return;
    load();
    move_to<P, Acc>(params, work, dense, col, first_dim, [&](auto* to, const MutableState& into) {
      for_each_vec(
          [&](int i) { store_part<Cfg::kVector>(to + i * Cfg::kRowStep * into.stride_d, s[i], into.stride_e); });
    });
    return;
  }

  GroupFetch<Cfg> fetch;
  const RecurrentParams step = decode_params<Acc>(params, work);
  fetch.start(step, place, 0, 1);
  load();
  fetch.finish(group, step, place, 0, 1);
  const Token<Cfg>& token = group.tokens[0];
  __syncthreads();

  const Vec<Acc> v = load_vec(&token.v[col]);
  const Acc decay = group.decay;
  Acc out[Cfg::kVec] = {};
  for_each_vec([&](int i) {
    const Acc q = token.q[first_dim + i * Cfg::kRowStep], k = token.k[first_dim + i * Cfg::kRowStep];
#pragma unroll
    for (int e = 0; e < Cfg::kVec; ++e) {
      s[i].x[e] = decay * s[i].x[e] + k * v.x[e];
      out[e] += q * s[i].x[e];
    }
  });
  if (work.writes) {
    P* to = state_part<P>(state, work.write_slot, place, col, first_dim);
    for_each_vec(
        [&](int i) { store_part<Cfg::kVector>(to + i * Cfg::kRowStep * state.stride_d, s[i], state.stride_e); });
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
    for (int warp = 0; warp < kRecurrentWarps; ++warp) sum += partial[warp][threadIdx.x];
    from_acc(out_row<T>(decode_params<Acc>(params, work), place, 0)[threadIdx.x], static_cast<Acc>(params.scale) * sum);
  }
}

template <class Cfg>
__global__ void __launch_bounds__(kRecurrentThreads)
    la2_extend_rows_simt_kernel(const __grid_constant__ ExtendParams params,
                                const __grid_constant__ ExtendTables tables,
                                const __grid_constant__ MutableState dense) {
  using T = typename Cfg::T;
  using P = typename Cfg::P;
  using Acc = typename Cfg::Acc;
  __shared__ TokenGroup<Cfg> group;

  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const ExtendWork work = find_extend_work<Cfg::kSlice>(params, tables, dense.data != nullptr);
  const Place& place = work.place;
  if (work.zero_step != 0) return zero_rows<T>(params, work);
  const int lane = threadIdx.x % 32;
  const int first_col = threadIdx.x / 32 * Cfg::kCols;  // of this warp, within the slice
  const MutableState& state = params.state;
  auto is_inside = [&](int col, int i) {
    return first_col + col < place.cols && (lane + 32 * i) * Cfg::kVec < params.dim_k;
  };
  // f(col, i) for the vectors of this thread that exist.
  auto for_each_vec = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < Cfg::kVecsPerLane; ++i) {
#pragma unroll
      for (int col = 0; col < Cfg::kCols; ++col) {
        if (is_inside(col, i)) f(col, i);
      }
    }
  };
  Vec<Acc> s[Cfg::kCols][Cfg::kVecsPerLane] = {};
  auto load = [&] {
    if (!work.reads) return;
    const P* from = state_part<P>(state, place.slot, place, first_col, lane * Cfg::kVec);
    for_each_vec([&](int col, int i) { s[col][i] = load_state_vec(from + col * state.stride_e + 32 * i * Cfg::kVec); });
  };
  if (!work.has_token) {
    if (!work.writes) return;
    load();
    move_to<P, Acc>(params, work, dense, first_col, lane * Cfg::kVec, [&](auto* to, const MutableState& into) {
      for_each_vec([&](int col, int i) { store_state_vec(to + col * into.stride_e + 32 * i * Cfg::kVec, s[col][i]); });
    });
    return;
  }

  GroupFetch<Cfg> fetch;
  const RecurrentParams step = decode_params<Acc>(params, work);
  fetch.start(step, place, 0, 1);
  load();
  fetch.finish(group, step, place, 0, 1);
  const Token<Cfg>& token = group.tokens[0];
  __syncthreads();

  const Acc decay = group.decay;
  Acc out[Cfg::kCols] = {};
#pragma unroll
  for (int i = 0; i < Cfg::kVecsPerLane; ++i) {
    const Vec<Acc> q = load_vec(&token.q[(lane + 32 * i) * Cfg::kVec]);
    const Vec<Acc> k = load_vec(&token.k[(lane + 32 * i) * Cfg::kVec]);
#pragma unroll
    for (int col = 0; col < Cfg::kCols; ++col) {
      if (!is_inside(col, i)) continue;
      const Acc v = token.v[first_col + col];
#pragma unroll
      for (int w = 0; w < Cfg::kVec; ++w) {
        s[col][i].x[w] = decay * s[col][i].x[w] + k.x[w] * v;
        out[col] += q.x[w] * s[col][i].x[w];
      }
    }
  }
  if (work.writes) {
    P* to = state_part<P>(state, work.write_slot, place, first_col, lane * Cfg::kVec);
    for_each_vec([&](int col, int i) { store_state_vec(to + col * state.stride_e + 32 * i * Cfg::kVec, s[col][i]); });
  }

#pragma unroll
  for (int col = 0; col < Cfg::kCols; ++col) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      out[col] += __shfl_xor_sync(0xffffffffu, out[col], distance);
    }
    if (lane == col && first_col + col < place.cols)
      from_acc(out_row<T>(decode_params<Acc>(params, work), place, 0)[first_col + col],
               static_cast<Acc>(params.scale) * out[col]);
  }
}

}  // namespace la2::simt
