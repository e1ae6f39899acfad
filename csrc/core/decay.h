// The one definition of decay: lambda^n = exp(-s n), n >= 0, for a slope s >= 0.
//
// Powers are computed from the slope itself (never by repeated multiplication), in double, and rounded once to the
// accumulation type T; by the tensor-core kernels in float32 to the same accuracy. Only exp of non-positive numbers is
// formed, so a steep slope gives exact zeros, s = 0 exact ones, and a NaN slope NaN.
#pragma once

#include <stdint.h>

#include "host_device.h"

#if defined(__CUDACC__)
#include <math.h>
#define LA2_EXP(x) ::exp(x)
#define LA2_FMA(x, y, z) ::fmaf(x, y, z)
#define LA2_RINT(x) ::rintf(x)
#else
// The CPU kernels include no <math.h>: its C++ wrapper brings inline functions of its own.
#define LA2_EXP(x) __builtin_exp(x)
#define LA2_FMA(x, y, z) __builtin_fmaf(x, y, z)
#define LA2_RINT(x) __builtin_rintf(x)
#endif

namespace la2 {

// Everything here is static: the CPU kernels compile this header once per instruction set, and a shared
// (weak) copy could be the one of a better machine.

template <class T>
static inline LA2_HOST_DEVICE double smallest_normal() {
  return sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022;
}

// lambda^n before rounding to T. A power below T's normal range is zero: as a subnormal it would carry few
// bits, and every multiplication with it would cost a microcode assist.
template <class T>
static inline LA2_HOST_DEVICE double decay_power(double slope, int64_t n) {
  if (n == 0 && slope == slope) return 1.0;  // also for an infinite slope, where s n is NaN
  const double power = LA2_EXP(-slope * static_cast<double>(n));
  return power < smallest_normal<T>() ? 0.0 : power;
}

// lambda^n in the type of the slope.
static inline LA2_HOST_DEVICE double rounded_decay_power(double slope, int32_t n) {
  return decay_power<double>(slope, n);
}
// In float32 without float64, whose exp is eighty instructions that wait for each other: within 1.3 units of the last
// place, 0.26 on average (rounding alone: 0.25), tests/core/test_numbers.py.
static inline LA2_HOST_DEVICE float rounded_decay_power(float slope, int32_t n) {
  if (n == 0 && slope == slope) return 1.f;
  // -s n = x + rest = k ln 2 + r
  const float count = static_cast<float>(n), left = static_cast<float>(n - static_cast<int32_t>(count));
  const float x = -slope * count, rest = LA2_FMA(-slope, left, LA2_FMA(-slope, count, -x));
  const float k = LA2_RINT(x * 1.44269504f);
  if (k < -126.f) return 0.f;  // also of an infinite slope
  const float r = LA2_FMA(-k, 0x1.7f7d1cp-20f, LA2_FMA(-k, 0x1.62e4p-1f, x)) + rest;
  float q = 1 / 5040.f;
  q = LA2_FMA(q, r, 1 / 720.f);
  q = LA2_FMA(q, r, 1 / 120.f);
  q = LA2_FMA(q, r, 1 / 24.f);
  q = LA2_FMA(q, r, 1 / 6.f);
  q = LA2_FMA(q, r, 0.5f);
  union {
    uint32_t bits;
    float value;
  } two_to_k;
  two_to_k.bits = static_cast<uint32_t>(static_cast<int32_t>(k) + 127) << 23;
  const float power = (LA2_FMA(q, r * r, r) + 1.f) * two_to_k.value;
  return power < 0x1p-126f ? 0.f : power;
}

}  // namespace la2
