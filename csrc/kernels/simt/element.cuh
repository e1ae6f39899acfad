// Elements in memory and in the registers of float32 or float64 arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace la2::simt {

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ void from_acc(float& to, float x) { to = x; }
__device__ __forceinline__ void from_acc(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_acc(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_acc(double& to, double x) { to = x; }

// body(an element as a state of T holds it in memory): T, or bfloat16 (params.h). There is no bfloat16 of float64.
template <class T, class Body>
__device__ __forceinline__ void with_state_type(bool is_bf16, const Body& body) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (is_bf16) return body(__nv_bfloat16());
  }
  body(T());
}

}  // namespace la2::simt
