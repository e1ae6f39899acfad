// Vectors of a pool's states between memory (float32, float64 or bfloat16) and registers.
#pragma once

#include "element.cuh"
#include "vec.cuh"

namespace la2::simt {

template <class Acc>
__device__ __forceinline__ Vec<Acc> load_state_vec(const Acc* from) {
  return load_vec(from);
}
__device__ __forceinline__ Vec<float> load_state_vec(const __nv_bfloat16* from) {
  const uint2 raw = *reinterpret_cast<const uint2*>(from);
  return {{__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16),
           __uint_as_float(raw.y & 0xffff0000u)}};
}
template <class Acc>
__device__ __forceinline__ void store_state_vec(Acc* to, const Vec<Acc>& vec) {
  store_global(to, vec);
}
__device__ __forceinline__ void store_state_vec(__nv_bfloat16* to, const Vec<float>& vec) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(vec.x[0], vec.x[1]),
                       high = __floats2bfloat162_rn(vec.x[2], vec.x[3]);
  __stwb(reinterpret_cast<uint2*>(to),
         make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)));
}

// kVector: 16 bytes at once (bfloat16: 8), else one by one, `stride` apart.
template <bool kVector, class P, class Acc>
__device__ __forceinline__ void load_part(Vec<Acc>& s, const P* from, int64_t stride) {
  if (kVector) {
    s = load_state_vec(from);
  } else {
#pragma unroll
    for (int e = 0; e < static_cast<int>(16 / sizeof(Acc)); ++e) s.x[e] = to_acc(from[e * stride]);
  }
}
template <bool kVector, class P, class Acc>
__device__ __forceinline__ void store_part(P* to, const Vec<Acc>& s, int64_t stride) {
  if (kVector) {
    store_state_vec(to, s);
  } else {
#pragma unroll
    for (int e = 0; e < static_cast<int>(16 / sizeof(Acc)); ++e) from_acc(to[e * stride], s.x[e]);
  }
}

}  // namespace la2::simt
