// 16 bytes of float32 or float64, moved by one instruction.
#pragma once

#include <cuda_runtime.h>

namespace la2::simt {

template <class T>
struct alignas(16) Vec {
  T x[16 / sizeof(T)];
};

template <class T>
__device__ __forceinline__ Vec<T> load_vec(const T* from) {
  return *reinterpret_cast<const Vec<T>*>(from);
}

__device__ __forceinline__ void store_vec(float* to, const Vec<float>& vec) {
  *reinterpret_cast<float4*>(to) = make_float4(vec.x[0], vec.x[1], vec.x[2], vec.x[3]);
}
__device__ __forceinline__ void store_vec(double* to, const Vec<double>& vec) {
  *reinterpret_cast<double2*>(to) = make_double2(vec.x[0], vec.x[1]);
}

// To global memory. The plain store above comes out as four 4-byte stores where the compiler, having taken it apart,
// cannot prove the alignment again; the store intrinsics (write-back, the default) cannot be taken apart.
__device__ __forceinline__ void store_global(float* to, const Vec<float>& vec) {
  __stwb(reinterpret_cast<float4*>(to), make_float4(vec.x[0], vec.x[1], vec.x[2], vec.x[3]));
}
__device__ __forceinline__ void store_global(double* to, const Vec<double>& vec) {
  __stwb(reinterpret_cast<double2*>(to), make_double2(vec.x[0], vec.x[1]));
}

}  // namespace la2::simt
