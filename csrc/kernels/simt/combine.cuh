// The combine pass: from what every segment gathers alone to the state that enters it, per sequence and head
//
//   Z_in(first) = initial        Z_in(next) = lambda^len(g) Z_in(g) + local(g)
//
// with the segments g in the order of the sweep; local(g) may be the sum of several pieces (params.num_pieces). In
// place: element by element, local(g) gives way to Z_in(g); opaque states (params.local_floats), whose first one
// contains `initial`, to Z_in(next).
#pragma once

#include "../../core/decay.h"
#include "../ptx/launch_order.cuh"
#include "element.cuh"
#include "units.cuh"
#include "vec.cuh"

namespace la2::simt {

constexpr int kCombineThreads = 256;

// Whether anything is to be done for sequence `index` (a table of units: for unit `index`). Quick: most packed
// sequences are short. Opaque states of two segments are as they should be, unless they came in pieces.
__device__ inline bool has_segments(const TrilinearParams& params, int64_t index) {
  const bool is_opaque = params.local_floats != 0;
  const int most = params.num_pieces > 1 ? 1 : 2;
  if (params.units != nullptr) {
    const UnitEntry& entry = params.units[index];
    return entry.segment == 0 && (!is_opaque || entry.num_segments > most);
  }
  if (params.cu_seqlens.data == nullptr || !is_opaque) return true;
  return sequence_rows(params.cu_seqlens, index, params.sizes.length).length > params.segment_len * most;
}

// Whether nothing is to be done from `index` on, in a table of units: those of requests that are cut come first.
__device__ inline bool is_behind_all(const TrilinearParams& params, int64_t index) {
  if (params.units == nullptr) return false;
  const UnitEntry& entry = params.units[index];
  return entry.segment < 0 || (params.local_floats != 0 && entry.num_segments == 1);
}

// One sequence (has_segments) and head: what is known before anything was gathered, and then its elements. kIsOpaque:
// params.local_floats is not 0. kAhead: segments whose loads are in flight at once.
template <class T, bool kIsOpaque, int kAhead>
class Combination {
 public:
  static constexpr int kSize = sizeof(Vec<T>) / sizeof(T);
  static constexpr bool kHasPieces = sizeof(T) == sizeof(float);  // the 16-bit families'

  __device__ Combination(const TrilinearParams& params, const TrilinearJob& job, int64_t index, int64_t head)
      : job_(job), head_(head) {
    int64_t unit_idx = index;
    const Unit unit = params.units != nullptr ? find_unit(params, index) : first_unit_of(params, index, &unit_idx);
    // Offsets that descend, which nobody has checked, have more segments than there are units.
    count_ = static_cast<int>(min(unit.num_segments, params.num_units - unit_idx));
    state_ = unit.state;
    // In the order of the sweep.
    const int64_t first = unit_idx + (job.reverse ? count_ - 1 : 0);
    first_ = static_cast<T*>(job.local.data) + first * job.local.stride_s + head * job.local.stride_h;
    step_ = job.reverse ? -job.local.stride_s : job.local.stride_s;
    const T slope = slope_of<T>(params, unit.sequence, head);
    const int64_t last_len = unit.seq_length - (count_ - 1) * params.segment_len;
    decay_ = rounded_decay_power(slope, static_cast<int>(params.segment_len));
    decay_of_first_ = job.reverse ? rounded_decay_power(slope, static_cast<int>(last_len)) : decay_;
    if constexpr (kHasPieces) {
      pieces_ = pieces_of(params, slope, params.segment_len);
      pieces_of_first_ = job.reverse ? pieces_of(params, slope, last_len) : pieces_;
      piece_step_ = params.num_units * job.local.stride_s;
    }
  }

  // Elements [element, element + kSize) of every segment's state.
  __device__ void combine(int64_t element) const {
    Vec<T> z{};
    if constexpr (!kIsOpaque) load_initial(z, element);
    // Opaque states: what leaves segment g takes the place of local(g), and the first one is as it should be, unless it
    // came in pieces.
    T* place = first_ + element;
    T factor = decay_of_first_;
#pragma unroll 1
    for (int first = 0; first < count_; first += kAhead) {
      Vec<T> gathered[kAhead];
      T* from = place;
#pragma unroll
      for (int i = 0; i < kAhead; ++i, from += step_)
        if (first + i + 1 < count_) gathered[i] = load_vec(from);  // nobody gathered the last one
      if constexpr (kHasPieces) add_pieces(gathered, place, first);
#pragma unroll
      for (int i = 0; i < kAhead; ++i, place += step_) {
        if (first + i >= count_) break;
        if (!kIsOpaque) store_global(place, z);
#pragma unroll
        for (int e = 0; e < kSize; ++e) z.x[e] = factor * z.x[e] + gathered[i].x[e];
        factor = decay_;
        if (kIsOpaque && (first + i > 0 || pieces_of_first_ > 1) && first + i + 1 < count_) store_global(place, z);
      }
    }
  }

 private:
  __device__ void load_initial(Vec<T>& z, int64_t element) const {
    const State& s = job_.initial;
    if (s.data == nullptr) return;
    const int64_t slot = slot_of(s, state_);
    if (slot < 0) return;
    const int64_t offset =
        slot * s.stride_s + head_ * s.stride_h + element / job_.dim_c * s.stride_d + element % job_.dim_c * s.stride_e;
    with_state_type<T>(s.is_bf16, [&](auto element_in_memory) {
      const auto* from = static_cast<const decltype(element_in_memory)*>(s.data) + offset;
      for (int i = 0; i < kSize; ++i) z.x[i] = to_acc(from[i * s.stride_e]);
    });
  }

  // The other pieces of segments first, first + 1, .., the first of which has its elements at `place`.
  __device__ void add_pieces(Vec<T> (&gathered)[kAhead], const T* place, int first) const {
    const int most = max(pieces_, pieces_of_first_);
#pragma unroll 1
    for (int piece = 1; piece < most; ++piece) {
      const T* from = place + piece * piece_step_;
#pragma unroll
      for (int i = 0; i < kAhead; ++i, from += step_) {
        if (first + i + 1 >= count_ || piece >= (first + i == 0 ? pieces_of_first_ : pieces_)) continue;
        const Vec<T> part = load_vec(from);
#pragma unroll
        for (int e = 0; e < kSize; ++e) gathered[i].x[e] += part.x[e];
      }
    }
  }

  const TrilinearJob& job_;
  int64_t head_, state_, step_, piece_step_;
  int count_, pieces_ = 1, pieces_of_first_ = 1;
  T* first_;
  T decay_, decay_of_first_;
};

// Grid: x = blocks, which take turns at element blocks (fastest), heads and sequences (a table of units: its units, of
// which the first of a sequence stands for it); y = jobs. A thread owns 16 bytes of the state.
template <class T, bool kIsOpaque, int kAhead>
__global__ void __launch_bounds__(kCombineThreads)
    la2_combine_simt_kernel(const __grid_constant__ TrilinearParams params, int element_blocks, int num_items) {
  using Elements = Combination<T, kIsOpaque, kAhead>;
  const TrilinearJob& job = params.jobs[blockIdx.y];
  bool has_waited = false;
  ptx::launch_dependents();
  for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int group = item / element_blocks, index = params.by_heads.small_quotient(group);
    if (is_behind_all(params, index)) break;
    if (!has_segments(params, index)) continue;
    const Elements elements(params, job, index, group - index * static_cast<int>(params.sizes.heads));
    if (!has_waited) ptx::wait_for_previous_kernel();
    has_waited = true;
    const int64_t element =
        ((item - group * element_blocks) * int64_t{kCombineThreads} + threadIdx.x) * Elements::kSize;
    if (element < (kIsOpaque ? params.local_floats : int64_t{job.dim_a} * job.dim_c)) elements.combine(element);
  }
  if (!has_waited) ptx::wait_for_previous_kernel();  // whoever waits for this kernel waits for that one too
}

}  // namespace la2::simt
