// Two 16-bit floats in one register, as the matrix instructions take them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace la2::tile {

// Rounds to nearest even; `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// (low, high) = pair + rest, each rounded to 16 bits.
template <class T>
__device__ __forceinline__ void split_pair(float low, float high, uint32_t& pair, uint32_t& rest) {
  pair = tile::pack<T>(low, high);
  const float2 rounded = tile::unpack<T>(pair);
  rest = tile::pack<T>(low - rounded.x, high - rounded.y);
}

// Products of two bfloat16 with two float32 numbers by bfloat16 arithmetic, a third of the instructions that it takes
// in float32. The factors are sums of two bfloat16 each, factors.x + factors.y (split_pair).
__device__ __forceinline__ __nv_bfloat162 bf16_pair(const uint32_t& bits) {
  return *reinterpret_cast<const __nv_bfloat162*>(&bits);
}
// As pair + rest. The product with factors.x has 16 digits: what its rounding leaves is exact, and `rest` rounded once.
__device__ __forceinline__ void split_product(uint32_t values, uint2 factors, uint32_t& pair, uint32_t& rest) {
  const __nv_bfloat162 value = bf16_pair(values), factor = bf16_pair(factors.x), small = bf16_pair(factors.y);
  const __nv_bfloat162 product = __hmul2_rn(value, factor);
  const __nv_bfloat162 left = __hfma2(value, small, __hfma2(value, factor, __hneg2(product)));
  pair = *reinterpret_cast<const uint32_t*>(&product);
  rest = *reinterpret_cast<const uint32_t*>(&left);
}
// As one pair, rounded once by the fma; what rounding the smaller product adds is 2^-18.
__device__ __forceinline__ uint32_t product(uint32_t values, uint2 factors) {
  const __nv_bfloat162 value = bf16_pair(values);
  const __nv_bfloat162 all = __hfma2(value, bf16_pair(factors.x), __hmul2_rn(value, bf16_pair(factors.y)));
  return *reinterpret_cast<const uint32_t*>(&all);
}

}  // namespace la2::tile
