// The one definition of decay: lambda^n = exp(-s n), n >= 0, for a slope s >= 0.
//
// Powers are computed in double from the slope itself (never by repeated multiplication) and rounded once
// to the accumulation type T. Only exp of non-positive numbers is formed, so a steep slope gives exact
// zeros, s = 0 exact ones, and a NaN slope NaN.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#include <math.h>
#define LA2_HOST_DEVICE __host__ __device__
#define LA2_EXP(x) ::exp(x)
#else
// The CPU kernels include no <math.h>: its C++ wrapper brings inline functions of its own.
#define LA2_HOST_DEVICE
#define LA2_EXP(x) __builtin_exp(x)
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

}  // namespace la2
