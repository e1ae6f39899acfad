// x = sigmoid(gate) x / sqrt(mean(x^2) + eps) weight, row by row, in place: RMSNorm and gate behind decode, whose rows
// are short of anything to do but wait for memory. A block takes a row: a thread 8 elements, which it holds, and more
// where a row has more than the block, which it reads twice. A row's sum has one order, given by the width alone.
#pragma once

#include <cuda_runtime.h>

#include "../params.h"
#include "../ptx/launch_order.cuh"
#include "element.cuh"
#include "state_part.cuh"

namespace la2::simt {

constexpr int kNormVec = 8;
constexpr int norm_threads(int element_bytes) { return element_bytes > 4 ? 512 : 1024; }  // at most

__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return rsqrt(x); }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1. / (1. + exp(-x)); }

template <class T>
__device__ __forceinline__ void store_elements(T* to, const typename Accumulation<T>::Type (&x)[kNormVec]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint4*>(to) = make_uint4(tile::pack<T>(x[0], x[1]), tile::pack<T>(x[2], x[3]),
                                               tile::pack<T>(x[4], x[5]), tile::pack<T>(x[6], x[7]));
  } else {
#pragma unroll
    for (int i = 0; i < kNormVec; ++i) from_acc(to[i], x[i]);
  }
}

// Past L1: what is read before the kernels in front are done may lie there as it was before one of them changed it.
template <class T>
__device__ __forceinline__ void load_early(Pack<T, kNormVec>& to, const T* from) {
  if constexpr (sizeof(T) == 2) {
    const uint4 raw = __ldcg(reinterpret_cast<const uint4*>(from));
    to.words[0] = raw.x, to.words[1] = raw.y, to.words[2] = raw.z, to.words[3] = raw.w;
  } else {
#pragma unroll
    for (int i = 0; i < to.kWords; ++i) to.words[i] = __ldcg(reinterpret_cast<const uint32_t*>(from) + i);
  }
}

template <class T>
__global__ void __launch_bounds__(norm_threads(sizeof(T)), 1)
    la2_gated_norm_simt_kernel(const __grid_constant__ GatedNormParams params) {
  using Acc = typename Accumulation<T>::Type;
  using Elements = Pack<T, kNormVec>;
  __shared__ Acc sums[32];
  const int width = static_cast<int>(params.width);
  T* const x = static_cast<T*>(params.x) + blockIdx.x * params.width;
  const T* const gate = static_cast<const T*>(params.gate) + blockIdx.x * params.gate_stride;
  const T* const weight = static_cast<const T*>(params.weight);
  const int first = static_cast<int>(threadIdx.x) * kNormVec, step = static_cast<int>(blockDim.x) * kNormVec;
  const bool is_inside = first < width;

  // All that is not the kernel before's, while it is still at work.
  Elements own_weight;
  Acc own_gate[kNormVec], sum = 0;
  const Acc share = Acc(1) / static_cast<Acc>(width);
  {
    Elements raw;
    if (is_inside) load_early(raw, gate + first);
    if (is_inside) load_early(own_weight, weight + first);
#pragma unroll
    for (int i = 0; i < kNormVec; ++i) sum += own_gate[i] = sigmoid(raw[i]);
  }
  if (sum > kNormVec + 1) return;  // never: else ptxas has the sigmoids behind the wait
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();

  auto sum_of_squares = [](const Elements& of) {
    Acc sum = 0;
#pragma unroll
    for (int i = 0; i < kNormVec; ++i) sum += of[i] * of[i];
    return sum;
  };
  Elements own;
  if (is_inside) load_elements(own, x + first);
  sum = sum_of_squares(own);
  for (int at = first + step; at < width; at += step) {
    Elements more;
    load_elements(more, x + at);
    sum += sum_of_squares(more);
  }
  auto sum_over_warp = [](Acc sum) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    return sum;
  };
  sum = sum_over_warp(sum);
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = sum_over_warp(lane < blockDim.x / 32 ? sums[lane] : Acc(0));
  const Acc factor = reciprocal_root(sum * share + static_cast<Acc>(params.eps));

  Acc y[kNormVec];
#pragma unroll
  for (int i = 0; i < kNormVec; ++i) y[i] = own[i] * factor * (own_weight[i] * own_gate[i]);
  if (is_inside) store_elements(x + first, y);
  for (int at = first + step; at < width; at += step) {
    Elements more, more_gate, more_weight;
    load_elements(more, x + at);
    load_elements(more_gate, gate + at);
    load_elements(more_weight, weight + at);
#pragma unroll
    for (int i = 0; i < kNormVec; ++i) y[i] = more[i] * factor * (more_weight[i] * sigmoid(more_gate[i]));
    store_elements(x + at, y);
  }
}

}  // namespace la2::simt
