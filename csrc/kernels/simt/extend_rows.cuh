// The requests of an extend that are no work for the trilinear kernels: of one token (a decode step from slot to slot),
// of none (the state moves), padding and the rows behind the last request (zero).
//
// As in recurrent.cuh a block takes all of D for a slice of E of one state; the blocks of longer requests go at once.
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
  Place place;  // row: the token (of one); slot: where the state is read
  int64_t request, write_slot;
  int64_t zero_row, zero_end, zero_step;  // rows that become zero
  bool has_token, reads, writes;
};

template <int kSlice>
__device__ __forceinline__ ExtendWork find_extend_work(const ExtendParams& params, const ExtendTables& tables) {
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
    work.writes = work.reads = false;
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

// Grid: slices x heads x (requests + tail_blocks), slices fastest.
template <class Part>
__global__ void __launch_bounds__(Part::kThreads, Part::kMinBlocks)
    la2_extend_rows_simt_kernel(const __grid_constant__ ExtendParams params,
                                const __grid_constant__ ExtendTables tables) {
  using T = typename Part::T;
  using P = typename Part::P;
  using Acc = typename Part::Acc;
  __shared__ Acc sums[Part::kParts * Part::kSlice];
  __shared__ Acc sDecay;

  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const ExtendWork work = find_extend_work<Part::kSlice>(params, tables);
  const Place& place = work.place;
  if (work.zero_step != 0) return zero_rows<T>(params, work);
  Part part(params.dim_k, place.cols);
  auto load = [&] {
    if (work.reads) part.load(StateView<P>(params.state, place, place.slot));
  };
  if (!work.has_token) {  // the state moves as it is
    if (!work.writes) return;
    load();
    part.store(StateView<P>(params.state, place, work.write_slot));
    return;
  }

  // A step of decode, from slot to slot.
  auto row = [&](const Rows& rows) {
    return static_cast<const T*>(rows.data) + place.row * rows.stride_n + place.head * rows.stride_h;
  };
  typename Part::Token token;
  token.load(part, row(params.q), row(params.k), row(params.v) + place.first_col);
  Place of_request = place;
  of_request.row = work.request;
  const Acc slope = slope_of_place<Acc>(params.slope, of_request);
  load();
  leave_decay(&sDecay, slope);
  __syncthreads();
  if (params.silu != 0) take_silu_of_token(token, params.silu);
  const auto sum = part.take(token, sDecay);
  if (work.writes) part.store(StateView<P>(params.state, place, work.write_slot));
  part.leave(sum, sums);
  __syncthreads();
  const MutableRows out = {params.out.data, params.out.stride_n, params.out.stride_h, 0};
  write_outputs<Part>(out, params.scale, place, 0, 1, sums);
}

}  // namespace la2::simt
