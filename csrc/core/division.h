// Division by a number that the host knows, of which the device makes a multiplication and a shift: a division of 64
// bits takes it some hundred instructions, one after the other (csrc/kernels/DESIGN.md).
#pragma once

#include <stdint.h>

#include "host_device.h"

namespace la2 {

// Granlund and Montgomery 1994, "Division by invariant integers using multiplication". With 2^(shift-1) < d <= 2^shift
// and m = floor(2^32 (2^shift - d) / d) + 1:  n / d = (m n / 2^32 + n) / 2^shift, rounded down twice.
struct Division {
  int64_t divisor;  // > 0
  uint32_t multiplier, shift;

  static Division by(int64_t divisor) {
    Division division{divisor, 0, 0};
    if (divisor > INT32_MAX) return division;
    while ((int64_t{1} << division.shift) < divisor) ++division.shift;
    const uint64_t rest = (uint64_t{1} << division.shift) - static_cast<uint64_t>(divisor);
    division.multiplier = static_cast<uint32_t>((rest << 32) / static_cast<uint64_t>(divisor) + 1);
    return division;
  }

  // n / divisor rounded down, n >= 0; small_quotient: where both have 31 bits.
  LA2_HOST_DEVICE int small_quotient(int n) const {
    const uint32_t number = static_cast<uint32_t>(n);
    const uint32_t high = static_cast<uint32_t>((uint64_t{multiplier} * number) >> 32);
    return static_cast<int>((high + number) >> shift);
  }
  LA2_HOST_DEVICE int64_t quotient(int64_t n) const {
    return n > INT32_MAX || divisor > INT32_MAX ? n / divisor : small_quotient(static_cast<int>(n));
  }
  LA2_HOST_DEVICE int64_t quotient_up(int64_t n) const { return quotient(n + divisor - 1); }
};

}  // namespace la2
