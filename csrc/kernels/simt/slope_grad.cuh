// The slope gradient from the dots of the chunks (trilinear.h), in float64.
//
// With Y_c = <state gradient, state> at the left edge of chunk c, what passes through the chunk is p_c = Y_c - a_c, and
// Y_c+1 = p_c + b_c; the gradient is
//
//     d slope = - sum_c [ intra_c + a1_c + b1_c + C_c p_c ]
//
// Each a and b of an earlier chunk counts in p_c of every later one, so that the sum over c is, without any scan,
//
//     d slope = - [ L Y_0 + sum_c ( intra_c + a1_c + b1_c - C_c a_c + R_c (b_c - a_c) ) ]
//
// with L the tokens of the sequence and R_c those right of chunk c.
//
// Grid: heads x sequences, heads fastest (is_shared: one block a head for all sequences). The threads share out the
// chunk slots of the block's sequences, then the elements of Y_0; a tree in fixed order adds what they have.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "units.cuh"

namespace la2::simt {

constexpr int kSlopeGradThreads = 512;

template <class T>
struct SlopeGradBlock {
  const SlopeGradParams& params;
  int64_t head;

  __device__ Span rows_of(int64_t sequence) const {  // begin: first token, all batch rows in one line
    if (params.cu_seqlens.data != nullptr) return sequence_rows(params.cu_seqlens, sequence, params.sizes.length);
    return {sequence * params.sizes.length, params.sizes.length};
  }

  __device__ int64_t first_slot(int64_t sequence) const {
    return first_chunk_slot(rows_of(sequence).begin, sequence, params.chunk);
  }

  // The last of sequences [first, last] whose slots start at `slot` or before.
  __device__ int64_t sequence_of(int64_t slot, int64_t first, int64_t last) const {
    while (first < last) {
      const int64_t middle = (first + last + 1) / 2;
      if (first_slot(middle) <= slot) {
        first = middle;
      } else {
        last = middle - 1;
      }
    }
    return first;
  }

  // dots[which] of a slot, summed over the slices.
  __device__ double dot(const void* dots, int64_t num_slices, int64_t slot, int which) const {
    const T* from = static_cast<const T*>(dots) + (slot * params.sizes.heads + head) * num_slices * 3;
    double sum = 0;
    for (int64_t slice = 0; slice < num_slices; ++slice) sum += static_cast<double>(from[slice * 3 + which]);
    return sum;
  }

  __device__ double term_of_slot(int64_t slot, int64_t sequence) const {
    const Span rows = rows_of(sequence);
    const int64_t before = (slot - first_slot(sequence)) * params.chunk;
    if (before >= rows.length) return 0;  // between two sequences: a slot of neither
    const int64_t left = rows.length - before;
    const int64_t chunk = left < params.chunk ? left : params.chunk;
    const double a = dot(params.dots_q, params.slices_q, slot, 0), a1 = dot(params.dots_q, params.slices_q, slot, 1);
    const double intra = dot(params.dots_q, params.slices_q, slot, 2);
    const double b = dot(params.dots_k, params.slices_k, slot, 0), b1 = dot(params.dots_k, params.slices_k, slot, 1);
    return intra + a1 + b1 - static_cast<double>(chunk) * a + static_cast<double>(left - chunk) * (b - a);
  }

  // This thread's part of L Y_0.
  __device__ double terms_of_state(int64_t sequence) const {
    const State& s = params.initial_state;
    const State& g = params.grad_initial_state;
    if (s.data == nullptr || g.data == nullptr) return 0;
    const T* state = static_cast<const T*>(s.data) + sequence * s.stride_s + head * s.stride_h;
    const T* grad = static_cast<const T*>(g.data) + sequence * g.stride_s + head * g.stride_h;
    const int dim_v = static_cast<int>(params.sizes.dim_v);
    const int elements = static_cast<int>(params.sizes.dim_k) * dim_v;
    double sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < elements; i += kSlopeGradThreads) {
      const int d = i / dim_v, e = i % dim_v;
      sum += static_cast<double>(state[d * s.stride_d + e * s.stride_e]) *
             static_cast<double>(grad[d * g.stride_d + e * g.stride_e]);
    }
    return static_cast<double>(rows_of(sequence).length) * sum;
  }
};

template <class T>
__global__ void __launch_bounds__(kSlopeGradThreads)
    la2_slope_grad_simt_kernel(const __grid_constant__ SlopeGradParams params) {
  __shared__ double warp_sums[kSlopeGradThreads / 32];
  const int64_t head = blockIdx.x % params.sizes.heads;
  const SlopeGradBlock<T> block{params, head};
  const int64_t first = params.is_shared ? 0 : blockIdx.x / params.sizes.heads;
  const int64_t last = params.is_shared ? params.sizes.num_seqs - 1 : first;

  double sum = 0;
  if (first <= last) {
    const int64_t begin = block.first_slot(first);
    const int64_t end = block.first_slot(last) + (block.rows_of(last).length + params.chunk - 1) / params.chunk;
    for (int64_t slot = begin + threadIdx.x; slot < end; slot += kSlopeGradThreads) {
      sum += block.term_of_slot(slot, block.sequence_of(slot, first, last));
    }
    for (int64_t sequence = first; sequence <= last; ++sequence) sum += block.terms_of_state(sequence);
  }

  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int warp = 0; warp < kSlopeGradThreads / 32; ++warp) total += warp_sums[warp];
    const int64_t sequence = params.is_shared ? 0 : first;
    static_cast<T*>(params.grad_slope)[sequence * params.sizes.heads + head] = static_cast<T>(-total);
  }
}

}  // namespace la2::simt
