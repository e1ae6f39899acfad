// Who does what in an extend: read from the device's cu_seqlens, slots and snapshots, by one block.
#pragma once

#include <limits.h>

#include "../ptx/launch_order.cuh"
#include "extend.h"
#include "indices.cuh"
#include "units.cuh"

namespace la2::simt {

constexpr int kPlanThreads = 256;
constexpr int kPlanWarps = kPlanThreads / 32;

// Numbers of units: of requests that are cut, of others that are long, of the rest.
constexpr int kKinds = 3;
struct PlanSums {
  int64_t units[kKinds];
  __device__ int64_t of(int kind) const { return kind == 0 ? units[0] : kind == 1 ? units[1] : units[2]; }
  __device__ void add(const PlanSums& other) {
    for (int kind = 0; kind < kKinds; ++kind) units[kind] += other.units[kind];
  }
};

// Sums over the threads before this one; *all: over all of them. All threads.
template <class T, class Up, class Add>
__device__ inline T sums_before(const T& own, T* all, T (&of_warps)[kPlanWarps], const Up& up, const Add& add) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T up_to = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const T below = up(up_to, distance);
    if (lane >= distance) add(up_to, below);
  }
  if (lane == 31) of_warps[warp] = up_to;
  const T one_before = up(up_to, 1);
  __syncthreads();
  T before{}, total{};
#pragma unroll 1
  for (int i = 0; i < kPlanWarps; ++i) {
    if (i == warp) before = total;
    add(total, of_warps[i]);
  }
  __syncthreads();
  if (lane > 0) add(before, one_before);
  *all = total;
  return before;
}
__device__ inline int64_t shifted_up(int64_t value, int distance) {
  return __shfl_up_sync(0xffffffffu, value, distance);
}
__device__ inline PlanSums sums_before(const PlanSums& own, PlanSums* all, PlanSums (&of_warps)[kPlanWarps]) {
  auto up = [](const PlanSums& sums, int distance) {
    PlanSums moved;
    for (int kind = 0; kind < kKinds; ++kind) moved.units[kind] = shifted_up(sums.units[kind], distance);
    return moved;
  };
  return sums_before(own, all, of_warps, up, [](PlanSums& to, const PlanSums& other) { to.add(other); });
}
__device__ inline int64_t sums_before(int64_t own, int64_t* all, int64_t (&of_warps)[kPlanWarps]) {
  return sums_before(own, all, of_warps, shifted_up, [](int64_t& to, int64_t other) { to += other; });
}

// What all requests together are to the lanes, and the longest one.
struct Demand {
  int64_t tokens, longest;
};
__device__ inline Demand demand_of_all(const Demand& own, Demand (&of_warps)[kPlanWarps]) {
  auto up = [](const Demand& demand, int distance) -> Demand {
    return {shifted_up(demand.tokens, distance), shifted_up(demand.longest, distance)};
  };
  auto add = [](Demand& to, const Demand& other) {
    to.tokens += other.tokens;
    to.longest = max(to.longest, other.longest);
  };
  Demand all;
  sums_before(own, &all, of_warps, up, add);
  return all;
}

// The tokens that a request has to have more of in order to be cut; walked(r): as of describe_request. All threads.
template <class Walked>
__device__ inline int64_t longest_whole(const ExtendParams& params, const ExtendTables& to, const Walked& walked) {
  __shared__ Demand of_warps[kPlanWarps];
  const Cutting& cutting = to.cutting;
  if (cutting.segment_len == 0) return params.tokens;
  if (!cutting.if_it_gains) return cutting.segment_len;
  Demand own{0, 0};
  for (int64_t r = threadIdx.x; r < params.requests; r += kPlanThreads) {
    const int64_t length = walked(r);
    if (length > 0) own = {own.tokens + length + to.lanes.item_tokens, max(own.longest, length)};
  }
  const Demand all = demand_of_all(own, of_warps);
  const int64_t of_lane = all.tokens / to.lanes.count;
  if (all.longest <= of_lane + cutting.pass_tokens) return params.tokens;
  return max(cutting.segment_len, of_lane);
}

// Request r of every table that has one entry for each. The tokens that the trilinear kernels walk: of two or more, and
// not of padding.
__device__ inline int64_t describe_request(const ExtendParams& params, const ExtendTables& to, int64_t r) {
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
  return length > 1 && (read >= 0 || write >= 0) ? length : 0;
}

// The request between whose offsets snapshot m lies; -1: none. Offsets that nobody has checked may name several: it is
// found from m, so that each entry of a table has one writer.
__device__ inline int64_t request_of_snapshot(const ExtendParams& params, int64_t m) {
  auto offset = [&](int64_t r) { return clamped_index(params.snapshot_offsets, r, params.snapshots); };
  int64_t low = 0, high = params.requests;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offset(middle + 1) > m)
      high = middle;
    else
      low = middle + 1;
  }
  return low < params.requests && offset(low) <= m ? low : -1;
}

// Snapshot m of every table that has one entry for each, behind describe_request of all. One that no request owns
// writes nothing.
__device__ inline void describe_snapshot(const ExtendParams& params, const ExtendTables& to, int64_t m) {
  const int64_t r = request_of_snapshot(params, m);
  const int64_t begin = r < 0 ? 0 : to.begins[r], length = r < 0 ? 0 : to.lengths[r];
  const int64_t count = clamped_index(params.snapshot_tokens, m, length);
  to.snapshot_units[m] = {begin, count, static_cast<int32_t>(max(r, int64_t{0})), static_cast<int32_t>(m), 0, 1, 0, 0};
  to.snapshot_read_slots[m] = r < 0 ? -1 : max(to.read_slots[r], int64_t{-1});
  to.snapshot_write_slots[m] = r < 0 ? -1 : slot_within(index_at(params.snapshot_slots, m), params.slots);
}

// What a unit costs its lane, in tokens.
__device__ inline int64_t cost_of_unit(const ExtendTables& to, const UnitEntry& unit) {
  const int64_t left = unit.seq_length - unit.segment * to.cutting.segment_len;
  return to.lanes.item_tokens +
         (unit.num_segments == 1 || left < to.cutting.segment_len ? left : to.cutting.segment_len);
}

// Deals the first `count` units out to the lanes, each lane's units of requests that are cut before all others; behind
// them where its blocks begin beside the state pass, for which those wait. All threads, behind a barrier.
//
// Few units one by one, the most expensive first, to the lane that has least (the LPT rule of Graham 1969); more lanes
// than a warp has: there and back in that order. Many units: in their own order, a lane those between its shares of
// the cost of all.
class Dealer {
 public:
  static constexpr int kFew = 64;
  // Costs have 62 bits; above them, whether it is cut.
  static constexpr int64_t kCut = int64_t{1} << 62;

  struct Shared {
    int64_t of_warps[kPlanWarps];
    UnitEntry units[kFew];  // the first ones of the table
    int64_t costs[kFew];
    int order[kFew], lane[kFew], turn[kFew];
    int first[kMostLanes], turns[kMostLanes];
  };

  __device__ Dealer(const ExtendTables& to, int64_t count, int64_t cut_units, Shared& shared)
      : to_(to), lanes_(to.lanes.count), count_(count), shared_(shared) {
    const Lanes& lanes = to.lanes;
    const int64_t free_sms = max(lanes.num_sms - cut_units * lanes.pass_blocks, int64_t{0});
    lanes_at_once_ = lanes.pass_blocks == 0 || cut_units == 0 ? lanes_ : static_cast<int>(free_sms / lanes.blocks);
  }

  __device__ void deal() {
    for (int lane = threadIdx.x; lane < lanes_; lane += kPlanThreads) {
      shared_.first[lane] = INT_MAX;
      shared_.turns[lane] = 0;
    }
    __syncthreads();
    if (count_ <= kFew)
      deal_few();
    else
      deal_many();
    __syncthreads();
    for (int lane = threadIdx.x; lane < lanes_; lane += kPlanThreads)
      if (shared_.turns[lane] < to_.num_units) place(lane, shared_.turns[lane]) = {0, 0, 0, 0, -1, 1, 0, 0};
  }

 private:
  __device__ UnitEntry& place(int lane, int64_t turn) { return to_.lanes.walks[turn * lanes_ + lane]; }
  // Units have turns in the order of the table. Behind a barrier that all of the lane's are counted before.
  __device__ UnitEntry& place_of_turn(int lane, int turn) {
    return place(lane, to_.lanes.pass_blocks > 0 ? shared_.turns[lane] - 1 - turn : turn);
  }

  __device__ void deal_few() {
    const int i = static_cast<int>(threadIdx.x), count = static_cast<int>(count_);
    const bool has_unit = i < count;
    if (has_unit) {
      const UnitEntry& unit = shared_.units[i];
      shared_.costs[i] = cost_of_unit(to_, unit) + (unit.num_segments > 1 ? kCut : 0);
    }
    __syncthreads();
    int rank = 0;
    if (has_unit) {
      const int64_t own = shared_.costs[i];
#pragma unroll 8
      for (int other = 0; other < count; ++other)
        rank += shared_.costs[other] > own || (shared_.costs[other] == own && other < i);
      shared_.order[rank] = i;
      shared_.lane[i] = rank / lanes_ % 2 == 0 ? rank % lanes_ : lanes_ - 1 - rank % lanes_;
      shared_.turn[i] = rank / lanes_;
    }
    __syncthreads();
    if (lanes_ <= 32) {
      if (threadIdx.x < 32) deal_in_order(count);
      __syncthreads();
    }
    if (has_unit) atomicMax(&shared_.turns[shared_.lane[i]], shared_.turn[i] + 1);
    __syncthreads();
    if (has_unit) place_of_turn(shared_.lane[i], shared_.turn[i]) = shared_.units[i];
  }

  // One warp, of which each lane is one.
  __device__ void deal_in_order(int count) {
    constexpr unsigned kAll = 0xffffffffu;
    constexpr int kUnit = 64;  // of loads, so that with the lane's number they have 32 bits
    const int lane = static_cast<int>(threadIdx.x);
    int units[kFew / 32];
    unsigned costs[kFew / 32];
    for (int part = 0; part < kFew / 32; ++part) {
      const int rank = part * 32 + lane;
      units[part] = rank < count ? shared_.order[rank] : 0;
      const int64_t cost = rank < count ? shared_.costs[units[part]] & (kCut - 1) : 0;
      costs[part] = static_cast<unsigned>((cost + kUnit - 1) / kUnit);
    }
    // The state pass takes as long as a segment: what lanes for which it leaves no room have to wait. (That what is cut
    // waits for it everywhere, behind the rest, is not counted: with that, times were longer.)
    unsigned load = lane < lanes_at_once_ ? 0 : static_cast<unsigned>(to_.cutting.segment_len / kUnit);
    int turn = 0;
    for (int part = 0; part < kFew / 32; ++part) {
      for (int r = 0; r < 32 && part * 32 + r < count; ++r) {
        const int unit = __shfl_sync(kAll, units[part], r);
        const unsigned cost = __shfl_sync(kAll, costs[part], r);
        const unsigned least = __reduce_min_sync(kAll, lane < lanes_ ? load << 5 | lane : kAll);
        if (static_cast<int>(least & 31) != lane) continue;
        load += cost;
        shared_.lane[unit] = lane;
        shared_.turn[unit] = turn++;
      }
    }
  }

  __device__ void deal_many() {
    int64_t total = 0;
    for (int64_t i = threadIdx.x; i < count_; i += kPlanThreads) total += cost_of_unit(to_, to_.units[i]);
    sums_before(total, &total, shared_.of_warps);
    int64_t done = 0;
    for (int64_t begin = 0; begin < count_; begin += kPlanThreads) {
      const int64_t i = begin + threadIdx.x, cost = i < count_ ? cost_of_unit(to_, to_.units[i]) : 0;
      int64_t all;
      const int64_t before = done + sums_before(cost, &all, shared_.of_warps);
      done += all;
      if (i >= count_) continue;
      const auto lane = min(lanes_ - 1, static_cast<int>((before + cost / 2) * lanes_ / total));
      to_.units[i].lane = lane;
      atomicMin(&shared_.first[lane], static_cast<int>(i));
    }
    __syncthreads();
    auto turn_of = [&](int64_t i, int lane) { return static_cast<int>(i) - shared_.first[lane]; };
    for (int64_t i = threadIdx.x; i < count_; i += kPlanThreads) {
      const int lane = to_.units[i].lane;
      if (i + 1 == count_ || to_.units[i + 1].lane != lane) shared_.turns[lane] = turn_of(i, lane) + 1;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count_; i += kPlanThreads) {
      const UnitEntry unit = to_.units[i];
      place_of_turn(unit.lane, turn_of(i, unit.lane)) = unit;
    }
  }

  const ExtendTables& to_;
  const int lanes_;
  const int64_t count_;
  int lanes_at_once_;
  Shared& shared_;
};

// Fills the tables. One block; a thread has every 256th request.
__global__ void __launch_bounds__(kPlanThreads)
    la2_extend_plan_simt_kernel(const __grid_constant__ ExtendParams params, const __grid_constant__ ExtendTables to) {
  __shared__ PlanSums of_warps[kPlanWarps];
  __shared__ Dealer::Shared of_dealer;
  ptx::launch_dependents();

  // Of a thread's first request, which is all of them as a rule, in a register.
  const int64_t of_first = threadIdx.x < params.requests ? describe_request(params, to, threadIdx.x) : 0;
  for (int64_t r = threadIdx.x + kPlanThreads; r < params.requests; r += kPlanThreads) describe_request(params, to, r);
  if (params.snapshots > 0) {
    __syncthreads();
    for (int64_t m = threadIdx.x; m < params.snapshots; m += kPlanThreads) describe_snapshot(params, to, m);
  }
  auto walked = [&](int64_t r) -> int64_t {
    if (r < kPlanThreads) return of_first;
    return r < params.requests && to.read_slots[r] != kPadding && to.lengths[r] > 1 ? to.lengths[r] : 0;
  };

  // Units: first of the requests that are cut, then of other long ones.
  const int64_t whole_len = longest_whole(params, to, walked);
  auto units_of = [&](int64_t r) {
    const int64_t length = walked(r);
    PlanSums own{};
    const int kind = length > whole_len ? 0 : length > to.long_len ? 1 : 2;
    if (length == 0) return own;
    own.units[0] = kind == 0 ? segments_of(length, to.cutting.segment_len) : 0;
    own.units[1] = kind == 1;
    own.units[2] = kind == 2;
    return own;
  };
  PlanSums total{}, before_first{};
  for (int64_t first = 0; first < params.requests; first += kPlanThreads) {
    PlanSums all;
    const PlanSums before = sums_before(units_of(first + threadIdx.x), &all, of_warps);
    if (first == 0) before_first = before;
    total.add(all);
  }
  const int64_t all_units = total.units[0] + total.units[1] + total.units[2];
  PlanSums done{{0, total.units[0], total.units[0] + total.units[1]}};
  for (int64_t first = 0; first < params.requests; first += kPlanThreads) {
    const int64_t r = first + threadIdx.x;
    const PlanSums own = units_of(r);
    PlanSums before = before_first;
    if (params.requests > kPlanThreads) {
      PlanSums all;
      before = sums_before(own, &all, of_warps);
      before.add(done);
      done.add(all);
    } else {
      before.add(done);
    }
    const int kind = own.units[0] > 0 ? 0 : own.units[1] > 0 ? 1 : 2;
    const int64_t begin = before.of(kind), segments = own.of(kind);
    if (segments == 0) continue;
    // Rows that overlap, as those of offsets that nobody checked may, are more than there is room for.
    const bool fits = begin + segments <= (kind == 0 ? to.long_units : to.num_units);
    for (int64_t i = begin; i < to.num_units && i < begin + segments; ++i) {
      const int32_t segment = fits ? static_cast<int32_t>(i - begin) : -1, request = static_cast<int32_t>(r);
      const UnitEntry unit = {to.begins[r],
                              walked(r),
                              request,
                              request,
                              segment,
                              static_cast<int32_t>(segments),
                              static_cast<int32_t>(i),
                              0};
      to.units[i] = unit;
      if (i < Dealer::kFew) of_dealer.units[i] = unit;
    }
  }
  for (int64_t i = all_units + threadIdx.x; i < to.num_units; i += kPlanThreads)
    to.units[i] = {0, 0, 0, 0, -1, 1, 0, 0};
  if (to.lanes.count == 0) return;
  __syncthreads();
  Dealer(to, min(all_units, to.num_units), total.units[0], of_dealer).deal();
}

}  // namespace la2::simt
