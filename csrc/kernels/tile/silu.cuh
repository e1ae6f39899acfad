// SiLU, x / (1 + e^-x), of elements in the form in which the kernels hold them.
#pragma once

#include "../ptx/approximate.cuh"
#include "half_pair.cuh"

namespace la2::tile {

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }
__device__ __forceinline__ double silu(double x) { return x / (1. + exp(-x)); }

template <class T>
__device__ __forceinline__ uint32_t at_least(uint32_t pair, float bound);
template <>
__device__ __forceinline__ uint32_t at_least<__nv_bfloat16>(uint32_t pair, float bound) {
  const __nv_bfloat162 larger = __hmax2_nan(bf16_pair(pair), __float2bfloat162_rn(bound));
  return *reinterpret_cast<const uint32_t*>(&larger);
}
template <>
__device__ __forceinline__ uint32_t at_least<__half>(uint32_t pair, float bound) {
  const __half2 larger = __hmax2_nan(*reinterpret_cast<const __half2*>(&pair), __float2half2_rn(bound));
  return *reinterpret_cast<const uint32_t*>(&larger);
}

// Of two 16-bit floats, in float32 (at most 5e-6 off) and rounded once. Both quotients by one reciprocal, that of the
// product. So that it is finite, numbers under -43.5, of which SiLU is above -10^-17, count as that, minus infinity too
// (torch's SiLU of it is NaN); and where one is NaN, both become it.
template <class T>
__device__ __forceinline__ uint32_t silu_pair(uint32_t pair) {
  constexpr float kLeast = -43.5f, kMinusLog2E = -1.4426950408889634f;
  const float2 x = unpack<T>(at_least<T>(pair, kLeast));
  const float low = ptx::approximate_exp2(x.x * kMinusLog2E), high = ptx::approximate_exp2(x.y * kMinusLog2E);
  const float low_and_one = 1.f + low;
  const float both = ptx::approximate_reciprocal(low_and_one * high + low_and_one);
  return pack<T>(x.x * (both * high + both), x.y * (both * low_and_one));
}

}  // namespace la2::tile
