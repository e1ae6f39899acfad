// Who does what in an extend: read from the device's cu_seqlens, slots and snapshots, by one block.
#pragma once

#include "../ptx/launch_order.cuh"
#include "extend.h"
#include "indices.cuh"
#include "units.cuh"

namespace la2::simt {

constexpr int kPlanThreads = 256;
constexpr int kPlanWarps = kPlanThreads / 32;

// Sums of two numbers over the threads before this one, and over all of them.
struct PlanSums {
  int64_t units, requests;
};
__device__ inline PlanSums sums_before(PlanSums own, PlanSums* all, PlanSums (&of_warps)[kPlanWarps]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  PlanSums up_to = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t units = __shfl_up_sync(0xffffffffu, up_to.units, distance);
    const int64_t requests = __shfl_up_sync(0xffffffffu, up_to.requests, distance);
    if (lane >= distance) up_to = {up_to.units + units, up_to.requests + requests};
  }
  if (lane == 31) of_warps[warp] = up_to;
  __syncthreads();
  PlanSums before{up_to.units - own.units, up_to.requests - own.requests}, total{0, 0};
#pragma unroll 1
  for (int i = 0; i < kPlanWarps; ++i) {
    if (i == warp) before = {before.units + total.units, before.requests + total.requests};
    total = {total.units + of_warps[i].units, total.requests + of_warps[i].requests};
  }
  __syncthreads();
  *all = total;
  return before;
}

// The tokens of request r that the trilinear kernels walk: of two or more, and not of padding.
__device__ inline int64_t walked_length(const ExtendTables& to, int64_t r) {
  return to.read_slots[r] != kPadding && to.lengths[r] > 1 ? to.lengths[r] : 0;
}

// The tokens that a request has to have more of in order to be cut. All threads.
__device__ inline int64_t longest_whole(const ExtendParams& params, const ExtendTables& to) {
  __shared__ unsigned long long tokens, requests, longest;
  const Cutting& cutting = to.cutting;
  if (cutting.segment_len == 0 || cutting.lanes == 0)
    return cutting.segment_len == 0 ? params.tokens : cutting.segment_len;
  if (threadIdx.x == 0) tokens = requests = longest = 0;
  __syncthreads();
  for (int64_t r = threadIdx.x; r < params.requests; r += kPlanThreads) {
    const auto length = static_cast<unsigned long long>(walked_length(to, r));
    if (length == 0) continue;
    atomicAdd(&tokens, length);
    atomicAdd(&requests, 1ull);
    atomicMax(&longest, length);
  }
  __syncthreads();
  const float busy = (static_cast<float>(tokens) + static_cast<float>(requests) * cutting.item_tokens) / cutting.lanes;
  if (static_cast<float>(longest) <= busy + cutting.pass_tokens) return params.tokens;
  return max(cutting.segment_len, static_cast<int64_t>(busy));
}

// Request r of every table that has one entry for each, and its snapshots.
__device__ inline void describe_request(const ExtendParams& params, const ExtendTables& to, int64_t r) {
  const int64_t begin = clamped_index(params.cu_seqlens, r, params.tokens);
  const int64_t end = clamped_index(params.cu_seqlens, r + 1, params.tokens);
  const int64_t length = end > begin ? end - begin : 0;
  const int64_t named = params.read_slots.data != nullptr ? index_at(params.read_slots, r) : r;
  const int64_t read = slot_within(named, params.slots);
  const int64_t write =
      slot_within(params.write_slots.data != nullptr ? index_at(params.write_slots, r) : named, params.slots);
  const bool starts_from_zero = params.has_initial_state != nullptr && !params.has_initial_state[r];
  to.begins[r] = begin;
  to.lengths[r] = length;
  to.read_slots[r] = read < 0 && write < 0 ? kPadding : starts_from_zero ? -1 : read;
  to.write_slots[r] = write;
  to.copy_slots[r] = -1;
  if (to.copies.count > 0)
    to.initial_offsets[r] = to.read_slots[r] < 0 ? -1 : to.copies.pool_offset + read * params.state.stride_s;
  if (params.snapshots == 0) return;
  const int64_t last = clamped_index(params.snapshot_offsets, r + 1, params.snapshots);
  for (int64_t m = clamped_index(params.snapshot_offsets, r, params.snapshots); m < last; ++m) {
    const int64_t count = clamped_index(params.snapshot_tokens, m, length);
    to.snapshot_units[m] = {begin, count, static_cast<int32_t>(r), static_cast<int32_t>(m), 0, 1};
    to.snapshot_read_slots[m] = starts_from_zero ? -1 : read;
    to.snapshot_write_slots[m] = slot_within(index_at(params.snapshot_slots, m), params.slots);
  }
}

// Fills the tables. One block; a thread has every 256th request.
__global__ void __launch_bounds__(kPlanThreads)
    la2_extend_plan_simt_kernel(const __grid_constant__ ExtendParams params, const __grid_constant__ ExtendTables to) {
  __shared__ PlanSums of_warps[kPlanWarps];
  ptx::launch_dependents();

  // A snapshot that no request owns writes nothing.
  for (int64_t m = threadIdx.x; m < params.snapshots; m += kPlanThreads) {
    to.snapshot_units[m] = {0, 0, 0, static_cast<int32_t>(m), 0, 1};
    to.snapshot_read_slots[m] = to.snapshot_write_slots[m] = -1;
  }
  __syncthreads();
  for (int64_t r = threadIdx.x; r < params.requests; r += kPlanThreads) describe_request(params, to, r);

  // Units: first of the requests that are cut, then of other long ones.
  const int64_t whole_len = longest_whole(params, to);
  PlanSums done{0, 0};
  for (int turn = 0; turn < 3; ++turn) {
    for (int64_t first = 0; first < params.requests; first += kPlanThreads) {
      const int64_t r = first + threadIdx.x;
      const int64_t length = r < params.requests ? walked_length(to, r) : 0;
      const int turn_of_it = length > whole_len ? 0 : length > to.long_len ? 1 : 2;
      const bool is_live = length > 0 && turn_of_it == turn;
      const int64_t segments = !is_live ? 0 : turn == 0 ? segments_of(length, to.cutting.segment_len) : 1;
      PlanSums all;
      PlanSums before = sums_before({segments, is_live}, &all, of_warps);
      before = {done.units + before.units, done.requests + before.requests};
      done = {done.units + all.units, done.requests + all.requests};
      if (!is_live) continue;
      // Rows that overlap, as those of offsets that nobody checked may, are more than there is room for.
      if (turn == 0 && to.copies.count > 0 && to.initial_offsets[r] >= 0) {
        const bool has_room = before.requests < to.copies.count;
        to.copy_slots[r] = has_room ? before.requests : -1;
        to.initial_offsets[r] = has_room ? to.copies.copy_offset + before.requests * to.copies.stride_s : -1;
      }
      const bool fits = before.units + segments <= (turn == 0 ? to.long_units : to.num_units);
      for (int64_t i = before.units; i < to.num_units && i < before.units + segments; ++i) {
        const int32_t segment = fits ? static_cast<int32_t>(i - before.units) : -1;
        to.units[i] = {to.begins[r],
                       length,
                       static_cast<int32_t>(r),
                       static_cast<int32_t>(r),
                       segment,
                       static_cast<int32_t>(segments)};
      }
    }
  }
  for (int64_t i = done.units + threadIdx.x; i < to.num_units; i += kPlanThreads) to.units[i] = {0, 0, 0, 0, -1, 1};
}

}  // namespace la2::simt
