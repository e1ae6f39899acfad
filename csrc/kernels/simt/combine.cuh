// The combine pass: from what every segment gathers alone to the state that enters it, per sequence and head
//
//   Z_in(first) = initial        Z_in(next) = lambda^len(g) Z_in(g) + local(g)
//
// with the segments g in the order of the sweep. In place: element by element, local(g) gives way to Z_in(g); opaque
// states (params.local_floats), whose first one contains `initial`, to Z_in(next).
#pragma once

#include "../../core/decay.h"
#include "../ptx/launch_order.cuh"
#include "units.cuh"
#include "vec.cuh"

namespace la2::simt {

constexpr int kCombineThreads = 256;
constexpr int kCombineAhead = 16;  // segments whose loads are in flight at once

// Whether anything is to be done for sequence `index` (a table of units: for unit `index`). Quick: most packed
// sequences are short. Opaque states of two segments are as they should be.
__device__ inline bool has_segments(const TrilinearParams& params, int64_t index) {
  const bool is_opaque = params.local_floats != 0;
  if (params.units != nullptr) {
    const UnitEntry& entry = params.units[index];
    return entry.segment == 0 && (!is_opaque || entry.seq_length > 2 * params.segment_len);
  }
  if (params.cu_seqlens.data == nullptr || !is_opaque) return true;
  return sequence_rows(params.cu_seqlens, index, params.sizes.length).length > 2 * params.segment_len;
}

// Grid: x = blocks, which take turns at element blocks (fastest), heads and sequences (a table of units: its units, of
// which the first of a sequence stands for it); y = jobs. A thread owns 16 bytes of the state.
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    la2_combine_simt_kernel(const __grid_constant__ TrilinearParams params, int element_blocks, int num_items) {
  constexpr int kSize = sizeof(Vec<T>) / sizeof(T);
  const TrilinearJob& job = params.jobs[blockIdx.y];
  const bool reverse = job.reverse, is_opaque = params.local_floats != 0;
  const int heads = static_cast<int>(params.sizes.heads);
  bool has_waited = false;
  ptx::launch_dependents();
  for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int index = item / element_blocks / heads, head = item / element_blocks % heads;
    if (!has_segments(params, index)) continue;
    int64_t unit_idx = index;
    const Unit unit = params.units != nullptr ? find_unit(params, index) : first_unit_of(params, index, &unit_idx);
    const T slope = slope_of<T>(params, unit.sequence, head);
    const int64_t count = unit.num_segments;
    const int64_t last_len = unit.seq_length - (count - 1) * params.segment_len;
    const T decay = static_cast<T>(decay_power<T>(slope, params.segment_len));
    const T decay_of_last = static_cast<T>(decay_power<T>(slope, last_len));
    if (!has_waited) ptx::wait_for_previous_kernel();
    has_waited = true;
    const int64_t element = (item % element_blocks * int64_t{kCombineThreads} + threadIdx.x) * kSize;
    if (element >= (is_opaque ? params.local_floats : int64_t{job.dim_a} * job.dim_c)) continue;

    Vec<T> z{};
    if (job.initial.data != nullptr && !is_opaque) {
      const State& s = job.initial;
      const T* from = static_cast<const T*>(s.data) + slot_of(s, unit.state) * s.stride_s + head * s.stride_h +
                      element / job.dim_c * s.stride_d + element % job.dim_c * s.stride_e;
      for (int i = 0; i < kSize; ++i) z.x[i] = from[i * s.stride_e];
    }
    T* const local =
        static_cast<T*>(job.local.data) + unit_idx * job.local.stride_s + head * job.local.stride_h + element;
    auto place = [&](int64_t step) { return local + (reverse ? count - 1 - step : step) * job.local.stride_s; };
    // Opaque states: what leaves segment g takes the place of local(g), and the first one is as it should be.
    for (int64_t first = 0; first < count; first += kCombineAhead) {
      Vec<T> gathered[kCombineAhead];
#pragma unroll
      for (int i = 0; i < kCombineAhead; ++i)
        if (first + i + 1 < count) gathered[i] = load_vec(place(first + i));  // nobody gathered the last one
#pragma unroll
      for (int i = 0; i < kCombineAhead; ++i) {
        const int64_t step = first + i;
        if (step >= count) break;
        if (!is_opaque) store_global(place(step), z);
        const T factor = reverse && step == 0 ? decay_of_last : decay;
#pragma unroll
        for (int e = 0; e < kSize; ++e) z.x[e] = factor * z.x[e] + gathered[i].x[e];
        if (is_opaque && step > 0 && step + 1 < count) store_global(place(step), z);
      }
    }
  }
  if (!has_waited) ptx::wait_for_previous_kernel();  // whoever waits for this kernel waits for that one too
}

}  // namespace la2::simt
